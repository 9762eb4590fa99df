"""The policy of a mirror, on a fake clock."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diskread.health import State
from diskread.hedging import BURST, GUESS, SECOND_OPINION, HedgeBudget, Plan, Policy, View
from diskread.latency import RecentTimes

DEADLINE = 10.0


class Answer(NamedTuple):
    """What a pretended disk will say, and how many seconds after it was asked."""

    kind: str  # "ok", "failed" or "missing"
    seconds: float


class Outcome(NamedTuple):
    what: str
    seconds: float
    asked: dict[str, float]


def carry_out(policy: Policy, answers: dict[str, Answer], now: float = 0.0) -> Outcome:
    """Carry out a plan as `Mirror` does, with disks that answer when they are told to."""
    began, ends = now, now + DEADLINE
    plan, asked, coming = Plan(policy, now, ends), {}, {}
    for _ in range(1000):
        while (name := plan.next(now)) is not None:
            assert name not in asked, "asked twice"
            asked[name] = now - began
            answer = answers[name]
            coming[name] = min(now + answer.seconds, ends)  # each attempt has the deadline of the whole
        if plan.over(now):
            return Outcome("missing" if plan.missing else "failed", now - began, asked)
        assert coming or plan.due < math.inf, "waits for nothing"
        name = min(coming, key=lambda each: coming[each], default=None)
        if name is None or coming[name] > plan.due:
            assert plan.due > now, "turns in circles"
            now = plan.due
            continue
        now = coming.pop(name)
        kind = "failed" if answers[name].seconds >= ends - began - asked[name] else answers[name].kind
        if kind == "ok":
            plan.answered(name)
            return Outcome("ok", now - began, asked)
        if kind == "missing":
            plan.not_found(name, now)
        else:
            plan.failed(name)
    pytest.fail("never comes to an end")


def policy_of(views: dict[str, View], hedge_after: float | str = 0.1, share: float = 0.05) -> Policy:
    return Policy(views, views.__getitem__, hedge_after, share)  # type: ignore[arg-type]


ANSWERS = st.builds(Answer, st.sampled_from(["ok", "failed", "missing"]), st.floats(0, 3 * DEADLINE))
VIEWS = st.builds(
    View,
    state=st.sampled_from(State),
    accepting=st.booleans(),
    outstanding=st.integers(0, 70),
    oldest=st.floats(0, 100),
    usual=st.none() | st.floats(0, 5),
    p95=st.none() | st.floats(0, 20),
)
HEDGE_AFTER = st.floats(0.001, 20) | st.sampled_from(["p95", math.inf])


@settings(max_examples=300)
@given(data=st.data(), hedge_after=HEDGE_AFTER, share=st.floats(0, 1))
def test_whatever_the_disks_do(data: st.DataObject, hedge_after: float | str, share: float) -> None:
    names = ["a", "b", "c"][: data.draw(st.integers(2, 3))]
    views = {name: data.draw(VIEWS) for name in names}
    policy, now = policy_of(views, hedge_after, share), 0.0
    for _ in range(data.draw(st.integers(1, 30))):
        answers = {name: data.draw(ANSWERS) for name in names}
        outcome = carry_out(policy, answers, now)
        now += outcome.seconds + data.draw(st.floats(0, 1))
        assert outcome.seconds <= DEADLINE + 1e-6
        if outcome.what == "failed":
            assert set(outcome.asked) == set(names), "a disk that might have answered was not asked"
        # Whoever is asked late still has a share of the time: a disk that answers within it is enough.
        if all(each.kind != "missing" for each in answers.values()):
            quick = [each for each in answers.values() if each.kind == "ok" and each.seconds < DEADLINE / len(names)]
            assert outcome.what == "ok" or not quick
        counts = policy.counts
        assert counts.hedges <= 1 + share * counts.reads + 1e-6
        assert counts.hedges_won <= counts.hedges
        if share == 0:
            assert not counts.hedges


@settings(max_examples=300)
@given(share=st.floats(0, 1), steps=st.lists(st.booleans(), max_size=300))
def test_a_bucket_gives_no_more_than_the_share_of_any_stretch(share: float, steps: list[bool]) -> None:
    bucket = HedgeBudget(share)
    given_at, earned = [], 0
    for is_read in steps:
        if is_read:
            bucket.earn()
            earned += 1
        elif bucket.take():
            given_at.append(earned)
    assert len(given_at) <= 1 + share * earned + 1e-6
    for first, begin in enumerate(given_at):
        for last, end in enumerate(given_at[first:], first):
            assert last - first + 1 <= BURST + share * (end - begin) + 1e-6


def test_a_late_read_is_hedged_after_the_time_and_the_first_answer_wins() -> None:
    policy = policy_of({"a": View(), "b": View()}, 0.1)
    outcome = carry_out(policy, {"a": Answer("ok", 5.0), "b": Answer("ok", 5.0)})
    assert sorted(outcome.asked.values()) == [0.0, 0.1]
    assert outcome.seconds == 5.0
    assert (policy.counts.hedges, policy.counts.hedges_won) == (1, 0)


def test_a_hedge_that_wins_is_counted() -> None:
    policy = policy_of({"a": View(), "b": View(outstanding=1)}, 0.1)
    outcome = carry_out(policy, {"a": Answer("ok", 5.0), "b": Answer("ok", 1.0)})
    assert outcome == ("ok", 1.1, {"a": 0.0, "b": 0.1})
    assert (policy.counts.hedges, policy.counts.hedges_won) == (1, 1)
    assert policy.counts.answers == {"b": 1}


def test_a_failure_goes_on_at_once_and_costs_no_hedge() -> None:
    policy = policy_of({"a": View(), "b": View(outstanding=1)}, share=0)
    outcome = carry_out(policy, {"a": Answer("failed", 0.01), "b": Answer("ok", 0.01)})
    assert outcome == ("ok", 0.02, {"a": 0.0, "b": 0.01})
    assert policy.counts.failovers == {"a": 1}
    assert policy.counts.hedges == 0


def test_without_a_hedge_the_other_disk_still_gets_half_of_the_time() -> None:
    policy = policy_of({"a": View(), "b": View(outstanding=1)}, share=0)
    outcome = carry_out(policy, {"a": Answer("ok", 60.0), "b": Answer("ok", 1.0)})
    assert outcome == ("ok", DEADLINE / 2 + 1.0, {"a": 0.0, "b": DEADLINE / 2})
    assert policy.counts.hedges_refused == 1
    assert policy.counts.failovers == {"a": 1}


def test_a_disk_that_is_taken_offline_under_way_is_left_without_a_hedge() -> None:
    views = {"a": View(), "b": View(outstanding=1)}
    policy = policy_of(views, share=0)
    plan = Plan(policy, 0.0, DEADLINE)
    assert plan.next(0.0) == "a"
    assert plan.next(0.1) is None
    views["a"] = View(state=State.OFFLINE, accepting=False)
    assert plan.next(plan.due) == "b"
    assert plan.due < 1


def test_no_hedge_goes_to_a_disk_that_is_not_well() -> None:
    policy = policy_of({"a": View(), "b": View(state=State.SUSPECT)}, 0.1, share=1)
    outcome = carry_out(policy, {"a": Answer("ok", 2.0), "b": Answer("ok", 0.0)})
    assert outcome == ("ok", 2.0, {"a": 0.0})


def test_a_hedge_goes_to_a_disk_that_is_late_by_a_moment_only() -> None:
    for oldest, asked in ((0.15, True), (3.0, False)):
        policy = policy_of({"a": View(oldest=0.2), "b": View(oldest=oldest, outstanding=9)}, 0.1, share=1)
        outcome = carry_out(policy, {"a": Answer("ok", 2.0), "b": Answer("ok", 0.0)})
        assert ("b" in outcome.asked, outcome.asked["a"]) == (asked, 0.0)


@pytest.mark.parametrize("other", ["missing", "failed", "ok"])
def test_no_such_file_is_what_all_disks_that_are_well_say(other: str) -> None:
    policy = policy_of({"a": View(), "b": View(outstanding=1)}, 0.1)
    outcome = carry_out(policy, {"a": Answer("missing", 0.01), "b": Answer(other, 0.01)})
    assert outcome == ("ok" if other == "ok" else "missing", 0.02, {"a": 0.0, "b": 0.01})


def test_no_such_file_does_not_wait_for_a_disk_that_is_not_well() -> None:
    for view in (View(accepting=False), View(state=State.HALF_OPEN), View(oldest=SECOND_OPINION + 0.1)):
        policy = policy_of({"a": View(), "b": view}, 0.1)
        assert carry_out(policy, {"a": Answer("missing", 0.01), "b": Answer("ok", 0.0)}) == ("missing", 0.01, {"a": 0})
    policy = policy_of({"a": View(), "b": View(outstanding=1)}, 0.1)
    outcome = carry_out(policy, {"a": Answer("missing", 0.01), "b": Answer("ok", 9)})
    assert outcome.what == "missing"
    assert outcome.seconds == pytest.approx(0.01 + SECOND_OPINION)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (View(), View(accepting=False)),
        (View(), View(state=State.SUSPECT)),
        (View(), View(state=State.HALF_OPEN)),
        (View(), View(oldest=0.2)),
        (View(oldest=0.2), View(oldest=5.0)),
        (View(oldest=0.2, outstanding=40, usual=0.01), View(oldest=5.0, usual=0.01)),
        (View(outstanding=50), View(oldest=0.2)),
        (View(state=State.SUSPECT), View(state=State.OFFLINE, accepting=False)),
        (View(), View(outstanding=1)),
        (View(usual=0.001), View(usual=0.010)),
        (View(usual=0.001, outstanding=3), View(usual=0.010)),
        (View(usual=0.010), View(usual=0.001, outstanding=30)),
        (View(), View(usual=0.001, outstanding=1)),
    ],
)
def test_the_healthier_and_less_loaded_first(better: View, worse: View) -> None:
    for views in ({"x": better, "y": worse}, {"y": worse, "x": better}):
        policy = policy_of(views)
        assert {policy.best(policy.in_turn()) for _ in range(4)} == {"x"}


def test_equals_take_turns() -> None:
    policy = policy_of({"a": View(usual=0.010), "b": View(usual=0.011), "c": View()})
    assert [policy.best(policy.in_turn()) for _ in range(6)] == ["b", "c", "a"] * 2


def test_p95_is_that_of_the_disk_itself() -> None:
    policy = policy_of({"a": View(), "b": View()}, "p95")
    assert policy.delay(View(p95=0.3)) == 0.3
    assert policy.delay(View(p95=0.000_1)) == 0.002
    assert policy.delay(View()) == GUESS
    assert policy_of({"a": View(), "b": View()}, 0.7).delay(View(p95=0.3)) == 0.7


@pytest.mark.parametrize(
    ("after", "share"), [(0, 0.05), (-1, 0.05), (math.nan, 0.05), ("p99", 0.05), (1, -0.1), (1, 2)]
)
def test_values_that_cannot_be(after: float | str, share: float) -> None:
    with pytest.raises(ValueError, match="hedge_"):
        policy_of({"a": View()}, after, share)


def test_recent_times_are_those_of_the_last_half_minute() -> None:
    times = RecentTimes()
    assert times.percentile(95, 0.0) is None
    for number in range(100):
        times.record(number / 100, 1.0)
    assert times.percentile(95, 1.0) == 0.95
    assert times.percentile(50, 1.0) == 0.5
    assert times.percentile(95, 1.0, least=101) is None
    assert times.usual(1.0) == 0.92
    for _ in range(8):
        times.record(7.0, 20.0)
    assert times.usual(20.0) == 7.0, "half of the last few are slow"
    assert times.percentile(50, 20.0) == pytest.approx(0.54)
    assert times.percentile(50, 40.0) == 7.0
    times.forget()
    assert times.usual(40.0) is None
    assert times.percentile(50, 40.0) is None
    assert times.percentile(50, 60.0) is None
