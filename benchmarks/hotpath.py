"""What does one read of cached data cost: directly, our ways, and those of others?

README.md says how to read the result.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if not __package__:  # run as a script: its own directory is on the path, the one above is not
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.loop import ext4
from benchmarks.machine import file_system
from benchmarks.report import (
    RESULTS,
    Environment,
    Run,
    Spread,
    Table,
    Verdict,
    document,
    parse_numbers,
    say,
    spread,
    three_digits,
    verdict_table,
    with_range,
    write,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

READERS = Path(__file__).resolve().parent / "readers.py"
SPANS = {4096: 1 << 20, 65_536: 4 << 20, 1 << 20: 16 << 20}
"""Sizes of a read, and of the range of the file that is read again and again."""

PREAD = "os.pread"
BY_PATH = "Disk.read, inline"
BY_FILE = "DiskFile.read, inline"
INLINE_FILE_SYSTEMS = {"ext4", "xfs"}


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured.

    Attributes:
        concurrency: Numbers of readers at a time.
        rounds: How often everything is measured, all ways in turn.
        window_s: Least time of one measurement, in seconds.
        most: Reads of one measurement at most.
    """

    concurrency: tuple[int, ...] = (1, 64)
    rounds: int = 9
    window_s: float = 0.06
    most: int = 20_000


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One way to read, at one size and concurrency.

    Attributes:
        way: Its name.
        bytes: Bytes of a read.
        concurrency: Readers at a time.
        reads: Reads of each round.
        wall_s: Seconds per read by the clock, one value per round.
        cpu_s: CPU seconds per read in all threads, one value per round.
        to_pread: `wall_s` through that of os.pread in the same round.
    """

    way: str
    bytes: int
    concurrency: int
    reads: int
    wall_s: list[float]
    cpu_s: list[float]
    to_pread: Spread


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one run of the benchmark found.

    Attributes:
        format: Version of this structure.
        environment: Where it was measured.
        file_system: Type of the file system.
        settings: How much was measured.
        verdicts: The promises.
        cells: The measurements.
    """

    format: int
    environment: Environment
    file_system: str
    settings: Settings
    verdicts: list[Verdict]
    cells: list[Cell]


class Process:
    """A process that has a family of readers."""

    def __init__(self, family: str, directory: Path) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(READERS), family, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        about = self._answer()
        self.readers: list[str] = about["readers"]
        self.versions: dict[str, str] = about["versions"]
        self.missing: dict[str, str] = about["missing"]

    def measure(self, **request: Any) -> dict[str, float]:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(request) + "\n")
        self._child.stdin.flush()
        answer: dict[str, float] = self._answer()
        return answer

    def _answer(self) -> Any:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise click.ClickException("a process with readers has ended; what it said is above")
        return json.loads(line)

    def close(self) -> None:
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        try:
            self._child.wait(5)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        assert self._child.stdout is not None
        self._child.stdout.close()


@contextlib.contextmanager
def test_directory(directory: Path | None, console: Console) -> Iterator[Path]:
    """A directory with the file, on a file system that the inline path supports, if that can be had."""
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=directory)))
        if file_system(place) not in INLINE_FILE_SYSTEMS:
            try:
                place = stack.enter_context(ext4(64, directory))
            except RuntimeError as error:
                console.print(
                    f"Reads inline are off on {file_system(place)}, and an ext4 cannot be made here ({error}).",
                    markup=False,
                )
        file = place / "file"
        file.write_bytes(os.urandom(max(SPANS.values())))
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
        file.read_bytes()
        yield place


def calibrate(process: Process, request: dict[str, Any], settings: Settings) -> int:
    """How many reads fill the window; a warm-up as well."""
    concurrency: int = request["concurrency"]
    count = concurrency
    while True:
        found = process.measure(**request, count=count)
        if found["wall_s"] * count >= settings.window_s / 4 or count >= settings.most:
            return max(concurrency, min(settings.most, int(settings.window_s / found["wall_s"])))
        count = min(settings.most, count * 4)


