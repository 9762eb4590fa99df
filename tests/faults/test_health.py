"""Health on disks that really hang: what the matrix has no row for."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from operator import sub
from typing import TYPE_CHECKING

import gevent
import pytest

from diskread import Disk, DiskBusy, DiskError, DiskOffline, DiskTimeout
from diskread.health import State
from tests.conftest import until
from tests.server.raw_client import ServerProcess
from tests.server.raw_client import until as until_without_gevent

from .injectors import ControlError, stuck_threads
from .witnesses import SLACK, Callers, Verdicts, nothing_in_flight, refused_at_once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from .injectors import Dying, FaultFS, Throttled
    from .witnesses import Beside

    MakeSick = Callable[..., Disk]
    MakeFaultFS = Callable[..., FaultFS]

PAGE = 4096
CONTENT = random.Random(3).randbytes(64 * PAGE)
PATIENT = 30.0


def online(disk: Disk) -> bool:
    return disk.status.load.state is State.ONLINE


def offline(disk: Disk) -> bool:
    return disk.status.load.state is State.OFFLINE


@pytest.fixture
def hangable(make_faultfs: MakeFaultFS, make_sick: MakeSick) -> Iterator[FaultFS]:
    """A file system on which each read of `x` is one request. It is well again before its disk is closed."""
    faultfs = make_faultfs("--direct-io")
    (faultfs.backing / "x").write_bytes(CONTENT)
    yield faultfs
    with contextlib.suppress(ControlError):  # killed by the test
        faultfs.release()


def read(disk: Disk, deadline: float | None = PATIENT) -> bytes:
    return disk.read("x", 0, PAGE, deadline=deadline)


# Probes


def test_a_hung_probe_holds_one_slot_and_no_second_is_sent(
    hangable: FaultFS, make_sick: MakeSick, beside: Beside
) -> None:
    disk = make_sick(hangable.root)
    assert read(disk) == CONTENT[:PAGE]
    hangable.hang()
    until(lambda: offline(disk), "the verdict")
    sent = disk.status.load.probes
    gevent.sleep(1.2)  # three of the longest intervals between probes
    assert disk.status.load.probes == sent
    assert disk.status.load.in_flight == 1
    assert len(hangable.held()) == 1
    hangable.release()
    until(lambda: not offline(disk), "the probe to come back")
    assert read(disk) == CONTENT[:PAGE]


def test_a_probe_that_hangs_while_it_asks_for_the_file_system(
    hangable: FaultFS, make_sick: MakeSick, beside: Beside
) -> None:
    """What is mounted may be a server's: statfs(2) waits for it, and nobody else is to."""
    disk = make_sick(hangable.root)
    assert read(disk) == CONTENT[:PAGE]
    hangable.hang("statfs")
    until(lambda: offline(disk), "the verdict")
    assert [each.op for each in hangable.held()] == ["statfs"]
    hangable.release()
    until(lambda: not offline(disk), "the probe to come back")


def test_an_offline_disk_without_a_free_slot_comes_back_with_a_stuck_read(
    hangable: FaultFS, make_sick: MakeSick, beside: Beside
) -> None:
    disk = make_sick(hangable.root, threads=2)
    assert read(disk) == CONTENT[:PAGE]
    hangable.hang()
    callers = Callers(2, lambda: read(disk, None))
    until(lambda: offline(disk), "the verdict")
    assert disk.status.load.in_flight == 2, "no slot is left for a probe"
    callers.end()
    assert callers.what == {"DiskTimeout"}
    hangable.clear()
    hangable.answer(count=1)
    until(lambda: not offline(disk), "the answer to bring it back")
    assert read(disk) == CONTENT[:PAGE], "the other stuck read holds nobody up"
    hangable.release()
    until(lambda: online(disk) and nothing_in_flight(disk))


