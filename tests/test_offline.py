"""A disk that is taken offline, by itself or by hand: what its callers see, and how it comes back."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import gevent
import pytest

from diskread import Disk, DiskOffline, Disks, DiskTimeout, Limits, State

from .conftest import SMALL, descriptors, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from .conftest import MakeDisk

QUICK = {"offline_after": 0.3, "idle_probe": 3600.0, "probe_interval": 0.05, "probe_interval_max": 0.2}
"""Limits of a disk that loses patience soon."""

WHOLE_TIME = 10.0
"""Seconds that a verdict may be late on a machine that is very busy with other things."""


def state(disk: Disk) -> State:
    return disk.status.load.state


def outcome(call: Callable[[], object]) -> object:
    """What a call returned or raised."""
    try:
        return call()
    except Exception as error:
        return error


def hang(disk: Disk, gate: threading.Event, count: int) -> list[gevent.Greenlet[..., object]]:
    """Let operations hang until the gate is set."""
    greenlets = [gevent.spawn(outcome, lambda: disk.run(gate.wait, 60)) for _ in range(count)]
    until(lambda: disk.status.load.in_flight >= count)
    return greenlets


@pytest.fixture
def hung(make_disk: MakeDisk, gate: threading.Event) -> Iterator[Disk]:
    """A disk with two slots, both of them taken for long enough."""
    disk = make_disk(threads=2, **QUICK)
    hang(disk, gate, 2)
    until(lambda: state(disk) is State.OFFLINE)
    yield disk
    gate.set()
    until(lambda: not disk.status.load.in_flight)


# -- going offline -----------------------------------------------------------------------------------------------------


def test_a_busy_disk_without_progress_goes_offline_in_time(make_disk: MakeDisk, gate: threading.Event) -> None:
    disk = make_disk(threads=2, queue=10, **QUICK)
    began = time.monotonic()
    hang(disk, gate, 2)
    until(lambda: state(disk) is State.OFFLINE)
    assert 0.3 <= time.monotonic() - began < 0.3 + WHOLE_TIME
    load = disk.status.load
    assert load.reason == "no operation has completed for 0.3 s"
    assert not load.accepting
    assert (load.in_flight, load.threads, load.changes) == (2, 2, 1)


def test_the_verdict_is_spoken_without_anybody_asking(make_disk: MakeDisk, gate: threading.Event) -> None:
    disk = make_disk(threads=1, queue=10, deadline=60, **QUICK)
    hang(disk, gate, 1)
    waiting = gevent.spawn(outcome, lambda: disk.read("small"))
    error = waiting.get(timeout=WHOLE_TIME)
    assert isinstance(error, DiskOffline), "told at once, not at its deadline"
    assert error.retry_after is not None


def test_all_who_wait_in_the_queue_are_told_when_the_verdict_is_spoken(
    make_disk: MakeDisk, gate: threading.Event
) -> None:
    disk = make_disk(threads=2, queue=50, deadline=60, **QUICK)
    hang(disk, gate, 2)
    waiting = [gevent.spawn(outcome, lambda: disk.read("small")) for _ in range(50)]
    until(lambda: disk.status.load.waiting == 50)
    gevent.joinall(waiting, timeout=WHOLE_TIME)
    assert {type(each.value) for each in waiting} == {DiskOffline}
    assert (disk.status.load.waiting, disk.status.counts.rejections) == (0, 50)


def test_callers_of_an_offline_disk_are_refused_at_once(hung: Disk) -> None:
    times = []
    for _ in range(200):
        began = time.perf_counter()
        with pytest.raises(DiskOffline, match="no operation has completed") as caught:
            hung.read("small")
        times.append(time.perf_counter() - began)
        assert caught.value.errno == errno.ENODEV
        assert caught.value.path == b"small"
        assert caught.value.retry_after is not None
        assert 0 <= caught.value.retry_after <= 0.2
    assert sorted(times)[100] < 0.005
    assert hung.status.load.threads == 2


def test_every_way_to_read_is_refused(hung: Disk) -> None:
    for call in (
        lambda: hung.open("small"),
        lambda: hung.stat("small"),
        lambda: hung.run(os.getpid),
        lambda: hung.stall(0),
        lambda: hung.read("small", size=1),
    ):
        with pytest.raises(DiskOffline):
            call()


def test_a_slow_disk_that_completes_operations_stays_online(make_disk: MakeDisk) -> None:
    disk = make_disk(threads=2, queue=1000, deadline=60, offline_after=2.0, idle_probe=3600)
    readers = [gevent.spawn(disk.stall, 0.25, "small") for _ in range(20)]
    seen = set()
    while not all(each.ready() for each in readers):
        seen.add(state(disk))
        gevent.sleep(0.01)
    gevent.joinall(readers, raise_error=True)
    assert seen == {State.ONLINE}
    assert disk.status.load.changes == 0


def test_one_operation_that_hangs_on_a_quiet_disk_does_not_take_it_offline(
    make_disk: MakeDisk, gate: threading.Event
) -> None:
    disk = make_disk(threads=2, offline_after=2.0, idle_probe=3600)
    hang(disk, gate, 1)
    until(lambda: disk.status.load.probes >= 3)
    assert disk.status.load.oldest > 2.0
    assert (state(disk), disk.status.load.changes) == (State.ONLINE, 0)
    assert disk.read("small") == SMALL


def test_a_disk_without_files_is_judged_too(gate: threading.Event) -> None:
    with Disk("d1", None, Limits(threads=2, **QUICK)) as disk:  # type: ignore[arg-type]
        hang(disk, gate, 1)
        until(lambda: state(disk) is State.OFFLINE)
        assert disk.status.load.probes == 0, "there is nothing to ask"
        gate.set()
        until(lambda: state(disk) is State.HALF_OPEN)
        disk.stall(0)
        assert state(disk) is State.ONLINE


def test_offline_after_infinity_never_judges(make_disk: MakeDisk, gate: threading.Event) -> None:
    disk = make_disk(threads=1, offline_after=math.inf, deadline=0.5)
    with pytest.raises(DiskTimeout):  # a call that has not begun by then would not hang at all
        disk.run(gate.wait, 60)
    gevent.sleep(0.1)
    assert (state(disk), disk.status.load.probes) == (State.SUSPECT, 0)


def test_other_disks_notice_nothing(hung: Disk, root: Path) -> None:
    with Disk("d2", root) as other:
        assert other.read("small") == SMALL
        assert state(other) is State.ONLINE
    assert state(hung) is State.OFFLINE


# -- coming back -------------------------------------------------------------------------------------------------------


def test_a_stuck_call_that_returns_brings_the_disk_back_one_request_at_a_time(
    hung: Disk, gate: threading.Event
) -> None:
    gate.set()
    until(lambda: state(hung) is State.HALF_OPEN)
    trial_gate = threading.Event()
    trial = gevent.spawn(outcome, lambda: hung.run(trial_gate.wait, 60))
    gevent.sleep(0)
    try:
        for _ in range(5):
            with pytest.raises(DiskOffline, match="one request at a time"):
                hung.read("small")
    finally:
        trial_gate.set()
    assert trial.get(timeout=WHOLE_TIME) is True
    assert state(hung) is State.ONLINE
    readers = [gevent.spawn(hung.read, "small") for _ in range(10)]
    gevent.joinall(readers, raise_error=True)
    assert hung.status.load.changes == 3


def test_a_probe_brings_the_disk_back_while_calls_are_stuck_for_ever(
    make_disk: MakeDisk, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = threading.Event()
    probes_under_way = [0]
    most = [0]
    monkeypatch.setattr("diskread.disk.probe", _probe_that_waits_for(hangs, probes_under_way, most))
    disk = make_disk(threads=4, **QUICK)
    hang(disk, gate, 2)
    try:
        until(lambda: state(disk) is State.OFFLINE)
        gevent.sleep(0.5)
        assert (disk.status.load.in_flight, disk.status.load.probes) == (3, 1), "the probe that hangs is the only one"
        with pytest.raises(DiskOffline, match="a probe is under way"):
            disk.read("small")
    finally:
        hangs.set()
    until(lambda: state(disk) is not State.OFFLINE)
    assert disk.read("small") == SMALL
    assert state(disk) in (State.ONLINE, State.SUSPECT)
    assert most == [1]


def _probe_that_waits_for(
    event: threading.Event, under_way: list[int], most: list[int]
) -> Callable[[bytes, int | None, bytes | None], object]:
    from diskread.probe import probe

    def waiting(root: bytes, device: int | None, sample: bytes | None) -> object:
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        event.wait(60)
        under_way[0] -= 1
        return probe(root, device, sample)

    return waiting


def test_an_idle_disk_that_hangs_is_found_out_by_a_probe(make_disk: MakeDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = threading.Event()
    disk = make_disk(threads=2, offline_after=0.5, idle_probe=0.7, probe_interval=0.05)
    assert disk.read("small") == SMALL
    until(lambda: disk.status.load.probes >= 3)
    assert state(disk) is State.ONLINE
    began = time.monotonic()
    monkeypatch.setattr("diskread.disk.probe", _probe_that_waits_for(hangs, [0], [0]))
    try:
        until(lambda: state(disk) is State.OFFLINE)
        assert time.monotonic() - began < 0.7 + WHOLE_TIME
    finally:
        hangs.set()
    until(lambda: state(disk) is State.ONLINE, "the next idle probe")
    assert disk.status.counts.reads == 1, "probes are nobody's reads"


def test_idle_probes_come_in_time_after_a_read(make_disk: MakeDisk) -> None:
    # The time of the idle probe comes before the time at which the read would have been judged.
    disk = make_disk(threads=2, offline_after=3600.0, idle_probe=3600.1)
    assert disk.read("small") == SMALL
    until(lambda: disk.status.load.probes >= 2)


def test_probes_of_a_disk_nobody_uses_stop_when_it_is_closed(make_disk: MakeDisk) -> None:
    disk = make_disk(offline_after=0.1, idle_probe=0.12)
    assert disk.read("small") == SMALL
    until(lambda: disk.status.load.probes >= 2)
    disk.close()
    until(lambda: not disk.status.load.in_flight)
    probes = disk.status.load.probes
    gevent.sleep(0.2)
    assert disk.status.load.probes == probes


def test_a_disk_that_was_forgotten_is_not_kept_alive_by_its_probes(root: Path, nothing_left_behind: None) -> None:
    disk = Disk("d1", root, Limits(offline_after=0.1, idle_probe=0.15, idle=0.05))
    assert disk.read("small") == SMALL
    gevent.sleep(0.2)  # until probes are being sent
    assert disk.status.load.probes
    del disk  # the fixture looks whether its descriptors and threads go


def test_an_error_of_the_device_does_not_keep_a_disk_offline(
    make_disk: MakeDisk, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> object:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("diskread.disk.probe", fail)
    disk = make_disk(threads=2)
    disk.watch()
    until(lambda: state(disk) is State.ONLINE)
    assert disk.status.counts.errors["EIO"] == 1
    assert disk.read("small") == SMALL


def test_a_probe_without_descriptors_says_nothing(make_disk: MakeDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> object:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    disk = make_disk(offline_after=0.1, idle_probe=0.12, probe_interval=0.01)
    with monkeypatch.context() as patch:
        patch.setattr("diskread.disk.probe", fail)
        disk.watch()
        until(lambda: disk.status.load.probes >= 3)
        assert disk.status.load.reason == "it has not answered yet"
    until(lambda: state(disk) is State.ONLINE)


# -- the root ----------------------------------------------------------------------------------------------------------


def test_a_watched_disk_is_offline_until_it_has_answered(make_disk: MakeDisk) -> None:
    disk = make_disk()
    began = time.perf_counter()
    disk.watch()
    assert time.perf_counter() - began < 1.0
    assert (state(disk), disk.status.load.reason) == (State.OFFLINE, "it has not answered yet")
    with pytest.raises(DiskOffline, match="not answered yet"):
        disk.read("small")
    until(lambda: state(disk) is State.ONLINE)
    assert disk.status.load.changes == 2, "without a trial"
    readers = [gevent.spawn(disk.read, "small") for _ in range(10)]
    gevent.joinall(readers, raise_error=True)


def test_a_disk_that_is_dead_at_the_start_delays_nobody(make_disk: MakeDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = threading.Event()
    monkeypatch.setattr("diskread.disk.probe", _probe_that_waits_for(hangs, [0], [0]))
    disk = make_disk(**QUICK)
    disk.watch()
    try:
        gevent.sleep(0.5)
        with pytest.raises(DiskOffline, match="not answered yet"):
            disk.read("small")
        assert (disk.status.load.in_flight, disk.status.load.probes) == (1, 1)
    finally:
        hangs.set()
    until(lambda: state(disk) is State.ONLINE)


@pytest.mark.parametrize(("name", "says"), [("missing", "No such file or directory"), ("small", "Not a directory")])
def test_a_watched_disk_without_a_root_says_so(root: Path, nothing_left_behind: None, name: str, says: str) -> None:
    with Disk("d1", root / name, Limits(probe_interval=0.05)) as disk:
        disk.watch()
        until(lambda: says in str(disk.status.load.reason))
        with pytest.raises(DiskOffline, match=f"root directory cannot be opened: {says}") as caught:
            disk.read("file")
        assert caught.value.retry_after is not None


def test_watching_disks_without_files_or_a_set_of_disks(root: Path, nothing_left_behind: None) -> None:
    with Disks([Disk("d1", root), Disk("d2", None), Disk("d3", root / "missing")]) as disks:
        disks.watch()
        until(lambda: [each.load.state for each in disks.status] == [State.ONLINE, State.ONLINE, State.OFFLINE])
        until(lambda: not any(each.load.in_flight for each in disks.status))


def test_a_root_that_comes_back_is_found_by_a_probe(root: Path, nothing_left_behind: None) -> None:
    with Disk("d1", root / "later", Limits(probe_interval=0.05, probe_interval_max=0.1)) as disk:
        with pytest.raises(DiskOffline) as first:
            disk.read("file")
        assert first.value.errno == errno.ENOENT
        with pytest.raises(DiskOffline, match="root directory") as second:
            disk.read("file")
        assert second.value.errno == errno.ENODEV
        assert second.value.retry_after is not None
        until(lambda: disk.status.load.probes >= 3)
        (root / "later").mkdir()
        (root / "later" / "file").write_bytes(b"content")
        until(lambda: state(disk) is State.HALF_OPEN)
        assert disk.read("file") == b"content"
        assert state(disk) is State.ONLINE


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A mount point with a file system that has a file."""
    point = tmp_path / "mounted"
    point.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "none", str(point)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mount: {done.stderr.strip()}")
    (point / "file").write_bytes(b"content")
    yield point
    if point.is_mount():
        subprocess.run(["umount", "--lazy", str(point)], check=True)


