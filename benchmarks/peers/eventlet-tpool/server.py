"""CPython and eventlet, one green thread per connection: a blocking read waits in a thread of eventlet's tpool, of
which there are twenty by default, for all disks together; the hub goes on."""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))
warnings.simplefilter("ignore")  # eventlet says at each start that it is deprecated

import eventlet
from eventlet import tpool
from eventlet.greenio import GreenSocket
from wire import Reader, Request, arguments, converse, listen, timed

options = arguments()
read = Reader(options.root)


def perform(request: Request, since: float) -> tuple[bytes, float]:
    """Have a thread of the pool do it; what waited too long for one is told so by the thread that comes to it."""
    result: tuple[bytes, float] = tpool.execute(timed, read, request, since)
    return result


listener = GreenSocket(listen(options.port))
while True:
    try:
        sock, _ = listener.accept()
        eventlet.spawn_n(converse, sock, time.monotonic(), perform)
    except OSError as error:
        print(f"eventlet-tpool: {error}", file=sys.stderr)
        eventlet.sleep(0.1)
