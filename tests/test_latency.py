"""Histograms of times."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskread.latency import BOUNDS, Latency


def test_a_new_histogram_is_empty() -> None:
    latency = Latency()
    assert (latency.count, latency.total) == (0, 0.0)
    assert latency.buckets == [0] * (len(BOUNDS) + 1)


def test_bounds_grow() -> None:
    assert list(BOUNDS) == sorted(set(BOUNDS))


@pytest.mark.parametrize("index", range(len(BOUNDS)))
def test_a_bound_belongs_to_its_own_bucket(index: int) -> None:
    # A bucket of Prometheus counts what is less than or equal to its bound.
    latency = Latency()
    latency.record(BOUNDS[index])
    assert latency.buckets[index] == 1
    latency.record(BOUNDS[index] * 1.0001)
    assert latency.buckets[index + 1] == 1


@pytest.mark.parametrize(("seconds", "bucket"), [(0.0, 0), (1e-9, 0), (60.1, len(BOUNDS)), (1e9, len(BOUNDS))])
def test_the_ends_of_the_scale(seconds: float, bucket: int) -> None:
    latency = Latency()
    latency.record(seconds)
    assert latency.buckets[bucket] == latency.count == 1


@given(times=st.lists(st.floats(0, 1e6), max_size=50))
def test_each_time_is_counted_once_and_in_order(times: list[float]) -> None:
    latency = Latency()
    for each in times:
        latency.record(each)
    assert latency.count == len(times)
    assert latency.total == pytest.approx(sum(times))
    for index, bound in enumerate(BOUNDS):
        assert sum(latency.buckets[: index + 1]) == sum(each <= bound for each in times)


def test_a_copy_stays_as_it_is() -> None:
    latency = Latency()
    latency.record(1.0)
    copy = latency.copy()
    assert copy == latency
    latency.record(2.0)
    assert (copy.count, copy.total) == (1, 1.0)
    assert (latency.count, latency.total) == (2, 3.0)


@pytest.mark.parametrize(("share", "low", "high"), [(0.5, 0.0, 0.0001), (0.9, 0.05, 0.1), (1.0, 0.05, 0.1)])
def test_a_quantile_is_in_the_bucket_of_its_rank(share: float, low: float, high: float) -> None:
    latency = Latency()
    for seconds in [0.00005] * 6 + [0.07] * 4:
        latency.record(seconds)
    found = latency.quantile(share)
    assert found is not None
    assert low < found <= high


def test_quantiles_at_the_ends() -> None:
    latency = Latency()
    assert latency.quantile(0.5) is None
    latency.record(1000.0)
    assert latency.quantile(0.5) == 60.0, "more is not known"


@given(times=st.lists(st.floats(0, 1e6), max_size=50), share=st.floats(0.001, 1))
def test_a_quantile_is_never_beyond_the_bounds(times: list[float], share: float) -> None:
    latency = Latency()
    for seconds in times:
        latency.record(seconds)
    found = latency.quantile(share)
    assert (found is None) == (not times)
    assert found is None or 0 <= found <= BOUNDS[-1]


def test_since_is_what_was_counted_meanwhile() -> None:
    latency = Latency()
    latency.record(1.0)
    before = latency.copy()
    latency.record(0.002)
    assert latency.since(before).total == pytest.approx(0.002)
    assert latency.since(before).count == 1
    assert before.since(latency) == before, "another histogram: all of it is new"
