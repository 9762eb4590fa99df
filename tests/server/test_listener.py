"""One port for all: HTTP as RFC 9112 has it, limits on clients of any kind, the access log."""

from __future__ import annotations

import contextlib
import io
import re
import socket
import subprocess
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from server.listener import LONGEST_HEAD, Connection, Handler
from tests.server import raw_client
from tests.server.conftest import LARGE, SMALL
from tests.server.raw_client import ServerProcess, http_request, until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.server.conftest import StartServer

MEGABYTE = 1024 * 1024


# --- The stream of a connection ---


def test_a_connection_returns_first_what_was_read_ahead() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        stream = Connection(ours)
        stream.push_back(b"world")
        stream.push_back(b"hello ")
        theirs.sendall(b"!\n")
        theirs.shutdown(socket.SHUT_WR)
        with io.BufferedReader(stream, 4) as reader:
            assert reader.readlines() == [b"hello world!\n"]


# --- Requests and connections ---


@pytest.mark.parametrize(
    ("version", "header", "stays"),
    [
        ("1.1", None, True),
        ("1.1", "keep-alive", True),
        ("1.1", "close", False),
        ("1.1", "Close", False),
        ("1.0", None, False),
        ("1.0", "keep-alive", True),
        ("1.0", "Keep-Alive", True),
        ("1.0", "close", False),
    ],
)
@pytest.mark.parametrize("target", ["/0,1,some_file", "/v1/d1/small", "/v1/d1/missing", "/healthz"])
def test_keeps_a_connection_when_both_sides_want_to(
    server: ServerProcess, version: str, header: str | None, stays: bool, target: str
) -> None:
    request = http_request(target, {} if header is None else {"Connection": header}, version=version, close=False)
    with server.connect() as connection:
        connection.send(request)
        said = connection.response().headers["Connection"]
        if stays:
            assert said == ("keep-alive" if version == "1.0" else None)
            connection.send(request)
            assert connection.response().headers["Connection"] == said
        else:
            assert said == "close"
            assert connection.rest() == b""


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("size", [1, 100_000])
def test_a_body_ends_the_connection_and_is_no_next_request(server: ServerProcess, method: str, size: int) -> None:
    # RFC 9110, 9.3.1: a body of a GET has no meaning; what must not happen is that it is taken for a request.
    body = b"GET /v1/d1/small HTTP/1.1\r\nHost: x\r\n\r\n".ljust(size, b"x")[:size]
    with server.connect() as connection:
        request = http_request("/v1/d1/empty", {"Content-Length": str(size)}, method=method, close=False)
        connection.send(request + body)
        assert connection.response(method).status in ((200, 400) if method == "HEAD" else (200,))
        assert connection.rest() == b""


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_body_in_chunks_ends_the_connection(server: ServerProcess, method: str) -> None:
    with server.connect() as connection:
        request = http_request("/v1/d1/empty", {"Transfer-Encoding": "chunked"}, method=method, close=False)
        connection.send(request + b"5\r\nhello\r\n0\r\n\r\n")
        response = connection.response()
        assert response.status == (200 if method == "GET" else 405)
        assert response.headers["Connection"] == "close"
        assert connection.rest() == b""


def test_does_not_ask_for_a_body_that_it_will_not_read(server: ServerProcess) -> None:
    with server.connect() as connection:
        headers = {"Expect": "100-continue", "Content-Length": "1000000"}
        connection.send(http_request("/v1/d1/new", headers, method="PUT", close=False))
        response = connection.response()
        assert (response.status, response.headers["Connection"]) == (405, "close")
        assert connection.rest() == b""


def test_a_large_upload_is_refused_without_a_reset(server: ServerProcess) -> None:
    # A reset would destroy the answer on its way to a client that is still sending: RFC 9112, 9.6.
    with server.connect() as connection:
        connection.send_as_much_as_goes(
            http_request("/v1/d1/new", {"Content-Length": str(MEGABYTE)}, method="PUT") + b"x" * MEGABYTE
        )
        assert connection.response().status == 405
        assert connection.rest() == b""


