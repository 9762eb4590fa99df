"""Compares what two runs of the same tests have come to."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

MISSING = "not run"


@dataclass(frozen=True)
class Outcome:
    """What a test has come to.

    Args:
        outcome: "passed", "failed" or "skipped".
        seconds: What it took.
        why: Why it failed or was skipped.
    """

    outcome: str
    seconds: float = 0.0
    why: str = ""


NOT_RUN = Outcome(MISSING)


@dataclass(frozen=True)
class Reason:
    """Why tests have to differ.

    Args:
        why: In a sentence.
        long_way: Whether they come to the same with the managers of tests/swift/long_way.py.
        tests: Their ids.
    """

    why: str
    long_way: bool
    tests: list[str]


@dataclass
class Difference:
    """A test that has not come to the same; the first run decides what it was, and others what it is worth.

    Args:
        test: Its id.
        stock: Outcomes with Swift's own managers, one for each run.
        ours: The same with those that stand in.
        reason: Why it has to differ, where that is known.
        long_way: Its outcome with the managers of tests/swift/long_way.py, if it was asked for.
    """

    test: str
    stock: list[Outcome]
    ours: list[Outcome]
    reason: Reason | None = None
    long_way: Outcome | None = None

    @property
    def flaky(self) -> bool:
        """Whether it comes to different things with Swift's own managers alone: then it says nothing about others."""
        return len({each.outcome for each in self.stock}) > 1

    @property
    def kind(self) -> str:
        """ "different", "expected" or "flaky"."""
        if self.flaky:
            return "flaky"
        if self.reason is None:
            return "different"
        if self.reason.long_way and (self.long_way is None or self.long_way.outcome != self.stock[0].outcome):
            return "different"
        return "expected"


@dataclass
class Comparison:
    """Two runs of the same tests.

    Args:
        stock: Outcomes by test, with Swift's own managers.
        ours: The same with those that stand in.
        expected: Tests that have to differ, and why.
    """

    stock: dict[str, Outcome]
    ours: dict[str, Outcome]
    expected: list[Reason] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reasons = {test: reason for reason in self.expected for test in reason.tests}
        self.differences = [
            Difference(test, [stock], [ours], self._reasons.get(test))
            for test in sorted({*self.stock, *self.ours})
            for stock, ours in [(self.stock.get(test, NOT_RUN), self.ours.get(test, NOT_RUN))]
            if stock.outcome != ours.outcome
        ]

    @property
    def same(self) -> bool:
        """Whether there was something to compare, and nothing differs without a reason."""
        return any(each.outcome == "passed" for each in self.ours.values()) and not self.of_kind("different")

    @property
    def outdated(self) -> list[str]:
        """Tests that were expected to differ and do not."""
        differing = {each.test for each in self.differences}
        return sorted(test for test in self._reasons if test in self.stock and test not in differing)

    def of_kind(self, kind: str) -> list[Difference]:
        """Those differences; see `Difference.kind`."""
        return [each for each in self.differences if each.kind == kind]

    def table(self) -> str:
        """The counts of both, a line each."""
        header = ["", "tests", "passed", "failed", "skipped", "seconds"]
        rows = [header]
        for name, outcomes in (("stock", self.stock), ("ours", self.ours)):
            counts = Counter(each.outcome for each in outcomes.values())
            numbers = [
                len(outcomes),
                *(counts[kind] for kind in header[2:5]),
                sum(o.seconds for o in outcomes.values()),
            ]
            rows.append([name, *(f"{number:,.0f}" for number in numbers)])
        return "\n".join("".join(cell.rjust(10) if n else cell.ljust(6) for n, cell in enumerate(row)) for row in rows)

    def report(self) -> str:
        """Everything that differs, with reasons."""
        lines = []
        titles = {
            "different": "They differ",
            "expected": "They differ as expected (tests/swift/differences.json)",
            "flaky": "They are flaky: stock alone comes to different things",
        }
        for kind, title in titles.items():
            if found := self.of_kind(kind):
                lines += ["", f"{title}: {len(found)}"]
            for each in found:
                stock, ours = (", ".join(o.outcome for o in outcomes) for outcomes in (each.stock, each.ours))
                why = each.reason.why if each.reason else next((o.why for o in (*each.ours, *each.stock) if o.why), "")
                lines += [
                    f"  {each.test}",
                    f"    stock {stock}; ours {ours}"
                    + (f"; by the long way {each.long_way.outcome}" if each.long_way else ""),
                    *(f"    {line}" for line in why.splitlines()),
                ]
        if self.outdated:
            lines += ["", "Expected to differ, but the same:", *(f"  {test}" for test in self.outdated)]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """All of it, for machines."""
        return {
            "same": self.same,
            "stock": {test: asdict(outcome) for test, outcome in self.stock.items()},
            "ours": {test: asdict(outcome) for test, outcome in self.ours.items()},
            "differences": [{**asdict(each), "kind": each.kind} for each in self.differences],
            "expected_but_same": self.outdated,
        }
