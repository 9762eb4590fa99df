"""The alarm: waits end when they are over or when their deadlines come, whichever is first, by one timer."""

from __future__ import annotations

import gc
import math
import time
import weakref
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from gevent.hub import Waiter
from hypothesis import given, settings
from hypothesis import strategies as st

from diskread.alarm import Alarm
from diskread.hubs.gevent import current

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def alarm() -> Iterator[Alarm]:
    # As what is waited for does, this keeps the loop running: the alarm's own timer does not.
    with gevent.Timeout(60):
        yield Alarm(current(), time.monotonic)


def new_waiter() -> Waiter[bool]:
    return Waiter(gevent.get_hub())


def test_a_wait_ends_at_its_deadline(alarm: Alarm) -> None:
    ends = time.monotonic() + 0.05
    assert alarm.wait(new_waiter(), ends) is False
    assert time.monotonic() >= ends


def test_a_deadline_that_has_passed(alarm: Alarm) -> None:
    assert alarm.wait(new_waiter(), time.monotonic() - 1) is False


@pytest.mark.parametrize("seconds", [30, math.inf])
def test_a_wait_ends_when_it_is_over(alarm: Alarm, seconds: float) -> None:
    waiter = new_waiter()
    gevent.get_hub().loop.run_callback(waiter.switch, True)
    assert alarm.wait(waiter, time.monotonic() + seconds) is True
    assert not alarm._waits


def test_what_was_over_before_the_wait_began(alarm: Alarm) -> None:
    waiter = new_waiter()
    gevent.get_hub().loop.run_callback(waiter.switch, True)
    gevent.sleep(0)
    assert alarm.wait(waiter, time.monotonic() + 30) is True


def test_a_killed_greenlet_waits_no_more(alarm: Alarm) -> None:
    waiting = gevent.spawn(alarm.wait, new_waiter(), time.monotonic() + 30)
    gevent.sleep(0)
    waiting.kill(timeout=10)
    assert not alarm._waits
    assert alarm.wait(new_waiter(), time.monotonic() + 0.01) is False


def test_a_later_wait_with_an_earlier_deadline(alarm: Alarm) -> None:
    order: list[str] = []

    def wait(name: str, seconds: float) -> None:
        assert alarm.wait(new_waiter(), time.monotonic() + seconds) is False
        order.append(name)

    greenlets = [gevent.spawn(wait, "late", 0.3), gevent.spawn(wait, "early", 0.02), gevent.spawn(wait, "next", 0.15)]
    gevent.joinall(greenlets, timeout=20, raise_error=True)
    assert order == ["early", "next", "late"]


def test_one_that_ends_in_the_turn_of_another(alarm: Alarm) -> None:
    """The first to be woken ends the wait of the second, whose deadline has come as well."""
    ends, second = time.monotonic() + 0.02, new_waiter()

    def first() -> None:
        assert alarm.wait(new_waiter(), ends) is False
        waiting.kill(timeout=10)

    killer = gevent.spawn(first)
    waiting = gevent.spawn(alarm.wait, second, ends)
    killer.get(timeout=20)
    assert waiting.dead
    assert not alarm._waits


def test_waits_of_the_same_length_share_a_timer(alarm: Alarm) -> None:
    for _ in range(100):
        waiter = new_waiter()
        gevent.get_hub().loop.run_callback(waiter.switch, True)
        alarm.wait(waiter, time.monotonic() + 30)
    timer = alarm._timer
    waiter = new_waiter()
    gevent.get_hub().loop.run_callback(waiter.switch, True)
    alarm.wait(waiter, time.monotonic() + 30)
    assert alarm._timer is timer


def test_its_timer_keeps_nothing_alive() -> None:
    alarm = Alarm(current(), time.monotonic)
    waiter = new_waiter()
    gevent.get_hub().loop.run_callback(waiter.switch, True)
    alarm.wait(waiter, time.monotonic() + 0.05)
    reference = weakref.ref(alarm)
    del alarm
    gc.collect()
    assert reference() is None
    gevent.sleep(0.1)  # the timer finds nobody


@settings(deadline=None, database=None, max_examples=30)
@given(
    waits=st.lists(
        st.tuples(st.integers(0, 30), st.one_of(st.none(), st.integers(0, 30)), st.booleans()), min_size=1, max_size=12
    )
)
def test_every_wait_ends_as_it_should(waits: list[tuple[int, int | None, bool]]) -> None:
    """Deadlines, ends and kills in any order (milliseconds): nobody is forgotten, nobody is woken too early."""
    hub, alarm = gevent.get_hub(), Alarm(current(), time.monotonic)
    greenlets: list[gevent.Greenlet[..., Any]] = []
    for deadline, over, killed in waits:
        waiter, ends = new_waiter(), time.monotonic() + deadline / 1000

        def wait(waiter: Waiter[bool] = waiter, ends: float = ends) -> tuple[bool, bool]:
            result = alarm.wait(waiter, ends)
            return result, time.monotonic() >= ends

        greenlets.append(gevent.spawn(wait))
        if over is not None and killed:
            gevent.spawn_later(over / 1000, greenlets[-1].kill, block=False)
        elif over is not None:
            gevent.spawn_later(over / 1000, hub.loop.run_callback, waiter.switch, True)
    gevent.joinall(greenlets, timeout=20)
    for greenlet, (_, over, killed) in zip(greenlets, waits, strict=True):
        assert greenlet.dead
        if isinstance(greenlet.value, gevent.GreenletExit):
            assert killed
            continue
        result, late = greenlet.get()
        assert result or late, "told that the deadline has passed, before it has"
        assert result is False or over is not None
    assert not alarm._waits
