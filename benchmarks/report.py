"""What the results of all benchmarks have in common: medians with their range, tables, facts about the run."""

from __future__ import annotations

import math
import statistics
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from rich.table import Table as RichTable

from benchmarks.machine import CpuClock, Machine, describe, load_average

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

RESULTS = Path(__file__).resolve().parent / "results"


class Spread(msgspec.Struct, frozen=True):
    """A figure over the repetitions: median, least and greatest."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median, least and greatest of some values."""
    return Spread(statistics.median(values), min(values), max(values))


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """Where and when something was measured.

    Attributes:
        started: Date and time, UTC.
        duration_s: Length of the run, in seconds.
        load_average_before, load_average_after: Over 1, 5 and 15 minutes.
        others_cpu_share: Share of the machine's CPU time that went to other processes than the benchmark itself (its
            children are others, too); None where the kernel does not say.
        machine: The machine.
        versions: Versions of whatever took part besides.
        missing: What did not take part, and why.
    """

    started: str
    duration_s: float
    load_average_before: tuple[float, float, float]
    load_average_after: tuple[float, float, float]
    others_cpu_share: float | None
    machine: Machine
    versions: dict[str, str]
    missing: dict[str, str]


class Run:
    """Takes down the environment of a run."""

    def __init__(self) -> None:
        self._started, self._load, self._clock = datetime.now(timezone.utc), load_average(), CpuClock()
        self.versions: dict[str, str] = {}
        self.missing: dict[str, str] = {}

    def environment(self) -> Environment:
        """The environment until now."""
        return Environment(
            started=self._started.isoformat(timespec="seconds"),
            duration_s=self._clock.elapsed_s(),
            load_average_before=self._load,
            load_average_after=load_average(),
            others_cpu_share=self._clock.others_share(),
            machine=describe(),
            versions=dict(sorted(self.versions.items())),
            missing=dict(sorted(self.missing.items())),
        )


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """A promise, and what was found.

    Attributes:
        promise: What was promised, as a text.
        ratio: What was measured, over the rounds; None when a part of it is missing.
        bound: The bound of the ratio's median.
        at_most: Whether the bound is an upper one.
    """

    promise: str
    ratio: Spread | None
    bound: float
    at_most: bool

    @property
    def kept(self) -> bool | None:
        """Whether the median of the rounds keeps the promise; None when it was not measured."""
        if self.ratio is None:
            return None
        return self.ratio.median <= self.bound if self.at_most else self.ratio.median >= self.bound


class Table:
    """A table for people: once for the terminal, once as Markdown."""

    def __init__(self, title: str, header: Sequence[str], note: str = "") -> None:
        self.title = title
        self.header = list(header)
        self.note = note
        self.rows: list[list[str]] = []

    def rich(self) -> RichTable:
        table = RichTable(title=self.title, title_justify="left", caption=self.note or None, caption_justify="left")
        for index, name in enumerate(self.header):
            table.add_column(name, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        rule = ["---" if index == 0 else "---:" for index in range(len(self.header))]
        lines = [f"| {' | '.join(row)} |" for row in (self.header, rule, *self.rows)]
        return "\n".join([f"### {self.title}", "", *lines, *(["", self.note] if self.note else [])])


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """What was promised, and whether it was kept."""
    table = Table("Promises", ("promise", "measured", "bound", "kept"))
    for each in verdicts:
        kept = {True: "yes", False: "**no**", None: "not measured"}[each.kept]
        measured = "-" if each.ratio is None else with_range(each.ratio, three_digits)
        table.rows.append([each.promise, measured, f"{'<=' if each.at_most else '>='} {each.bound:g}", kept])
    return table


def three_digits(value: float) -> str:
    """A number with three significant digits, and no more than one needs of a large one."""
    if value == 0:
        return "0"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def with_range(value: Spread, show: Callable[[float], str]) -> str:
    """A figure with its range behind it."""
    return f"{show(value.median)} [{show(value.low)}-{show(value.high)}]"


def document(title: str, name: str, intro: str, environment: Environment, tables: Sequence[Table], plot: bool) -> str:
    """A result as Markdown.

    Args:
        title: The heading.
        name: The benchmark's name: that of its file without the suffix.
        intro: What the values are.
        environment: Where it was measured.
        tables: The tables.
        plot: Whether there is a picture beside it.
    """
    before, after = environment.load_average_before[0], environment.load_average_after[0]
    others = environment.others_cpu_share
    facts = [
        *environment.machine.lines(),
        *(("Version of", f"{what}: {version}") for what, version in environment.versions.items()),
        *((f"Left out: {what}", why) for what, why in environment.missing.items()),
        ("Load average (1 min)", f"{before:.2f} before, {after:.2f} after (the run itself is in it)"),
        ("CPU time of other processes", "unknown" if others is None else f"{others:.0%} of the machine"),
        ("Measured", f"{environment.started}, {environment.duration_s:.0f} s"),
    ]
    lines = [
        f"# {title}",
        "",
        f"Generated by `python benchmarks/{name}.py`; do not edit. How to read it: [README](../README.md#{name}py).",
        intro,
        "",
        *([f"![{title}]({name}.png)", ""] if plot else []),
        "| | |",
        "| --- | --- |",
        *(f"| {what} | {text} |" for what, text in facts),
        "",
    ]
    return "\n".join(lines) + "\n" + "\n\n".join(each.markdown() for each in tables) + "\n"


def write(output: Path, name: str, report: msgspec.Struct, text: str, tables: Sequence[Table]) -> None:
    """Write `NAME.json` and `NAME.md`, and show the tables."""
    from rich.console import Console

    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    (output / f"{name}.md").write_text(text)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    for each in tables:
        console.print(each.rich())
        console.print()


def parse_numbers(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """The value of an option that takes numbers with commas in between."""
    if value is None:
        return None
    try:
        numbers = tuple(sorted({int(each) for each in value.split(",")}))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers; try 1,4,16") from None
    if not 1 <= numbers[0] <= numbers[-1] <= 1024:
        raise click.BadParameter("numbers are 1 to 1024")
    return numbers


def say(console: Console, missing: dict[str, str]) -> None:
    """Name what will be left out."""
    for what, why in missing.items():
        console.print(f"Left out: {what} ({why})", markup=False)
