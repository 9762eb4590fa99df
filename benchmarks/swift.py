"""A device of a Swift cluster hangs: what do clients get from Swift as it comes, what with diskread, at what price?

Each row of the first part is a whole cluster on loopback, whose device d1 hangs in every operation, under the same
open-loop load. The second part is the price with no fault: cached objects, straight from the object server. README.md
says how to read the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if not __package__:  # run as a script: its own directory is on the path, the one above is not
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.hang import latencies, percentile_ms, statuses
from benchmarks.report import (
    RESULTS,
    Environment,
    Run,
    Spread,
    Table,
    Verdict,
    document,
    spread,
    three_digits,
    verdict_table,
    with_range,
    write,
)
from benchmarks.swiftload import Load, Plan, Stream, content, download
from diskread.swift.metadata_cache import SETTLE
from tests.faults.injectors import FaultFS, SetupError
from tests.swift.cluster import Cluster, ObjectServer, Settings, missing, missing_diskread
from tests.swift.processes import StartError, StillRunningError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from benchmarks.load import Answer
    from tests.swift.processes import Server

NAME = "swift"
OURS = "diskread, 1 worker"
FIRST_TIME = {"diskread_metadata_cache": "0"}
"""Settings with which diskread opens each object as if for the first time."""

SERVERS = {
    "stock": Settings(devices=1),
    "ours": Settings(devices=1, diskread=True),
    "first time": Settings(devices=1, diskread=True, object_server=FIRST_TIME),
}
"""What the price is measured with: object servers alone, of one worker each."""

ROWS = {
    "stock, 1 worker": Settings(),
    "stock, 4 workers": Settings(workers=4),
    "stock, servers_per_port": Settings(servers_per_port=1),
    "stock, servers_per_port, concurrent_gets": Settings(servers_per_port=1, concurrent_gets=True),
    OURS: Settings(diskread=True),
}
KINDS = {
    "GET others": "GET of objects that d1 does not hold",
    "GET d1 first": "GET of objects of which the proxy asks d1 first",
    "PUT others": "PUT of objects that d1 does not hold",
    "PUT d1": "PUT of objects of which d1 gets a replica",
}
OBJECTS, SIZE = 12, 64 << 10
NODE_TIMEOUT = 10.0  # the default of Swift's proxy
WARM_UP, WARM_UP_SHARE = 2.0, 0.25
"""Seconds at the begin that do not count, or a share of the time before the hang where that is less."""

SETTLED = 10.0
"""Seconds after the begin of the hang from which on everybody has had the time to find out."""

COST_SIZES = (256 << 10, 1 << 20)
COST_CLIENTS = (1, 8)


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """What the requests of one kind got in a part of a run.

    Attributes:
        kind: One of KINDS.
        name: "before", "hang" (all of it), "settled" (its part after SETTLED seconds) or "after".
        seconds: Its length.
        requests: Requests that were due in it.
        succeeded: Those of them that got what they should: the right bytes, or 201.
        statuses: What became of all of them; -1 is no answer within the patience of the client, -2 wrong bytes.
        per_second: Successes per second.
        p50_ms, p99_ms, p99_9_ms, max_ms: From when a request was due until its client knew, failures included.
        histogram: All of them in microseconds, an encoded HdrHistogram.
    """

    kind: str
    name: str
    seconds: float
    requests: int
    succeeded: int
    statuses: dict[str, int]
    per_second: float
    p50_ms: float
    p99_ms: float
    p99_9_ms: float
    max_ms: float
    histogram: str


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One cluster.

    Attributes:
        name: One of ROWS.
        processes: Of the object server, its parent among them.
        memory_before: Their proportional set size in bytes before the hang.
        memory_most: The same during the hang, at most.
        phases: For each kind and part of the run.
    """

    name: str
    processes: int
    memory_before: int
    memory_most: int
    phases: list[Phase]

    def phase(self, kind: str, name: str) -> Phase:
        """What one kind of requests got in one part of the run."""
        return next(each for each in self.phases if (each.kind, each.name) == (kind, name))


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """Downloads of one cached object, one after another, straight from the object server.

    Attributes:
        size: Bytes of the object.
        clients: How many downloaded at a time.
        rates: Downloads per second of each of SERVERS; one entry for each round.
        cpu: CPU seconds of the object server per download, the same way.
    """

    size: int
    clients: int
    rates: dict[str, list[float]]
    cpu: dict[str, list[float]]

    def ratio(self, server: str) -> Spread:
        """A server's rate against stock, round by round."""
        return spread([ours / stock for ours, stock in zip(self.rates[server], self.rates["stock"], strict=True)])

    def ratio_of_cpu(self, server: str) -> Spread:
        """The same of the CPU time per download."""
        return spread([ours / stock for ours, stock in zip(self.cpu[server], self.cpu["stock"], strict=True)])


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The result. Times are in seconds, sizes in bytes.

    Attributes:
        deadline: That of diskread.
        node_timeout: That of the proxy, for all rows.
    """

    environment: Environment
    deadline: float
    node_timeout: float
    get_rate: float
    put_rate: float
    lead: float
    hang: float
    patience: float
    size: int
    rows: list[Row]
    costs: list[Cost]
    verdicts: list[Verdict]


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """The load, the same for all rows; see the options of the command."""

    deadline: float
    get_rate: float
    put_rate: float
    lead: float
    hang: float
    patience: float
    rounds: int
    round_seconds: float


def settled_from(work: Work) -> float:
    """Seconds from the begin of the hang on that count as settled: the second half of a short one."""
    return min(SETTLED, work.hang / 2)


def configured(settings: Settings, work: Work) -> Settings:
    """A row's settings with those that all rows have in common."""
    ours = {"diskread_deadline": f"{work.deadline:g}"} if settings.diskread else {}
    return dataclasses.replace(settings, node_timeout=NODE_TIMEOUT, object_server=ours)