def test_an_unmounted_root_is_found_by_a_probe(mounted: Path, nothing_left_behind: None) -> None:
    limits = Limits(offline_after=0.2, idle_probe=0.3, probe_interval=0.05, probe_interval_max=0.1)
    with Disk("d1", mounted, limits) as disk:
        assert disk.read("file") == b"content"
        subprocess.run(["umount", "--lazy", str(mounted)], check=True)
        until(lambda: state(disk) is State.OFFLINE)
        with pytest.raises(DiskOffline, match="was the disk unmounted"):
            disk.read("file")
        (mounted / "file").write_bytes(b"of the empty mount point")
        until(lambda: disk.status.load.probes >= 5)
        assert state(disk) is State.OFFLINE, "an empty mount point is no empty disk"
        disk.set_online()
        assert disk.read("file") == b"of the empty mount point", "but a hand may say that it is"


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_offline_by_hand_until_online_by_hand(make_disk: MakeDisk) -> None:
    disk = make_disk(**QUICK)
    assert disk.read("small") == SMALL
    disk.set_offline("to be replaced")
    with pytest.raises(DiskOffline, match=r"^d1/small: offline for 0 s: by hand: to be replaced$") as caught:
        disk.read("small")
    assert caught.value.retry_after is None
    gevent.sleep(0.2)
    assert (state(disk), disk.status.load.probes) == (State.OFFLINE, 0)
    disk.set_online()
    assert state(disk) is State.HALF_OPEN
    assert disk.read("small") == SMALL
    assert state(disk) is State.ONLINE


