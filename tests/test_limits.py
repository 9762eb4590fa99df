"""Limits: what is refused names the field."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import gevent
import pytest

from diskread import Limits
from diskread.limits import check_deadline

from .conftest import SMALL, MakeDisk, until


def test_the_defaults_are_allowed() -> None:
    limits = Limits()
    assert dataclasses.astuple(limits) == (8, 64, 10.0, 60.0, 10.0, 30.0, 1.0, 30.0, 1.0, "auto", "threadpool")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("threads", 1),
        ("threads", 10_000),
        ("queue", 0),
        ("queue", 1_000_000),
        ("deadline", 1),
        ("deadline", 1e-9),
        ("deadline", math.inf),
        ("idle", 1),
        ("idle", 0.001),
        ("idle", 1e6),
        ("offline_after", 0.001),
        ("offline_after", math.inf),
        ("idle_probe", 10.001),
        ("idle_probe", math.inf),
        ("probe_interval", 0.01),
        ("probe_interval", 30),
        ("probe_interval_max", 1),
        ("probe_interval_max", 1e9),
        ("slow", 1e-6),
        ("slow", math.inf),
    ],
)
def test_what_is_in_range_is_kept(field: str, value: float) -> None:
    assert getattr(Limits(**{field: value}), field) == value  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("threads", 0),
        ("threads", -1),
        ("threads", 10_001),
        ("threads", 2**64),
        ("queue", -1),
        ("queue", 1_000_001),
        ("deadline", 0),
        ("deadline", 0.0),
        ("deadline", -1.5),
        ("deadline", math.nan),
        ("deadline", -math.inf),
        ("idle", 0),
        ("idle", -1),
        ("idle", math.inf),
        ("idle", math.nan),
        ("idle", 10**400),
        *[(name, value) for name in ("offline_after", "slow") for value in (0, -1, math.nan, -math.inf)],
        *[("idle_probe", value) for value in (0, -1, 10, 9.9, math.nan)],
        *[("probe_interval", value) for value in (0, 0.009, -1, math.nan, math.inf)],
        *[("probe_interval_max", value) for value in (0, 0.99, math.nan, math.inf)],
        ("idle", 1e10),  # more than threading.TIMEOUT_MAX: a lock of a native thread does not take it
    ],
)
def test_what_is_out_of_range_is_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be .*, not "):
        Limits(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "field", [each.name for each in dataclasses.fields(Limits) if each.name not in ("inline", "engine")]
)
@pytest.mark.parametrize("value", ["1", None, True, False, b"1", [1], 1j, object()], ids=repr)
def test_what_is_of_the_wrong_type_is_named(field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{field} must be "):
        Limits(**{field: value})


def test_inline_is_one_of_two_words() -> None:
    assert Limits(inline="off").inline == "off"
    with pytest.raises(ValueError, match=r"^inline must be 'auto' or 'off', not 'on'"):
        Limits(inline="on")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^inline must be 'auto' or 'off', not True"):
        Limits(inline=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["threads", "queue"])
@pytest.mark.parametrize("value", [1.0, 1.5, math.inf])
def test_counts_are_integers(field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{field} must be an integer"):
        Limits(**{field: value})


def test_idle_probe_does_not_matter_without_verdicts() -> None:
    assert Limits(offline_after=math.inf, idle_probe=1.0).idle_probe == 1.0


def test_limits_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Limits().threads = 9  # type: ignore[misc]


@pytest.mark.parametrize("seconds", [0, -1, math.nan])
def test_a_deadline_of_a_call_is_checked_as_well(seconds: float) -> None:
    with pytest.raises(ValueError, match="deadline"):
        check_deadline(seconds)


def test_the_longest_idle_time_that_is_allowed_works(make_disk: MakeDisk, capfd: pytest.CaptureFixture[str]) -> None:
    # The longest time that Limits takes must be one that a lock of a native thread takes, too.
    longest = max(10.0**power for power in range(20) if _allowed(10.0**power))
    disk = make_disk(threads=1, idle=longest)
    assert disk.read("small") == SMALL
    gevent.sleep(0.05)
    assert disk.read("small") == SMALL
    until(lambda: not disk.status.load.in_flight)
    assert disk.status.load.threads == 1
    assert capfd.readouterr().err == ""


def _allowed(idle: float) -> bool:
    try:
        Limits(idle=idle)
    except ValueError:
        return False
    return True


def test_the_engine_is_one_that_there_is() -> None:
    assert Limits(engine="native").engine == "native"
    for value in ("", "Native", "thread pool"):
        with pytest.raises(ValueError, match=r"^engine must be 'threadpool' or 'native', not "):
            Limits(engine=value)  # type: ignore[arg-type]
    for wrong in (None, b"native", 1, ["native"]):
        with pytest.raises(TypeError, match=r"^engine must be 'threadpool' or 'native', not "):
            Limits(engine=wrong)  # type: ignore[arg-type]
