"""What does it cost a gevent server when a blocking call holds the GIL, and what does it cost to release it?

Every call runs on gevent's threadpool, once with the GIL held and once released; README.md says how to read the result.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import math
import os
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
import gevent
import msgspec
from gevent.threadpool import ThreadPool
from hdrh.histogram import HdrHistogram
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from diskread._syscalls import pread, pread_holding_gil, stall, stall_holding_gil

if not __package__:  # run as a script: its own directory is on the path, the one above is not
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import CpuClock, Machine, describe, device_bytes_read, file_system, load_average
from benchmarks.report import RESULTS, Spread, Table, spread, three_digits, with_range

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Mode = Literal["held", "released"]
MODES: tuple[Mode, Mode] = ("held", "released")

TICK_NS = 1_000_000
BLOCK = 1 << 20
SMALL_READ = 4096


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured.

    Attributes:
        concurrency: Numbers of calls at a time.
        repetitions: How often everything is measured, held and released in turn.
        stall_s: Length of a simulated stall, in seconds.
        stall_window_s: Least time of one measurement of stalls, in seconds.
        read_window_s: Least time of one measurement of reads, in seconds.
        blocks: Length of the file in blocks of 1 MiB.
        serial_values: Values per function of the serial measurement.
        serial_value_s: Least time of one such value, in seconds.
    """

    concurrency: tuple[int, ...]
    repetitions: int
    stall_s: float
    stall_window_s: float
    read_window_s: float
    blocks: int
    serial_values: int
    serial_value_s: float


FULL = Settings(
    concurrency=(1, 2, 4, 8, 16, 32, 64),
    repetitions=5,
    stall_s=0.05,
    stall_window_s=0.6,
    read_window_s=0.3,
    blocks=128,
    serial_values=15,
    serial_value_s=0.02,
)
QUICK = msgspec.structs.replace(
    FULL,
    concurrency=(1, 4, 16),
    repetitions=2,
    stall_window_s=0.2,
    read_window_s=0.15,
    blocks=64,
    serial_values=5,
    serial_value_s=0.01,
)


# --- What is recorded -------------------------------------------------------------------------------------------------


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """Durations. Times in seconds.

    Attributes:
        count: How many.
        p50, p99, p99_9: Percentiles, from the histogram (3 significant digits).
        max: The longest, exactly.
        histogram: All of them, in nanoseconds: an HdrHistogram in its compressed base64 form.
    """

    count: int
    p50: float
    p99: float
    p99_9: float
    max: float
    histogram: str


