"""``diskread request``: sends requests and says which were slow, like the client of the first experiment."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import Counter
from typing import IO, TYPE_CHECKING, cast

import click

from .token_option import token_option

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from server.client import Protocol, Reply, Request, RequestError, Server
    from server.probe import Latency

#: What is sent when no file is given: a read of 10 ms.
DEFAULT_REQUEST = b"0,10,some_file"

#: Failures that are described; further ones are only counted.
DESCRIBED_FAILURES = 10

COULD_NOT_CONNECT = 2
INTERRUPTED = 130


class UnreachableError(click.ClickException):
    """Not one connection could be made; 1 would mean that some requests failed."""

    exit_code = COULD_NOT_CONNECT


@dataclasses.dataclass
class Summary:
    """How the requests went.

    Attributes:
        server: Who was asked.
        protocol: In which protocol.
        planned: Requests that were to be sent.
        completed: Requests that are over: answered, failed or given up.
        failed: Requests that failed, by kind.
        slow: Requests that took longer than the time-out.
        latency: Latency of those that are over, in seconds; None when there are none.
        wall: Seconds that all of it took.
        ended: ``"complete"``, ``"interrupted"`` or ``"out of time"``.
    """

    server: str
    protocol: str
    planned: int
    completed: int
    failed: dict[str, int]
    slow: int
    latency: Latency | None
    wall: float
    ended: str

    @property
    def exit_code(self) -> int:
        """0 when every request was sent and answered in time."""
        if self.ended == "interrupted":
            return INTERRUPTED
        return 1 if self.failed or self.slow or self.completed < self.planned else 0


@click.command(
    epilog="Exit status: 0 all were answered in time; 1 some were slow, failed or not sent; 2 no connection "
    "could be made; 130 interrupted."
)
@click.argument("address", metavar="[HOST:PORT]", default="127.0.0.1:7000")
@click.option(
    "--timeout",
    type=click.FloatRange(0, 3600, min_open=True),
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="Give a request up, and say so, after this time.",
)
@click.option(
    "--count",
    type=click.IntRange(1, 1_000_000),
    default=1000,
    show_default=True,
    metavar="N",
    help="How many times the list of requests is sent.",
)
@click.option(
    "--file-list",
    type=click.File("rb"),
    metavar="FILE",
    help="The list: one RC,MS,PATH a line; - is standard input.  [default: the line 0,10,some_file]",
)
@click.option(
    "--concurrency",
    type=click.IntRange(1, 10_000),
    default=1,
    show_default=True,
    metavar="N",
    help="Requests under way at a time.",
)
@click.option(
    "--max-time",
    type=click.FloatRange(0, 86_400, min_open=True),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="Stop after this time, whatever is left to send.",
)
@click.option(
    "--protocol",
    type=click.Choice(["line", "http"]),
    default="line",
    show_default=True,
    help="Line protocol or HTTP.",
)
@token_option
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.pass_context
def request(
    ctx: click.Context,
    *,
    address: str,
    timeout: float,
    count: int,
    file_list: IO[bytes] | None,
    concurrency: int,
    max_time: float,
    protocol: str,
    token: str | None,
    as_json: bool,
) -> None:
    """Send requests to a server and report the slow ones.

    A request asks for a disk read of MS milliseconds and says which status RC it wants back. The next one is
    sent when the last was answered (closed-loop), so that a stalled server is asked less often: to find out
    whether a server has the problem, use `diskread probe`. Each request that is not answered in time is shown
    on standard error as `***client timeout SECONDS` with the request.

    \b
    Examples:
      diskread request --count 10
      diskread request 127.0.0.1:7000 --concurrency 50 --timeout 0.5
      echo 0,4634,some_file | diskread request --file-list - --count 1
    """
    import gevent
    import msgspec
    from rich.console import Console
    from rich.progress import Progress
    from rich.text import Text

    from server import client

    try:
        host, port = client.parse_address(address)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="HOST:PORT") from error
    requests = _read_list(file_list)
    planned = count * len(requests)
    todo = itertools.chain.from_iterable(itertools.repeat(requests, count))

    with (
        client.interruption() as over,
        Progress(console=Console(stderr=True), refresh_per_second=4) as bars,
    ):
        bar = bars.add_task("requests", total=planned)
        tally = _Tally(
            tell=lambda line: bars.console.print(Text(line), soft_wrap=True),
            advance=lambda: bars.advance(bar),
        )
        start = time.monotonic()
        senders = gevent.spawn(
            _send_all,
            host,
            port,
            todo,
            tally,
            protocol=cast("Protocol", protocol),
            concurrency=min(concurrency, planned),
            timeout=timeout,
            token=token,
        )
        senders.link(lambda _senders: over.set())
        over.wait(max_time)
        wall = time.monotonic() - start
        if senders.ready():
            ended = "complete"
            senders.get()
        else:
            ended = "interrupted" if over.is_set() else "out of time"
            senders.kill()

    if tally.unreachable is not None and not tally.contacts:
        here = isinstance(tally.unreachable, client.ExhaustedError)
        hint = "" if here else " Is the server running? `diskread serve --simulate` starts one."
        raise UnreachableError(f"{tally.unreachable}.{hint}")
    summary = Summary(
        server=address,
        protocol=protocol,
        planned=planned,
        completed=len(tally.latencies),
        failed=dict(tally.failed),
        slow=tally.slow,
        latency=tally.latency(),
        wall=wall,
        ended=ended,
    )
    click.echo(msgspec.json.format(msgspec.json.encode(summary), indent=2) if as_json else _describe(summary, timeout))
    ctx.exit(summary.exit_code)


class _Tally:
    """What has come of the requests so far."""

    def __init__(self, *, tell: Callable[[str], None], advance: Callable[[], None]) -> None:
        self.tell = tell
        self.advance = advance
        self.latencies: list[float] = []
        self.failed: Counter[str] = Counter()
        self.slow = 0
        self.contacts = 0
        self.unreachable: RequestError | None = None

    def latency(self) -> Latency | None:
        from server.probe import Latency

        return Latency.of(self.latencies) if self.latencies else None

    def answered(self, request: Request, reply: Reply, protocol: Protocol) -> None:
        self.contacts += 1
        self._over(reply.latency)
        if not reply.succeeded(request, protocol):
            self._fail(request, f"status {reply.status}", f"status {reply.status}")

    def gave_up(self, request: Request, error: RequestError) -> None:
        self.contacts += error.connected
        self.slow += 1
        self._over(error.latency)
        self.tell(f"***client timeout {error.latency:.3f}  {request}")

    def broke(self, request: Request, error: RequestError) -> None:
        self.contacts += error.connected
        self._over(error.latency)
        self._fail(request, error.kind, str(error))

    def _over(self, latency: float) -> None:
        self.latencies.append(latency)
        self.advance()

    def _fail(self, request: Request, kind: str, why: str) -> None:
        self.failed[kind] += 1
        described = self.failed.total()
        if described <= DESCRIBED_FAILURES:
            self.tell(f"failed: {request}: {why}")
        if described == DESCRIBED_FAILURES:
            self.tell("Further failures are only counted.")


def _read_list(file_list: IO[bytes] | None) -> list[Request]:
    """The requests of a file; its empty lines do not count."""
    from server.client import Request

    if file_list is None:
        return [Request.parse(DEFAULT_REQUEST)]
    name = getattr(file_list, "name", "-")
    requests = []
    for number, line in enumerate(file_list, start=1):
        if line.strip():
            try:
                requests.append(Request.parse(line))
            except ValueError as error:
                raise click.UsageError(f"{name}, line {number}: {error}") from error
    if not requests:
        raise click.UsageError(f"{name} holds no requests; expected lines like 0,10,some_file")
    return requests


def _send_all(
    host: str,
    port: int,
    todo: Iterator[Request],
    tally: _Tally,
    *,
    protocol: Protocol,
    concurrency: int,
    timeout: float,
    token: str | None,
) -> None:
    """Send requests, so many at a time, until there are no more or the server turns out not to be there."""
    from gevent.pool import Group

    from server import client

    def send(server: Server) -> None:
        for request in todo:
            try:
                reply = client.send(server, request, protocol=protocol, limit=timeout)
            except client.RequestError as error:
                if not error.connected and not tally.contacts:
                    tally.unreachable = error
                    return
                (tally.gave_up if isinstance(error, client.RequestTimeoutError) else tally.broke)(request, error)
            else:
                tally.answered(request, reply, protocol)

    group = Group()
    try:
        server = client.resolve(host, port, token=token)
        for _ in range(concurrency):
            group.spawn(send, server)
        group.join(raise_error=True)
    except client.RequestError as error:
        tally.unreachable = error
    finally:
        group.kill()


def _describe(summary: Summary, timeout: float) -> str:
    """The summary in words."""
    rate = summary.completed / summary.wall if summary.wall else 0.0
    failed = sum(summary.failed.values())
    lines = [
        f"{summary.completed} of {summary.planned} requests in {summary.wall:.3f} s ({rate:.1f}/s): "
        f"{failed} failed, {summary.slow} slow (over {timeout:g} s)"
    ]
    if summary.failed:
        lines.append("failed: " + ", ".join(f"{number} {kind}" for kind, number in sorted(summary.failed.items())))
    if summary.latency is not None:
        latency = summary.latency
        lines.append(
            f"latency, s: min {latency.min:.3f}  p50 {latency.p50:.3f}  p99 {latency.p99:.3f}  max {latency.max:.3f}"
        )
    if summary.ended == "interrupted":
        lines.append("Interrupted.")
    elif summary.ended == "out of time":
        lines.append("Out of time; --max-time allows more.")
    return "\n".join(lines)