def test_probes_ask_the_device_although_everything_is_cached(dying: Dying, make_sick: MakeSick) -> None:
    disk = make_sick(dying.root)
    for name in (f"f{k}" for k in range(8)):
        assert len(disk.read(name, deadline=PATIENT)) == 1 << 20
    # All of it is in the page cache now: reading it again asks the device for nothing.
    until(lambda: nothing_in_flight(disk))
    for _ in range(3):
        probes = disk.status.load.probes
        until(lambda probes=probes: disk.status.load.probes > probes and nothing_in_flight(disk), "a probe")  # type: ignore[misc]
    reads = dying.faultfs.counters()["read"]
    for _ in range(20):
        disk.read("f7", 0, PAGE, deadline=PATIENT)
    cached = dying.faultfs.counters()["read"] - reads
    probes = disk.status.load.probes
    until(lambda: disk.status.load.probes >= probes + 3 and nothing_in_flight(disk), "three probes")
    assert dying.faultfs.counters()["read"] >= reads + cached + 3
    dying.stop()
    try:
        until(lambda: offline(disk), "a probe to hang on what is cached")
        assert stuck_threads()
    finally:
        dying.resume()
    until(lambda: not offline(disk), "the probe to come back")
    assert len(disk.read("f7", 0, PAGE, deadline=PATIENT)) == PAGE
    until(lambda: nothing_in_flight(disk))
    disk.close()  # before the file system is unmounted


# The way back


def test_half_open_lets_one_request_through_at_a_time(hangable: FaultFS, make_sick: MakeSick, beside: Beside) -> None:
    # Long enough between probes that none interferes.
    disk = make_sick(hangable.root, offline_after=1.0, idle_probe=1.2)
    assert read(disk) == CONTENT[:PAGE]
    hangable.hang()
    until(lambda: offline(disk), "the verdict")
    hangable.answer(count=1)  # the probe; whatever comes now hangs again
    until(lambda: disk.status.load.state is State.HALF_OPEN, "the answer")
    trial = Callers(1, lambda: read(disk))
    until(lambda: disk.status.load.in_flight == 1, "the trial to be in the kernel")
    for _ in range(20):
        with pytest.raises(DiskOffline, match="one request at a time") as caught:
            read(disk)
    assert caught.value.retry_after is not None
    until(lambda: offline(disk), "the verdict on a trial that hangs, too")
    refused_at_once(disk, lambda: read(disk))
    hangable.release()
    trial.end()
    assert trial.what == {"ok"}, "nobody takes an answer from a caller who still waits for it"
    until(lambda: not offline(disk), "the disk to come back")
    assert read(disk) == CONTENT[:PAGE]
    until(lambda: online(disk))


def test_who_waits_for_a_slot_hears_of_the_verdict_at_once(
    hangable: FaultFS, make_sick: MakeSick, beside: Beside
) -> None:
    disk = make_sick(hangable.root, threads=1, queue=10)
    assert read(disk) == CONTENT[:PAGE]
    hangable.hang()
    first = Callers(1, lambda: read(disk))
    until(lambda: disk.status.load.in_flight == 1)
    waiting = Callers(10, lambda: read(disk))
    until(lambda: disk.status.load.waiting == 10)
    waiting.end()
    assert waiting.what == {"DiskOffline"}
    assert max(outcome.seconds for outcome in waiting.outcomes) < 0.5 + SLACK < PATIENT
    hangable.release()
    first.end()
    assert first.what == {"ok"}
    until(lambda: not offline(disk))
    assert read(disk) == CONTENT[:PAGE]


def test_the_hand_wins_over_a_hang_and_over_its_end(hangable: FaultFS, make_sick: MakeSick, beside: Beside) -> None:
    disk = make_sick(hangable.root)
    assert read(disk) == CONTENT[:PAGE]
    hangable.hang()
    until(lambda: offline(disk), "the verdict")
    disk.set_offline("the disk is being replaced")
    hangable.release()
    until(lambda: nothing_in_flight(disk), "the probe to come back")
    probes = disk.status.load.probes
    gevent.sleep(0.6)
    assert disk.status.load.probes == probes
    with pytest.raises(DiskOffline, match="by hand: the disk is being replaced") as caught:
        read(disk)
    assert caught.value.retry_after is None
    disk.set_online()
    assert read(disk) == CONTENT[:PAGE]
    assert online(disk)


