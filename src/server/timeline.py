"""The last minutes of each disk, second by second. Pure: time and status are passed in, nothing is asked for."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from diskread import DiskStatus
    from diskread.latency import Latency

LENGTH = 300
"""Samples that are kept: five minutes of one each second."""

RECENT = 60
"""Samples over which `Percentiles` of now are taken."""


class Percentiles(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """How long operations that ended in some time had taken, in seconds; None when none ended."""

    queue_p50: float | None = None
    queue_p99: float | None = None
    disk_p50: float | None = None
    disk_p99: float | None = None


class Point(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A disk at one sample. In JSON it is an array in this order, because there are many of them.

    Attributes:
        state: Its state at that moment.
        reads: Reads per second since the sample before, inline ones included.
        oldest: Age in seconds of the oldest operation in the kernel; 0 when there is none.
        queue_p50: Half of what ended since the sample before had waited at most so long for a slot, in seconds.
        queue_p99: So long had 99 % of it.
        disk_p50: Half of it was inside the kernel for at most so long, in seconds.
        disk_p99: And 99 % of it.
    """

    state: str
    reads: float
    oldest: float
    queue_p50: float | None
    queue_p99: float | None
    disk_p50: float | None
    disk_p99: float | None


class Sample(msgspec.Struct, frozen=True):
    """All disks at one moment.

    Attributes:
        at: The time, in seconds on the clock that the timeline is told.
        disks: The disks there were, by name.
    """

    at: float
    disks: dict[str, Point]


class Timeline:
    """A ring of samples: it takes the same memory after a year as after its length."""

    def __init__(self, length: int = LENGTH, recent: int = RECENT) -> None:
        """Begin with no sample.

        Args:
            length: Samples that are kept.
            recent: Samples over which `recent` looks back.
        """
        self._samples: deque[Sample] = deque(maxlen=length)
        # For differences: with the sample before, and with the one at the beginning of `recent`.
        self._before: deque[tuple[float, dict[str, _Counts]]] = deque(maxlen=recent)
        self.recent: dict[str, Percentiles] = {}
        """By disk: what ended in the last `recent` samples, the last one included."""

    @property
    def samples(self) -> list[Sample]:
        """The samples, the oldest first."""
        return list(self._samples)

    def record(self, at: float, disks: Iterable[DiskStatus]) -> Sample:
        """Add a sample.

        Args:
            at: The time, in seconds; later than that of the last sample.
            disks: The disks at that time. One that was not there before counts from here on.

        Returns:
            The sample.
        """
        disks = list(disks)
        now = {disk.name: _Counts(disk.counts.reads, disk.queue_time, disk.disk_time) for disk in disks}
        last_at, last = self._before[-1] if self._before else (at, {})
        first = self._before[0][1] if self._before else {}
        sample = Sample(at, {disk.name: _point(disk, now[disk.name], last, at - last_at) for disk in disks})
        self.recent = {name: _percentiles(counts, first.get(name, counts)) for name, counts in now.items()}
        self._before.append((at, now))
        self._samples.append(sample)
        return sample


class _Counts(NamedTuple):
    """What only ever grows."""

    reads: int
    queue: Latency
    disk: Latency


def _point(disk: DiskStatus, now: _Counts, last: dict[str, _Counts], seconds: float) -> Point:
    before = last.get(disk.name, now)
    reads = now.reads - before.reads
    if reads < 0:  # another disk with the same name
        reads = now.reads
    times = _percentiles(now, before)
    return Point(
        disk.load.state.value,
        round(reads / seconds, 2) if seconds > 0 else 0.0,
        round(disk.load.oldest, 3),
        times.queue_p50,
        times.queue_p99,
        times.disk_p50,
        times.disk_p99,
    )


def _percentiles(now: _Counts, before: _Counts) -> Percentiles:
    queue, disk = now.queue.since(before.queue), now.disk.since(before.disk)
    return Percentiles(_quantile(queue, 0.5), _quantile(queue, 0.99), _quantile(disk, 0.5), _quantile(disk, 0.99))


def _quantile(times: Latency, share: float) -> float | None:
    seconds = times.quantile(share)
    return None if seconds is None else round(seconds, 6)
