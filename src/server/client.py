"""A measuring client for the wire: one request, one reply, and the time that the client had to wait for it.

Two generations of the protocol are spoken. The line protocol sends one line ``RC,MS,PATH`` and reads one
line ``RC,TOTAL_MS,PATH``; the HTTP generation asks for ``GET /RC,MS,PATH`` and reads a body
``TOTAL_MS,PATH``. Every request has a new connection, a time limit, and a *scheduled* start: latency
counts from the moment at which the request should have been sent, so that a client which is late, or a
connection that is slow to be accepted, does not make the server look faster than it was.

The sockets are gevent's own; nothing is monkey-patched.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import re
import signal
import socket as stdlib_socket
import time
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from urllib.parse import quote_from_bytes

import gevent
import msgspec
from gevent import socket
from gevent.event import Event

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 7000

#: The longest simulated read that the protocol allows, in milliseconds (one hour).
MAX_MS = 3_600_000

#: The line protocol's status for input that it could not understand; the only reply that echoes no path.
BAD_INPUT = 2

#: What the line protocol's statuses mean, unless the status is the one that the request asked for.
LINE_STATUS = {
    1: "timed out in the queue",
    BAD_INPUT: "bad input",
    3: "the disk is busy or offline",
    4: "the read missed its deadline",
    5: "the file is not there or may not be read",
    6: "I/O error",
}

#: The longest reply that is read, in bytes. A path has at most 4,096, three times that when percent-encoded.
MAX_REPLY = 16_384

#: Why a connection fails because of the client's machine (connect(2), socket(2)).
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL}

Protocol = Literal["line", "http"]

_REQUEST = re.compile(rb"[ \t]*(-?\d{1,10})[ \t]*,[ \t]*(\d{1,10})[ \t]*,([^,\r\n]*)")
_LINE_REPLY = re.compile(rb"[ \t]*(-?\d{1,10})[ \t]*,[ \t]*(\d{1,18})[ \t]*,([^\r\n]*)")
_HTTP_REPLY = re.compile(rb"[ \t]*(\d{1,18})[ \t]*,([^\r\n]*)")
_ADDRESS = re.compile(r"(?:\[(?P<bracketed>[^\[\]]+)\]|(?P<host>[^:\[\]]*))(?::(?P<port>\d{1,5}))?")


class RequestError(Exception):
    """A request that brought no usable reply.

    Attributes:
        kind: The failure in a word or two, the same for all failures of one class.
        latency: Seconds from the scheduled start of the request until it failed.
        connected: Whether it had got as far as a connection.
    """

    kind: ClassVar[str] = "failed"
    latency = 0.0
    connected = False


class ConnectError(RequestError):
    """No connection could be made: refused, unreachable, or an unknown name."""

    kind = "no connection"


class ExhaustedError(RequestError):
    """This machine, not the server, is out of file descriptors, ports or memory for another connection."""

    kind = "out of resources"


class ClosedError(RequestError):
    """The server closed or reset the connection without a reply."""

    kind = "closed"


class MalformedReplyError(RequestError):
    """The reply is not one of this protocol, or it answers another request."""

    kind = "malformed"


class RequestTimeoutError(RequestError):
    """The time limit passed before the reply was complete."""

    kind = "timed out"


class Request(msgspec.Struct, frozen=True):
    """One request of the protocol.

    Attributes:
        rc: The status that the client wants back on success. HTTP servers ignore it.
        ms: Length of the simulated disk read, in milliseconds.
        path: The path, echoed in the reply: no comma and no line end.
    """

    rc: int
    ms: int
    path: bytes

    @classmethod
    def parse(cls, line: bytes) -> Request:
        """Read a request from ``RC,MS,PATH``, as it stands in a file of requests.

        Args:
            line: The line, with or without its line end.

        Returns:
            The request.

        Raises:
            ValueError: The line is not a request, or MS is longer than one hour.
        """
        match = _REQUEST.fullmatch(line.rstrip(b"\r\n"))
        if match is None:
            raise ValueError("expected RC,MS,PATH, for example 0,10,some_file")
        rc, ms, path = match.groups()
        if int(ms) > MAX_MS:
            raise ValueError(f"a simulated read takes at most {MAX_MS} ms (one hour), not {int(ms)}")
        return cls(int(rc), int(ms), path)

    def __str__(self) -> str:
        """The request as a line for people; bytes that are not UTF-8 are shown as escapes."""
        return f"{self.rc},{self.ms},{self.path.decode('utf-8', 'backslashreplace')}"


class Reply(msgspec.Struct, frozen=True):
    """What came back, and when.

    Attributes:
        status: First field of the line, or the HTTP status.
        total_ms: What the server says it took, in milliseconds; None in an HTTP reply other than 200.
        path: The echoed path; empty in such an HTTP reply and in the line protocol's reply to bad input.
        latency: Seconds from the scheduled start until the reply was complete, as the client saw it.
        connect: Seconds that it took to connect. One second and more means that the first SYN was dropped
            because the server's listen backlog was full: the kernel sends it again after 1 s, 3 s, 7 s.
    """

    status: int
    total_ms: int | None
    path: bytes
    latency: float
    connect: float

    def succeeded(self, request: Request, protocol: Protocol) -> bool:
        """Whether the read was done: the status is the one asked for (line protocol) or 200 (HTTP)."""
        return self.status == (200 if protocol == "http" else request.rc)


class Server(msgspec.Struct, frozen=True):
    """A server's address, looked up once so that no measured request pays for a name look-up.

    Attributes:
        host: The host as the user named it, without brackets.
        port: TCP port.
        addresses: Address family and socket address, in the order in which connections are tried.
        token: What to show it, in HTTP; None for nothing.
    """

    host: str
    port: int
    addresses: tuple[tuple[int, Any], ...]
    token: str | None = None

    def __str__(self) -> str:
        """``HOST:PORT``, IPv6 addresses in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> tuple[str, int]:
    """Read ``HOST:PORT``, ``HOST``, ``:PORT`` or ``[IPV6]:PORT``.

    Args:
        text: The address; host and port default to 127.0.0.1 and 7000.

    Returns:
        Host (without brackets) and port.

    Raises:
        ValueError: It is not an address; the message says what is expected.
    """
    match = _ADDRESS.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not HOST:PORT; an IPv6 address needs brackets, as in [::1]:7000")
    port = int(match["port"] or DEFAULT_PORT)
    if not 1 <= port <= 65535:
        raise ValueError(f"{port} is not a port: 1 to 65535")
    return match["bracketed"] or match["host"] or DEFAULT_HOST, port


