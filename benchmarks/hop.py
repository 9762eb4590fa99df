"""What does it cost to run a call on a disk's slots, on each event loop, beside what that loop's users have for it?

README.md says how to read the result.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if not __package__:  # run as a script: its own directory is on the path, the one above is not
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.report import (
    RESULTS,
    Environment,
    Run,
    Spread,
    Table,
    document,
    parse_numbers,
    spread,
    three_digits,
    with_range,
    write,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

THREADS = 20
"""Of each pool and each disk: as many as eventlet.tpool has."""

PEERS = {
    "gevent": "gevent's threadpool.apply",
    "eventlet": "eventlet.tpool.execute",
    "asyncio": "asyncio.to_thread",
    "threads": "ThreadPoolExecutor.submit",
}
"""The loops, and what there is on each of them to run a blocking call."""


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One loop, with a number of callers at a time.

    Attributes:
        loop: One of PEERS.
        callers: Greenlets, tasks or threads that call at a time.
        ours_us, peer_us: Microseconds per call by the clock, all callers together; one value for each round.
        ratio: The first through the second, round by round.
    """

    loop: str
    callers: int
    ours_us: list[float]
    peer_us: list[float]
    ratio: Spread


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The result.

    Attributes:
        environment: Where it was measured.
        rounds: How often everything was measured.
        window_s: Length of one measurement, in seconds.
        cells: The measurements.
    """

    environment: Environment
    rounds: int
    window_s: float
    cells: list[Cell]


# -- in a process of its own for each loop -----------------------------------------------------------------------------


def per_call(counts: Sequence[int], began: float) -> float:
    """Microseconds per call of all callers together."""
    return (time.perf_counter() - began) / sum(counts) * 1e6


def calls(function: Callable[..., object], window: float) -> int:
    """Call something again and again; how often."""
    count, ends = 0, time.perf_counter() + window
    while time.perf_counter() < ends:
        function(os.getppid)  # a system call that takes no time
        count += 1
    return count


def limits() -> Any:
    from diskread import Limits

    return Limits(threads=THREADS, queue=1000)


def in_gevent(ours: bool, callers: int, window: float) -> float:
    import gevent
    from gevent import get_hub

    from diskread import Disk

    pool = get_hub().threadpool
    pool.maxsize = THREADS
    function = _kept("disk", lambda: Disk("disk", None, limits())).run if ours else pool.apply
    began = time.perf_counter()
    greenlets = [gevent.spawn(calls, function, window) for _ in range(callers)]
    return per_call([greenlet.get() for greenlet in greenlets], began)


def in_eventlet(ours: bool, callers: int, window: float) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls itself deprecated
        import eventlet
        from eventlet import tpool

    from diskread import Disk

    function = _kept("disk", lambda: Disk("disk", None, limits(), hub="eventlet")).run if ours else tpool.execute
    began = time.perf_counter()
    threads = [eventlet.spawn(calls, function, window) for _ in range(callers)]
    return per_call([thread.wait() for thread in threads], began)


def in_asyncio(ours: bool, callers: int, window: float) -> float:
    loop = _kept("loop", asyncio.new_event_loop)

    async def main() -> float:
        if not loop_has_pool:
            loop.set_default_executor(ThreadPoolExecutor(THREADS))
        began = time.perf_counter()
        function = disk.run if ours else asyncio.to_thread

        async def some() -> int:
            count, ends = 0, time.perf_counter() + window
            while time.perf_counter() < ends:
                await _as_coroutine(function, os.getppid)
                count += 1
            return count

        return per_call(await asyncio.gather(*(some() for _ in range(callers))), began)

    from diskread import aio

    loop_has_pool = "disk" in _things
    disk = _kept("disk", lambda: aio.Disk("disk", None, limits()))
    found: float = loop.run_until_complete(main())
    return found


def in_threads(ours: bool, callers: int, window: float) -> float:
    from diskread import threads

    pool = _kept("pool", lambda: ThreadPoolExecutor(THREADS))
    disk = _kept("disk", lambda: threads.Disk("disk", None, limits()))
    function = disk.run if ours else lambda call: pool.submit(call).result()
    counts: list[int] = []
    began = time.perf_counter()
    workers = [threading.Thread(target=lambda: counts.append(calls(function, window))) for _ in range(callers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return per_call(counts, began)


FAMILIES = {"gevent": in_gevent, "eventlet": in_eventlet, "asyncio": in_asyncio, "threads": in_threads}

_things: dict[str, Any] = {}


def _kept(name: str, make: Callable[[], Any]) -> Any:
    if name not in _things:
        _things[name] = make()
    return _things[name]


def _as_coroutine(function: Callable[..., Awaitable[int]], call: Callable[[], int]) -> Awaitable[int]:
    return function(call)


def measure_here(loop: str) -> None:
    """Answer requests, a line of JSON each, with a number of microseconds."""
    for line in sys.stdin:
        request = json.loads(line)
        sys.stdout.write(f"{FAMILIES[loop](**request)}\n")
        sys.stdout.flush()
    os._exit(0)  # some of these loops would wait for their threads


# -- in the benchmark's own process ------------------------------------------------------------------------------------


class Process:
    """A process that measures one loop."""

    def __init__(self, loop: str) -> None:
        """Start it."""
        self._child = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--measure", loop],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def measure(self, *, ours: bool, callers: int, window: float) -> float:
        """Microseconds per call."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps({"ours": ours, "callers": callers, "window": window}) + "\n")
        self._child.stdin.flush()
        line = self._child.stdout.readline()
        if not line:
            raise click.ClickException(f"a measurement has ended with exit status {self._child.wait()}")
        return float(line)

    def close(self) -> None:
        """End it."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.close()
        self._child.stdout.close()
        self._child.wait()


def measure(
    loops: Sequence[str], concurrency: Sequence[int], rounds: int, window: float, advance: Callable[[str], None]
) -> list[Cell]:
    """Measure everything: in each round all loops, ours and theirs taking turns at going first."""
    found: dict[tuple[str, int, bool], list[float]] = {}
    processes = {loop: Process(loop) for loop in loops}
    try:
        for number in range(rounds + 1):
            for loop, process in processes.items():
                for callers in concurrency:
                    advance(f"{loop}, {callers}")
                    for ours in (bool(number % 2), not number % 2):
                        took = process.measure(ours=ours, callers=callers, window=window)
                        if number:  # the first round warms up
                            found.setdefault((loop, callers, ours), []).append(took)
    finally:
        for process in processes.values():
            process.close()
    cells = []
    for loop in loops:
        for callers in concurrency:
            ours_us, peer_us = found[loop, callers, True], found[loop, callers, False]
            ratio = spread([mine / theirs for mine, theirs in zip(ours_us, peer_us, strict=True)])
            cells.append(Cell(loop=loop, callers=callers, ours_us=ours_us, peer_us=peer_us, ratio=ratio))
    return cells


def tables(report: Report) -> list[Table]:
    """The report as a table."""
    head = ("loop", "callers", "Disk.run, µs", "beside", "µs", "Disk.run : beside")
    table = Table("A call that takes no time", head, "Median [least-greatest] of the rounds; below 1: ours is cheaper.")
    for cell in report.cells:
        table.rows.append(
            [
                cell.loop,
                str(cell.callers),
                with_range(spread(cell.ours_us), three_digits),
                PEERS[cell.loop],
                with_range(spread(cell.peer_us), three_digits),
                with_range(cell.ratio, three_digits),
            ]
        )
    return [table]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--rounds", type=click.IntRange(1), default=9, help="How often everything is measured.")
@click.option("--window", type=click.FloatRange(0.01), default=0.5, help="Seconds of one measurement.")
@click.option("--concurrency", callback=parse_numbers, default="1,16", help="Numbers of callers at a time.")
@click.option("--quick", is_flag=True, help="Short: to see that it works, not to quote.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default=RESULTS, help="For hop.*.")
@click.option("--measure", "loop", type=click.Choice(list(PEERS)), hidden=True)
def main(
    *, rounds: int, window: float, concurrency: tuple[int, ...], quick: bool, output: Path, loop: str | None
) -> None:
    """Measure what a call on a disk's slots costs, on each event loop. A minute and a half."""
    if loop is not None:
        measure_here(loop)
        return
    if quick:
        rounds, window = 2, 0.05
    taking = Run()
    loops = []
    for each in PEERS:
        try:
            if each in ("gevent", "eventlet"):
                taking.versions[each] = version(each)
            loops.append(each)
        except PackageNotFoundError:
            taking.missing[each] = f"pip install {each}"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=1) as progress:
        task = progress.add_task("", total=(rounds + 1) * len(loops) * len(concurrency))
        cells = measure(
            loops, concurrency, rounds, window, lambda what: progress.update(task, description=what, advance=1)
        )
    report = Report(environment=taking.environment(), rounds=rounds, window_s=window, cells=cells)
    intro = (
        "A system call that takes no time (getppid), run on the slots of a disk and beside it by what the loop's users "
        f"have for that, each with {THREADS} threads. Microseconds per call, all callers together; {rounds} rounds of "
        f"{window:g} s."
    )
    found = tables(report)
    text = document("What does the hop to a thread cost?", "hop", intro, report.environment, found, plot=False)
    write(output, "hop", report, text, found)


if __name__ == "__main__":
    main()
