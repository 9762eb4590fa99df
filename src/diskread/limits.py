"""How much of a server one disk may use up."""

from __future__ import annotations

from dataclasses import dataclass, fields

LONGEST_IDLE = 1_000_000
"""Seconds. A lock of a native thread cannot wait for ever so long (threading.TIMEOUT_MAX); this is well within it."""


@dataclass(frozen=True)
class Limits:
    """The limits of one disk.

    Args:
        threads: Slots: reads that may be inside the kernel at a time, each in a native thread of its own. Threads are
            started on demand. A hung disk can use up this many and no more.
        queue: Reads that may wait for a slot; one more is refused at once with `DiskBusy`. 0 refuses whatever finds
            no free slot.
        deadline: Seconds that a read may take, waiting for a slot included, unless the caller says otherwise.
            `math.inf` means no deadline.
        idle: Seconds after which a thread without work goes away.

    Raises:
        ValueError: A value out of its range; the message names it.
        TypeError: A value of the wrong type.
    """

    threads: int = 8
    queue: int = 64
    deadline: float = 10.0
    idle: float = 60.0

    def __post_init__(self) -> None:
        """Check every value, so that a wrong one is found where it was written."""
        for field in fields(self):
            value = getattr(self, field.name)
            whole = field.name in ("threads", "queue")
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise TypeError(f"{field.name} must be {'an integer' if whole else 'a number'}, not {value!r}")
        if not 1 <= self.threads <= 10_000:
            raise ValueError(f"threads must be between 1 and 10000, not {self.threads}")
        if not 0 <= self.queue <= 1_000_000:
            raise ValueError(f"queue must be between 0 and 1000000, not {self.queue}")
        check_deadline(self.deadline)
        if not 0 < self.idle <= LONGEST_IDLE:
            raise ValueError(f"idle must be more than 0 and at most {LONGEST_IDLE} seconds, not {self.idle}")


def check_deadline(seconds: float) -> float:
    """Return a deadline as it is, when it can be one.

    Args:
        seconds: Seconds from now; positive, `math.inf` for none.

    Raises:
        ValueError: It is zero, negative or not a number.
    """
    if not seconds > 0:  # also catches NaN
        raise ValueError(f"deadline must be a positive number of seconds, not {seconds}")
    return seconds
