"""The last minutes of a disk, on a clock of the test's own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from diskread import Disk, DiskStatus, State
from server.timeline import LENGTH, RECENT, Percentiles, Sample, Timeline

if TYPE_CHECKING:
    from collections.abc import Iterable


@pytest.fixture
def idle() -> DiskStatus:
    """A disk that has done nothing."""
    with Disk("d1", None) as disk:
        return disk.status


def after(status: DiskStatus, *, reads: int = 0, queue: Iterable[float] = (), disk: Iterable[float] = ()) -> DiskStatus:
    """The disk when it has done this, too."""
    counts = replace(status.counts, reads=status.counts.reads + reads)
    times = status.queue_time.copy(), status.disk_time.copy()
    for latency, more in zip(times, (queue, disk), strict=True):
        for seconds in more:
            latency.record(seconds)
    return replace(status, counts=counts, queue_time=times[0], disk_time=times[1])


def test_what_was_before_the_first_sample_does_not_count(idle: DiskStatus) -> None:
    timeline = Timeline()
    busy = after(idle, reads=1000, disk=[1.0] * 1000)
    point = timeline.record(10.0, [busy]).disks["d1"]
    assert (point.reads, point.disk_p50, point.disk_p99) == (0.0, None, None)
    assert timeline.recent == {"d1": Percentiles()}


def test_a_sample_has_what_ended_since_the_one_before(idle: DiskStatus) -> None:
    timeline = Timeline()
    timeline.record(10.0, [after(idle, disk=[50.0])])
    busy = after(idle, reads=30, queue=[0.0001] * 30, disk=[50.0, *[0.002] * 28, 2.0, 2.0])
    point = timeline.record(12.0, [busy]).disks["d1"]
    assert point.reads == 15.0, "per second, and two have passed"
    assert point.queue_p99 is not None
    assert point.queue_p99 <= 0.0001
    assert point.disk_p50 is not None
    assert 0.001 < point.disk_p50 <= 0.0025
    assert point.disk_p99 is not None
    assert 1.0 < point.disk_p99 <= 2.5
    quiet = timeline.record(13.0, [busy]).disks["d1"]
    assert (quiet.reads, quiet.disk_p99, quiet.queue_p50) == (0.0, None, None)


def test_state_and_age_are_those_of_the_moment(idle: DiskStatus) -> None:
    stuck = replace(idle, load=replace(idle.load, state=State.OFFLINE, oldest=12.34567))
    timeline = Timeline()
    points = [timeline.record(float(at), [each]).disks["d1"] for at, each in enumerate([idle, stuck, idle])]
    assert [point.state for point in points] == ["online", "offline", "online"]
    assert [point.oldest for point in points] == [0.0, 12.346, 0.0]


def test_only_the_last_five_minutes_are_kept(idle: DiskStatus) -> None:
    timeline = Timeline()
    for second in range(3 * LENGTH):
        timeline.record(float(second), [idle])
    assert [sample.at for sample in timeline.samples] == [float(each) for each in range(2 * LENGTH, 3 * LENGTH)]


def test_recent_percentiles_forget_what_is_longer_ago(idle: DiskStatus) -> None:
    timeline = Timeline()
    timeline.record(0.0, [idle])
    slow = after(idle, disk=[40.0])
    timeline.record(1.0, [slow])
    seen = []
    for second in range(2, RECENT + 3):
        timeline.record(float(second), [slow])
        seen.append(timeline.recent["d1"].disk_p99)
    assert all(each is not None and each > 30 for each in seen[: RECENT - 2])
    assert seen[-1] is None


def test_disks_come_and_go(idle: DiskStatus) -> None:
    timeline = Timeline()
    other = replace(idle, name="d2")
    timeline.record(0.0, [idle])
    both = timeline.record(1.0, [idle, after(other, reads=7)])
    assert both.disks["d2"].reads == 0.0, "who knows when it did that"
    assert list(timeline.record(2.0, [other]).disks) == ["d2"]
    assert list(timeline.recent) == ["d2"]


def test_another_disk_of_the_same_name_begins_anew(idle: DiskStatus) -> None:
    timeline = Timeline()
    timeline.record(0.0, [after(idle, reads=1000, disk=[0.002] * 1000)])
    point = timeline.record(1.0, [after(idle, reads=5, disk=[2.0] * 5)]).disks["d1"]
    assert point.reads == 5.0
    assert point.disk_p50 is not None
    assert point.disk_p50 > 1.0


def test_no_disks() -> None:
    timeline = Timeline()
    assert timeline.record(0.0, []) == Sample(0.0, {})
