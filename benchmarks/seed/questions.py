"""The questions that a row is asked, and what is recorded of the answers."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tests.faults.injectors import ControlError, FaultFS

from .bad_input import BadInput, ask_bad_input
from .load import Answer, Latencies, Planned, Seen, closed_loop, latencies, open_loop, outcomes
from .process import Peer, Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .rows import Row

FAST, SLOW = 0, 1
HEALTHY, SICK = 0, 1
FILES, FILE_BYTES = 8, 16_384
IN_TIME = 1.0  # seconds
SAMPLE = 0.5  # seconds between two looks at what the server uses around the hang
LATE_SHARE = 0.3
"""Share of the slow read's length by which a fast request may be late before it counts as held up."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How much is asked. Times in seconds.

    Attributes:
        slow: Length of the slow read of the seed's question.
        patience: A client's, there and in the bursts.
        small_burst, large_burst: Requests at once and the milliseconds of each.
        clients, closed_seconds: Of the requests per second.
        rate: Requests per second to each of the two disks around the hang.
        lead, hang, after: Length of its phases.
        hang_patience: Its clients'.
        late_line: Whether bad input contains the line that is sent 4.5 s late.
    """

    slow: float = 5.0
    patience: float = 60.0
    small_burst: tuple[int, int] = (100, 200)
    large_burst: tuple[int, int] = (1000, 1000)
    clients: int = 50
    closed_seconds: float = 5.0
    rate: float = 200.0
    lead: float = 10.0
    hang: float = 30.0
    after: float = 15.0
    hang_patience: float = 10.0
    late_line: bool = True


QUICK = Settings(
    slow=1.0,
    patience=4.0,
    closed_seconds=1.0,
    lead=2.0,
    hang=4.0,
    after=2.5,
    hang_patience=2.0,
    late_line=False,
)


class Beside(msgspec.Struct, frozen=True, kw_only=True):
    """Fast requests beside slow ones: the seed's question.

    Attributes:
        slow_count: Slow requests at a time.
        fast: What became of the fast ones.
        slow: How the slow ones ended.
        problem: Whether a fast one failed, or was late by more than `LATE_SHARE` of the slow read.
    """

    slow_count: int
    fast: Latencies
    slow: dict[str, int]
    problem: bool


class Burst(msgspec.Struct, frozen=True, kw_only=True):
    """Requests at once.

    Attributes:
        count, seconds: How many, and how long each should take: the ideal wall time.
        wall: Seconds until the last one was over.
        answers: What became of them.
        memory_before: Resident bytes of the idle server.
        memory_most, threads_most: The most that was seen meanwhile.
        lives: Whether the server answered afterwards.
    """

    count: int
    seconds: float
    wall: float
    answers: Latencies
    memory_before: int
    memory_most: int
    threads_most: int
    lives: bool


class Throughput(msgspec.Struct, frozen=True, kw_only=True):
    """Requests per second of requests for nothing.

    Attributes:
        per_second: Right answers per second.
        answers: What became of the requests.
        connections: How many connections that took.
        generator_share: Share of one CPU that the generator took: near 1, it was the generator that was measured.
    """

    per_second: float
    answers: Latencies
    connections: int
    generator_share: float


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the hang's run: the requests that were due in it.

    Attributes:
        name: "before", "hang" or "after".
        begin, end: Seconds since the load began.
        healthy, sick: What became of the requests to each disk.
        healthy_per_second: Right answers of the healthy disk, per second.
        healthy_in_time: Right answers of the healthy disk within `IN_TIME`.
        sick_got: How the requests to the sick disk ended; right answers that came after the phase are told apart.
    """

    name: str
    begin: float
    end: float
    healthy: Latencies
    sick: Latencies
    healthy_per_second: float
    healthy_in_time: int
    sick_got: dict[str, int]


class Second(msgspec.Struct, frozen=True, array_like=True):
    """A second of the healthy disks, for plots: when it began, percentiles, and how many right answers."""

    at: float
    p50_ms: float
    p99_ms: float
    p99_9_ms: float
    ok: int


class Hang(msgspec.Struct, frozen=True, kw_only=True):
    """A disk that really hangs beside a healthy one.

    Attributes:
        phases: Before, hang, after.
        seconds: The healthy disk, second by second.
        usage: What the server used, over time.
        memory_before, threads_before: Just before the hang.
        memory_end, threads_end: At the end of the hang.
        served_again: Seconds from the lift to the first right answer to a request of the sick disk that was due after
            the lift; None when there was none.
        recovered: Seconds from the lift until every request of the sick disk that was due from then on was answered
            right within a second; None when that never came.
        lives: Whether the server answered when all was over.
        end_seconds: How long it took to end when told to.
    """

    phases: list[Phase]
    seconds: list[Second]
    usage: list[Usage]
    memory_before: int
    threads_before: int
    memory_end: int
    threads_end: int
    served_again: float | None
    recovered: float | None
    lives: bool
    end_seconds: float


