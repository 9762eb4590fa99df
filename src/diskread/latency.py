"""How long things took, counted in buckets."""

from __future__ import annotations

from bisect import bisect_left
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
