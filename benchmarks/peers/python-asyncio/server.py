"""CPython and asyncio, one task per connection: a blocking read goes through `asyncio.to_thread` to the loop's default
executor, which has four threads more than the machine has cores, 32 at most; the loop goes on."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

from wire import Reader, Request, arguments, timed
from wire_asyncio import serve

options = arguments()
read = Reader(options.root)


async def perform(request: Request, since: float) -> tuple[bytes, float]:
    """Have a thread of the executor do it; what waited too long for one is told so by the thread that comes to it."""
    return await asyncio.to_thread(timed, read, request, since)


asyncio.run(serve(options.port, perform))
