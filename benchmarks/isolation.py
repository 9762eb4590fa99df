"""Some of N disks hang for real: what do the others' clients notice, with which way to schedule a blocking read?

The rows, the load and the hang are those of seedtable.py; README.md says how to read the result.
"""

from __future__ import annotations

import importlib.util
import resource
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if not __package__:  # run as a script: its own directory is on the path, the one above is not
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import Machine, describe, load_average
from benchmarks.seed.load import build_generator
from benchmarks.seed.questions import Hang, Settings, hang
from benchmarks.seed.report import OURS, OURS_NATIVE, table
from benchmarks.seed.rows import Row, RowError, load_rows
from tests.faults.injectors import FaultFS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RESULTS = Path(__file__).resolve().parent / "results"
NAME = "isolation"
WAYS = (OURS, OURS_NATIVE, "gevent-threadpool", "eventlet-tpool", "anyio", "python-threads")
"""Rows of peers/rows.toml: ways to schedule a blocking read that do not stop the server at the first one."""


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """One run.

    Attributes:
        row: Who served.
        disks, hung: How many disks there were, and how many of them hung.
        found: What was measured; None when that failed.
        failure: Why it failed.
    """

    row: str
    disks: int
    hung: int
    found: Hang | None = None
    failure: str | None = None


class Report(msgspec.Struct, kw_only=True):
    """Everything that a run found.

    Attributes:
        format: Grows when the structure changes in a way that readers must know of.
        started: Time of day, ISO 8601, UTC.
        machine: The machine and the versions.
        load_average: 1, 5 and 15 minutes, before the run.
        settings: Of the load. Its rate is that of all disks together.
        scenarios: What ran: first every row with four disks, one hung, then the sweep.
    """

    format: int
    started: str
    machine: Machine
    load_average: tuple[float, float, float]
    settings: Settings
    scenarios: list[Scenario]


def plan(rows: Sequence[str], disks: Sequence[int], hung: Sequence[int]) -> list[tuple[str, int, int]]:
    """The runs: every row with four disks and one that hangs; then, for diskread, every number of disks and of hung."""
    ours = [name for name in (OURS, OURS_NATIVE) if name in rows]
    sweep = [(name, n, k) for name in ours for n in disks for k in hung if k < n and (n, k) != (4, 1)]
    return [(name, 4, 1) for name in rows] + sweep


def markdown(report: Report) -> str:
    """The report as tables."""
    settings = report.settings
    head = (
        "row", "disks", "hung", "healthy p50 before, ms", "hang", "after", "p99 before, ms", "hang", "after",
        "p99.9 before, ms", "hang", "after", "per s before", "hang", "after", "in time in the hang", "threads", "MiB",
    )  # fmt: skip
    lines = []
    for each in report.scenarios:
        if each.found is None:
            lines.append([each.row, str(each.disks), str(each.hung), f"not measured: {each.failure}", *[""] * 14])
            continue
        phases, during = each.found.phases, each.found.phases[1]
        lines.append(
            [
                each.row,
                str(each.disks),
                str(each.hung),
                *(f"{phase.healthy.p50_ms:,.1f}" for phase in phases),
                *(f"{phase.healthy.p99_ms:,.1f}" for phase in phases),
                *(f"{phase.healthy.p99_9_ms:,.1f}" for phase in phases),
                *(f"{phase.healthy_per_second:.0f}" for phase in phases),
                f"{during.healthy_in_time / max(1, during.healthy.count):.1%}",
                f"{each.found.threads_before} to {each.found.threads_end:,}",
                f"{each.found.memory_before / 2**20:.0f} to {each.found.memory_end / 2**20:.0f}",
            ]
        )
    text = [
        "# Disks that hang beside disks that do not",
        "",
        "Written by `python benchmarks/isolation.py`; how to read it is in [README.md](../README.md#isolationpy).",
        "",
        f"{settings.rate:g} requests per second, spread evenly over all disks, open-loop; the hung ones hang for "
        f"{settings.hang:g} s; clients give up after {settings.hang_patience:g} s. In time: answered right within a "
        "second. Threads and memory: before the hang, and at its end.",
        "",
        "![Percentiles and throughput of the healthy disks over time](isolation.png)",
        "",
        *table(head, lines),
        "",
        *table(
            ("", ""),
            [
                *report.machine.lines(),
                ("Run", report.started),
                ("Load average before it", f"{report.load_average[0]:.2f}"),
            ],
            left=2,
        ),
    ]
    return "\n".join(text) + "\n"


