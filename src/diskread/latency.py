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
