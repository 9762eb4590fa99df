"""The worker processes of one server: each knows its own reads; asked for the disks, any of them answers for all.

Every worker listens on a Unix socket in a directory that belongs to them all. A worker that has gone leaves its socket
behind, and whoever notices removes it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections import Counter
from dataclasses import fields, replace
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import falcon
import gevent
import msgspec
from gevent import socket

from diskread import Counts, DiskStatus, Load, MirrorCounts, MirrorStatus, State
from diskread.inline import InlineStatus
from diskread.latency import Latency

from . import admin
from .status import Seen

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from diskread import Disks

PATIENCE = 1.0
"""Seconds that another worker gets for its answer: one whose hub stands still is left out."""

Counted = TypeVar("Counted", Load, Counts, InlineStatus, MirrorCounts)

_WORST = (State.OFFLINE, State.HALF_OPEN, State.SUSPECT, State.ONLINE)
_Status = tuple[list[DiskStatus], list[MirrorStatus]]
_STATUSES: msgspec.msgpack.Decoder[_Status] = msgspec.msgpack.Decoder(  # JSON has no infinity
    _Status,
    dec_hook=lambda _kind, value: Counter(value),  # the one type of them that msgspec does not know
)
_log = logging.getLogger("diskread.server")


class Processes:
    """This worker among the others. Its methods block the greenlet, never the hub."""

    def __init__(self, directory: Path, disks: Disks) -> None:
        """Begin to listen to the others, and take those disks offline that an operator has taken offline before.

        Args:
            directory: From `directory_of`.
            disks: Of this worker.

        Raises:
            OSError: The socket cannot be made.
        """
        self._directory = directory
        self._disks = disks
        self._own = directory / f"{os.getpid()}.sock"
        self._by_hand = directory / "offline.json"
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listening.bind(str(self._own))
        listening.listen()
        app = admin.create_app(disks, simulate=False)
        app.add_route("/status", _OwnStatus(disks))
        self._server = admin.serve(listening, app)
        self._server.start()
        for name, reason in self._taken_offline().items():
            if name in disks:
                disks[name].set_offline(reason)

    def look(self) -> Seen:
        """The disks as all workers together have them."""
        answers = [answer for answer in self._ask_others("GET", "/status") if answer is not None]
        found = [_status_of(self._disks), *map(_STATUSES.decode, answers)]
        disks = [[disk for each, _ in found for disk in each if disk.name == name] for name in self._disks]
        mirrors = [
            [mirror for _, each in found for mirror in each if mirror.name == name] for name in self._disks.mirrors
        ]
        return Seen([merge(each) for each in disks], [merge_mirrors(each) for each in mirrors], len(found))

    def set_offline(self, name: str, reason: str) -> None:
        """Have the other workers take a disk offline, and those that will be started later."""
        self._remember({**self._taken_offline(), name: reason})
        self._ask_others("PUT", f"/disks/{quote(name)}/offline", msgspec.json.encode({"reason": reason}))

    def set_online(self, name: str) -> None:
        """Have the other workers put a disk online."""
        self._remember({each: reason for each, reason in self._taken_offline().items() if each != name})
        self._ask_others("PUT", f"/disks/{quote(name)}/online")

    def close(self) -> None:
        """Leave. The last one removes the directory. Never waits for the others."""
        self._server.close()
        self._own.unlink(missing_ok=True)
        if not any(self._directory.glob("*.sock")):
            self._by_hand.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._directory.rmdir()

    def __enter__(self) -> Processes:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave."""
        self.close()

    def _taken_offline(self) -> dict[str, str]:
        try:
            return msgspec.json.decode(self._by_hand.read_bytes(), type=dict[str, str])
        except (OSError, msgspec.DecodeError):
            return {}

    def _remember(self, offline: dict[str, str]) -> None:
        # Whole or not at all: another worker may be reading it.
        with tempfile.NamedTemporaryFile(dir=self._directory, delete=False) as file:
            file.write(msgspec.json.encode(offline))
        os.replace(file.name, self._by_hand)

    def _ask_others(self, method: str, path: str, body: bytes = b"") -> list[bytes | None]:
        others = [each for each in self._directory.glob("*.sock") if each != self._own]
        asking = [gevent.spawn(_ask, each, method, path, body) for each in others]
        gevent.joinall(asking)
        return [each.value for each in asking]


