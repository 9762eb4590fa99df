"""One timer for all who wait for a disk: most waits end long before their deadlines, and need no timer of their own."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from .hubs import Hub, Timer, Waiter

SHORTEST_WAIT = 0.005
"""Seconds between two rings at the least: bounds what thousands of different deadlines cost. Added to each at most."""


class Alarm:
    """Ends the waits of greenlets at their deadlines. For one hub.

    The timer stands at the earliest deadline that it has heard of. It is left alone when the one who waited for that
    has gone, and set anew when it rings: waits that all last about equally long at most cost no timer at all.
    """

    def __init__(self, hub: Hub, clock: Callable[[], float]) -> None:
        """Nobody waits yet.

        Args:
            hub: The hub whose greenlets wait.
            clock: Monotonic time in seconds, for deadlines.
        """
        self._hub = hub
        self._clock = clock
        self._due = math.inf
        self._timer: Timer | None = None
        self._waits: dict[Waiter, float] = {}

    def wait(self, waiter: Waiter, ends: float) -> bool:
        """Wait until somebody calls `waiter.switch(True)` in the hub, or has called it already. Blocks the greenlet.

        Args:
            waiter: For one wait at a time.
            ends: The deadline, a time on the clock; `math.inf` for none.

        Returns:
            What the waiter was given; False when the deadline has passed.

        What else ends the wait (a timeout of the loop's own, a killed greenlet) passes through.
        """
        if ends == math.inf:
            return waiter.get()
        self._waits[waiter] = ends
        if ends < self._due:
            self._set(ends)
        try:
            return waiter.get()
        finally:
            self._waits.pop(waiter, None)

    def _set(self, due: float) -> None:
        self._stop_timer()
        self._due = due
        # No reference on the loop: what they wait for holds one. Nor does it keep anything alive, like `Monitor`.
        self._timer = self._hub.timer(max(SHORTEST_WAIT, due - self._clock()), _ring, weakref.ref(self))

    def _stop_timer(self) -> None:
        self._due = math.inf
        if self._timer is not None:
            self._timer.stop()
            self._timer = None

    def _ring(self) -> None:
        self._stop_timer()
        now, earliest, over = self._clock(), math.inf, []
        for waiter, ends in self._waits.items():
            if ends <= now:
                over.append(waiter)
            elif ends < earliest:
                earliest = ends
        for waiter in over:
            # Unless it has come to its end by itself meanwhile, in the turn of another one.
            if self._waits.pop(waiter, None) is not None:
                waiter.switch(False)
        if earliest < self._due:
            self._set(earliest)


def _ring(reference: weakref.ref[Alarm]) -> None:
    alarm = reference()
    if alarm is not None:
        alarm._ring()