def test_offline_by_hand_tells_those_who_wait(make_disk: MakeDisk, gate: threading.Event) -> None:
    disk = make_disk(threads=1, deadline=60)
    (holder,) = hang(disk, gate, 1)
    waiting = [gevent.spawn(outcome, lambda: disk.read("small")) for _ in range(5)]
    until(lambda: disk.status.load.waiting == 5)
    disk.set_offline("broken")
    gevent.joinall(waiting, timeout=WHOLE_TIME)
    assert {type(each.value) for each in waiting} == {DiskOffline}
    gate.set()
    assert holder.get(timeout=WHOLE_TIME) is True, "what is under way may end"
    assert state(disk) is State.OFFLINE, "the hand wins"


def test_online_by_hand_on_a_healthy_busy_disk_refuses_nobody(make_disk: MakeDisk) -> None:
    disk = make_disk(threads=4)
    readers = [gevent.spawn(disk.stall, 0.1) for _ in range(3)]
    until(lambda: disk.status.load.in_flight == 3)
    disk.set_online()
    more = [gevent.spawn(disk.read, "small") for _ in range(5)]
    gevent.joinall(readers, raise_error=True)
    gevent.joinall(more, raise_error=True)
    assert disk.status.load.changes == 0


def test_a_disk_that_is_offline_by_hand_can_be_unmounted_and_replaced(mounted: Path, nothing_left_behind: None) -> None:
    with Disk("d1", mounted) as disk:
        assert disk.read("file") == b"content"
        assert str(mounted) in descriptors().values()
        disk.set_offline("to be replaced")
        assert str(mounted) not in descriptors().values()
        subprocess.run(["umount", str(mounted)], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "none", str(mounted)], check=True)
        (mounted / "file").write_bytes(b"another disk")
        disk.set_online()
        assert disk.read("file") == b"another disk"
        assert state(disk) is State.ONLINE
        disk.set_offline("again")
        subprocess.run(["umount", str(mounted)], check=True)


