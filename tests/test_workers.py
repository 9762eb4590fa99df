"""Slots, the queue, deadlines, and callers that go away."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import random
import threading
import time
from typing import TYPE_CHECKING, Any

import gevent
import gevent.threadpool
import pytest
from gevent.event import Event
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diskread import Disk, DiskBusy, DiskError, DiskTimeout, Limits, State
from diskread._syscalls import CloseMode, Job
from diskread.workers import Workers

from .conftest import LARGE, SMALL, MakeDisk, descriptors, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from diskread.limits import EngineName

    KilledWithItsSlot = Callable[[Workers, Callable[[], None]], None]


class Kernel:
    """Counts who is inside, as a device would see it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.inside = 0
        self.most = 0
        self.calls = 0

    def enter(self, wait: Callable[[], object]) -> None:
        with self._lock:
            self.calls += 1
            self.inside += 1
            self.most = max(self.most, self.inside)
        try:
            wait()
        finally:
            with self._lock:
                self.inside -= 1


def occupy(disk: Disk, gate: threading.Event, how_many: int, deadline: float = 60) -> list[gevent.Greenlet[..., Any]]:
    """Fill slots with calls that return when the gate opens, and wait until they are inside."""
    before = disk.status.load.in_flight
    greenlets = [gevent.spawn(outcome, lambda: disk.run(gate.wait, 60, deadline=deadline)) for _ in range(how_many)]
    until(lambda: disk.status.load.in_flight == before + how_many)
    return greenlets


def until_waiting(disk: Disk, callers: int) -> None:
    until(lambda: disk.status.load.waiting == callers)


def outcome(call: Callable[[], Any]) -> Any:
    """The result of a call, or its error: gevent prints what greenlets raise."""
    try:
        return call()
    except Exception as error:
        return error


def most_threads(disk: Disk) -> int:
    """Threads that there may be, idle ones included: calls are the threadpool's, whoever makes the reads."""
    return disk.limits.threads * (2 if disk.limits.engine == "native" else 1)


def assert_all_slots_work(disk: Disk) -> None:
    """As many calls as there are slots are inside at the same time, and nothing is counted wrongly afterwards."""
    until(lambda: not disk.status.load.in_flight and not disk.status.load.waiting)
    meeting = threading.Barrier(disk.limits.threads)
    greenlets = [gevent.spawn(outcome, lambda: disk.run(meeting.wait, 20, deadline=30)) for _ in range(meeting.parties)]
    gevent.joinall(greenlets)
    assert sorted(each.get() for each in greenlets) == list(range(meeting.parties))
    load = disk.status.load
    assert (load.in_flight, load.stuck, load.waiting, load.oldest, load.state) == (0, 0, 0, 0.0, State.ONLINE)
    assert load.threads <= most_threads(disk)


# -- slots ------------------------------------------------------------------------------------------------------------


def test_slots_are_never_exceeded(make_disk: MakeDisk) -> None:
    disk, kernel = make_disk(threads=3, queue=1000, deadline=60), Kernel()
    greenlets = [gevent.spawn(disk.run, kernel.enter, lambda: time.sleep(0.002)) for _ in range(200)]
    gevent.joinall(greenlets, raise_error=True)
    assert (kernel.calls, kernel.most) == (200, 3)
    assert_all_slots_work(disk)


FATES = [
    "returns",
    "raises",
    "missed deadline",
    "gevent.Timeout",
    "killed in the kernel",
    "killed early",
    "killed late",
]


