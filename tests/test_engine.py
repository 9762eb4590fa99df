"""Native threads that make visits without Python, and disks that use them."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import gevent
import pytest

import diskread.engines
from diskread import Disk, DiskBusy, DiskTimeout, Limits
from diskread._engine import Engine
from diskread._syscalls import CloseMode, Job, Step, stall_holding_gil

from .conftest import SMALL, RunScript, descriptors, native_threads, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

NO_ROOM = 1 << 46
"""Bytes of stack that no address space has room for: no thread can be started with it."""


@pytest.fixture
def native(nothing_left_behind: None, root: Path) -> Iterator[Disk]:
    """A disk with four native threads."""
    with Disk("d1", root, Limits(threads=4, queue=1000, deadline=60, idle=5, engine="native", inline="off")) as disk:
        yield disk


def stalled(seconds: float) -> Job:
    return Job(stall_ns=int(seconds * 1e9))


def reading(root: Path, name: bytes = b"small", stall: float = 0, size: int = len(SMALL)) -> Job:
    return Job(root=os.fsencode(root), path=name, size=size, stall_ns=int(stall * 1e9))


def collect(engine: Engine, how_many: int) -> list[Job]:
    """Wait for so many jobs, as an event loop would."""
    jobs: list[Job] = []
    while len(jobs) < how_many:
        assert select.select([engine.fileno()], [], [], 20)[0], "no completion within 20 s"
        jobs += engine.completed()
    assert len(jobs) == how_many
    return jobs


# -- the threads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threads", "idle"), [(0, 1), (-1, 1), (1, 0), (1, -1), (1, float("nan")), (1, 1e10)])
def test_what_is_out_of_range_is_refused(threads: int, idle: float) -> None:
    with pytest.raises(ValueError, match="threads" if threads < 1 else "idle"):
        Engine(threads, idle)


def test_a_job_is_made_and_given_back(root: Path) -> None:
    two = Engine(2, 60)
    assert (two.threads, two.completed()) == (0, [])
    job = reading(root)
    two.submit(job)
    assert collect(two, 1) == [job]
    assert (job.take_data(), job.error, job.finished, two.threads) == (SMALL, 0, True, 1)
    assert not select.select([two.fileno()], [], [], 0)[0]
    with pytest.raises(RuntimeError, match="once"):
        two.submit(job)
    assert two.completed() == []


def test_errors_come_back_in_the_job(root: Path) -> None:
    two = Engine(2, 60)
    two.submit(reading(root, b"missing"))
    (job,) = collect(two, 1)
    assert (job.step, job.take_data()) == (Step.STEP_OPEN, b"")
    two.submit(reading(root, size=1 << 62))  # no memory for that
    (job,) = collect(two, 1)
    assert (job.step, job.take_data()) == (Step.STEP_MEMORY, b"")


def test_there_are_never_more_threads_than_the_limit() -> None:
    two = Engine(2, 60)
    before = native_threads()
    jobs = [stalled(0.02) for _ in range(20)]
    for job in jobs:
        two.submit(job)
    assert two.threads == 2
    assert len(native_threads() - before) == 2
    done = collect(two, 20)
    assert set(done) == set(jobs)
    events = sorted([(job.started_ns, 1) for job in jobs] + [(job.finished_ns, -1) for job in jobs])
    inside = [sum(step for _, step in events[: count + 1]) for count in range(len(events))]
    assert max(inside) == 2


def test_a_thread_is_used_again_and_another_is_started_only_when_all_are_busy() -> None:
    two = Engine(2, 60)
    for _ in range(5):
        two.submit(stalled(0))
        collect(two, 1)
    assert two.threads == 1
    two.submit(stalled(0.2))
    two.submit(stalled(0))
    assert two.threads == 2
    collect(two, 2)


def test_idle_threads_leave_and_come_back() -> None:
    engine = Engine(3, 0.1)
    before = native_threads()
    for _ in range(2):
        for _ in range(3):
            engine.submit(stalled(0.05))
        assert engine.threads == 3
        collect(engine, 3)
        until(lambda: engine.threads == 0)
        until(lambda: not native_threads() - before)
    engine.close()


def test_threads_wait_for_no_signal() -> None:
    two = Engine(2, 60)
    before = native_threads()
    two.submit(stalled(0))
    collect(two, 1)
    (thread,) = native_threads() - before
    with open(f"/proc/self/task/{thread}/status") as status:
        lines = dict(line.rstrip("\n").split(":\t") for line in status if ":\t" in line)
    blocked = int(lines["SigBlk"], 16)
    assert all(blocked >> (number - 1) & 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD))
    assert lines["Name"] == "diskread"


def test_one_wake_up_brings_any_number_of_jobs() -> None:
    two = Engine(2, 60)
    for _ in range(100):
        two.submit(stalled(0))
    last = stalled(0)
    two.submit(last)
    until(lambda: last.finished)
    until(lambda: select.select([two.fileno()], [], [], 0)[0])
    batch = two.completed()
    assert len(batch) > 50, "all or all but what the other thread has in hand"
    collect(two, 101 - len(batch))


def test_closed_it_takes_no_job_but_ends_what_it_has() -> None:
    engine = Engine(1, 60)
    for _ in range(3):
        engine.submit(stalled(0.05))
    engine.close()
    engine.close()
    opened = os.open("/dev/null", os.O_RDONLY)
    late = Job(descriptor=opened)
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(late)
    assert late.take_descriptor() == opened
    os.close(opened)
    assert len(collect(engine, 3)) == 3
    until(lambda: engine.threads == 0)


def test_without_a_thread_nothing_happens_to_the_job(root: Path) -> None:
    engine = Engine(1, 60, NO_ROOM)
    job = reading(root)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        engine.submit(job)
    assert (engine.threads, engine.completed(), job.finished) == (0, [], False)
    job.run()
    assert job.take_data() == SMALL


@pytest.mark.parametrize("moment", ["before", "queued", "running", "over"])
def test_an_abandoned_job_closes_what_it_has(moment: str, root: Path) -> None:
    engine = Engine(1, 60)
    job = Job(root=os.fsencode(root), path=b"small", size=10, stall_ns=3 * 10**8, close_mode=CloseMode.CLOSE_NEVER)
    if moment == "queued":
        engine.submit(stalled(0.1))
    if moment == "before":
        job.abandon()
    engine.submit(job)
    if moment == "running":
        until(lambda: job.started_ns)
    if moment == "over":
        until(lambda: job.finished)
    job.abandon()
    if moment in ("queued", "running"):
        with pytest.raises(RuntimeError, match="running"):
            job.take_descriptor()
    collect(engine, 2 if moment == "queued" else 1)
    descriptor = job.take_descriptor()
    if moment == "over":
        os.close(descriptor)
    else:
        assert (descriptor, job.step) == (-1, Step.STEP_ABANDONED)
    assert str(root / "small") not in descriptors().values()
    engine.close()


def test_what_the_threads_share_outlives_the_engine() -> None:
    before, others = native_threads(), descriptors()
    engine = Engine(1, 60)
    opened = os.open("/dev/null", os.O_RDONLY)
    engine.submit(Job(descriptor=opened, stall_ns=2 * 10**8))
    fileno = engine.fileno()
    del engine
    assert fileno in descriptors(), "the thread will write to it"
    until(lambda: not native_threads() - before)
    assert descriptors() == others


# -- beside Python ----------------------------------------------------------------------------------------------------


def test_reads_come_to_their_end_while_python_stands_still(root: Path) -> None:
    engine = Engine(4, 60)
    jobs = [reading(root, stall=0.05) for _ in range(20)]
    for job in jobs:
        engine.submit(job)
    began = time.monotonic_ns()
    holder = threading.Thread(target=stall_holding_gil, args=(1.0,))
    holder.start()
    holder.join()
    ended = time.monotonic_ns()
    collect(engine, 20)
    assert all(job.finished_ns < began + (ended - began) * 3 / 4 for job in jobs), "20 reads of 50 ms in 4 threads"
    assert [job.take_data() for job in jobs] == [SMALL] * 20
    engine.close()


def test_many_reads_by_many_greenlets(native: Disk) -> None:
    def read(count: int) -> int:
        return sum(native.read("small", number % 100, 100) == SMALL[number % 100 :][:100] for number in range(count))

    greenlets = [gevent.spawn(read, 10_000 // 64 + (number < 10_000 % 64)) for number in range(64)]
    gevent.joinall(greenlets, raise_error=True)
    assert sum(each.get() for each in greenlets) == 10_000
    assert native.status.load.threads <= 4


def test_a_missed_deadline_leaves_the_thread_to_itself(native: Disk) -> None:
    with pytest.raises(DiskTimeout):
        native.stall(0.4, deadline=0.05)
    assert native.status.load.in_flight == 1
    assert native.read("small") == SMALL
    until(lambda: native.status.load.in_flight == 0)


def test_without_threads_a_disk_is_busy(native: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diskread.engines, "NativeThreads", partial(Engine, stack_size=NO_ROOM))
    for _ in range(10):  # more than there are slots: none is lost
        with pytest.raises(DiskBusy, match="can't start new thread"):
            native.read("small")
    assert native.run(len, "abc") == 3, "that is the threadpool's"


# -- processes --------------------------------------------------------------------------------------------------------

STUCK = """
import os, sys, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: that is the point
import gevent, gevent.os
from diskread import Disk, DiskTimeout, Limits

