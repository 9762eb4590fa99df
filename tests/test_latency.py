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
