"""The comparison: a gevent server whose extension reads with the GIL held. Never run this for anything else.

It is what an ordinary blocking read in an extension does to a server: the reads run on gevent's threadpool, one per
request, and still everything stands still, because no other thread can run Python while one of them waits.

    python -m server.demo.gil_held ROOT DISK HANG_BEGIN HANG_END

serves the line protocol for the directories below ROOT. The disk called DISK hangs from HANG_BEGIN to HANG_END, on
CLOCK_MONOTONIC in seconds. The port is printed on standard output.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

import gevent
from gevent.server import StreamServer

from diskread import _syscalls

from ..simulate import parse

if TYPE_CHECKING:
    from gevent.socket import socket


class GilHeldServer:
    """Answers `RC,MS,DISK/FILE` by reading the file; MS does not count here, the disk's own hang does."""

    def __init__(self, root: bytes, disk: bytes, hang_begin: float, hang_end: float) -> None:
        """Serve the directories below `root`; one of them hangs for a time."""
        self._root = root
        self._disk = disk
        self._hang_begin = hang_begin
        self._hang_end = hang_end

    def handle(self, sock: socket, _address: object) -> None:
        """Serve one connection."""
        started = time.monotonic()
        try:
            request = parse(sock.recv(4096).rstrip(b"\r\n"))
            gevent.get_hub().threadpool.apply(self._read, (request.path,))
            milliseconds = int((time.monotonic() - started) * 1000)
            sock.sendall(b"%b,%d,%b\n" % (request.status, milliseconds, request.path))
        except (OSError, ValueError):
            pass  # the client is gone, or it sent what is none of the demo's requests

    def _read(self, path: bytes) -> None:
        now = time.monotonic()
        if path.partition(b"/")[0] == self._disk and self._hang_begin <= now < self._hang_end:
            _syscalls.stall_holding_gil(self._hang_end - now)
        descriptor = os.open(os.path.join(self._root, path), os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            _syscalls.pread_holding_gil(descriptor, size, 0)
        finally:
            os.close(descriptor)


def main(root: str, disk: str, hang_begin: str, hang_end: str) -> None:
    """Serve until killed."""
    answering = GilHeldServer(os.fsencode(root), disk.encode(), float(hang_begin), float(hang_end))
    server = StreamServer(("127.0.0.1", 0), answering.handle, backlog=65_535)
    server.start()
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
