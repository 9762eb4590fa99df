"""Runs the jobs of one disk in native threads: slots, a bounded queue, deadlines, abandoned jobs.

The rules, each of which keeps a hung disk from using up more than its own share:

* At most `threads` jobs are inside the kernel. The slots stand in front of the engine (`diskread.engines`): gevent's
  threadpool itself would make its callers wait without a deadline, and would admit one more than its size
  (`gevent.threadpool.ThreadPool.spawn`).
* At most `queue` callers wait for a slot; one more is refused at once.
* A slot is given back when the system call has returned, never when its caller gives up: otherwise each missed
  deadline would add a thread for as long as the disk hangs.
* Nobody ever waits for a stuck thread: not the hub, not a killed greenlet, not the end of the process.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from . import hubs
from ._syscalls import Job
from .alarm import Alarm
from .engines import new_engine
from .errors import DiskBusy, DiskError, DiskOffline, DiskTimeout
from .health import Health, Refusal, State
from .latency import Latency, RecentTimes
from .monitor import Monitor
from .slots import Slots
from .slow_log import SlowLog

if TYPE_CHECKING:
    from collections.abc import Callable

    from .health import Kind
    from .hubs import HubName, Waiter
    from .limits import Limits

    ProbeMaker = Callable[[], tuple["Task", Callable[[], None]]]
    OnChange = Callable[[State, str | None], None]


class Task(Protocol):
    """What workers can run: a `Job`, or any other blocking call dressed as one."""

    def run(self) -> None:
        """Do the work in a native thread.

        Must not raise: gevent's threadpool prints a traceback for each exception in a worker, caught or not.
        """

    def abandon(self) -> None:
        """Take note that nobody waits for the result. Called on the hub's thread; must not block."""

    def take_descriptor(self) -> int:
        """Hand over a descriptor that is open and that nobody else will close, or -1."""

    @property
    def seconds(self) -> float:
        """How long the work took in its thread, once it is done."""

    @property
    def progress(self) -> float:
        """When a part of the work was done last: seconds on CLOCK_MONOTONIC, 0.0 for never. For any thread."""

    @property
    def size(self) -> int:
        """Bytes that are to be read; 0 for what is no read."""

    @property
    def count(self) -> int:
        """Bytes that were read, once it is done."""


@dataclass(frozen=True)
class Load:
    """What the workers of a disk are doing at one moment.

    Attributes:
        state: The verdict on the disk.
        threads: Native threads, idle ones included.
        in_flight: Operations inside the kernel: slots that are taken.
        stuck: Those of them that nobody waits for any more and that have had the disk's deadline for it.
        waiting: Callers that wait for a slot.
        oldest: Seconds that the oldest operation has been inside the kernel.
        accepting: Whether an operation has a chance: not when the disk is offline, nor when every slot is stuck.
        reason: Why the disk is offline; None when it is not.
        since: Seconds for which the state has been what it is.
        changes: How often the state has changed.
        probes: Probes that were sent.
        next_probe: Seconds until the next one; 0.0 while one is under way, None when none will be sent.
    """

    state: State = State.ONLINE
    threads: int = 0
    in_flight: int = 0
    stuck: int = 0
    waiting: int = 0
    oldest: float = 0.0
    accepting: bool = True
    reason: str | None = None
    since: float = 0.0
    changes: int = 0
    probes: int = 0
    next_probe: float | None = None


class _Visit:
    """One task on its way: what the hub knows of it.

    Attributes:
        asked: When its caller asked for it.
        started: When it got its slot and its thread; None before.
        waiter: Wakes its caller: when it is over, or refused; None when nobody waits for it.
        refused: Why it cannot start after all, having waited for a slot.
    """

    __slots__ = (
        "abandoned",
        "asked",
        "completed",
        "kind",
        "logged",
        "on_completed",
        "path",
        "refused",
        "started",
        "task",
        "waiter",
    )

    def __init__(
        self,
        task: Task,
        path: bytes | None,
        asked: float,
        on_completed: Callable[[], None] | None,
        kind: Kind = "request",
    ) -> None:
        self.task = task
        self.kind = kind
        self.path = path
        self.asked = asked
        self.on_completed = on_completed
        self.started: float | None = None
        self.waiter: Waiter | None = None
        self.refused: DiskError | None = None
        self.abandoned = False
        self.completed = False
        self.logged = False