def test_two_lengths_that_differ_are_no_request(server: ServerProcess) -> None:
    # RFC 9112, 6.3: otherwise a proxy in front and this server see different requests.
    with server.connect() as connection:
        connection.send(
            http_request("/healthz", [("Content-Length", "0"), ("Content-Length", "5")], close=False) + b"hello"
        )
        response = connection.response()
        assert response.status == 400 or response.headers["Connection"] == "close"
        assert connection.rest() == b""


@pytest.mark.parametrize(
    "field", ["Content-Length : 5", "no colon here", " folded: without a line before", ": no name"]
)
def test_a_malformed_header_is_no_request(server: ServerProcess, field: str) -> None:
    # RFC 9112, 5.1; what must not happen is that this header, or all after it, count as not being there.
    with server.connect() as connection:
        connection.send(
            f"GET /v1/d1/small HTTP/1.1\r\n{field}\r\nHost: x\r\nRange: bytes=0-0\r\nConnection: close\r\n\r\n".encode()
        )
        assert connection.response().status == 400
        assert connection.rest() == b""


@pytest.mark.parametrize("line_end", ["\r\n", "\n"])
def test_takes_bare_line_feeds(server: ServerProcess, line_end: str) -> None:
    # RFC 9112, 2.2: a recipient MAY; people type requests into nc.
    with server.connect() as connection:
        connection.send(line_end.join(["GET /v1/d1/small HTTP/1.0", "Range: bytes=0-4", "", ""]).encode())
        response = connection.response()
        assert (response.status, response.body) == (206, SMALL[:5])


@pytest.mark.parametrize(
    "cut", ["GET /healthz HTTP/1.1", "GET /healthz HTTP/1.1\r\n", "GET /healthz HTTP/1.1\r\nHost: x\r\nX: "]
)
def test_a_head_that_ends_too_early_is_no_request(server: ServerProcess, cut: str) -> None:
    # What is missing may be the header that says what the client wants: RFC 9112, 8.
    with server.connect() as connection:
        connection.send(cut.encode())
        connection.half_close()
        reply = connection.rest()
        assert reply.startswith(b"HTTP/1.1 400 ") or reply in (b"", b"2,0,\n")


@pytest.mark.parametrize("length", ["-1", "x", "1.5", "5, 6", "0x5"])
def test_a_length_that_is_no_number_is_bad_input(server: ServerProcess, length: str) -> None:
    assert server.http("/healthz", {"Content-Length": length}).status == 400


@pytest.mark.parametrize(
    "target",
    [
        "http://elsewhere:1234/v1/d1/small",
        "http://x/v1/d1/small",
        "https://x/v1/d1/small?query",
        "HTTP://x/v1/d1/small",
    ],
)
def test_takes_the_absolute_form(server: ServerProcess, target: str) -> None:
    assert server.http(target).body == SMALL


def test_the_absolute_form_without_a_path_is_the_root(server: ServerProcess) -> None:
    assert server.http("http://localhost").headers["Content-Type"].startswith("text/html")