class Answers(msgspec.Struct, kw_only=True):
    """All that was asked of one row. What is None could not be asked; `failures` says why, question by question."""

    one_slow: Beside | None = None
    many_slow: Beside | None = None
    small_burst: Burst | None = None
    large_burst: Burst | None = None
    line: Throughput | None = None
    http: Throughput | None = None
    hang: Hang | None = None
    bad_input: BadInput | None = None
    failures: dict[str, str] = {}

    @property
    def problem(self) -> tuple[bool | None, bool | None]:
        """The seed's verdict with one slow request and with eight; None where it could not be asked."""
        one, many = self.one_slow, self.many_slow
        return (None if one is None else one.problem, None if many is None else many.problem)


def beside(row: Row, settings: Settings, slow_count: int) -> Beside:
    """Twenty fast requests, spread over the length of slow ones that begin together."""
    slow_ms, fast_count, fast_ms = round(settings.slow * 1000), 20, 10
    step = settings.slow / (fast_count + 1)
    plan = [Planned(0.0, SLOW, f"0,{slow_ms},some_file")] * slow_count
    plan += [Planned((k + 1) * step, FAST, f"0,{fast_ms},some_file") for k in range(fast_count)]
    with Peer(row) as peer:
        warm_up(peer)
        seen = open_loop(peer.port, plan, settings.patience, lambda _: None)
    fast = [each for each in seen.answers if each.tag == FAST]
    slow = [each for each in seen.answers if each.tag == SLOW]
    late = max(each.latency for each in fast) > fast_ms / 1000 + LATE_SHARE * settings.slow
    failed = any(each.outcome != "ok" for each in fast)
    if not (late or failed) and max(each.latency for each in slow) < settings.slow / 2:
        raise RuntimeError("the slow read was over too soon: there was nothing to hold anybody up")
    return Beside(
        slow_count=slow_count,
        fast=latencies(fast, 0.0),  # failures are in its outcomes; what counts here is when each was over
        slow=outcomes(slow),
        problem=late or failed,
    )


def burst(row: Row, settings: Settings, count: int, milliseconds: int) -> Burst:
    """So many requests at once."""
    with Peer(row) as peer:
        warm_up(peer)
        before = peer.usage()
        seen, used = _watched(
            peer,
            lambda look: open_loop(
                peer.port, [Planned(0.0, FAST, f"0,{milliseconds},some_file")] * count, settings.patience, look
            ),
        )
        lives = peer.alive() and peer.answers()
    return Burst(
        count=count,
        seconds=milliseconds / 1000,
        wall=seen.elapsed,
        answers=latencies(seen.answers, 0.0),
        memory_before=before.memory,
        memory_most=max(each.memory for each in used),
        threads_most=max(each.threads for each in used),
        lives=lives,
    )


def throughput(row: Row, settings: Settings, protocol: str) -> Throughput:
    """Requests for nothing, one after the other; "line" with a connection each, "http" on kept ones."""
    text = "0,0,some_file"
    with Peer(row) as peer:
        warm_up(peer)
        closed_loop(peer.port, protocol, settings.clients, settings.closed_seconds / 4, text, lambda _: None)
        seen = closed_loop(peer.port, protocol, settings.clients, settings.closed_seconds, text, lambda _: None)
    right = [each for each in seen.answers if each.outcome == "ok" and each.end <= settings.closed_seconds]
    return Throughput(
        per_second=len(right) / settings.closed_seconds,
        answers=latencies(seen.answers, settings.closed_seconds + 5),
        connections=seen.connections,
        generator_share=seen.cpu / max(seen.elapsed, settings.closed_seconds),
    )


def warm_up(peer: Peer) -> None:
    """A second of light load: virtual machines compile, pools fill."""
    closed_loop(peer.port, "line", 4, 0.5, "0,1,some_file", lambda _: None)


def _watched(peer: Peer, load: Callable[[Callable[[float], None]], Seen]) -> tuple[Seen, list[Usage]]:
    """Run a load and look at the server meanwhile."""
    used = [peer.usage()]
    seen = load(lambda _: used.append(peer.usage()))
    return seen, [msgspec.structs.replace(each, at=round(each.at - seen.start, 3)) for each in used]


