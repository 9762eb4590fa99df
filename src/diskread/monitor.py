"""Watches the health of a disk while nobody else does: speaks the verdict when its time has come, sends probes."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from .health import Health
    from .hubs import Hub, Timer

SHORTEST_WAIT = 0.01
"""Seconds between two looks at the least, whatever the timer's resolution makes of a time that is about to come."""


class Monitor:
    """One timer of the event loop, set to the next time at which the health of a disk may change by itself.

    The timer holds no reference on the loop: a program whose greenlets have all ended is not kept alive by it. Nor does
    the loop, by way of the timer, keep the monitor alive, and with it a disk that nobody uses any more.
    """

    def __init__(self, health: Health, hub: Hub, clock: Callable[[], float], look: Callable[[], None]) -> None:
        """Begin to watch.

        Args:
            health: Whose next event counts.
            hub: The hub that the disk belongs to.
            clock: Monotonic time in seconds.
            look: Called in the hub when it is time for a look; must not block.
        """
        self._health = health
        self._hub = hub
        self._clock = clock
        self._look = look
        self._timer: Timer | None = None
        self._due = math.inf
        self._set(health.next_event(clock()))

    @property
    def due(self) -> float:
        """When the next look is due."""
        return self._due

    def expect(self, time: float) -> None:
        """Something may happen at that time: look then, if no look is due before. Never blocks."""
        if time < self._due:
            self._set(time)

    def stop(self) -> None:
        """End watching."""
        self._due = -math.inf
        self._stop_timer()

    def _set(self, due: float) -> None:
        self._stop_timer()
        self._due = due
        if due != math.inf:
            self._timer = self._hub.timer(max(SHORTEST_WAIT, due - self._clock()), _ring, weakref.ref(self))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.stop()
            self._timer = None

    def _ring(self) -> None:
        self._due = math.inf
        self._look()
        if self._due == math.inf:  # unless the look itself has set or stopped the timer
            self._set(self._health.next_event(self._clock()))


def _ring(reference: weakref.ref[Monitor]) -> None:
    monitor = reference()
    if monitor is not None:
        monitor._ring()
