"""Which disk of a mirror is asked first, and when the next. Pure: no I/O, no clock, no gevent; the time is passed in.

A second read that is sent because the first is late is a *hedge*. It makes a slow disk's reader quick, and a slow
cluster slower: so hedges are limited to a share of the reads. A *fail-over*, because a disk has failed, is not limited:
without it the read would be lost.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from .health import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

HedgeAfter = float | Literal["p95"]

BURST = 10.0
"""Hedges that may be saved up, for the moment in which a disk stops answering with several reads under way."""

SHORTEST_DELAY = 0.002
"""Seconds. A disk that answers faster than the event loop can tell (its timers have milliseconds) is not hedged."""

GUESS = 0.05
"""Seconds: "p95" of a disk of which too little is known yet. A disk with spinning platters has answered by then."""

SECOND_OPINION = 0.5
"""Seconds that a disk has at least to know better than another one that has no such file."""

ABOUT_EQUAL = 1.5
"""Disks that would need up to so many times as long as the best one take turns with it."""


class HedgeBudget:
    """A token bucket that is filled by reads: each brings `share` of a token, each hedge takes one.

    Since it is not filled by time, hedges are a share of the reads at any rate of them. It begins with one token, so
    that the first read of all can be hedged: there are never more than 1 + share * reads hedges.
    """

    def __init__(self, share: float) -> None:
        """Start with one token.

        Args:
            share: Hedges per read, from 0 (none) to 1.

        Raises:
            ValueError: Another share.
        """
        if not 0 <= share <= 1:  # also refuses NaN
            raise ValueError(f"hedge_share must be between 0 and 1, not {share}")
        self._share = share
        self._tokens = 1.0 if share else 0.0

    def earn(self) -> None:
        """A read was asked for."""
        self._tokens = min(BURST, self._tokens + self._share)

    def take(self) -> bool:
        """Whether a hedge may be sent; it is paid for then."""
        if self._tokens < 1 - 1e-9:  # twenty times 0.05 is a little less than 1
            return False
        self._tokens = max(0.0, self._tokens - 1)
        return True


@dataclass(frozen=True)
class View:
    """What is known of a disk at one moment.

    Attributes:
        state: The verdict on it.
        accepting: Whether a read has a chance.
        outstanding: Reads in the kernel and in line for it.
        oldest: Seconds that the oldest read has been in the kernel.
        usual: Seconds that its last few reads took (median); None when nothing is known.
        p95: The 95th percentile of the same; None when too little is known.
    """

    state: State = State.ONLINE
    accepting: bool = True
    outstanding: int = 0
    oldest: float = 0.0
    usual: float | None = None
    p95: float | None = None


@dataclass
class MirrorCounts:
    """What a mirror has done since the process started.

    Attributes:
        reads: Reads that were asked for; each chunk of a stream is one.
        hedges: Reads that were sent to another disk because the first was late.
        hedges_won: Those of them that answered first.
        hedges_refused: Reads that were late, and were not hedged because the share was used up.
        failovers: By name of the disk that failed: reads that went on to another one.
        answers: By name of the disk: reads that it answered.
    """

    reads: int = 0
    hedges: int = 0
    hedges_won: int = 0
    hedges_refused: int = 0
    failovers: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)

    def copy(self) -> MirrorCounts:
        """The counts as they are now."""
        return replace(self, failovers=Counter(self.failovers), answers=Counter(self.answers))


class Policy:
    """The policy of one mirror: its budget, whose turn it is, and what was done so far."""

    def __init__(
        self, names: Iterable[str], look: Callable[[str], View], hedge_after: HedgeAfter, hedge_share: float
    ) -> None:
        """Describe a mirror.

        Args:
            names: The disks.
            look: What is known of a disk now.
            hedge_after: Seconds after which a read is late, or "p95": the 95th percentile of what that disk's own reads
                took lately. `math.inf` never hedges.
            hedge_share: Hedges per read at most.

        Raises:
            ValueError: A value out of its range.
        """
        if hedge_after != "p95" and not (isinstance(hedge_after, (int, float)) and hedge_after > 0):
            raise ValueError(f"hedge_after must be a positive number of seconds or 'p95', not {hedge_after!r}")
        self.names = list(names)
        self.look = look
        self.hedge_after: HedgeAfter = hedge_after
        self.budget = HedgeBudget(hedge_share)
        self.counts = MirrorCounts()
        self._turn = 0

    def delay(self, view: View) -> float:
        """Seconds after which a read of this disk is late."""
        if self.hedge_after != "p95":
            return self.hedge_after
        return GUESS if view.p95 is None else max(SHORTEST_DELAY, view.p95)

    def opinion(self, view: View) -> float:
        """Seconds to wait for this disk when another one has no such file."""
        delay = self.delay(view)
        return SECOND_OPINION if delay == math.inf else max(SECOND_OPINION, delay)

    def in_turn(self) -> list[str]:
        """The disks, beginning with another one each time."""
        self._turn += 1
        begin = self._turn % len(self.names)
        return self.names[begin:] + self.names[:begin]

    def best(self, names: Iterable[str]) -> str:
        """The disk to ask first: the healthier one, then the one that should answer sooner; else the first given."""
        views = {name: self.look(name) for name in names}
        known = [view.usual for view in views.values() if view.usual is not None]
        # A disk that nobody has asked lately is taken to be as quick as the quickest: asking it is how to find out.
        guess = min(known, default=1.0)
        waits = {
            name: (view.outstanding + 1) * max(1e-6, guess if view.usual is None else view.usual)
            for name, view in views.items()
        }
        for name, view in views.items():
            if self._late(view):  # by a moment, or because it hangs: how long it has been so tells them apart
                waits[name] = max(waits[name], view.oldest)
        classes = {name: self._class(view) for name, view in views.items()}
        healthiest = [name for name in views if classes[name] == min(classes.values())]
        enough = ABOUT_EQUAL * min(waits[name] for name in healthiest)
        return next(name for name in healthiest if waits[name] <= enough)

    def _late(self, view: View) -> bool:
        return view.oldest > self.delay(view)

    def _class(self, view: View) -> int:
        if not view.accepting:
            return 2
        return 0 if view.state is State.ONLINE and not self._late(view) else 1


class Plan:
    """One read: whom to ask, and when.

    Whoever carries it out asks `next` until that returns None, then waits until `due` or for an answer, whichever
    comes first, tells it of an answer that was none with `failed` or `not_found`, and begins again. Each disk is asked
    once at most.
    """

    def __init__(self, policy: Policy, now: float, ends: float, first: str | None = None) -> None:
        """Begin.

        Args:
            policy: The mirror's.
            now: The time.
            ends: The deadline, on the same clock.
            first: The disk to ask first in any case; None lets the policy choose.
        """
        self._policy = policy
        self._ends = ends
        self._first = first
        self._unasked = policy.in_turn()
        self._pending: dict[str, float] = {}
        self._failed: str | None = None
        self._missing_until: float | None = None
        self._hedges: set[str] = set()
        self._refused = False
        self._patience = math.inf
        self.due = now
        policy.counts.reads += 1
        policy.budget.earn()

    @property
    def missing(self) -> bool:
        """Whether a disk has said that there is no such file."""
        return self._missing_until is not None

    def next(self, now: float) -> str | None:
        """The disk to ask now; None when there is nothing to do before `due`."""
        if self._missing_until is not None:
            return self._second_opinion(now)
        if not self._unasked:
            self.due = math.inf
            return None
        if not self._pending:
            return self._ask(self._choose(), now)
        if now < self.due:
            return None
        policy, latest = self._policy, next(reversed(self._pending))
        view, other = policy.look(latest), self._choose()
        if now >= self._patience or not view.accepting:
            # Half of the deadline (with two disks) has gone by, or it will not answer: that is a failure.
            policy.counts.failovers[latest] += 1
            return self._ask(other, now)
        if _sound(policy.look(other), view.oldest, policy.delay(view)):
            if policy.budget.take():
                policy.counts.hedges += 1
                self._hedges.add(other)
                return self._ask(other, now)
            if not self._refused:
                self._refused = True
                policy.counts.hedges_refused += 1
        # Less and less often: whoever waits must not keep the hub busy.
        self.due = min(self._patience, now + max(policy.delay(view), now - self._pending[latest]))
        return None

    def over(self, now: float) -> bool:
        """Whether no good answer is to be expected any more."""
        if self._missing_until is not None and now >= self._missing_until:
            return True
        return not self._pending and (self.missing or not self._unasked)

    def answered(self, name: str) -> None:
        """A disk has given a good answer."""
        self._policy.counts.answers[name] += 1
        self._policy.counts.hedges_won += name in self._hedges

    def failed(self, name: str) -> None:
        """A disk has failed: the next one is asked at once, unless another is being asked already."""
        del self._pending[name]
        self._failed = name

    def not_found(self, name: str, now: float) -> None:
        """A disk has no such file. The others that are well have a moment to know better."""
        del self._pending[name]
        if self._missing_until is None:
            waits = [self._policy.opinion(self._policy.look(each)) for each in self._pending]
            self._missing_until = self.due = min(self._ends, now + max(waits, default=0.0))

    def _choose(self) -> str:
        if self._first is not None:
            return self._first
        return self._unasked[0] if len(self._unasked) == 1 else self._policy.best(self._unasked)

    def _ask(self, name: str, now: float) -> str:
        if self._failed is not None:
            self._policy.counts.failovers[self._failed] += 1
            self._failed = None
        self._first = None
        self._unasked.remove(name)
        self._pending[name] = now
        # Whoever is left shares what is left of the time.
        self._patience = now + (self._ends - now) / (len(self._unasked) + 1)
        self.due = min(self._patience, now + self._policy.delay(self._policy.look(name)))
        return name

    def _second_opinion(self, now: float) -> str | None:
        for name in self._unasked:
            view = self._policy.look(name)
            wait = self._policy.opinion(view)
            if _sound(view, wait):
                self._unasked.remove(name)
                self._pending[name] = now
                assert self._missing_until is not None
                self.due = self._missing_until = min(self._ends, max(self._missing_until, now + wait))
                return name
        return None


def _sound(view: View, *patience: float) -> bool:
    """Whether a disk may be expected to answer: it is online, and nothing has been stuck on it for too long."""
    return view.accepting and view.state is State.ONLINE and view.oldest <= max(patience)