def hang(
    row: Row, settings: Settings, progress: Callable[[str], None], healthy_count: int = 1, sick_count: int = 1
) -> Hang:
    """Disks of which some stop answering for a while, and steady load on all.

    Args:
        row: Who serves them.
        settings: How much load, and for how long.
        progress: Told what is being done.
        healthy_count, sick_count: How many disks.
    """
    lead, ends = settings.lead, settings.lead + settings.hang
    total = ends + settings.after
    marks: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        healthy_disks = [_disk_name("healthy", number) for number in range(healthy_count)]
        sick_disks = [_disk_name("sick", number) for number in range(sick_count)]
        root, faults = stack.enter_context(disks(healthy_disks, sick_disks, settings.hang + 60))
        peer = stack.enter_context(Peer(row, root, [*sick_disks, *healthy_disks]))
        stack.callback(_release, faults)  # before the server is stopped: its threads may be stuck
        warm_up_disks(peer, [*sick_disks, *healthy_disks])

        def look(at: float) -> None:
            # The load begins a tenth of a second after its generator.
            if at >= lead + 0.1 and "hung" not in marks:
                progress("the hang")
                for fault in faults:
                    fault.hang("read")
                marks["hung"] = time.monotonic()
            if at >= ends + 0.1 and "lifted" not in marks:
                progress("after it")
                used_at_the_end.append(peer.usage())
                marks["lifted"] = time.monotonic()
                for fault in faults:
                    fault.release()

        used_at_the_end: list[Usage] = []
        targets = [(SICK, name) for name in sick_disks] + [(HEALTHY, name) for name in healthy_disks]
        plan = sorted(
            Planned((k + turn / len(targets)) / settings.rate, tag, f"0,0,{name}/f{k % FILES}")
            for k in range(round(total * settings.rate))
            for turn, (tag, name) in enumerate(targets)
        )

        def load(sample: Callable[[float], None]) -> Seen:
            sampled = 0.0

            def each(at: float) -> None:
                nonlocal sampled
                look(at)
                if at >= sampled:
                    sample(at)
                    sampled = at + SAMPLE

            return open_loop(peer.port, plan, settings.hang_patience, each)

        progress("before it")
        seen, used = _watched(peer, load)
        lives = peer.alive() and peer.answers()
        end_seconds = peer.stop()
    if len(marks) < 2:
        raise RuntimeError("the load was over before the hang was")
    hung, lifted = marks["hung"] - seen.start, marks["lifted"] - seen.start
    before = [each for each in used if each.at < hung][-1]
    healthy = [each for each in seen.answers if each.tag == HEALTHY]
    sick = [each for each in seen.answers if each.tag == SICK]
    spans = [("before", min(1.0, lead / 2), hung), ("hang", hung, lifted), ("after", lifted, total)]
    return Hang(
        phases=[phase(name, begin, end, healthy, sick, settings) for name, begin, end in spans],
        seconds=list(_seconds(healthy, total, settings.hang_patience)),
        usage=used,
        memory_before=before.memory,
        threads_before=before.threads,
        memory_end=used_at_the_end[0].memory,
        threads_end=used_at_the_end[0].threads,
        served_again=served_again(sick, lifted),
        recovered=recovered(sick, lifted, total),
        lives=lives,
        end_seconds=end_seconds,
    )


def _disk_name(kind: str, number: int) -> str:
    return kind if number == 0 else f"{kind}{number + 1}"


@contextlib.contextmanager
def disks(healthy: Sequence[str], sick: Sequence[str], max_stall: float) -> Iterator[tuple[Path, list[FaultFS]]]:
    """A directory with a directory for each disk: plain ones, and file systems that can hang; all have f0 to f7."""
    with contextlib.ExitStack() as stack:
        faults = [stack.enter_context(FaultFS(max_stall=max_stall)) for _ in sick]
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="disks-")))
        for directory in [each.backing for each in faults] + [root / name for name in healthy]:
            directory.mkdir(exist_ok=True)
            for k in range(FILES):
                (directory / f"f{k}").write_bytes(bytes([k]) * FILE_BYTES)
        for name, fault in zip(sick, faults, strict=True):
            (root / name).mkdir()
            subprocess.run(["mount", "--bind", fault.root, root / name], check=True)
            stack.callback(_unmount, root / name)
        stack.callback(_release, faults)
        yield root, faults


def _unmount(path: Path) -> None:
    subprocess.run(["umount", "--lazy", path], check=True)


