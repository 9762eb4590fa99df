"""The disks of a server as a table for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
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
