"""What does a cold read cost when the hub computes meanwhile, and who waits: for the disk, the thread or the GIL?

README.md says how to read the result.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import gevent
import msgspec
from gevent.threadpool import ThreadPool
from hdrh.histogram import HdrHistogram
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if not __package__:  # run as a script: its own directory is on the path, the one above is not
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import diskread.disk
from benchmarks.machine import device_bytes_read, file_system
from benchmarks.report import (
    RESULTS,
    Environment,
    Run,
    Spread,
    Table,
    document,
    say,
    spread,
    three_digits,
    with_range,
    write,
)
from diskread import Disk, Limits
from diskread._syscalls import CloseMode, Job

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Read = Callable[[int], Job]

SIZE = 4096
NATIVE, POOL, APPLY = "diskread, native", "diskread, threadpool", "gevent.threadpool.apply"
LONGEST_NS = 60 * 10**9


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured.

    Attributes:
        shares: Shares of its time that the hub computes, in percent.
        burst_s: Length of a computation without a switch of greenlets, in seconds.
        readers: Greenlets that read, one read after another each.
        rounds: How often everything is measured, all ways in turn.
        seconds: Length of a measurement.
        mebibytes: Length of the file; each block of it is read at most once in a measurement.
    """

    shares: tuple[int, ...] = (0, 25, 50, 75)
    burst_s: float = 0.005
    readers: int = 4
    rounds: int = 5
    seconds: float = 1.5
    mebibytes: int = 512


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """Durations, in seconds."""

    p50: float
    p99: float
    p99_9: float


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement.

    Attributes:
        reads: How many reads ended.
        busy_share: Share of the time that the hub did compute (0 to 1).
        device_share: Bytes that came from the device, through the bytes that were read; None where nobody counts.
        total: From the call to its return.
        disk: Of it, in the system calls, counted without the GIL.
        added: Of it, the rest: waiting for a thread, for the GIL and for the hub.
        histogram: All totals in nanoseconds: an HdrHistogram in its compressed base64 form.
    """

    reads: int
    busy_share: float
    device_share: float | None
    total: Percentiles
    disk: Percentiles
    added: Percentiles
    histogram: str


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One way to read beside one share of computation.

    Attributes:
        way: Its name.
        share: Percent of the time that the hub should compute.
        samples: One per round.
    """

    way: str
    share: int
    samples: list[Sample]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one run of the benchmark found.

    Attributes:
        format: Version of this structure.
        environment: Where it was measured.
        file_system: Type of the file system.
        settings: How much was measured.
        cells: The measurements.
    """

    format: int
    environment: Environment
    file_system: str
    settings: Settings
    cells: list[Cell]


class Computation:
    """A greenlet that computes in bursts, without system calls and without a switch, for a share of the time."""

    def __init__(self, burst_s: float, share: int) -> None:
        self._burst, self._pause = burst_s, burst_s * (100 - share) / max(1, share)
        self.busy_s = 0.0
        self._greenlet = gevent.spawn(self._run) if share else None

    def _run(self) -> None:
        while True:
            begin = now = time.perf_counter()
            while now - begin < self._burst:
                sum(range(200))
                now = time.perf_counter()
            self.busy_s += now - begin
            gevent.sleep(self._pause)

    def stop(self) -> None:
        if self._greenlet is not None:
            self._greenlet.kill()


def percentiles(values: Sequence[int]) -> tuple[Percentiles, str]:
    histogram = HdrHistogram(1, LONGEST_NS, 3)
    for value in values:
        histogram.record_value(max(1, min(value, LONGEST_NS)))
    p50, p99, p99_9 = (histogram.get_value_at_percentile(each) / 1e9 for each in (50, 99, 99.9))
    encoded = histogram.encode()
    return Percentiles(p50=p50, p99=p99, p99_9=p99_9), encoded.decode() if isinstance(encoded, bytes) else encoded


def measure(read: Read, path: Path, share: int, settings: Settings) -> Sample:
    """Read cold blocks while the hub computes."""
    evict(path)
    order = list(range(path.stat().st_size // SIZE))
    random.Random(share).shuffle(order)
    blocks = iter(order)
    totals: list[int] = []
    disks: list[int] = []

    def read_on(ends: float) -> None:
        for block in blocks:
            begin = time.perf_counter_ns()
            if begin > ends:
                return
            job = read(block * SIZE)
            totals.append(time.perf_counter_ns() - begin)
            disks.append(job.finished_ns - job.started_ns)

    computation = Computation(settings.burst_s, share)
    before, begin = device_bytes_read(), time.perf_counter()
    ends = time.perf_counter_ns() + settings.seconds * 1e9
    gevent.joinall([gevent.spawn(read_on, ends) for _ in range(settings.readers)], raise_error=True)
    elapsed, after = time.perf_counter() - begin, device_bytes_read()
    computation.stop()
    total, histogram = percentiles(totals)
    return Sample(
        reads=len(totals),
        busy_share=computation.busy_s / elapsed,
        device_share=None if before is None or after is None else (after - before) / (len(totals) * SIZE),
        total=total,
        disk=percentiles(disks)[0],
        added=percentiles([total - disk for total, disk in zip(totals, disks, strict=True)])[0],
        histogram=histogram,
    )


def make_read(way: str, path: Path, threads: int, stack: contextlib.ExitStack) -> Read:
    """A function that reads a block and returns the job that did it."""
    if way == APPLY:
        pool = ThreadPool(threads)
        descriptor = os.open(path, os.O_RDONLY)
        stack.callback(os.close, descriptor)

        def apply(offset: int) -> Job:
            job = Job(descriptor=descriptor, borrowed=True, offset=offset, size=SIZE, close_mode=CloseMode.CLOSE_NEVER)
            pool.apply(job.run)
            job.take_data()
            return job

        return apply
    options = inspect.signature(Limits).parameters
    wanted: dict[str, Any] = {"inline": "off", "engine": "native" if way == NATIVE else "threadpool"}
    limits: dict[str, Any] = {name: value for name, value in wanted.items() if name in options}
    disk = stack.enter_context(Disk("a", path.parent, Limits(threads=threads, **limits)))
    file = stack.enter_context(disk.open(path.name, size=0))
    module: Any = diskread.disk
    made: dict[Any, Job] = {}

    def make_job(**arguments: Any) -> Job:
        job = made[gevent.getcurrent()] = Job(**arguments)
        return job

    def read(offset: int) -> Job:
        # How long a read was at the disk is not part of the public interface: look at the job that it makes.
        module.Job = make_job
        file.read(offset, SIZE)
        return made[gevent.getcurrent()]

    return read


@contextlib.contextmanager
def test_file(directory: Path | None, mebibytes: int) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=directory) as place:
        path = Path(place) / "file"
        with path.open("wb") as file:
            for _ in range(mebibytes):
                file.write(os.urandom(1 << 20))
            file.flush()
            os.fsync(file.fileno())
        yield path


def evict(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def run(settings: Settings, directory: Path | None, console: Console) -> Report:
    """Measure everything, with progress on the console."""
    about, ways = Run(), [NATIVE, POOL, APPLY]
    if "engine" not in inspect.signature(Limits).parameters:
        about.missing[NATIVE] = "this diskread has no Limits.engine"
        ways.remove(NATIVE)
    say(console, about.missing)
    console.print("Making the file ...")
    keys = [(share, way) for share in settings.shares for way in ways]
    found: dict[tuple[int, str], list[Sample]] = {key: [] for key in keys}
    progress = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
        auto_refresh=False,  # a thread that draws would need the GIL
    )
    with test_file(directory, settings.mebibytes) as path, contextlib.ExitStack() as stack, progress:
        kind = file_system(path)
        reads = {way: make_read(way, path, settings.readers, stack) for way in ways}
        for read in reads.values():
            read(0)
        bar = progress.add_task("", total=len(keys) * settings.rounds)
        for number in range(settings.rounds):
            for share, way in keys if number % 2 else reversed(keys):
                progress.update(bar, description=f"round {number + 1}: {way}, hub computes {share}%")
                progress.refresh()
                found[share, way].append(measure(reads[way], path, share, settings))
                progress.update(bar, advance=1)
    return Report(
        format=1,
        environment=about.environment(),
        file_system=kind,
        settings=settings,
        cells=[Cell(way=way, share=share, samples=samples) for (share, way), samples in found.items()],
    )


def over_rounds(cell: Cell, part: str, percentile: str) -> Spread:
    """A percentile of a part of the latency, over the rounds."""
    return spread([getattr(getattr(sample, part), percentile) for sample in cell.samples])


def tables(report: Report) -> list[Table]:
    """The result for people."""
    found = []
    for share in report.settings.shares:
        header = ("way", "reads", "from device", *(f"{part} {p}" for p in ("p50", "p99", "p99.9") for part in PARTS))
        cells = [each for each in report.cells if each.share == share]
        busy = spread([sample.busy_share for each in cells for sample in each.samples])
        note = f"The hub did compute {busy.low:.0%} to {busy.high:.0%} of the time. Times in ms."
        table = Table(f"The hub computes {share}% of the time", header, note)
        for cell in cells:
            shares = [sample.device_share for sample in cell.samples if sample.device_share is not None]
            times = [
                with_range(over_rounds(cell, part, percentile), lambda seconds: three_digits(seconds * 1000))
                if part == "added"
                else three_digits(over_rounds(cell, part, percentile).median * 1000)
                for percentile in ("p50", "p99", "p99_9")
                for part in PARTS
            ]
            reads = str(sum(sample.reads for sample in cell.samples))
            table.rows.append([cell.way, reads, f"{spread(shares).median:.0%}" if shares else "-", *times])
        found.append(table)
    return found


PARTS = ("total", "disk", "added")


def plot(report: Report, path: Path) -> None:
    """Draw what was added to the time at the disk."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, percentile in zip(axes, ("p50", "p99"), strict=True):
        for way in dict.fromkeys(each.way for each in report.cells):
            cells = [each for each in report.cells if each.way == way]
            values = [over_rounds(each, "added", percentile) for each in cells]
            shares = [each.share for each in cells]
            axis.plot(shares, [each.median * 1000 for each in values], "o-", label=way)
            axis.fill_between(
                shares, [each.low * 1000 for each in values], [each.high * 1000 for each in values], alpha=0.12
            )
        axis.set_title(f"Added to the time at the disk, {percentile}", loc="left")
        axis.set_xlabel("% of the time that the hub computes")
        axis.set_ylabel("ms (lower is better)")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--quick", is_flag=True, help="A look in 10 seconds; too short for figures that one would quote.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    help="Directory for busyhub.json, busyhub.md and busyhub.png.  [default: results/ beside this file]",
)
@click.option("--no-plot", is_flag=True, help="Leave the picture out; matplotlib is not needed then.")
@click.option(
    "--directory",
    type=click.Path(exists=True, file_okay=False, writable=True, path_type=Path),
    help="Where the file is put: choose the disk to measure, not a tmpfs.  [default: temporary directory]",
)
@click.option("--rounds", type=click.IntRange(1, 100), help="How often everything is measured.  [default: 5]")
@click.option("--seconds", type=click.FloatRange(0.1, 60), help="Length of a measurement.  [default: 1.5]")
@click.option(
    "--burst", "burst_ms", type=click.FloatRange(0.1, 1000), metavar="MS", help="Length of a computation.  [default: 5]"
)
@click.option("--readers", type=click.IntRange(1, 64), help="Greenlets that read.  [default: 4]")
def main(
    quick: bool,
    output: Path,
    no_plot: bool,
    directory: Path | None,
    rounds: int | None,
    seconds: float | None,
    burst_ms: float | None,
    readers: int | None,
) -> None:
    """What does a cold read cost when the hub computes meanwhile?

    Four greenlets read 4 KiB blocks that are not in the page cache, while another one computes in bursts of 5 ms for
    0 to 75% of the time. Of each read, the time at the disk is known (counted without the GIL); the rest was added
    by the hop to a thread, the GIL and the hub, which cannot answer while it computes. Takes under 2 minutes; best
    on a machine that does nothing else.

    \b
    Examples:
      python benchmarks/busyhub.py --directory /srv/disk1
      python benchmarks/busyhub.py --quick --output /tmp/busyhub
    """
    errors = Console(stderr=True)
    settings = Settings(shares=(0, 50), rounds=2, seconds=0.5, mebibytes=128) if quick else Settings()
    burst = None if burst_ms is None else burst_ms / 1000
    given = {"rounds": rounds, "seconds": seconds, "burst_s": burst, "readers": readers}
    settings = msgspec.structs.replace(settings, **{name: value for name, value in given.items() if value is not None})
    report = run(settings, directory, errors)
    output.mkdir(parents=True, exist_ok=True)
    drawn = not no_plot
    if drawn:
        try:
            plot(report, output / "busyhub.png")
        except ImportError:
            drawn = False
            errors.print("No picture: matplotlib is not installed (pip install 'diskread\\[plots]').")
    found = tables(report)
    intro = (
        f"Medians of {settings.rounds} rounds of {settings.seconds:g} s [lowest-highest]; {settings.readers} readers, "
        f"bursts of {settings.burst_s * 1000:g} ms; file system: {report.file_system}."
    )
    text = document("Cold reads beside a busy hub: results", "busyhub", intro, report.environment, found, drawn)
    write(output, "busyhub", report, text, found)


if __name__ == "__main__":
    main()