def resolve(host: str, port: int, *, limit: float = 10.0, token: str | None = None) -> Server:
    """Look a server's address up.

    Args:
        host: Name or numeric address.
        port: TCP port.
        limit: Time limit in seconds.
        token: What to show the server, in HTTP; None for nothing.

    Returns:
        The server, for `send`.

    Raises:
        ConnectError: The name is not known.
        RequestTimeoutError: The look-up took longer than the limit.
    """
    timeout = RequestTimeoutError(f"looking up {host} took longer than {limit:g} s")
    try:
        with gevent.Timeout(limit, timeout):
            found = socket.getaddrinfo(host, port, type=stdlib_socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConnectError(f"cannot look up {host}: {_reason(error)}") from error
    return Server(host, port, tuple((int(family), address) for family, _, _, _, address in found), token)


def connect(server: Server) -> socket.socket:
    """Open a connection, trying the server's addresses in turn.

    The wait is bounded by whoever calls: put it under a ``gevent.Timeout``.

    Args:
        server: Whom to connect to.

    Returns:
        A connected gevent socket; the caller closes it.

    Raises:
        ConnectError: None of the addresses could be connected to.
        ExhaustedError: This machine has no file descriptor, port or memory left for it.
    """
    failure: OSError | None = None
    for family, address in server.addresses:
        connection = None
        try:
            connection = socket.socket(family, stdlib_socket.SOCK_STREAM)
            connection.connect(address)
        except OSError as error:
            failure = error
            if connection is not None:
                connection.close()
        except BaseException:
            if connection is not None:
                connection.close()
            raise
        else:
            return connection
    if failure is not None and failure.errno in _EXHAUSTED:
        raise ExhaustedError(
            f"{_reason(failure)}: this machine cannot open another connection. Use fewer at a time, or raise the "
            "limit of open files (ulimit -n)"
        ) from failure
    raise ConnectError(f"cannot connect to {server}: {_reason(failure)}") from failure


def send(
    server: Server, request: Request, *, protocol: Protocol, limit: float, scheduled: float | None = None
) -> Reply:
    """Send one request on a new connection and wait for its reply.

    Args:
        server: Whom to ask.
        request: What to ask for.
        protocol: ``"line"`` or ``"http"``.
        limit: Time limit in seconds, counted like the latency.
        scheduled: When the request should have been sent (``time.monotonic()``, seconds); now when None.

    Returns:
        The reply, whatever its status; `Reply.succeeded` judges it.

    Raises:
        ConnectError: No connection could be made.
        ExhaustedError: This machine could not open another connection.
        ClosedError: The server closed the connection without a reply.
        MalformedReplyError: The reply is not one of this protocol, or it echoes another path.
        RequestTimeoutError: The limit passed.
    """
    start = time.monotonic()
    if scheduled is None:
        scheduled = start
    connected: float | None = None
    exchange = _exchange_http if protocol == "http" else _exchange_line
    timeout = RequestTimeoutError(f"no reply from {server} within {limit:g} s")
    try:
        with (
            gevent.Timeout(max(0.0, scheduled + limit - start), timeout),
            contextlib.closing(connect(server)) as connection,
        ):
            connected = time.monotonic() - start
            status, total_ms, path = exchange(server, connection, request)
            latency = time.monotonic() - scheduled
    except RequestError as error:
        error.latency = time.monotonic() - scheduled
        error.connected = connected is not None
        raise
    return Reply(status, total_ms, path, latency, connected)


def send_line(server: Server, request: Request, *, limit: float, scheduled: float | None = None) -> Reply:
    """`send` with the line protocol."""
    return send(server, request, protocol="line", limit=limit, scheduled=scheduled)


def send_http(server: Server, request: Request, *, limit: float, scheduled: float | None = None) -> Reply:
    """`send` with HTTP."""
    return send(server, request, protocol="http", limit=limit, scheduled=scheduled)


@contextlib.contextmanager
def interruption() -> Iterator[Event]:
    """While it is entered, Ctrl-C (SIGINT) sets an event in place of raising `KeyboardInterrupt`.

    A `KeyboardInterrupt` is raised in whichever greenlet happens to run and gevent prints a traceback for it;
    with an event, a measurement ends in order and can still report what it has. For the main thread only.

    Yields:
        The event, to wait for beside the work.
    """
    event = Event()
    loop = gevent.get_hub().loop

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        # A signal handler runs between any two bytecodes: leave the setting of the event to the event loop.
        loop.run_callback_threadsafe(event.set)

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


def _exchange_line(server: Server, connection: socket.socket, request: Request) -> tuple[int, int, bytes]:
    """Send a line, read a line."""
    received = b""
    try:
        connection.sendall(b"%d,%d,%b\n" % (request.rc, request.ms, request.path))
        while b"\n" not in received and len(received) < MAX_REPLY:
            piece = connection.recv(MAX_REPLY)
            if not piece:
                break
            received += piece
    except OSError as error:
        raise _closed(server, error) from error
    if not received:
        raise _closed(server)
    match = _LINE_REPLY.fullmatch(received.partition(b"\n")[0].rstrip(b"\r"))
    if match is None:
        raise MalformedReplyError(f"{server} answered {_excerpt(received)}, not a line RC,TOTAL_MS,PATH")
    status, total_ms, path = int(match[1]), int(match[2]), match[3]
    if path != request.path and not (status == BAD_INPUT and not path):
        raise MalformedReplyError(f"{server} answered {_excerpt(received)}, the reply to another request")
    return status, total_ms, path


def _exchange_http(server: Server, connection: socket.socket, request: Request) -> tuple[int, int | None, bytes]:
    """Send a GET request, read the response."""
    encoded = quote_from_bytes(request.path, safe="/!$&'()*+;=:@~")
    conversation = http.client.HTTPConnection(server.host, server.port)
    # Given its socket, http.client makes none of its own, which would block the event loop.
    conversation.sock = connection
    headers = {"Connection": "close", **({} if server.token is None else {"Authorization": f"Bearer {server.token}"})}
    try:
        conversation.request("GET", f"/{request.rc},{request.ms},{encoded}", headers=headers)
        with conversation.getresponse() as response:
            status, body = response.status, response.read(MAX_REPLY)
    except http.client.RemoteDisconnected as error:
        raise _closed(server) from error
    except http.client.HTTPException as error:
        raise MalformedReplyError(f"{server} did not answer in HTTP: {_excerpt(str(error).encode())}") from error
    except OSError as error:
        raise _closed(server, error) from error
    if status != http.client.OK:
        return status, None, b""
    match = _HTTP_REPLY.fullmatch(body.rstrip(b"\r\n"))
    if match is None:
        raise MalformedReplyError(f"{server} answered 200 with {_excerpt(body)}, not TOTAL_MS,PATH")
    # Servers differ in whether they echo the path as it was written in the request or decoded.
    if match[2] not in (request.path, encoded.encode()):
        raise MalformedReplyError(f"{server} answered {_excerpt(body)}, the reply to another request")
    return status, int(match[1]), match[2]


def _closed(server: Server, error: OSError | None = None) -> ClosedError:
    why = f" ({_reason(error)})" if error else ""
    return ClosedError(f"{server} closed the connection without a reply{why}")


def _reason(error: BaseException | None) -> str:
    """Why a system call failed, without the errno that `str` of an OSError begins with."""
    return getattr(error, "strerror", None) or str(error)


def _excerpt(received: bytes) -> str:
    """The beginning of a reply, printable."""
    return ascii(received[:60].decode("latin-1")) + ("..." if len(received) > 60 else "")