disk = Disk("d1", sys.argv[1], Limits(threads=2, deadline=30, engine="native", inline="off"))
assert disk.read("small")
stuck = gevent.spawn(disk.stall, float(sys.argv[2]))
while not disk.status.load.in_flight:
    gevent.sleep(0.001)
"""

FORK = (
    STUCK
    + """
fork = {"os": os.fork, "gevent": gevent.os.fork}[sys.argv[3]]
pid = fork()
if pid == 0:
    status = 1
    try:
        assert (disk.status.load.in_flight, disk.status.load.threads) == (0, 0)
        with gevent.Timeout(20):
            for _ in range(10):
                assert disk.read("small")
        disk.close()
        gevent.sleep(1.5)  # the parent's stall ends: its wake-up is not for us
        status = 0
    finally:
        os._exit(status)
stuck.get(timeout=20)
assert disk.read("small")
assert os.waitpid(pid, 0)[1] == 0
print("done")
"""
)


@pytest.mark.parametrize("how", ["os", "gevent"])
def test_a_forked_child_leaves_its_parents_threads_alone(run_script: RunScript, root: Path, how: str) -> None:
    result = run_script(FORK, root, 1.0, how)
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("ending", ["", "disk.close()", "del disk, stuck", "sys.exit(0)"])
def test_a_program_ends_beside_a_stuck_thread(run_script: RunScript, root: Path, ending: str) -> None:
    result = run_script(f"{STUCK}\n{ending}\n", root, 60, timeout=30)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_an_idle_disk_keeps_no_program_waiting(run_script: RunScript, root: Path) -> None:
    program = STUCK + "stuck.get()\nassert gevent.get_hub().join(timeout=20)\nprint('done')\n"
    result = run_script(program.replace("Limits(", "Limits(idle_probe=float('inf'), "), root, 0.1)
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")
