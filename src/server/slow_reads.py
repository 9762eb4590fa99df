"""The last lines of the library's log of slow and stuck reads, for those who look later."""

from __future__ import annotations

import logging
from collections import deque

import msgspec

from diskread.slow_log import SlowRead

LENGTH = 100
"""Lines that are kept."""


class SlowReadDocument(msgspec.Struct, frozen=True):
    """A slow or stuck read as JSON: `diskread.slow_log.SlowRead`, and when that was said, in seconds since 1970."""

    time: float
    disk: str
    path: str | None
    kind: str
    bytes: int
    queue: float
    seconds: float
    left_out: int


class SlowReads(logging.Handler):
    """Keeps the last lines of this process, whatever its other handlers do with them. Never blocks, never fails.

    Attributes:
        count: Lines that have come so far.
    """

    def __init__(self, length: int = LENGTH) -> None:
        """Keep `length` lines; `logging.getLogger("diskread").addHandler` makes them come."""
        super().__init__(logging.WARNING)
        self.count = 0
        self._lines: deque[SlowReadDocument] = deque(maxlen=length)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the line, if it is about a read."""
        read = getattr(record, "slow_read", None)
        if isinstance(read, SlowRead):
            self.count += 1
            self._lines.append(
                SlowReadDocument(
                    round(record.created, 3),
                    read.disk,
                    read.path,
                    read.kind,
                    read.bytes,
                    round(read.queue, 3),
                    round(read.seconds, 3),
                    read.left_out,
                )
            )

    @property
    def lines(self) -> list[SlowReadDocument]:
        """The lines that are kept, the oldest first."""
        return list(self._lines)
