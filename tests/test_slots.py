"""Slots: as many as there are, in the order of asking, and none is ever lost."""

from __future__ import annotations

import gevent
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diskread.slots import SentAway, Slots


def test_a_slot_is_taken_and_given_back() -> None:
    slots = Slots(2)
    states = [slots.unused]
    assert [slots.take(), slots.take(), slots.take()] == [True, True, False]
    states.append(slots.unused)
    slots.release()
    assert slots.take()
    slots.release()
    slots.release()
    states.append(slots.unused)
    assert states == [True, False, True]


def test_a_wait_ends_at_its_timeout() -> None:
    slots = Slots(1)
    assert slots.take()
    assert not slots.wait(0.01)
    assert slots.waiting == 0
    slots.release()
    assert slots.wait(None)


def test_a_free_slot_goes_to_the_one_that_waited_longest() -> None:
    slots, order = Slots(1), list[int]()
    assert slots.take()

    def ask(number: int) -> None:
        assert slots.wait(None)
        order.append(number)
        slots.release()

    greenlets = [gevent.spawn(ask, number) for number in range(5)]
    gevent.sleep(0)
    assert slots.waiting == 5
    slots.release()
    assert not slots.take(), "a newcomer must not overtake"
    assert not slots.unused, "the slot is on its way to the first in line"
    gevent.joinall(greenlets, raise_error=True)
    assert order == [0, 1, 2, 3, 4]
    assert slots.unused


def test_a_slot_handed_to_a_greenlet_that_is_killed_goes_to_the_next() -> None:
    slots = Slots(1)
    assert slots.take()
    first, second = gevent.spawn(slots.wait, None), gevent.spawn(slots.wait, 10)
    gevent.sleep(0)
    first.kill(block=False)  # it dies in the next turn of the hub, in which it would have learnt of its slot
    slots.release()
    assert second.get(timeout=10)
    slots.release()
    assert slots.unused


def test_those_who_wait_can_be_sent_away() -> None:
    slots = Slots(2)
    assert [slots.take(), slots.take()] == [True, True]
    slots.send_away()
    greenlets = [gevent.spawn(_wait_or_sent_away, slots) for _ in range(5)]
    gevent.sleep(0)
    slots.send_away()
    assert slots.waiting == 0
    slots.release()
    assert slots.take(), "nobody waits for it any more"
    gevent.joinall(greenlets, timeout=10)
    assert [each.value for each in greenlets] == ["sent away"] * 5
    slots.release()
    slots.release()
    assert slots.unused


def _wait_or_sent_away(slots: Slots) -> bool | str:
    try:
        return slots.wait(60)
    except SentAway:
        return "sent away"


def test_a_slot_that_was_handed_over_is_not_taken_back_by_sending_the_line_away() -> None:
    slots = Slots(1)
    assert slots.take()
    first, second = gevent.spawn(slots.wait, 60), gevent.spawn(_wait_or_sent_away, slots)
    gevent.sleep(0)
    slots.release()
    slots.send_away()
    assert first.get(timeout=10) is True
    assert second.get(timeout=10) == "sent away"
    slots.release()
    assert slots.unused


def test_who_is_killed_and_sent_away_at_once_takes_no_slot() -> None:
    slots = Slots(1)
    assert slots.take()
    waiting = gevent.spawn(slots.wait, 60)
    gevent.sleep(0)
    waiting.kill(block=False)
    slots.send_away()
    waiting.join(timeout=10)
    slots.release()
    assert slots.unused


def test_who_comes_after_the_line_was_sent_away_waits_as_ever() -> None:
    slots = Slots(1)
    assert slots.take()
    slots.send_away()
    with pytest.raises(gevent.Timeout), gevent.Timeout(0.01):
        slots.wait(None)
    assert slots.waiting == 0


@settings(deadline=None, database=None, max_examples=50)
@given(
    count=st.integers(1, 3),
    events=st.lists(st.sampled_from(["ask", "release", "kill", "send away", "turn"]), max_size=40),
)
def test_none_is_lost_and_none_is_made(count: int, events: list[str]) -> None:
    slots = Slots(count)
    asking: list[gevent.Greenlet[[Slots], bool | str]] = []
    holding = 0

    def settle() -> None:
        nonlocal holding
        gevent.sleep(0)
        gevent.sleep(0)
        for each in list(asking):
            if each.ready():
                asking.remove(each)
                holding += each.value is True

    for event in events:
        if event == "ask":
            asking.append(gevent.spawn(_wait_or_sent_away, slots))
        elif event == "send away":
            slots.send_away()
            assert slots.waiting == 0
        elif event == "release" and holding:
            holding -= 1
            slots.release()
        elif event == "kill" and asking:
            asking.pop(0).kill(block=False)
        else:
            settle()
        assert holding <= count
    for each in asking:
        each.kill(block=False)
    settle()
    # Whoever was killed after it got its slot still holds it: take stock by emptying the rest.
    free = sum(slots.take() for _ in range(count + 1))
    assert free <= count - holding
    assert slots.waiting == 0
