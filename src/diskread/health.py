"""The verdict on a disk. Pure: events and the time go in, the verdict comes out; no I/O, no clock, no gevent.

A disk is OFFLINE when it makes no progress: an operation has been inside the kernel for `offline_after` seconds, and
in that time none has completed, nor a part of one. Slow is not stuck: a disk that completes operations, however slowly,
stays ONLINE, and so does one that is in the middle of large reads and brings piece after piece. An operation that
fails has completed, too: the disk has answered. Only a close that returns proves nothing: close(2)
seldom reaches the device (never on ext4 and xfs: clients that leave a dead disk must not make it look alive).

    ONLINE <-> SUSPECT      an operation is stuck: it has had the disk's deadline, and its caller has given up
    any -> OFFLINE          no progress; or the root is not there; or by hand
    OFFLINE -> HALF_OPEN    something completed: the probe, or an operation that was stuck
    HALF_OPEN -> ONLINE     the one request that was let through completed (or the next probe did)
    HALF_OPEN -> OFFLINE    no progress
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    from .limits import Limits

Kind = Literal["request", "probe", "close"]


class State(str, Enum):
    """What is known of a disk."""

    ONLINE = "online"
    SUSPECT = "suspect"
    """At least one operation is stuck: it has missed its deadline and is still inside the kernel."""
    OFFLINE = "offline"
    """It makes no progress, or its root is not there, or somebody said so. Reads are refused at once."""
    HALF_OPEN = "half-open"
    """It has answered again: one request at a time may try."""


@dataclass(frozen=True)
class Refusal:
    """Why an operation is refused.

    Attributes:
        offline: Whether the disk is offline; else it is busy.
        reason: In words.
        retry_after: Seconds after which a new attempt makes sense; None when nobody knows.
    """

    offline: bool
    reason: str
    retry_after: float | None


class Health:
    """The state machine of one disk.

    Every operation that takes a slot is reported with `started` and, when its system call has returned, with
    `completed`; between the two it may be `abandoned` by its caller. Times are seconds on one monotonic clock, and
    never go backwards. Nothing happens by itself: each method brings the verdict up to date with the time it is given,
    and `next_event` says when that is worth doing next.
    """

    def __init__(
        self,
        limits: Limits,
        now: float,
        jitter: Callable[[], float] = random.random,
        progress_of: Callable[[Any], float] | None = None,
    ) -> None:
        """Start with a disk of which nothing bad is known.

        Args:
            limits: Number of slots, deadline, and when to probe.
            now: The time.
            jitter: A random number from 0 to 1; another one is for tests.
            progress_of: When an operation that is in flight last got a part of what it is to bring. Asked only when a
                verdict is near; None when there are no parts.
        """
        self._limits = limits
        self._jitter = jitter
        self._progress_of = progress_of
        # A timer of the event loop may fire a moment early, and a caller's missed deadline is the proof that counts.
        self._patience = limits.deadline * 0.95
        self._in_flight: dict[object, float] = {}
        self._abandoned: dict[object, float] = {}
        self._closing: set[object] = set()
        self._progress = now
        self._reason: str | None = None
        self._missing = False
        self._awaited = False
        self._by_hand = False
        self._half_open = False
        self._trial: object | None = None
        self._probe: object | None = None
        self._interval = limits.probe_interval
        self._next_probe = now
        self._since = now
        self._state = State.ONLINE
        self._well_until = -math.inf
        self.changes = 0

    # -- events ------------------------------------------------------------------------------------------------------

    def started(self, operation: object, now: float, kind: Kind = "request") -> None:
        """An operation got a slot and goes into the kernel."""
        self._in_flight[operation] = now
        if kind == "probe":
            self._probe = operation
            if self._reason is not None:
                self._schedule_probe(now)
        elif kind == "close":
            self._closing.add(operation)
        elif self._half_open and self._trial is None:
            self._trial = operation
        self._update(now)

    def abandoned(self, operation: object, asked: float, now: float) -> None:
        """The caller of an operation has given up; the operation itself is still in the kernel.

        Args:
            operation: Which one.
            asked: When the caller asked for it.
            now: The time.
        """
        if operation in self._in_flight:
            self._well_until = -math.inf
            self._abandoned[operation] = asked
            self._update(now)

    def completed(self, operation: object, now: float) -> None:
        """The system call of an operation returned, with whatever result: the disk has answered."""
        self._update(now)  # the time before this moment is judged without it
        del self._in_flight[operation]
        self._abandoned.pop(operation, None)
        if operation in self._closing:
            self._closing.remove(operation)
        else:
            self._progress = now
            if self._reason is None:
                if operation in (self._trial, self._probe):
                    self._half_open = False
            elif not self._missing and not self._by_hand:
                self._admit_again(now, half_open=True)
        self._trial = None if operation == self._trial else self._trial
        self._probe = None if operation == self._probe else self._probe
        self._update(now)

    def await_first_answer(self, now: float) -> None:
        """Nothing is known of the disk yet: OFFLINE until it answers a first probe, then ONLINE without a trial."""
        if not self._by_hand:
            self._refuse("it has not answered yet", now)
            self._missing = self._awaited = True
            self._update(now)

    def missing(self, reason: str, now: float) -> None:
        """The root is not there, or not the one that it was. Only `found` (or a hand) ends that."""
        if not self._by_hand:
            if self._reason is None:
                self._refuse(reason, now)
                self._schedule_probe(now)
            self._reason, self._missing = reason, True
            self._update(now)

    def found(self, now: float) -> None:
        """The root is there (again)."""
        if self._missing:
            self._admit_again(now, half_open=not self._awaited)
            self._update(now)

    def set_offline(self, reason: str, now: float) -> None:
        """By hand. Wins over everything until `set_online`; there are no probes meanwhile."""
        self._refuse(reason, now)
        self._by_hand, self._missing, self._awaited = True, False, False
        self._update(now)

    def set_online(self, now: float) -> None:
        """By hand: forget that the disk is OFFLINE, whoever said so, and let one request try."""
        self._update(now)
        if self._reason is not None:
            self._admit_again(now, half_open=True)
            self._progress = now
            self._update(now)

    # -- verdict -----------------------------------------------------------------------------------------------------

    def well(self, now: float) -> bool:
        """Whether the disk is ONLINE and nobody has any reason to doubt it: the common case, and cheap to ask."""
        return now < self._well_until

    def state(self, now: float) -> State:
        """The verdict."""
        self._update(now)
        return self._state

    def since(self, now: float) -> float:
        """When the verdict last changed."""
        self._update(now)
        return self._since

    def reason(self, now: float) -> str | None:
        """Why the disk is OFFLINE; None when it is not."""
        self._update(now)
        return self._reason

    def admit(self, now: float) -> Refusal | None:
        """Whether a new request may go to the disk: None, or why not. Always at once."""
        if now < self._well_until:
            return None
        self._update(now)
        if self._reason is not None:
            text = f"offline for {now - self._since:.0f} s: {self._reason}"
            if self._by_hand:
                return Refusal(True, text, None)
            if self._probe is not None:
                return Refusal(True, f"{text}; a probe is under way", self._limits.probe_interval)
            wait = max(0.0, self._next_probe - now)
            return Refusal(True, f"{text}; next probe in {wait:.1f} s", wait)
        if self._half_open and (self._trial is not None or len(self._in_flight) >= self._limits.threads):
            return Refusal(True, "coming back: one request at a time may try", self._limits.probe_interval)
        threads = self._limits.threads
        if self.stuck(now) >= threads:
            slots = "its only slot holds" if threads == 1 else f"all {threads} slots hold"
            return Refusal(False, f"{slots} reads that missed their deadline and have not returned yet", None)
        return None

    def probe_due(self, now: float) -> bool:
        """Whether to ask the device now: never two probes at a time, none while a hand holds the disk offline."""
        self._update(now)
        return self._probe is None and now >= self._probe_time()

    def next_event(self, now: float) -> float:
        """The time at which the disk goes OFFLINE, or a probe falls due, if nothing else happens; `math.inf`: never.

        In the past only when a probe is due; whoever can send none then says so with `postpone_probe`.
        """
        self._update(now)
        verdict = self._stalled_at() if self._reason is None else math.inf
        probe = self._probe_time() if self._probe is None else math.inf
        return min(verdict, probe)

    def next_probe(self, now: float) -> float | None:
        """Seconds until the next probe; 0.0 while one is under way, None when none will be sent."""
        self._update(now)
        if self._probe is not None:
            return 0.0
        due = self._probe_time()
        return None if due == math.inf else max(0.0, due - now)

    def postpone_probe(self, now: float) -> None:
        """The probe that was due could not be sent: no slot is free. Try again after the next interval."""
        self._schedule_probe(now)

    # -- numbers -----------------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Operations inside the kernel."""
        return len(self._in_flight)

    def stuck(self, now: float) -> int:
        """Operations inside the kernel that nobody waits for any more, and that have had their time."""
        return sum(now - asked >= self._patience for asked in self._abandoned.values())

    def oldest_age(self, now: float) -> float:
        """Seconds that the oldest operation has been inside the kernel; 0.0 when there is none."""
        # Insertion order is order of time: the first entry is the oldest.
        return max(0.0, now - next(iter(self._in_flight.values()), now))

    # -- how it is done ----------------------------------------------------------------------------------------------

    def _stalled_at(self) -> float:
        """When the disk is OFFLINE for lack of progress, if nothing completes before."""
        if not self._in_flight:
            return math.inf
        return max(next(iter(self._in_flight.values())), self._progress) + self._limits.offline_after

    def _note_partial_progress(self, now: float) -> None:
        """Half of the time is over: see whether an operation that is in flight has got a part meanwhile."""
        if self._progress_of is not None and now >= self._stalled_at() - self._limits.offline_after / 2:
            latest = max(map(self._progress_of, self._in_flight), default=-math.inf)
            self._progress = max(self._progress, min(latest, now))

    def _update(self, now: float) -> None:
        if now < self._well_until:
            return
        if self._reason is None:
            self._note_partial_progress(now)
        if self._reason is None and now >= self._stalled_at():
            self._refuse(f"no operation has completed for {self._limits.offline_after:g} s", now)
        if self._reason is not None:
            state = State.OFFLINE
        elif self._half_open:
            state = State.HALF_OPEN
        else:
            state = State.SUSPECT if self.stuck(now) else State.ONLINE
        if state is not self._state:
            self._state, self._since = state, now
            self.changes += 1
        if state is State.ONLINE and not self._abandoned:
            # Until half of `offline_after` has passed without progress, time changes nothing. What starts or completes
            # meanwhile can only put that off; whatever can bring a change about ends this (`abandoned`, `_refuse`).
            half = self._limits.offline_after / 2
            self._well_until = math.inf if half == math.inf else min(self._stalled_at() - half, now + half)

    def _probe_time(self) -> float:
        if self._by_hand:
            return math.inf
        if self._reason is not None:
            return self._next_probe
        if self._limits.offline_after == math.inf:
            return math.inf  # nobody wants a verdict
        if self._in_flight:
            # Half of the time is over: is it the disk that hangs, or only what was asked of it?
            due = self._stalled_at() - self._limits.offline_after / 2
        else:
            due = self._progress + self._limits.idle_probe - self._limits.offline_after
        return max(due, self._next_probe)

    def _schedule_probe(self, now: float) -> None:
        self._next_probe = now + self._interval * (1 - self._jitter() / 4)
        self._interval = min(self._interval * 2, self._limits.probe_interval_max)

    def _refuse(self, reason: str, now: float) -> None:
        """Go OFFLINE, and send the first probe at once."""
        self._well_until = -math.inf
        self._reason, self._half_open, self._trial = reason, False, None
        self._interval, self._next_probe = self._limits.probe_interval, now

    def _admit_again(self, now: float, *, half_open: bool) -> None:
        """Leave OFFLINE."""
        self._well_until = -math.inf
        self._reason, self._half_open, self._trial = None, half_open, None
        self._missing = self._awaited = self._by_hand = False
        self._interval, self._next_probe = self._limits.probe_interval, now
