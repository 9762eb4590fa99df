"""One of four disks stops answering for a minute: what do the others notice, and what do its own callers get?

The sick disk is an ext4 on a block device that stops (readers in state D), the healthy ones are plain directories; the
load is open-loop. A second disk that stops is one that nobody uses: it must be found out all the same. Runs in which
nothing hangs come in between, to tell the hang from the weather. See README.md for how to read the result.
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
SICK, UNUSED, HEALTHY = "sick", "unused", ("h1", "h2", "h3")

THREADS = 8
DEADLINE = 2.0
OFFLINE_AFTER = 3.0
IDLE_PROBE = 6.0
PROBE_INTERVAL_MAX = 4.0

SETTLED = 1.0
"""Seconds after OFFLINE was seen, and before the lift, that do not count as "once OFFLINE"."""

WARM_UP = 2.0
"""Seconds at the begin that do not count: connections are made and caches are filled."""

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


class Sick(msgspec.Struct, frozen=True, kw_only=True):
    """The disk that hangs. Times in seconds.

    Attributes:
        detection: From the begin of the hang to OFFLINE.
        detection_unused: The same of the disk that nobody uses.
        recovery: From the lift to ONLINE.
        rejections: What its clients got once it was OFFLINE.
        statuses: What they got in all, by status.
        threads_most: Native threads of it at most.
    """

    detection: float
    detection_unused: float
    recovery: float
    rejections: Rejections
    statuses: dict[str, int]
    threads_most: int


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a server.

    Attributes:
        phases: What the healthy disks' clients got before, during and after the hang (or the same times without one).
        sick: None where nothing hung.
        process_threads_most: Native threads of the server at most.
        memory_before: Resident memory of the server in bytes before the hang.
        memory_most: The same at its most.
        memory_after: The same at the end.
        others_cpu_share: Share of the machine's CPU time that others used, the server and the load among them.
    """

    phases: list[Phase]
    sick: Sick | None
    process_threads_most: int
    memory_before: int
    memory_most: int
    memory_after: int
    others_cpu_share: float | None

    def ratio_of_p99(self) -> float:
        """p99 of the healthy disks in the middle phase against the first."""
        return self.phases[1].p99_ms / self.phases[0].p99_ms

    def ratio_of_throughput(self) -> float:
        """Right answers per second in the middle phase against the first."""
        return self.phases[1].per_second / self.phases[0].per_second


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The result. Times are in seconds, sizes in bytes."""

    machine: Machine
    load_average: tuple[float, float, float]
    rate: float
    sick_rate: float
    offline_after: float
    idle_probe: float
    probe_interval_max: float
    threads_limit: int
    runs: list[Run]


class Look:
    """Looks at the server while it works: the state of the sick disk, threads and memory."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self.states: dict[str, str] = {}
        self.sick_threads_most = 0
        self.process_threads_most = 0
        self.memory_most = 0

    def __call__(self) -> float:
        """Look once; returns the time of it."""
        disks = {name: self._server.disk(name) for name in (SICK, UNUSED)}
        now = time.monotonic()
        self.states = {name: disk.state for name, disk in disks.items()}
        self.sick_threads_most = max(self.sick_threads_most, disks[SICK].threads)
        self.process_threads_most = max(self.process_threads_most, self._server.threads())
        self.memory_most = max(self.memory_most, self._server.memory())
        return now

    def until(self, ends: float, advance: Callable[[], None]) -> None:
        """Look now and then until a time has come."""
        while time.monotonic() < ends:
            self()
            advance()
            time.sleep(max(0.0, min(LOOK_SELDOM, ends - time.monotonic())))

    def until_states(self, state: str, patience: float) -> dict[str, float]:
        """Look often until both disks that hang are in a state; returns when each of them first was."""
        ends = time.monotonic() + patience
        seen: dict[str, float] = {}
        while (now := self()) < ends:
            for name, each in self.states.items():
                if each == state:
                    seen.setdefault(name, now)
            if len(seen) == len(self.states):
                return seen
            time.sleep(LOOK_OFTEN)
        raise click.ClickException(f"the disks were not {state} within {patience:g} s, but {self.states}")