@settings(deadline=None, database=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    threads=st.integers(1, 4),
    queue=st.integers(0, 20),
    calls=st.lists(st.tuples(st.sampled_from(FATES), st.integers(0, 4)), max_size=25),
)
def test_whatever_happens_to_callers_no_slot_is_lost(
    nothing_left_behind: None, root: Path, threads: int, queue: int, calls: list[tuple[str, int]]
) -> None:
    with Disk("d1", root, Limits(threads=threads, queue=queue, deadline=30, idle=5)) as disk:
        kernel = Kernel()

        def call(fate: str, milliseconds: int) -> None:
            def work() -> None:
                time.sleep(milliseconds / 1000)
                if fate == "raises":
                    raise LookupError

            deadline = 0.001 if fate == "missed deadline" else None
            own_timeout = 0.001 if fate == "gevent.Timeout" else None
            with contextlib.suppress(LookupError, DiskBusy, DiskTimeout, gevent.Timeout), gevent.Timeout(own_timeout):
                disk.run(kernel.enter, work, deadline=deadline)

        greenlets = []
        for fate, milliseconds in calls:
            greenlets.append(gevent.spawn(call, fate, milliseconds))
            if fate == "killed early":
                greenlets[-1].kill(block=False)
            elif fate == "killed in the kernel":
                gevent.sleep(0)
                greenlets[-1].kill(block=False)
            elif fate == "killed late":
                gevent.sleep(milliseconds / 1000)
                greenlets[-1].kill(block=False)
        gevent.joinall(greenlets, raise_error=False)
        assert kernel.most <= threads
        assert_all_slots_work(disk)


def test_threads_start_on_demand_and_go_away_when_idle(make_disk: MakeDisk, gate: threading.Event) -> None:
    disk = make_disk(threads=4, idle=0.2)
    assert disk.status.load.threads == 0
    assert disk.read("small") == SMALL
    assert disk.status.load.threads == 1
    occupied = occupy(disk, gate, 3)
    # The thread of the read takes no calls where it is a native one.
    assert disk.status.load.threads == (4 if disk.limits.engine == "native" else 3)
    gate.set()
    gevent.joinall(occupied)
    until(lambda: disk.status.load.threads == 0, "the threads to go away")
    assert disk.read("small") == SMALL
    assert_all_slots_work(disk)


def test_threads_that_go_away_take_no_work_with_them(make_disk: MakeDisk) -> None:
    # Calls that come just as an idle thread leaves.
    disk = make_disk(threads=2, idle=0.005, deadline=20)
    for pause in range(100):
        assert disk.run(os.getpid) == os.getpid()
        gevent.sleep(0.003 + pause / 25_000)
    assert_all_slots_work(disk)


# -- the queue --------------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_at_once(make_disk: MakeDisk, gate: threading.Event) -> None:
    disk = make_disk(threads=2, queue=3, deadline=60)
    occupied = occupy(disk, gate, 2)
    waiting = [gevent.spawn(disk.read, "small") for _ in range(3)]
    until_waiting(disk, 3)
    started = time.monotonic()
    with pytest.raises(DiskBusy, match="all 2 slots are taken and 3 reads wait") as caught:
        disk.read("small")
    assert time.monotonic() - started < 5
    assert caught.value.errno == errno.EBUSY
    assert disk.status.counts.rejections == 1
    gate.set()
    gevent.joinall([*occupied, *waiting])
    assert [each.value for each in waiting] == [SMALL] * 3
    assert disk.read("small") == SMALL


def test_a_queue_of_none_refuses_what_finds_no_slot(make_disk: MakeDisk, gate: threading.Event) -> None:
    disk = make_disk(threads=1, queue=0)
    assert disk.read("small") == SMALL
    occupy(disk, gate, 1)
    with pytest.raises(DiskBusy):
        disk.read("small")
    gate.set()
    until(lambda: not disk.status.load.in_flight)
    assert disk.read("small") == SMALL


def test_who_comes_first_is_served_first(make_disk: MakeDisk, gate: threading.Event) -> None:
    disk, order = make_disk(threads=1, queue=100, deadline=60), list[int]()
    occupy(disk, gate, 1)
    greenlets = []
    for number in range(20):
        greenlets.append(gevent.spawn(disk.run, order.append, number))
        until_waiting(disk, number + 1)
    for gone in (3, 4, 11):
        greenlets[gone].kill()
    until_waiting(disk, 17)
    gate.set()
    gevent.joinall(greenlets)
    assert order == [each for each in range(20) if each not in (3, 4, 11)]


