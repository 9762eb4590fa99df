"""Who watches while a disk is sick: callers that note what they got and when, a healthy disk in use, the verdicts."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, NamedTuple

import gevent
import pytest

from diskread import Disk, DiskError, DiskOffline
from tests.conftest import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskread.health import State

SLACK = 5.0
"""Seconds by which anything may be late: a machine with more to do than it can is no failure of a disk."""

EVERYDAY = 2.0
"""Seconds that neither the hub nor a healthy disk ever needs, unless it waits for the sick one."""


class Outcome(NamedTuple):
    """What a caller got: "ok" or the class of the error, and after how many seconds."""

    what: str
    seconds: float


class Callers:
    """Greenlets that ask, once or until they are told to end."""

    def __init__(self, count: int, ask: Callable[[], object], *, again: bool = False) -> None:
        self._ask = ask
        self._again = again
        self.outcomes: list[Outcome] = []
        self.ended_at: list[float] = []
        self._greenlets = [gevent.spawn(self._run) for _ in range(count)]

    def _run(self) -> None:
        while True:
            began = time.monotonic()
            try:
                self._ask()
                what = "ok"
            except DiskError as error:
                what = type(error).__name__
            self.ended_at.append(time.monotonic())
            self.outcomes.append(Outcome(what, self.ended_at[-1] - began))
            if not self._again:
                return
            gevent.sleep(0.01)

    def end(self) -> list[Outcome]:
        """Let each finish what it has asked for; what they all got."""
        self._again = False
        gevent.joinall(self._greenlets, timeout=30, raise_error=True)
        assert all(greenlet.dead for greenlet in self._greenlets), "a caller waits for ever"
        return self.outcomes

    @property
    def what(self) -> set[str]:
        """The kinds of outcomes so far."""
        return {outcome.what for outcome in self.outcomes}

    @property
    def longest_pause(self) -> float:
        """The most seconds between two outcomes, whoever had them."""
        times = sorted(self.ended_at)
        return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0.0)


class Beside:
    """A healthy disk that is in use all the time, in the same hub as the sick one."""

    def __init__(self, disk: Disk, file: str, content: bytes) -> None:
        self._disk, self._file, self._content = disk, file, content
        self._over = False
        self.reads = 0
        self.slowest = self.latest_turn = 0.0
        self._greenlets = [gevent.spawn(self._read), gevent.spawn(self._turn)]

    def _read(self) -> None:
        while not self._over:
            began = time.monotonic()
            assert self._disk.read(self._file) == self._content
            self.slowest = max(self.slowest, time.monotonic() - began)
            self.reads += 1
            gevent.sleep(0.005)

    def _turn(self) -> None:
        while not self._over:
            due = time.monotonic() + 0.005
            gevent.sleep(0.005)
            self.latest_turn = max(self.latest_turn, time.monotonic() - due)

    def noticed_nothing(self) -> None:
        """End, and fail the test if anything was amiss."""
        until(lambda: self.reads > 5, "reads of the healthy disk")
        self._over = True
        gevent.joinall(self._greenlets, timeout=30, raise_error=True)
        assert self.slowest < EVERYDAY, f"a healthy disk needed {self.slowest:.3f} s for a read"
        assert self.latest_turn < EVERYDAY, f"the hub stood still for {self.latest_turn:.3f} s"
        assert self._disk.status.load.changes == 0, "a healthy disk was suspected"


class Verdicts:
    """Every state that a disk was in, and the most threads and slots that it used."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._began = time.monotonic()
        self._over = False
        self.seen: dict[State, float] = {}
        self.reasons: set[str] = set()
        self.most_threads = 0
        self._greenlet = gevent.spawn(self._watch)

    def _watch(self) -> None:
        while not self._over:
            load = self._disk.status.load
            # When the state began, in seconds since the watch did.
            self.seen.setdefault(load.state, time.monotonic() - load.since - self._began)
            self.most_threads = max(self.most_threads, load.threads)
            if load.reason is not None:
                self.reasons.add(load.reason)
            gevent.sleep(0.005)

    def end(self) -> None:
        self._over = True
        self._greenlet.get(timeout=30)
        assert self.most_threads <= self._disk.limits.threads

    def wait_for(self, state: State) -> float:
        """Wait until the disk was in that state; when that was first, in seconds since the watch began."""
        until(lambda: state in self.seen, f"the verdict {state.value}, seen so far: {self.seen}")
        return self.seen[state]


def refused_at_once(disk: Disk, ask: Callable[[], object]) -> None:
    """Fail the test unless an offline disk says so at once, and when to come back."""
    rejections = disk.status.counts.rejections
    began = time.monotonic()
    for _ in range(100):
        with pytest.raises(DiskOffline, match="offline for") as caught:
            ask()
    assert (time.monotonic() - began) / 100 < 0.05
    assert disk.status.counts.rejections == rejections + 100
    assert caught.value.retry_after is not None
    assert 0 <= caught.value.retry_after <= disk.limits.probe_interval_max


def nothing_in_flight(disk: Disk) -> bool:
    load = disk.status.load
    return load.in_flight == load.stuck == load.waiting == 0
