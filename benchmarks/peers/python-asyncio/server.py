"""CPython and asyncio, one task per connection: a blocking read goes through `asyncio.to_thread` to the loop's default
executor, which has four threads more than the machine has cores, 32 at most; the loop goes on."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

import wire

options = wire.arguments()
read = wire.Reader(options.root)


async def perform(request: wire.Request | None, since: float) -> tuple[bytes, float]:
    """Have a thread of the executor do it; what waited too long for one is told so by the thread that comes to it."""
    if request is None:
        return wire.BAD_INPUT, 0.0
    return await asyncio.to_thread(wire.timed, read, request, since)


async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection, from its first byte to its end."""
    since = time.monotonic()
    try:
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line = await asyncio.wait_for(first_line(reader), wire.IDLE_TIMEOUT)
        if wire.is_http(line):
            await converse_http(line, reader, writer, since)
        elif line:
            request = (
                wire.parse(line.removesuffix(b"\n").removesuffix(b"\r")) if len(line) <= wire.LONGEST_LINE else None
            )
            writer.write(wire.line_reply(request, *await perform(request, since)))
            await drain(reader, writer)
    except (OSError, asyncio.TimeoutError, EOFError, asyncio.LimitOverrunError):
        pass  # the client has gone, says nothing, or too much
    finally:
        writer.close()


async def first_line(reader: asyncio.StreamReader) -> bytes:
    """The first line, or what there is of it: it may lack its end, or be too long."""
    try:
        return await reader.readuntil(b"\n")
    except asyncio.IncompleteReadError as end:
        return end.partial
    except asyncio.LimitOverrunError:
        return await reader.readexactly(wire.LONGEST_LINE + 1)


async def converse_http(line: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, since: float) -> None:
    """As many HTTP requests as the client has."""
    head = line
    while True:
        while not head.endswith((b"\r\n\r\n", b"\n\n")):
            head += await asyncio.wait_for(reader.readuntil(b"\n"), wire.IDLE_TIMEOUT)
            if len(head) > wire.LONGEST_HEAD:
                return
        parsed = wire.parse_head(head)
        request = wire.parse_target(parsed.target) if parsed is not None else None
        keep_alive = parsed is not None and parsed.keep_alive
        writer.write(wire.http_reply(request, *await perform(request, since), keep_alive))
        if not keep_alive:
            await drain(reader, writer)
            return
        head = await asyncio.wait_for(reader.readuntil(b"\n"), wire.IDLE_TIMEOUT)
        since = time.monotonic()


async def drain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Let the reply arrive: to close with bytes unread would reset the connection."""
    writer.write_eof()
    for _ in range(64):
        if not await asyncio.wait_for(reader.read(wire.BLOCK), 1.0):
            break


async def main() -> None:
    """Serve until the process ends."""
    listener = wire.listen(options.port)
    listener.setblocking(False)
    server = await asyncio.start_server(converse, sock=listener, backlog=wire.backlog(), limit=wire.LONGEST_HEAD)
    await server.serve_forever()


asyncio.run(main())
