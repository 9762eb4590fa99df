"""What the rows on asyncio share: the two generations of the wire on its streams."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable

import wire

Perform = Callable[[wire.Request, float], Awaitable[tuple[bytes, float]]]
"""Given a request and the time since which it waits: the status and the seconds that it took."""


async def serve(port: int, perform: Perform) -> None:
    """Serve until the process ends."""
    listener = wire.listen(port)
    listener.setblocking(False)
    server = await asyncio.start_server(
        lambda reader, writer: converse(reader, writer, perform),
        sock=listener,
        backlog=wire.backlog(),
        limit=wire.LONGEST_HEAD,
    )
    await server.serve_forever()


async def _performed(perform: Perform, request: wire.Request | None, since: float) -> tuple[bytes, float]:
    return (wire.BAD_INPUT, 0.0) if request is None else await perform(request, since)


async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, perform: Perform) -> None:
    """One connection, from its first byte to its end."""
    since = time.monotonic()
    try:
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line = await asyncio.wait_for(_first_line(reader), wire.IDLE_TIMEOUT)
        if wire.is_http(line):
            await _converse_http(line, reader, writer, since, perform)
        elif line:
            request = (
                wire.parse(line.removesuffix(b"\n").removesuffix(b"\r")) if len(line) <= wire.LONGEST_LINE else None
            )
            writer.write(wire.line_reply(request, *await _performed(perform, request, since)))
            await _drain(reader, writer)
    except (OSError, asyncio.TimeoutError, EOFError, asyncio.LimitOverrunError):
        pass  # the client has gone, says nothing, or too much
    finally:
        writer.close()


async def _first_line(reader: asyncio.StreamReader) -> bytes:
    """The first line, or what there is of it: it may lack its end, or be too long."""
    try:
        return await reader.readuntil(b"\n")
    except asyncio.IncompleteReadError as end:
        return end.partial
    except asyncio.LimitOverrunError:
        return await reader.readexactly(wire.LONGEST_LINE + 1)


async def _converse_http(
    line: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, since: float, perform: Perform
) -> None:
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
        writer.write(wire.http_reply(request, *await _performed(perform, request, since), keep_alive))
        if not keep_alive:
            await _drain(reader, writer)
            return
        head = await asyncio.wait_for(reader.readuntil(b"\n"), wire.IDLE_TIMEOUT)
        since = time.monotonic()


async def _drain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Let the reply arrive: to close with bytes unread would reset the connection."""
    writer.write_eof()
    for _ in range(64):
        if not await asyncio.wait_for(reader.read(wire.BLOCK), 1.0):
            break
