"""``diskread probe``: does one slow read hold up the other requests of a server?"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, cast

import click

from .token_option import token_option

if TYPE_CHECKING:
    from rich.progress import TaskID

    from server.client import Protocol
    from server.probe import Parameters, Result

#: Exit statuses beside 0 (no problem) and 1 (the server has the problem).
COULD_NOT_ASK = 2
INTERRUPTED = 130


class NoVerdictError(click.ClickException):
    """The probe could not be carried out; 1 would mean that the server has the problem."""

    exit_code = COULD_NOT_ASK


@click.command(
    epilog="Exit status: 0 no problem; 1 slow reads hold up other requests; 2 the question could not be put "
    "to this server; 130 interrupted."
)
@click.argument("address", metavar="HOST:PORT")
@click.option(
    "--protocol",
    type=click.Choice(["line", "http"]),
    default="line",
    show_default=True,
    help="Line protocol or HTTP.",
)
@token_option
@click.option("--json", "as_json", is_flag=True, help="Print the result, every latency included, as JSON.")
@click.option(
    "--slow",
    type=click.FloatRange(0.1, 60),
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="Length of a slow read.",
)
@click.option(
    "--slow-count",
    type=click.IntRange(1, 1000),
    default=8,
    show_default=True,
    metavar="N",
    help="Slow reads at a time in part 3.",
)
@click.option(
    "--fast-ms",
    type=click.IntRange(1, 10_000),
    default=10,
    show_default=True,
    metavar="MS",
    help="Length of a fast read, in milliseconds.",
)
@click.option(
    "--fast-count",
    type=click.IntRange(1, 1000),
    default=20,
    show_default=True,
    metavar="N",
    help="Fast requests in parts 1 to 4.",
)
@click.option(
    "--idle",
    "idle_count",
    type=click.IntRange(0, 10_000),
    default=100,
    show_default=True,
    metavar="N",
    help="Idle connections in part 4.",
)
@click.option(
    "--burst",
    "burst_count",
    type=click.IntRange(1, 10_000),
    default=100,
    show_default=True,
    metavar="N",
    help="Requests at once in part 5.",
)
@click.option(
    "--burst-ms",
    type=click.IntRange(1, 10_000),
    default=200,
    show_default=True,
    metavar="MS",
    help="Length of a read in part 5, in milliseconds.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="How much longer than the baseline's median a fast request may take.  [default: 30% of --slow]",
)
@click.option(
    "--limit",
    type=click.FloatRange(0, 3600, min_open=True),
    metavar="SECONDS",
    help="Time limit of a request.  [default: all slow reads one after the other, and 10 s]",
)
@click.pass_context
def probe(
    ctx: click.Context,
    *,
    address: str,
    protocol: str,
    token: str | None,
    as_json: bool,
    slow: float,
    slow_count: int,
    fast_ms: int,
    fast_count: int,
    idle_count: int,
    burst_count: int,
    burst_ms: int,
    tolerance: float | None,
    limit: float | None,
) -> None:
    """Ask a server whether one slow read holds up its other requests.

    Any server will do that simulates disk reads in one of the protocols: `RC,MS,PATH` as a line or as an
    HTTP path. Requests are sent on schedule, whether or not earlier ones were answered (open-loop), and
    latency counts from the scheduled time. It takes about 20 s; a server with the problem takes longer.

    \b
    Parts, with the default options:
      1  20 reads of 10 ms on an idle server: the baseline
      2  the same beside one read of 5 s
      3  the same beside eight reads of 5 s
      4  the same beside one read of 5 s and 100 idle connections
      5  100 reads of 200 ms at once

    The server has the problem (Y) when in parts 2 to 4 a fast request fails or takes over 1.5 s (30% of
    --slow) longer than the baseline's median, when part 5 takes over 4 s (fewer than five reads at a time) or
    one of its requests fails, or when the server stops answering.

    \b
    Examples:
      diskread serve --simulate &
      diskread probe 127.0.0.1:7000
      diskread probe '[::1]:7000' --protocol http --json > result.json
    """
    import gevent
    import msgspec
    from rich.console import Console

    from server import client
    from server import probe as measurement

    try:
        host, port = client.parse_address(address)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="HOST:PORT") from error
    try:
        parameters = measurement.Parameters(
            slow=slow,
            slow_count=slow_count,
            fast_ms=fast_ms,
            fast_count=fast_count,
            idle_count=idle_count,
            burst_count=burst_count,
            burst_ms=burst_ms,
            tolerance=measurement.TOLERANCE_SHARE * slow if tolerance is None else tolerance,
            limit=slow * slow_count + 10 if limit is None else limit,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error

    with client.interruption() as over:
        job = gevent.spawn(_measure, host, port, cast("Protocol", protocol), parameters, token)
        job.link(lambda _job: over.set())
        over.wait()
        if not job.ready():
            job.kill()
            click.echo("Interrupted: no verdict.", err=True)
            ctx.exit(INTERRUPTED)
        outcome = job.get()
    if isinstance(outcome, str):
        raise NoVerdictError(outcome)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(outcome), indent=2))
    else:
        # A table for a pipe or a file need not be squeezed into the 80 columns that rich assumes there.
        console = Console(width=None if sys.stdout.isatty() else 120)
        console.print(measurement.render(outcome))
        click.echo(f"Problem? {'Y' if outcome.problem else 'N'}")
    ctx.exit(1 if outcome.problem else 0)


def _measure(host: str, port: int, protocol: Protocol, parameters: Parameters, token: str | None) -> Result | str:
    """Run the probe with a progress bar for each part on stderr; a string says why it could not be run."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from server import client
    from server import probe as measurement

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    # Drawn by a thread, which takes its time from the measurement: seldom.
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as bars:
        tasks: dict[str, TaskID] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        try:
            server = client.resolve(host, port, token=token)
            return measurement.probe(server, protocol=protocol, parameters=parameters, progress=advance)
        except (client.RequestError, measurement.CouldNotAskError) as error:
            return str(error)
