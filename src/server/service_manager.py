"""What a service manager (systemd with Type=notify) is told: that the server is ready, stops, and has a hub that turns.

The protocol is that of sd_notify(3): datagrams to the socket that NOTIFY_SOCKET names.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING, Any

import gevent

if TYPE_CHECKING:
    from collections.abc import Mapping


class ServiceManager:
    """The service manager that has started this process; without one, nothing is told. Never blocks."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        """Find out from the environment who wants to be told.

        Args:
            environment: NOTIFY_SOCKET is a path, or an abstract address that begins with "@"; WATCHDOG_USEC the
                microseconds in which the hub has to be heard of; WATCHDOG_PID for which process that holds, if not all.
        """
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) if address else None
        microseconds = environment.get("WATCHDOG_USEC", "")
        meant = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog = int(microseconds) / 1e6 if meant and microseconds.isdecimal() else 0.0
        """Seconds in which the hub has to be heard of; 0 when nobody listens for it."""
        self._timer: Any = None  # gevent's watchers have no types

    def ready(self) -> None:
        """Say that clients can connect. From now on the hub says twice per interval that it turns."""
        self._tell(b"READY=1")
        if self.watchdog and self._socket is not None:
            # A timer of this hub, and no thread: when the hub stands still, so does this.
            self._timer = gevent.get_hub().loop.timer(0, self.watchdog / 2, ref=False)
            self._timer.start(self._tell, b"WATCHDOG=1")

    def stopping(self) -> None:
        """Say that the server drains. The watchdog goes on: a hub that stands still now must not last, either."""
        self._tell(b"STOPPING=1")

    def close(self) -> None:
        """Say nothing more."""
        if self._timer is not None:
            self._timer.close()
        if self._socket is not None:
            self._socket.close()

    def _tell(self, message: bytes) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):  # as sd_notify(3) advises: the service works all the same
                self._socket.sendto(message, self._address)
