"""Runs the demo and shows it."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import gevent
import msgspec
from rich import box
from rich.live import Live
from rich.table import Table

from ..client import resolve
from ..status import fetch
from ..table import reasons, state_of
from .load import Load, Plan, Summary
from .stage import DEADLINE, DISKS, FILES, HUNG, OFFLINE_AFTER, SLOTS, diskread_server, fill, gil_held_server

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from ..status import StatusDocument

CALM = 2.0
"""Seconds of load before the hang and after it."""

TOLERANCE = 0.25
"""Seconds by which the healthy disks' p99 may grow during the hang without anybody calling it suffering. The hang
itself takes seconds; a busy machine with few cores adds tens of milliseconds."""


@dataclass(frozen=True)
class Act:
    """One server under the load. Summaries of the healthy disks before, during and after, and of the hung one."""

    before: Summary
    during: Summary
    after: Summary
    hung_during: Summary
    hung_after: Summary


@dataclass(frozen=True)
class Result:
    """What the demo found.

    Attributes:
        hang: Seconds that the disk hung.
        rate: Requests per second to each disk.
        diskread: Our server.
        gil_held: The comparison, None when it was skipped.
        suffered: Whether the healthy disks of our server did.
    """

    hang: float
    rate: float
    diskread: Act
    gil_held: Act | None
    suffered: bool


def suffered(act: Act) -> bool:
    """Whether the healthy disks felt the hang: a request failed, or p99 grew by more than `TOLERANCE`."""
    return act.during.answered < act.during.requests or act.during.p99 > act.before.p99 + TOLERANCE


def run(
    console: Console, *, hang: float, rate: float, port: int, comparison: bool, stay: Callable[[int], None] | None
) -> Result:
    """Run the demo.

    Args:
        console: Where to show it.
        hang: Seconds that the disk hangs.
        rate: Requests per second to each disk.
        port: Port of our server; 0 lets the kernel choose.
        comparison: Whether to run the GIL-held server as well.
        stay: Called with the port before our server is stopped; None for nothing.

    Raises:
        StageError: A server did not start.
    """
    with tempfile.TemporaryDirectory(prefix="diskread-demo-") as directory:
        root = Path(directory)
        fill(root)
        console.print(
            f"Four disks with real files, {rate:g} requests/s to each. {HUNG} hangs for {hang:g} s (its reads sleep in "
            f"the kernel). {SLOTS} slots a disk, deadline {DEADLINE:g} s, offline after {OFFLINE_AFTER:g} s without "
            "progress."
        )
        with diskread_server(root, port) as our_port:
            diskread = _act(console, "diskread", our_port, _plan(hang, rate), status=True)
            gil_held = None
            if comparison:
                plan = _plan(hang, rate)
                with gil_held_server(root, plan.hang_begin, plan.hang_end) as other_port:
                    gil_held = _act(console, "the same load, reads that hold the GIL", other_port, plan, status=False)
            result = Result(hang, rate, diskread, gil_held, suffered(diskread))
            _verdict(console, result)
            if stay is not None:
                stay(our_port)
        return result


def _plan(hang: float, rate: float) -> Plan:
    begin = time.monotonic() + 1.0  # time to start the comparison's server, which has to know when its disk hangs
    return Plan(
        disks=DISKS,
        hung=HUNG,
        files=FILES,
        begin=begin,
        hang_begin=begin + CALM,
        hang_end=begin + CALM + hang,
        end=begin + CALM + hang + CALM,
        rate=rate,
        limit=hang + 10.0,
    )


def _act(console: Console, title: str, port: int, plan: Plan, *, status: bool) -> Act:
    load = Load(resolve("127.0.0.1", port), plan)
    running = gevent.spawn(load.run)
    watcher = _StatusWatcher(port) if status else None
    with Live(console=console, auto_refresh=False) as live:
        while not running.ready():
            running.join(timeout=0.5)
            live.update(_table(title, load, plan, watcher.document if watcher else None), refresh=True)
    if watcher is not None:
        watcher.stop()
    running.get()
    healthy = [disk for disk in plan.disks if disk != plan.hung]
    settled = plan.hang_end + DEADLINE  # what was asked in the hang's last moments has its answer by then
    return Act(
        before=load.during(healthy, plan.begin, plan.hang_begin),
        during=load.during(healthy, plan.hang_begin, plan.hang_end),
        after=load.during(healthy, plan.hang_end, plan.end),
        hung_during=load.during([plan.hung], plan.hang_begin, plan.hang_end),
        hung_after=load.during([plan.hung], settled, plan.end),
    )


class _StatusWatcher:
    """Asks the server for its status twice a second, beside the load."""

    def __init__(self, port: int) -> None:
        self.document: StatusDocument | None = None
        self._address = f"http://127.0.0.1:{port}/status"
        self._greenlet = gevent.spawn(self._watch)

    def stop(self) -> None:
        self._greenlet.kill()

    def _watch(self) -> None:
        while True:
            self.document = fetch(self._address, timeout=2.0)
            gevent.sleep(0.5)


def _table(title: str, load: Load, plan: Plan, status: StatusDocument | None) -> Table:
    now = time.monotonic()
    if now < plan.hang_begin:
        phase = "all well"
    elif now < plan.hang_end:
        phase = f"{plan.hung} hangs, {plan.hang_end - now:.0f} s to go"
    else:
        phase = f"{plan.hung} is back"
    table = Table(
        title=f"{title}: {phase}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    table.add_column("disk", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for heading in ("slots", "stuck", "answered", "missed", "refused", "failed", "p99"):
        table.add_column(heading, justify="right", no_wrap=True)
    disks = {disk.name: disk for disk in status.disks} if status is not None else {}
    table.caption, table.caption_justify, table.caption_style = reasons(disks.values()), "left", ""
    for name in plan.disks:
        disk = disks.get(name)
        outcomes = load.during([name], plan.begin, plan.end).outcomes
        recent = load.recent(name, 2.0)
        p99 = f"{recent.p99 * 1000:,.1f} ms" if recent.requests else "no reply"
        table.add_row(
            name,
            "?" if disk is None else state_of(disk),
            "?" if disk is None else f"{disk.in_flight}/{disk.slots}",
            "?" if disk is None else str(disk.stuck),
            *(str(outcomes.get(outcome, 0)) for outcome in ("answered", "missed", "refused", "failed")),
            p99,
        )
    return table


_IN_WORDS = {"missed": "missed the deadline"}


def _verdict(console: Console, result: Result) -> None:
    table = Table(
        title=f"The three healthy disks while {HUNG} hung for {result.hang:g} s; times in ms",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in ("server", "answered", "p50", "p99", "p99 before", "worst"):
        table.add_column(heading, justify="left" if heading == "server" else "right", no_wrap=True)
    for name, act in (("diskread", result.diskread), ("reads holding the GIL", result.gil_held)):
        if act is not None:
            during = act.during
            table.add_row(
                name,
                f"{during.answered} of {during.requests}",
                *(
                    f"{seconds * 1000:,.{0 if seconds >= 1 else 1}f}"
                    for seconds in (during.p50, during.p99, act.before.p99, during.worst)
                ),
            )
    console.print(table)
    hung = result.diskread.hung_during
    console.print(
        f"Clients of {HUNG} at diskread, of {hung.requests}: "
        + ", ".join(f"{count} {_IN_WORDS.get(outcome, outcome)}" for outcome, count in sorted(hung.outcomes.items()))
        + f"; half of them knew after {hung.p50 * 1000:,.1f} ms. Once it was back: "
        f"{result.diskread.hung_after.answered} of {result.diskread.hung_after.requests} answered."
    )
    if result.suffered:
        console.print("[bold red]The healthy disks suffered.[/] That is a defect, or this machine was too busy.")
    else:
        console.print("[bold green]The healthy disks did not notice.[/]")


def to_json(result: Result) -> bytes:
    """The result for machines; latencies in seconds."""
    return msgspec.json.encode(result)
