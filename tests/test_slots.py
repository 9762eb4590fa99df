"""Slots: as many as there are, in the order of asking, and none is ever lost."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from diskread.slots import Slots


def test_a_slot_is_taken_and_given_back() -> None:
    slots: Slots[int] = Slots(2)
    states = [slots.unused]
    assert [slots.take(), slots.take(), slots.take()] == [True, True, False]
    states.append(slots.unused)
    assert slots.release() is None
    assert slots.take()
    assert slots.release() is slots.release() is None
    states.append(slots.unused)
    assert states == [True, False, True]


def test_a_free_slot_goes_to_the_one_that_waited_longest() -> None:
    slots: Slots[int] = Slots(1)
    assert slots.take()
    for number in range(5):
        slots.wait(number)
    assert slots.waiting == 5
    assert [slots.release() for _ in range(3)] == [0, 1, 2]
    assert not slots.take(), "a newcomer must not overtake"
    assert not slots.unused
    assert [slots.release() for _ in range(3)] == [3, 4, None]
    assert slots.unused


def test_who_leaves_the_line_gets_no_slot() -> None:
    slots: Slots[int] = Slots(1)
    assert slots.take()
    for number in range(3):
        slots.wait(number)
    slots.leave(1)
    slots.leave(1)
    assert slots.waiting == 2
    assert [slots.release() for _ in range(3)] == [0, 2, None]


def test_those_who_wait_can_be_sent_away() -> None:
    slots: Slots[int] = Slots(2)
    assert [slots.take(), slots.take()] == [True, True]
    assert slots.send_away() == []
    for number in range(3):
        slots.wait(number)
    assert slots.send_away() == [0, 1, 2]
    assert slots.waiting == 0
    assert slots.release() is None
    assert slots.take(), "nobody waits for it any more"


@settings(deadline=None, database=None)
@given(
    count=st.integers(1, 3),
    events=st.lists(st.sampled_from(["ask", "release", "leave", "send away"]), max_size=60),
)
def test_none_is_lost_and_none_is_made(count: int, events: list[str]) -> None:
    slots: Slots[int] = Slots(count)
    inside: list[int] = []
    line: list[int] = []
    for number, event in enumerate(events):
        if event == "ask":
            if slots.take():
                inside.append(number)
            else:
                slots.wait(number)
                line.append(number)
        elif event == "release" and inside:
            inside.pop()
            handed = slots.release()
            assert handed == (line.pop(0) if line else None)
            if handed is not None:
                inside.append(handed)
        elif event == "leave" and line:
            slots.leave(line.pop(len(line) // 2))
        elif event == "send away":
            assert slots.send_away() == line
            line.clear()
        assert slots.waiting == len(line)
        assert len(inside) == count if line else len(inside) <= count
        assert slots.unused == (not inside)
