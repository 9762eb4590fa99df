"""The disks of a server as a table for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from .status import StatusDocument

_STYLES = {"online": "green", "suspect": "yellow", "half-open": "yellow", "offline": "bold red"}


def disks_table(status: StatusDocument, title: str) -> Table:
    """Draw the table.

    Args:
        status: What `/status` said.
        title: Text above it.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("disk", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for heading in ("slots", "stuck", "waiting", "oldest", "reads", "errors", "missed", "refused"):
        table.add_column(heading, justify="right")  # wraps before a name does
    for disk in status.disks:
        refusing = not disk.accepting and disk.state in ("online", "suspect")
        state, style = ("refusing", "bold red") if refusing else (disk.state, _STYLES.get(disk.state, ""))
        table.add_row(
            disk.name,
            f"[{style}]{state}[/]" if style else state,
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