def test_online_by_hand_does_not_help_a_disk_that_hangs(hangable: FaultFS, make_sick: MakeSick, beside: Beside) -> None:
    disk = make_sick(hangable.root)
    assert read(disk) == CONTENT[:PAGE]
    hangable.hang()
    until(lambda: offline(disk), "the verdict")
    disk.set_online()
    assert disk.status.load.state is State.HALF_OPEN
    with pytest.raises(DiskTimeout):
        read(disk, None)
    until(lambda: offline(disk), "the verdict, again")
    refused_at_once(disk, lambda: read(disk))
    hangable.release()
    until(lambda: not offline(disk))
    assert read(disk) == CONTENT[:PAGE]


# Slow is not stuck


def test_a_slow_disk_under_overload_is_never_offline(throttled: Throttled, make_sick: MakeSick, beside: Beside) -> None:
    """64 kB/s, for which 20 clients compete. With read-ahead, 4 KiB may cost 16 KiB: a quarter of a second.

    What was completed counts, also when its caller had left: so the pauses are those between completions.
    """
    throttled.enter_process()
    disk = make_sick(throttled.root, queue=8, deadline=1.5, offline_after=2.0, idle_probe=2.5)
    assert len(disk.read("f0", 0, PAGE, deadline=PATIENT)) == PAGE
    verdicts = Verdicts(disk)
    throttled.slow(64 * 1024)

    def ask() -> None:
        name = f"f{random.randrange(1, 8)}"
        assert len(disk.read(name, random.randrange(256) * PAGE, PAGE)) == PAGE

    returned = [time.monotonic()]

    def watch_returns() -> None:
        done = 0
        while not over:
            now_done = disk.status.disk_time.count
            if now_done != done:
                done = now_done
                returned.append(time.monotonic())
            gevent.sleep(0.005)

    over = False
    watcher = gevent.spawn(watch_returns)
    callers = Callers(20, ask, again=True)
    gevent.sleep(6)
    outcomes = callers.end()
    over = True
    watcher.get(timeout=PATIENT)
    pauses = list(map(sub, returned[1:], returned))
    assert max(pauses) < 2.0, "slower than this test wants to have it"
    assert len(pauses) >= 15
    assert State.OFFLINE not in verdicts.seen
    assert State.HALF_OPEN not in verdicts.seen
    assert "DiskOffline" not in callers.what
    assert {"ok", "DiskBusy"} <= callers.what, "no overload"
    assert max(outcome.seconds for outcome in outcomes) < 1.5 + SLACK
    throttled.lift()
    until(lambda: nothing_in_flight(disk) and online(disk))
    assert len(disk.read("f0", 0, PAGE, deadline=PATIENT)) == PAGE
    verdicts.end()
    disk.close()  # before the file system is unmounted


def test_a_slow_disk_under_large_reads_is_never_offline(
    throttled: Throttled, make_sick: MakeSick, beside: Beside
) -> None:
    """256 kB/s, for which eight readers of 1 MiB compete: nothing completes for half a minute, but parts come."""
    throttled.enter_process()
    disk = make_sick(throttled.root, deadline=PATIENT, offline_after=3.0, idle_probe=3.5)
    assert len(disk.read("f0", 0, PAGE)) == PAGE
    verdicts = Verdicts(disk)
    throttled.slow(256 * 1024)
    callers = Callers(disk.limits.threads, lambda: disk.read(f"f{random.randrange(1, 8)}", 0, 1024 * 1024), again=True)
    gevent.sleep(7)
    assert disk.status.load.oldest > 6
    assert set(verdicts.seen) == {State.ONLINE}
    throttled.lift()
    until(lambda: "ok" in callers.what)
    callers.end()
    until(lambda: nothing_in_flight(disk) and online(disk))
    verdicts.end()
    disk.close()  # before the file system is unmounted


# The root


def mounted(*command: object) -> None:
    subprocess.run([*map(str, command)], check=True, capture_output=True, timeout=30)


