"""The promises of `diskread.Disk`, on file systems that really hang.

Every test asks three things: what the callers of the sick disk got, that a healthy disk beside it did not notice, and
that nothing (slot, thread, descriptor) was left behind after the hang was lifted.
"""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING

import gevent
import pytest

from diskread import CHUNK, Disk, DiskBusy, DiskIOError, DiskOffline, DiskTimeout, Limits
from tests.conftest import until

from .injectors import FaultFS, stuck_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from .injectors import Dying, Throttled

    MakeFaultFS = Callable[..., FaultFS]

CONTENT = os.urandom(3 * CHUNK + 17)
DEADLINE = 0.3


@pytest.fixture
def healthy(tmp_path: Path, nothing_left_behind: None) -> Iterator[Disk]:
    """A disk that is well."""
    (tmp_path / "file").write_bytes(b"well")
    with Disk("healthy", tmp_path, Limits(deadline=30, idle=0.2)) as disk:
        yield disk


@pytest.fixture(params=["threadpool", "native"])
def sick(nothing_left_behind: None, request: pytest.FixtureRequest) -> Iterator[Callable[..., Disk]]:
    """Make a disk on a directory that can hang: two slots, a queue of two, a short deadline. With each engine."""
    disks: list[Disk] = []

    def make(root: Path, *, threads: int = 2, queue: int = 2, deadline: float = DEADLINE) -> Disk:
        limits = Limits(threads=threads, queue=queue, deadline=deadline, idle=0.2, engine=request.param)
        disks.append(Disk("sick", root, limits))
        return disks[-1]

    yield make
    for disk in disks:
        until(lambda disk=disk: not disk.status.load.in_flight, "the slots of the sick disk")  # type: ignore[misc]
        disk.close()


def answers(disk: Disk) -> bool:
    return disk.read("file") == b"well"


def recovered(disk: Disk) -> bool:
    load = disk.status.load
    return load.in_flight == load.stuck == load.waiting == 0


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("lookup", ["--entry-timeout=0"]),
        ("open", []),
        ("getattr", ["--attr-timeout=0"]),
        ("read", []),
        ("read", ["--direct-io"]),
    ],
)
def test_a_hang_ends_at_the_deadline_and_is_felt_by_nobody_else(
    op: str, options: list[str], make_faultfs: MakeFaultFS, sick: Callable[..., Disk], healthy: Disk
) -> None:
    faultfs = make_faultfs(*options)
    (faultfs.backing / "x").write_bytes(CONTENT)
    disk = sick(faultfs.root)
    faultfs.hang(op)
    began = time.monotonic()
    with pytest.raises(DiskTimeout) as caught:
        disk.read("x", 0, 4096)
    assert DEADLINE <= time.monotonic() - began < DEADLINE + 5
    assert caught.value.started
    assert disk.status.load.stuck == 1
    assert answers(healthy)
    faultfs.wait_held(1, sleep=gevent.sleep)
    faultfs.release()
    until(lambda: recovered(disk))
    assert disk.read("x", 0, 4096) == CONTENT[:4096]


def test_a_close_that_hangs_holds_up_nobody(faultfs: FaultFS, sick: Callable[..., Disk], healthy: Disk) -> None:
    (faultfs.backing / "x").write_bytes(CONTENT)
    disk = sick(faultfs.root)
    file = disk.open("x")
    faultfs.hang("flush")
    began = time.monotonic()
    file.close()
    assert time.monotonic() - began < 5
    faultfs.wait_held(1, sleep=gevent.sleep)
    assert answers(healthy)
    assert disk.status.load.in_flight == 1  # the close has a slot like everything that can hang
    faultfs.release()
    until(lambda: recovered(disk))