def run(name: str, settings: Settings, work: Work, say: Callable[[str], None], parent: Path | None) -> Row:
    """Measure one cluster."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=parent)))
        sick = stack.enter_context(FaultFS(max_stall=work.hang + 60))
        cluster = stack.enter_context(Cluster(directory, configured(settings, work), {"d1": sick.root}))
        stack.callback(sick.release)  # before the servers are stopped: what hangs in the kernel does not end
        say("objects")
        streams = make_objects(cluster, work)
        begin = time.monotonic() + 2.0
        load = Load(
            Plan(
                port=cluster.port,
                begin=begin,
                seconds=work.lead + work.hang + work.lead,
                patience=work.patience,
                size=SIZE,
                streams=streams,
                output=str(directory / "answers"),
            )
        )
        stack.callback(load.kill)
        say("before")
        server = cluster.object_server
        sleep_until(begin + work.lead)
        processes, memory_before = len(server.pids()), server.memory()
        say("hang")
        hung = time.monotonic()
        sick.hang("*")
        memory_most = memory_before
        while time.monotonic() < begin + work.lead + work.hang:
            time.sleep(0.5)
            memory_most = max(memory_most, server.memory())
        lifted = time.monotonic()
        sick.release()
        say("after")
        answers = load.answers()
    warm = begin + min(WARM_UP, work.lead * WARM_UP_SHARE)
    parts = {
        "before": (warm, hung),
        "hang": (hung, lifted),
        "settled": (hung + settled_from(work), lifted),
        "after": (lifted, begin + work.lead + work.hang + work.lead),
    }
    return Row(
        name=name,
        processes=processes,
        memory_before=memory_before,
        memory_most=memory_most,
        phases=[phase(kind, part, answers, *between) for kind in KINDS for part, between in parts.items()],
    )


def sleep_until(when: float) -> None:
    """Sleep until a time of CLOCK_MONOTONIC."""
    time.sleep(max(0.0, when - time.monotonic()))


def make_objects(cluster: Cluster, work: Work) -> list[Stream]:
    """Make what the GETs ask for; the names follow from the rings, which are the same for every row."""
    on_d1 = [cluster.path(name) for name in cluster.names_on("d1", 2 * OBJECTS)]
    others = [cluster.path(name) for name in cluster.names_on("d1", 2 * OBJECTS, held=False)]
    for path in (*on_d1[:OBJECTS], *others[:OBJECTS]):
        if (status := cluster.request("PUT", path, content(path, SIZE)).status) != 201:
            raise click.ClickException(f"PUT {path}: {status}")
    paths = {
        "GET others": others[:OBJECTS],
        "GET d1 first": on_d1[:OBJECTS],
        "PUT others": others[OBJECTS:],
        "PUT d1": on_d1[OBJECTS:],
    }
    rates = {"GET": work.get_rate, "PUT": work.put_rate}
    return [Stream(name=kind, method=kind[:3], paths=each, rate=rates[kind[:3]]) for kind, each in paths.items()]


def phase(kind: str, name: str, answers: Sequence[Answer], begin: float, end: float) -> Phase:
    """The requests of one kind that were due between two times."""
    due = [each for each in answers if each.disk == kind and begin <= each.due < end]
    succeeded = sum(each.status == (200 if kind.startswith("GET") else 201) for each in due)
    histogram = latencies(due)
    return Phase(
        kind=kind,
        name=name,
        seconds=end - begin,
        requests=len(due),
        succeeded=succeeded,
        statuses=statuses(due),
        per_second=succeeded / (end - begin),
        p50_ms=percentile_ms(histogram, 50),
        p99_ms=percentile_ms(histogram, 99),
        p99_9_ms=percentile_ms(histogram, 99.9),
        max_ms=histogram.get_max_value() / 1000,
        histogram=histogram.encode().decode("ascii"),
    )


@contextlib.contextmanager
def object_servers(parent: Path | None) -> Iterator[dict[str, ObjectServer]]:
    """All of SERVERS, running, by name."""
    with contextlib.ExitStack() as stack:
        servers = {}
        for name, settings in SERVERS.items():
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=parent)))
            servers[name] = stack.enter_context(ObjectServer(directory, settings))
        yield servers


def measure_cost(work: Work, advance: Callable[[str], None], parent: Path | None) -> list[Cost]:
    """Measure the price with no fault: all servers run, and take turns; each goes first as often as the others."""
    costs = []
    with object_servers(parent) as servers:
        names = list(servers)
        for size in COST_SIZES:
            body = content(str(size), size)
            md5 = hashlib.md5(body, usedforsecurity=False).hexdigest()
            for server in servers.values():
                if server.request("PUT", "d1", f"o{size}", body).status != 201:
                    raise click.ClickException(f"no object of {size} bytes: {server.object_server.log_tail()}")
            time.sleep(SETTLE + 0.1)  # what has just changed is not remembered
            for clients in COST_CLIENTS:
                rates: dict[str, list[float]] = {name: [] for name in names}
                cpu: dict[str, list[float]] = {name: [] for name in names}
                for number in range(work.rounds + 1):
                    advance(f"{size >> 10} KiB, {clients} clients")
                    for turn in range(len(names)):
                        name = names[(number + turn) % len(names)]
                        server, seconds = servers[name], work.round_seconds
                        used = cpu_seconds(server.object_server)
                        count = download(server.port, f"/d1/0/a/c/o{size}", size, md5, clients, seconds)
                        if number:  # the first round warms up
                            rates[name].append(count / seconds)
                            cpu[name].append((cpu_seconds(server.object_server) - used) / count)
                costs.append(Cost(size=size, clients=clients, rates=rates, cpu=cpu))
    return costs


def cpu_seconds(server: Server) -> float:
    """CPU time of all processes of a server."""
    ticks = 0
    for pid in server.pids():
        # proc_pid_stat(5): utime and stime are fields 14 and 15, the state is the third.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def verdicts(rows: Sequence[Row], costs: Sequence[Cost], deadline: float) -> list[Verdict]:
    """What diskread promises to Swift, and whether it was kept."""
    ours = next((row for row in rows if row.name == OURS), None)
    found = []
    for kind in ("GET others", "PUT others"):
        ratio = None
        if ours is not None:
            ratio = ours.phase(kind, "hang").p99_ms / ours.phase(kind, "before").p99_ms
        found.append(verdict(f"p99 of {KINDS[kind]}: during the hang : before", ratio, 1.5))
    first = None if ours is None else ours.phase("GET d1 first", "hang")
    settled = None if ours is None else ours.phase("GET d1 first", "settled")
    share = None if first is None else first.succeeded / first.requests
    found.append(verdict(f"{KINDS['GET d1 first']}: share of them answered right", share, 1.0, at_most=False))
    worst = None if first is None else first.max_ms / 1000
    found.append(verdict("the slowest of them, seconds", worst, deadline + 0.1))
    p99 = None if settled is None else settled.p99_ms
    found.append(verdict("their p99 once d1 is known to hang, ms", p99, 50))
    for cost in costs:
        for server, what in (("ours", "remembered"), ("first time", "opened as if for the first time")):
            promise = f"no fault: downloads of {cost.size >> 10} KiB, {cost.clients} at a time, {what}: ours : stock"
            found.append(Verdict(promise=promise, ratio=cost.ratio(server), bound=0.95, at_most=False))
    return found


def verdict(promise: str, value: float | None, bound: float, *, at_most: bool = True) -> Verdict:
    """A promise about a single figure."""
    measured = None if value is None else Spread(value, value, value)
    return Verdict(promise=promise, ratio=measured, bound=bound, at_most=at_most)


def as_well(rows: Sequence[Row]) -> list[str]:
    """Where stock does as well as diskread during the hang, or better, in sentences."""
    ours = next((row for row in rows if row.name == OURS), None)
    if ours is None:
        return ["diskread took no part in this run."]
    sentences = []
    for row in rows:
        if row is ours:
            continue
        better: list[str] = []
        worse: list[str] = []
        for kind in KINDS:
            theirs, mine = row.phase(kind, "hang"), ours.phase(kind, "hang")
            all_right = theirs.succeeded * mine.requests >= mine.succeeded * theirs.requests
            # Within a quarter of each other is the weather of one run.
            (better if all_right and theirs.p99_ms <= 1.25 * mine.p99_ms else worse).append(kind)
        sentences.append(
            f"**{row.name}** ({row.processes} processes, ours {ours.processes}): as well as diskread or better in "
            f"{', '.join(better) or 'nothing'}; worse in {', '.join(worse) or 'nothing'}."
        )
    return sentences


def tables(rows: Sequence[Row], costs: Sequence[Cost], promises: Sequence[Verdict], work: Work) -> list[Table]:
    """The report as tables."""
    found = [verdict_table(promises)]
    names = {"before": "before", "hang": "hang", "settled": f"hang, from {settled_from(work):g} s on", "after": "after"}
    for kind, what in KINDS.items():
        head = ("object server", "part", "right answers", "per s", "p50 ms", "p99", "p99.9", "max", "p99 : before")
        table = Table(what, (*head, "statuses"))
        for row in rows:
            before = row.phase(kind, "before")
            for name, title in names.items():
                each = row.phase(kind, name)
                table.rows.append(
                    [
                        row.name,
                        title,
                        f"{each.succeeded} of {each.requests}",
                        f"{each.per_second:.1f}",
                        *(f"{value:,.1f}" for value in (each.p50_ms, each.p99_ms, each.p99_9_ms, each.max_ms)),
                        three_digits(each.p99_ms / before.p99_ms) if before.p99_ms else "-",
                        ", ".join(f"{status}: {count}" for status, count in each.statuses.items()),
                    ]
                )
        found.append(table)
    table = Table(
        "The object server", ("object server", "processes", "memory before, MiB", "at most in the hang, MiB"),
        "Memory is the proportional set size of all its processes together.",
    )  # fmt: skip
    for row in rows:
        mib = (f"{value / 2**20:.0f}" for value in (row.memory_before, row.memory_most))
        table.rows.append([row.name, str(row.processes), *mib])
    found.append(table)
    if costs:
        columns = ("size", "clients", "object server", "per s", ": stock", "CPU per GET : stock")
        table = Table(
            "No fault: cached objects, straight from the object server",
            columns,
            "Median [least-greatest]. First time: diskread with diskread_metadata_cache = 0, to which each object is "
            "one that it has not been asked for before.",
        )
        names = {"stock": "stock", "ours": "diskread, remembered", "first time": "diskread, first time"}
        for cost in costs:
            for server, name in names.items():
                table.rows.append(
                    [
                        f"{cost.size >> 10} KiB",
                        str(cost.clients),
                        name,
                        three_digits(statistics.median(cost.rates[server])),
                        "" if server == "stock" else with_range(cost.ratio(server), three_digits),
                        "" if server == "stock" else with_range(cost.ratio_of_cpu(server), three_digits),
                    ]
                )
        found.append(table)
    return found


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--lead", type=click.FloatRange(2), default=30.0, help="Seconds before, and again after, the hang.")
@click.option("--hang", type=click.FloatRange(2), default=40.0, help="Seconds of hang.")
@click.option("--get-rate", type=click.FloatRange(0.5, 100), default=10.0, help="GETs per second, of each kind.")
@click.option("--put-rate", type=click.FloatRange(0.5, 100), default=6.0, help="PUTs per second, of each kind.")
@click.option("--patience", type=click.FloatRange(1), default=30.0, help="Seconds after which a client gives up.")
@click.option("--deadline", type=click.FloatRange(0.1), default=1.0, help="Deadline of diskread, in seconds.")
@click.option("--rounds", type=click.IntRange(1), default=9, help="Rounds of the comparison with no fault.")
@click.option("--round-seconds", type=click.FloatRange(0.2), default=2.0, help="Length of one, for each server.")
@click.option("--rows", default=",".join(map(str, range(1, len(ROWS) + 1))), help="Which rows, by number, see below.")
@click.option("--quick", is_flag=True, help="Short times and few rounds: to see that it works, not to quote.")
@click.option(
    "--directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where the devices are: a directory on ext4 or XFS. Default: the one for temporary files.",
)
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default=RESULTS, help="For swift.*.")
def main(
    *,
    lead: float,
    hang: float,
    get_rate: float,
    put_rate: float,
    patience: float,
    deadline: float,
    rounds: int,
    round_seconds: float,
    rows: str,
    quick: bool,
    directory: Path | None,
    output: Path,
) -> None:
    """Measure Swift as it comes and with diskread while a device hangs, and with no fault.

    Needs root, /dev/fuse, Swift and memcached. Rows: 1 stock, 1 worker; 2 stock, 4 workers; 3 stock with
    servers_per_port; 4 the same with concurrent_gets; 5 diskread, 1 worker.
    """
    if (reason := missing() or FaultFS.why_not()) is not None:
        raise click.ClickException(reason)
    chosen = dict(list(ROWS.items())[number - 1] for number in _numbers(rows))
    taking = Run()
    taking.versions.update({name: version(name) for name in ("swift", "eventlet")})
    if (reason := missing_diskread()) is not None:
        chosen.pop(OURS, None)
        taking.missing[OURS] = reason
    if quick:
        lead, hang, patience, rounds, round_seconds = 3.0, 6.0, 5.0, 2, 0.5
    work = Work(
        deadline=deadline,
        get_rate=get_rate,
        put_rate=put_rate,
        lead=lead,
        hang=hang,
        patience=patience,
        rounds=rounds,
        round_seconds=round_seconds,
    )
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    measured: list[Row] = []
    costs: list[Cost] = []
    try:
        with Progress(*columns, console=console, refresh_per_second=1) as progress:
            with_cost = OURS in chosen
            each = len(COST_SIZES) * len(COST_CLIENTS) * (rounds + 1) if with_cost else 0
            task = progress.add_task("", total=len(chosen) + each)
            for name, settings in chosen.items():

                def say(what: str, name: str = name) -> None:
                    progress.update(task, description=f"{name}: {what}")

                measured.append(run(name, settings, work, say, directory))
                progress.advance(task)
            if with_cost:

                def advance(what: str) -> None:
                    progress.update(task, description=f"no fault: {what}", advance=1)

                costs = measure_cost(work, advance, directory)
    except (SetupError, StartError, StillRunningError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error
    report = Report(
        environment=taking.environment(),
        deadline=deadline,
        node_timeout=NODE_TIMEOUT,
        get_rate=get_rate,
        put_rate=put_rate,
        lead=lead,
        hang=hang,
        patience=patience,
        size=SIZE,
        rows=measured,
        costs=costs,
        verdicts=verdicts(measured, costs, deadline),
    )
    found = tables(measured, costs, report.verdicts, work)
    intro = (
        f"Five clusters, one after another; device d1 of four hangs in every operation for {hang:g} s. Open-loop load: "
        f"{get_rate:g} GETs and {put_rate:g} PUTs of {SIZE >> 10} KiB per second of each kind. Latency counts from "
        f"when a request was due until its client knew, failures included; clients give up after {patience:g} s (-1). "
        f"The proxy's node_timeout is {NODE_TIMEOUT:g} s, diskread's deadline {deadline:g} s.\n\n"
        + "\n".join(f"* {sentence}" for sentence in as_well(measured))
    )
    text = document("A device of a Swift cluster hangs", NAME, intro, report.environment, found, plot=False)
    write(output, NAME, report, text, found)


def _numbers(value: str) -> list[int]:
    try:
        numbers = sorted({int(each) for each in value.split(",")})
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers, such as 1,3,5", param_hint="--rows") from None
    if not 1 <= numbers[0] <= numbers[-1] <= len(ROWS):
        raise click.BadParameter(f"numbers are 1 to {len(ROWS)}", param_hint="--rows")
    return numbers


if __name__ == "__main__":
    main()
