"""The verdict on a disk. Pure: events and the time go in, the verdict comes out; no I/O, no clock, no gevent."""

from __future__ import annotations

from enum import Enum


class State(str, Enum):
    """What is known of a disk."""

    ONLINE = "online"
    SUSPECT = "suspect"
    """At least one operation is stuck: it has missed its deadline and is still inside the kernel."""


class Health:
    """Counts what is inside the kernel, and refuses more when nothing can come of it.

    Every operation that takes a slot is reported with `started` and, when its system call has returned, with
    `completed`; between the two it may be `abandoned` by its caller. Times are seconds on one monotonic clock.

    An operation is *stuck* when its caller has given up and the disk has had as long for it as the disk's own deadline
    allows. A caller that went away early, or was in a hurry of its own, says nothing about the disk.
    """

    def __init__(self, threads: int, deadline: float) -> None:
        """Start with a disk of which nothing is known.

        Args:
            threads: Number of slots.
            deadline: Seconds that an operation may take, waiting included.
        """
        self._threads = threads
        # A timer of the event loop may fire a moment early, and the last caller's deadline is the first one's proof.
        self._patience = deadline * 0.95
        self._in_flight: dict[object, float] = {}
        self._abandoned: dict[object, float] = {}

    def started(self, operation: object, now: float) -> None:
        """An operation got a slot and goes into the kernel."""
        self._in_flight[operation] = now

    def abandoned(self, operation: object, asked: float) -> None:
        """The caller of an operation has given up; the operation itself is still in the kernel.

        Args:
            operation: Which one.
            asked: When the caller asked for it.
        """
        if operation in self._in_flight:
            self._abandoned[operation] = asked

    def completed(self, operation: object) -> None:
        """The system call of an operation returned, with whatever result."""
        del self._in_flight[operation]
        self._abandoned.pop(operation, None)

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

    def state(self, now: float) -> State:
        """The verdict."""
        return State.SUSPECT if self.stuck(now) else State.ONLINE

    def why_refused(self, now: float) -> str | None:
        """Why a new operation has no chance, or None when it has one.

        When every slot holds an operation that is stuck, whoever queues now waits for a disk that has not answered
        anybody for a whole deadline. It is told so at once instead. The first slot that comes back ends it.
        """
        if self.stuck(now) < self._threads:
            return None
        slots = "its only slot holds" if self._threads == 1 else f"all {self._threads} slots hold"
        return f"{slots} reads that missed their deadline and have not returned yet"
