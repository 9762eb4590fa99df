"""One of four disks stops answering for a minute: what do the others notice, and what do its own callers get?

The sick disk is an ext4 on a block device that stops (readers in state D), the healthy ones are plain directories; the
load is open-loop. See README.md for how to read the result.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from hdrh.histogram import HdrHistogram
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

if not __package__:  # run as a script: its own directory is on the path, the one above is not
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.load import Answer, Load, Plan
from benchmarks.machine import CpuClock, Machine, describe, load_average
from tests.faults.injectors import Dying, SetupError, drop_cached
from tests.server.raw_client import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

RESULTS = Path(__file__).resolve().parent / "results"
SICK, HEALTHY = "sick", ("h1", "h2", "h3")

THREADS = 8
DEADLINE = 2.0
OFFLINE_AFTER = 3.0
PROBE_INTERVAL_MAX = 4.0

SETTLED = 1.0
"""Seconds after OFFLINE was seen, and before the lift, that do not count as "once OFFLINE"."""

WINDOW = 5.0
MICROSECOND = 1e-6
LOOK_OFTEN, LOOK_SELDOM = 0.02, 0.5  # seconds between two looks at /status


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """What the clients of the healthy disks got in a part of the run.

    Attributes:
        name: "before", "hang", or "after".
        seconds: Its length.
        requests: Requests that were due in it.
        succeeded: Those of them that got the right bytes.
        per_second: Right answers per second.
        p50_ms: Median of the time from when a request was due to its last byte.
        p99_ms: 99th percentile of the same.
        p99_9_ms: 99.9th percentile of the same.
        max_ms: The worst.
        window_p99_ms: 99th percentile of each 5 s in a row: how much it swings by itself.
        histogram: All of them in microseconds, an encoded HdrHistogram.
    """

    name: str
    seconds: float
    requests: int
    succeeded: int
    per_second: float
    p50_ms: float
    p99_ms: float
    p99_9_ms: float
    max_ms: float
    window_p99_ms: list[float]
    histogram: str


class Rejections(msgspec.Struct, frozen=True, kw_only=True):
    """What the clients of the sick disk got once it was OFFLINE: by status, and how fast they were turned away."""

    statuses: dict[str, int]
    p50_ms: float
    p99_ms: float
    max_ms: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The result. Times are in seconds if they do not say otherwise, sizes in bytes."""

    machine: Machine
    load_average: tuple[float, float, float]
    others_cpu_share: float | None
    rate: float
    phases: list[Phase]
    sick_statuses: dict[str, int]
    rejections: Rejections
    offline_after: float
    detection: float
    recovery: float
    probe_interval_max: float
    threads_limit: int
    sick_threads_most: int
    process_threads_most: int
    memory_before: int
    memory_most: int
    memory_after: int


