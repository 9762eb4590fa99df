"""The table of the original experiment, measured: does a blocking read hold up the others, in ten languages and here?

And what the original could not ask: a disk that really hangs. README.md says what is asked and how to read it.
"""

from __future__ import annotations

import importlib.util
import os
import resource
import signal
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if not __package__:  # run as a script: its own directory is on the path, the one above is not
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import CpuClock, describe, load_average
from benchmarks.seed.load import build_generator
from benchmarks.seed.questions import QUICK, Answers, Settings, ask
from benchmarks.seed.report import SEED, Report, Result, markdown, plot, rewrite_readme, verdict
from benchmarks.seed.rows import REPOSITORY, Row, RowError, install, load_rows
from tests.faults.injectors import FaultFS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RESULTS = Path(__file__).resolve().parent / "results"
CACHE = REPOSITORY / ".cache" / "seedtable"
NAME = "seedtable"
QUESTIONS = [each.name for each in msgspec.structs.fields(Answers) if each.name != "failures"]


class _Names(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic in click 8.5 only
    """Names with commas between them."""

    name = "NAME,NAME,..."

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return tuple(each.strip() for each in str(value).split(",") if each.strip())


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rows", "names", type=_Names(), help="Only these rows.  [default: all]")
@click.option("--questions", type=_Names(), help=f"Only these questions: {', '.join(QUESTIONS)}.  [default: all]")
@click.option("--quick", is_flag=True, help="Short loads and a short hang: minutes for all, not for quoting.")
@click.option(
    "--install", "installing", is_flag=True, help="Install what is missing (apt-get and pip; as root), and end."
)
@click.option("--list", "listing", is_flag=True, help="Say which rows there are and what they lack, and end.")
@click.option("--no-plot", is_flag=True, help="Leave the pictures out; matplotlib is not needed then.")
@click.option("--readme", is_flag=True, help="Measure nothing: write the results that are there into README.md.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory for seedtable.json, .md and .png.  [default: benchmarks/results; .cache/seedtable when quick or "
    "not of all rows and questions]",
)
def main(
    *,
    names: tuple[str, ...] | None,
    questions: tuple[str, ...] | None,
    quick: bool,
    installing: bool,
    listing: bool,
    no_plot: bool,
    readme: bool,
    output: Path | None,
) -> None:
    """Start small servers in ten languages, and diskread, and ask each the same questions.

    \b
    one_slow, many_slow       20 fast requests beside one slow read of 5 s, and beside eight
    small_burst, large_burst  100 x 200 ms and 1,000 x 1 s at once
    line, http                requests per second: a connection each; kept alive
    hang                      a disk really hangs for 30 s under 200 requests per second, beside a healthy one
    bad_input                 what no good client would send

    Needs root and /dev/fuse for the hang. A row whose toolchain is missing says so in the result. Takes some half an
    hour for all rows, 6 to 9 minutes with --quick.

    \b
    Examples:
      sudo python benchmarks/seedtable.py --install
      sudo python benchmarks/seedtable.py
      sudo python benchmarks/seedtable.py --quick --rows diskread,go,eventlet
      sudo python benchmarks/seedtable.py --rows diskread --questions line,http
    """
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers are stopped and disks unmounted on the way out
    rows = _chosen(names)
    if wrong := [each for each in questions or () if each not in QUESTIONS]:
        raise click.UsageError(f"no such question: {', '.join(wrong)}; there are {', '.join(QUESTIONS)}")
    if output is None:
        output = CACHE if quick or names or questions else RESULTS
    try:
        if installing:
            install([row for _, row in rows if row is not None], click.echo)
            return
        if listing:
            for name, row in rows:
                click.echo(f"{name:20} {_lacks(row) or 'there'}")
            return
        if readme:
            _write_readme(output)
            return
        build_generator()
    except RowError as error:
        raise click.ClickException(str(error)) from error
    if not no_plot and importlib.util.find_spec("matplotlib") is None:
        console.print("No pictures: matplotlib is not installed (pip install 'diskread\\[plots]'). The rest goes on.")
        no_plot = True
    if (reason := FaultFS.why_not()) is not None and (not questions or "hang" in questions):
        console.print(f"No disk can be made to hang here: {reason}. The rest goes on, and the result says so.")
    report = _run(rows, QUICK if quick else Settings(), quick, questions or (), output, console)
    if not no_plot:
        plot(report, output)
    text = markdown(report)
    (output / f"{NAME}.md").write_text(text, encoding="utf-8")
    click.echo(text)


def _chosen(names: Sequence[str] | None) -> list[tuple[str, Row | None]]:
    """The rows in the order of the file; those of the original table that it does not have come with None."""
    found: dict[str, Row | None] = {row.name: row for row in load_rows() if row.table}
    for name in SEED:
        found.setdefault(name, None)
    if wrong := [name for name in names or () if name not in found]:
        raise click.UsageError(f"no such row: {', '.join(wrong)}; there are {', '.join(found)}")
    return [(name, row) for name, row in found.items() if not names or name in names]


def _lacks(row: Row | None) -> str | None:
    return "benchmarks/peers/rows.toml does not have it" if row is None else row.lacks()


def _run(
    rows: Sequence[tuple[str, Row | None]],
    settings: Settings,
    quick: bool,
    questions: Sequence[str],
    output: Path,
    console: Console,
) -> Report:
    """Ask all rows; what is known is written after each, so that nothing is lost when the run is cut short."""
    began = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    # The servers inherit it. Some would raise it themselves, some could not.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    report = Report(
        format=1,
        started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        quick=quick,
        machine=describe(),
        load_average=load_average(),
        settings=settings,
        results=[],
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Drawn by a thread, which takes its time from what is measured: seldom.
    with Progress(*columns, console=console, refresh_per_second=1) as progress:
        task = progress.add_task("", total=len(rows))
        for name, row in rows:

            def say(what: str, name: str = name) -> None:
                progress.update(task, description=f"{name}: {what}")

            result = _measure(name, row, settings, questions, say)
            report.results.append(result)
            report.duration_s = time.monotonic() - began
            (output / f"{NAME}.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
            progress.advance(task)
            said = f"not measured: {result.lacks}" if result.lacks else f"Problem? {verdict(result.answers)}"
            progress.console.print(f"{name}: {said}", markup=False, highlight=False)
    return report


def _measure(
    name: str, row: Row | None, settings: Settings, questions: Sequence[str], say: Callable[[str], None]
) -> Result:
    lacks = _lacks(row)
    if lacks is not None or row is None:
        return Result(name=name, row=row, lacks=lacks)
    toolchain = row.toolchain()
    try:
        say("building")
        row.make()
    except RowError as error:
        return Result(name=name, row=row, toolchain=toolchain, lacks=str(error))
    clock, before = CpuClock(), _childrens_cpu()
    answers = ask(row, settings, say, questions)
    share = clock.others_share()
    if share is not None:
        share -= (_childrens_cpu() - before) / (clock.elapsed_s() * (os.cpu_count() or 1))
    return Result(
        name=name,
        row=row,
        toolchain=toolchain,
        answers=answers,
        elapsed=clock.elapsed_s(),
        others_cpu_share=None if share is None else max(0.0, share),
    )


def _childrens_cpu() -> float:
    """CPU seconds of all processes that this one has started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _write_readme(output: Path) -> None:
    path = output / f"{NAME}.json"
    try:
        report = msgspec.json.decode(path.read_bytes(), type=Report)
        results = os.path.relpath(output, REPOSITORY)
        rewrite_readme(REPOSITORY / "README.md", report, results)
    except FileNotFoundError as error:
        raise click.ClickException(f"{path} is not there: run {NAME}.py first") from error
    except (ValueError, msgspec.ValidationError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"README.md says what {path} says.")


if __name__ == "__main__":
    main()
