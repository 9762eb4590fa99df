"""CPython and gevent, one greenlet per connection: a blocking read waits in the thread of the hub, as system calls on
files do in a gevent program, and every other greenlet waits with it."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

from gevent import socket
from gevent.server import StreamServer
from wire import Reader, arguments, converse, listen, timed

options = arguments()
perform = partial(timed, Reader(options.root))
listener = socket.socket(fileno=listen(options.port).detach())
server = StreamServer(listener, lambda sock, _address: converse(sock, time.monotonic(), perform))
server.max_accept = 100
server.serve_forever()
