"""CPython, one thread per connection: a blocking read waits in the thread of its connection, with the GIL released
by `time.sleep` and `os.pread`; there are as many threads as connections, without a limit."""

from __future__ import annotations

import sys
import threading
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

from wire import Reader, arguments, converse, listen, timed

options = arguments()
perform = partial(timed, Reader(options.root))
listener = listen(options.port)
while True:
    try:
        sock, _ = listener.accept()
        threading.Thread(target=converse, args=(sock, time.monotonic(), perform), daemon=True).start()
    except (OSError, RuntimeError) as error:  # out of descriptors or threads: those that end free some
        print(f"python-threads: {error}", file=sys.stderr)
        time.sleep(0.1)
