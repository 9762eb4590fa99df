"""The log of reads that were slow, or stuck: enough to find the disk, never enough to fill it."""

from __future__ import annotations

import logging
import math

from .errors import printable

log = logging.getLogger("diskread")
log.addHandler(logging.NullHandler())  # a library writes nowhere unless its program says so

BURST = 10
"""Lines that a disk may write in a row ..."""

PERIOD = 10.0
"""... and the seconds in which it earns as many again."""


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
            self._say(path, f"was stuck and is back: {count} bytes after {disk:.3f} s at the disk", now)
        elif disk >= self._slow:
            self._say(path, f"slow: {count} bytes, {queue:.3f} s in the queue, {disk:.3f} s at the disk", now)

    def stuck(self, path: bytes | None, size: int, queue: float, disk: float, *, now: float) -> None:
        """An operation that asked for `size` bytes has missed its deadline and is still inside the kernel."""
        self._say(
            path, f"stuck: {size} bytes asked for, {queue:.3f} s in the queue, {disk:.3f} s at the disk so far", now
        )

    def _say(self, path: bytes | None, text: str, now: float) -> None:
        if self._earned != -math.inf:
            self._credit = min(BURST, self._credit + (now - self._earned) * BURST / PERIOD)
        self._earned = now
        if self._credit < 1:
            self._unsaid += 1
            return
        self._credit -= 1
        where = self._disk if path is None else f"{self._disk}/{printable(path)}"
        unsaid = f" ({self._unsaid} lines like this one were left out)" if self._unsaid else ""
        self._unsaid = 0
        log.warning("%s %s%s", where, text, unsaid)
