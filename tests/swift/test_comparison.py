"""The comparison of Swift's own tests with stock and with other managers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from .comparison import Comparison, Outcome, Reason

PASSED, FAILED = Outcome("passed"), Outcome("failed", why="so")


def test_the_same() -> None:
    assert Comparison({"a": PASSED, "b": FAILED}, {"a": PASSED, "b": FAILED}).same


def test_nothing_is_not_the_same() -> None:
    assert not Comparison({}, {}).same
    assert not Comparison({"a": FAILED}, {"a": FAILED}).same


def test_a_difference_is_one_and_so_is_a_test_that_did_not_run() -> None:
    for ours in ({"a": PASSED, "b": FAILED}, {"a": PASSED}):
        comparison = Comparison({"a": PASSED, "b": PASSED}, ours)
        assert not comparison.same
        assert [each.test for each in comparison.of_kind("different")] == ["b"]
        assert "  b\n" in comparison.report()


def test_what_differs_with_stock_alone_says_nothing() -> None:
    comparison = Comparison({"a": PASSED, "b": PASSED}, {"a": PASSED, "b": FAILED})
    comparison.differences[0].stock.append(FAILED)
    assert comparison.same
    assert [each.test for each in comparison.of_kind("flaky")] == ["b"]


def test_a_reason_is_enough_or_the_long_way_has_to_be_the_same() -> None:
    reason = Reason("They count otherwise.", long_way=False, tests=["b", "c"])
    stock, ours = {"a": PASSED, "b": PASSED, "c": PASSED}, {"a": PASSED, "b": FAILED, "c": PASSED}
    comparison = Comparison(stock, ours, [reason])
    assert comparison.same
    assert comparison.outdated == ["c"]
    assert "They count otherwise." in comparison.report()

    comparison = Comparison(stock, ours, [replace(reason, long_way=True)])
    for outcome, same in ((None, False), (FAILED, False), (PASSED, True)):
        comparison.differences[0].long_way = outcome
        assert comparison.same is same
    json.dumps(comparison.as_json())


def test_what_is_expected_has_reasons() -> None:
    expected = [Reason(**each) for each in json.loads(Path(__file__).with_name("differences.json").read_text())]
    tests = [test for reason in expected for test in reason.tests]
    assert tests
    assert len(set(tests)) == len(tests)
    assert all(reason.why for reason in expected)