class Repetition(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement of one function at one concurrency.

    Attributes:
        elapsed_s: Time that was measured, in seconds.
        calls: Calls in that time.
        device_bytes: Bytes that came from the device and not from the page cache; None where it cannot be known.
        wall_s: Time from handing in N calls to having N results, one value per round, in seconds.
        lateness_s: Lateness of the ticks of the hub, in seconds.
    """

    elapsed_s: float
    calls: int
    device_bytes: int | None
    wall_s: Distribution
    lateness_s: Distribution


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One function at one concurrency: all repetitions and what comes of them.

    Attributes:
        wall_s: Median time of a round, in seconds.
        wall_to_ideal: The same as a multiple of the ideal; None for reads, which have none.
        calls_per_s: Throughput.
        bytes_per_s: Throughput of reads.
        lateness_s: Ticks of all repetitions together, in seconds.
        p99_lateness_s, max_lateness_s: Spread of these over the repetitions, in seconds.
        device_share: Bytes from the device to bytes read; None where it cannot be known.
    """

    concurrency: int
    mode: Mode
    wall_s: Spread
    wall_to_ideal: Spread | None
    calls_per_s: Spread
    bytes_per_s: Spread | None
    lateness_s: Distribution
    p99_lateness_s: Spread
    max_lateness_s: Spread
    device_share: float | None
    repetitions: list[Repetition]


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """Released to held, repetition by repetition, of the neighbours in time."""

    concurrency: int
    wall: Spread
    throughput: Spread
    p99_lateness: Spread
    max_lateness: Spread


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of call. `ideal_s` is the wall time that N calls at once would take if none waited for another."""

    name: str
    title: str
    ideal_s: float | None
    bytes_per_call: int
    points: list[Point]
    ratios: list[Ratio]


class Serial(msgspec.Struct, frozen=True, kw_only=True):
    """Cost of one call after another.

    Attributes:
        bytes: Bytes that a call reads.
        way: How it is called: directly, directly beside a busy Python thread, through the threadpool.
        function: What is called.
        values_ns: Nanoseconds per call.
        ns_per_call: The same: median, least, greatest.
    """

    bytes: int
    way: str
    function: str
    values_ns: list[float]
    ns_per_call: Spread


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a run found.

    Attributes:
        format: Grows when the structure changes in a way that readers must know of.
        started: Time of day, ISO 8601, UTC.
        duration_s: Seconds that the run took.
        load_average_before, load_average_after: 1, 5 and 15 minutes; the second one contains the run itself.
        others_cpu_share: Share of the machine's CPU time that went to other processes during the run: what tells a
            quiet machine from a busy one. None where it cannot be known.
        machine: The machine and the versions.
        file_system: Type of the file system that was read.
        tick_s: Interval of the ticks, in seconds.
        settings: How much was measured.
        idle_lateness_s: Ticks of a hub with nothing else to do, all repetitions together, in seconds.
        idle_repetitions: The same of each repetition.
        scenarios: What ran on the threadpool beside the ticker.
        serial: Cost of single calls.
    """

    format: int
    started: str
    duration_s: float
    load_average_before: tuple[float, float, float]
    load_average_after: tuple[float, float, float]
    others_cpu_share: float | None
    machine: Machine
    file_system: str
    tick_s: float
    settings: Settings
    idle_lateness_s: Distribution
    idle_repetitions: list[Distribution]
    scenarios: list[Scenario]
    serial: list[Serial]


# --- Measuring --------------------------------------------------------------------------------------------------------


class Ticker:
    """A greenlet that wants to run every millisecond, and keeps account of how late the hub lets it.

    Open-loop: ticks are due at fixed times, whether or not the hub is free. A hub that stands still for 50 ms makes 50
    ticks late, and each is recorded with its own lateness; a ticker that only measured how long it slept would see one.
    """

    def __init__(self) -> None:
        self.lateness_ns: list[int] = []
        self._ends: float = math.inf
        self._begin = time.monotonic_ns()
        self._greenlet = gevent.spawn(self._run)

    def _run(self) -> None:
        due = self._begin + TICK_NS
        while due <= self._ends:
            now = time.monotonic_ns()
            while due <= now and due <= self._ends:
                self.lateness_ns.append(now - due)
                due += TICK_NS
            gevent.sleep(max(0, due - time.monotonic_ns()) / 1e9)

    def stop(self) -> list[int]:
        """Lateness in nanoseconds of every tick that was due until now, once the last of them has come."""
        self._ends = time.monotonic_ns()
        self._greenlet.join()
        self._greenlet.get()
        return self.lateness_ns


class Work:
    """A blocking call in its two forms, and the arguments to call it with."""

    def __init__(
        self,
        name: str,
        title: str,
        functions: dict[Mode, Callable[..., object]],
        begin_pass: Callable[[], Iterator[tuple[Any, ...]]],
        *,
        window_s: float,
        ideal_s: float | None = None,
        bytes_per_call: int = 0,
    ) -> None:
        """Describe it.

        Args:
            name: For the JSON.
            title: For people.
            functions: What to call.
            begin_pass: Prepares a pass, off the clock, and returns the arguments of one call after another. When they
                come to an end, another pass begins.
            window_s: Least time of a measurement, in seconds.
            ideal_s: Seconds that any number of concurrent calls should take.
            bytes_per_call: Bytes that a call reads.
        """
        self.name = name
        self.title = title
        self.functions = functions
        self.begin_pass = begin_pass
        self.window_s = window_s
        self.ideal_s = ideal_s
        self.bytes_per_call = bytes_per_call


def distribution(values_ns: Sequence[int]) -> Distribution:
    """Put durations in nanoseconds into a histogram of 1 us to 10 minutes with 3 significant digits."""
    histogram = HdrHistogram(1_000, 600 * 1_000_000_000, 3)
    for value in values_ns:
        histogram.record_value(value)
    p50, p99, p99_9 = (histogram.get_value_at_percentile(each) / 1e9 for each in (50, 99, 99.9))
    longest = max(values_ns, default=0) / 1e9
    encoded = histogram.encode().decode("ascii")
    # A histogram answers with the upper end of a bucket, which may lie beyond the longest value.
    return Distribution(
        count=len(values_ns),
        p50=min(p50, longest),
        p99=min(p99, longest),
        p99_9=min(p99_9, longest),
        max=longest,
        histogram=encoded,
    )


@contextmanager
def threadpool(threads: int) -> Iterator[ThreadPool]:
    """A pool of its own whose threads have all started."""
    pool = ThreadPool(threads)
    for each in [pool.spawn(stall, 0.002) for _ in range(threads)]:
        each.get()
    try:
        yield pool
    finally:
        pool.kill()


class Measurement:
    """What the passes of one repetition found. Times in nanoseconds."""

    def __init__(self) -> None:
        self.elapsed = 0
        self.walls: list[int] = []
        self.late: list[int] = []
        self.device_bytes: int | None = 0

    def run_pass(self, work: Work, mode: Mode, pool: ThreadPool, concurrency: int) -> None:
        """Rounds of `concurrency` calls at once until the window or the arguments are used up."""
        function = work.functions[mode]
        arguments = work.begin_pass()
        gc.collect()
        device_before = device_bytes_read()
        ticker = Ticker()
        while self.elapsed < work.window_s * 1e9:
            calls = list(itertools.islice(arguments, concurrency))
            if len(calls) < concurrency:
                break
            begin = time.monotonic_ns()
            results = [pool.spawn(function, *each) for each in calls]
            for result in results:
                result.get()
            self.walls.append(time.monotonic_ns() - begin)
            self.elapsed += self.walls[-1]
            del results, result  # a round's blocks are free before the next one allocates its own
        self.late += ticker.stop()
        device_after = device_bytes_read()
        if self.device_bytes is None or device_before is None or device_after is None:
            self.device_bytes = None
        else:
            self.device_bytes += device_after - device_before


def measure(work: Work, mode: Mode, concurrency: int) -> tuple[Repetition, list[int]]:
    """One repetition, and the lateness of its ticks in nanoseconds."""
    found = Measurement()
    with threadpool(concurrency) as pool:
        while found.elapsed < work.window_s * 1e9:
            found.run_pass(work, mode, pool, concurrency)
    repetition = Repetition(
        elapsed_s=found.elapsed / 1e9,
        calls=len(found.walls) * concurrency,
        device_bytes=found.device_bytes,
        wall_s=distribution(found.walls),
        lateness_s=distribution(found.late),
    )
    return repetition, found.late


def measure_idle(seconds: float) -> list[int]:
    """Lateness of the ticks, in nanoseconds, of a hub that has nothing else to do."""
    gc.collect()
    ticker = Ticker()
    gevent.sleep(seconds)
    return ticker.stop()


class Series:
    """The repetitions of one point, as they come in."""

    def __init__(self) -> None:
        self.repetitions: list[Repetition] = []
        self.late: list[int] = []

    def add(self, repetition: Repetition, late: list[int]) -> None:
        self.repetitions.append(repetition)
        self.late += late

    def throughput(self) -> list[float]:
        """Calls per second, of each repetition."""
        return [each.calls / each.elapsed_s for each in self.repetitions]

    def point(self, work: Work, concurrency: int, mode: Mode) -> Point:
        walls = [each.wall_s.p50 for each in self.repetitions]
        calls_per_s = self.throughput()
        ideal = work.ideal_s
        read = sum(each.calls for each in self.repetitions) * work.bytes_per_call
        device = [each.device_bytes for each in self.repetitions if each.device_bytes is not None]
        return Point(
            concurrency=concurrency,
            mode=mode,
            wall_s=spread(walls),
            wall_to_ideal=None if ideal is None else spread([each / ideal for each in walls]),
            calls_per_s=spread(calls_per_s),
            bytes_per_s=spread([each * work.bytes_per_call for each in calls_per_s]) if read else None,
            lateness_s=distribution(self.late),
            p99_lateness_s=spread([each.lateness_s.p99 for each in self.repetitions]),
            max_lateness_s=spread([each.lateness_s.max for each in self.repetitions]),
            device_share=sum(device) / read if read and len(device) == len(self.repetitions) else None,
            repetitions=self.repetitions,
        )


def ratio(concurrency: int, held: Series, released: Series) -> Ratio:
    def of(pick: Callable[[Repetition], float]) -> Spread:
        pairs = zip(released.repetitions, held.repetitions, strict=True)
        return spread([pick(first) / pick(second) for first, second in pairs])

    return Ratio(
        concurrency=concurrency,
        wall=of(lambda each: each.wall_s.p50),
        throughput=of(lambda each: each.calls / each.elapsed_s),
        p99_lateness=of(lambda each: each.lateness_s.p99),
        max_lateness=of(lambda each: each.lateness_s.max),
    )


def measure_scenarios(
    works: Sequence[Work], settings: Settings, advance: Callable[[str], None]
) -> tuple[list[Scenario], list[list[int]]]:
    """Everything that runs beside the ticker, interleaved: what drifts on the machine meets held and released alike.

    Returns:
        The scenarios, and the lateness of the idle ticks of each repetition in nanoseconds.
    """
    series = {
        (work.name, concurrency, mode): Series()
        for work in works
        for concurrency in settings.concurrency
        for mode in MODES
    }
    idle = []
    for work in works:  # warm-up: code, file and the CPU's clock; its figures are dropped
        for mode in MODES:
            measure(work, mode, settings.concurrency[0])
    for repetition in range(settings.repetitions):
        advance("idle")
        idle.append(measure_idle(settings.stall_window_s))
        for work in works:
            for position, concurrency in enumerate(settings.concurrency):
                # Who goes first alternates too.
                for mode in MODES if (repetition + position) % 2 == 0 else MODES[::-1]:
                    advance(f"{work.title}, {concurrency} at a time, GIL {mode}")
                    series[work.name, concurrency, mode].add(*measure(work, mode, concurrency))
    scenarios = [
        Scenario(
            name=work.name,
            title=work.title,
            ideal_s=work.ideal_s,
            bytes_per_call=work.bytes_per_call,
            points=[
                series[work.name, concurrency, mode].point(work, concurrency, mode)
                for concurrency in settings.concurrency
                for mode in MODES
            ],
            ratios=[
                ratio(concurrency, *(series[work.name, concurrency, mode] for mode in MODES))
                for concurrency in settings.concurrency
            ],
        )
        for work in works
    ]
    return scenarios, idle


def time_calls(call: Callable[[], object], loops: int) -> int:
    """Nanoseconds that so many calls take."""
    repeat = itertools.repeat(None, loops)
    begin = time.perf_counter_ns()
    for _ in repeat:
        call()
    return time.perf_counter_ns() - begin


@contextmanager
def busy_thread() -> Iterator[None]:
    """A native thread that runs Python and nothing else: it gives the GIL up only when it is asked to."""
    stop = False

    def run() -> None:
        while not stop:
            pass

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop = True
        thread.join()


def time_in_turn(calls: dict[str, Callable[[], object]], values: int, value_s: float) -> dict[str, list[float]]:
    """Take one value of each function in turn until there are enough.

    A value is taken for a time and not for a number of calls: a function can be a thousand times slower from one value
    to the next when it has to win the GIL back.

    Returns:
        Nanoseconds per call: the values of each function.
    """
    batches = {}  # calls between two looks at the clock
    for name, call in calls.items():
        batches[name] = 1
        while time_calls(call, batches[name]) < value_s * 1e9 / 100:
            batches[name] *= 2
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(values):
        for name, call in calls.items():
            taken = count = 0
            while taken < value_s * 1e9:
                taken += time_calls(call, batches[name])
                count += batches[name]
            found[name].append(taken / count)
    return found


def measure_serial(descriptor: int, settings: Settings) -> list[Serial]:
    """What reads from the page cache cost, one after another: nothing to wait for, so the GIL is all that differs."""
    functions: dict[str, Callable[[int, int, int], bytes]] = {
        "os.pread": os.pread,
        "pread": pread,
        "pread_holding_gil": pread_holding_gil,
    }
    found: list[Serial] = []

    def measure_way(way: str, size: int, calls: dict[str, Callable[[], object]], value_s: float) -> None:
        for name, values in time_in_turn(calls, settings.serial_values, value_s).items():
            found.append(Serial(bytes=size, way=way, function=name, values_ns=values, ns_per_call=spread(values)))

    with threadpool(1) as pool:
        for size in (SMALL_READ, BLOCK):
            direct: dict[str, Callable[[], object]] = {
                name: partial(function, descriptor, size, 0) for name, function in functions.items()
            }
            pooled: dict[str, Callable[[], object]] = {
                name: partial(pool.apply, function, (descriptor, size, 0)) for name, function in functions.items()
            }
            measure_way("direct", size, direct, settings.serial_value_s)
            measure_way("through the threadpool", size, pooled, settings.serial_value_s)
            with busy_thread():
                # Threads take turns every few milliseconds: a value has to be longer than many turns.
                measure_way("direct, beside a busy Python thread", size, direct, 5 * settings.serial_value_s)
    return found


@contextmanager
def test_file(directory: Path | None, blocks: int) -> Iterator[int]:
    """Descriptor of a file of random bytes that is on the device and in the page cache. Deleted from the start."""
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        for _ in range(blocks):
            file.write(os.urandom(BLOCK))
        os.fsync(file.fileno())  # dirty pages cannot be evicted
        # No read-ahead: it would bring in blocks that another call is going to count as read from the device.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        yield file.fileno()


def make_works(descriptor: int, settings: Settings) -> list[Work]:
    blocks = [(descriptor, BLOCK, index * BLOCK) for index in range(settings.blocks)]
    reads: dict[Mode, Callable[..., object]] = {"held": pread_holding_gil, "released": pread}

    def cached() -> Iterator[tuple[int, int, int]]:
        for each in blocks:
            pread(*each)
        return itertools.cycle(blocks)

    def uncached() -> Iterator[tuple[int, int, int]]:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return iter(blocks)  # each block is read once per eviction

    return [
        Work(
            "stall",
            f"Stall of {settings.stall_s * 1000:g} ms (nanosleep)",
            {"held": stall_holding_gil, "released": stall},
            lambda: itertools.repeat((settings.stall_s,)),
            window_s=settings.stall_window_s,
            ideal_s=settings.stall_s,
        ),
        Work(
            "uncached",
            "pread of 1 MiB from the device",
            reads,
            uncached,
            window_s=settings.read_window_s,
            bytes_per_call=BLOCK,
        ),
        Work(
            "cached",
            "pread of 1 MiB from the page cache",
            reads,
            cached,
            window_s=settings.read_window_s,
            bytes_per_call=BLOCK,
        ),
    ]


# --- Reporting --------------------------------------------------------------------------------------------------------


def milliseconds(seconds: float) -> str:
    return three_digits(seconds * 1000)


def by_mode(scenario: Scenario) -> Iterator[tuple[Point, Point, Ratio]]:
    points = {(each.concurrency, each.mode): each for each in scenario.points}
    for each in scenario.ratios:
        yield points[each.concurrency, "held"], points[each.concurrency, "released"], each


def work_table(scenario: Scenario) -> Table:
    ideal = scenario.ideal_s
    header = ["calls at once", "wall held, ms", "wall released, ms", "wall: released / held"]
    if ideal is not None:
        header += ["held / ideal", "released / ideal"]
    unit = "MB/s" if scenario.bytes_per_call else "calls/s"
    header += [f"{unit} held", f"{unit} released", f"{unit}: released / held"]
    table = Table(f"{scenario.title}: the calls", header, _device_note(scenario))
    for held, released, ratios in by_mode(scenario):
        row = [
            str(held.concurrency),
            with_range(held.wall_s, milliseconds),
            with_range(released.wall_s, milliseconds),
            with_range(ratios.wall, three_digits),
        ]
        if held.wall_to_ideal is not None and released.wall_to_ideal is not None:
            row += [three_digits(held.wall_to_ideal.median), three_digits(released.wall_to_ideal.median)]
        for point in (held, released):
            if point.bytes_per_s is not None:
                row.append(with_range(point.bytes_per_s, lambda value: three_digits(value / 1e6)))
            else:
                row.append(with_range(point.calls_per_s, three_digits))
        row.append(with_range(ratios.throughput, three_digits))
        table.rows.append(row)
    return table


def _device_note(scenario: Scenario) -> str:
    if not scenario.bytes_per_call:
        return ""
    shares = [each.device_share for each in scenario.points if each.device_share is not None]
    if len(shares) < len(scenario.points):
        return "Whether the device was read cannot be known here: the kernel does not count it."
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return f"Bytes that came from the device and not from the page cache: {low if low == high else f'{low} to {high}'}."


def lateness_table(scenario: Scenario, idle: Distribution) -> Table:
    percentiles = ["p50", "p99", "p99.9", "max"]
    header = ["calls at once", *(f"{mode} {each}" for mode in MODES for each in percentiles)]
    table = Table(
        f"{scenario.title}: lateness of the hub, ms",
        [*header, "max: released / held"],
        "Percentiles are those of the ticks of all repetitions together; the ratio is the median of the repetitions.",
    )

    def cells(late: Distribution) -> list[str]:
        return [milliseconds(each) for each in (late.p50, late.p99, late.p99_9, late.max)]

    table.rows.append(["none (idle)", *cells(idle), *cells(idle), ""])
    for held, released, ratios in by_mode(scenario):
        ratio_text = with_range(ratios.max_lateness, three_digits)
        table.rows.append(
            [str(held.concurrency), *cells(held.lateness_s), *cells(released.lateness_s), ratio_text],
        )
    return table


def serial_table(serial: Sequence[Serial]) -> Table:
    table = Table(
        "Reads from the page cache, one after another: microseconds per call",
        ["read", *dict.fromkeys(each.way for each in serial)],
    )
    cells: dict[str, list[str]] = {}
    for each in serial:
        text = with_range(each.ns_per_call, lambda value: three_digits(value / 1000))
        cells.setdefault(f"{each.function}, {each.bytes // 1024:,} KiB", []).append(text)
    table.rows = [[name, *texts] for name, texts in cells.items()]
    return table


def tables(report: Report) -> list[Table]:
    found = []
    for scenario in report.scenarios:
        found += [work_table(scenario), lateness_table(scenario, report.idle_lateness_s)]
    return [*found, serial_table(report.serial)]


def markdown(report: Report, plotted: bool) -> str:
    """The result as Markdown. Every number in it comes from the report."""
    before, after = report.load_average_before[0], report.load_average_after[0]
    others = report.others_cpu_share
    facts = [
        *report.machine.lines(),
        ("File system", report.file_system),
        ("Load average (1 min)", f"{before:.2f} before, {after:.2f} after (the run itself is in it)"),
        ("CPU time of other processes", "unknown" if others is None else f"{others:.0%} of the machine"),
        ("Measured", f"{report.started}, {report.duration_s:.0f} s, {report.settings.repetitions} repetitions"),
    ]
    lines = [
        "# The GIL held and released: results",
        "",
        "Generated by `python benchmarks/gil.py`; do not edit. How to read it: [README](../README.md#gilpy).",
        "Values are medians of the repetitions [lowest-highest].",
        "",
        *(["![Lateness of the hub and wall time, by number of calls at once](gil.png)", ""] if plotted else []),
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {text} |" for name, text in facts),
        "",
    ]
    return "\n".join(lines) + "\n" + "\n\n".join(each.markdown() for each in tables(report)) + "\n"


COLORS: dict[Mode, str] = {"held": "#c0392b", "released": "#1f77b4"}


def plot(report: Report, path: Path) -> None:
    """Draw the figure.

    Args:
        report: What was measured.
        path: Where the picture goes; its suffix decides on the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    style: dict[Any, Any] = {
        "font.size": 11,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    scenarios = {each.name: each for each in report.scenarios}
    with mpl.rc_context(style):
        figure, axes = plt.subplots(2, 2, figsize=(11, 8.4), layout="constrained")
        for axis, name in zip(axes[0], ("stall", "uncached"), strict=True):
            _plot_lateness(axis, scenarios[name], report.idle_lateness_s)
        _plot_wall(axes[1][0], scenarios["stall"])
        _plot_throughput(axes[1][1], scenarios["uncached"])
        for axis in axes.flat:
            axis.set_xscale("log", base=2)
            axis.set_xticks(report.settings.concurrency, [str(each) for each in report.settings.concurrency])
            axis.set_xlabel("blocking calls at once")
        figure.supxlabel(
            f"Lines: median of {report.settings.repetitions} repetitions; shaded: lowest to highest. "
            f"{report.machine.cores} cores, {report.machine.python}, gevent {report.machine.gevent}.",
            fontsize=9,
            color="gray",
        )
        figure.savefig(path, dpi=120)
        plt.close(figure)


def _of(scenario: Scenario, mode: Mode) -> list[Point]:
    return [each for each in scenario.points if each.mode == mode]


def _draw(axis: Any, points: Sequence[Point], values: Sequence[Spread], label: str, *, minor: bool = False) -> None:
    """One line: the median, with the range of the repetitions behind it unless it is a minor line."""
    across = [each.concurrency for each in points]
    color = COLORS[points[0].mode]
    axis.plot(
        across, [each.median for each in values], "s--" if minor else "o-", color=color, label=label, markersize=5
    )
    if not minor:
        axis.fill_between(
            across, [each.low for each in values], [each.high for each in values], color=color, alpha=0.15
        )


def _scaled(value: Spread, factor: float) -> Spread:
    return Spread(value.median * factor, value.low * factor, value.high * factor)


def _plot_lateness(axis: Any, scenario: Scenario, idle: Distribution) -> None:
    for mode in MODES:
        points = _of(scenario, mode)
        _draw(axis, points, [_scaled(each.max_lateness_s, 1000) for each in points], f"GIL {mode}, max")
        _draw(axis, points, [_scaled(each.p99_lateness_s, 1000) for each in points], f"GIL {mode}, p99", minor=True)
    axis.axhline(idle.p99 * 1000, color="gray", linestyle=":", label="idle hub, p99")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.set_title(f"Lateness of the hub\n{scenario.title}", loc="left")
    axis.set_ylabel("lateness, ms (lower is better)")
    axis.legend(fontsize=9)


def _plot_wall(axis: Any, scenario: Scenario) -> None:
    for mode in MODES:
        points = _of(scenario, mode)
        _draw(axis, points, [each.wall_to_ideal for each in points if each.wall_to_ideal], f"GIL {mode}")
    axis.axhline(1, color="gray", linestyle=":", label="ideal: as long as one call")
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_title(f"Wall time of N calls at once\n{scenario.title}", loc="left")
    axis.set_ylabel("wall time / ideal (lower is better)")
    axis.legend(fontsize=9)


def _plot_throughput(axis: Any, scenario: Scenario) -> None:
    for mode in MODES:
        points = _of(scenario, mode)
        _draw(axis, points, [_scaled(each.bytes_per_s, 1e-6) for each in points if each.bytes_per_s], f"GIL {mode}")
    axis.set_ylim(bottom=0)
    axis.set_title(f"Throughput\n{scenario.title}", loc="left")
    axis.set_ylabel("MB/s (higher is better)")
    axis.legend(fontsize=9)


# --- Command line -----------------------------------------------------------------------------------------------------


def run(settings: Settings, directory: Path | None, console: Console) -> Report:
    """Measure everything, with progress on the console."""
    started, load_before, cpu_clock = datetime.now(timezone.utc), load_average(), CpuClock()
    per_repetition = 1 + 3 * len(settings.concurrency) * len(MODES)
    # Drawn between the measurements, never by a thread of its own beside them: that would need the GIL.
    progress = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
        auto_refresh=False,
    )
    with progress:
        task = progress.add_task("writing the file", total=settings.repetitions * per_repetition + 2)
        progress.refresh()

        def advance(what: str) -> None:
            progress.update(task, advance=1, description=what)
            progress.refresh()

        with test_file(directory, settings.blocks) as descriptor:
            kind = file_system(Path(f"/proc/self/fd/{descriptor}"))
            progress.update(task, description="warm-up")
            progress.refresh()
            scenarios, idle = measure_scenarios(make_works(descriptor, settings), settings, advance)
            advance("reads, one after another")
            serial = measure_serial(descriptor, settings)
        advance("done")
        return Report(
            format=1,
            started=started.isoformat(timespec="seconds"),
            duration_s=cpu_clock.elapsed_s(),
            load_average_before=load_before,
            load_average_after=load_average(),
            others_cpu_share=cpu_clock.others_share(),
            machine=describe(),
            file_system=kind,
            tick_s=TICK_NS / 1e9,
            settings=settings,
            idle_lateness_s=distribution([late for each in idle for late in each]),
            idle_repetitions=[distribution(each) for each in idle],
            scenarios=scenarios,
            serial=serial,
        )


def parse_concurrency(
    _context: click.Context, _parameter: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        numbers = tuple(sorted({int(each) for each in value.split(",")}))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers; try 1,4,16") from None
    if not 1 <= numbers[0] <= numbers[-1] <= 1024:
        raise click.BadParameter("numbers of calls are 1 to 1024")
    return numbers


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--quick", is_flag=True, help="A look in 20 seconds; too short for figures that one would quote.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    help="Directory for gil.json, gil.md and gil.png.  [default: results/ beside this file]",
)
@click.option("--no-plot", is_flag=True, help="Leave the picture out; matplotlib is not needed then.")
@click.option(
    "--directory",
    type=click.Path(exists=True, file_okay=False, writable=True, path_type=Path),
    help="Where the file that is read is put: choose the disk to measure, not a tmpfs.  [default: temporary directory]",
)
@click.option("--concurrency", callback=parse_concurrency, metavar="N,N,...", help="Numbers of calls at once.")
@click.option("--repetitions", type=click.IntRange(1, 100), help="How often everything is measured.")
@click.option("--stall", "stall_ms", type=click.FloatRange(0.1, 10_000), metavar="MS", help="Length of a stall.")
@click.option("--window", type=click.FloatRange(0.005, 60), metavar="SECONDS", help="Least time of one measurement.")
@click.option("--blocks", type=click.IntRange(16, 65_536), metavar="MIB", help="Length of the file that is read.")
def main(
    quick: bool,
    output: Path,
    no_plot: bool,
    directory: Path | None,
    concurrency: tuple[int, ...] | None,
    repetitions: int | None,
    stall_ms: float | None,
    window: float | None,
    blocks: int | None,
) -> None:
    """What does it cost a gevent server when a blocking call holds the GIL, and what does it cost to release it?

    Runs stalls and real reads on gevent's threadpool, with the GIL held and released in turn, while a greenlet that is
    due every millisecond records how late the hub lets it run. Takes under 3 minutes; best on a machine that does
    nothing else.

    \b
    Examples:
      python benchmarks/gil.py
      python benchmarks/gil.py --quick --output results
      python benchmarks/gil.py --directory /srv/disk1 --concurrency 1,8,64
    """
    errors = Console(stderr=True)
    drawing = not no_plot
    if drawing and importlib.util.find_spec("matplotlib") is None:
        errors.print("No picture: matplotlib is not installed (pip install 'diskread\\[plots]'). The rest goes on.")
        drawing = False
    given = {
        "concurrency": concurrency,
        "repetitions": repetitions,
        "stall_s": None if stall_ms is None else stall_ms / 1000,
        "stall_window_s": window,
        "read_window_s": window,
        "blocks": blocks,
    }
    settings = msgspec.structs.replace(
        QUICK if quick else FULL, **{name: value for name, value in given.items() if value is not None}
    )
    if settings.concurrency[-1] > settings.blocks:
        raise click.UsageError("so many reads at once need as many blocks: give a larger --blocks")
    output.mkdir(parents=True, exist_ok=True)
    report = run(settings, directory, errors)
    if not report.machine.gil:
        errors.print("This Python has no GIL: held and released differ in nothing but their names.")
    (output / "gil.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    if drawing:
        plot(report, output / "gil.png")
    (output / "gil.md").write_text(markdown(report, plotted=drawing))
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    for each in tables(report):
        console.print(each.rich())
        console.print()


if __name__ == "__main__":
    main()