def test_a_newcomer_does_not_overtake_the_queue(make_disk: MakeDisk, gate: threading.Event) -> None:
    # gevent's Semaphore gives a slot that has just been released to whoever asks before its waiters have been woken:
    # somebody who reads in a loop would starve them.
    disk, order = make_disk(threads=1, queue=10, deadline=60), list[str]()
    occupy(disk, gate, 1)

    def greedy() -> None:
        for _ in range(20):
            disk.run(order.append, "greedy")

    first = gevent.spawn(greedy)
    until_waiting(disk, 1)
    patient = gevent.spawn(disk.run, order.append, "patient")
    until_waiting(disk, 2)
    gate.set()
    first.get()
    patient.get()
    assert order.index("patient") == 1


def test_a_deadline_in_the_queue_starts_nothing(make_disk: MakeDisk, gate: threading.Event) -> None:
    disk, called = make_disk(threads=1, deadline=60), list[int]()
    occupy(disk, gate, 1)
    with pytest.raises(DiskTimeout, match="nothing was read") as caught:
        disk.run(called.append, 1, deadline=0.05)
    assert caught.value.started is False
    assert (disk.status.load.waiting, disk.status.load.in_flight, disk.status.load.stuck) == (0, 1, 0)
    assert disk.status.counts.timeouts == 1
    gate.set()
    assert_all_slots_work(disk)
    assert called == []


def test_the_time_in_the_queue_counts(make_disk: MakeDisk, gate: threading.Event) -> None:
    disk = make_disk(threads=1, deadline=60)
    occupy(disk, gate, 1)
    never = threading.Event()
    late = gevent.spawn(outcome, lambda: disk.run(never.wait, 60, deadline=0.6))
    until_waiting(disk, 1)
    started = time.monotonic()
    gevent.sleep(0.3)
    gate.set()
    late.join()
    elapsed = time.monotonic() - started
    never.set()
    assert isinstance(late.value, DiskTimeout)
    if late.value.started:  # else the machine was so slow that the deadline passed in the queue already
        assert 0.2 < elapsed < 0.6 + 0.3


def test_the_longest_wait_is_for_the_queue_only(make_disk: MakeDisk, gate: threading.Event) -> None:
    disk = make_disk(threads=1, deadline=60)
    times = disk.stall(0.1, longest_wait=0.001)
    assert times.disk >= 0.1
    occupy(disk, gate, 1)
    for longest in (0.05, 0, -1):
        with pytest.raises(DiskTimeout) as caught:
            disk.stall(0.01, longest_wait=longest)
        assert caught.value.started is False
    assert disk.status.load.waiting == 0


# -- stuck disks ------------------------------------------------------------------------------------------------------


def test_a_slot_comes_back_when_the_call_returns_not_when_its_caller_gives_up(
    make_disk: MakeDisk, gate: threading.Event
) -> None:
    disk = make_disk(threads=2, queue=10, deadline=0.05)
    with pytest.raises(DiskTimeout, match="has not answered") as caught:
        disk.run(gate.wait, 60)
    assert caught.value.started is True
    load = disk.status.load
    assert (load.in_flight, load.stuck, load.waiting, load.threads, load.state) == (1, 1, 0, 1, State.SUSPECT)
    assert load.accepting
    assert load.oldest >= 0.05
    assert disk.read("small", deadline=60) == SMALL, "the other slot"
    for _ in range(20):
        outcome(lambda: disk.run(gate.wait, 60, deadline=0.01))
    assert disk.status.load.threads <= most_threads(disk), "missed deadlines do not add threads"
    gate.set()
    assert_all_slots_work(disk)


def test_when_all_slots_are_stuck_reads_fail_at_once_until_one_returns(make_disk: MakeDisk) -> None:
    disk, gates = make_disk(threads=2, queue=10, deadline=0.05), [threading.Event(), threading.Event()]
    for gate in gates:
        with pytest.raises(DiskTimeout):
            disk.run(gate.wait, 60)
    assert (disk.status.load.stuck, disk.status.load.accepting) == (2, False)
    for _ in range(5):
        started = time.monotonic()
        with pytest.raises(DiskBusy, match="all 2 slots hold reads that missed their deadline"):
            disk.read("small")
        assert time.monotonic() - started < 5
    gates[0].set()
    until(lambda: disk.status.load.accepting)
    assert disk.read("small", deadline=60) == SMALL
    gates[1].set()
    assert_all_slots_work(disk)


