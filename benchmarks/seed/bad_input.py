"""What a server is asked that no good client would ask. It must answer what the wire says, and live."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import time
from typing import TYPE_CHECKING

import msgspec

from .process import Peer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .rows import Row

PATIENCE = 5.0
BAD = re.compile(rb"2,0,\r?\n?")
NO_ANSWER = re.compile(rb"")


class BadInput(msgspec.Struct, frozen=True, kw_only=True):
    """How a server took it.

    Attributes:
        asked: How many cases.
        wrong: Cases with another reply than the wire's, each with the reply.
        fatal: Cases after which it answered no good request any more, or had ended.
    """

    asked: int
    wrong: dict[str, str]
    fatal: list[str]


class _Case(msgspec.Struct, frozen=True):
    name: str
    send: list[bytes]
    reply: re.Pattern[bytes]
    half_close: bool = False


def _good(path: bytes, status: bytes = b"0") -> re.Pattern[bytes]:
    return re.compile(status + rb",\d+," + re.escape(path) + rb"\r?\n?")


CASES = [
    _Case("garbage", [b"garbage\n"], BAD),
    _Case("x,y,z", [b"x,y,z\n"], BAD),
    _Case("two fields", [b"1,2\n"], BAD),
    _Case("empty line", [b"\n"], BAD),
    _Case("negative ms", [b"0,-1,f\n"], BAD),
    _Case("very negative ms", [b"0,-99999,f\n"], BAD),
    _Case("overflowing ms", [b"0,99999999999999999999999,f\n"], BAD),
    _Case("ms of more than an hour", [b"0,2147483647,f\n"], BAD),
    _Case("overflowing status", [b"99999999999999999999999,0,f\n"], BAD),
    _Case("float", [b"0,1.5,f\n"], BAD),
    _Case("four fields", [b"0,1,f,g\n"], BAD),
    _Case("no path", [b"0,1,\n"], BAD),
    _Case("non-UTF-8 number", [b"0,\xff\xfe,f\n"], BAD),
    _Case("NUL bytes", [b"\0\0\0\0\n"], BAD),
    _Case("line of 5,000 bytes", [b"0,1," + b"p" * 5000 + b"\n"], BAD),
    _Case("1 MB without newline", [b"a" * 1_000_000], BAD),
    _Case("CRLF", [b"0,1,f\r\n"], _good(b"f")),
    _Case("spaces around numbers", [b" 0 , 1 ,f\n"], _good(b"f")),
    _Case("non-UTF-8 path", [b"0,1,caf\xe9\n"], _good(b"caf\xe9")),
    _Case("path of 300 bytes", [b"0,1," + b"p" * 300 + b"\n"], _good(b"p" * 300)),
    _Case("path of 2,000 bytes", [b"0,1," + b"p" * 2000 + b"\n"], _good(b"p" * 2000)),
    _Case("no newline, half-close", [b"0,1,f"], _good(b"f"), half_close=True),
    _Case("newline, half-close", [b"0,1,f\n"], _good(b"f"), half_close=True),
    _Case("end of input at once", [], NO_ANSWER, half_close=True),
    _Case("in two packets", [b"0,1,", b"f\n"], _good(b"f")),
    _Case("two lines at once", [b"0,1,f\n0,1,g\n"], re.compile(_good(b"f").pattern + rb"\Z")),
    _Case("another status", [b"7,1,f\n"], _good(b"f", b"7")),
    _Case("HTTP, bad input", [b"GET /x,y,z HTTP/1.1\r\nHost: x\r\n\r\n"], re.compile(rb"HTTP/1\.1 400 (?s:.*)")),
    _Case("HTTP, negative ms", [b"GET /200,-1,f HTTP/1.1\r\nHost: x\r\n\r\n"], re.compile(rb"HTTP/1\.1 400 (?s:.*)")),
    _Case("HTTP, four fields", [b"GET /200,1,f,g HTTP/1.0\r\n\r\n"], re.compile(rb"HTTP/1\.[01] 400 (?s:.*)")),
]


def ask_bad_input(row: Row, late: bool, progress: Callable[[str], None]) -> BadInput:
    """Put all cases to a server; after one that kills it, it is started again.

    Args:
        row: Whose server.
        late: Whether to ask what takes seconds to ask, too.
        progress: Told the name of each case.
    """
    wrong: dict[str, str] = {}
    fatal: list[str] = []
    asked = 0
    peer = Peer(row)
    try:
        for name, trial in _trials(late):
            progress(name)
            asked += 1
            if (reply := trial(peer)) is not None:
                wrong[name] = reply
            if not peer.alive() or not peer.answers():
                fatal.append(name)
                peer.stop()
                peer = Peer(row)
    finally:
        peer.stop()
    return BadInput(asked=asked, wrong=wrong, fatal=fatal)


def _trials(late: bool) -> Iterator[tuple[str, Callable[[Peer], str | None]]]:
    """Each returns what was wrong with the reply, if something was."""
    for case in CASES:
        yield case.name, lambda peer, case=case: _ask(peer, case)  # type: ignore[misc]
    for count in (50, 300):
        yield f"{count} idle connections", lambda peer, count=count: _beside_idle(peer, count)  # type: ignore[misc]
    yield "client ends while it is read for (FIN)", lambda peer: _leave(peer, reset=False)
    yield "client ends while it is read for (RST)", lambda peer: _leave(peer, reset=True)
    if late:
        yield "line sent 4.5 s late", _late


def _ask(peer: Peer, case: _Case) -> str | None:
    received = b""
    try:
        with socket.create_connection(("127.0.0.1", peer.port), PATIENCE) as sock:
            with contextlib.suppress(ConnectionError):  # a server may hang up in the middle of a megabyte
                for number, data in enumerate(case.send):
                    if number:
                        time.sleep(0.1)
                    sock.sendall(data)
                if case.half_close:
                    sock.shutdown(socket.SHUT_WR)
            wants_http = case.send[:1] and case.send[0].startswith(b"GET ")
            while (b"\r\n\r\n" if wants_http else b"\n") not in received:
                piece = sock.recv(65536)
                if not piece:
                    break
                received += piece
    except OSError as error:
        return str(error) or type(error).__name__
    if case.reply.fullmatch(received):
        return None
    return repr(received[:60])[1:] if received else "closed without a reply"


def _beside_idle(peer: Peer, count: int) -> str | None:
    with contextlib.ExitStack() as stack:
        try:
            for _ in range(count):
                stack.enter_context(socket.create_connection(("127.0.0.1", peer.port), PATIENCE))
            peer.ask(b"0,10,f\n", PATIENCE)
        except OSError as error:
            return f"a good request beside them: {error}"
    return None


def _leave(peer: Peer, *, reset: bool) -> str | None:
    for _ in range(20):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", peer.port), PATIENCE) as sock:
            if reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.sendall(b"0,100,f\n")
    time.sleep(0.3)
    return None


def _late(peer: Peer) -> str | None:
    try:
        with socket.create_connection(("127.0.0.1", peer.port), PATIENCE) as sock:
            time.sleep(4.5)
            sock.sendall(b"0,1,f\n")
            received = sock.recv(65536)
    except OSError as error:
        return str(error)
    # The wait of the request begins with its connection; a server that lets it begin with the line is not wrong.
    return None if re.fullmatch(rb"[01],\d+,f\r?\n", received) else repr(received[:60])[1:]