def _release(faults: Sequence[FaultFS]) -> None:
    for fault in faults:
        with contextlib.suppress(ControlError):
            fault.release()


def warm_up_disks(peer: Peer, names: Sequence[str]) -> None:
    """A good answer of each disk, and a little load: what is not set up rightly is not measured."""
    for name in names:
        reply = peer.ask(f"0,0,{name}/f0\n".encode(), 10.0)
        if not reply.startswith(b"0,"):
            raise RuntimeError(f"it answers {reply!r} for a file of the disk {name}")
        closed_loop(peer.port, "line", 4, 0.5 / len(names), f"0,0,{name}/f0", lambda _: None)
    if not peer.ask(b"0,0,healthy/no_such_file\n", 10.0).startswith(b"5,"):
        raise RuntimeError("it does not answer 5 for a file that is not there: it does not read")


def phase(
    name: str, begin: float, end: float, healthy: Sequence[Answer], sick: Sequence[Answer], settings: Settings
) -> Phase:
    """What became of the requests that were due between two times."""
    of_healthy, of_sick = ([each for each in answers if begin <= each.due < end] for answers in (healthy, sick))
    found = latencies(of_healthy, settings.hang_patience)
    return Phase(
        name=name,
        begin=begin,
        end=end,
        healthy=found,
        sick=latencies(of_sick, 0.0),  # how long its clients were kept waiting, whatever for
        healthy_per_second=found.ok / (end - begin),
        healthy_in_time=sum(each.outcome == "ok" and each.latency <= IN_TIME for each in of_healthy),
        sick_got=outcomes(_told_apart(each, end) for each in of_sick),
    )


def _told_apart(answer: Answer, end: float) -> Answer:
    return answer._replace(outcome="ok after it") if answer.outcome == "ok" and answer.end > end else answer


def _seconds(answers: Sequence[Answer], total: float, patience: float) -> Iterator[Second]:
    for begin in range(int(total)):
        due = [each for each in answers if begin <= each.due < begin + 1]
        found = latencies(due, patience)
        yield Second(begin, found.p50_ms, found.p99_ms, found.p99_9_ms, found.ok)


def served_again(sick: Sequence[Answer], lifted: float) -> float | None:
    """Seconds from the lift to the first right answer to a request that was due after it."""
    return min((each.end - lifted for each in sick if each.due >= lifted and each.outcome == "ok"), default=None)


def recovered(sick: Sequence[Answer], lifted: float, total: float) -> float | None:
    """Seconds from the lift to the last request that was not answered right within a second; 0 without such."""
    late = [each.due for each in sick if each.due >= lifted and (each.outcome != "ok" or each.latency > IN_TIME)]
    if not late:
        return 0.0
    return max(late) - lifted if max(late) < total - IN_TIME else None


def ask(row: Row, settings: Settings, progress: Callable[[str], None], only: Sequence[str] = ()) -> Answers:
    """Ask a row everything, each question to a server that was started for it.

    Args:
        row: Whom.
        settings: How much.
        progress: Told what is being asked.
        only: Names of questions (fields of `Answers`); all when empty.

    Returns:
        What was answered. A question that fails is in `failures`; the others are asked all the same.
    """
    questions: dict[str, tuple[str, Callable[[], object]]] = {
        "one_slow": ("one slow request", lambda: beside(row, settings, 1)),
        "many_slow": ("eight slow requests", lambda: beside(row, settings, 8)),
        "small_burst": ("100 at once", lambda: burst(row, settings, *settings.small_burst)),
        "large_burst": ("1,000 at once", lambda: burst(row, settings, *settings.large_burst)),
        "line": ("requests per second, line", lambda: throughput(row, settings, "line")),
        "http": ("requests per second, HTTP", lambda: throughput(row, settings, "http")),
        "hang": ("a disk hangs", lambda: hang(row, settings, lambda what: progress(f"a disk hangs: {what}"))),
        "bad_input": (
            "bad input",
            lambda: ask_bad_input(row, settings.late_line, lambda what: progress(f"bad input: {what}")),
        ),
    }
    answers = Answers()
    for name, (title, question) in questions.items():
        if only and name not in only:
            continue
        if name == "http" and not row.keep_alive:
            answers.failures[name] = "it does not keep connections"
            continue
        progress(title)
        try:
            setattr(answers, name, question())
        except Exception as error:  # noqa: BLE001 - whatever it was: it belongs into the result, by name
            answers.failures[name] = f"{type(error).__name__}: {error}"
            print(f"{row.name}, {title}: {error}", file=sys.stderr)
    return answers
