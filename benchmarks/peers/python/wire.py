"""What the Python rows share: the two generations of the wire, and the blocking read itself. How a row schedules that
read is the only thing in which they differ, and the only thing in their own files."""

from __future__ import annotations

import argparse
import os
import re
import resource
import signal
import socket
import time
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

LONGEST_LINE = 4096
LONGEST_HEAD = 65536
LONGEST_MS = 3_600_000
LONGEST_WAIT = 4.0
IDLE_TIMEOUT = 60.0
BLOCK = 65536

QUEUE_TIMEOUT, BAD_INPUT, NO_FILE, IO_ERROR = b"1", b"2", b"5", b"6"
REASONS = {200: b"OK", 400: b"Bad Request", 404: b"Not Found", 408: b"Request Timeout", 500: b"Internal Server Error"}

_INTEGER = re.compile(rb"[ \t]*([+-]?[0-9]{1,18})[ \t]*")
_REQUEST_LINE = re.compile(rb"([A-Z]+) (\S+) HTTP/1\.([01])")
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")


class Request(NamedTuple):
    """One `RC,MS,PATH`."""

    status: bytes
    seconds: float
    path: bytes


class Head(NamedTuple):
    """What matters of an HTTP request's head."""

    target: bytes
    keep_alive: bool


def parse(text: bytes) -> Request | None:
    """`RC,MS,PATH` without its line end; None when it is bad input."""
    fields = text.split(b",")
    if len(fields) != 3 or not fields[2]:
        return None
    status, milliseconds = _INTEGER.fullmatch(fields[0]), _INTEGER.fullmatch(fields[1])
    if status is None or milliseconds is None or not 0 <= int(milliseconds[1]) <= LONGEST_MS:
        return None
    return Request(status[1], int(milliseconds[1]) / 1000, fields[2])


def parse_target(target: bytes) -> Request | None:
    """The same of an HTTP target, `/RC,MS,PATH` percent-encoded."""
    if not target.startswith(b"/"):
        return None
    return parse(_ESCAPE.sub(lambda escape: bytes([int(escape[1], 16)]), target[1:]))


def is_http(line: bytes) -> bool:
    """Whether a first line is an HTTP request line."""
    return _REQUEST_LINE.fullmatch(line.rstrip(b"\r\n")) is not None


def parse_head(head: bytes) -> Head | None:
    """Request line and headers; None when the method is not GET or the line is none."""
    line, _, headers = head.partition(b"\r\n")
    match = _REQUEST_LINE.fullmatch(line.rstrip(b"\n"))
    if match is None or match[1] != b"GET":
        return None
    connection = b""
    for header in headers.lower().split(b"\n"):
        if header.startswith(b"connection:"):
            connection = header[11:].strip()
    return Head(match[2], connection == b"keep-alive" or (match[3] == b"1" and connection != b"close"))


def line_reply(request: Request | None, status: bytes, total: float) -> bytes:
    """The line that answers."""
    return b"%b,%d,%b\n" % (status, total * 1000, request.path if request else b"")


def http_reply(request: Request | None, status: bytes, total: float, keep_alive: bool) -> bytes:
    """The HTTP response that answers."""
    if request is not None and status == request.status:
        code, body = 200, b"%d,%b" % (total * 1000, request.path)
    else:
        code = {QUEUE_TIMEOUT: 408, BAD_INPUT: 400, NO_FILE: 404}.get(status, 500)
        body = REASONS[code]
    return b"HTTP/1.1 %d %b\r\nContent-Length: %d\r\nConnection: %b\r\n\r\n%b" % (
        code, REASONS[code], len(body), b"keep-alive" if keep_alive else b"close", body,
    )  # fmt: skip


class Reader:
    """The blocking read. Everything in it waits in the kernel, in whatever thread calls it."""

    def __init__(self, root: str | None) -> None:
        self._root = None if root is None else os.fsencode(root)

    def __call__(self, request: Request) -> bytes:
        """Sleep, then read the file to its end; the status that comes of it."""
        if request.seconds:
            time.sleep(request.seconds)
        if self._root is None:
            return request.status
        if request.path.startswith(b"/") or b".." in request.path.split(b"/"):
            return NO_FILE
        try:
            descriptor = os.open(os.path.join(self._root, request.path), os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError, PermissionError, IsADirectoryError, ValueError):
            return NO_FILE
        except OSError:
            return IO_ERROR
        try:
            offset = 0
            while data := os.pread(descriptor, BLOCK, offset):
                offset += len(data)
        except IsADirectoryError:
            return NO_FILE
        except OSError:
            return IO_ERROR
        finally:
            os.close(descriptor)
        return request.status


def timed(read: Callable[[Request], bytes], request: Request, since: float) -> tuple[bytes, float]:
    """Carry the request out where this is called, unless it has waited too long; status and seconds since then."""
    status = read(request) if time.monotonic() - since < LONGEST_WAIT else QUEUE_TIMEOUT
    return status, time.monotonic() - since


def converse(sock: Any, accepted: float, perform: Callable[[Request, float], tuple[bytes, float]]) -> None:
    """One connection, from its first byte to its end, on a socket whose calls wait for this client only.

    Args:
        sock: A socket of the standard library, of gevent or of eventlet.
        accepted: When it was accepted (`time.monotonic()`): its first request waits from then on.
        perform: Given a request and the time since which it waits; returns the status and the seconds that it took.
    """
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(IDLE_TIMEOUT)
        received = b""
        while b"\n" not in received and len(received) <= LONGEST_LINE:
            data = sock.recv(BLOCK)
            if not data:
                break
            received += data
        line = received.partition(b"\n")[0]
        if is_http(line):
            _converse_http(sock, received, accepted, perform)
        elif received:
            request = parse(line.removesuffix(b"\r")) if len(line) < LONGEST_LINE else None
            status, total = perform(request, accepted) if request is not None else (BAD_INPUT, 0.0)
            sock.sendall(line_reply(request, status, total))
            _drain(sock)
    except OSError:
        pass  # the client has gone, or says nothing
    finally:
        sock.close()


def _converse_http(
    sock: Any, received: bytes, since: float, perform: Callable[[Request, float], tuple[bytes, float]]
) -> None:
    while True:
        while b"\r\n\r\n" not in received and b"\n\n" not in received:
            data = sock.recv(BLOCK) if len(received) < LONGEST_HEAD else b""
            if not data:
                return
            received += data
        head, _, rest = received.partition(b"\r\n\r\n" if b"\r\n\r\n" in received else b"\n\n")
        parsed = parse_head(head)
        request = parse_target(parsed.target) if parsed is not None else None
        keep_alive = parsed is not None and parsed.keep_alive
        status, total = perform(request, since) if request is not None else (BAD_INPUT, 0.0)
        sock.sendall(http_reply(request, status, total, keep_alive))
        if not keep_alive:
            _drain(sock)
            return
        received = rest or sock.recv(BLOCK)
        since = time.monotonic()


def _drain(sock: Any) -> None:
    # To close with bytes unread would reset the connection, and the reset may overtake the reply.
    sock.shutdown(socket.SHUT_WR)
    sock.settimeout(1.0)
    for _ in range(64):
        if not sock.recv(BLOCK):
            break


def arguments() -> argparse.Namespace:
    """The command line of every row, and what every row does first."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--root")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # At once, whatever hangs: the interpreter would wait for its threads.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return parser.parse_args()


def backlog() -> int:
    """The longest that the system allows."""
    with open("/proc/sys/net/core/somaxconn") as file:
        return int(file.read())


def listen(port: int) -> socket.socket:
    """A listening socket of the standard library."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(backlog())
    return listener
