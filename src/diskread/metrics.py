"""Prometheus metrics of disks. Needs prometheus-client; `import diskread` alone does not."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    StateSetMetricFamily,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from .health import State
from .latency import BOUNDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client.core import Metric

    from .disk import DiskStatus
    from .hedging import MirrorCounts
    from .latency import Latency
    from .mirror import MirrorStatus

_GAUGES: dict[str, tuple[str, Callable[[DiskStatus], float]]] = {
    "diskread_slots": ("Slots: reads that may be inside the kernel at a time.", lambda disk: disk.limits.threads),
    "diskread_in_flight": ("Operations inside the kernel.", lambda disk: disk.load.in_flight),
    "diskread_stuck": ("Operations inside the kernel that nobody waits for any more.", lambda disk: disk.load.stuck),
    "diskread_waiting": ("Callers that wait for a slot.", lambda disk: disk.load.waiting),
    "diskread_threads": ("Native threads, idle ones included.", lambda disk: disk.load.threads),
    "diskread_oldest_age_seconds": ("Age of the oldest operation in the kernel.", lambda disk: disk.load.oldest),
    "diskread_inline": ("Whether cached data is read without a thread.", lambda disk: disk.inline.on),
    "diskread_state_age_seconds": ("For how long the state has been what it is.", lambda disk: disk.load.since),
}

_COUNTERS: dict[str, tuple[str, Callable[[DiskStatus], float]]] = {
    "diskread_reads": ("Visits to the disk that brought what they were asked for.", lambda disk: disk.counts.reads),
    "diskread_read_bytes": ("Bytes that were handed to callers.", lambda disk: disk.counts.bytes),
    "diskread_timeouts": ("Reads that missed their deadline.", lambda disk: disk.counts.timeouts),
    "diskread_rejections": ("Reads that were refused at once.", lambda disk: disk.counts.rejections),
    "diskread_probes": ("Probes that were sent.", lambda disk: disk.load.probes),
    "diskread_state_changes": ("Changes of the verdict.", lambda disk: disk.load.changes),
    "diskread_inline_hits": ("Reads that needed no thread: cached.", lambda disk: disk.inline.hits),
    "diskread_inline_partial_hits": ("Reads whose beginning was cached.", lambda disk: disk.inline.partial),
    "diskread_inline_misses": ("Reads that were tried inline in vain.", lambda disk: disk.inline.misses),
    "diskread_abandoned": ("Reads whose caller went away before the end.", lambda disk: disk.counts.abandoned),
}

_HISTOGRAMS: dict[str, tuple[str, Callable[[DiskStatus], Latency]]] = {
    "diskread_queue_seconds": ("How long operations waited for a slot.", lambda disk: disk.queue_time),
    "diskread_disk_seconds": ("How long operations were at the disk.", lambda disk: disk.disk_time),
}


_MIRROR_COUNTERS: dict[str, tuple[str, Callable[[MirrorCounts], float]]] = {
    "diskread_mirror_reads": ("Reads that a mirror was asked for.", lambda counts: counts.reads),
    "diskread_mirror_hedges": (
        "Reads that were sent to another disk because the first was late.",
        lambda counts: counts.hedges,
    ),
    "diskread_mirror_hedges_won": ("Hedges that answered first.", lambda counts: counts.hedges_won),
    "diskread_mirror_hedges_refused": (
        "Late reads that were not hedged: the share was used up.",
        lambda counts: counts.hedges_refused,
    ),
}

# As OpenMetrics wants numbers in labels.
_BOUNDS: list[str] = [floatToGoString(bound) for bound in (*BOUNDS, math.inf)]  # type: ignore[no-untyped-call]


def _cumulative(times: Latency) -> list[tuple[str, float]]:
    """The buckets of a histogram as Prometheus counts them: each contains those before it."""
    return list(zip(_BOUNDS, map(float, accumulate(times.buckets)), strict=True))


def _unit(name: str) -> str:
    """The unit of a metric is the end of its name, says OpenMetrics."""
    unit = name.rpartition("_")[2]
    return unit if unit in ("seconds", "bytes") else ""


class DiskCollector(Collector):
    """Reads the metrics off the disks when they are asked for; never touches a device."""

    def __init__(self, status: Callable[[], Iterable[DiskStatus]]) -> None:
        """Collect from whatever `status` returns at the time, e.g. ``lambda: disks.status``."""
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """Yield one family per metric, labelled with the name of the disk."""
        disks = list(self._status())
        for name, (text, value) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=["disk"], unit=_unit(name))
            for disk in disks:
                gauge.add_metric([disk.name], value(disk))
            yield gauge
        for name, (text, value) in _COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=["disk"], unit=_unit(name))
            for disk in disks:
                counter.add_metric([disk.name], value(disk))
            yield counter
        for name, (text, times) in _HISTOGRAMS.items():
            histogram = HistogramMetricFamily(name, text, labels=["disk"], unit=_unit(name))
            for disk in disks:
                histogram.add_metric([disk.name], _cumulative(times(disk)), times(disk).total)
            yield histogram
        errors = CounterMetricFamily("diskread_errors", "Visits that failed, by errno.", labels=["disk", "errno"])
        fallbacks = CounterMetricFamily(
            "diskread_inline_fallbacks", "Reads that could not be tried inline, by errno.", labels=["disk", "errno"]
        )
        state = StateSetMetricFamily("diskread_state", "The verdict on the disk.", labels=["disk"])
        for disk in disks:
            for code, count in disk.counts.errors.items():
                errors.add_metric([disk.name, code], count)
            for code, count in disk.inline.fallbacks.items():
                fallbacks.add_metric([disk.name, code], count)
            state.add_metric([disk.name], {each.value: disk.load.state is each for each in State})
        yield errors
        yield fallbacks
        yield state


class MirrorCollector(Collector):
    """Reads the metrics off the mirrors when they are asked for; never touches a device."""

    def __init__(self, status: Callable[[], Iterable[MirrorStatus]]) -> None:
        """Collect from whatever `status` returns at the time, e.g. ``lambda: disks.mirror_status``."""
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """Yield one family per metric, labelled with the names of mirror and disk."""
        mirrors = list(self._status())
        for name, (text, value) in _MIRROR_COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=["mirror"])
            for mirror in mirrors:
                counter.add_metric([mirror.name], value(mirror.counts))
            yield counter
        failovers = CounterMetricFamily(
            "diskread_mirror_failovers",
            "Reads that went on to another disk because this one failed.",
            labels=["mirror", "disk"],
        )
        answers = CounterMetricFamily(
            "diskread_mirror_answers", "Reads that this disk answered.", labels=["mirror", "disk"]
        )
        for mirror in mirrors:
            for disk in mirror.disks:
                failovers.add_metric([mirror.name, disk], mirror.counts.failovers[disk])
                answers.add_metric([mirror.name, disk], mirror.counts.answers[disk])
        yield failovers
        yield answers