def run(lead: float, hang: float, rate: float, sick_rate: float, hangs: bool, console: Console) -> Run:
    """Measure: `lead` seconds before, `hang` seconds of hang (or of none), `lead` seconds after."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        roots = {name: directory / name for name in (SICK, UNUSED, *HEALTHY)}
        for number, root in enumerate(roots.values()):
            write_files(root, number)
        sick = {name: stack.enter_context(Dying(roots[name], max_stall=hang + 60)) for name in (SICK, UNUSED)}
        served = {**roots, **{name: dying.root for name, dying in sick.items()}}
        server = stack.enter_context(serving(served, directory))
        total = lead + hang + lead
        begin = time.monotonic() + 1.5
        load = Load(
            Plan(
                port=server.port,
                begin=begin,
                seconds=total,
                rate=rate,
                rates={SICK: sick_rate},
                timeout=DEADLINE + 10,
                seed=0,
                content={name: str(root) for name, root in roots.items() if name != UNUSED},
                output=str(directory / "answers"),
            )
        )
        stack.callback(load.kill)
        clock, look = CpuClock(), Look(server)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        progress = stack.enter_context(Progress(*columns, console=console, transient=True))
        task = progress.add_task("before", total=total)

        def advance() -> None:
            progress.update(task, completed=max(0.0, time.monotonic() - begin))

        look.until(begin + lead, advance)
        memory_before = server.memory()
        files = [each for dying in sick.values() for each in dying.root.iterdir() if each.is_file()]
        progress.update(task, description="hang" if hangs else "no hang")
        hung = time.monotonic()
        offline = {}
        if hangs:
            for dying in sick.values():
                dying.hang()
            for file in files:
                drop_cached(file)  # the reads of the first phase have filled the page cache, which never hangs
            offline = look.until_states("offline", OFFLINE_AFTER + IDLE_PROBE + 30)
        look.until(hung + hang, advance)
        progress.update(task, description="after")
        lifted = time.monotonic()
        online = {}
        if hangs:
            for dying in sick.values():
                dying.release()
            online = look.until_states("online", PROBE_INTERVAL_MAX + 30)
        look.until(begin + total, advance)
        answers = load.answers()
        share = clock.others_share()
        memory_after = server.memory()
        if server.stop() != 0:
            raise click.ClickException("the server did not end in peace")
    return Run(
        phases=[
            phase("before", answers, begin + WARM_UP, hung),
            phase("hang" if hangs else "no hang", answers, hung, lifted),
            phase("after", answers, lifted, begin + total),
        ],
        sick=Sick(
            detection=offline[SICK] - hung,
            detection_unused=offline[UNUSED] - hung,
            recovery=online[SICK] - lifted,
            rejections=rejections(answers, offline[SICK] + SETTLED, lifted - SETTLED),
            statuses=statuses([each for each in answers if each.disk == SICK]),
            threads_most=look.sick_threads_most,
        )
        if hangs
        else None,
        process_threads_most=look.process_threads_most,
        memory_before=memory_before,
        memory_most=look.memory_most,
        memory_after=memory_after,
        others_cpu_share=share,
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
    lines += [f"idle_probe = {IDLE_PROBE}", f"probe_interval_max = {PROBE_INTERVAL_MAX}"]
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
    middle = report.runs[0].phases[1]
    lines = [
        "# One of four disks hangs",
        "",
        "Written by `python benchmarks/hang.py`; how to read it is in [README.md](../README.md).",
        "",
        f"Open-loop load, {report.rate:g} requests per second and healthy disk, {report.sick_rate:g} to the one that "
        f"hangs, {middle.seconds:.0f} s of hang.",
        "",
        "## Healthy disks",
        "",
        "| runs | p99 in the middle : before, median | each run | per second in the middle : before, median | least |",
        "| --- | --: | --: | --: | --: |",
    ]
    for name, hangs in (("a disk hangs", True), ("nothing hangs", False)):
        runs = [each for each in report.runs if (each.sick is not None) == hangs]
        if runs:
            p99, throughput = [each.ratio_of_p99() for each in runs], [each.ratio_of_throughput() for each in runs]
            lines.append(
                f"| {name} | {statistics.median(p99):.2f} | {', '.join(f'{each:.2f}' for each in p99)} "
                f"| {statistics.median(throughput):.3f} | {min(throughput):.3f} |"
            )
    lines += [
        "",
        "| run | phase | requests | right answers | per second | p50 ms | p99 ms | p99.9 ms | max ms |"
        " p99 of each 5 s: median (least, most) |",
        "| --: | --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    lines += [
        f"| {number} | {each.name} | {each.requests} | {each.succeeded} | {each.per_second:.1f} | {each.p50_ms:.2f} "
        f"| {each.p99_ms:.2f} | {each.p99_9_ms:.2f} | {each.max_ms:.2f} | {statistics.median(each.window_p99_ms):.2f} "
        f"({min(each.window_p99_ms):.2f}, {max(each.window_p99_ms):.2f}) |"
        for number, run in enumerate(report.runs, 1)
        for each in run.phases
    ]
    hung = [(run, run.sick) for run in report.runs if run.sick is not None]
    rows: list[tuple[str, list[str]]] = [
        (
            f"detection (offline_after is {report.offline_after:g} s)",
            [f"{sick.detection:.2f} s" for _, sick in hung],
        ),
        (
            f"detection of the disk that nobody uses (idle_probe is {report.idle_probe:g} s)",
            [f"{sick.detection_unused:.2f} s" for _, sick in hung],
        ),
        (
            f"recovery after the lift (probe_interval_max is {report.probe_interval_max:g} s)",
            [f"{sick.recovery:.2f} s" for _, sick in hung],
        ),
        ("answers once OFFLINE, by status", [str(sick.rejections.statuses) for _, sick in hung]),
        ("rejection once OFFLINE, p50", [f"{sick.rejections.p50_ms:.2f} ms" for _, sick in hung]),
        ("rejection once OFFLINE, p99", [f"{sick.rejections.p99_ms:.2f} ms" for _, sick in hung]),
        ("all answers of the sick disk, by status", [str(sick.statuses) for _, sick in hung]),
        (f"its threads at most (limit {report.threads_limit})", [str(sick.threads_most) for _, sick in hung]),
        ("threads of the process at most", [str(run.process_threads_most) for run, _ in hung]),
        (
            "memory at its most, against before the hang",
            [mib(run.memory_most - run.memory_before) for run, _ in hung],
        ),
        (
            "memory at the end, against before the hang",
            [mib(run.memory_after - run.memory_before) for run, _ in hung],
        ),
    ]
    numbers = [number for number, run in enumerate(report.runs, 1) if run.sick is not None]
    lines += [
        "",
        "## The disk that hangs",
        "",
        f"| | {' | '.join(f'run {number}' for number in numbers)} |",
        f"| --- |{' --: |' * len(numbers)}",
        *[f"| {what} | {' | '.join(values)} |" for what, values in rows],
    ]
    machine = [*report.machine.lines(), ("Load average at the start", f"{report.load_average[0]:.2f}")]
    shares = [run.others_cpu_share for run in report.runs]
    known = ", ".join("unknown" if share is None else f"{share:.0%}" for share in shares)
    machine.append(("CPU time of other processes, server and load among them, each run", known))
    lines += ["", "## Machine", "", "| | |", "| --- | --- |", *[f"| {what} | {value} |" for what, value in machine]]
    return "\n".join(lines) + "\n"


def mib(size: int) -> str:
    return f"{size / 2**20:+.1f} MiB"


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--lead", type=click.FloatRange(5), default=20.0, help="Seconds before, and again after, the hang.")
@click.option("--hang", type=click.FloatRange(8), default=60.0, help="Seconds of hang.")
@click.option("--runs", type=click.IntRange(1), default=3, help="Runs with a hang.")
@click.option("--control/--no-control", default=True, help="After each run, one in which nothing hangs.")
@click.option("--rate", type=click.FloatRange(1), default=100.0, help="Requests per second and disk.")
@click.option("--sick-rate", type=click.FloatRange(1), help="Requests per second to the disk that hangs. [as --rate]")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    help="Directory for hang.json and hang.md.",
)
def main(
    lead: float, hang: float, runs: int, control: bool, rate: float, sick_rate: float | None, output: Path
) -> None:
    """Measure what a hung disk costs the healthy ones, and how fast its own callers are turned away.

    Needs root, /dev/fuse, a loop device and mkfs.ext4: the disk really hangs.
    """
    try:
        sick_rate = rate if sick_rate is None else sick_rate
        machine, average, console = describe(), load_average(), Console(stderr=True)
        report = Report(
            machine=machine,
            load_average=average,
            rate=rate,
            sick_rate=sick_rate,
            offline_after=OFFLINE_AFTER,
            idle_probe=IDLE_PROBE,
            probe_interval_max=PROBE_INTERVAL_MAX,
            threads_limit=THREADS,
            runs=[
                run(lead, hang, rate, sick_rate, hangs, console)
                for _ in range(runs)
                for hangs in ((True, False) if control else (True,))
            ],
        )
    except SetupError as error:
        raise click.ClickException(str(error)) from error
    output.mkdir(parents=True, exist_ok=True)
    (output / "hang.json").write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    text = markdown(report)
    (output / "hang.md").write_text(text, encoding="utf-8")
    click.echo(text)


if __name__ == "__main__":
    main()