def test_the_hub_goes_on_while_slots_are_stuck(make_disk: MakeDisk) -> None:
    disk, other = make_disk(threads=3, queue=2, deadline=20), make_disk(threads=1)
    stuck = [gevent.spawn(outcome, lambda: disk.stall(2)) for _ in range(6)]
    gevent.sleep(0)
    gaps, last = [], time.monotonic()
    for _ in range(50):
        gevent.sleep(0.01)
        assert other.read("small") == SMALL, "another disk"
        now = time.monotonic()
        gaps.append(now - last)
        last = now
    assert disk.status.load.in_flight == 3
    assert max(gaps) < 1.5
    for each in stuck:
        each.kill(block=False)
    gevent.joinall(stuck)


def test_a_deadline_that_has_passed_already(make_disk: MakeDisk) -> None:
    disk = make_disk(threads=1)
    assert isinstance(outcome(lambda: disk.stall(0.05, deadline=1e-12)), DiskTimeout)
    assert_all_slots_work(disk)


@pytest.mark.parametrize("deadline", [math.inf, 1e10, 10**12])
def test_a_deadline_that_is_far_away(make_disk: MakeDisk, gate: threading.Event, deadline: float) -> None:
    disk = make_disk(threads=1, deadline=deadline)
    assert disk.read("large", deadline=deadline) == LARGE
    occupy(disk, gate, 1, deadline=deadline)
    reader = gevent.spawn(disk.read, "small", deadline=deadline)
    until_waiting(disk, 1)
    gate.set()
    assert reader.get() == SMALL


# -- callers that go away ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["queue", "kernel"])
@pytest.mark.parametrize("how", ["kill", "timeout"])
def test_a_caller_may_go_away(make_disk: MakeDisk, gate: threading.Event, where: str, how: str) -> None:
    disk, called = make_disk(threads=1, deadline=60), list[int]()
    if where == "queue":
        occupy(disk, gate, 1)

    def work() -> None:
        called.append(1)
        gate.wait(60)

    def caller() -> str:
        try:
            with gevent.Timeout(0.05 if how == "timeout" else None):
                disk.run(work)
        except gevent.Timeout:
            return "timeout"
        return "returned"

    greenlet = gevent.spawn(caller)
    until(lambda: disk.status.load.waiting == 1 if where == "queue" else called or greenlet.dead)
    started = time.monotonic()
    if how == "kill":
        greenlet.kill(timeout=20)
    else:
        greenlet.join(20)
    assert greenlet.dead
    assert time.monotonic() - started < 15
    assert how == "kill" or greenlet.value == "timeout"
    load = disk.status.load
    assert (load.in_flight, load.waiting, load.stuck) == (1, 0, 0)
    assert disk.status.counts.abandoned == 1
    gate.set()
    assert_all_slots_work(disk)
    assert called == ([] if where == "queue" else [1])


def open_after_stall(root: Path, stall: float) -> Job:
    return Job(
        root=os.fsencode(root), path=b"large", size=10, stall_ns=int(stall * 1e9), close_mode=CloseMode.CLOSE_NEVER
    )


@pytest.fixture
def workers(nothing_left_behind: None, engine: EngineName) -> Workers:
    return Workers("w1", Limits(threads=2, queue=100, deadline=60, idle=0.5, engine=engine))


def finished(workers: Workers) -> bool:
    load = workers.load
    return not load.in_flight and not load.waiting and not load.threads


def test_what_an_abandoned_visit_opens_is_closed(workers: Workers, root: Path) -> None:
    job, completed = open_after_stall(root, 0.3), list[bool]()
    caller = gevent.spawn(workers.run, job, math.inf, on_completed=lambda: completed.append(job.finished))
    until(lambda: workers.load.in_flight)
    caller.kill()
    assert (workers.load.in_flight, workers.load.stuck) == (1, 0), "its caller left early: that is not the disk's fault"
    assert not completed
    until(lambda: completed)
    assert completed == [True]
    workers.close()
    until(lambda: finished(workers))
    assert str(root / "large") not in descriptors().values()