def test_nobody_needs_a_host(server: ServerProcess) -> None:
    # RFC 9112, 3.2 would have 400 for HTTP/1.1. There are no virtual hosts here to be confused, and the clients of the
    # experiment are written by hand.
    with server.connect() as connection:
        connection.send(b"GET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n")
        assert connection.response().status == 200
    with server.connect() as connection:
        connection.send(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert connection.response().status == 200


@pytest.mark.parametrize("method", ["get", "FOO", "CONNECT", "OPTIONS"])
def test_an_odd_method_gets_a_proper_answer(server: ServerProcess, method: str) -> None:
    assert server.http("/v1/d1/small", method=method).status in (200, 400, 405, 501)


@pytest.mark.parametrize("line", [b"0,10,some_file\n", b"GARBAGE\r\n\r\n", b"GET / HTTP/3.0\r\n\r\n", b"\r\n"])
def test_garbage_on_a_kept_connection_is_bad_input(server: ServerProcess, line: bytes) -> None:
    with server.connect() as connection:
        connection.send(http_request("/healthz", close=False) + line)
        assert connection.response().status == 200
        response = connection.response()
        assert (response.status, response.headers["Connection"]) == (400, "close")
        assert connection.rest() == b""


# --- Limits ---


@pytest.mark.parametrize("size", [5_000, 8_000])
def test_a_request_line_may_be_long(server: ServerProcess, size: int) -> None:
    # Longer than a line of the line protocol; the path is longer than Linux has any.
    assert server.http("/v1/d1/" + "x" * (size - 40)).status == 400
    assert server.http("/v1/d1/small?" + "x" * (size - 40)).body == SMALL


@pytest.mark.parametrize("size", [8_192, 9_000, 70_000, MEGABYTE])
def test_a_request_line_may_not_be_too_long(server: ServerProcess, size: int) -> None:
    with server.connect() as connection:
        connection.send_as_much_as_goes(http_request("/v1/d1/" + "x" * size))
        response = connection.response()
        assert (response.status, response.headers["Connection"]) == (414, "close")
        assert connection.rest() == b""


def test_headers_may_be_long(server: ServerProcess) -> None:
    assert server.http("/healthz", {"X-Long": "x" * 30_000, "X-Longer": "x" * 30_000}).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        [("X-Long", "x" * LONGEST_HEAD)],
        [("X-Longer", "x" * MEGABYTE)],
        [(f"X-{number}", "x" * 2_000) for number in range(90)],
        [(f"X-{number}", "x") for number in range(101)],
        [(f"X-{number}", "x") for number in range(20_000)],
    ],
    ids=["64 KiB", "1 MiB", "90 of 2 KB", "101 short ones", "20,000 short ones"],
)
def test_headers_may_not_be_too_long(server: ServerProcess, headers: list[tuple[str, str]]) -> None:
    said = len(server.said())
    with server.connect() as connection:
        connection.send_as_much_as_goes(http_request("/healthz", headers))
        response = connection.response()
        assert (response.status, response.headers["Connection"]) == (431, "close")
        assert connection.rest() == b""
    assert server.said()[said:] == "", "a client's mistake is worth no line in the log"


def test_a_head_that_takes_too_long_is_given_up(start_server: StartServer) -> None:
    server = start_server("--simulate", "--request-timeout", "0.5", "--idle-timeout", "20")
    begun = time.monotonic()
    with server.connect() as slow_line, server.connect() as slow_header, server.connect() as second:
        slow_line.send(b"GET /heal")
        slow_header.send(b"GET /healthz HTTP/1.1\r\nHost: x")
        second.send(http_request("/healthz", close=False) + b"GET /heal")
        assert second.response().status == 200
        for connection in (slow_header, second):
            response = connection.response()
            assert (response.status, response.headers["Connection"]) == (408, "close")
            assert connection.rest() == b""
        # Nobody can tell whether this is HTTP; hanging up without a word is as good.
        assert slow_line.rest() in (
            b"",
            b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
        )
    assert time.monotonic() - begun < 15


def test_a_drop_now_and_then_does_not_keep_a_head_alive(start_server: StartServer) -> None:
    server = start_server("--simulate", "--request-timeout", "0.5", "--idle-timeout", "20")
    with server.connect() as connection:
        connection.send(b"GET /healthz HTTP/1.1\r\n")
        ends = time.monotonic() + 15
        connection.sock.settimeout(0.1)
        answer = b""
        while not answer:
            assert time.monotonic() < ends
            connection.send_as_much_as_goes(b"X: y\r\n")
            try:
                answer = connection.sock.recv(1000)
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_kept_connection_that_is_idle_is_closed(start_server: StartServer) -> None:
    server = start_server("--simulate", "--idle-timeout", "0.3")
    with server.connect() as connection:
        connection.send(http_request("/healthz", close=False))
        assert connection.response().status == 200
        assert connection.rest() == b""
    with server.connect() as connection:
        # A request that takes longer than the idle time-out is nobody's idleness.
        connection.send(http_request("/0,600,some_file", close=False) * 2)
        assert [connection.response().status for _ in range(2)] == [200, 200]


def test_a_client_that_takes_nothing_is_cut_off(start_server: StartServer, tree: Path) -> None:
    server = start_server("--disk", f"d1={tree}", "--idle-timeout", "0.5")
    with server.connect(receive_buffer=16384) as connection:
        connection.send(http_request("/v1/d1/sparse"))
        assert connection.head()[2] == 100 * MEGABYTE
        assert server.open_files(tree / "sparse") == 1
        until(lambda: server.sockets() == 1, "the server to give the client up")
        until(lambda: server.open_files(tree / "sparse") == 0, "the server to close the file")
        with contextlib.suppress(ConnectionResetError):
            assert len(connection.rest()) < 100 * MEGABYTE
    assert "Traceback" not in server.said()


