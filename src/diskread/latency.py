"""How long things took, counted in buckets."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field

BOUNDS = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)
"""Upper bounds of the buckets in seconds; a last one has no bound."""


@dataclass
class Latency:
    """A histogram of times.

    Attributes:
        buckets: How many times fell into each bucket of `BOUNDS`, and beyond the last.
        total: Their sum in seconds.
    """

    buckets: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    total: float = 0.0

    def record(self, seconds: float) -> None:
        """Count a time."""
        self.buckets[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds

    @property
    def count(self) -> int:
        """How many times were counted."""
        return sum(self.buckets)

    def copy(self) -> Latency:
        """The histogram as it is now."""
        return Latency(list(self.buckets), self.total)

    def since(self, earlier: Latency) -> Latency:
        """What was counted after `earlier`, a copy of this histogram.

        Where the counts went down this is another histogram of the same name: all of it is new then.
        """
        buckets = [now - before for now, before in zip(self.buckets, earlier.buckets, strict=True)]
        if min(buckets) < 0:
            return self.copy()
        return Latency(buckets, self.total - earlier.total)

    def quantile(self, share: float) -> float | None:
        """The time within which `share` of all ended, such as 0.99; estimated as Prometheus' histogram_quantile does.

        Times are taken to be spread evenly over their bucket; of those beyond the last bound it is only known that
        they are, so the bound is the answer.

        Args:
            share: More than 0, at most 1.

        Returns:
            Seconds; None when nothing was counted.
        """
        count = self.count
        if not count:
            return None
        rank, below = share * count, 0
        for index, inside in enumerate(self.buckets[:-1]):
            if below + inside >= rank:
                lower = BOUNDS[index - 1] if index else 0.0
                return lower + (BOUNDS[index] - lower) * (rank - below) / inside
            below += inside
        return BOUNDS[-1]


class RecentTimes:
    """What the last few reads took, those of the last half minute. Pure: the time is passed in."""

    MOST = 256
    SECONDS = 30.0
    LAST = 15
    REFRESH = 0.1

    def __init__(self) -> None:
        """Start with none."""
        self._times: deque[tuple[float, float]] = deque(maxlen=self.MOST)
        self._sorted: list[float] = []
        self._usual: float | None = None
        self._known_until = -math.inf

    def record(self, seconds: float, now: float) -> None:
        """Note a time."""
        self._times.append((now, seconds))

    def forget(self) -> None:
        """What was says nothing about what will be."""
        self._times.clear()
        self._known_until = -math.inf

    def usual(self, now: float) -> float | None:
        """The median of the last few in seconds, as of a tenth of a second ago at worst; None when none is known.

        Of few, so that it soon tells when a disk has become slow, and when it is quick again.
        """
        self._bring_up_to_date(now)
        return self._usual

    def percentile(self, percent: float, now: float, *, least: int = 1) -> float | None:
        """A percentile of all in seconds, likewise; None when fewer than `least` are known."""
        self._bring_up_to_date(now)
        count = len(self._sorted)
        return None if count < least else self._sorted[min(count - 1, int(count * percent / 100))]

    def _bring_up_to_date(self, now: float) -> None:
        if now >= self._known_until:
            since = now - self.SECONDS
            recent = [seconds for when, seconds in self._times if when >= since]
            last = sorted(recent[-self.LAST :])
            self._usual = last[len(last) // 2] if last else None
            self._sorted = sorted(recent)
            self._known_until = now + self.REFRESH
