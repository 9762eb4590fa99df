"""How much of a server one disk may use up."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

EngineName = Literal["threadpool", "native"]

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
        offline_after: Seconds without progress after which the disk is taken offline: an operation has been inside
            the kernel all the time, and none has completed. `math.inf` never does.
        idle_probe: A disk that hangs while nobody uses it is found out within this many seconds; more than
            `offline_after`. `math.inf` leaves idle disks alone.
        probe_interval: Seconds between the first two probes of an offline disk. The interval doubles from probe to
            probe, with jitter.
        probe_interval_max: Seconds between probes at most.
        inline: "auto" reads what is in the page cache on the hub's own thread, where that cannot block
            (`diskread.inline`); "off" never does.
        slow: Seconds at the disk after which a read is logged as slow. `math.inf` logs none.
        engine: What runs the reads: "threadpool" is gevent's; "native" has threads that never wait for the GIL, so that
            a busy interpreter delays no read that is under way. Other calls (`Disk.run`) use the threadpool always.

    Raises:
        ValueError: A value out of its range; the message names it.
        TypeError: A value of the wrong type.
    """

    threads: int = 8
    queue: int = 64
    deadline: float = 10.0
    idle: float = 60.0
    offline_after: float = 10.0
    idle_probe: float = 30.0
    probe_interval: float = 1.0
    probe_interval_max: float = 30.0
    slow: float = 1.0
    inline: Literal["auto", "off"] = "auto"
    engine: EngineName = "threadpool"

    def __post_init__(self) -> None:
        """Check every value, so that a wrong one is found where it was written."""
        _check_choice("inline", self.inline, ("auto", "off"))
        _check_choice("engine", self.engine, ("threadpool", "native"))
        for field in fields(self):
            if field.name in ("inline", "engine"):
                continue
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
        for name in ("offline_after", "slow"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be a positive number of seconds, not {getattr(self, name)}")
        if self.offline_after != math.inf and not self.idle_probe > self.offline_after:
            raise ValueError(
                f"idle_probe must be more than offline_after, {self.offline_after} seconds, not {self.idle_probe}"
            )
        if not 0.01 <= self.probe_interval < math.inf:
            raise ValueError(f"probe_interval must be at least 0.01 seconds, not {self.probe_interval}")
        if not self.probe_interval <= self.probe_interval_max < math.inf:
            raise ValueError(
                f"probe_interval_max must be at least probe_interval, {self.probe_interval} seconds, "
                f"not {self.probe_interval_max}"
            )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"{name} must be {' or '.join(map(repr, choices))}, not {value!r}")


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
