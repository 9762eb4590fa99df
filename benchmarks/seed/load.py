"""The load: peers/load/load.c, built when needed, given a schedule, and what it saw.

It is a program in C because the servers are as well: a generator in Python would be what is measured.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from hdrh.histogram import HdrHistogram

from .rows import CACHE, PEERS, RowError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

LOOK = 0.1  # seconds between two looks at the server


class Planned(NamedTuple):
    """A request of an open-loop schedule: when (seconds), what kind (for the evaluation), and the request itself."""

    due: float
    tag: int
    text: str


class Answer(NamedTuple):
    """What became of a request. Times in seconds since the load began.

    Attributes:
        tag: As planned.
        due: When it should have left.
        end: When its answer was complete, or when it failed.
        connected: When it was connected; None when it never was.
        outcome: "ok", "status-N", "wrong", "closed", "refused", "timeout" or "local"; load.c says what they mean.
    """

    tag: int
    due: float
    end: float
    connected: float | None
    outcome: str

    @property
    def latency(self) -> float:
        """Seconds from when it was due."""
        return self.end - self.due


class Seen(msgspec.Struct, frozen=True):
    """All that a run of the load saw.

    Attributes:
        answers: Of all requests.
        start: When it began, on `time.monotonic`.
        cpu: CPU seconds that the generator itself took.
        connections: How many it opened.
        elapsed: Seconds until the last request was over.
    """

    answers: list[Answer]
    start: float
    cpu: float
    connections: int
    elapsed: float


class Latencies(msgspec.Struct, frozen=True, kw_only=True):
    """Latencies, in milliseconds, from when requests were due, of all of them.

    A request that failed counts as long as the client's patience, where one is given: a server that refuses quickly is
    not a fast one. Otherwise it counts until it was over.

    Attributes:
        count: Requests.
        outcomes: How they ended.
        p50_ms, p99_ms, p99_9_ms, max_ms: Percentiles.
        histogram: All of them, in microseconds: an HdrHistogram in its compressed base64 form.
    """

    count: int
    outcomes: dict[str, int]
    p50_ms: float
    p99_ms: float
    p99_9_ms: float
    max_ms: float
    histogram: str

    @property
    def ok(self) -> int:
        """Right answers."""
        return self.outcomes.get("ok", 0)


def latencies(answers: Sequence[Answer], patience: float) -> Latencies:
    """Summarise answers; failures count as `patience` seconds at least."""
    histogram = HdrHistogram(1, 3_600_000_000, 3)
    for each in answers:
        seconds = each.latency if each.outcome == "ok" else max(patience, each.latency)
        histogram.record_value(max(1, round(seconds * 1e6)))
    p50, p99, p99_9 = (histogram.get_value_at_percentile(share) / 1000 for share in (50, 99, 99.9))
    return Latencies(
        count=len(answers),
        outcomes=outcomes(answers),
        p50_ms=p50,
        p99_ms=p99,
        p99_9_ms=p99_9,
        max_ms=histogram.get_max_value() / 1000 if answers else 0.0,
        histogram=histogram.encode().decode("ascii"),
    )


def outcomes(answers: Iterable[Answer]) -> dict[str, int]:
    """How requests ended, counted."""
    return dict(sorted(Counter(each.outcome for each in answers).items()))


def build_generator() -> Path:
    """Compile the generator, once.

    Raises:
        RowError: There is no C compiler, or it fails.
    """
    source = PEERS / "load" / "load.c"
    program = CACHE / "load" / hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    if program.exists():
        return program
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RowError("the load generator needs a C compiler: apt-get install gcc libc6-dev")
    program.parent.mkdir(parents=True, exist_ok=True)
    command = [compiler, "-O2", "-Wall", "-Wextra", "-o", str(program), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RowError(f"the load generator cannot be compiled: {done.stderr.strip()}")
    return program


def open_loop(port: int, plan: Iterable[Planned], patience: float, look: Callable[[float], None]) -> Seen:
    """Send requests on schedule, each on a connection of its own.

    Args:
        port: Of the server on loopback.
        plan: The requests, in the order in which they are due.
        patience: Seconds after which the client gives a request up.
        look: Called every `LOOK` seconds with the seconds since the load began.
    """
    schedule = "".join(f"{each.due * 1000:.3f} {each.tag} {each.text}\n" for each in plan)
    return _run([str(port), "open", f"{patience * 1000:.0f}"], schedule, look)


def closed_loop(
    port: int, protocol: str, clients: int, seconds: float, text: str, look: Callable[[float], None]
) -> Seen:
    """Have so many clients ask one request after the other; protocol "line" (new connections) or "http" (kept)."""
    return _run([str(port), protocol, str(clients), f"{seconds:g}", text], "", look)


def _run(arguments: Sequence[str], schedule: str, look: Callable[[float], None]) -> Seen:
    program = build_generator()
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+") as said:
        given.write(schedule)
        given.seek(0)
        begin = time.monotonic()
        process = subprocess.Popen([str(program), *arguments], stdin=given, stdout=said)
        try:
            while process.poll() is None:
                look(time.monotonic() - begin)
                time.sleep(LOOK)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode != 0:
            raise RuntimeError(f"the load generator has failed with exit status {process.returncode}")
        said.seek(0)
        *lines, last = said.read().splitlines()
    totals = dict(each.split("=") for each in last.split())
    answers = [_answer(line) for line in lines]
    return Seen(
        answers,
        int(totals["start_us"]) / 1e6,
        int(totals["cpu_us"]) / 1e6,
        int(totals["connections"]),
        max((each.end for each in answers), default=0.0),
    )


def _answer(line: str) -> Answer:
    tag, due, end, connected, outcome = line.split()
    return Answer(
        int(tag), int(due) / 1e6, int(end) / 1e6, None if connected == "-1" else int(connected) / 1e6, outcome
    )