def plot(report: Report, path: Path) -> None:
    """Draw the time lines of the runs with four disks.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    shown = [(each.row, each.found) for each in report.scenarios if (each.disks, each.hung) == (4, 1) and each.found]
    if not shown:
        return
    style: dict[Any, Any] = {"font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(style):
        figure, axes = plt.subplots(
            2,
            len(shown),
            figsize=(2.9 * len(shown), 4.6),
            sharex=True,
            sharey="row",
            squeeze=False,
            layout="constrained",
            height_ratios=(2, 1),
        )
        for (upper, lower), (name, found) in zip(axes.T, shown, strict=True):
            seconds = [each for each in found.seconds if each.at >= 1]  # the first makes connections
            at = [each.at for each in seconds]
            for label, values in (
                ("p50", [each.p50_ms for each in seconds]),
                ("p99", [each.p99_ms for each in seconds]),
                ("p99.9", [each.p99_9_ms for each in seconds]),
            ):
                upper.step(at, values, where="post", label=label, linewidth=1.2)
            lower.step(at, [each.ok for each in seconds], where="post", color="black", linewidth=1.2)
            for axis in (upper, lower):
                axis.axvspan(found.phases[1].begin, found.phases[1].end, color="gray", alpha=0.2, linewidth=0)
            upper.set_yscale("log")
            upper.set_title(name, fontsize=10)
        axes[0][0].set_ylabel("healthy disks, ms")
        axes[1][0].set_ylabel("right answers per s")
        axes[1][0].set_ylim(bottom=0)
        axes[0][0].legend(fontsize=8)
        figure.supxlabel("seconds; shaded: one of four disks hangs", fontsize=9)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _numbers(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(each) for each in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers, such as 2,4,8") from None
    if any(not 1 <= each <= 64 for each in numbers):
        raise click.BadParameter("from 1 to 64")
    return numbers


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--rows", default=",".join(WAYS), help="Rows of peers/rows.toml.")
@click.option("--disks", default="2,4,8,16", callback=_numbers, help="Numbers of disks, for diskread.")
@click.option("--hung", default="1,2,3", callback=_numbers, help="Numbers of them that hang.")
@click.option("--rate", type=click.FloatRange(1, 2000), default=400.0, help="Requests per second, all disks together.")
@click.option("--lead", type=click.FloatRange(2), default=10.0, help="Seconds before the hang.")
@click.option("--hang", "hanging", type=click.FloatRange(2), default=20.0, help="Seconds of hang.")
@click.option("--after", type=click.FloatRange(2), default=10.0, help="Seconds after it.")
@click.option("--patience", type=click.FloatRange(1), default=10.0, help="Seconds after which a client gives up.")
@click.option("--no-plot", is_flag=True, help="Leave the picture out; matplotlib is not needed then.")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=RESULTS, help="Directory for isolation.*."
)
def main(
    *,
    rows: str,
    disks: tuple[int, ...],
    hung: tuple[int, ...],
    rate: float,
    lead: float,
    hanging: float,
    after: float,
    patience: float,
    no_plot: bool,
    output: Path,
) -> None:
    """Measure what disks that hang cost those that do not, over time. Needs root and /dev/fuse.

    \b
    Examples:
      sudo python benchmarks/isolation.py                                  # half an hour
      sudo python benchmarks/isolation.py --lead 3 --hang 5 --after 3 --disks 4,8 --hung 1 --output /tmp/isolation
    """
    console = Console(stderr=True)
    known = {row.name: row for row in load_rows()}
    names = [each.strip() for each in rows.split(",") if each.strip()]
    if wrong := [name for name in names if name not in known]:
        raise click.UsageError(f"no such row: {', '.join(wrong)}; there are {', '.join(known)}")
    if (reason := FaultFS.why_not()) is not None:
        raise click.ClickException(f"no disk can be made to hang here: {reason}")
    try:
        build_generator()
    except RowError as error:
        raise click.ClickException(str(error)) from error
    if not no_plot and importlib.util.find_spec("matplotlib") is None:
        console.print("No picture: matplotlib is not installed (pip install 'diskread\\[plots]'). The rest goes on.")
        no_plot = True
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    settings = Settings(rate=rate, lead=lead, hang=hanging, after=after, hang_patience=patience)
    report = Report(
        format=1,
        started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=describe(),
        load_average=load_average(),
        settings=settings,
        scenarios=[],
    )
    output.mkdir(parents=True, exist_ok=True)
    runs = plan(names, disks, hung)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, refresh_per_second=1) as progress:
        task = progress.add_task("", total=len(runs))
        for name, count, sick in runs:
            title = f"{name}, {sick} of {count}"

            def say(what: str, title: str = title) -> None:
                progress.update(task, description=f"{title}: {what}")

            report.scenarios.append(_measure(known[name], count, sick, settings, say))
            (output / f"{NAME}.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
            progress.advance(task)
    if not no_plot:
        plot(report, output / f"{NAME}.png")
    text = markdown(report)
    (output / f"{NAME}.md").write_text(text, encoding="utf-8")
    click.echo(text)


def _measure(row: Row, disks: int, hung: int, settings: Settings, say: Callable[[str], None]) -> Scenario:
    if (lacks := row.lacks()) is not None:
        return Scenario(row=row.name, disks=disks, hung=hung, failure=lacks)
    try:
        row.make()
        each = msgspec.structs.replace(settings, rate=settings.rate / disks)
        found = hang(row, each, say, disks - hung, hung)
    except Exception as error:  # noqa: BLE001 - whatever it was: it belongs into the result, by name
        return Scenario(row=row.name, disks=disks, hung=hung, failure=f"{type(error).__name__}: {error}")
    return Scenario(row=row.name, disks=disks, hung=hung, found=found)


if __name__ == "__main__":
    main()