def test_the_root_is_let_go_when_the_last_read_is_over(make_disk: MakeDisk, root: Path) -> None:
    disk = make_disk(threads=2)
    assert disk.read("small") == SMALL
    reader = gevent.spawn(disk.stall, 0.2, "small")
    until(lambda: disk.status.load.in_flight)
    disk.set_offline("to be replaced")
    assert str(root) in descriptors().values(), "the read under way needs it"
    reader.get(timeout=WHOLE_TIME)
    until(lambda: str(root) not in descriptors().values())


def test_taken_offline_and_online_many_times_under_load(make_disk: MakeDisk) -> None:
    disk = make_disk(threads=4, queue=1000)
    results = list[object]()

    def reader() -> None:
        for _ in range(50):
            results.append(outcome(lambda: disk.read("small")))
            gevent.sleep(0.001)

    readers = [gevent.spawn(reader) for _ in range(8)]
    for _ in range(20):
        gevent.sleep(0.005)
        disk.set_offline("for a moment")
        gevent.sleep(0.002)
        disk.set_online()
    gevent.joinall(readers, raise_error=True)
    assert {type(each) for each in results} == {bytes, DiskOffline}
    assert all(each == SMALL for each in results if isinstance(each, bytes))
    until(lambda: not disk.status.load.in_flight)
    assert disk.read("small") == SMALL
    assert state(disk) is State.ONLINE


def test_a_hub_that_was_held_up_tells_those_who_wait_nothing_false(make_disk: MakeDisk) -> None:
    disk = make_disk(threads=1, queue=10, deadline=60, **QUICK)
    first = gevent.spawn(outcome, lambda: disk.run(time.sleep, 0.1))
    until(lambda: disk.status.load.in_flight)
    waiting = [gevent.spawn(outcome, lambda: disk.read("small")) for _ in range(3)]
    until(lambda: disk.status.load.waiting == 3)
    time.sleep(0.5)  # the whole hub: the disk has answered long before, but nobody could take note of it
    gevent.joinall([first, *waiting], timeout=WHOLE_TIME)
    assert first.value is None
    assert {type(each.value) for each in waiting} <= {bytes, DiskOffline}, "no deadline has passed"
    until(lambda: isinstance(outcome(lambda: disk.read("small")), bytes))