@pytest.fixture
def unmountable(dying: Dying) -> Iterator[Dying]:
    """An ext4 that is mounted, whatever a test has done to it."""
    yield dying
    if not os.path.ismount(dying.root):
        remount(dying)


def remount(dying: Dying) -> None:
    mounted("mount", "-t", "ext4", "-o", "ro,noload,noatime", dying.device, dying.root)


def test_an_unmounted_root_is_no_empty_disk(unmountable: Dying, make_sick: MakeSick, beside: Beside) -> None:
    disk = make_sick(unmountable.root)
    content = disk.read("f3", deadline=PATIENT)
    asking = Callers(2, lambda: disk.read("f3", 0, PAGE, deadline=PATIENT), again=True)
    mounted("umount", "-l", unmountable.root)
    assert os.listdir(unmountable.root) == []
    verdicts = Verdicts(disk)
    gevent.sleep(0.3)
    asking.end()
    assert asking.what <= {"ok", "DiskOffline"}, "nobody is told that the file is not there"
    assert verdicts.wait_for(State.OFFLINE) < 0.3 + 0.8 + SLACK
    assert "unmounted" in str(disk.status.load.reason)
    with pytest.raises(DiskOffline, match="on another device than before: was the disk unmounted"):
        disk.read("f3")
    refused_at_once(disk, lambda: disk.read("f3"))
    until(lambda: nothing_in_flight(disk))
    remount(unmountable)
    until(lambda: not offline(disk), "a probe to find the root")
    assert disk.read("f3", deadline=PATIENT) == content
    until(lambda: online(disk) and nothing_in_flight(disk))
    verdicts.end()
    disk.close()  # before the file system is unmounted


def test_a_file_system_whose_daemon_died_is_told_from_an_empty_disk(
    hangable: FaultFS, make_sick: MakeSick, beside: Beside
) -> None:
    disk = make_sick(hangable.root)
    assert read(disk) == CONTENT[:PAGE]
    hangable.hang()
    caller = Callers(1, lambda: read(disk))
    hangable.wait_held(1, sleep=gevent.sleep)
    hangable.kill()
    caller.end()
    assert caller.what <= {"DiskIOError", "DiskOffline"}
    for _ in range(10):
        with pytest.raises(DiskError) as caught:
            read(disk)
        assert not isinstance(caught.value, FileNotFoundError)
        gevent.sleep(0.05)
    until(lambda: nothing_in_flight(disk))


# Memory


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("offline_after", [0.5, 3600.0], ids=["offline", "busy"])
def test_requests_to_a_hung_disk_leave_no_memory(
    offline_after: float, hangable: FaultFS, make_sick: MakeSick, beside: Beside
) -> None:
    disk = make_sick(hangable.root, offline_after=offline_after, idle_probe=2 * offline_after, deadline=0.1)
    assert read(disk) == CONTENT[:PAGE]
    hangable.hang()
    verdicts = Verdicts(disk)

    def storm(count: int) -> set[str]:
        callers = Callers(count, lambda: read(disk, None))
        callers.end()
        return callers.what

    storm(200)
    if offline_after < 1:
        verdicts.wait_for(State.OFFLINE)
    storm(200)
    before = resident()
    for _ in range(10):
        assert storm(200) == {"DiskOffline" if offline_after < 1 else "DiskBusy"}
    assert resident() - before < 5_000_000
    assert disk.status.load.threads <= disk.limits.threads
    hangable.release()
    until(lambda: nothing_in_flight(disk) and not offline(disk))
    assert read(disk) == CONTENT[:PAGE]
    verdicts.end()


def test_one_slot_that_is_stuck_for_good_costs_the_disk_nothing_else(
    hangable: FaultFS, make_sick: MakeSick, beside: Beside
) -> None:
    (hangable.backing / "lost").write_bytes(b"lost")
    disk = make_sick(hangable.root, threads=3)
    assert read(disk) == CONTENT[:PAGE]
    hangable.hang(path="lost")
    with pytest.raises(DiskTimeout):
        disk.read("lost", 0, PAGE)
    verdicts = Verdicts(disk)
    for _ in range(100):
        with contextlib.suppress(DiskBusy):
            assert read(disk) == CONTENT[:PAGE]
        gevent.sleep(0.01)
    until(lambda: disk.status.load.probes >= 3, "probes while nobody asks")
    assert disk.status.load.in_flight <= 2
    assert set(verdicts.seen) == {State.SUSPECT}
    hangable.release()
    until(lambda: online(disk) and nothing_in_flight(disk))
    verdicts.end()


