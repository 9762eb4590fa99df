"""The requests of the experiment: what is one, what is none, and what comes of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import gevent
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskread import Disk, DiskFileNotRegular, DiskIOError, Disks, Limits
from server.simulate import (
    LONGEST_STALL,
    LONGEST_WAIT,
    SIMULATED,
    BadInput,
    Failed,
    Request,
    Simulation,
    Status,
    parse,
)

if TYPE_CHECKING:
    from pathlib import Path

# --- parse ---


@pytest.mark.parametrize(
    ("text", "request_"),
    [
        (b"0,10,some_file", Request(b"0", 0.01, b"some_file")),
        (b"0,4634,some_file", Request(b"0", 4.634, b"some_file")),
        (b"-7,0,x", Request(b"-7", 0.0, b"x")),
        (b"+7,+5,x", Request(b"+7", 0.005, b"x")),
        (b" 7 ,\t5\t,x", Request(b"7", 0.005, b"x")),
        (b"007,005,x", Request(b"007", 0.005, b"x")),
        (b"0,-0,x", Request(b"0", 0.0, b"x")),
        (b"0,3600000,x", Request(b"0", 3600.0, b"x")),
        (b"0,1, a path \r of any \x00\xff bytes ", Request(b"0", 0.001, b" a path \r of any \x00\xff bytes ")),
        (b"123456789012345678,0,x", Request(b"123456789012345678", 0.0, b"x")),
    ],
)
def test_parses_a_request(text: bytes, request_: Request) -> None:
    assert parse(text) == request_


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "three fields"),
        (b"garbage", "three fields"),
        (b"1,2", "this has 2"),
        (b"1,2,3,4", "this has 4"),
        (b",,", "first field"),
        (b"x,y,z", "first field"),
        (b" ,1,x", "first field"),
        (b"1.0,1,x", "first field"),
        (b"0x1,1,x", "first field"),
        (b"\xd9\xa1,1,x", "first field"),  # an Arabic-Indic digit one
        (b"\xff,1,x", "first field"),
        (b"1_0,1,x", "first field"),
        (b"0,,x", "second field"),
        (b"0,1.5,x", "second field"),
        (b"0,1e3,x", "second field"),
        (b"0,nan,x", "second field"),
        (b"0,1 0,x", "second field"),
        (b"0,1\n,x", "second field"),
        (b"0,\xff,x", "second field"),
        (b"0,-1,x", "between 0 and"),
        (b"0,3600001,x", "between 0 and"),
        (b"0,999999999999999999,x", "between 0 and"),
        (b"0," + b"9" * 4000 + b",x", "second field"),
        (b"0,1,", "third field"),
    ],
)
def test_says_why_something_is_no_request(text: bytes, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        parse(text)


FIELD = st.integers(-(10**18) + 1, 10**18 - 1)
SPACES = st.text(" \t", max_size=3).map(str.encode)
PATH = st.binary(min_size=1).filter(lambda path: b"," not in path)


@given(FIELD, st.integers(0, LONGEST_STALL), PATH, st.lists(SPACES, min_size=4, max_size=4))
def test_a_request_survives_the_journey(status: int, milliseconds: int, path: bytes, spaces: list[bytes]) -> None:
    text = b"%b%d%b,%b%d%b,%b" % (spaces[0], status, spaces[1], spaces[2], milliseconds, spaces[3], path)
    assert parse(text) == Request(b"%d" % status, milliseconds / 1000, path)


@given(st.binary() | st.lists(st.sampled_from([b"0", b"10", b"-1", b",", b" ", b"x", b"\xff", b"."])).map(b"".join))
def test_whatever_comes_is_a_request_or_bad_input(text: bytes) -> None:
    try:
        request = parse(text)
    except BadInput:
        return
    assert text.count(b",") == 2
    assert int(request.status) == int(text.split(b",")[0])
    assert 0 <= request.stall <= LONGEST_STALL / 1000
    assert text.endswith(b"," + request.path)


# --- perform ---


@pytest.fixture
def disk(tree: Path) -> Disk:
    return Disk("one", tree, Limits(threads=1, queue=0, deadline=0.3))


@pytest.fixture
def disks(disk: Disk) -> Disks:
    return Disks([disk, Disk(SIMULATED, None, Limits(threads=4, queue=4, deadline=60.0))])


@pytest.fixture
def simulation(disks: Disks) -> Simulation:
    return Simulation(disks, stalls=True)


def failure(simulation: Simulation, path: bytes, stall: float = 0.0, since: float | None = None) -> Failed:
    with pytest.raises(Failed) as caught:
        simulation.perform(Request(b"0", stall, path), time.monotonic() if since is None else since)
    return caught.value


@pytest.mark.parametrize("path", [b"some_file", b"any/where", b"simulated", b"simulated/x", b"/", b"\xff\x00", b"One"])
def test_stalls_for_as_long_as_asked_when_the_path_names_no_disk(
    simulation: Simulation, disks: Disks, path: bytes
) -> None:
    assert simulation.perform(Request(b"0", 0.02, path), time.monotonic()) >= 0.02
    assert [status.counts.reads for status in disks.status] == [0, 1]


def test_reads_the_file_that_the_path_names(simulation: Simulation, disk: Disk) -> None:
    assert simulation.perform(Request(b"0", 0.02, b"one/large"), time.monotonic()) >= 0.02
    assert disk.status.counts.bytes == 700_001


@pytest.mark.parametrize("path", [b"one", b"one/"])
def test_stalls_on_the_slots_of_a_disk_that_is_named_without_a_file(
    simulation: Simulation, disk: Disk, path: bytes
) -> None:
    assert simulation.perform(Request(b"0", 0.02, path), time.monotonic()) >= 0.02
    assert (disk.status.counts.reads, disk.status.counts.bytes) == (1, 0)


def test_counts_the_time_before_the_call_as_time_in_the_queue(simulation: Simulation) -> None:
    assert simulation.perform(Request(b"0", 0.0, b"x"), time.monotonic() - 2) >= 2


def test_does_not_read_for_a_client_that_has_waited_too_long(simulation: Simulation, disks: Disks) -> None:
    failed = failure(simulation, b"one/small", since=time.monotonic() - LONGEST_WAIT)
    assert failed.status is Status.QUEUE_TIMEOUT
    assert failed.total >= LONGEST_WAIT
    assert [status.counts.reads for status in disks.status] == [0, 0]


def test_refuses_when_the_disk_is_busy(simulation: Simulation, disk: Disk) -> None:
    stalling = gevent.spawn(disk.stall, 0.2)
    gevent.sleep(0)
    assert failure(simulation, b"one/small").status is Status.REFUSED
    stalling.get()


def test_says_when_the_deadline_passed(simulation: Simulation) -> None:
    failed = failure(simulation, b"one/small", stall=0.6)
    assert failed.status is Status.DEADLINE
    assert failed.total >= 0.3


@pytest.mark.parametrize(
    "path",
    [b"one/missing", b"one/directory", b"one/fifo", b"one/../x", b"one/way out", b"one//etc/hostname", b"one/\0"],
)
def test_says_when_there_is_no_such_file(simulation: Simulation, path: bytes) -> None:
    assert failure(simulation, path).status is Status.NO_FILE


def test_says_when_the_disk_answers_with_an_error(
    simulation: Simulation, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise DiskIOError("one", b"small", "read failed: Input/output error")

    monkeypatch.setattr(disk, "stall", fail)
    assert failure(simulation, b"one/small").status is Status.IO_ERROR


def test_a_root_that_is_not_there_is_a_disk_that_refuses(tree: Path) -> None:
    simulation = Simulation(Disks([Disk("lost", tree / "nowhere")]), stalls=False)
    assert failure(simulation, b"lost/small").status is Status.REFUSED


def test_without_stalls_a_client_may_read_but_not_stall(disk: Disk) -> None:
    simulation = Simulation(Disks([disk]), stalls=False)
    with pytest.raises(BadInput, match="--simulate"):
        simulation.perform(Request(b"0", 0.001, b"one/small"), time.monotonic())
    assert simulation.perform(Request(b"0", 0.0, b"one/small"), time.monotonic()) < LONGEST_WAIT
    assert disk.status.counts.bytes == 1024
    assert failure(simulation, b"other/small").status is Status.NO_FILE
    assert failure(simulation, b"simulated").status is Status.NO_FILE


def test_a_failure_has_its_reason_in_words(simulation: Simulation) -> None:
    failed = failure(simulation, b"one/fifo")
    assert isinstance(failed.__cause__, DiskFileNotRegular)
    assert str(failed) == str(failed.__cause__)