class _OwnStatus:
    def __init__(self, disks: Disks) -> None:
        self._disks = disks

    def on_get(self, _request: falcon.Request, response: falcon.Response) -> None:
        response.content_type = falcon.MEDIA_MSGPACK
        response.data = msgspec.msgpack.encode(_status_of(self._disks))


def _status_of(disks: Disks) -> _Status:
    return disks.status, disks.mirror_status


class _UnixConnection(HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(self._path))


def _ask(path: Path, method: str, target: str, body: bytes) -> bytes | None:
    """Ask another worker; None when it does not answer."""
    connection = _UnixConnection(path)
    try:
        with gevent.Timeout(PATIENCE):
            connection.request(method, target, body)
            response = connection.getresponse()
            data = response.read()
            return data if response.status == 200 else None
    except ConnectionRefusedError:
        path.unlink(missing_ok=True)  # its process has gone
    except (OSError, gevent.Timeout):
        _log.warning("the worker with the socket %s did not answer", path.name)
    finally:
        connection.close()
    return None


def directory_of(master: int) -> Path:
    """The directory of the workers of one master process, made if it is not there.

    Args:
        master: Its process identifier.

    Raises:
        OSError: It cannot be made, or is somebody else's.
    """
    directory = Path(tempfile.gettempdir()) / f"diskread-{master}"
    directory.mkdir(mode=0o700, exist_ok=True)
    found = directory.lstat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionError(f"{directory} is not ours alone; remove it, or set TMPDIR")
    return directory


def merge(statuses: Sequence[DiskStatus]) -> DiskStatus:
    """One disk as several workers have it: numbers add up, and the worst verdict is the one that counts."""
    first = statuses[0]
    limits = [each.limits for each in statuses]
    return DiskStatus(
        name=first.name,
        root=first.root,
        limits=replace(
            first.limits, threads=sum(each.threads for each in limits), queue=sum(each.queue for each in limits)
        ),
        load=_merge_loads([each.load for each in statuses]),
        counts=_sum_of_fields([each.counts for each in statuses]),
        queue_time=_merge_times([each.queue_time for each in statuses]),
        disk_time=_merge_times([each.disk_time for each in statuses]),
        inline=_merge_inline([each.inline for each in statuses]),
    )


def merge_mirrors(statuses: Sequence[MirrorStatus]) -> MirrorStatus:
    """One mirror as several workers have it."""
    return replace(
        statuses[0],
        accepting=any(each.accepting for each in statuses),
        counts=_sum_of_fields([each.counts for each in statuses]),
    )


def _merge_loads(loads: Sequence[Load]) -> Load:
    worst = min(loads, key=lambda each: _WORST.index(each.state))
    probes = [each.next_probe for each in loads if each.next_probe is not None]
    return replace(
        _sum_of_fields(loads),
        state=worst.state,
        reason=worst.reason,
        since=worst.since,
        oldest=max(each.oldest for each in loads),
        accepting=any(each.accepting for each in loads),
        next_probe=min(probes, default=None),
    )


def _merge_times(times: Sequence[Latency]) -> Latency:
    buckets = [sum(each) for each in zip(*(each.buckets for each in times), strict=True)]
    return Latency(buckets, sum(each.total for each in times))


def _merge_inline(found: Sequence[InlineStatus]) -> InlineStatus:
    on = next((each for each in found if each.on), found[0])
    return replace(_sum_of_fields(found), on=on.on, reason=on.reason)


def _sum_of_fields(found: Sequence[Counted]) -> Counted:
    """The first one with the sums of all its counts, by name or not."""
    sums: dict[str, Any] = {}
    for field in fields(found[0]):
        values = [getattr(each, field.name) for each in found]
        if isinstance(values[0], Counter):
            sums[field.name] = sum(values, Counter())
        elif isinstance(values[0], int) and not isinstance(values[0], bool):
            sums[field.name] = sum(values)
    return replace(found[0], **sums)