class Look:
    """Looks at the server while it works: the state of the sick disk, threads and memory."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self.state = "online"
        self.sick_threads_most = 0
        self.process_threads_most = 0
        self.memory_most = 0

    def __call__(self) -> float:
        """Look once; returns the time of it."""
        disk = self._server.disk(SICK)
        now = time.monotonic()
        self.state = disk.state
        self.sick_threads_most = max(self.sick_threads_most, disk.threads)
        self.process_threads_most = max(self.process_threads_most, self._server.threads())
        self.memory_most = max(self.memory_most, self._server.memory())
        return now

    def until(self, ends: float, advance: Callable[[], None]) -> None:
        """Look now and then until a time has come."""
        while time.monotonic() < ends:
            self()
            advance()
            time.sleep(max(0.0, min(LOOK_SELDOM, ends - time.monotonic())))

    def until_state(self, state: str, patience: float) -> float:
        """Look often until the disk is in a state; returns the time at which it was first seen to be."""
        ends = time.monotonic() + patience
        while (now := self()) < ends:
            if self.state == state:
                return now
            time.sleep(LOOK_OFTEN)
        raise click.ClickException(f"the sick disk was not {state} within {patience:g} s, but {self.state}")


def run(lead: float, hang: float, rate: float, console: Console) -> Report:
    """Measure: `lead` seconds before, `hang` seconds of hang, `lead` seconds after."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        roots = {name: directory / name for name in (SICK, *HEALTHY)}
        for number, root in enumerate(roots.values()):
            write_files(root, number)
        dying = stack.enter_context(Dying(roots[SICK], max_stall=hang + 60))
        server = stack.enter_context(serving({**roots, SICK: dying.root}, directory))
        total = lead + hang + lead
        begin = time.monotonic() + 1.5
        load = Load(
            Plan(
                port=server.port,
                begin=begin,
                seconds=total,
                rate=rate,
                timeout=DEADLINE + 10,
                seed=0,
                content={name: str(root) for name, root in roots.items()},
                output=str(directory / "answers"),
            )
        )
        stack.callback(load.kill)
        clock, average, look = CpuClock(), load_average(), Look(server)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        progress = stack.enter_context(Progress(*columns, console=console, transient=True))
        task = progress.add_task("before", total=total)

        def advance() -> None:
            progress.update(task, completed=max(0.0, time.monotonic() - begin))

        look.until(begin + lead, advance)
        memory_before = server.memory()
        files = [each for each in dying.root.iterdir() if each.is_file()]
        progress.update(task, description="hang")
        dying.hang()
        hung = time.monotonic()
        for file in files:
            drop_cached(file)  # the reads of the first phase have filled the page cache, which never hangs
        offline = look.until_state("offline", OFFLINE_AFTER + 30)
        look.until(hung + hang, advance)
        progress.update(task, description="after")
        lifted = time.monotonic()
        dying.release()
        online = look.until_state("online", PROBE_INTERVAL_MAX + 30)
        look.until(begin + total, advance)
        answers = load.answers()
        share = clock.others_share()
        memory_after = server.memory()
        if server.stop() != 0:
            raise click.ClickException("the server did not end in peace")
    phases = [
        phase("before", answers, begin, hung),
        phase("hang", answers, hung, lifted),
        phase("after", answers, lifted, begin + total),
    ]
    return Report(
        machine=describe(),
        load_average=average,
        others_cpu_share=share,
        rate=rate,
        phases=phases,
        sick_statuses=statuses([each for each in answers if each.disk == SICK]),
        rejections=rejections(answers, offline + SETTLED, lifted - SETTLED),
        offline_after=OFFLINE_AFTER,
        detection=offline - hung,
        recovery=online - lifted,
        probe_interval_max=PROBE_INTERVAL_MAX,
        threads_limit=THREADS,
        sick_threads_most=look.sick_threads_most,
        process_threads_most=look.process_threads_most,
        memory_before=memory_before,
        memory_most=look.memory_most,
        memory_after=memory_after,
    )


def write_files(root: Path, number: int) -> None:
    """Eight files that no other disk has."""
    root.mkdir()
    for k in range(8):
        (root / f"f{k}").write_bytes(b"".join(b"%d %d %09d\n" % (number, k, line) for line in range(80_000)))


@contextlib.contextmanager
def serving(roots: dict[str, Path], directory: Path) -> Iterator[ServerProcess]:
    config = directory / "diskread.toml"
    lines = ["[limits]", f"threads = {THREADS}", f"deadline = {DEADLINE}", f"offline_after = {OFFLINE_AFTER}"]
    lines += [f"probe_interval_max = {PROBE_INTERVAL_MAX}"]
    for name, root in roots.items():
        lines += [f"[disk.{name}]", f'root = "{root}"']
    config.write_text("\n".join(lines))
    server = ServerProcess(directory, "--config", str(config))
    try:
        yield server
    finally:
        server.kill()


def phase(name: str, answers: Sequence[Answer], begin: float, end: float) -> Phase:
    """The healthy disks' requests that were due between two times."""
    due = [each for each in answers if each.disk in HEALTHY and begin <= each.due < end]
    right = [each for each in due if each.status == 206]
    histogram = latencies(right)
    return Phase(
        name=name,
        seconds=end - begin,
        requests=len(due),
        succeeded=len(right),
        per_second=len(right) / (end - begin),
        p50_ms=percentile_ms(histogram, 50),
        p99_ms=percentile_ms(histogram, 99),
        p99_9_ms=percentile_ms(histogram, 99.9),
        max_ms=histogram.get_max_value() / 1000,
        window_p99_ms=[percentile_ms(latencies(window), 99) for window in windows(right, begin, end)],
        histogram=histogram.encode().decode("ascii"),
    )


