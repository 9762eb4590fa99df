"""`diskread check`."""

from __future__ import annotations

import os
import platform
import sys

import click
import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from diskread import Disk, DiskError, Limits
from diskread.probe import probe


class Finding(msgspec.Struct, frozen=True):
    """What was found out about a directory.

    Attributes:
        directory: Which one.
        readable: Whether it is there and its device answers.
        inline: Whether cached data can be read there without a thread.
        direct: Whether probes can read past the page cache (O_DIRECT); null when nothing was read.
        problem: Why not, in words; null when all is well.
        advice: What to do about it; null when nothing can be done, or need be.
    """

    directory: str
    readable: bool
    inline: bool
    direct: bool | None
    problem: str | None
    advice: str | None


@click.command("check", short_help="Tell what diskread can do with a directory on this machine.")
@click.argument("directories", nargs=-1, required=True, metavar="DIR...", type=click.Path())
@click.option(
    "--deadline",
    type=click.FloatRange(0.01),
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="How long each directory has to answer.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a list of findings.")
def check(directories: tuple[str, ...], deadline: float, as_json: bool) -> None:
    """Tell of each directory whether its device answers, and whether cached data can be read there without a thread.

    Reads without a thread need ext4 or xfs, Linux 6.5 or newer, and no seccomp filter in their way. Everywhere else
    diskread works as well, with a thread for each read. A directory that hangs does not hang this command.

    \b
    Examples:
      diskread check /srv/a /srv/b
      diskread check --json /srv/*

    Exit status: 0 when all is well, 1 when something is not, 2 for wrong options.
    """
    findings = [_look_at(directory, deadline) for directory in directories]
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(findings)).decode())
    else:
        _print(findings)
    sys.exit(0 if all(each.inline for each in findings) else 1)


def _look_at(directory: str, deadline: float) -> Finding:
    root = os.path.abspath(os.fsencode(directory))
    with Disk(directory, None, Limits(deadline=deadline)) as disk:
        try:
            found = disk.run(probe, root, None, None)
        except (DiskError, OSError) as error:
            advice = "see whether it is mounted, and whether its device answers: dmesg, smartctl"
            return Finding(directory, False, False, None, getattr(error, "reason", None) or str(error), advice)
    reason = found.capability.reason
    direct = found.direct if found.sample is not None else None
    return Finding(directory, True, reason is None, direct, reason, None if reason is None else _advice(reason))


def _advice(reason: str) -> str:
    if "file system" in reason:
        return "nothing is wrong: each read takes a thread there; ext4 and xfs do without for cached data"
    if "reads ahead" in reason:
        return "a smaller read-ahead will do: echo 128 > /sys/block/DEVICE/queue/read_ahead_kb"
    return f"this is Linux {platform.release()}: 6.5 or newer is needed, and a container may filter system calls"


def _print(findings: list[Finding]) -> None:
    table = Table(box=box.SIMPLE_HEAD, title="Cached reads without a thread", title_justify="left")
    for heading in ("directory", "answers", "inline", "O_DIRECT", "why not, and what to do"):
        table.add_column(heading)
    for each in findings:
        direct = "?" if each.direct is None else "yes" if each.direct else "no"
        why = ". ".join(filter(None, (each.problem, each.advice)))
        table.add_row(each.directory, _yes(each.readable), _yes(each.inline), direct, why)
    Console().print(table)


def _yes(value: bool) -> str:
    return "[green]yes[/]" if value else "[yellow]no[/]"
