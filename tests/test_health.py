"""Health: counting, ages, and when to refuse."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diskread import State
from diskread.health import Health

DEADLINE = 10.0


def test_nothing_is_known_at_first() -> None:
    health = Health(2, DEADLINE)
    assert (health.in_flight, health.stuck(100.0), health.oldest_age(100.0)) == (0, 0, 0.0)
    assert health.state(100.0) is State.ONLINE
    assert health.why_refused(100.0) is None


def test_the_oldest_operation_gives_the_age() -> None:
    health = Health(3, DEADLINE)
    health.started("a", 10.0)
    health.started("b", 12.0)
    assert health.in_flight == 2
    assert health.oldest_age(15.0) == 5.0
    health.completed("a")
    assert health.oldest_age(15.0) == 3.0
    health.completed("b")
    assert (health.in_flight, health.oldest_age(15.0)) == (0, 0.0)


def test_an_age_is_never_negative() -> None:
    health = Health(1, DEADLINE)
    health.started("a", 10.0)
    assert health.oldest_age(9.0) == 0.0


def test_what_missed_the_deadline_is_stuck_until_it_returns() -> None:
    health = Health(2, DEADLINE)
    health.started("a", 1.0)
    health.abandoned("a", asked=1.0)
    for _ in range(2):
        assert (health.in_flight, health.stuck(11.0), health.state(11.0)) == (1, 1, State.SUSPECT)
        health.abandoned("a", asked=1.0)
    health.completed("a")
    assert (health.in_flight, health.stuck(12.0), health.state(12.0)) == (0, 0, State.ONLINE)


def test_a_caller_that_leaves_early_says_nothing_about_the_disk() -> None:
    health = Health(1, DEADLINE)
    health.started("a", 1.0)
    health.abandoned("a", asked=1.0)
    assert (health.stuck(1.1), health.state(1.1), health.why_refused(1.1)) == (0, State.ONLINE, None)
    assert health.stuck(11.0) == 1, "but the disk has had its time in the end"
    assert health.why_refused(11.0) is not None


def test_time_in_the_queue_counts_against_the_deadline() -> None:
    health = Health(1, DEADLINE)
    health.started("a", 9.0)
    health.abandoned("a", asked=1.0)
    assert health.stuck(11.0) == 1


def test_what_somebody_waits_for_is_not_stuck() -> None:
    health = Health(1, DEADLINE)
    health.started("a", 1.0)
    assert (health.stuck(1000.0), health.why_refused(1000.0)) == (0, None)


def test_what_is_over_cannot_be_abandoned() -> None:
    health = Health(1, DEADLINE)
    health.started("a", 1.0)
    health.completed("a")
    health.abandoned("a", asked=1.0)
    assert (health.stuck(100.0), health.state(100.0)) == (0, State.ONLINE)


@pytest.mark.parametrize(("threads", "says"), [(1, "its only slot holds"), (3, "all 3 slots hold")])
def test_more_is_refused_when_every_slot_is_stuck(threads: int, says: str) -> None:
    health = Health(threads, DEADLINE)
    for operation in range(threads):
        health.started(operation, 1.0)
    for operation in range(threads):
        assert health.why_refused(12.0) is None
        health.abandoned(operation, asked=1.0)
    reason = health.why_refused(12.0)
    assert reason is not None
    assert says in reason
    assert "have not returned" in reason
    health.completed(0)
    assert health.why_refused(12.0) is None


@settings(deadline=None, database=None)
@given(
    threads=st.integers(1, 4),
    events=st.lists(st.tuples(st.sampled_from(["start", "abandon", "complete"]), st.integers(0, 7)), max_size=60),
)
def test_the_counts_are_those_of_a_plain_model(threads: int, events: list[tuple[str, int]]) -> None:
    health = Health(threads, DEADLINE)
    began: dict[int, float] = {}
    given_up: set[int] = set()
    for turn, (event, operation) in enumerate(events):
        now = turn * 3.0
        if event == "start" and operation not in began and len(began) < threads:
            health.started(operation, now)
            began[operation] = now
        elif event == "abandon" and operation in began:
            health.abandoned(operation, asked=began[operation])
            given_up |= {operation} & began.keys()
        elif event == "complete" and operation in began:
            health.completed(operation)
            del began[operation]
            given_up.discard(operation)
        stuck = {each for each in given_up if now - began[each] >= DEADLINE * 0.95}
        assert health.in_flight == len(began)
        assert health.stuck(now) == len(stuck)
        assert health.oldest_age(now) == max((now - start for start in began.values()), default=0.0)
        assert (health.state(now) is State.SUSPECT) == bool(stuck)
        assert (health.why_refused(now) is not None) == (len(stuck) == threads)
