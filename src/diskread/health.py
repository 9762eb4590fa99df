"""The verdict on a disk. Pure: events and the time go in, the verdict comes out; no I/O, no clock, no gevent."""

from __future__ import annotations

from enum import Enum


class State(str, Enum):
    """What is known of a disk."""

    ONLINE = "online"
    SUSPECT = "suspect"
    """At least one read has missed its deadline and is still inside the kernel."""


class Health:
    """Counts what is inside the kernel, and refuses more when nothing can come of it.

    Every operation that takes a slot is reported with `started` and, when its system call has returned, with
    `completed`; between the two it may be `abandoned` by its caller. Times are seconds on one monotonic clock.
    """

    def __init__(self, threads: int) -> None:
        """Start with a disk of which nothing is known.

        Args:
            threads: Number of slots.
        """
        self._threads = threads
        self._in_flight: dict[object, float] = {}
        self._stuck: set[object] = set()

    def started(self, operation: object, now: float) -> None:
        """An operation got a slot and goes into the kernel."""
        self._in_flight[operation] = now

    def abandoned(self, operation: object) -> None:
        """The caller of an operation has given up; the operation itself is still in the kernel."""
        if operation in self._in_flight:
            self._stuck.add(operation)

    def completed(self, operation: object) -> None:
        """The system call of an operation returned, with whatever result."""
        del self._in_flight[operation]
        self._stuck.discard(operation)

    @property
    def in_flight(self) -> int:
        """Operations inside the kernel."""
        return len(self._in_flight)

    @property
    def stuck(self) -> int:
        """Operations inside the kernel that nobody waits for any more."""
        return len(self._stuck)

    def oldest_age(self, now: float) -> float:
        """Seconds that the oldest operation has been inside the kernel; 0.0 when there is none."""
        # Insertion order is order of time: the first entry is the oldest.
        return max(0.0, now - next(iter(self._in_flight.values()), now))

    @property
    def state(self) -> State:
        """The verdict."""
        return State.SUSPECT if self._stuck else State.ONLINE

    def why_refused(self) -> str | None:
        """Why a new operation has no chance, or None when it has one.

        When every slot holds an operation that its own caller has given up, whoever queues now waits for a disk that
        has not answered anybody for a whole deadline. It is told so at once instead. The first slot that comes back
        ends it.
        """
        if len(self._stuck) < self._threads:
            return None
        slots = "its only slot holds" if self._threads == 1 else f"all {self._threads} slots hold"
        return f"{slots} reads that missed their deadline and have not returned yet"
