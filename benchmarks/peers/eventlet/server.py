"""CPython and eventlet, one green thread per connection: a blocking read waits in the one native thread there is, as
system calls on files do in an eventlet program, and every other green thread waits with it."""

from __future__ import annotations

import sys
import time
import warnings
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))
warnings.simplefilter("ignore")  # eventlet says at each start that it is deprecated

import eventlet
from eventlet.greenio import GreenSocket
from wire import Reader, arguments, converse, listen, timed

options = arguments()
perform = partial(timed, Reader(options.root))
listener = GreenSocket(listen(options.port))
while True:
    try:
        sock, _ = listener.accept()
        eventlet.spawn_n(converse, sock, time.monotonic(), perform)
    except OSError as error:
        print(f"eventlet: {error}", file=sys.stderr)
        eventlet.sleep(0.1)
