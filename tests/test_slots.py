"""Slots: as many as there are, in the order of asking, and none is ever lost."""

from __future__ import annotations

import gevent
from hypothesis import given, settings
from hypothesis import strategies as st

from diskread.slots import Slots


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


@settings(deadline=None, database=None, max_examples=50)
@given(
    count=st.integers(1, 3),
    events=st.lists(st.sampled_from(["ask", "release", "kill", "turn"]), max_size=40),
)
def test_none_is_lost_and_none_is_made(count: int, events: list[str]) -> None:
    slots = Slots(count)
    asking: list[gevent.Greenlet[[float | None], bool]] = []
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
            asking.append(gevent.spawn(slots.wait, None))
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
