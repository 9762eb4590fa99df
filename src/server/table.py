"""The disks and mirrors of a server as tables for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .status import DiskDocument, StatusDocument

_STYLES = {"online": "green", "suspect": "yellow", "half-open": "yellow", "offline": "bold red"}


def state_of(disk: DiskDocument) -> Text:
    """The state of a disk in a word, coloured.

    Args:
        disk: What `/status` said of it. One that is not offline and takes nothing all the same is "refusing".
    """
    if not disk.accepting and disk.state in ("online", "suspect"):
        return Text("refusing", "bold red")
    return Text(disk.state, _STYLES.get(disk.state, ""))


def reasons(disks: Iterable[DiskDocument]) -> Text | None:
    """A line for each disk that is offline: why, for how long, and what comes next; None when all are well."""
    lines = []
    for disk in disks:
        if disk.reason is not None:
            probe = "" if disk.next_probe is None else f"; next probe in {disk.next_probe:.1f} s"
            probe = "; a probe is under way" if disk.next_probe == 0 else probe
            lines.append(f"{disk.name}: offline for {disk.since:.0f} s: {disk.reason}{probe}")
    return Text("\n".join(lines)) if lines else None


def tables(status: StatusDocument, title: str) -> Group:
    """Draw all tables: the disks, and below them the mirrors where there are any."""
    disks = disks_table(status, title)
    return Group(disks, mirrors_table(status)) if status.mirrors else Group(disks)


def mirrors_table(status: StatusDocument) -> Table:
    """Draw the table of the mirrors: for each disk what it answered, and how often it was left for another."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("mirror", no_wrap=True)
    table.add_column("disk", no_wrap=True)
    for heading in ("answered", "fail-overs", "reads", "hedges", "won", "refused"):
        table.add_column(heading, justify="right")
    for mirror in status.mirrors:
        sums = [str(each) for each in (mirror.reads, mirror.hedges, mirror.hedges_won, mirror.hedges_refused)]
        for number, disk in enumerate(mirror.disks):
            first = number == 0
            table.add_row(
                mirror.name if first else "",
                disk,
                str(mirror.answers.get(disk, 0)),
                str(mirror.failovers.get(disk, 0)),
                *(sums if first else [""] * len(sums)),
            )
    return table


def disks_table(status: StatusDocument, title: str) -> Table:
    """Draw the table.

    Args:
        status: What `/status` said.
        title: Text above it.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.caption, table.caption_justify, table.caption_style = reasons(status.disks), "left", ""
    table.add_column("disk", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for heading in ("slots", "stuck", "waiting", "oldest", "reads", "errors", "missed", "refused"):
        table.add_column(heading, justify="right")  # wraps before a name does
    for disk in status.disks:
        table.add_row(
            disk.name,
            state_of(disk),
            f"{disk.in_flight}/{disk.slots}",
            str(disk.stuck),
            str(disk.waiting),
            f"{disk.oldest:.1f} s",
            str(disk.reads),
            str(sum(disk.errors.values())),
            str(disk.timeouts),
            str(disk.rejections),
        )
    return table