# The server


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[Path], ServerProcess]]:
    """Start a server with a healthy disk and one, called `sick`, on the directory given."""
    started: list[ServerProcess] = []
    (tmp_path / "well").mkdir()
    (tmp_path / "well" / "x").write_bytes(CONTENT)

    def start(sick: Path) -> ServerProcess:
        config = tmp_path / "server.toml"
        config.write_text(
            f"""
            [limits]
            threads = 2
            deadline = 0.3
            offline_after = 0.5
            idle_probe = 0.8
            probe_interval = 0.1
            probe_interval_max = 0.4
            [disk.sick]
            root = "{sick}"
            [disk.well]
            root = "{tmp_path / "well"}"
            """
        )
        started.append(ServerProcess(tmp_path, "--config", str(config)))
        return started[-1]

    yield start
    for server in started:
        server.kill()


def refuses_at_once(server: ServerProcess) -> None:
    began = time.monotonic()
    for _ in range(20):
        response = server.http("/v1/sick/x")
        assert response.status == 503
        assert response.headers["Retry-After"] == "1"
        assert b"offline" in response.body
    assert (time.monotonic() - began) / 20 < 0.25
    assert server.line(b"0,0,sick/x\n").startswith(b"3,")
    assert server.http("/v1/well/x").body == CONTENT
    assert server.http("/readyz").status == 200


def test_a_server_starts_with_a_dead_disk_and_finds_it_when_it_is_back(
    hangable: FaultFS, serve: Callable[[Path], ServerProcess]
) -> None:
    hangable.hang("*")
    began = time.monotonic()
    server = serve(hangable.root)
    assert time.monotonic() - began < 20
    assert server.disk("sick").state == "offline"
    refuses_at_once(server)
    assert server.disk("sick").in_flight == 1
    hangable.release()
    until_without_gevent(lambda: server.disk("sick").state == "online", "the disk to be found")
    assert server.http("/v1/sick/x").body == CONTENT
    assert server.stop() == 0


def test_a_server_whose_idle_disk_hangs(hangable: FaultFS, serve: Callable[[Path], ServerProcess]) -> None:
    server = serve(hangable.root)
    for name in ("sick", "well"):  # each keeps its root open from now on
        assert server.http(f"/v1/{name}/x").body == CONTENT
    descriptors, threads = server.descriptors(), server.threads()
    hangable.hang()
    until_without_gevent(lambda: server.disk("sick").state == "offline", "the idle probe to hang")
    refuses_at_once(server)
    assert server.disk("sick").timeouts == 0, "nobody had to wait for that"
    hangable.release()
    until_without_gevent(lambda: server.disk("sick").state != "offline", "the disk to come back unasked")
    assert server.http("/v1/sick/x").body == CONTENT
    until_without_gevent(lambda: server.disk("sick").state == "online")
    until_without_gevent(lambda: server.disk("sick").in_flight == 0)
    until_without_gevent(lambda: server.descriptors() <= descriptors, "all descriptors to be closed")
    assert server.threads() <= threads + 2
    assert server.stop() == 0


def test_sigterm_while_a_disk_is_offline(hangable: FaultFS, serve: Callable[[Path], ServerProcess]) -> None:
    server = serve(hangable.root)
    hangable.hang()
    assert server.http("/v1/sick/x").status in (503, 504)
    until_without_gevent(lambda: server.disk("sick").state == "offline", "the verdict")
    server.process.terminate()
    until_without_gevent(lambda: "stopped" in server.said(), "the end of the drain: nobody is owed anything")
    hangable.release()
    assert server.wait() == 0
