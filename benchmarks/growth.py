"""How cost grows: with the requests that are stuck, with the disks, and with the connections. README.md says more."""

from __future__ import annotations

import contextlib
import importlib.util
import resource
import socket
import sys
import tempfile
import time
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
from benchmarks.seed.load import Latencies, Planned, build_generator, latencies, open_loop
from benchmarks.seed.process import Peer, Usage
from benchmarks.seed.report import OURS, OURS_NATIVE, table
from benchmarks.seed.rows import Row, RowError, load_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RESULTS = Path(__file__).resolve().parent / "results"
NAME = "growth"
WAYS = (OURS, OURS_NATIVE, "c", "python-threads")

FAST, STUCK = 0, 1
STUCK_MS = 5000
ARRIVAL = 1.0
"""Seconds over which the stuck requests arrive: all at once would measure their arrival."""
RATE, BEGIN, SECONDS = 200, 1.5, 2.0
"""Of the fast requests: per second, from when, for how long. All of it before a request has waited for 4 s in a queue,
which is when servers answer it."""
PATIENCE = 30.0


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement.

    Attributes:
        row: Of which server.
        what: "stuck", "disks" or "connections".
        count: How many of them.
        idle: What the server used before.
        used: What it used with them, at most.
        fast: What became of the requests to a healthy disk meanwhile; None where there were none.
        start: Seconds from its start to its first answer.
        failure: Why it could not be measured.
    """

    row: str
    what: str
    count: int
    idle: Usage | None = None
    used: Usage | None = None
    fast: Latencies | None = None
    start: float | None = None
    failure: str | None = None


class Report(msgspec.Struct, kw_only=True):
    """Everything that a run found."""

    format: int
    started: str
    machine: Machine
    load_average: tuple[float, float, float]
    points: list[Point]


def _directories(parent: Path, count: int) -> list[str]:
    names = ["healthy", *(f"disk{number}" for number in range(1, count))]
    for name in names:
        (parent / name).mkdir()
        (parent / name / "f0").write_bytes(b"x" * 16_384)
    return names


@contextlib.contextmanager
def _server(row: Row, disks: int) -> Any:
    with tempfile.TemporaryDirectory(prefix="growth-") as directory:
        names = _directories(Path(directory), disks)
        with Peer(row, Path(directory), names) as peer:
            yield peer


def _fast() -> list[Planned]:
    return [Planned(BEGIN + k / RATE, FAST, "0,0,healthy/f0") for k in range(round(SECONDS * RATE))]


def _most(used: Sequence[Usage]) -> Usage:
    return Usage(0.0, max(each.memory for each in used), max(each.threads for each in used))


def _loaded(peer: Peer, plan: Sequence[Planned]) -> tuple[Latencies, Usage]:
    used: list[Usage] = [peer.usage()]
    seen = open_loop(peer.port, plan, PATIENCE, lambda _: used.append(peer.usage()))
    return latencies([each for each in seen.answers if each.tag == FAST], PATIENCE), _most(used)


def stuck(row: Row, count: int) -> Point:
    """Requests of 5 s for no disk in particular, and fast ones to a healthy disk beside them."""
    with _server(row, 1) as peer:
        idle = peer.usage()
        plan = [Planned(k / count * ARRIVAL, STUCK, f"0,{STUCK_MS},stuck") for k in range(count)]
        fast, used = _loaded(peer, plan + _fast())
    return Point(row=row.name, what="stuck", count=count, idle=idle, used=used, fast=fast)


def connections(row: Row, count: int) -> Point:
    """Connections that say nothing, and fast requests to a healthy disk beside them."""
    if row.name == OURS:
        row = msgspec.structs.replace(row, start=[*row.start, "--connections", str(count + 1000)])
    with _server(row, 1) as peer, contextlib.ExitStack() as stack:
        idle = peer.usage()
        for _ in range(count):
            stack.enter_context(socket.create_connection(("127.0.0.1", peer.port), 10.0))
        fast, used = _loaded(peer, _fast())
    return Point(row=row.name, what="connections", count=count, idle=idle, used=used, fast=fast)


def disks(row: Row, count: int) -> Point:
    """Directories that are disks, from the start of the server to its first answer."""
    with tempfile.TemporaryDirectory(prefix="growth-") as directory:
        names = _directories(Path(directory), count)
        begin = time.monotonic()
        with Peer(row, Path(directory), names) as peer:
            took = time.monotonic() - begin
            idle = peer.usage()
            for name in names:
                peer.ask(f"0,0,{name}/f0\n".encode(), 10.0)
            used = peer.usage()
    return Point(row=row.name, what="disks", count=count, idle=idle, used=used, start=took)


def markdown(report: Report) -> str:
    """The report as tables."""
    titles = {
        "stuck": f"Requests that are stuck for {STUCK_MS / 1000:g} s",
        "disks": "Disks",
        "connections": "Connections that say nothing",
    }
    lines = [
        "# How cost grows",
        "",
        "Written by `python benchmarks/growth.py`; how to read it is in [README.md](../README.md#growthpy).",
        "",
        "![Memory, threads and latency](growth.png)",
    ]
    head = ["row", "how many", "MiB idle", "MiB with them", "KiB each", "threads", "p50, ms", "p99, ms", "failed"]
    head += ["start, s"]
    for what, title in titles.items():
        rows = [_line(each) for each in report.points if each.what == what]
        if rows:
            lines += ["", f"## {title}", "", *table(head, rows)]
    machine = [
        *report.machine.lines(),
        ("Run", report.started),
        ("Load average before it", f"{report.load_average[0]:.2f}"),
    ]
    return "\n".join([*lines, "", "## Machine", "", *table(("", ""), machine, left=2)]) + "\n"


def _line(point: Point) -> list[str]:
    if point.idle is None or point.used is None:
        return [point.row, f"{point.count:,}", f"not measured: {point.failure}", *[""] * 7]
    fast = point.fast
    return [
        point.row,
        f"{point.count:,}",
        f"{point.idle.memory / 2**20:.1f}",
        f"{point.used.memory / 2**20:.1f}",
        f"{(point.used.memory - point.idle.memory) / 1024 / point.count:.1f}",
        f"{point.used.threads:,}",
        "" if fast is None else f"{fast.p50_ms:,.1f}",
        "" if fast is None else f"{fast.p99_ms:,.1f}",
        "" if fast is None else f"{fast.count - fast.ok:,}",
        "" if point.start is None else f"{point.start:.2f}",
    ]


def plot(report: Report, path: Path) -> None:
    """Draw memory, threads and latency over the number of stuck requests and of connections.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    ways: list[tuple[str, Callable[[Point], float | None]]] = [
        ("resident memory, MiB", lambda p: p.used.memory / 2**20 if p.used else None),
        ("threads", lambda p: p.used.threads if p.used else None),
        ("p99 of a healthy disk, ms", lambda p: p.fast.p99_ms if p.fast else None),
    ]
    style: dict[Any, Any] = {"font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
    with mpl.rc_context(style):
        figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
        for line, what in zip(axes, ("stuck", "connections"), strict=True):
            for axis, (title, value) in zip(line, ways, strict=True):
                for name in dict.fromkeys(each.row for each in report.points if each.used):
                    points = [each for each in report.points if each.row == name and each.what == what and each.used]
                    axis.plot([each.count for each in points], [value(each) for each in points], "o-", label=name)
                axis.set_xscale("log")
                axis.set_yscale("log")
                axis.set_xlabel("requests that are stuck" if what == "stuck" else "connections that say nothing")
                axis.set_title(title, fontsize=10)
        axes[0][0].legend(fontsize=8)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _numbers(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(each) for each in value.split(",") if each)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers, such as 10,100,1000") from None
    if any(not 1 <= each <= 20_000 for each in numbers):
        raise click.BadParameter("from 1 to 20000")
    return numbers


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--rows", default=",".join(WAYS), help="Rows of peers/rows.toml.")
@click.option("--stuck", "stuck_counts", default="10,100,500,1000,2000,5000", callback=_numbers, help="Stuck requests.")
@click.option("--disks", "disk_counts", default="1,4,16,64", callback=_numbers, help="Disks, for diskread.")
@click.option(
    "--connections", "connection_counts", default="10,100,1000,5000,10000", callback=_numbers, help="Idle connections."
)
@click.option("--no-plot", is_flag=True, help="Leave the picture out; matplotlib is not needed then.")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=RESULTS, help="Directory for growth.*."
)
def main(
    *,
    rows: str,
    stuck_counts: tuple[int, ...],
    disk_counts: tuple[int, ...],
    connection_counts: tuple[int, ...],
    no_plot: bool,
    output: Path,
) -> None:
    """Measure what stuck requests, disks and connections cost in memory, threads and latency. A few minutes.

    \b
    Examples:
      python benchmarks/growth.py
      python benchmarks/growth.py --rows diskread --stuck 10,1000 --disks 1,64 --connections 100 --output /tmp/growth
    """
    console = Console(stderr=True)
    known = {row.name: row for row in load_rows()}
    names = [each.strip() for each in rows.split(",") if each.strip()]
    try:
        build_generator()
    except RowError as error:
        raise click.ClickException(str(error)) from error
    if not no_plot and importlib.util.find_spec("matplotlib") is None:
        console.print("No picture: matplotlib is not installed (pip install 'diskread\\[plots]'). The rest goes on.")
        no_plot = True
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    report = Report(
        format=1,
        started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=describe(),
        load_average=load_average(),
        points=[],
    )
    runs: list[tuple[str, str, int, Callable[[Row, int], Point]]] = []
    runs += [(name, "stuck", count, stuck) for name in names for count in stuck_counts]
    runs += [(OURS, "disks", count, disks) for count in disk_counts if OURS in names]
    runs += [(name, "connections", count, connections) for name in names for count in connection_counts]
    output.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, refresh_per_second=1) as progress:
        task = progress.add_task("", total=len(runs))
        for name, what, count, measure in runs:
            progress.update(task, description=f"{name}: {count:,} {what}")
            report.points.append(_measured(known.get(name), name, what, count, measure))
            (output / f"{NAME}.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
            progress.advance(task)
    if not no_plot:
        plot(report, output / f"{NAME}.png")
    text = markdown(report)
    (output / f"{NAME}.md").write_text(text, encoding="utf-8")
    click.echo(text)


def _measured(row: Row | None, name: str, what: str, count: int, measure: Callable[[Row, int], Point]) -> Point:
    lacks = "benchmarks/peers/rows.toml does not have it" if row is None else row.lacks()
    if row is None or lacks is not None:
        return Point(row=name, what=what, count=count, failure=lacks)
    try:
        row.make()
        return measure(row, count)
    except Exception as error:  # noqa: BLE001 - whatever it was: it belongs into the result, by name
        return Point(row=name, what=what, count=count, failure=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
