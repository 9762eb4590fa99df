"""How near to the device do cold reads get? Beside fio, with threads and with io_uring, on the same file.

README.md says how to read the result.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import gevent
import msgspec
from gevent.threadpool import ThreadPool
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if not __package__:  # run as a script: its own directory is on the path, the one above is not
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import device_bytes_read, file_system
from benchmarks.report import (
    RESULTS,
    Environment,
    Run,
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
from diskread import Disk, Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PATTERNS = {"random": 4096, "sequential": 1 << 20}
"""How the readers go through their parts of the file, and the bytes of a read."""

NATIVE, POOL, PSYNC, RING = "diskread, native", "diskread, threadpool", "fio psync, threads", "fio io_uring"
APPLY = "gevent.threadpool.apply"
CHUNKS, READ, CAT = "DiskFile.chunks", "os.read of 128 KiB", "cat"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured.

    Attributes:
        depths: Reads at a time.
        rounds: How often everything is measured, all contenders in turn.
        seconds: Length of a measurement at most; it ends earlier when every block was read once.
        mebibytes: Length of the file.
        iops: Reads per second that the device is throttled to; None for what it can do.
    """

    depths: tuple[int, ...] = (1, 4, 16, 64)
    rounds: int = 3
    seconds: float = 0.7
    mebibytes: int = 1024
    iops: int | None = None


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement.

    Attributes:
        reads: Reads that were done.
        reads_per_s: By the clock.
        p50_s, p99_s: Latencies, in seconds; 0 where single reads are not looked at.
        cpu_s: CPU seconds per read, in all threads.
        device_share: Bytes that came from the device, through the bytes that were read; None where nobody counts.
            More than 1 with read-ahead.
    """

    reads: int
    reads_per_s: float
    p50_s: float
    p99_s: float
    cpu_s: float
    device_share: float | None


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One contender at one pattern and depth.

    Attributes:
        way: Its name.
        pattern: "random", "sequential" or "stream".
        depth: Reads at a time.
        samples: One per round.
    """

    way: str
    pattern: str
    depth: int
    samples: list[Sample]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one run of the benchmark found.

    Attributes:
        format: Version of this structure.
        environment: Where it was measured.
        file_system: Type of the file system.
        read_ahead_kb: Read-ahead of the device in KiB; None when it cannot be told.
        settings: How much was measured.
        verdicts: The promises.
        cells: The measurements.
    """

    format: int
    environment: Environment
    file_system: str
    read_ahead_kb: int | None
    settings: Settings
    verdicts: list[Verdict]
    cells: list[Cell]


# --- Contenders of ours: each measurement is a process of its own, as fio's are ---------------------------------------


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What a process measures: see `Cell` and `Settings`."""

    way: str
    pattern: str
    depth: int
    seconds: float
    path: str