def test_a_waiter_is_killed_after_its_job_finished_and_before_the_hub_heard(workers: Workers, root: Path) -> None:
    job, completed = open_after_stall(root, 0), list[bool]()
    caller = gevent.spawn(workers.run, job, math.inf, on_completed=lambda: completed.append(True))
    gevent.sleep(0)
    assert workers.load.in_flight == 1
    while not job.finished:  # without the hub
        time.sleep(0.001)
    assert str(root / "large") in descriptors().values()
    caller.kill(block=False)
    caller.join()
    until(lambda: completed)
    workers.close()
    until(lambda: finished(workers))
    assert str(root / "large") not in descriptors().values()
    assert completed == [True]


def test_a_waiter_is_killed_at_the_very_moment_its_job_completes(workers: Workers, root: Path) -> None:
    job, done = open_after_stall(root, 0), Event()

    def kill_now() -> None:
        done.set()
        caller.throw()

    caller = gevent.spawn(workers.run, job, math.inf, on_completed=kill_now)
    done.wait()
    caller.join()
    workers.close()
    until(lambda: finished(workers))
    assert str(root / "large") not in descriptors().values()


def test_kills_at_random_times_lose_nothing(make_disk: MakeDisk, root: Path) -> None:
    disk, opened = make_disk(threads=2, queue=5, deadline=30), []

    def use() -> None:
        with contextlib.suppress(DiskError):
            opened.append(disk.open("large", size=0))

    for _ in range(400):
        greenlet = gevent.spawn(use)
        if random.random() < 0.5:
            gevent.sleep(random.random() * 0.0005)
        else:
            gevent.sleep(0)
            time.sleep(random.random() * 0.0003)
        greenlet.kill(block=random.random() < 0.5)
    until(lambda: not disk.status.load.in_flight and not disk.status.load.waiting)
    for file in opened:
        file.close()
    until(lambda: str(root / "large") not in descriptors().values())
    assert_all_slots_work(disk)


# -- wrong callers ----------------------------------------------------------------------------------------------------


def test_the_hub_must_not_wait(make_disk: MakeDisk) -> None:
    disk, outcomes = make_disk(), list[Any]()
    gevent.get_hub().loop.run_callback(lambda: outcomes.append(outcome(lambda: disk.read("small"))))
    until(lambda: outcomes)
    assert isinstance(outcomes[0], RuntimeError)
    assert "spawn a greenlet" in str(outcomes[0])
    assert disk.read("small") == SMALL


