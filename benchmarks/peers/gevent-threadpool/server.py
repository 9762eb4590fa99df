"""CPython and gevent, one greenlet per connection: a blocking read waits in a thread of the hub's own threadpool, of
which there are ten by default, for all disks, files and name look-ups together; the hub goes on."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

import gevent
from gevent import socket
from gevent.server import StreamServer
from wire import Reader, Request, arguments, converse, listen, timed

options = arguments()
read = Reader(options.root)
listener = socket.socket(fileno=listen(options.port).detach())


def perform(request: Request, since: float) -> tuple[bytes, float]:
    """Have a thread of the pool do it; what waited too long for one is told so by the thread that comes to it."""
    result: tuple[bytes, float] = gevent.get_hub().threadpool.apply(timed, (read, request, since))
    return result


server = StreamServer(listener, lambda sock, _address: converse(sock, time.monotonic(), perform))
server.max_accept = 100
server.serve_forever()
