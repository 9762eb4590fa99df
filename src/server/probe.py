"""Asks any server that speaks the protocol: does one long blocking read hold up the other requests?

The load is open-loop. Every request has a scheduled start and a greenlet of its own and is sent on schedule,
whether or not earlier ones were answered; its latency counts from the scheduled start. A stall therefore
shows in every request that fell into it, and cannot hide itself by making the client wait.

Five parts, each on a server that answered everything before it:

* ``baseline``: fast requests on an idle server;
* ``one_slow``: fast requests beside one slow read, spread over its length;
* ``many_slow``: the same beside eight slow reads;
* ``idle_clients``: the same beside one slow read while 100 connections are open that send nothing;
* ``burst``: 100 requests at once, and how long all of them take.

The verdict, and where its thresholds come from:

* ``one_slow``, ``many_slow``, ``idle_clients``: a problem when at least one fast request *failed* or took
  more than `Parameters.tolerance` longer than the baseline's median. By default that is 30% of the slow
  read: 1.5 s of 5 s. A server with the problem makes them wait for up to the whole slow read, a healthy
  one adds milliseconds, a loaded machine tens of them. 1.5 s is also clear of the 1 s after which a
  client's kernel repeats a SYN that a short listen backlog dropped, which imitates the problem without
  being it (`Part.slow_connects` counts these).
* ``burst``: a problem when a request failed or when fewer than five reads ran at a time on the average,
  that is when the whole took more than a fifth of what it takes one after the other: 4 s for 100 reads of
  200 ms, where 0.2 s is ideal. This, too, leaves room for SYNs that are repeated after 1 s and again
  after 3 s.
* The server has the problem when a part has it, or when it no longer answers after one.

"No problem" is only said when the question was really asked: reads that are over long before they should be
(an echo server, a server that refuses long reads) and idle connections that could not be opened raise
`CouldNotAskError`. So does a shortage of file descriptors on the machine that asks.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

import gevent
import msgspec
from gevent.pool import Group
from hdrh.histogram import HdrHistogram
from rich.console import Group as Lines
from rich.table import Table
from rich.text import Text

from server import client

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gevent import socket
    from gevent.greenlet import Greenlet
    from rich.console import RenderableType

    from server.client import Protocol, Reply, Server

    #: Called as ``progress(what, done, total)`` while the probe runs; counts are of requests.
    Progress = Callable[[str, int, int], None]

#: Share of the slow read's length by which a fast request may be late before it counts as held up.
TOLERANCE_SHARE = 0.3

#: Fewer reads at a time than this, on the average of a burst, are in effect run one after the other.
CONCURRENCY_FLOOR = 5

#: A connection that took longer than this, in seconds, had its SYN dropped: the kernel repeats it after 1 s.
SLOW_CONNECT = 0.9

#: A read that is over sooner than this share of its length was not simulated.
SIMULATED_SHARE = 0.5

#: Patience with a server before the first part, in seconds: longer than a virtual machine takes to warm up.
FIRST_REPLY_LIMIT = 10.0

#: Seconds between planning a part and its first request, so that starting greenlets delays none of them.
LEAD = 0.05

WARM_UP_REQUESTS = 5

_PATH = b"some_file"


class CouldNotAskError(Exception):
    """The question could not be put to this server. The message says why and what to do next."""


class Parameters(msgspec.Struct, frozen=True, kw_only=True):
    """How much of what is asked.

    Attributes:
        slow: Length of a slow read, in seconds.
        slow_count: Slow reads at a time in the part with many.
        fast_ms: Length of a fast read, in milliseconds.
        fast_count: Fast requests in a part.
        spacing: Seconds between the fast requests of the baseline.
        idle_count: Connections that are open and send nothing.
        burst_count: Requests at once in the last part.
        burst_ms: Length of each of its reads, in milliseconds.
        tolerance: By how many seconds more than the baseline's median a fast request may take.
        limit: Time limit of a request, in seconds. Longer than all slow reads one after the other, so that a
            request that was held up can be told from one that is never answered.

    Raises:
        ValueError: The tolerance is so long that a request which was held up could not be noticed.
    """

    slow: float = 5.0
    slow_count: int = 8
    fast_ms: int = 10
    fast_count: int = 20
    spacing: float = 0.05
    idle_count: int = 100
    burst_count: int = 100
    burst_ms: int = 200
    tolerance: float = 5.0 * TOLERANCE_SHARE
    limit: float = 50.0

    def __post_init__(self) -> None:
        """Refuse thresholds that could not tell a problem."""
        longest_wait = self.slow * self.fast_count / (self.fast_count + 1)
        if self.tolerance > 0.9 * longest_wait:
            raise ValueError(
                f"a tolerance of {self.tolerance:g} s is too long to notice a read of {self.slow:g} s: "
                f"at most {0.9 * longest_wait:.3g} s"
            )

    @property
    def burst_ideal(self) -> float:
        """Seconds that the burst takes when all of its reads run at once."""
        return self.burst_ms / 1000

    @property
    def burst_tolerance(self) -> float:
        """Seconds after which the burst counts as a problem."""
        return self.burst_ideal * max(1.0, self.burst_count / CONCURRENCY_FLOOR)


class Sample(msgspec.Struct, frozen=True):
    """One request, as the client saw it.

    Attributes:
        scheduled: When it should have been sent, in seconds from the start of its part.
        latency: Seconds from then until it was answered, or until it failed.
        connect: Seconds that connecting took; None when it failed.
        failure: Why it failed, in a word or two; None when it was answered as asked.
    """

    scheduled: float
    latency: float
    connect: float | None
    failure: str | None


class Latency(msgspec.Struct, frozen=True):
    """Latencies in seconds. All requests count, failed ones until they failed. The maximum is exact.

    The percentiles come from an HdrHistogram with three significant digits.
    """

    min: float
    p50: float
    p99: float
    max: float

    @classmethod
    def of(cls, latencies: Sequence[float]) -> Latency:
        """Summarise latencies.

        Args:
            latencies: In seconds, at least one.

        Returns:
            Their summary.
        """
        histogram = HdrHistogram(1, 24 * 3_600_000_000, 3)
        for latency in latencies:
            histogram.record_value(max(1, round(latency * 1e6)))
        longest = max(latencies)
        # A percentile is the upper end of its bucket, which may lie beyond the longest latency.
        p50, p99 = (min(longest, histogram.get_value_at_percentile(share) / 1e6) for share in (50, 99))
        return cls(min(latencies), p50, p99, longest)


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one part of the probe.

    Attributes:
        name: Which part; see the module's description.
        title: The same in words.
        count: Requests judged: the fast ones, or those of the burst.
        failures: How many of them failed, by kind.
        latency: Their latency.
        worst_extra: The longest latency minus the baseline's median, in seconds; None where fast requests are
            not beside slow ones.
        wall: Seconds from the scheduled start of the part until its last request, slow ones too, was over.
        ideal: Seconds that the burst would take with all reads at once; None in the other parts.
        threshold: What ``worst_extra``, or ``wall`` in the burst, may be, in seconds; None in the baseline.
        slow_connects: Connections that took a second or more: the listen backlog is short.
        problem: The verdict; None for the baseline.
        samples: The requests judged.
        slow_samples: The slow requests beside them.
    """

    name: str
    title: str
    count: int
    failures: dict[str, int]
    latency: Latency
    worst_extra: float | None
    wall: float
    ideal: float | None
    threshold: float | None
    slow_connects: int
    problem: bool | None
    samples: list[Sample]
    slow_samples: list[Sample]


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of the probe. ``msgspec.json.encode`` makes JSON of it, `render` a table.

    Attributes:
        server: Who was asked.
        protocol: In which protocol.
        parameters: What was asked.
        problem: The verdict: does a slow read hold up other requests?
        stopped_after: The part after which the server answered no more; the later parts are missing then.
        parts: The parts in the order in which they were asked.
    """

    server: str
    protocol: str
    parameters: Parameters
    problem: bool
    stopped_after: str | None
    parts: list[Part]


def probe(
    server: Server,
    *,
    protocol: Protocol = "line",
    parameters: Parameters | None = None,
    progress: Progress = lambda _what, _done, _total: None,
) -> Result:
    """Put the question to a server.

    Takes about three times the slow read's length and 3 s with a healthy server, longer with one that has the
    problem. Can be stopped by killing the greenlet that runs it.

    Args:
        server: Whom to ask.
        protocol: In which protocol.
        parameters: How much of what; the defaults are those of the module's description.
        progress: Told about each request that is over.

    Returns:
        What was measured, and the verdict.

    Raises:
        CouldNotAskError: Nothing listens there, it does not speak the protocol, it does not simulate
            reads, or it fails even when idle.
    """
    return _Probe(server, protocol, parameters or Parameters(), progress).run()


def render(result: Result) -> RenderableType:
    """Lay a result out for people.

    Args:
        result: What `probe` returned.

    Returns:
        A table, followed by the rules of the verdict and what else there is to know.
    """
    table = Table(title=f"{result.server}, {result.protocol} protocol; seconds", title_justify="left")
    table.add_column("Fast requests", overflow="fold")
    for heading in ("failed", "min", "p50", "p99", "max", "extra", "wall"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("Problem?", justify="center", no_wrap=True)
    verdicts = {None: Text(""), True: Text("Y", "bold red"), False: Text("N", "bold green")}
    for part in result.parts:
        figures = (part.latency.min, part.latency.p50, part.latency.p99, part.latency.max)
        table.add_row(
            part.title,
            f"{sum(part.failures.values())}/{part.count}",
            *(f"{figure:.3f}" for figure in figures),
            "" if part.worst_extra is None else f"{part.worst_extra:.3f}",
            f"{part.wall:.3f}",
            verdicts[part.problem],
        )
    return Lines(table, *(Text(note) for note in _notes(result)))


def _notes(result: Result) -> list[str]:
    """The rules of the verdict, then what went wrong."""
    parameters = result.parameters
    notes = [
        f"Held up: a fast request that failed or took over {parameters.tolerance:g} s longer than the "
        "baseline's median.",
        f"Burst: ideal {parameters.burst_ideal:g} s, a problem over {parameters.burst_tolerance:g} s "
        f"(fewer than {CONCURRENCY_FLOOR} reads at a time) or when one failed.",
    ]
    for part in result.parts:
        if part.failures:
            notes.append(f"Failed, {part.title}: {_counted(part.failures)}.")
        if part.slow_connects:
            notes.append(
                f"Slow to connect, {part.title}: {part.slow_connects} took a second or more; the server was "
                "not accepting, or its listen backlog is too short."
            )
    if result.stopped_after is not None:
        notes.append(f"The server stopped answering after: {result.stopped_after}. Later parts were not asked.")
    return notes


def _counted(failures: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(failures.items()))


class _Probe:
    """One run of the probe."""

    def __init__(self, server: Server, protocol: Protocol, parameters: Parameters, progress: Progress) -> None:
        self.server = server
        self.protocol = protocol
        self.parameters = parameters
        self.progress = progress
        self.parts: list[Part] = []

    def run(self) -> Result:
        """Ask part after part, until the last or until the server answers no more."""
        parameters = self.parameters
        self.warm_up()
        baseline = self.baseline()
        median = baseline.latency.p50
        self.parts.append(baseline)

        fast = f"{parameters.fast_count} x {parameters.fast_ms} ms"
        beside = f"{fast} beside {{}} x {parameters.slow:g} s"
        many = parameters.slow_count
        asks: list[Callable[[], Part]] = [
            lambda: self.beside_slow("one_slow", beside.format(1), median, slow_count=1),
            lambda: self.beside_slow("many_slow", beside.format(many), median, slow_count=many),
            lambda: self.beside_idle_clients(f"{beside.format(1)}, {parameters.idle_count} idle clients", median),
            self.burst,
        ]
        for ask in asks:
            if not self.answers():
                return self.result(stopped_after=self.parts[-1].title)
            self.parts.append(ask())
        return self.result(stopped_after=None if self.answers() else self.parts[-1].title)

    def result(self, *, stopped_after: str | None) -> Result:
        return Result(
            server=str(self.server),
            protocol=self.protocol,
            parameters=self.parameters,
            problem=stopped_after is not None or any(part.problem for part in self.parts),
            stopped_after=stopped_after,
            parts=self.parts,
        )

    def warm_up(self) -> None:
        """Send the first requests and see whether the server is one that can be asked."""
        limit = min(FIRST_REPLY_LIMIT, self.parameters.limit)
        for _ in range(WARM_UP_REQUESTS):
            try:
                reply = self.send(self.parameters.fast_ms, time.monotonic(), limit)
            except client.ConnectError as error:
                raise CouldNotAskError(
                    f"{error}. Is the server running? `diskread serve --simulate` starts one."
                ) from error
            except client.ExhaustedError as error:
                raise CouldNotAskError(f"{error}.") from error
            except client.RequestError as error:
                other = "line" if self.protocol == "http" else "http"
                raise CouldNotAskError(
                    f"{error}. If this server speaks the other generation of the protocol, try --protocol {other}."
                ) from error
            failure = self.failure(reply)
            if failure is not None:
                raise CouldNotAskError(
                    f"{self.server} answered {failure} to a simulated read of {self.parameters.fast_ms} ms: "
                    "it does not simulate reads. `diskread serve` does when it is started with --simulate."
                )
            if reply.latency < SIMULATED_SHARE * self.parameters.fast_ms / 1000:
                raise CouldNotAskError(
                    f"{self.server} answered a read of {self.parameters.fast_ms} ms after "
                    f"{reply.latency * 1000:.1f} ms: it does not simulate reads, so that it cannot be asked."
                )

    def answers(self) -> bool:
        """Whether the server still answers a fast request. Not measured; it also lets the server settle."""
        try:
            self.send(self.parameters.fast_ms, time.monotonic(), self.parameters.limit)
        except client.RequestError as error:
            # That this machine could not ask says nothing about the server.
            return isinstance(error, client.ExhaustedError)
        return True

    def baseline(self) -> Part:
        parameters = self.parameters
        offsets = [index * parameters.spacing for index in range(parameters.fast_count)]
        title = f"{parameters.fast_count} x {parameters.fast_ms} ms, idle server"
        samples, _, wall = self.load(title, offsets, parameters.fast_ms)
        part = self.part("baseline", title, samples, wall=wall)
        if part.failures:
            raise CouldNotAskError(
                f"{self.server} fails fast requests even when it has nothing else to do: "
                f"{_counted(part.failures)} of {part.count}. Nothing can be said about slow reads before "
                "that is put right."
            )
        return part

    def beside_slow(self, name: str, title: str, median: float, *, slow_count: int) -> Part:
        """Fast requests, spread over the length of slow reads that start together."""
        parameters = self.parameters
        step = parameters.slow / (parameters.fast_count + 1)
        offsets = [(index + 1) * step for index in range(parameters.fast_count)]
        samples, slow_samples, wall = self.load(title, offsets, parameters.fast_ms, slow_count)
        worst_extra = max(sample.latency for sample in samples) - median
        failed = any(sample.failure for sample in samples)
        problem = failed or worst_extra > parameters.tolerance
        longest = max(sample.latency for sample in slow_samples)
        if not problem and longest < SIMULATED_SHARE * parameters.slow:
            outcomes = ", ".join(sorted({sample.failure or "answered" for sample in slow_samples}))
            raise CouldNotAskError(
                f"{self.server} ended a read of {parameters.slow:g} s after {longest:.3f} s ({outcomes}): "
                "nothing was there to hold the fast requests up. Ask with a shorter --slow, or let the "
                "server simulate longer reads."
            )
        return self.part(
            name,
            title,
            samples,
            slow_samples=slow_samples,
            wall=wall,
            worst_extra=worst_extra,
            threshold=parameters.tolerance,
            problem=problem,
        )

    def beside_idle_clients(self, title: str, median: float) -> Part:
        """One slow read again, while connections are open that send nothing."""
        connections: list[socket.socket] = []
        wanted = self.parameters.idle_count
        try:
            obstacle = self.open_idle(connections)
            part = self.beside_slow("idle_clients", title, median, slow_count=1)
        finally:
            for connection in connections:
                connection.close()
        if not part.problem and obstacle is not None:
            raise CouldNotAskError(
                f"only {len(connections)} of {wanted} idle connections to {self.server} could be opened: "
                f"{obstacle}. Ask with fewer (--idle)."
            )
        return part

    def open_idle(self, connections: list[socket.socket]) -> str | None:
        """Open the connections that send nothing, and say what kept the rest from being opened."""
        limit = min(FIRST_REPLY_LIMIT, self.parameters.limit)
        timeout = client.RequestTimeoutError(f"the next was not accepted within {limit:g} s")
        try:
            with gevent.Timeout(limit, timeout):
                # One after the other: all at once would overflow a short listen backlog and measure that.
                while len(connections) < self.parameters.idle_count:
                    connections.append(client.connect(self.server))
        except client.RequestError as error:
            return str(error)
        return None

    def burst(self) -> Part:
        parameters = self.parameters
        title = f"{parameters.burst_count} x {parameters.burst_ms} ms at once"
        samples, _, wall = self.load(title, [0.0] * parameters.burst_count, parameters.burst_ms)
        shortest = min(sample.latency for sample in samples)
        failed = any(sample.failure for sample in samples)
        if not failed and shortest < SIMULATED_SHARE * parameters.burst_ideal:
            raise CouldNotAskError(
                f"{self.server} answered a read of {parameters.burst_ms} ms after {shortest * 1000:.1f} ms: "
                "it does not simulate reads, so that it cannot be asked."
            )
        return self.part(
            "burst",
            title,
            samples,
            wall=wall,
            ideal=parameters.burst_ideal,
            threshold=parameters.burst_tolerance,
            problem=failed or wall > parameters.burst_tolerance,
        )

    def part(
        self,
        name: str,
        title: str,
        samples: list[Sample],
        *,
        wall: float,
        slow_samples: list[Sample] | None = None,
        worst_extra: float | None = None,
        ideal: float | None = None,
        threshold: float | None = None,
        problem: bool | None = None,
    ) -> Part:
        return Part(
            name=name,
            title=title,
            count=len(samples),
            failures=dict(Counter(sample.failure for sample in samples if sample.failure)),
            latency=Latency.of([sample.latency for sample in samples]),
            worst_extra=worst_extra,
            wall=wall,
            ideal=ideal,
            threshold=threshold,
            slow_connects=sum(sample.connect is not None and sample.connect > SLOW_CONNECT for sample in samples),
            problem=problem,
            samples=samples,
            slow_samples=slow_samples or [],
        )

    def load(
        self, title: str, offsets: Sequence[float], ms: int, slow_count: int = 0
    ) -> tuple[list[Sample], list[Sample], float]:
        """Send requests on schedule, and slow ones at the start, and wait until all are over.

        Returns:
            The samples, the slow samples, and the seconds from the scheduled start until the last was over.
        """
        origin = time.monotonic() + LEAD
        group = Group()
        try:
            slow_ms = round(self.parameters.slow * 1000)
            slow: list[Greenlet[..., Sample]] = [
                group.spawn(self.sample, slow_ms, origin, 0.0) for _ in range(slow_count)
            ]
            fast: list[Greenlet[..., Sample]] = [group.spawn(self.sample, ms, origin, offset) for offset in offsets]
            greenlets = slow + fast
            self.progress(title, 0, len(greenlets))
            for done, _ in enumerate(gevent.iwait(greenlets), start=1):
                self.progress(title, done, len(greenlets))
            wall = time.monotonic() - origin
        finally:
            group.kill()
        samples = [greenlet.get() for greenlet in greenlets]
        if any(sample.failure == client.ExhaustedError.kind for sample in samples):
            raise CouldNotAskError(
                "this machine could not open the connections that it takes to ask. Ask with fewer (--burst, "
                "--idle, --slow-count), or raise the limit of open files (ulimit -n)."
            )
        return samples[slow_count:], samples[:slow_count], wall

    def sample(self, ms: int, origin: float, offset: float) -> Sample:
        """Wait for the scheduled time, send one request, and note how it went."""
        scheduled = origin + offset
        # In a loop: a timer counts from the loop's idea of now, which may be a little early.
        while (wait := scheduled - time.monotonic()) > 0:
            gevent.sleep(wait)
        try:
            reply = self.send(ms, scheduled, self.parameters.limit)
        except client.RequestError as error:
            return Sample(offset, error.latency, None, error.kind)
        return Sample(offset, reply.latency, reply.connect, self.failure(reply))

    def send(self, ms: int, scheduled: float, limit: float) -> Reply:
        request = client.Request(200 if self.protocol == "http" else 0, ms, _PATH)
        return client.send(self.server, request, protocol=self.protocol, limit=limit, scheduled=scheduled)

    def failure(self, reply: Reply) -> str | None:
        """What is wrong with a reply's status, or None."""
        if self.protocol == "http":
            return None if reply.status == 200 else f"HTTP {reply.status}"
        if reply.status == 0:
            return None
        meaning = client.LINE_STATUS.get(reply.status, "unknown")
        return f"status {reply.status} ({meaning})"