def in_another_thread(call: Callable[[], Any]) -> Any:
    outcomes: list[Any] = []

    def work() -> None:
        outcomes.append(outcome(call))
        gevent.get_hub().destroy(destroy_loop=True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return outcomes[0]


def test_another_thread_is_refused(make_disk: MakeDisk) -> None:
    disk = make_disk()
    assert disk.read("small") == SMALL
    for call in (
        lambda: disk.read("small"),
        lambda: disk.open("small"),
        lambda: disk.run(os.getpid),
        lambda: disk.stall(0),
    ):
        refused = in_another_thread(call)
        assert isinstance(refused, RuntimeError)
        assert "native thread" in str(refused)
        assert "d1" in str(refused)
    assert disk.read("small") == SMALL


def test_a_thread_may_have_a_disk_of_its_own(root: Path, nothing_left_behind: None) -> None:
    def use() -> bytes:
        with Disk("d1", root) as disk:
            data = disk.read("large")
        until(lambda: not disk.status.load.threads)
        return data

    assert in_another_thread(use) == LARGE


def test_after_close_nothing_is_accepted(make_disk: MakeDisk) -> None:
    disk = make_disk()
    assert disk.read("small") == SMALL
    file = disk.open("large")
    disk.close()
    disk.close()
    for call in (
        lambda: disk.read("small"),
        lambda: disk.open("small"),
        lambda: disk.stat("small"),
        lambda: disk.run(os.getpid),
        lambda: disk.stall(0),
        lambda: file.read(300_000, 10),
    ):
        with pytest.raises(RuntimeError, match="closed"):
            call()
    file.close()


def test_closing_a_disk_that_was_never_used(make_disk: MakeDisk) -> None:
    make_disk().close()


def test_close_does_not_wait_for_what_is_stuck(make_disk: MakeDisk, gate: threading.Event) -> None:
    disk = make_disk(threads=3, idle=1000)
    occupy(disk, gate, 1)
    assert isinstance(outcome(lambda: disk.run(gate.wait, 60, deadline=0.02)), DiskTimeout)
    started = time.monotonic()
    disk.close()
    assert time.monotonic() - started < 5
    assert disk.status.load.threads == 2
    gate.set()
    until(lambda: disk.status.load.threads == 0, "the threads to go away")
    assert disk.status.load.in_flight == 0


def test_close_while_calls_wait_in_the_queue(make_disk: MakeDisk, gate: threading.Event) -> None:
    # Between two of them nothing is in flight for a moment: not yet the time to let the threads go.
    disk = make_disk(threads=1, deadline=60)
    occupied = occupy(disk, gate, 1)
    waiting = [gevent.spawn(outcome, lambda: disk.read("small")) for _ in range(3)]
    until_waiting(disk, 3)
    disk.close()
    gate.set()
    gevent.joinall([*occupied, *waiting], timeout=10)
    assert all(each.dead for each in waiting), f"still waiting: {disk.status.load}"
    for each in waiting:
        assert each.value == SMALL or isinstance(each.value, RuntimeError)
    until(lambda: disk.status.load.threads == 0)
    assert (disk.status.load.in_flight, disk.status.load.waiting) == (0, 0)


@pytest.fixture
def killed_with_its_slot(nothing_left_behind: None) -> KilledWithItsSlot:
    """Kill a waiter when its slot has been handed to it and it has not run since; do something just before that."""

    def run(workers: Workers, before: Callable[[], None]) -> None:
        def kill() -> None:
            before()
            waiter.throw()

        def kill_soon() -> None:  # in the same turn of the hub, before anything that is only triggered then
            gevent.get_hub().loop.run_callback(kill)

        first = gevent.spawn(workers.run, Job(stall_ns=10**8), math.inf, on_completed=kill_soon)
        until(lambda: workers.load.in_flight == 1)
        waiter = gevent.spawn(workers.run, Job(), math.inf)
        until(lambda: workers.load.waiting == 1)
        first.join()
        waiter.join()
        assert isinstance(waiter.value, gevent.GreenletExit)

    return run


def test_the_slot_of_a_killed_waiter_goes_to_what_has_to_be_closed(
    root: Path, killed_with_its_slot: KilledWithItsSlot
) -> None:
    workers, descriptor = Workers("w1", Limits(threads=1)), os.open(root / "large", os.O_RDONLY)
    killed_with_its_slot(workers, lambda: workers.close_descriptor(descriptor))
    try:
        until(lambda: str(root / "large") not in descriptors().values(), seconds=5)
    finally:
        workers.close()
        workers.close_descriptor(os.open(root / "small", os.O_RDONLY))  # gets things going again
    until(lambda: finished(workers))


def test_the_threads_leave_when_the_last_waiter_is_killed(killed_with_its_slot: KilledWithItsSlot) -> None:
    workers = Workers("w1", Limits(threads=1, idle=1000))
    killed_with_its_slot(workers, workers.close)
    try:
        until(lambda: finished(workers), seconds=5)
    finally:
        workers.close()
    until(lambda: finished(workers))


# -- threads that cannot be had ---------------------------------------------------------------------------------------


def no_thread(*_: object) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("engine", ["threadpool"])  # native threads: test_engine.py
def test_without_threads_the_disk_is_busy(make_disk: MakeDisk, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = make_disk(threads=2, queue=0)
    monkeypatch.setattr(gevent.threadpool, "start_new_thread", no_thread)
    for _ in range(10):
        with pytest.raises(DiskBusy, match=r"can't start new thread.*ulimit"):
            disk.read("small")
        with pytest.raises(DiskBusy):
            disk.open("large")
    load = disk.status.load
    assert (load.in_flight, load.waiting, load.threads) == (0, 0, 0)
    assert disk.status.counts.rejections == 20
    monkeypatch.undo()
    assert disk.read("small") == SMALL
    assert str(root / "small") not in descriptors().values()
    assert_all_slots_work(disk)


@pytest.mark.parametrize("engine", ["threadpool"])  # native threads: test_engine.py
def test_a_descriptor_that_cannot_be_closed_for_want_of_threads_is_closed_later(
    make_disk: MakeDisk, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = make_disk(threads=2, idle=0.1)
    file = disk.open("large")
    until(lambda: disk.status.load.threads == 0)
    monkeypatch.setattr(gevent.threadpool, "start_new_thread", no_thread)
    file.close()
    gevent.sleep(0.05)
    assert str(root / "large") in descriptors().values()
    monkeypatch.undo()
    assert disk.read("small") == SMALL
    until(lambda: str(root / "large") not in descriptors().values())
    assert_all_slots_work(disk)


@pytest.mark.parametrize("engine", ["threadpool"])  # native threads: test_engine.py
@pytest.mark.parametrize("stall", [0.6, 0])
def test_a_task_is_taken_by_another_thread_while_a_new_one_cannot_be_started(
    make_disk: MakeDisk, gate: threading.Event, monkeypatch: pytest.MonkeyPatch, stall: float
) -> None:
    # gevent's spawn queues the task before it starts the thread; a thread that has become free meanwhile runs it.
    disk = make_disk(threads=2, deadline=30)
    occupied = occupy(disk, gate, 1)

    def slow_failure(*_: object) -> None:
        gate.set()
        time.sleep(0.3)
        no_thread()

    monkeypatch.setattr(gevent.threadpool, "start_new_thread", slow_failure)
    value = outcome(lambda: disk.stall(stall, "large"))
    monkeypatch.undo()
    assert isinstance(value, DiskBusy), repr(value)
    gevent.joinall(occupied)
    assert_all_slots_work(disk)


# -- tasks ------------------------------------------------------------------------------------------------------------


class BrokenTask:
    """A task that breaks the promise not to raise."""

    seconds = progress = 0.0
    size = count = 0

    def run(self) -> None:
        raise LookupError("broken")

    def abandon(self) -> None: ...

    def take_descriptor(self) -> int:
        return -1


def test_even_a_task_that_raises_gives_its_slot_back(workers: Workers, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(5):
        workers.run(BrokenTask(), math.inf)
    assert workers.load.in_flight == 0
    assert "LookupError" in capfd.readouterr().err
    workers.close()
    until(lambda: finished(workers))


def test_completion_is_reported_once_in_every_case(workers: Workers, gate: threading.Event) -> None:
    reports: dict[str, int] = {}

    def report(name: str) -> Callable[[], None]:
        reports[name] = 0

        def on_completed() -> None:
            reports[name] += 1

        return on_completed

    workers.run(Job(), math.inf, on_completed=report("done"))
    blockers: list[gevent.Greenlet[..., Any]] = [
        gevent.spawn(
            outcome,
            lambda: workers.run(Job(stall_ns=4 * 10**8), time.monotonic() + 0.05, on_completed=report("timeout")),
        ),
        gevent.spawn(workers.run, Job(stall_ns=3 * 10**8), math.inf, on_completed=report("slow")),
    ]
    until(lambda: workers.load.in_flight == 2)
    assert isinstance(
        outcome(lambda: workers.run(Job(), time.monotonic() + 0.02, on_completed=report("queue"))), DiskTimeout
    )
    assert reports == {"done": 1, "timeout": 0, "slow": 0, "queue": 1}
    assert isinstance(
        in_another_thread(lambda: workers.run(Job(), math.inf, on_completed=report("thread"))), RuntimeError
    )
    for blocker in blockers:
        blocker.join()
    until(lambda: workers.load.in_flight == 0)
    workers.close()
    assert isinstance(outcome(lambda: workers.run(Job(), math.inf, on_completed=report("closed"))), RuntimeError)
    assert reports == {"done": 1, "timeout": 1, "slow": 1, "queue": 1, "thread": 1, "closed": 1}
    until(lambda: finished(workers))


def test_another_clock(nothing_left_behind: None) -> None:
    now = [100.0]
    workers = Workers("w1", Limits(threads=1), clock=lambda: now[0])
    caller = gevent.spawn(workers.run, Job(stall_ns=3 * 10**8), math.inf)
    until(lambda: workers.load.in_flight)
    now[0] = 130.0
    assert workers.load.oldest == 30.0
    caller.join()
    assert workers.load.oldest == 0.0
    workers.close()
    until(lambda: finished(workers))
