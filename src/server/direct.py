"""What clients ask most, answered without the whole of HTTP: small files that are cached, the experiment's requests.

A request that is not exactly like that, one that fails, a server that writes an access log: all of these go the
ordinary way, through pywsgi and the application, and get the same answers there.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

from diskread.wsgi import description, sent_by

from .head import date
from .simulate import BadInput, Request, Simulation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from diskread import Disk, Mirror

# Paths that need no decoding, and headers that change nothing.
_PATH = rb"[A-Za-z0-9._/-]{1,1024}"
_HEADERS = rb"(?:(?i:Host|User-Agent|Accept|Accept-Encoding|Accept-Language|DNT): [\x20-\x7e]{0,1024}\r\n){0,6}\r\n"
_REQUEST = re.compile(
    rb"GET /(?:v1/([A-Za-z0-9._-]{1,255})/(" + _PATH + rb")|(-?[0-9]{1,9}),([0-9]{1,6}),(" + _PATH + rb"))"
    rb" HTTP/1\.1\r\n" + _HEADERS
)


class Direct:
    """Answers what it can."""

    def __init__(self, disks: Mapping[str, Disk | Mirror], simulation: Simulation) -> None:
        """Serve these disks and mirrors, by name, and the experiment."""
        self._disks = disks
        self._simulation = simulation

    def answer(self, data: bytes, is_last: Callable[[], bool]) -> tuple[bytes, int] | None:
        """Answer the request at the beginning of what a client has sent. Blocks the greenlet, never the hub.

        Args:
            data: What it has sent.
            is_last: Asked when the response is there: whether it is the last one on its connection.

        Returns:
            The whole response, and the bytes that the request has; None for the ordinary way.

        Raises:
            Failed: As `Simulation.perform` says.
        """
        found = _REQUEST.match(data)
        if found is None:
            return None
        disk, path, status, milliseconds, text = found.groups()
        if disk is not None:
            head_and_body = self._file(disk, path)
        else:
            head_and_body = self._simulated(Request(status, int(milliseconds) / 1000, text))
        if head_and_body is None:
            return None
        fields, body = head_and_body
        response = b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\nDate: %b\r\n%b\r\n%b" % (
            fields,
            len(body),
            date(),
            b"Connection: close\r\n" if is_last() else b"",
            body,
        )
        return response, found.end()

    def _file(self, disk_name: bytes, path: bytes) -> tuple[bytes, bytes] | None:
        disk = self._disks.get(disk_name.decode("ascii"))
        if disk is None:
            return None
        found = disk.read_cached(path)
        if found is None:
            return None
        stat, body = found
        fields = "".join([f"{name}: {value}\r\n" for name, value in (*description(path, stat), *sent_by(stat))])
        return fields.encode("ascii"), body

    def _simulated(self, request: Request) -> tuple[bytes, bytes] | None:
        try:
            total = self._simulation.perform(request, time.monotonic())
        except BadInput:
            return None
        return b"Content-Type: text/plain; charset=utf-8\r\n", b"%d,%b" % (int(total * 1000), request.path)