def run(settings: Settings, families: Sequence[str], directory: Path | None, console: Console) -> Report:
    """Measure everything, with progress on the console."""
    about = Run()
    with test_directory(directory, console) as place, contextlib.ExitStack() as stack:
        kind = file_system(place)
        ways: dict[str, Process] = {}
        for family in families:
            process = Process(family, place)
            stack.callback(process.close)
            ways.update(dict.fromkeys(process.readers, process))
            about.versions.update(process.versions)
            about.missing.update(process.missing)
        say(console, about.missing)
        keys = [(way, size, number) for size in SPANS for number in settings.concurrency for way in ways]
        counts: dict[tuple[str, int, int], int] = {}
        found: dict[tuple[str, int, int], list[dict[str, float]]] = {key: [] for key in keys}
        progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=console,
            auto_refresh=False,  # drawn between the measurements, not beside them
        )
        with progress:
            task = progress.add_task("warm-up", total=len(keys) * (settings.rounds + 1))
            for number in range(settings.rounds + 1):
                # Forwards and backwards in turn: whatever drifts on the machine meets all of them.
                for key in keys if number % 2 else reversed(keys):
                    way, size, concurrency = key
                    request = {"name": way, "path": "file", "size": size, "span": SPANS[size]}
                    request["concurrency"] = concurrency
                    if number == 0:
                        counts[key] = calibrate(ways[way], request, settings)
                    else:
                        found[key].append(ways[way].measure(**request, count=counts[key]))
                    progress.update(task, advance=1, description=f"round {number} of {settings.rounds}, {way}")
                    progress.refresh()
    cells = []
    for way, size, concurrency in keys:
        walls = [each["wall_s"] for each in found[way, size, concurrency]]
        preads = [each["wall_s"] for each in found[PREAD, size, concurrency]]
        cells.append(
            Cell(
                way=way,
                bytes=size,
                concurrency=concurrency,
                reads=counts[way, size, concurrency],
                wall_s=walls,
                cpu_s=[each["cpu_s"] for each in found[way, size, concurrency]],
                to_pread=spread([wall / pread for wall, pread in zip(walls, preads, strict=True)]),
            )
        )
    return Report(
        format=1,
        environment=about.environment(),
        file_system=kind,
        settings=settings,
        verdicts=judge(cells),
        cells=cells,
    )


def judge(cells: Sequence[Cell]) -> list[Verdict]:
    """The promises about cached reads of 4 KiB, one after another."""
    walls = {each.way: each.wall_s for each in cells if (each.bytes, each.concurrency) == (4096, 1)}

    def verdict(promise: str, above: str, below: str, bound: float, at_most: bool) -> Verdict:
        both = [walls.get(above), walls.get(below)]
        ratio = None
        if both[0] and both[1]:
            ratio = spread([first / second for first, second in zip(both[0], both[1], strict=True)])
        return Verdict(promise=promise, ratio=ratio, bound=bound, at_most=at_most)

    pool, tpool = "gevent.threadpool.apply", "eventlet.tpool"
    return [
        verdict("Disk.read by path, to a bare os.pread", BY_PATH, PREAD, 5, True),
        verdict("an open DiskFile, to a bare os.pread", BY_FILE, PREAD, 2, True),
        verdict(f"{pool} to an open DiskFile, both open", f"{pool}, open file", BY_FILE, 15, False),
        verdict(f"{pool} to Disk.read, both by path", f"{pool}, by path", BY_PATH, 15, False),
        verdict(f"{tpool} to an open DiskFile, both open", f"{tpool}, open file", BY_FILE, 30, False),
        verdict(f"{tpool} to Disk.read, both by path", f"{tpool}, by path", BY_PATH, 30, False),
    ]


def tables(report: Report) -> list[Table]:
    """The result for people."""
    found = [verdict_table(report.verdicts)]
    for size in SPANS:
        for concurrency in report.settings.concurrency:
            cells = [each for each in report.cells if (each.bytes, each.concurrency) == (size, concurrency)]
            if not cells:
                continue
            who = "one after another" if concurrency == 1 else f"{concurrency} readers"
            table = Table(
                f"Cached reads of {size // 1024} KiB, {who}", ("way", "us per read", "CPU us per read", "x os.pread")
            )
            for each in sorted(cells, key=lambda cell: cell.to_pread.median):
                wall, cpu = spread(each.wall_s), spread(each.cpu_s)
                table.rows.append(
                    [
                        each.way,
                        with_range(wall, lambda seconds: three_digits(seconds * 1e6)),
                        three_digits(cpu.median * 1e6),
                        with_range(each.to_pread, three_digits),
                    ]
                )
            found.append(table)
    return found


