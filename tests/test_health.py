"""Health: each transition by name, and what holds whatever happens in whatever order."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from diskread import Limits, State
from diskread.health import Health

if TYPE_CHECKING:
    from collections.abc import Callable

    from hypothesis.stateful import MultipleResults

OFFLINE_AFTER = 10.0
LIMITS = Limits(
    threads=3, deadline=10.0, offline_after=10.0, idle_probe=30.0, probe_interval=1.0, probe_interval_max=8.0
)


def new_health(now: float = 0.0, limits: Limits = LIMITS, jitter: float = 0.0) -> Health:
    return Health(limits, now, lambda: jitter)


def offline_health(*, stuck: int = 1) -> Health:
    """A disk that is OFFLINE at 10.0 because of operations that began at 0.0: a stuck one is called 0, 1, ..."""
    health = new_health()
    for operation in range(stuck):
        health.started(operation, 0.0)
    assert health.state(10.0) is State.OFFLINE
    return health


def half_open_health() -> Health:
    """A disk that is HALF_OPEN at 20.0, with nothing under way."""
    health = offline_health()
    health.completed(0, 20.0)
    assert health.state(20.0) is State.HALF_OPEN
    return health


# -- counting ---------------------------------------------------------------------------------------------------------


def test_nothing_bad_is_known_at_first() -> None:
    health = new_health()
    assert (health.in_flight, health.stuck(9.0), health.oldest_age(9.0), health.changes) == (0, 0, 0.0, 0)
    assert health.state(9.0) is State.ONLINE
    assert health.reason(9.0) is None
    assert health.admit(9.0) is None
    assert health.since(9.0) == 0.0


def test_the_oldest_operation_gives_the_age() -> None:
    health = new_health()
    health.started("a", 10.0)
    health.started("b", 12.0)
    assert (health.in_flight, health.oldest_age(15.0)) == (2, 5.0)
    health.completed("a", 15.0)
    assert health.oldest_age(15.0) == 3.0
    health.completed("b", 15.0)
    assert (health.in_flight, health.oldest_age(15.0)) == (0, 0.0)


def test_an_age_is_never_negative() -> None:
    health = new_health()
    health.started("a", 10.0)
    assert health.oldest_age(9.0) == 0.0


def test_what_is_over_cannot_be_abandoned() -> None:
    health = new_health()
    health.started("a", 1.0)
    health.completed("a", 2.0)
    health.abandoned("a", 1.0, 2.0)
    assert (health.stuck(100.0), health.state(5.0)) == (0, State.ONLINE)


def test_time_in_the_queue_counts_against_the_deadline() -> None:
    health = new_health()
    health.started("a", 9.0)
    health.abandoned("a", asked=1.0, now=11.0)
    assert health.stuck(11.0) == 1


# -- SUSPECT ----------------------------------------------------------------------------------------------------------


def test_an_operation_that_missed_its_deadline_makes_a_disk_suspect_until_it_returns() -> None:
    health = new_health()
    health.started("stuck", 0.0)
    health.started("other", 5.0)
    health.completed("other", 9.0)
    health.abandoned("stuck", 0.0, 10.0)
    assert (health.state(10.0), health.stuck(10.0), health.since(10.0)) == (State.SUSPECT, 1, 10.0)
    assert health.admit(10.0) is None, "other reads still have a chance"
    health.completed("stuck", 11.0)
    assert (health.state(11.0), health.stuck(11.0), health.changes) == (State.ONLINE, 0, 2)


def test_a_caller_that_leaves_early_says_nothing_about_the_disk() -> None:
    health = new_health(limits=Limits(threads=1, offline_after=60.0, idle_probe=90.0, deadline=10.0))
    health.started("a", 1.0)
    health.abandoned("a", 1.0, 1.1)
    assert (health.stuck(1.1), health.state(1.1), health.admit(1.1)) == (0, State.ONLINE, None)
    assert (health.stuck(11.0), health.state(11.0)) == (1, State.SUSPECT), "but the disk has had its time in the end"


@pytest.mark.parametrize(("threads", "says"), [(1, "its only slot holds"), (3, "all 3 slots hold")])
def test_more_is_refused_when_every_slot_is_stuck(threads: int, says: str) -> None:
    health = new_health(limits=Limits(threads=threads, offline_after=math.inf, deadline=10.0))
    for operation in range(threads):
        health.started(operation, 1.0)
    for operation in range(threads):
        assert health.admit(12.0) is None
        health.abandoned(operation, 1.0, 12.0)
    refusal = health.admit(12.0)
    assert refusal is not None
    assert (refusal.offline, refusal.retry_after) == (False, None)
    assert says in refusal.reason
    health.completed(0, 13.0)
    assert health.admit(13.0) is None


def test_what_somebody_waits_for_is_not_stuck() -> None:
    health = new_health(limits=Limits(threads=1, offline_after=math.inf))
    health.started("a", 1.0)
    assert (health.stuck(1000.0), health.admit(1000.0), health.state(1000.0)) == (0, None, State.ONLINE)


# -- OFFLINE for lack of progress -------------------------------------------------------------------------------------


def test_no_progress_takes_a_disk_offline_at_exactly_that_time() -> None:
    health = new_health()
    health.started("a", 5.0)
    assert health.state(14.999) is State.ONLINE
    assert health.state(15.0) is State.OFFLINE
    assert health.reason(15.0) == "no operation has completed for 10 s"
    refusal = health.admit(15.0)
    assert refusal is not None
    assert refusal.offline
    assert "offline for 0 s: no operation has completed for 10 s" in refusal.reason
    assert (health.since(17.0), health.changes) == (15.0, 1)


def test_a_suspect_disk_goes_offline() -> None:
    health = new_health()
    health.started("a", 0.0)
    health.abandoned("a", 0.0, 9.6)
    assert health.state(9.6) is State.SUSPECT
    assert health.state(10.0) is State.OFFLINE
    assert health.changes == 2


def test_each_completion_gives_the_disk_as_much_time_again() -> None:
    health = new_health()
    health.started("stuck", 0.0)
    for turn in range(1, 20):
        health.started(turn, turn * 9.0 - 1)
        health.completed(turn, turn * 9.0)
        assert health.state(turn * 9.0) is State.ONLINE
    assert health.state(19 * 9.0 + 9.99) is State.ONLINE
    assert health.state(19 * 9.0 + 10.0) is State.OFFLINE


def test_the_wait_of_an_idle_disk_is_not_held_against_it() -> None:
    health = new_health()
    health.started("a", 1000.0)
    assert health.state(1009.9) is State.ONLINE
    assert health.state(1010.0) is State.OFFLINE


def test_a_completion_at_the_very_time_of_the_verdict_comes_too_late() -> None:
    health = new_health()
    health.started("a", 0.0)
    health.completed("a", 10.0)
    assert (health.state(10.0), health.changes) == (State.HALF_OPEN, 2)


def test_a_completion_just_before_the_verdict_is_in_time() -> None:
    health = new_health()
    health.started("a", 0.0)
    health.completed("a", 9.999)
    assert (health.state(100.0), health.changes) == (State.ONLINE, 0)


def test_a_part_of_an_operation_is_progress() -> None:
    parts = {"a": 0.0, "b": 0.0}
    health = Health(LIMITS, 0.0, lambda: 0.0, parts.__getitem__)
    health.started("a", 1.0)
    health.started("b", 2.0)
    parts["b"] = 9.0
    assert health.next_event(9.0) > 9.0
    assert health.state(18.9) is State.ONLINE
    parts["a"] = 18.95
    assert health.state(28.9) is State.ONLINE
    assert health.state(28.95) is State.OFFLINE
    assert health.changes == 1


def test_a_part_that_came_in_the_future_is_no_reason_to_wait_longer() -> None:
    health = Health(LIMITS, 0.0, lambda: 0.0, lambda _: 1e9)
    health.started("a", 0.0)
    assert health.state(9.0) is State.ONLINE
    assert health.next_event(9.0) <= 19.0


def test_nobody_is_offline_who_has_no_patience_to_lose() -> None:
    health = new_health(limits=Limits(threads=3, offline_after=math.inf))
    health.started("a", 0.0)
    health.abandoned("a", 0.0, 10.0)
    assert health.state(1e9) is State.SUSPECT
    assert health.next_event(1e9) == math.inf
    assert not health.probe_due(1e9)
    health.completed("a", 1e9)
    assert health.next_event(1e9) == math.inf


def test_a_disk_without_verdicts_can_still_be_missing_and_taken_offline() -> None:
    health = new_health(limits=Limits(offline_after=math.inf))
    health.missing("gone", 1.0)
    assert health.state(1.0) is State.OFFLINE
    assert health.next_event(1.0) == 2.0
    health.set_offline("by hand: broken", 2.0)
    assert health.next_event(2.0) == math.inf


def test_clients_that_leave_a_dead_disk_do_not_make_it_look_alive() -> None:
    health = new_health()
    health.started("stuck", 0.0)
    for turn in range(1, 10):
        health.started(f"close {turn}", float(turn), "close")
        health.completed(f"close {turn}", turn + 0.1)
    assert health.state(10.0) is State.OFFLINE
    health.started("close", 11.0, "close")
    health.completed("close", 11.1)
    assert health.state(11.1) is State.OFFLINE


def test_closes_on_a_disk_without_other_work_are_nothing_to_worry_about() -> None:
    health = new_health()
    for turn in range(1, 29):
        health.started(f"close {turn}", float(turn), "close")
        health.completed(f"close {turn}", turn + 0.9)
        assert health.state(turn + 0.9) is State.ONLINE


def test_a_close_that_hangs_takes_a_disk_offline() -> None:
    health = new_health()
    health.started("close", 0.0, "close")
    assert health.state(10.0) is State.OFFLINE
    assert health.probe_due(10.0)
    health.completed("close", 11.0)
    assert health.state(11.0) is State.OFFLINE, "a probe has to say that it is back"


# -- coming back ------------------------------------------------------------------------------------------------------


def test_a_stuck_operation_that_returns_leads_to_half_open() -> None:
    health = offline_health(stuck=2)
    health.completed(0, 30.0)
    assert (health.state(30.0), health.reason(30.0), health.since(30.0)) == (State.HALF_OPEN, None, 30.0)


def test_all_slots_stuck_and_no_probe_to_be_sent_still_comes_back() -> None:
    health = offline_health(stuck=3)
    now = 10.0
    while now < 100.0:
        assert health.probe_due(now)
        health.postpone_probe(now)
        now = health.next_event(now)
        assert health.state(now) is State.OFFLINE
    health.completed(2, now)
    assert health.state(now) is State.HALF_OPEN
    assert health.admit(now) is None


def test_a_probe_that_completes_leads_to_half_open() -> None:
    health = offline_health()
    assert health.probe_due(10.0)
    health.started("probe", 10.0, "probe")
    assert health.state(15.0) is State.OFFLINE
    health.completed("probe", 15.0)
    assert health.state(15.0) is State.HALF_OPEN


def test_half_open_lets_one_request_through() -> None:
    health = half_open_health()
    assert health.admit(20.0) is None
    health.started("trial", 20.0)
    refusal = health.admit(20.0)
    assert refusal is not None
    assert (refusal.offline, refusal.retry_after) == (True, LIMITS.probe_interval)
    assert "one request at a time" in refusal.reason


def test_the_trial_that_completes_brings_the_disk_back() -> None:
    health = half_open_health()
    health.started("trial", 20.0)
    health.completed("trial", 21.0)
    assert (health.state(21.0), health.admit(21.0), health.changes) == (State.ONLINE, None, 3)


def test_the_trial_whose_caller_has_left_is_still_the_one_that_may_try() -> None:
    health = half_open_health()
    health.started("trial", 20.0)
    health.abandoned("trial", 20.0, 20.1)
    assert health.admit(20.2) is not None
    health.completed("trial", 21.0)
    assert health.state(21.0) is State.ONLINE


def test_the_trial_that_never_returns_takes_the_disk_offline_again() -> None:
    health = half_open_health()
    health.started("trial", 20.0)
    assert health.state(29.9) is State.HALF_OPEN
    assert health.state(30.0) is State.OFFLINE
    assert health.probe_due(30.0)
    health.started("probe", 30.0, "probe")
    health.completed("probe", 30.1)
    assert (health.state(30.1), health.admit(30.1)) == (State.HALF_OPEN, None), "the next one may try"
    health.started("second trial", 31.0)
    health.completed("trial", 32.0)
    assert health.state(32.0) is State.HALF_OPEN, "the old trial does not count as the new one"
    health.completed("second trial", 33.0)
    assert health.state(33.0) is State.ONLINE


def test_stuck_operations_that_return_while_half_open_are_progress_but_no_trial() -> None:
    health = offline_health(stuck=3)
    health.completed(0, 20.0)
    health.completed(1, 21.0)
    health.completed(2, 25.0)
    assert health.state(25.0) is State.HALF_OPEN
    health.started("trial", 26.0)
    assert health.state(35.9) is State.HALF_OPEN
    assert health.state(36.0) is State.OFFLINE


def test_a_close_is_not_the_trial() -> None:
    health = half_open_health()
    health.started("close", 20.0, "close")
    assert health.admit(20.0) is None
    health.completed("close", 20.1)
    assert health.state(20.1) is State.HALF_OPEN


def test_a_probe_that_completes_while_half_open_brings_the_disk_back() -> None:
    health = half_open_health()
    assert health.next_event(20.0) == 40.0, "as on any idle disk"
    assert health.probe_due(40.0)
    health.started("probe", 40.0, "probe")
    assert health.admit(40.0) is None, "a request may try meanwhile"
    health.completed("probe", 40.1)
    assert health.state(40.1) is State.ONLINE


def test_a_probe_of_before_that_returns_while_half_open_brings_the_disk_back() -> None:
    health = offline_health()
    health.started("probe", 10.0, "probe")
    health.completed(0, 20.0)
    assert health.state(20.0) is State.HALF_OPEN
    health.completed("probe", 20.1)
    assert health.state(20.1) is State.ONLINE


def test_half_open_with_all_slots_taken_lets_nobody_in() -> None:
    health = offline_health(stuck=3)
    health.set_online(11.0)
    refusal = health.admit(11.0)
    assert refusal is not None
    assert refusal.offline
    health.completed(0, 12.0)
    assert health.admit(12.0) is None


# -- probes -----------------------------------------------------------------------------------------------------------


def test_an_idle_disk_is_probed_in_time_for_a_verdict_within_idle_probe() -> None:
    health = new_health(now=100.0)
    assert health.next_event(100.0) == 120.0
    assert not health.probe_due(119.9)
    assert health.probe_due(120.0)
    health.started("probe", 120.0, "probe")
    assert not health.probe_due(125.0)
    assert health.next_event(125.0) == 130.0
    assert health.state(130.0) is State.OFFLINE


def test_idle_probes_that_complete_go_on_at_the_same_pace() -> None:
    health, now = new_health(), 0.0
    for turn in range(1, 10):
        now = health.next_event(now)
        assert now == turn * 20.0
        assert health.probe_due(now)
        health.started(turn, now, "probe")
        health.completed(turn, now)
        assert health.state(now) is State.ONLINE


def test_idle_disks_are_left_alone_when_told_so() -> None:
    health = new_health(limits=Limits(idle_probe=math.inf))
    assert health.next_event(0.0) == math.inf
    assert not health.probe_due(1e9)


def test_one_hung_request_on_a_quiet_disk_is_not_mistaken_for_a_dead_disk() -> None:
    health, now = new_health(), 0.0
    health.started("hung", 0.0)
    health.abandoned("hung", 0.0, 0.1)
    for turn in range(100):
        now = health.next_event(now)
        assert health.probe_due(now), "the probe is sent before the verdict"
        health.started(turn, now, "probe")
        now += 0.1
        health.completed(turn, now)
        assert health.state(now) in (State.ONLINE, State.SUSPECT)
        assert health.admit(now) is None
    assert now > 20 * OFFLINE_AFTER


def test_a_busy_disk_that_stops_is_probed_once_and_the_probe_does_not_delay_the_verdict() -> None:
    health = new_health()
    health.started("hung", 0.0)
    assert health.next_event(0.0) == 5.0
    health.started("probe", 5.0, "probe")
    assert health.next_event(5.0) == 10.0
    assert not health.probe_due(9.9)
    assert health.state(10.0) is State.OFFLINE
    assert not health.probe_due(1000.0), "it hangs, and it is the only one"
    assert health.next_event(10.0) == math.inf


def test_a_probe_that_cannot_be_sent_is_tried_again_later() -> None:
    health = new_health(limits=Limits(probe_interval=2.0))
    assert health.probe_due(20.0)
    health.postpone_probe(20.0)
    assert not health.probe_due(20.0)
    assert health.next_event(20.0) == 22.0
    assert health.probe_due(22.0)


def test_the_first_probe_of_an_offline_disk_is_due_at_once() -> None:
    assert offline_health().probe_due(10.0)
    assert offline_health().next_event(10.0) == 10.0


def probe_times(health: Health, now: float, count: int) -> list[float]:
    """When probes are sent to a disk whose root stays missing."""
    times = []
    for turn in range(count):
        now = max(now, health.next_event(now))
        assert health.probe_due(now)
        health.started(("probe", turn), now, "probe")
        times.append(now)
        health.completed(("probe", turn), now)
        health.missing("gone", now)
        assert health.state(now) is State.OFFLINE
    return times


@pytest.mark.parametrize("jitter", [0.0, 0.5, 1.0])
def test_the_intervals_between_probes_double_up_to_the_maximum(jitter: float) -> None:
    health = new_health(jitter=jitter)
    health.missing("gone", 0.0)
    times = [0.0, *probe_times(health, 0.0, 7)]
    shorter = 1 - jitter / 4
    assert [after - before for before, after in itertools.pairwise(times)] == [
        each * shorter for each in (1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0)
    ]


@settings(deadline=None, database=None)
@given(jitters=st.lists(st.floats(0, 1), min_size=8, max_size=8))
def test_whatever_the_jitter_intervals_grow_and_never_exceed_the_maximum(jitters: list[float]) -> None:
    source = iter(jitters)
    health = Health(LIMITS, 0.0, lambda: next(source))
    health.missing("gone", 0.0)
    times = [0.0, *probe_times(health, 0.0, 7)]
    intervals = [after - before for before, after in itertools.pairwise(times)]
    assert intervals[:4] == sorted(intervals[:4])
    for interval, longest in zip(intervals, (1, 2, 4, 8, 8, 8, 8), strict=True):
        assert longest * 0.75 - 1e-9 <= interval <= longest + 1e-9


def test_the_intervals_begin_anew_after_a_recovery() -> None:
    health = new_health()
    health.missing("gone", 0.0)
    last = probe_times(health, 0.0, 6)[-1]
    health.found(last)
    health.started("trial", last)
    health.completed("trial", last)
    assert health.state(last) is State.ONLINE
    health.missing("gone again", 100.0)
    assert probe_times(health, 100.0, 3) == [101.0, 103.0, 107.0]


def test_a_long_wait_for_the_next_probe_does_not_outlive_the_recovery() -> None:
    health = offline_health(stuck=3)
    for _ in range(5):
        health.postpone_probe(10.0)
    health.completed(0, 11.0)
    health.started("trial", 11.0)
    health.completed("trial", 11.5)
    health.completed(1, 11.5)
    health.completed(2, 11.5)
    assert health.next_event(11.5) == 31.5, "the time of an idle probe"


def test_callers_learn_when_the_next_probe_is() -> None:
    health = new_health()
    health.missing("gone", 0.0)
    refusal = health.admit(0.25)
    assert refusal is not None
    assert refusal.retry_after == 0.75
    assert refusal.reason == "offline for 0 s: gone; next probe in 0.8 s"


def test_callers_are_not_told_to_come_back_at_once_while_a_probe_hangs() -> None:
    health = offline_health()
    health.started("probe", 10.0, "probe")
    refusal = health.admit(1000.0)
    assert refusal is not None
    assert refusal.retry_after == LIMITS.probe_interval
    assert refusal.reason.endswith("; a probe is under way")


# -- the root ---------------------------------------------------------------------------------------------------------


def test_a_missing_root_is_offline_with_that_reason_until_it_is_found() -> None:
    health = new_health()
    health.missing("no root", 1.0)
    assert (health.state(1.0), health.reason(1.0)) == (State.OFFLINE, "no root")
    health.found(5.0)
    assert (health.state(5.0), health.reason(5.0), health.admit(5.0)) == (State.HALF_OPEN, None, None)
    health.started("trial", 5.0)
    assert health.admit(5.0) is not None


def test_operations_that_complete_do_not_bring_a_missing_root_back() -> None:
    health = new_health()
    health.started("a", 0.0)
    health.missing("no root", 1.0)
    health.completed("a", 2.0)
    assert health.state(2.0) is State.OFFLINE


def test_a_disk_can_be_missing_that_was_offline_for_lack_of_progress() -> None:
    health = offline_health()
    health.missing("no root", 12.0)
    assert (health.reason(12.0), health.since(12.0), health.changes) == ("no root", 10.0, 1)
    health.completed(0, 13.0)
    assert health.state(13.0) is State.OFFLINE
    health.found(14.0)
    assert health.state(14.0) is State.HALF_OPEN


def test_a_missing_disk_on_which_operations_hang_is_watched_again_once_it_is_found() -> None:
    health = new_health()
    health.started("stuck", 0.0)
    health.missing("no root", 1.0)
    health.started("probe", 50.0, "probe")
    health.completed("probe", 50.0)
    health.found(50.0)
    assert health.state(59.9) is State.HALF_OPEN
    assert health.state(60.0) is State.OFFLINE


def test_the_root_may_go_while_half_open() -> None:
    health = half_open_health()
    health.started("trial", 20.0)
    health.missing("no root", 21.0)
    assert health.state(21.0) is State.OFFLINE
    health.completed("trial", 22.0)
    assert health.state(22.0) is State.OFFLINE
    health.found(23.0)
    assert health.admit(23.0) is None, "the old trial is forgotten"


def test_found_means_nothing_when_nothing_was_missing() -> None:
    for health, state in ((new_health(), State.ONLINE), (offline_health(), State.OFFLINE)):
        health.found(10.0)
        assert health.state(10.0) is state


def test_a_watched_disk_is_offline_until_its_first_answer_and_then_online_without_a_trial() -> None:
    health = new_health()
    health.await_first_answer(0.0)
    assert (health.state(0.0), health.reason(0.0)) == (State.OFFLINE, "it has not answered yet")
    assert health.probe_due(0.0)
    health.started("probe", 0.0, "probe")
    health.completed("probe", 0.5)
    assert health.state(0.5) is State.OFFLINE, "the answer may be that there is no root"
    health.found(0.5)
    assert (health.state(0.5), health.changes) == (State.ONLINE, 2)


def test_a_watched_disk_that_never_answers_stays_offline() -> None:
    health = new_health()
    health.await_first_answer(0.0)
    health.started("probe", 0.0, "probe")
    assert health.state(1e6) is State.OFFLINE
    health.completed("probe", 1e6)
    health.found(1e6)
    assert health.state(1e6) is State.ONLINE


def test_a_watched_disk_without_a_root_is_missing() -> None:
    health = new_health()
    health.await_first_answer(0.0)
    health.started("probe", 0.0, "probe")
    health.completed("probe", 0.5)
    health.missing("no root", 0.5)
    assert health.reason(0.5) == "no root"
    assert health.next_event(0.5) == 1.0
    health.found(1.0)
    assert health.state(1.0) is State.ONLINE


def test_after_the_first_answer_a_root_that_was_lost_and_found_has_to_prove_itself() -> None:
    health = new_health()
    health.await_first_answer(0.0)
    health.found(1.0)
    assert health.state(1.0) is State.ONLINE
    health.missing("no root", 2.0)
    health.found(3.0)
    assert health.state(3.0) is State.HALF_OPEN


def test_a_first_answer_that_a_hand_did_not_wait_for_is_not_awaited_any_more() -> None:
    health = new_health()
    health.await_first_answer(0.0)
    health.set_offline("by hand: x", 1.0)
    health.set_online(2.0)
    health.started("trial", 2.0)
    health.completed("trial", 2.0)
    health.missing("no root", 3.0)
    health.found(4.0)
    assert health.state(4.0) is State.HALF_OPEN


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_the_hand_wins_until_it_lets_go() -> None:
    health = new_health()
    health.started("a", 0.0)
    health.started("probe", 0.0, "probe")
    health.set_offline("by hand: broken", 1.0)
    health.completed("a", 2.0)
    health.completed("probe", 2.0)
    health.found(3.0)
    health.missing("no root", 4.0)
    health.await_first_answer(5.0)
    assert (health.state(1e6), health.reason(1e6), health.changes) == (State.OFFLINE, "by hand: broken", 1)
    assert not health.probe_due(1e6)
    assert health.next_event(1e6) == math.inf
    refusal = health.admit(1e6)
    assert refusal is not None
    assert (refusal.offline, refusal.retry_after) == (True, None)
    assert "probe" not in refusal.reason


@pytest.mark.parametrize(
    "bad", [offline_health, lambda: _after(lambda health: health.missing("no root", 1.0))], ids=["stalled", "missing"]
)
def test_the_hand_wins_over_every_other_verdict(bad: Callable[[], Health]) -> None:
    health = bad()
    health.set_offline("by hand: broken", 11.0)
    assert health.reason(11.0) == "by hand: broken"
    health.found(12.0)
    assert health.state(12.0) is State.OFFLINE
    health.set_online(13.0)
    assert (health.state(13.0), health.admit(13.0)) == (State.HALF_OPEN, None)


def _after(action: Callable[[Health], None]) -> Health:
    health = new_health()
    action(health)
    return health


def test_online_by_hand_while_operations_are_stuck_gives_the_disk_another_chance() -> None:
    health = offline_health(stuck=2)
    health.set_online(50.0)
    assert (health.state(50.0), health.admit(50.0)) == (State.HALF_OPEN, None)
    assert health.state(59.9) is State.HALF_OPEN
    assert health.state(60.0) is State.OFFLINE, "it still makes no progress"


def test_online_by_hand_does_not_trouble_a_disk_that_is_not_offline() -> None:
    health = new_health()
    health.started("a", 0.0)
    health.set_online(1.0)
    assert (health.state(1.0), health.changes) == (State.ONLINE, 0)
    health = half_open_health()
    health.started("trial", 20.0)
    health.set_online(21.0)
    assert health.admit(21.0) is not None, "the trial goes on"


def test_a_probe_that_hung_before_the_hand_came_is_still_the_only_one() -> None:
    health = offline_health()
    health.started("probe", 10.0, "probe")
    health.set_offline("by hand: broken", 11.0)
    health.set_online(12.0)
    assert health.state(22.0) is State.OFFLINE
    assert not health.probe_due(1000.0)
    health.completed("probe", 1000.0)
    assert health.state(1000.0) is State.HALF_OPEN


# -- what holds whatever happens --------------------------------------------------------------------------------------


@dataclass
class Model:
    """What really happened, kept in the plainest way: no state, only a record."""

    in_flight: dict[int, tuple[float, str]] = field(default_factory=dict)
    answered: float = 0.0
    by_hand: bool = False
    missing: bool = False
    was_stalled: bool = False
    tried: set[int] = field(default_factory=set)

    def stalled(self, now: float) -> bool:
        """Something has been under way for `offline_after`, and nothing has completed meanwhile."""
        starts = [start for start, _ in self.in_flight.values()]
        return bool(starts) and now >= max(min(starts), self.answered) + OFFLINE_AFTER  # rounded as Health does


class Interleavings(RuleBasedStateMachine):
    """Arbitrary interleavings of everything that can happen to a disk."""

    operations: Bundle[int] = Bundle("operations")

    @initialize(jitter=st.floats(0, 1))
    def begin(self, jitter: float) -> None:
        self.now = 0.0
        self.health = Health(LIMITS, self.now, lambda: jitter)
        self.model = Model()
        self.last = 0
        self.changes = 0

    def start(self, kind: str) -> int:
        self.last += 1
        self.see()
        self.health.started(self.last, self.now, kind)  # type: ignore[arg-type]
        self.model.in_flight[self.last] = (self.now, kind)
        return self.last

    def see(self) -> None:
        """The record of what was to be seen before the next event."""
        self.model.was_stalled |= self.model.stalled(self.now)

    @rule(seconds=st.sampled_from([0.0, 0.1, 0.5, 1.0, 4.0, 5.0, 9.9, 10.0, 10.1, 25.0]))
    def tick(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def wait_for_the_next_event(self) -> None:
        event = self.health.next_event(self.now)
        if event != math.inf:
            self.now = max(self.now, event)

    @rule(target=operations)
    def ask(self) -> int | MultipleResults[int]:
        if self.health.admit(self.now) is not None or len(self.model.in_flight) >= LIMITS.threads:
            return multiple()
        half_open = self.health.state(self.now) is State.HALF_OPEN
        operation = self.start("request")
        if half_open:
            self.model.tried.add(operation)
        return operation

    @rule(target=operations)
    @precondition(lambda self: len(self.model.in_flight) < LIMITS.threads)
    def close(self) -> int:
        return self.start("close")

    @rule(target=operations)
    def look(self) -> int | MultipleResults[int]:
        if not self.health.probe_due(self.now):
            return multiple()
        if len(self.model.in_flight) >= LIMITS.threads:
            self.health.postpone_probe(self.now)
            assert not self.health.probe_due(self.now)
            return multiple()
        assert not self.probing
        return self.start("probe")

    @rule(operation=operations, early=st.booleans())
    def abandon(self, operation: int, early: bool) -> None:
        if operation in self.model.in_flight:
            asked = self.model.in_flight[operation][0] - (0 if early else 2.0)
            self.health.abandoned(operation, asked, self.now)

    @rule(operation=consumes(operations))
    def complete(self, operation: int) -> None:
        self.see()
        self.health.completed(operation, self.now)
        _, kind = self.model.in_flight.pop(operation)
        if kind != "close":
            self.model.answered = self.now
            self.model.was_stalled = False

    @rule()
    def lose_root(self) -> None:
        self.see()
        self.health.missing("no root", self.now)
        self.model.missing = self.model.missing or not self.model.by_hand

    @rule()
    def find_root(self) -> None:
        self.see()
        self.health.found(self.now)
        if self.model.missing:
            self.model.missing = self.model.was_stalled = False

    @rule()
    def await_first_answer(self) -> None:
        self.see()
        self.health.await_first_answer(self.now)
        self.model.missing = self.model.missing or not self.model.by_hand

    @rule()
    def take_offline(self) -> None:
        self.see()
        self.health.set_offline("by hand: broken", self.now)
        self.model.by_hand, self.model.missing = True, False

    @rule()
    def take_online(self) -> None:
        self.see()
        if self.health.state(self.now) is State.OFFLINE:
            self.model.answered = self.now  # as good as
            self.model.by_hand = self.model.missing = self.model.was_stalled = False
        self.health.set_online(self.now)

    @property
    def probing(self) -> bool:
        return any(kind == "probe" for _, kind in self.model.in_flight.values())

    @property
    def state(self) -> State:
        return self.health.state(self.now)

    @invariant()
    def a_disk_that_completes_nothing_is_always_offline(self) -> None:
        if self.model.stalled(self.now):
            assert self.state is State.OFFLINE

    @invariant()
    def a_disk_that_completes_operations_is_never_offline(self) -> None:
        self.see()
        if self.state is State.OFFLINE:
            assert self.model.was_stalled or self.model.missing or self.model.by_hand

    @invariant()
    def what_is_missing_or_taken_offline_is_offline(self) -> None:
        if self.model.missing or self.model.by_hand:
            assert self.state is State.OFFLINE

    @invariant()
    def the_hand_wins(self) -> None:
        if self.model.by_hand:
            assert self.health.reason(self.now) == "by hand: broken"
            assert self.health.next_event(self.now) == math.inf
            assert not self.health.probe_due(self.now)

    @invariant()
    def offline_always_leads_to_a_probe(self) -> None:
        if self.state is State.OFFLINE and not self.model.by_hand and not self.probing:
            event = self.health.next_event(self.now)
            assert event <= self.now + LIMITS.probe_interval_max
            assert self.health.probe_due(self.now) == (event <= self.now)

    @invariant()
    def there_is_one_probe_at_a_time(self) -> None:
        assert sum(kind == "probe" for _, kind in self.model.in_flight.values()) <= 1
        if self.probing:
            assert not self.health.probe_due(self.now)

    @invariant()
    def one_request_at_a_time_may_try(self) -> None:
        if self.state is State.HALF_OPEN:
            trying = self.model.tried & self.model.in_flight.keys()
            assert len(trying) <= 1
            free = len(self.model.in_flight) < LIMITS.threads
            assert (self.health.admit(self.now) is None) == (free and not trying)
        else:
            self.model.tried.clear()

    @invariant()
    def who_is_refused_learns_why(self) -> None:
        refusal = self.health.admit(self.now)
        if self.state is State.OFFLINE:
            assert refusal is not None
            assert refusal.offline
            assert str(self.health.reason(self.now)) in refusal.reason
            assert (refusal.retry_after is None) == self.model.by_hand
            assert refusal.retry_after is None or 0 <= refusal.retry_after <= LIMITS.probe_interval_max
        else:
            assert self.health.reason(self.now) is None
        if self.state is State.ONLINE:
            assert refusal is None

    @invariant()
    def the_next_event_is_in_the_future_unless_a_probe_is_due(self) -> None:
        assert self.health.next_event(self.now) > self.now or self.health.probe_due(self.now)

    @invariant()
    def numbers_are_those_of_the_record(self) -> None:
        starts = [start for start, _ in self.model.in_flight.values()]
        assert self.health.in_flight == len(starts)
        assert self.health.oldest_age(self.now) == (self.now - min(starts) if starts else 0.0)
        assert 0 <= self.health.stuck(self.now) <= len(starts)
        assert (self.state is State.SUSPECT) <= (self.health.stuck(self.now) > 0)
        assert self.health.since(self.now) <= self.now
        assert self.health.changes >= self.changes
        self.changes = self.health.changes


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(
    deadline=None, database=None, max_examples=250, stateful_step_count=40, print_blob=False
)


# -- looking when it is time is as good as looking all the time --------------------------------------------------------

# In whole milliseconds, so that both ways of looking see the same times to the last bit.
IN_MS = Limits(
    threads=3, deadline=80, offline_after=100, idle_probe=170, probe_interval=10, probe_interval_max=40, queue=0
)

Event = tuple[int, str]
EVENTS = st.lists(
    st.tuples(st.integers(0, 160), st.sampled_from(["start", "complete", "close", "lose", "find", "off", "on"])),
    max_size=25,
)


def verdicts(events: list[Event], answers: list[bool], *, poll: bool) -> list[tuple[float, State]]:
    """What a disk was taken for and when, by looking every millisecond, or only when `next_event` says so."""
    health, now, probes = new_health(limits=IN_MS), 0.0, 0
    under_way: list[object] = []
    seen = [(0.0, State.ONLINE)]

    def look() -> None:
        nonlocal probes
        if health.probe_due(now):
            if len(under_way) >= IN_MS.threads:
                health.postpone_probe(now)
            else:
                probes += 1
                probe = ("probe", probes)
                health.started(probe, now, "probe")
                under_way.append(probe)
                if answers[probes % len(answers)]:
                    health.completed(under_way.pop(), now)
        state = health.state(now)
        if state is not seen[-1][1]:
            seen.append((now, state))

    def act(number: int, event: str) -> None:
        if event in ("start", "close") and len(under_way) < IN_MS.threads:
            under_way.append(number)
            health.started(number, now, "request" if event == "start" else "close")
        elif event == "complete" and under_way:
            health.completed(under_way.pop(0), now)
        elif event == "lose":
            health.missing("no root", now)
        elif event == "find":
            health.found(now)
        elif event == "off":
            health.set_offline("by hand", now)
        elif event == "on":
            health.set_online(now)

    for number, (gap, event) in enumerate([*events, (1000, "end")]):
        ends = now + gap
        while now < ends:
            now = min(ends, now + 1 if poll else health.next_event(now))
            look()
        act(number, event)
        look()
    return seen


@settings(deadline=None, database=None, max_examples=120)
@given(events=EVENTS, answers=st.lists(st.booleans(), min_size=1, max_size=4))
def test_looking_at_next_events_finds_what_looking_all_the_time_finds(events: list[Event], answers: list[bool]) -> None:
    assert verdicts(events, answers, poll=False) == verdicts(events, answers, poll=True)


def test_the_comparison_of_both_ways_of_looking_sees_verdicts() -> None:
    seen = verdicts([(7, "start"), (50, "start")], [False], poll=False)
    assert seen == [(0.0, State.ONLINE), (107.0, State.OFFLINE)]
    back = verdicts([(7, "start"), (120, "complete")], [True], poll=False)
    assert {state for _, state in back} == {State.ONLINE}, "its probes say that the disk is well"
