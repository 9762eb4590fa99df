"""`diskread check`."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
import msgspec
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from diskread import Disk, DiskError, DiskTimeout, Limits
from diskread.probe import probe

from .. import config as configuration
from ..checks import Report, disks, machine, places, protection
from ..checks.apart import apart
from ..checks.bounded import within
from .failure import CannotRun

_COLORS = {"ok": "green", "warning": "yellow", "error": "red"}


class DirectoryFinding(msgspec.Struct, frozen=True):
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


class _UntouchedPath(click.Path):
    """A path that is not looked at, because that may hang; `click.Path` calls stat(2) on whatever it is given."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value


@click.command("check", short_help="Tell whether a configuration works on this machine, or what a directory can do.")
@click.argument("directories", nargs=-1, metavar="[DIR]...", type=_UntouchedPath())
@click.option(
    "--config",
    type=_UntouchedPath(dir_okay=False),
    metavar="FILE",
    help="Look at everything that this configuration needs, and at all of its disks.",
)
@click.option(
    "--deadline",
    type=click.FloatRange(0.01),
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="How long each directory, or disk, has to answer.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def check(directories: tuple[str, ...], config: str | None, deadline: float, as_json: bool) -> None:
    """Tell whether a configuration works on this machine, or what diskread can do with directories.

    With --config: system calls, descriptors, threads, the address, the places of access log and administrative socket,
    and of each disk and mirror whether it answers, its file system, device and permissions; with the next step for
    everything that is not as it should be. Run it as the user of the server: it is that one's permissions and limits
    that count.

    With directories: of each whether its device answers, and whether cached data can be read there without a thread.
    Reads without a thread need ext4 or xfs, Linux 6.5 or newer, and no seccomp filter in their way. Everywhere else
    diskread works as well, with a thread for each read. A disk that hangs does not hang this command.

    \b
    Examples:
      diskread check /srv/a /srv/b
      diskread check --json /srv/*
      sudo -u diskread diskread check --config /etc/diskread/diskread.toml

    Exit status: 0 when all is well, 1 when something is not (with --config: there is an error; warnings alone are
    none), 2 for wrong options or a wrong configuration.
    """
    if bool(directories) == (config is not None):
        raise click.UsageError("name either directories or a configuration (--config FILE)")
    if config is not None:
        path = Path(config)
        report = apart(partial(_check_configuration, path, deadline))
        if as_json:
            click.echo(msgspec.json.format(msgspec.json.encode(report)).decode())
        else:
            _print_report(path, report)
        sys.exit(0 if report.ok else 1)
    findings = apart(lambda: [_look_at(directory, deadline) for directory in directories])
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(findings)).decode())
    else:
        _print(findings)
    sys.exit(0 if all(each.inline for each in findings) else 1)


def _look_at(directory: str, deadline: float) -> DirectoryFinding:
    root = os.path.abspath(os.fsencode(directory))
    with Disk(directory, None, Limits(deadline=deadline)) as disk:
        try:
            found = disk.run(probe, root, None, None)
        except (DiskError, OSError) as error:
            advice = "see whether it is mounted, and whether its device answers: dmesg, smartctl"
            return DirectoryFinding(directory, False, False, None, getattr(error, "reason", None) or str(error), advice)
    reason = found.capability.reason
    direct = found.direct if found.sample is not None else None
    return DirectoryFinding(
        directory, True, reason is None, direct, reason, None if reason is None else disks.advice(reason)
    )


def _print(findings: list[DirectoryFinding]) -> None:
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


def _check_configuration(path: Path, deadline: float) -> Report:
    try:
        config = within(deadline, configuration.load, path)
    except DiskTimeout:
        raise CannotRun(f"{path}: its disk has not answered within {deadline:g} s") from None
    except configuration.ConfigError as error:
        raise CannotRun(str(error)) from error
    with configuration.make_disks(config) as configured:
        seen = disks.look(configured, deadline)
        findings = [
            *machine.user(),
            *machine.kernel(),
            *machine.descriptors(config, configured),
            *machine.threads(configured),
            places.address(config, deadline),
            *places.files(config, seen, deadline),
            *protection.files(config, deadline),
            *disks.describe(configured, seen),
            *disks.mirrors(configured, seen),
        ]
    return Report(all(each.verdict != "error" for each in findings), findings)


def _print_report(path: Path, report: Report) -> None:
    table = Table(box=box.SIMPLE_HEAD, title=Text(str(path)), title_justify="left")
    for heading in ("", "what", "what was found, and what to do"):
        table.add_column(heading)
    for each in report.findings:
        found = Text(each.text)
        if each.next_step is not None:
            found.append(f"\n-> {each.next_step}", "italic")
        table.add_row(Text(each.verdict, _COLORS[each.verdict]), Text(each.subject), found)
    Console().print(table)
    counted = {verdict: sum(each.verdict == verdict for each in report.findings) for verdict in ("error", "warning")}
    click.echo(", ".join(f"{count} {verdict}{'' if count == 1 else 's'}" for verdict, count in counted.items()))