def plot(report: Report, path: Path) -> None:
    """Draw the cost per read of 4 KiB, one after another and at once."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    shown = [each for each in report.cells if each.bytes == 4096]
    numbers = sorted({each.concurrency for each in shown})
    figure, axes = plt.subplots(1, len(numbers), figsize=(6.5 * len(numbers), 6), layout="constrained", squeeze=False)
    for axis, number in zip(axes[0], numbers, strict=True):
        cells = sorted(
            (each for each in shown if each.concurrency == number), key=lambda each: -spread(each.wall_s).median
        )
        values = [spread(each.wall_s) for each in cells]
        middle = [each.median * 1e6 for each in values]
        error = [
            [(each.median - each.low) * 1e6 for each in values],
            [(each.high - each.median) * 1e6 for each in values],
        ]
        colors = ["#1f77b4" if "Disk" in each.way else "#7f7f7f" for each in cells]
        axis.barh([each.way for each in cells], middle, xerr=error, color=colors)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("us per read of 4 KiB from the page cache (lower is better)")
        axis.set_title("one after another" if number == 1 else f"{number} readers at once", loc="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--quick", is_flag=True, help="A look in 20 seconds; too short for figures that one would quote.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    help="Directory for hotpath.json, hotpath.md and hotpath.png.  [default: results/ beside this file]",
)
@click.option("--no-plot", is_flag=True, help="Leave the picture out; matplotlib is not needed then.")
@click.option(
    "--directory",
    type=click.Path(exists=True, file_okay=False, writable=True, path_type=Path),
    help="Where the file is put; where that is no ext4 or xfs, in an image (root).  [default: temporary directory]",
)
@click.option("--concurrency", callback=parse_numbers, metavar="N,N,...", help="Readers at a time.  [default: 1,64]")
@click.option("--rounds", type=click.IntRange(1, 100), help="How often everything is measured.  [default: 9]")
@click.option("--window", type=click.FloatRange(0.001, 10), metavar="SECONDS", help="Least time of a measurement.")
@click.option(
    "--family",
    "families",
    multiple=True,
    type=click.Choice(["gevent", "eventlet", "asyncio", "trio"]),
    help="Only these; repeat for several. gevent, which has the reference, always takes part.  [default: all]",
)
def main(
    quick: bool,
    output: Path,
    no_plot: bool,
    directory: Path | None,
    concurrency: tuple[int, ...] | None,
    rounds: int | None,
    window: float | None,
    families: tuple[str, ...],
) -> None:
    """What does one read of cached data cost: directly, our ways, and those of others?

    Reads the same cached range of a file in every way, in turn: bare system calls, the inline path and both engines
    of diskread, gevent's threadpool and FileObjectThread, eventlet's tpool, asyncio, aiofiles, aiofile, anyio and
    trio. The last ones are in processes of their own, which take turns with the others. Takes under 3 minutes; best on
    a machine that does nothing else. The others come with: pip install --group bench

    \b
    Examples:
      python benchmarks/hotpath.py
      python benchmarks/hotpath.py --quick --output /tmp/hotpath
      python benchmarks/hotpath.py --family gevent --concurrency 1,8,64 --directory /srv/disk1
    """
    errors = Console(stderr=True)
    settings = Settings(rounds=3, window_s=0.02) if quick else Settings()
    given = {"concurrency": concurrency, "rounds": rounds, "window_s": window}
    settings = msgspec.structs.replace(settings, **{name: value for name, value in given.items() if value is not None})
    chosen = list(dict.fromkeys(("gevent", *families))) if families else ["gevent", "eventlet", "asyncio", "trio"]
    begin = time.monotonic()
    report = run(settings, chosen, directory, errors)
    errors.print(f"{time.monotonic() - begin:.0f} s")
    output.mkdir(parents=True, exist_ok=True)
    drawn = not no_plot
    if drawn:
        try:
            plot(report, output / "hotpath.png")
        except ImportError:
            drawn = False
            errors.print("No picture: matplotlib is not installed (pip install 'diskread\\[plots]').")
    found = tables(report)
    intro = f"Medians of {settings.rounds} rounds [lowest-highest]; file system: {report.file_system}."
    write(
        output,
        "hotpath",
        report,
        document("Cached reads: results", "hotpath", intro, report.environment, found, drawn),
        found,
    )


if __name__ == "__main__":
    main()
