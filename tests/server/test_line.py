"""The line protocol, rule by rule: first as a function, then on the wire."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.line import LONGEST_LINE, answer
from server.simulate import BadInput, Failed, Request, Simulation, Status
from tests.server.raw_client import LINE_REPLY, ServerProcess, holding, http_request, until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.server.conftest import StartServer

BAD = b"2,0,\n"


# --- answer ---


class Canned(Simulation):
    """Carries nothing out: does as it was told and takes down what was asked."""

    def __init__(self, outcome: float | Exception = 0.0) -> None:
        super().__init__({}, stalls=True)
        self.outcome = outcome
        self.asked: list[tuple[Request, float]] = []

    def perform(self, request: Request, since: float) -> float:
        self.asked.append((request, since))
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


def test_echoes_status_and_path_and_rounds_the_time_down() -> None:
    simulation = Canned(0.0109)
    assert answer(b" 42 ,10,some_file\r\n", simulation, 7.0) == b"42,10,some_file\n"
    assert simulation.asked == [(Request(b"42", 0.01, b"some_file"), 7.0)]


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\r"])
def test_takes_any_line_end_or_none(end: bytes) -> None:
    assert answer(b"0,10,x" + end, Canned(), 0.0) == b"0,0,x\n"


def test_a_line_may_have_4096_bytes_with_its_end() -> None:
    path = b"p" * (LONGEST_LINE - len(b"0,0,\n"))
    assert answer(b"0,0,%b\n" % path, Canned(), 0.0) == b"0,0,%b\n" % path
    assert answer(b"0,0,%bq\n" % path, Canned(), 0.0) == BAD


@pytest.mark.parametrize("status", [Status.QUEUE_TIMEOUT, *list(Status)[2:]])
def test_echoes_the_path_of_a_failure(status: Status) -> None:
    assert answer(b"0,0,a/b\n", Canned(Failed(status, 1.9999, "")), 0.0) == b"%d,1999,a/b\n" % status


def test_bad_input_echoes_nothing() -> None:
    assert answer(b"0,0,a/b\n", Canned(BadInput("stalls are off")), 0.0) == BAD


@given(
    st.binary(max_size=5000) | st.tuples(st.integers(), st.integers(), st.binary()).map(lambda each: b"%d,%d,%b" % each)
)
def test_whatever_comes_one_line_goes_out(line: bytes) -> None:
    line = line.partition(b"\n")[0] + b"\n"
    reply = answer(line, Canned(1.5), 0.0)
    assert reply == BAD or re.fullmatch(rb"[+-]?\d+,1500,[^,\n]+\n", reply)


# --- The wire ---


def told(reply: bytes) -> tuple[int, int, bytes]:
    """The three fields of a reply."""
    assert LINE_REPLY.match(reply), reply
    status, total, path = reply.removesuffix(b"\n").split(b",")
    return int(status), int(total), path


def test_answers_the_example_and_hangs_up(server: ServerProcess) -> None:
    status, total, path = told(server.line(b"0,10,some_file\n"))
    assert (status, path) == (0, b"some_file")
    assert total >= 10


@pytest.mark.parametrize("milliseconds", [0, 1, 60])
def test_the_total_is_never_less_than_the_stall(server: ServerProcess, milliseconds: int) -> None:
    for path in (b"some_file", b"d1", b"d1/", b"d1/small"):
        status, total, echoed = told(server.line(b"0,%d,%b\n" % (milliseconds, path)))
        assert (status, echoed) == (0, path)
        assert total >= milliseconds


@pytest.mark.parametrize("status", [b"0", b"7", b"-5", b"+3", b"000", b"123456789012345678"])
def test_echoes_the_status_that_the_client_wants(server: ServerProcess, status: bytes) -> None:
    assert re.fullmatch(rb"%b,\d+,x\n" % re.escape(status), server.line(b"%b,0,x\n" % status))


@pytest.mark.parametrize("line", [b"0,0,x\r\n", b" 0 , 0 ,x\n", b"\t0\t,\t0,x\r\n"])
def test_takes_crlf_and_spaces_around_numbers(server: ServerProcess, line: bytes) -> None:
    assert told(server.line(line))[::2] == (0, b"x")


def test_echoes_a_path_byte_for_byte(server: ServerProcess) -> None:
    path = bytes(each for each in range(256) if each not in b",\n") * 5
    assert told(server.line(b"0,0," + path + b"\n"))[::2] == (0, path)


def test_reads_a_file_whose_name_is_not_utf_8(server: ServerProcess) -> None:
    assert told(server.line(b"0,0,d1/\xff\xfe not UTF-8\n"))[::2] == (0, b"d1/\xff\xfe not UTF-8")
    assert told(server.line(b"0,0,d1/\xff\xfe\n"))[::2] == (5, b"d1/\xff\xfe")


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"\r\n",
        b"garbage\n",
        b"x,y,z\n",
        b"1,2\n",
        b"1,2,3,4\n",
        b"0,10,\n",
        b"0,-1,x\n",
        b"0,1.5,x\n",
        b"0,3600001,x\n",
        b"0,99999999999999999999999,x\n",
        b"\xff,10,x\n",
        b"0,\xff\xfe,x\n",
        b"GET / HTTP/2.0\r\n",
        b"GET /\r\n",
        b"GET / HTTP/1.1 more\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n",  # TLS
        b"\0" * 100 + b"\n",
    ],
)
def test_bad_input_is_answered_and_hung_up_on(server: ServerProcess, line: bytes) -> None:
    assert server.line(line) == BAD


def test_a_line_with_a_comma_before_the_version_is_no_http(server: ServerProcess) -> None:
    assert told(server.line(b"0,10, HTTP/1.1\n"))[::2] == (0, b" HTTP/1.1")


def test_half_close_without_a_newline_ends_the_line(server: ServerProcess) -> None:
    assert told(server.line(b"0,10,some_file", half_close=True))[::2] == (0, b"some_file")


def test_half_close_after_the_newline_does_not_cost_the_reply(server: ServerProcess) -> None:
    assert told(server.line(b"0,100,some_file\n", half_close=True))[::2] == (0, b"some_file")


def test_end_of_input_at_once_gets_nothing(server: ServerProcess) -> None:
    assert server.line(b"", half_close=True) == b""


@pytest.mark.parametrize("at", [1, 2, 5, 14])
def test_a_request_may_come_in_two_packets(server: ServerProcess, at: int) -> None:
    line = b"0,10,some_file\n"
    with server.connect() as connection:
        connection.send(line[:at])
        time.sleep(0.05)
        connection.send(line[at:])
        assert told(connection.rest())[::2] == (0, b"some_file")


def test_an_http_request_line_may_come_in_pieces(server: ServerProcess) -> None:
    with server.connect() as connection:
        for piece in (b"G", b"ET /hea", b"lthz HTTP/1", b".1\r", b"\nHost: x\r\nConnection: close\r", b"\n\r\n"):
            connection.send(piece)
            time.sleep(0.02)
        assert connection.response().body == b"ok\n"


def test_what_follows_the_first_line_is_ignored(server: ServerProcess) -> None:
    assert told(server.line(b"0,0,first\n0,0,second\n"))[::2] == (0, b"first")
    assert told(server.line(b"0,0,first\nGET / HTTP/1.1\r\n\r\n"))[::2] == (0, b"first")
    assert told(server.line(b"0,50,first\n" + b"y" * 100_000))[::2] == (0, b"first")


def test_a_line_that_is_too_long_is_bad_input(server: ServerProcess) -> None:
    path = b"p" * (LONGEST_LINE - len(b"0,0,\n"))
    assert told(server.line(b"0,0,%b\n" % path))[::2] == (0, path)
    assert server.line(b"0,0,%bq\n" % path) == BAD
    assert server.line(b"0,0,%bqr" % path, half_close=True) == BAD
    assert server.line(b"0,0," + b"p" * 20_000 + b"\n") == BAD


def test_a_megabyte_without_a_newline_is_bad_input(server: ServerProcess) -> None:
    assert server.line(b"x" * 1_000_000) == BAD
    assert server.line(b"0,0," + b"x" * 1_000_000, half_close=True) == BAD


def test_an_unknown_path_is_simulated_and_a_missing_file_is_not(server: ServerProcess) -> None:
    assert told(server.line(b"0,0,d2/small\n"))[0] == 0
    assert told(server.line(b"0,0,d1/missing\n"))[::2] == (5, b"d1/missing")
    assert told(server.line(b"0,0,d1/../tree\n"))[::2] == (5, b"d1/../tree")
    assert told(server.line(b"0,0,lost/small\n"))[::2] == (3, b"lost/small")


def test_idle_clients_are_hung_up_on_without_a_word(start_server: StartServer) -> None:
    server = start_server("--simulate", "--idle-timeout", "0.3", "--request-timeout", "0.3")
    with server.connect() as silent, server.connect() as half:
        half.send(b"0,0,ha")
        assert silent.rest() == b""
        assert half.rest() == b""
    # A stall that is longer than the idle time-out is nobody's idleness.
    assert told(server.line(b"0,700,some_file\n"))[0] == 0


def test_idle_clients_cost_no_thread(start_server: StartServer) -> None:
    server = start_server("--simulate")
    told(server.line(b"0,1,x\n"))
    before = server.threads()
    connections = [server.connect() for _ in range(300)]
    until(lambda: server.sockets() > 300, "the server to accept them")
    assert told(server.line(b"0,1,x\n"))[0] == 0
    assert server.threads() == before
    for connection in connections:
        connection.close()
    until(lambda: server.sockets() == 1, "the server to close them")


def test_a_request_that_waits_four_seconds_is_not_carried_out(start_server: StartServer, tree: Path) -> None:
    server = start_server(
        *("--simulate", "--disk", f"one={tree}", "--threads", "1", "--queue", "10", "--deadline", "30")
    )
    server.wait_for_first_answer("one")
    with (
        server.connect() as late,
        holding(server, b"0,5500,one\n") as slow,
        server.connect() as queued,
        server.connect() as web,
    ):
        until(lambda: server.disk("one").in_flight == 1, "the slow read to take the only slot")
        queued.send(b"0,1,one/small\n")
        web.send(http_request("/200,1,one/small"))
        time.sleep(4.5)
        # Its connection is as old as that of the others: a client waits from the moment it has connected.
        late.send(b"0,1,elsewhere\n")
        status, total, path = told(late.rest())
        assert (status, path) == (1, b"elsewhere")
        assert total >= 4500
        status, total, path = told(queued.rest())
        assert (status, path) == (1, b"one/small")
        assert 4000 <= total < 5500
        response = web.response()
        assert response.status == 408
        assert b"queue" in response.body
        assert told(slow.rest())[::2] == (0, b"one")
    disk = server.disk("one")
    assert (disk.bytes, disk.timeouts) == (0, 2)


def test_a_disk_without_a_free_slot_refuses(start_server: StartServer, tree: Path) -> None:
    server = start_server("--simulate", "--disk", f"one={tree}", "--threads", "1", "--queue", "0")
    server.wait_for_first_answer("one")
    with holding(server, b"0,1000,one/small\n") as slow:
        until(lambda: server.disk("one").in_flight == 1, "the slow read to take the only slot")
        assert told(server.line(b"0,0,one/small\n"))[::2] == (3, b"one/small")
        assert told(server.line(b"0,0,other\n"))[0] == 0
        assert told(slow.rest())[::2] == (0, b"one/small")
    assert told(server.line(b"0,0,one/small\n"))[0] == 0


def test_a_read_that_misses_its_deadline_says_so(start_server: StartServer, tree: Path) -> None:
    server = start_server("--simulate", "--disk", f"one={tree}", "--threads", "1", "--queue", "0", "--deadline", "0.2")
    server.wait_for_first_answer("one")
    status, total, path = told(server.line(b"0,1500,one/small\n"))
    assert (status, path) == (4, b"one/small")
    assert 200 <= total < 1500
    # The slot is still taken: by nobody's fault but the disk's.
    assert told(server.line(b"0,0,one/small\n"))[::2] == (3, b"one/small")
    until(lambda: told(server.line(b"0,0,one/small\n"))[0] == 0, "the disk to come back")
    assert told(server.line(b"0,0,one/missing\n"))[::2] == (5, b"one/missing")


def test_a_server_with_disks_does_not_stall_unless_told_to(start_server: StartServer, tree: Path) -> None:
    server = start_server("--disk", f"d1={tree}")
    assert server.line(b"0,1,some_file\n") == BAD
    assert server.line(b"0,1,d1/small\n") == BAD
    assert told(server.line(b"0,0,d1/small\n"))[::2] == (0, b"d1/small")
    assert server.disk("d1").bytes == 1024
    assert told(server.line(b"0,0,some_file\n"))[::2] == (5, b"some_file")
    assert server.http("/200,1,d1/small").status == 400
    assert server.http("/200,0,d1/small").status == 200
    assert server.http("/200,0,some_file").status == 404
