"""The log of reads that were slow, or stuck: enough to find the disk, never enough to fill it."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Literal

from .errors import printable

log = logging.getLogger("diskread")
log.addHandler(logging.NullHandler())  # a library writes nowhere unless its program says so

BURST = 10
"""Lines that a disk may write in a row ..."""

PERIOD = 10.0
"""... and the seconds in which it earns as many again."""


@dataclass(frozen=True)
class SlowRead:
    """What a line of the log is about; its `LogRecord` has it as `slow_read`.

    Attributes:
        disk: Name of the disk.
        path: Path of the file, with everything unprintable escaped; None for an operation without one.
        kind: "slow": it is over; "stuck": it has missed its deadline and is not over; "back": it was stuck and is over.
        bytes: Bytes that it read; for "stuck" those that it asked for. 0 for what is no read: an open, `Disk.run`.
        queue: Seconds that it waited for a slot.
        seconds: Seconds at the disk, for "stuck" those so far.
        left_out: How many lines of this disk were left out before this one, to keep the log short.
    """

    disk: str
    path: str | None
    kind: Literal["slow", "stuck", "back"]
    bytes: int
    queue: float
    seconds: float
    left_out: int = 0


class SlowLog:
    """The log of one disk. Times are seconds on one monotonic clock.

    Logging happens on the hub's thread: whoever sends this log to a file should not have that on a disk that hangs.
    """

    def __init__(self, disk: str, slow: float) -> None:
        """Log what took longer than `slow` seconds at the disk."""
        self._disk = disk
        self._slow = slow
        self._credit = float(BURST)
        self._earned = -math.inf
        self._unsaid = 0

    def finished(self, path: bytes | None, count: int, queue: float, disk: float, *, stuck: bool, now: float) -> None:
        """An operation is over; log it when it was slow, or when it was logged as stuck.

        Args:
            path: What it was about.
            count: Bytes that it read.
            queue: Seconds that it waited for a slot.
            disk: Seconds that it was inside the kernel.
            stuck: Whether its caller had given up.
            now: The time.
        """
        if stuck:
            self._say("back", path, count, queue, disk, now)
        elif disk >= self._slow:
            self._say("slow", path, count, queue, disk, now)

    def stuck(self, path: bytes | None, size: int, queue: float, disk: float, *, now: float) -> None:
        """An operation that asked for `size` bytes has missed its deadline and is still inside the kernel."""
        self._say("stuck", path, size, queue, disk, now)

    def _say(
        self,
        kind: Literal["slow", "stuck", "back"],
        path: bytes | None,
        size: int,
        queue: float,
        disk: float,
        now: float,
    ) -> None:
        if self._earned != -math.inf:
            self._credit = min(BURST, self._credit + (now - self._earned) * BURST / PERIOD)
        self._earned = now
        if self._credit < 1:
            self._unsaid += 1
            return
        self._credit -= 1
        read = SlowRead(self._disk, None if path is None else printable(path), kind, size, queue, disk, self._unsaid)
        self._unsaid = 0
        log.warning("%s", _line(read), extra={"slow_read": read, "disk": read.disk})


def _line(read: SlowRead) -> str:
    where = read.disk if read.path is None else f"{read.disk}/{read.path}"
    size = f"{read.bytes} bytes" if read.bytes else ""
    asked, brought = size and f"{size} asked for, ", size and f": {size}"
    what = {
        "slow": f"slow: {size and f'{size}, '}{read.queue:.3f} s in the queue, {read.seconds:.3f} s at the disk",
        "stuck": f"stuck: {asked}{read.queue:.3f} s in the queue, {read.seconds:.3f} s at the disk so far",
        "back": f"was stuck and is back{brought} after {read.seconds:.3f} s at the disk",
    }[read.kind]
    unsaid = f" ({read.left_out} lines like this one were left out)" if read.left_out else ""
    return f"{where} {what}{unsaid}"