def windows(answers: Sequence[Answer], begin: float, end: float) -> list[list[Answer]]:
    """The answers by the 5 s in which their requests were due, without what is left over at the end."""
    found: list[list[Answer]] = [[] for _ in range(int((end - begin + 0.5) // WINDOW))]
    for each in answers:
        number = int((each.due - begin) // WINDOW)
        if number < len(found):
            found[number].append(each)
    return [window for window in found if window]


def rejections(answers: Sequence[Answer], begin: float, end: float) -> Rejections:
    """What the sick disk's requests that were due between two times got."""
    due = [each for each in answers if each.disk == SICK and begin <= each.due < end]
    histogram = latencies(due)
    return Rejections(
        statuses=statuses(due),
        p50_ms=percentile_ms(histogram, 50),
        p99_ms=percentile_ms(histogram, 99),
        max_ms=histogram.get_max_value() / 1000,
    )


def latencies(answers: Sequence[Answer]) -> HdrHistogram:
    histogram = HdrHistogram(1, 60_000_000, 3)  # microseconds
    for each in answers:
        histogram.record_value(max(1, round((each.end - each.due) / MICROSECOND)))
    return histogram


def percentile_ms(histogram: HdrHistogram, percentile: float) -> float:
    microseconds: int = histogram.get_value_at_percentile(percentile)
    return microseconds / 1000


def statuses(answers: Sequence[Answer]) -> dict[str, int]:
    return {str(status): count for status, count in sorted(Counter(each.status for each in answers).items())}


def markdown(report: Report) -> str:
    """The report as tables."""
    before = report.phases[0]
    lines = [
        "# One of four disks hangs",
        "",
        "Written by `python benchmarks/hang.py`; how to read it is in [README.md](../README.md).",
        "",
        f"Open-loop load, {report.rate:g} requests per second and disk, {report.phases[1].seconds:.0f} s of hang.",
        "",
        "## Healthy disks",
        "",
        "| phase | requests | right answers | per second | p50 ms | p99 ms | p99.9 ms | max ms | p99 : before |"
        " per second : before | p99 of each 5 s: median (least, most) |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    lines += [
        f"| {each.name} | {each.requests} | {each.succeeded} | {each.per_second:.1f} | {each.p50_ms:.2f} "
        f"| {each.p99_ms:.2f} | {each.p99_9_ms:.2f} | {each.max_ms:.2f} | {each.p99_ms / before.p99_ms:.2f} "
        f"| {each.per_second / before.per_second:.3f} | {statistics.median(each.window_p99_ms):.2f} "
        f"({min(each.window_p99_ms):.2f}, {max(each.window_p99_ms):.2f}) |"
        for each in report.phases
    ]
    rejected = report.rejections
    rows = [
        (f"detection (offline_after is {report.offline_after:g} s)", f"{report.detection:.2f} s"),
        (
            f"recovery after the lift (probe_interval_max is {report.probe_interval_max:g} s)",
            f"{report.recovery:.2f} s",
        ),
        ("answers once OFFLINE, by status", str(rejected.statuses)),
        ("rejection once OFFLINE, p50", f"{rejected.p50_ms:.2f} ms"),
        ("rejection once OFFLINE, p99", f"{rejected.p99_ms:.2f} ms"),
        ("all answers of the sick disk, by status", str(report.sick_statuses)),
        (f"threads of the sick disk at most (limit {report.threads_limit})", str(report.sick_threads_most)),
        ("threads of the process at most", str(report.process_threads_most)),
        ("memory at its most, against before the hang", mib(report.memory_most - report.memory_before)),
        ("memory at the end, against before the hang", mib(report.memory_after - report.memory_before)),
    ]
    lines += [
        "",
        "## The disk that hangs",
        "",
        "| | |",
        "| --- | --: |",
        *[f"| {what} | {value} |" for what, value in rows],
    ]
    share = "unknown" if report.others_cpu_share is None else f"{report.others_cpu_share:.0%}"
    machine = [*report.machine.lines(), ("Load average at the start", f"{report.load_average[0]:.2f}")]
    machine += [("CPU time of other processes, server and load among them", share)]
    lines += ["", "## Machine", "", "| | |", "| --- | --- |", *[f"| {what} | {value} |" for what, value in machine]]
    return "\n".join(lines) + "\n"


def mib(size: int) -> str:
    return f"{size / 2**20:+.1f} MiB"


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--lead", type=click.FloatRange(5), default=20.0, help="Seconds before, and again after, the hang.")
@click.option("--hang", type=click.FloatRange(8), default=60.0, help="Seconds of hang.")
@click.option("--rate", type=click.FloatRange(1), default=100.0, help="Requests per second and disk.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    help="Directory for hang.json and hang.md.",
)
def main(lead: float, hang: float, rate: float, output: Path) -> None:
    """Measure what a hung disk costs the healthy ones, and how fast its own callers are turned away.

    Needs root, /dev/fuse, a loop device and mkfs.ext4: the disk really hangs.
    """
    try:
        report = run(lead, hang, rate, Console(stderr=True))
    except SetupError as error:
        raise click.ClickException(str(error)) from error
    output.mkdir(parents=True, exist_ok=True)
    (output / "hang.json").write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    text = markdown(report)
    (output / "hang.md").write_text(text, encoding="utf-8")
    click.echo(text)


if __name__ == "__main__":
    main()
