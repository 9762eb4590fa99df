"""The monitor: looks when it is time, holds nothing alive, and stops."""

from __future__ import annotations

import gc
import math
import time
import weakref
from typing import TYPE_CHECKING, cast

import gevent
import pytest

from diskread.health import Health, State
from diskread.hubs.gevent import current
from diskread.limits import Limits
from diskread.monitor import Monitor

from .conftest import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .conftest import RunScript

    Watch = Callable[["Schedule"], tuple[Monitor, "Looks"]]


class Schedule:
    """Stands for a Health: says when the next event is."""

    def __init__(self, event: float = math.inf) -> None:
        self.event = event

    def next_event(self, _now: float) -> float:
        return self.event


class Looks:
    """Notes when somebody looked, and does what a test wants done then."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.action: Callable[[], None] = lambda: None

    def __call__(self) -> None:
        self.times.append(time.monotonic())
        self.action()


@pytest.fixture
def watch() -> Iterator[Watch]:
    monitors = []

    def make(schedule: Schedule) -> tuple[Monitor, Looks]:
        looks = Looks()
        monitors.append(Monitor(cast("Health", schedule), current(), time.monotonic, looks))
        return monitors[-1], looks

    yield make
    for monitor in monitors:
        monitor.stop()


def test_it_looks_when_the_first_event_is_due(watch: Watch) -> None:
    schedule = Schedule(time.monotonic() + 0.1)
    _, looks = watch(schedule)
    looks.action = lambda: setattr(schedule, "event", math.inf)
    until(lambda: looks.times)
    gevent.sleep(0.05)
    assert len(looks.times) == 1


def test_it_does_not_look_before_the_time(watch: Watch) -> None:
    due = time.monotonic() + 0.2
    _, looks = watch(Schedule(due))
    until(lambda: looks.times)
    assert looks.times[0] >= due - 0.05


def test_nothing_expected_means_no_look(watch: Watch) -> None:
    _, looks = watch(Schedule())
    gevent.sleep(0.1)
    assert looks.times == []


def test_what_is_expected_earlier_is_looked_at_earlier(watch: Watch) -> None:
    schedule = Schedule(time.monotonic() + 3600)
    monitor, looks = watch(schedule)
    monitor.expect(time.monotonic() + 0.05)
    until(lambda: looks.times)


def test_what_is_expected_later_changes_nothing(watch: Watch) -> None:
    monitor, looks = watch(Schedule(time.monotonic() + 0.05))
    monitor.expect(time.monotonic() + 3600)
    monitor.expect(math.inf)
    until(lambda: looks.times)


def test_after_a_look_it_waits_for_the_event_after_it(watch: Watch) -> None:
    schedule = Schedule(time.monotonic() + 0.02)
    _, looks = watch(schedule)
    looks.action = lambda: setattr(schedule, "event", time.monotonic() + 0.02)
    until(lambda: len(looks.times) >= 4)


def test_a_look_may_itself_expect_something(watch: Watch) -> None:
    schedule = Schedule(time.monotonic() + 0.02)
    monitor, looks = watch(schedule)

    def look_again_once() -> None:
        schedule.event = math.inf
        if len(looks.times) == 1:
            monitor.expect(time.monotonic() + 0.02)

    looks.action = look_again_once
    until(lambda: len(looks.times) == 2)
    gevent.sleep(0.05)
    assert len(looks.times) == 2


def test_an_event_in_the_past_does_not_take_up_the_hub(watch: Watch) -> None:
    began = time.monotonic()
    _, looks = watch(Schedule(began - 1000))
    gevent.sleep(0.2)
    assert 1 <= len(looks.times) <= (time.monotonic() - began) / 0.01 + 1


def test_stop_ends_it_for_good(watch: Watch) -> None:
    monitor, looks = watch(Schedule(time.monotonic() + 0.02))
    monitor.stop()
    monitor.stop()
    monitor.expect(time.monotonic())
    gevent.sleep(0.1)
    assert looks.times == []


def test_a_look_may_stop_it(watch: Watch) -> None:
    monitor, looks = watch(Schedule(time.monotonic() + 0.02))
    looks.action = monitor.stop
    until(lambda: looks.times)
    gevent.sleep(0.1)
    assert len(looks.times) == 1


def test_the_loop_does_not_keep_a_forgotten_monitor_alive() -> None:
    looks = Looks()
    monitor = Monitor(cast("Health", Schedule(time.monotonic() + 0.05)), current(), time.monotonic, looks)
    reference = weakref.ref(monitor)
    del monitor
    gc.collect()
    assert reference() is None
    gevent.sleep(0.1)
    assert looks.times == []


def test_a_real_health_is_judged_without_anybody_asking() -> None:
    began = time.monotonic()
    health = Health(Limits(offline_after=0.2, idle_probe=3600), began)
    looks = Looks()
    looks.action = lambda: health.postpone_probe(time.monotonic())  # brings the verdict up to date, as each look does
    health.started("a", began)
    monitor = Monitor(health, current(), time.monotonic, looks)
    until(lambda: looks.times and health.state(looks.times[-1]) is State.OFFLINE)
    monitor.stop()
    assert looks.times[-1] - began >= 0.19  # a look takes its time a moment before the verdict does


def test_a_program_ends_although_disks_are_watched(run_script: RunScript) -> None:
    done = run_script(
        """
import gevent, sys, os
from diskread import Disk, Limits
disk = Disk("d1", os.getcwd(), Limits(idle_probe=60, offline_after=30))
disk.watch()
lost = Disk("d2", "/nonexistent", Limits(idle_probe=60, offline_after=30))
lost.watch()
while disk.status.load.in_flight or lost.status.load.in_flight:
    gevent.sleep(0.01)
print(disk.status.load.state.value, lost.status.load.state.value)
print(gevent.get_hub().join(timeout=20))  # True: the loop has nothing left to wait for
"""
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["online", "offline", "True"]
