"""The requests of the original experiment, `RC,MS,PATH`: parsed and carried out, whatever protocol they came by."""

from __future__ import annotations

import math
import re
import time
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from diskread import Disk, DiskBusy, DiskError, DiskFileChanged, DiskIOError, DiskOffline, DiskTimeout, Limits

if TYPE_CHECKING:
    from collections.abc import Mapping

SIMULATED = "simulated"
"""Name of the disk without files that carries out stalls which name no other disk."""

SIMULATED_LIMITS = Limits(threads=1024, queue=100_000, deadline=3700.0, offline_after=math.inf, slow=math.inf)
"""1,000 stalls at once need a thread each; the longest stall there is must fit into the deadline."""

LONGEST_WAIT = 4.0
"""Seconds that a request may wait in the queue: after that its client has given up, says the experiment."""

LONGEST_STALL = 3_600_000
"""Milliseconds of the longest stall that is taken for one; more is bad input."""

_INTEGER = re.compile(rb"[ \t]*([+-]?[0-9]{1,18})[ \t]*\Z")


class Status(IntEnum):
    """First field of a reply that is not what the request asked for."""

    QUEUE_TIMEOUT = 1
    BAD_INPUT = 2
    REFUSED = 3
    """The disk is busy or offline."""
    DEADLINE = 4
    """The read missed its deadline."""
    NO_FILE = 5
    """The file is not there or may not be read."""
    IO_ERROR = 6


class BadInput(ValueError):
    """The text is not a request of the experiment; the message says why."""


class Failed(Exception):
    """The request was understood and could not be carried out."""

    def __init__(self, status: Status, total: float, reason: str) -> None:
        """Keep the status, the seconds that it took, and the reason in words."""
        super().__init__(reason)
        self.status = status
        self.total = total


class Request(NamedTuple):
    """One request of the experiment.

    Attributes:
        status: What the client wants back on success, as it came.
        stall: Seconds that the simulated read takes.
        path: Any text without a comma, as it came.
    """

    status: bytes
    stall: float
    path: bytes


def parse(text: bytes) -> Request:
    """Parse `RC,MS,PATH`.

    Args:
        text: The request without its line end.

    Raises:
        BadInput: It is not one.
    """
    fields = text.split(b",")
    if len(fields) != 3:
        raise BadInput(f"a request has three fields, RC,MS,PATH; this has {len(fields)}")
    status, milliseconds = (_INTEGER.match(field) for field in fields[:2])
    if status is None:
        raise BadInput("the first field, the status, is not an integer")
    if milliseconds is None:
        raise BadInput("the second field, the milliseconds, is not an integer")
    if not 0 <= int(milliseconds[1]) <= LONGEST_STALL:
        raise BadInput(f"the milliseconds must be between 0 and {LONGEST_STALL}")
    if not fields[2]:
        raise BadInput("the third field, the path, is empty")
    return Request(status[1], int(milliseconds[1]) / 1000, fields[2])


class Simulation:
    """Carries out requests of the experiment on the disks that they name."""

    def __init__(self, disks: Mapping[str, Disk], *, stalls: bool) -> None:
        """Remember the disks.

        Args:
            disks: By name. Needs one called `simulated` when stalls are allowed.
            stalls: Whether a client may occupy a slot for as long as it likes.
        """
        self._disks = disks
        self._stalls = stalls

    def perform(self, request: Request, since: float) -> float:
        """Stall, and read the file when the path names one on a disk. Blocks the greenlet, never the hub.

        Args:
            request: What to do.
            since: Time on `time.monotonic` at which the request began to wait.

        Returns:
            Seconds in the queue plus seconds of the stall and read.

        Raises:
            BadInput: It asks for a stall, and stalls are off.
            Failed: It could not be carried out.
        """
        if request.stall and not self._stalls:
            raise BadInput("simulated stalls are off on this server; 'diskread serve --simulate' turns them on")
        name, _, path = request.path.partition(b"/")
        disk = self._disks.get(name.decode("latin-1")) if name != SIMULATED.encode() else None
        if disk is None:
            disk, path = self._disks.get(SIMULATED), b""
        waited = time.monotonic() - since
        if waited >= LONGEST_WAIT:
            raise Failed(Status.QUEUE_TIMEOUT, waited, "waited too long before its read could start")
        if disk is None:
            raise Failed(Status.NO_FILE, waited, f"there is no disk called {name.decode('ascii', 'backslashreplace')}")
        try:
            times = disk.stall(request.stall, path or None, longest_wait=LONGEST_WAIT - waited)
        except DiskError as error:
            total = time.monotonic() - since
            raise Failed(_status_of(error, total), total, str(error)) from error
        return waited + times.queue + times.disk


def _status_of(error: DiskError, total: float) -> Status:
    if isinstance(error, DiskTimeout):
        return Status.QUEUE_TIMEOUT if not error.started and total >= LONGEST_WAIT else Status.DEADLINE
    if isinstance(error, (DiskBusy, DiskOffline)):
        return Status.REFUSED
    return Status.IO_ERROR if isinstance(error, (DiskIOError, DiskFileChanged)) else Status.NO_FILE