class _Crew:
    """The threads and slots of this process. Native threads do not survive fork(2): a child makes its own."""

    def __init__(self, hub: HubName, limits: Limits, clock: Callable[[], float], look: Callable[[_Crew], None]) -> None:
        self.process = os.getpid()
        self.hub = hubs.current(hub)
        self.engine = new_engine(limits, self.hub)
        self.alarm = Alarm(self.hub, clock)
        self.slots: Slots[_Visit] = Slots(limits.threads)
        self.health = Health(limits, clock(), progress_of=_progress_of)
        self.monitor = Monitor(self.health, self.hub, clock, partial(look, self))
        self.probes = 0
        self.verdict: tuple[State, str | None] = _WELL
        self.to_close: deque[int] = deque()


_WELL = (State.ONLINE, None)


def _progress_of(visit: _Visit) -> float:
    return visit.task.progress


class Workers:
    """The slots of one disk.

    They belong to the hub (and so to the native thread) that uses them first; a forked child gets slots of its own on
    first use. `run` blocks the calling greenlet; nothing here blocks the hub.

    Attributes:
        on_change: Called with the state and the reason whenever one of them has changed: in the hub, soon after the
            change and not in the middle of it; must not block.
    """

    def __init__(
        self,
        name: str,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
        make_probe: ProbeMaker | None = None,
        hub: HubName = "gevent",
    ) -> None:
        """Prepare; no thread is started before there is work.

        Args:
            name: Name of the disk, for errors.
            limits: Number of slots, length of the queue, idle time of the threads.
            clock: Monotonic time in seconds; another one is for tests.
            make_probe: Makes a task that asks the device whether it answers, and what to call in the hub when it is
                over; None when there is nothing to ask.
            hub: Whose greenlets wait.
        """
        self._name = name
        self._hub: HubName = hub
        self._limits = limits
        self._clock = clock
        self._make_probe = make_probe
        self.on_change: OnChange | None = None
        self._crew: _Crew | None = None
        # What happens on a disk that is well makes nothing due any sooner than this: see `Health.next_event`.
        after = limits.offline_after
        self._soonest_event = math.inf if after == math.inf else min(after / 2, limits.idle_probe - after)
        self._closed = False
        self._log = SlowLog(name, limits.slow)
        self.queue_time = Latency()
        self.disk_time = Latency()
        self.recent_disk_time = RecentTimes()

    def run(
        self,
        task: Task,
        ends: float,
        *,
        path: bytes | None = None,
        longest_wait: float = math.inf,
        on_completed: Callable[[], None] | None = None,
    ) -> None:
        """Run a task in a native thread and wait for it until its deadline.

        Args:
            task: What to run.
            ends: The deadline: the time on the workers' clock, in seconds, at which the caller gives up.
            path: The file that it is about, for errors.
            longest_wait: Seconds to wait for a slot at most, where that is less than the deadline allows.
            on_completed: Called once on the hub's thread when the task is over, even when its caller gave up long
                before, and when it could not be started at all; must not block.

        Raises:
            DiskBusy: No slot is free and the queue is full, or every slot is stuck, or no thread can be started.
            DiskOffline: The disk is offline, or was taken offline while the caller waited for a slot.
            DiskTimeout: The deadline passed, in the queue or in the kernel.
            RuntimeError: Called after `close`, in the hub itself, or in another native thread than before.

        Whatever else ends the wait (a timeout of the loop's own, a killed greenlet) passes through; the task is
        abandoned then.
        """
        visit = _Visit(task, path, self._clock(), on_completed)
        try:
            crew = self._crew_here()
            visit.waiter = crew.hub.waiter()
            self._enter(crew, visit, ends, longest_wait)
        except BaseException:
            self._drop(visit)
            raise
        try:
            over = crew.alarm.wait(visit.waiter, ends if visit.started else min(ends, visit.asked + longest_wait))
            if not over and visit.started and self._clock() < ends:  # it was the end of the longest wait for a slot
                over = crew.alarm.wait(visit.waiter, ends)
        except BaseException:
            self._leave(crew, visit)
            raise
        if visit.completed:
            return
        self._leave(crew, visit)
        if visit.refused is not None:
            raise visit.refused
        if visit.started is None:
            raise DiskTimeout(self._name, path, "waited too long for a free slot; nothing was read", started=False)
        self._log_stuck(visit)
        raise DiskTimeout(self._name, path, "missed its deadline: the disk has not answered", started=True)

    @property
    def well(self) -> bool:
        """Whether a call that would cost no time could have been made here and now. Not always, when it could."""
        crew = self._crew
        return (
            crew is not None
            and not self._closed
            and crew.process == os.getpid()
            and crew.hub.here()
            and crew.hub.may_wait()
            and crew.health.well(self._clock())
        )

    def watch(self) -> None:
        """Send a first probe now; the disk is offline until it has answered. Never blocks."""
        crew = self._crew_here()
        crew.health.await_first_answer(self._clock())
        self._look(crew)

    def set_offline(self, reason: str) -> None:
        """Take the disk offline by hand, until `set_online`. Never blocks."""
        crew = self._crew_here()
        crew.health.set_offline(reason, self._clock())
        self._look(crew)

    def set_online(self) -> None:
        """Forget that the disk is offline, whoever said so. Never blocks."""
        crew = self._crew_here()
        now = self._clock()
        crew.health.set_online(now)
        self._expect_next_event(crew, now)

    def root_lost(self, reason: str) -> None:
        """The disk's root directory cannot be opened: take it offline until a probe finds it. Never blocks."""
        crew = self._crew_here()
        crew.health.missing(reason, self._clock())
        self._look(crew)

    def root_found(self) -> None:
        """A probe has found the root. Never blocks."""
        crew = self._crew_here()
        crew.health.found(self._clock())

    def close_descriptor(self, descriptor: int) -> None:
        """Close a descriptor of the disk in a worker as soon as a slot is free: close(2) can hang too.

        Never blocks. The queue's length does not count here: whoever holds a descriptor got it from these workers.

        Args:
            descriptor: Open descriptor; -1 is ignored.
        """
        if descriptor >= 0:
            crew = self._crew_of_process()
            crew.to_close.append(descriptor)
            if crew.hub.here():
                self._close_waiting(crew)
            else:
                crew.hub.soon_from_any_thread(self._close_waiting, crew)

    def close_descriptor_of_finalizer(self, descriptor: int) -> None:
        """The same for finalizers, which run in any thread and in the middle of anything.

        The garbage collector may call one while this very thread holds the lock of the pool's queue, so all that is
        done here is to leave word for the hub.
        """
        crew = self._crew
        if descriptor >= 0 and crew is not None and crew.process == os.getpid():
            crew.to_close.append(descriptor)
            crew.hub.soon_from_any_thread(self._close_waiting, crew)

    def close(self) -> None:
        """Let the threads go: idle ones now, busy ones when their system call has returned. Never waits for them."""
        self._closed = True
        if self._crew is not None and self._crew.process == os.getpid():
            self._dismiss_when_idle(self._crew)

    @property
    def load(self) -> Load:
        """What the workers are doing now."""
        crew = self._crew
        if crew is None or crew.process != os.getpid():
            return Load()
        health, now = crew.health, self._clock()
        return Load(
            state=health.state(now),
            threads=crew.engine.threads,
            in_flight=health.in_flight,
            stuck=health.stuck(now),
            waiting=crew.slots.waiting,
            oldest=health.oldest_age(now),
            accepting=health.admit(now) is None,
            reason=health.reason(now),
            since=now - health.since(now),
            changes=health.changes,
            probes=crew.probes,
            next_probe=None if self._make_probe is None else health.next_probe(now),
        )

    def glance(self) -> tuple[State, bool, int, float]:
        """State, accepting, in flight and waiting together, oldest: what `load` says of these, for less."""
        crew = self._crew
        if crew is None or crew.process != os.getpid():
            return State.ONLINE, True, 0, 0.0
        health, now = crew.health, self._clock()
        outstanding = health.in_flight + crew.slots.waiting
        oldest = health.oldest_age(now) if outstanding else 0.0
        if health.well(now):
            return State.ONLINE, True, outstanding, oldest
        return health.state(now), health.admit(now) is None, outstanding, oldest

    def _crew_of_process(self) -> _Crew:
        if self._crew is None or self._crew.process != os.getpid():
            self._crew = _Crew(self._hub, self._limits, self._clock, self._look)
        return self._crew

    def _crew_here(self) -> _Crew:
        crew = self._crew_of_process()
        if not crew.hub.here():
            raise RuntimeError(
                f"{self._name}: a disk belongs to the native thread that used it first; give this thread its own"
            )
        return crew

    def _enter(self, crew: _Crew, visit: _Visit, ends: float, longest_wait: float) -> None:
        """Start a visit, or put it in line for a slot."""
        now, path = visit.asked, visit.path
        if self._closed:
            raise RuntimeError(f"{self._name}: the disk was closed")
        if not crew.hub.may_wait():
            raise RuntimeError(f"{self._name}: the hub itself must not wait for a disk; spawn a greenlet")
        refusal = crew.health.admit(now)
        if refusal is not None:
            raise self._refuse(refusal, path)
        if ends > now and crew.slots.take():
            try:
                self._start(crew, visit)
            except DiskBusy:
                self._pass_on_slot(crew)
                raise
        elif crew.slots.waiting >= self._limits.queue:
            raise DiskBusy(
                self._name,
                path,
                f"all {self._limits.threads} slots are taken and {crew.slots.waiting} reads wait for one already",
            )
        elif min(ends - now, longest_wait) > 0:
            crew.slots.wait(visit)
        else:
            raise DiskTimeout(self._name, path, "waited too long for a free slot; nothing was read", started=False)

    def _refuse(self, refusal: Refusal, path: bytes | None) -> DiskOffline | DiskBusy:
        if not refusal.offline:
            return DiskBusy(self._name, path, refusal.reason)
        return DiskOffline(self._name, path, refusal.reason, retry_after=refusal.retry_after)

    def _start(self, crew: _Crew, visit: _Visit) -> None:
        """Hand a visit that holds a slot to the engine. Never blocks.

        Raises:
            DiskBusy: No thread can be started; the slot is the caller's to give back.
        """
        try:
            crew.engine.start(visit.task, partial(self._completed, crew, visit))
        except RuntimeError as error:  # "can't start new thread"
            raise DiskBusy(
                self._name, visit.path, f"{error}: see the limits of the process (ulimit -u, the pids cgroup)"
            ) from error
        visit.started = now = self._clock()
        crew.health.started(visit, now, visit.kind)
        self._expect_next_event(crew, now)

    def _pass_on_slot(self, crew: _Crew) -> None:
        """Give a slot back: to a descriptor that waits for its close, before any reader; then to the first in line."""
        if crew.to_close and self._close_next(crew):
            return
        while (visit := crew.slots.release()) is not None:
            refusal = crew.health.admit(self._clock())
            try:
                if refusal is not None and refusal.offline:  # the verdict came while it waited
                    raise self._refuse(refusal, visit.path)
                self._start(crew, visit)
                return
            except (DiskBusy, DiskOffline) as error:
                self._turn_away(crew, visit, error)

    def _turn_away(self, crew: _Crew, visit: _Visit, error: DiskError) -> None:
        """Tell a caller that what it waited for will not happen: soon, and not in the middle of what is being done."""
        assert visit.waiter is not None
        visit.refused = error
        crew.hub.soon(visit.waiter.switch, False)

    def _empty_line(self, crew: _Crew, now: float) -> None:
        """The disk is offline: nobody waits for it any more."""
        for visit in crew.slots.send_away():
            refusal = crew.health.admit(now)
            assert refusal is not None
            self._turn_away(crew, visit, self._refuse(refusal, visit.path))

    def _completed(self, crew: _Crew, visit: _Visit) -> None:
        """The system call has returned. Runs in the hub; at its end the caller goes on, until it waits again."""
        now = self._clock()
        visit.completed = True
        crew.health.completed(visit, now)
        self._record(visit, now)
        if not crew.health.well(now) and crew.health.state(now) is State.OFFLINE:
            self._empty_line(crew, now)
        if visit.abandoned:
            self._keep_descriptor(crew, visit)
        if visit.on_completed is not None:
            visit.on_completed()
        self._pass_on_slot(crew)
        self._expect_next_event(crew, now)
        if self._closed:
            self._dismiss_when_idle(crew)
        if visit.waiter is not None:
            visit.waiter.switch(True)

    def _leave(self, crew: _Crew, visit: _Visit) -> None:
        """The caller has given up, wherever its visit is."""
        if visit.started is None:
            crew.slots.leave(visit)
            self._drop(visit)
        else:
            self._abandon(crew, visit)

    def _abandon(self, crew: _Crew, visit: _Visit) -> None:
        """The caller has given up. What the task opened it closes by itself; if it is over already, we do."""
        visit.abandoned = True
        visit.task.abandon()
        if visit.completed:
            self._keep_descriptor(crew, visit)
            self._close_waiting(crew)
        else:
            crew.health.abandoned(visit, visit.asked, self._clock())

    def _drop(self, visit: _Visit) -> None:
        """The visit could not be started."""
        visit.task.abandon()
        try:
            descriptor = visit.task.take_descriptor()
        except RuntimeError:
            # An idle thread had just left, gevent's pool failed to start another with the task in its line already,
            # and a third one is at it. Being abandoned, the task closes what it has by itself.
            descriptor = -1
        if visit.on_completed is not None:
            visit.on_completed()
        self.close_descriptor(descriptor)
        crew = self._crew_of_process()
        if crew.hub.here():
            self._dismiss_when_idle(crew)

    def _keep_descriptor(self, crew: _Crew, visit: _Visit) -> None:
        descriptor = visit.task.take_descriptor()
        if descriptor >= 0:
            crew.to_close.append(descriptor)

    def _close_waiting(self, crew: _Crew) -> None:
        """Start to close what waits for it, as far as there are free slots."""
        while crew.to_close and crew.slots.take():
            if not self._close_next(crew):
                crew.slots.release()  # nobody waits for it, or there would have been none to take
                return

    def _close_next(self, crew: _Crew) -> bool:
        """Close the next descriptor in a slot that the caller holds, and keeps if this returns False."""
        closing = _Visit(Job(descriptor=crew.to_close.popleft()), None, self._clock(), None, "close")
        closing.abandoned = True  # nobody waits for it
        try:
            self._start(crew, closing)
            crew.health.abandoned(closing, closing.asked, closing.asked)
        except DiskBusy:  # no thread to be had: it stays in line until the next slot becomes free
            self._keep_descriptor(crew, closing)
            return False
        return True

    def _dismiss_when_idle(self, crew: _Crew) -> None:
        if self._closed and crew.slots.unused and not crew.to_close:
            crew.engine.dismiss()
            crew.monitor.stop()

    def _look(self, crew: _Crew) -> None:
        """See what time has brought. Runs in the hub, or on behalf of a caller."""
        if crew.process != os.getpid():
            crew.monitor.stop()  # a forked child has inherited the timer of its parent's crew
            return
        now = self._clock()
        if crew.health.state(now) is State.OFFLINE:
            self._empty_line(crew, now)
        if crew.health.probe_due(now):
            self._send_probe(crew, now)
        self._expect_next_event(crew, now)

    def _expect_next_event(self, crew: _Crew, now: float) -> None:
        """After every event: see whether it has changed the verdict, and when time may."""
        health = crew.health
        if health.well(now) and crew.verdict is _WELL and crew.monitor.due <= now + self._soonest_event:
            return  # as nearly always, there is nothing to see
        verdict = health.state(now), health.reason(now)
        if verdict != crew.verdict:
            crew.verdict = _WELL if verdict == _WELL else verdict
            if verdict == _WELL:
                self.recent_disk_time.forget()  # those of the hang that is over say nothing of what comes
            if self.on_change is not None:
                crew.hub.soon(self.on_change, *verdict)
        crew.monitor.expect(health.next_event(now))

    def _send_probe(self, crew: _Crew, now: float) -> None:
        """Ask the device, in a slot like any other operation: one that hangs holds this slot, and no second is sent."""
        if self._closed or self._make_probe is None or not crew.slots.take():
            crew.health.postpone_probe(now)
            return
        task, on_completed = self._make_probe()
        probe = _Visit(task, None, now, on_completed, "probe")
        probe.abandoned = True  # no greenlet waits for it
        try:
            self._start(crew, probe)
        except DiskBusy:
            crew.slots.release()  # nobody waits for it, or there would have been none to take
            crew.health.postpone_probe(now)
        else:
            crew.probes += 1

    def _record(self, visit: _Visit, now: float) -> None:
        """Count and log how long an operation took."""
        if visit.kind == "request":
            assert visit.started is not None
            queue, disk = visit.started - visit.asked, visit.task.seconds
            self.queue_time.record(queue)
            self.disk_time.record(disk)
            self.recent_disk_time.record(disk, now)
            self._log.finished(visit.path, visit.task.count, queue, disk, stuck=visit.logged, now=now)

    def _log_stuck(self, visit: _Visit) -> None:
        now = self._clock()
        assert visit.started is not None
        visit.logged = True
        self._log.stuck(visit.path, visit.task.size, visit.started - visit.asked, now - visit.started, now=now)
