"""Open-loop load on several disks of one server, and what came of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import gevent
from gevent.pool import Group
from hdrh.histogram import HdrHistogram

from ..client import Request, RequestError, Server, send_line
from ..simulate import Status

if TYPE_CHECKING:
    from collections.abc import Sequence

Outcome = Literal["answered", "missed", "refused", "failed"]

_OUTCOMES: dict[int, Outcome] = {
    0: "answered",
    Status.DEADLINE: "missed",
    Status.REFUSED: "refused",
}


@dataclass(frozen=True)
class Plan:
    """When the disk hangs, and how much is asked of all disks. Times are on `time.monotonic`, in seconds.

    Attributes:
        disks: Names of the disks.
        hung: The one that hangs.
        files: Names of the files that every disk has.
        begin: Start of the load.
        hang_begin: The disk hangs from here ...
        hang_end: ... to here.
        end: End of the load.
        rate: Requests per second to each disk.
        limit: Seconds after which the client gives up on a request.
    """

    disks: Sequence[str]
    hung: str
    files: Sequence[str]
    begin: float
    hang_begin: float
    hang_end: float
    end: float
    rate: float
    limit: float

    def hanging(self, at: float) -> bool:
        """Whether the disk hangs at that time."""
        return self.hang_begin <= at < self.hang_end


@dataclass(frozen=True)
class Sample:
    """One request: when it was due, how long its client waited from then on (seconds), and what it got."""

    scheduled: float
    latency: float
    outcome: Outcome


@dataclass
class Summary:
    """A number of requests, summed up. Latencies are in seconds.

    Attributes:
        requests: How many there were.
        outcomes: How many of each outcome.
        p50: Half of them were faster.
        p99: 99 of 100 were faster.
        worst: The slowest.
    """

    requests: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    p50: float = 0.0
    p99: float = 0.0
    worst: float = 0.0

    @property
    def answered(self) -> int:
        """How many got what they asked for."""
        return self.outcomes.get("answered", 0)


def summarize(samples: Sequence[Sample]) -> Summary:
    """Sum requests up, successful or not: who waits ten seconds for an error has waited ten seconds."""
    histogram = HdrHistogram(1, 3_600_000_000, 3)  # microseconds
    outcomes: dict[str, int] = {}
    for sample in samples:
        histogram.record_value(max(1, int(sample.latency * 1e6)))
        outcomes[sample.outcome] = outcomes.get(sample.outcome, 0) + 1
    if not samples:
        return Summary()
    return Summary(
        requests=len(samples),
        outcomes=outcomes,
        p50=histogram.get_value_at_percentile(50) / 1e6,
        p99=histogram.get_value_at_percentile(99) / 1e6,
        worst=max(sample.latency for sample in samples),
    )


class Load:
    """Sends each request when it is due, whether or not earlier ones came back: a stall cannot hide behind itself."""

    def __init__(self, server: Server, plan: Plan) -> None:
        """Prepare the load on a server."""
        self._server = server
        self._plan = plan
        self.samples: dict[str, list[Sample]] = {disk: [] for disk in plan.disks}

    def run(self) -> None:
        """Run the plan to its end and wait for the last reply. Blocks the greenlet."""
        requests = Group()
        plan = self._plan
        count = round((plan.end - plan.begin) * plan.rate)
        for number in range(count):
            for position, disk in enumerate(plan.disks):
                # The disks take turns within one interval, so that the client itself makes no bursts.
                due = plan.begin + (number + position / len(plan.disks)) / plan.rate
                gevent.sleep(max(0.0, due - time.monotonic()))
                requests.spawn(self._send, disk, plan.files[number % len(plan.files)], due)
        requests.join()

    def recent(self, disk: str, seconds: float) -> Summary:
        """The requests to a disk that were due in the last seconds and are over."""
        since = time.monotonic() - seconds
        samples = self.samples[disk]
        start = max(0, len(samples) - int(self._plan.rate * seconds * 20))
        return summarize([sample for sample in samples[start:] if sample.scheduled >= since])

    def during(self, disks: Sequence[str], begin: float, end: float) -> Summary:
        """The requests to some disks that were due within a time."""
        return summarize([s for disk in disks for s in self.samples[disk] if begin <= s.scheduled < end])

    def _send(self, disk: str, file: str, due: float) -> None:
        plan = self._plan
        # To the process, a disk that hangs is a system call that does not return: here one in nanosleep.
        stall = int((plan.hang_end - due) * 1000) if disk == plan.hung and plan.hanging(due) else 0
        request = Request(0, stall, f"{disk}/{file}".encode())
        try:
            reply = send_line(self._server, request, limit=plan.limit, scheduled=due)
        except RequestError as error:
            self.samples[disk].append(Sample(due, error.latency, "failed"))
        else:
            outcome = _OUTCOMES.get(reply.status, "failed")
            self.samples[disk].append(Sample(due, reply.latency, outcome))
