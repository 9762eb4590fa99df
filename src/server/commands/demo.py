"""`diskread demo`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click
from rich.console import Console

from ..client import interruption
from .failure import CannotRun

if TYPE_CHECKING:
    from collections.abc import Callable


@click.command("demo", short_help="See one disk hang and the others go on, in 30 seconds.")
@click.option(
    "--hang",
    type=click.FloatRange(1, 60),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long the disk hangs.",
)
@click.option(
    "--rate", type=click.FloatRange(1, 500), default=50.0, show_default=True, help="Requests per second to each disk."
)
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port of the server; 0 takes any that is free.")
@click.option(
    "--comparison/--no-comparison",
    default=True,
    show_default=True,
    help="Run the same load on reads that hold the GIL, too.",
)
@click.option("--keep", is_flag=True, help="Leave the server up for a look around, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON; the show goes to standard error.")
def demo(*, hang: float, rate: float, port: int, comparison: bool, keep: bool, as_json: bool) -> None:
    """See one disk hang and the others go on, in 30 seconds, with nothing to set up.

    Four directories stand for four disks, with real files. A server serves them, each gets a steady load, and one of
    them hangs. Then the same load once more on a server whose reads hold the GIL, as an ordinary extension's would.

    The hang is simulated: reads of that disk sleep in the kernel (nanosleep) for as long as it lasts. To the server
    that is the same as a read that the disk does not answer; the project's tests do it with file systems that really
    hang, which needs root.

    Exit status: 0 when the healthy disks did not notice, 1 when they suffered, 2 when the demo could not run.
    """
    from ..demo.show import run, to_json
    from ..demo.stage import StageError

    console = Console(stderr=as_json)
    stay: Callable[[int], None] | None = (lambda port: _stay(console, port)) if keep else None
    try:
        result = run(console, hang=hang, rate=rate, port=port, comparison=comparison, stay=stay)
    except StageError as error:
        raise CannotRun(str(error)) from error
    except KeyboardInterrupt:
        sys.exit(130)
    if as_json:
        click.echo(to_json(result))
    sys.exit(1 if result.suffered else 0)


def _stay(console: Console, port: int) -> None:
    console.print(
        f"\nThe server stays up: http://127.0.0.1:{port}/ shows its disks, Ctrl-C stops it. Try\n"
        f"  curl -i http://127.0.0.1:{port}/v1/disk1/file1 -o /dev/null\n"
        f"  curl http://127.0.0.1:{port}/0,5000,disk3/file1   (a stall of 5 s, longer than the deadline)\n"
        f"  diskread status http://127.0.0.1:{port} --watch"
    )
    with interruption() as interrupted:
        interrupted.wait()