def test_a_client_that_takes_a_little_at_a_time_is_not_cut_off(start_server: StartServer, tree: Path) -> None:
    # Idle is who takes nothing: help of --idle-timeout. This one takes 250 KB/s, a chunk of 256 KiB in 1.05 s.
    server = start_server("--disk", f"d1={tree}", "--idle-timeout", "0.9")
    with server.connect(receive_buffer=8192) as connection:
        connection.send(http_request("/v1/d1/sparse"))
        connection.head()
        taken = 0
        while taken < 900_000:
            piece = connection.sock.recv(16_384)
            assert piece, f"cut off after {taken} bytes"
            taken += len(piece)
            time.sleep(len(piece) / 250_000)


def test_connections_beyond_the_limit_wait_for_their_turn(start_server: StartServer) -> None:
    server = start_server("--simulate", "--connections", "5")
    first = [server.connect() for _ in range(5)]
    try:
        until(lambda: server.sockets() >= 6, "the server to accept five")
        with server.connect() as sixth:
            sixth.send(b"0,0,x\n")
            sixth.sock.settimeout(0.3)
            with pytest.raises(TimeoutError):
                sixth.sock.recv(100)
            sixth.sock.settimeout(20)
            first.pop().close()
            assert sixth.sock.recv(100).startswith(b"0,")
    finally:
        for connection in first:
            connection.close()


def test_a_client_that_goes_away_costs_nothing(server: ServerProcess) -> None:
    server.http("/v1/d1/large")
    server.line(b"0,1,d1/large\n")
    sockets, said = server.sockets(), server.said()
    for request in (b"0,50,x\n", b"0,5", b"", http_request("/0,50,x"), http_request("/v1/d1/large"), b"GET /v1"):
        for hang_up in ("close", "reset"):
            connection = server.connect()
            connection.send(request)
            getattr(connection, hang_up)()
    until(lambda: server.sockets() <= sockets, "the server to close the connections")
    assert server.said() == said


def test_listens_on_ipv6(start_server: StartServer) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    server = start_server("--simulate", "--host", "::1")
    with raw_client.Connection(server.port, host="::1") as connection:
        connection.send(b"0,0,x\n")
        assert connection.rest().endswith(b",x\n")
    assert f"http://[::1]:{server.port}/" in server.said()


# --- The access log ---

ENTRY = re.compile(r'([\d.]+) - - \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] "(.*)" (\d+) (\d+|-) (\d+\.\d{6}) ([\w.-]+)\n')


def logged(server: ServerProcess, log: Path, request: bytes, mark: str) -> list[tuple[str, str, str]]:
    """Send a request with a mark in it; the entries with that mark: request, status and length."""
    with server.connect() as connection:
        connection.send_as_much_as_goes(request)
        connection.half_close()
        connection.rest()
    entries: list[tuple[str, str, str]] = []

    def found() -> bool:
        lines = log.read_text("utf-8").splitlines(keepends=True)
        entries[:] = [(e[2], e[3], e[4]) for line in lines if mark in line and (e := ENTRY.fullmatch(line))]
        return bool(entries)

    until(found, f"{mark} in the access log")
    return entries


def test_logs_both_protocols(server: ServerProcess, access_log: Path) -> None:
    (entry,) = logged(server, access_log, b"7,5,marked-1\r\n", "marked-1")
    assert entry[:2] == ("7,5,marked-1", "7")
    assert int(entry[2]) in range(len("7,5,marked-1\n"), len("7,50000,marked-1\n"))
    assert logged(server, access_log, b"7,x,marked-2\n", "marked-2") == [("7,x,marked-2", "2", "5")]
    (entry,) = logged(server, access_log, http_request("/v1/d1/large?marked-3"), "marked-3")
    assert entry[:2] == ("GET /v1/d1/large?marked-3 HTTP/1.1", "200")
    assert int(entry[2]) > len(LARGE)
    (entry,) = logged(server, access_log, http_request("/v1/d1/marked-4", method="HEAD"), "marked-4")
    assert entry[:2] == ("HEAD /v1/d1/marked-4 HTTP/1.1", "404")


