"""Prometheus metrics of disks. Needs prometheus-client; `import diskread` alone does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, StateSetMetricFamily
from prometheus_client.registry import Collector

from .health import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client.core import Metric

    from .disk import DiskStatus

_GAUGES: dict[str, tuple[str, Callable[[DiskStatus], float]]] = {
    "diskread_slots": ("Slots: reads that may be inside the kernel at a time.", lambda disk: disk.limits.threads),
    "diskread_in_flight": ("Operations inside the kernel.", lambda disk: disk.load.in_flight),
    "diskread_stuck": ("Operations inside the kernel that nobody waits for any more.", lambda disk: disk.load.stuck),
    "diskread_waiting": ("Callers that wait for a slot.", lambda disk: disk.load.waiting),
    "diskread_threads": ("Native threads, idle ones included.", lambda disk: disk.load.threads),
    "diskread_oldest_age_seconds": ("Age of the oldest operation in the kernel.", lambda disk: disk.load.oldest),
}

_COUNTERS: dict[str, tuple[str, Callable[[DiskStatus], float]]] = {
    "diskread_reads": ("Visits to the disk that brought what they were asked for.", lambda disk: disk.counts.reads),
    "diskread_read_bytes": ("Bytes that were handed to callers.", lambda disk: disk.counts.bytes),
    "diskread_timeouts": ("Reads that missed their deadline.", lambda disk: disk.counts.timeouts),
    "diskread_rejections": ("Reads that were refused at once.", lambda disk: disk.counts.rejections),
    "diskread_probes": ("Probes that were sent.", lambda disk: disk.load.probes),
    "diskread_state_changes": ("Changes of the verdict.", lambda disk: disk.load.changes),
    "diskread_abandoned": ("Reads whose caller went away before the end.", lambda disk: disk.counts.abandoned),
}


class DiskCollector(Collector):
    """Reads the metrics off the disks when they are asked for; never touches a device."""

    def __init__(self, status: Callable[[], Iterable[DiskStatus]]) -> None:
        """Collect from whatever `status` returns at the time, e.g. ``lambda: disks.status``."""
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """Yield one family per metric, labelled with the name of the disk."""
        disks = list(self._status())
        for name, (text, value) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=["disk"])
            for disk in disks:
                gauge.add_metric([disk.name], value(disk))
            yield gauge
        for name, (text, value) in _COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=["disk"])
            for disk in disks:
                counter.add_metric([disk.name], value(disk))
            yield counter
        errors = CounterMetricFamily("diskread_errors", "Visits that failed, by errno.", labels=["disk", "errno"])
        state = StateSetMetricFamily("diskread_state", "The verdict on the disk.", labels=["disk"])
        for disk in disks:
            for code, count in disk.counts.errors.items():
                errors.add_metric([disk.name, code], count)
            state.add_metric([disk.name], {each.value: disk.load.state is each for each in State})
        yield errors
        yield state