def test_all_slots_stuck_then_refused_at_once_then_back(
    faultfs: FaultFS, sick: Callable[..., Disk], healthy: Disk
) -> None:
    (faultfs.backing / "x").write_bytes(CONTENT)
    disk = sick(faultfs.root)
    faultfs.hang()
    outcomes: list[str] = []

    def ask() -> None:
        with pytest.raises((DiskTimeout, DiskBusy)) as caught:
            disk.read("x")
        outcomes.append(caught.typename)

    gevent.joinall([gevent.spawn(ask) for _ in range(6)], raise_error=True)
    # Two in the kernel and two in the queue miss their deadline; the two that find the queue full hear so at once.
    assert outcomes == ["DiskBusy"] * 2 + ["DiskTimeout"] * 4
    assert disk.status.load.stuck == 2
    began = time.monotonic()
    for _ in range(100):
        with pytest.raises(DiskBusy, match="all 2 slots hold reads that missed their deadline"):
            disk.read("x")
    assert time.monotonic() - began < DEADLINE * 10  # 100 deadlines would take ten times as long
    assert disk.status.load.threads == 2
    assert answers(healthy)
    faultfs.release()
    until(lambda: recovered(disk))
    assert disk.read("x") == CONTENT


def test_one_stuck_file_leaves_the_other_slots_to_the_others(faultfs: FaultFS, sick: Callable[..., Disk]) -> None:
    (faultfs.backing / "x").write_bytes(CONTENT)
    (faultfs.backing / "y").write_bytes(b"fine")
    disk = sick(faultfs.root)
    faultfs.hang(path="x")
    with pytest.raises(DiskTimeout):
        disk.read("x")
    for _ in range(20):
        assert disk.read("y") == b"fine"
    faultfs.release()


def test_a_body_that_hangs_in_the_middle(make_faultfs: MakeFaultFS, sick: Callable[..., Disk], healthy: Disk) -> None:
    faultfs = make_faultfs("--direct-io")
    (faultfs.backing / "x").write_bytes(CONTENT)
    disk = sick(faultfs.root)
    faultfs.hang(range=(CHUNK, CHUNK + 1))
    with disk.open("x") as file:
        chunks = file.chunks()
        got: list[bytes] = []
        with pytest.raises(DiskTimeout):
            got.extend(chunks)  # keeps what came before the error
        start = b"".join(got)
        assert 0 < len(start) <= CHUNK
        assert start == CONTENT[: len(start)]
        assert answers(healthy)
        faultfs.release()
        # The file stayed open: who wants to can go on where it stopped.
        assert file.read(CHUNK, CHUNK) == CONTENT[CHUNK : 2 * CHUNK]
    until(lambda: recovered(disk))


def test_a_file_closed_during_its_stuck_read_is_closed_after_it(
    make_faultfs: MakeFaultFS, sick: Callable[..., Disk]
) -> None:
    faultfs = make_faultfs("--direct-io")
    (faultfs.backing / "x").write_bytes(CONTENT)
    disk = sick(faultfs.root)
    file = disk.open("x")
    faultfs.hang()
    with pytest.raises(DiskTimeout):
        file.read(CHUNK, 10)
    file.close()
    assert any(path.endswith("/x") for path in open_files()), "the stuck read still uses the descriptor"
    faultfs.release()
    until(lambda: not any(path.endswith("/x") for path in open_files()))


def open_files() -> list[str]:
    names = []
    for name in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue
    return names


@pytest.mark.parametrize("how", ["kill", "timeout"])
def test_a_reader_that_goes_away_leaves_nothing(
    how: str, faultfs: FaultFS, sick: Callable[..., Disk], healthy: Disk
) -> None:
    (faultfs.backing / "x").write_bytes(CONTENT)
    disk = sick(faultfs.root, deadline=60)
    faultfs.hang()

    def ask() -> None:
        with gevent.Timeout(DEADLINE if how == "timeout" else None):
            disk.read("x")

    reader = gevent.spawn(ask)
    faultfs.wait_held(1, sleep=gevent.sleep)
    if how == "kill":
        reader.kill(timeout=5)
    else:
        with pytest.raises(gevent.Timeout):
            reader.get(timeout=10)
    assert reader.dead
    assert disk.status.load.in_flight == 1, "its slot comes back with the system call"
    assert answers(healthy)
    faultfs.release()
    until(lambda: recovered(disk))
    assert disk.read("x") == CONTENT


