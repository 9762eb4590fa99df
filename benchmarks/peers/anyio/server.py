"""CPython and AnyIO on asyncio, one task per connection: a blocking read goes through `anyio.to_thread.run_sync`, whose
default limiter lets 40 threads run, for all disks together; the loop goes on."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

import anyio.to_thread
from wire import Reader, Request, arguments, timed
from wire_asyncio import serve

options = arguments()
read = Reader(options.root)


async def perform(request: Request, since: float) -> tuple[bytes, float]:
    """Have a thread of AnyIO's do it; what waited too long for one is told so by the thread that comes to it."""
    return await anyio.to_thread.run_sync(timed, read, request, since)


asyncio.run(serve(options.port, perform))
