"""Tells the log how the state of each disk changes."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING

from diskread import State

if TYPE_CHECKING:
    from diskread import Disks

_log = logging.getLogger("diskread.server")


class StateLog:
    """The log of all disks: a warning when one goes offline, a line when it is back.

    That a disk is suspect is not told: each read that is stuck has a line of its own in the library's log.
    """

    def __init__(self, disks: Disks) -> None:
        """Tell of the disks that are not well now, and of every change from now on."""
        self._offline_since: dict[str, float] = {}
        for disk in disks.values():
            load = disk.status.load
            if load.state is State.OFFLINE:
                self._changed(disk.name, load.state, load.reason)
            disk.on_change = partial(self._changed, disk.name)

    def _changed(self, name: str, state: State, reason: str | None) -> None:
        now, extra = time.monotonic(), {"disk": name, "state": state.value}
        if state is State.OFFLINE:
            self._offline_since.setdefault(name, now)
            _log.warning("disk %s is offline: %s", name, reason, extra=extra)
        elif name in self._offline_since:
            seconds = now - self._offline_since[name]
            if state is State.HALF_OPEN:
                text = "disk %s is half-open after %.1f s offline: one request at a time may try"
                _log.info(text, name, seconds, extra=extra)
            else:
                del self._offline_since[name]
                _log.info("disk %s is back online after %.1f s", name, seconds, extra=extra)