def test_errors_of_the_device_come_back_with_their_errno(faultfs: FaultFS, sick: Callable[..., Disk]) -> None:
    (faultfs.backing / "x").write_bytes(CONTENT)
    disk = sick(faultfs.root)
    faultfs.fail(errno=errno.EIO)
    with pytest.raises(DiskIOError, match="read failed") as caught:
        disk.read("x")
    assert caught.value.errno == errno.EIO
    assert disk.status.counts.errors == {"EIO": 1}
    faultfs.clear()
    assert disk.read("x") == CONTENT


def test_a_hang_that_ends_in_an_error_after_its_caller_left(faultfs: FaultFS, sick: Callable[..., Disk]) -> None:
    (faultfs.backing / "x").write_bytes(CONTENT)
    disk = sick(faultfs.root)
    faultfs.hang_then_fail()
    with pytest.raises(DiskTimeout):
        disk.read("x")
    faultfs.release()
    until(lambda: recovered(disk))
    assert disk.read("x") == CONTENT


@pytest.mark.parametrize("op", ["open", "read"])
def test_eintr_is_retried(op: str, make_faultfs: MakeFaultFS, sick: Callable[..., Disk]) -> None:
    faultfs = make_faultfs("--direct-io")
    (faultfs.backing / "x").write_bytes(CONTENT)
    disk = sick(faultfs.root, deadline=30)
    faultfs.fail(op, errno=errno.EINTR, count=5)
    assert disk.read("x") == CONTENT


def test_a_daemon_that_dies_is_a_disk_that_is_gone(faultfs: FaultFS, sick: Callable[..., Disk], healthy: Disk) -> None:
    (faultfs.backing / "x").write_bytes(CONTENT)
    disk = sick(faultfs.root)
    faultfs.hang()
    with pytest.raises(DiskTimeout):
        disk.read("x")
    faultfs.kill()
    until(lambda: recovered(disk))
    with pytest.raises((DiskIOError, DiskOffline)) as caught:
        disk.read("x")
    assert caught.value.errno == errno.ENOTCONN
    assert answers(healthy)


def test_any_other_call_has_the_same_promises(faultfs: FaultFS, sick: Callable[..., Disk], healthy: Disk) -> None:
    disk = sick(faultfs.root)
    faultfs.hang("readdir")
    with pytest.raises(DiskTimeout):
        disk.run(os.listdir, faultfs.root)
    assert answers(healthy)
    faultfs.release()
    until(lambda: recovered(disk))
    assert disk.run(os.listdir, faultfs.root) == []


def test_ext4_on_a_device_that_stops(dying: Dying, sick: Callable[..., Disk], healthy: Disk) -> None:
    disk = sick(dying.root, threads=4)
    content = disk.read("f0", deadline=30)
    dying.stop()
    with pytest.raises(DiskTimeout):
        disk.read("f1", 512 * 1024, 4096)
    assert stuck_threads(), "the reader should be in state D"
    assert answers(healthy)
    dying.resume()
    until(lambda: recovered(disk))
    assert disk.read("f0", deadline=30) == content
    assert len(disk.read("f1", 512 * 1024, 4096, deadline=30)) == 4096


def test_ext4_on_a_device_that_is_throttled_to_a_standstill(
    throttled: Throttled, sick: Callable[..., Disk], healthy: Disk
) -> None:
    throttled.enter_process()
    disk = sick(throttled.root)
    throttled.stall()
    with pytest.raises(DiskTimeout):
        disk.read("f2", 512 * 1024, 4096)
    assert answers(healthy)
    throttled.lift()
    until(lambda: recovered(disk))
    assert len(disk.read("f2", 512 * 1024, 4096, deadline=30)) == 4096
