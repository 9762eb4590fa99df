"""Swift's object server in this process: its application, called without a socket, on devices that are directories."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import eventlet
from swift.common import utils
from swift.common.storage_policy import POLICIES
from swift.common.swob import Request

from diskread.swift.app import ObjectController

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from diskread.swift.devices import Device

utils.HASH_PATH_SUFFIX = b"diskread"

HEARTBEAT = 0.01
"""Seconds between two turns of the green thread that notices when nobody else gets one."""


class Log(logging.Logger):
    """A logger and a client of statsd, as Swift's are one thing, that remember what they were told."""

    thread_locals = (None, None)

    def __init__(self) -> None:
        super().__init__("swift")
        self.counted: list[str] = []
        self.told: list[str] = []
        self.logger = self
        self.txn_id = ""

    def increment(self, metric: str, **_: Any) -> None:
        self.counted.append(metric)

    def handle(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())

    def timing(self, *_: Any, **__: Any) -> None:
        """Nobody asks."""

    timing_since = update_stats = transfer_rate = timing


@dataclass
class Answer:
    """What the server has answered.

    Attributes:
        status: Of HTTP.
        body: All of it.
        headers: Those of the answer.
        seconds: How long it took.
    """

    status: int
    body: bytes
    headers: Mapping[str, str]
    seconds: float


@dataclass
class Server:
    """The application.

    Attributes:
        directory: Has the devices.
        settings: Its configuration, beside what all of them have.
        log: What it told.
    """

    directory: Path
    settings: Mapping[str, str] = field(default_factory=dict)
    log: Log = field(default_factory=Log)

    def __post_init__(self) -> None:
        self.conf = {
            "devices": str(self.directory),
            "mount_check": "false",
            "fallocate_reserve": "0",
            "recon_cache_path": str(self.directory),
            **self.settings,
        }
        self.app = ObjectController(self.conf, self.log)

    def manager(self, policy: int = 0) -> Any:
        """What has the disk files of a storage policy."""
        return self.app._diskfile_router[POLICIES[policy]]

    def device(self, name: str) -> Device:
        """A device."""
        device: Device = self.manager().device(name)
        return device

    def ask(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        policy: int = 0,
    ) -> Answer:
        """Send a request, in this green thread.

        Args:
            method: GET, PUT, ...
            path: From the device on: d1/0/a/c/o.
            body: What is put.
            headers: More headers.
            policy: Index of the storage policy.
        """
        given = {
            "X-Timestamp": utils.Timestamp.now().internal,
            "Content-Type": "text/plain",
            "X-Backend-Storage-Policy-Index": str(policy),
            **(headers or {}),
        }
        request = Request.blank(f"/{path}", environ={"REQUEST_METHOD": method}, headers=given, body=body)
        begin = time.monotonic()
        answer = request.get_response(self.app)
        content = answer.body
        return Answer(answer.status_int, content, answer.headers, time.monotonic() - begin)


@contextlib.contextmanager
def heartbeat() -> Iterator[list[float]]:
    """Measure for how long at a time no other green thread gets its turn: a list of seconds, complete in the end."""
    gaps: list[float] = []

    def beat() -> None:
        last = time.monotonic()
        while True:
            eventlet.sleep(HEARTBEAT)
            gaps.append(time.monotonic() - last)
            last = time.monotonic()

    thread = eventlet.spawn(beat)
    eventlet.sleep(0)
    try:
        yield gaps
    finally:
        eventlet.sleep(2 * HEARTBEAT)  # a gap that lasts until now is one, too
        thread.kill()