def measure(task: Task) -> Sample:
    """Read every block once, in as many greenlets as the depth says, each in its own part of the file."""
    path = Path(task.path)
    if task.pattern == "stream":
        return stream(task, path)
    size = PATTERNS[task.pattern]
    blocks = path.stat().st_size // size // task.depth
    times: list[float] = []
    with contextlib.ExitStack() as stack:
        read = make_read(task, path, size, stack)
        ends = time.perf_counter() + task.seconds

        def go_through(part: int) -> None:
            order = list(range(blocks))
            if task.pattern == "random":
                random.Random(part).shuffle(order)
            for block in order:
                begin = time.perf_counter()
                if begin > ends:
                    break
                read((part * blocks + block) * size)
                times.append(time.perf_counter() - begin)

        readers = [gevent.spawn(go_through, part) for part in range(task.depth)]
        before, cpu, wall = device_bytes_read(), time.process_time(), time.perf_counter()
        ends = wall + task.seconds
        gevent.joinall(readers, raise_error=True)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        after = device_bytes_read()
    times.sort()
    return Sample(
        reads=len(times),
        reads_per_s=len(times) / wall,
        p50_s=times[len(times) // 2],
        p99_s=times[len(times) * 99 // 100],
        cpu_s=cpu / len(times),
        device_share=None if before is None or after is None else (after - before) / (len(times) * size),
    )


def make_read(task: Task, path: Path, size: int, stack: contextlib.ExitStack) -> Callable[[int], object]:
    if task.way == APPLY:
        pool = ThreadPool(task.depth)
        descriptor = os.open(path, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        return lambda offset: pool.apply(os.pread, (descriptor, size, offset))
    file = stack.enter_context(our_disk(task, path, stack).open(path.name, size=0))
    return lambda offset: file.read(offset, size)


def our_disk(task: Task, path: Path, stack: contextlib.ExitStack) -> Disk:
    limits: Any = {"threads": max(2, task.depth), "queue": task.depth, "deadline": 60.0}
    if "engine" in inspect.signature(Limits).parameters:
        limits["engine"] = "native" if task.way == NATIVE else "threadpool"
    return stack.enter_context(Disk("a", path.parent, Limits(**limits)))


def stream(task: Task, path: Path) -> Sample:
    """Read the file once from its begin to its end; a "read" is a MiB here."""
    total = 0
    with contextlib.ExitStack() as stack:
        if task.way == READ:
            descriptor = os.open(path, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            pieces: Iterator[bytes] = iter(lambda: os.read(descriptor, 128 * 1024), b"")
        else:
            native = msgspec.structs.replace(task, way=NATIVE if task.way.endswith("native") else POOL)
            pieces = stack.enter_context(our_disk(native, path, stack).open(path.name)).chunks()
        before, cpu, wall = device_bytes_read(), time.process_time(), time.perf_counter()
        ends = wall + 4 * task.seconds
        for piece in pieces:
            total += len(piece)
            if time.perf_counter() > ends:
                break
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        after = device_bytes_read()
    return Sample(
        reads=total >> 20,
        reads_per_s=total / 2**20 / wall,
        p50_s=0,
        p99_s=0,
        cpu_s=cpu / total * 2**20,
        device_share=None if before is None or after is None else (after - before) / total,
    )


# --- All contenders ---------------------------------------------------------------------------------------------------


class Throttle:
    """A blkio cgroup (version 1) whose members get no more reads per second from a device. Needs root."""

    def __init__(self, path: Path, iops: int, stack: contextlib.ExitStack) -> None:
        from tests.faults.injectors import _blkio_cgroup

        parent = _blkio_cgroup()
        if parent is None:
            raise click.ClickException("--iops needs root and a blkio cgroup (version 1)")
        self._cgroup = Path(tempfile.mkdtemp(prefix=f"coldread-{os.getpid()}-", dir=parent))
        stack.callback(self._cgroup.rmdir)
        device = whole_device(path)
        (self._cgroup / "blkio.throttle.read_iops_device").write_text(f"{device} {iops}")

    def enter(self) -> None:
        """Let the process that calls it in; between fork and exec."""
        (self._cgroup / "cgroup.procs").write_text(str(os.getpid()))


def whole_device(path: Path) -> str:
    """MAJ:MIN of the disk that a file is on; of the whole disk where that is a partition."""
    device = path.stat().st_dev
    own = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    disk = own.parent if (own / "partition").exists() else own
    return (disk / "dev").read_text().strip()


def read_ahead_kb(path: Path) -> int | None:
    try:
        return int(Path(f"/sys/dev/block/{whole_device(path)}/queue/read_ahead_kb").read_text())
    except (OSError, ValueError):
        return None


def measure_ours(task: Task, throttle: Throttle | None) -> Sample:
    command = [sys.executable, str(Path(__file__).resolve()), "--task", msgspec.json.encode(task).decode()]
    return msgspec.json.decode(output_of(command, throttle), type=Sample)


def measure_fio(task: Task, throttle: Throttle | None) -> Sample:
    size = PATTERNS[task.pattern]
    jobs = 1 if task.way == RING else task.depth
    part = Path(task.path).stat().st_size // size // jobs * size
    command = [
        *("fio", "--name=reader", f"--filename={task.path}", "--thread", "--group_reporting"),
        f"--rw={'randread' if task.pattern == 'random' else 'read'}",
        *(f"--bs={size}", f"--size={part}", f"--offset_increment={part}", f"--numjobs={jobs}"),
        *(("--ioengine=io_uring", f"--iodepth={task.depth}") if task.way == RING else ("--ioengine=psync",)),
        # Buffered, each block at most once (fio's random map), evicted at the begin, no advice to the kernel.
        *("--direct=0", "--invalidate=1", "--fadvise_hint=0", "--randrepeat=1"),
        *(f"--runtime={round(task.seconds * 1000)}ms", "--output-format=json"),
    ]
    text = output_of(command, throttle)
    found = json.loads(text[text.index("{") :])["jobs"][0]
    read, percentiles = found["read"], found["read"]["clat_ns"].get("percentile", {})
    count = max(1, read["total_ios"])
    seconds = read["runtime"] / 1000
    return Sample(
        reads=read["total_ios"],
        reads_per_s=count / max(seconds, 0.001),
        p50_s=percentiles.get("50.000000", 0) / 1e9,
        p99_s=percentiles.get("99.000000", 0) / 1e9,
        # Percentages of the average thread's time.
        cpu_s=(found["usr_cpu"] + found["sys_cpu"]) / 100 * seconds * jobs / count,
        device_share=None,
    )


def measure_cat(task: Task, throttle: Throttle | None) -> Sample:
    length = Path(task.path).stat().st_size
    begin = time.perf_counter()
    output_of(["cat", task.path], throttle, capture=False)
    wall = time.perf_counter() - begin
    mebibytes = length / 2**20
    return Sample(reads=int(mebibytes), reads_per_s=mebibytes / wall, p50_s=0, p99_s=0, cpu_s=0, device_share=None)


def output_of(command: Sequence[str], throttle: Throttle | None, *, capture: bool = True) -> str:
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE if capture else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        preexec_fn=None if throttle is None else throttle.enter,
    )
    if done.returncode:
        raise click.ClickException(f"{command[0]} failed: {(done.stderr or done.stdout or '').strip()[-500:]}")
    return done.stdout or ""


MEASURES: dict[str, Callable[[Task, Throttle | None], Sample]] = {
    PSYNC: measure_fio,
    RING: measure_fio,
    NATIVE: measure_ours,
    POOL: measure_ours,
    APPLY: measure_ours,
    f"{CHUNKS}, native": measure_ours,
    f"{CHUNKS}, threadpool": measure_ours,
    READ: measure_ours,
    CAT: measure_cat,
}


@contextlib.contextmanager
def test_file(directory: Path | None, mebibytes: int) -> Iterator[Path]:
    """A file of noise. It is read once, so that what lies beneath the device has met every block of it."""
    with tempfile.TemporaryDirectory(dir=directory) as place:
        path = Path(place) / "file"
        with path.open("wb") as file:
            for _ in range(mebibytes):
                file.write(os.urandom(1 << 20))
            file.flush()
            os.fsync(file.fileno())
        evict(path)
        with path.open("rb") as file:
            while file.read(1 << 20):
                pass
        yield path


def evict(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def run(settings: Settings, directory: Path | None, console: Console) -> Report:
    """Measure everything, with progress on the console."""
    about = Run()
    reading, streaming = [PSYNC, RING, NATIVE, POOL, APPLY], [f"{CHUNKS}, native", f"{CHUNKS}, threadpool", READ, CAT]
    if shutil.which("fio") is None:
        about.missing["fio"] = "not installed (apt-get install fio)"
        reading = [each for each in reading if each not in {PSYNC, RING}]
    else:
        about.versions["fio"] = output_of(["fio", "--version"], None).strip()
    if "engine" not in inspect.signature(Limits).parameters:
        about.missing["native engine"] = "this diskread has no Limits.engine"
        reading.remove(NATIVE)
        streaming.remove(f"{CHUNKS}, native")
    say(console, about.missing)
    console.print("Making the file ...")
    keys = [(way, pattern, depth) for pattern in PATTERNS for depth in settings.depths for way in reading]
    keys += [(way, "stream", 1) for way in streaming]
    found: dict[tuple[str, str, int], list[Sample]] = {key: [] for key in keys}
    progress = Progress(
        BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"), console=console
    )
    with test_file(directory, settings.mebibytes) as path, contextlib.ExitStack() as stack:
        throttle = None if settings.iops is None else Throttle(path, settings.iops, stack)
        kind, ahead = file_system(path), read_ahead_kb(path)
        with progress:
            bar = progress.add_task("", total=len(keys) * settings.rounds)
            for number in range(settings.rounds):
                for way, pattern, depth in keys if number % 2 else reversed(keys):
                    progress.update(bar, description=f"round {number + 1}: {way}, {pattern}, depth {depth}")
                    evict(path)
                    task = Task(way=way, pattern=pattern, depth=depth, seconds=settings.seconds, path=str(path))
                    try:
                        found[way, pattern, depth].append(MEASURES[way](task, throttle))
                    except click.ClickException as error:
                        if way != RING:
                            raise
                        about.missing[RING] = error.message  # io_uring may be forbidden
                    progress.update(bar, advance=1)
    cells = [Cell(way=way, pattern=what, depth=at, samples=some) for (way, what, at), some in found.items() if some]
    return Report(
        format=1,
        environment=about.environment(),
        file_system=kind,
        read_ahead_kb=ahead,
        settings=settings,
        verdicts=judge(cells),
        cells=cells,
    )


def judge(cells: Sequence[Cell]) -> list[Verdict]:
    """The promises about random reads at depth 16."""
    rates = {
        each.way: [sample.reads_per_s for sample in each.samples]
        for each in cells
        if (each.pattern, each.depth) == ("random", 16)
    }

    def verdict(way: str, bound: float) -> Verdict:
        ratio = None
        if way in rates and PSYNC in rates:
            ratio = spread([ours / fio for ours, fio in zip(rates[way], rates[PSYNC], strict=True)])
        promise = f"{way}: random reads of 4 KiB at depth 16, to fio psync"
        return Verdict(promise=promise, ratio=ratio, bound=bound, at_most=False)

    return [verdict(NATIVE, 0.9), verdict(POOL, 0.5)]


def tables(report: Report) -> list[Table]:
    """The result for people."""
    found = [verdict_table(report.verdicts)]
    for pattern in (*PATTERNS, "stream"):
        cells = [each for each in report.cells if each.pattern == pattern]
        random_ = pattern == "random"
        title = {
            "random": "Random reads of 4 KiB, cold",
            "sequential": "Sequential reads of 1 MiB, cold, each reader in a part of its own",
            "stream": "One stream through the file, cold",
        }[pattern]
        rate_name = "reads/s" if random_ else "MiB/s"
        reference = READ if pattern == "stream" else PSYNC
        header = ("depth, way", rate_name, f"x {reference}", "p50 us", "p99 us", "CPU us/read", "from device")
        table = Table(title, header)
        for depth in sorted({each.depth for each in cells}):
            here = {each.way: each.samples for each in cells if each.depth == depth}
            for way, samples in here.items():
                rates = [sample.reads_per_s for sample in samples]
                ratio = "-"
                if len(here.get(reference, ())) == len(samples):
                    pairs = zip(samples, here[reference], strict=True)
                    ratios = [sample.reads_per_s / its.reads_per_s for sample, its in pairs]
                    ratio = with_range(spread(ratios), three_digits)
                shares = [sample.device_share for sample in samples if sample.device_share is not None]
                p50, p99, cpu = (
                    three_digits(spread([getattr(sample, name) for sample in samples]).median * 1e6)
                    for name in ("p50_s", "p99_s", "cpu_s")
                )
                share = f"{spread(shares).median:.0%}" if shares else "-"
                table.rows.append(
                    [f"{depth}, {way}", with_range(spread(rates), three_digits), ratio, p50, p99, cpu, share]
                )
        found.append(table)
    return found


def plot(report: Report, path: Path) -> None:
    """Draw reads per second by depth."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for axis, pattern in zip(axes, PATTERNS, strict=True):
        shown = [each for each in report.cells if each.pattern == pattern]
        for way in dict.fromkeys(each.way for each in shown):
            cells = [each for each in shown if each.way == way]
            rates = [spread([sample.reads_per_s for sample in each.samples]) for each in cells]
            depths = [each.depth for each in cells]
            line = axis.plot(depths, [each.median for each in rates], "o-" if "disk" in way else "s--", label=way)
            low, high = [each.low for each in rates], [each.high for each in rates]
            axis.fill_between(depths, low, high, alpha=0.12, color=line[0].get_color())
        axis.set_xscale("log", base=2)
        axis.set_xticks(report.settings.depths, [str(each) for each in report.settings.depths])
        axis.set_ylim(bottom=0)
        axis.set_xlabel("reads at a time")
        axis.set_title(f"{'4 KiB' if pattern == 'random' else '1 MiB'} {pattern}, cold: reads/s", loc="left")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--quick", is_flag=True, help="A look in half a minute; too short for figures that one would quote.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    help="Directory for coldread.json, coldread.md and coldread.png.  [default: results/ beside this file]",
)
@click.option("--no-plot", is_flag=True, help="Leave the picture out; matplotlib is not needed then.")
@click.option(
    "--directory",
    type=click.Path(exists=True, file_okay=False, writable=True, path_type=Path),
    help="Where the file is put: choose the disk to measure, not a tmpfs.  [default: temporary directory]",
)
@click.option("--depths", callback=parse_numbers, metavar="N,N,...", help="Reads at a time.  [default: 1,4,16,64]")
@click.option("--rounds", type=click.IntRange(1, 100), help="How often everything is measured.  [default: 3]")
@click.option("--seconds", type=click.FloatRange(0.1, 60), help="Length of a measurement at most.  [default: 0.7]")
@click.option(
    "--size",
    "mebibytes",
    type=click.IntRange(64),
    metavar="MIB",
    help="Length of the file.  [default: 1024]",
)
@click.option(
    "--iops",
    type=click.IntRange(1),
    help="Throttle the device to so many reads per second for all, as a slower disk would (root, blkio v1).",
)
@click.option("--task", hidden=True, help="One measurement, for this program itself.")
def main(
    quick: bool,
    output: Path,
    no_plot: bool,
    directory: Path | None,
    depths: tuple[int, ...] | None,
    rounds: int | None,
    seconds: float | None,
    mebibytes: int | None,
    iops: int | None,
    task: str | None,
) -> None:
    """How near to the device do cold reads get?

    Reads a file that was evicted from the page cache, 4 KiB at random and 1 MiB in sequence, with 1 to 64 reads at a
    time: both engines of diskread, gevent's threadpool, and fio with threads (psync) and with io_uring, on the same
    file, each block at most once. Besides, one stream through the file, to see that read-ahead works. Takes under 3
    minutes; best on a machine that does nothing else. On a device that answers within microseconds the CPU decides:
    --iops gives one that is more like a disk.

    \b
    Examples:
      python benchmarks/coldread.py --directory /srv/disk1
      python benchmarks/coldread.py --quick --output /tmp/coldread
      sudo python benchmarks/coldread.py --iops 2000 --output /tmp/coldread
    """
    if task is not None:
        click.echo(msgspec.json.encode(measure(msgspec.json.decode(task, type=Task))))
        sys.stdout.flush()
        os._exit(0)
    errors = Console(stderr=True)
    settings = Settings(depths=(1, 16), rounds=1, seconds=0.5, mebibytes=256) if quick else Settings()
    given = {"depths": depths, "rounds": rounds, "seconds": seconds, "mebibytes": mebibytes, "iops": iops}
    settings = msgspec.structs.replace(settings, **{name: value for name, value in given.items() if value is not None})
    report = run(settings, directory, errors)
    output.mkdir(parents=True, exist_ok=True)
    drawn = not no_plot
    if drawn:
        try:
            plot(report, output / "coldread.png")
        except ImportError:
            drawn = False
            errors.print("No picture: matplotlib is not installed (pip install 'diskread\\[plots]').")
    found = tables(report)
    throttled = "" if settings.iops is None else f" Throttled to {settings.iops} reads per second."
    intro = (
        f"Medians of {settings.rounds} rounds [lowest-highest]; {settings.mebibytes} MiB on {report.file_system}, "
        f"read-ahead of the device {report.read_ahead_kb} KiB.{throttled}"
    )
    text = document("Cold reads: results", "coldread", intro, report.environment, found, drawn)
    write(output, "coldread", report, text, found)


if __name__ == "__main__":
    main()