def test_no_client_can_forge_an_entry(server: ServerProcess, access_log: Path) -> None:
    nasty = b'\r\x1b[2J\x00\x7f\xff\xc2\x85" 200 5'
    for mark, request in (("marked-5", b"0,0,marked-5 %b\n"), ("marked-6", b"GET /marked-6/%b HTTP/1.1\r\n\r\n")):
        logged(server, access_log, request % nasty, mark)
        (line,) = (line for line in access_log.read_bytes().split(b"\n") if mark.encode() in line)
        assert all(byte >= 32 and byte != 127 for byte in line), line
        assert line.decode("utf-8").isprintable()
        assert b"\\x1b" in line


def test_logs_a_name_as_it_reads(server: ServerProcess, access_log: Path) -> None:
    for mark, request in (
        ("marked-7", b"0,0,marked-7-%b\n"),
        ("marked-8", b"GET /v1/d1/marked-8-%b HTTP/1.1\r\nHost: x\r\n\r\n"),
    ):
        ((text, _, _),) = logged(server, access_log, request % "é✓".encode(), mark)
        assert "é✓" in text or "%C3%A9%E2%9C%93" in text


def test_logs_the_status_of_this_request_not_of_the_last(server: ServerProcess, access_log: Path) -> None:
    request = http_request("/healthz?marked-9", close=False) + b"marked-10\r\n\r\n"
    ((text, status, _),) = logged(server, access_log, request, "marked-10")
    assert (text, status) == ("marked-10", "400")


def test_goes_on_when_the_log_cannot_be_written(start_server: StartServer) -> None:
    server = start_server("--simulate", "--access-log", "/dev/full")
    assert server.line(b"0,0,x\n").endswith(b",x\n")
    with server.connect() as connection:
        for _ in range(2):
            connection.send(http_request("/healthz", close=False))
            assert connection.response().status == 200
    assert server.stop() == 0
    assert "Traceback" not in server.said()


def test_logs_to_standard_output(start_server: StartServer) -> None:
    server = start_server("--simulate", "--access-log", "-", stdout=subprocess.PIPE)
    server.line(b"0,0,marked\n")
    assert server.process.stdout is not None
    line = server.process.stdout.readline().decode()
    found = ENTRY.fullmatch(line)
    assert found
    assert found[2] == "0,0,marked"


class Sends:
    """A socket that remembers what each system call was given, and takes only so much of it at a time."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.calls: list[bytes] = []

    def send(self, data: bytes) -> int:
        self.calls.append(bytes(data[: self.most]))
        return len(self.calls[-1])


def sent(body: list[bytes], most: int = 1 << 30) -> list[bytes]:
    """What a handler gives to its socket for a response with this body."""
    handler: Any = Handler.__new__(Handler)
    handler.server, handler.socket = SimpleNamespace(draining=False), Sends(most)
    handler.request_version, handler.result = "HTTP/1.1", body
    handler.start_response("200 OK", [("Content-Length", str(sum(map(len, body))))])
    handler.process_result()
    calls: list[bytes] = handler.socket.calls
    assert handler.response_length == sum(map(len, calls))
    return calls


def test_head_and_small_body_are_one_system_call() -> None:
    (call,) = sent([b"hello"])
    assert re.fullmatch(rb"HTTP/1\.1 200 OK\r\nContent-Length: 5\r\nDate: [^\r\n]+ GMT\r\n\r\nhello", call)
    assert len(sent([b""])) == 1


def test_a_large_body_is_not_copied_for_its_head() -> None:
    head, body = sent([bytes(1 << 20)])
    assert head.endswith(b"\r\n\r\n")
    assert body == bytes(1 << 20)


def test_sends_on_where_the_socket_stopped() -> None:
    pieces = sent([b"hello", b"world"], most=7)
    assert len(pieces) > 10
    assert re.fullmatch(rb"HTTP/1\.1 200 OK\r\n[^\0]+\r\n\r\nhelloworld", b"".join(pieces))
