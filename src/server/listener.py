"""One port for all protocols: accept, look at the first line, hand over; limits on clients; drain."""

from __future__ import annotations

import contextlib
import email.errors
import io
import logging
import os
import re
import socket as native_socket
import sys
import time
from collections import Counter
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

import gevent
from gevent import socket, ssl
from gevent.pool import Pool
from gevent.pywsgi import WSGIHandler, WSGIServer

from diskread import DiskError
from diskread.errors import printable

from . import head
from .config import ConfigError
from .direct import Direct
from .line import LONGEST_LINE, answer
from .logs import REQUEST_ID, request_id
from .simulate import Failed, Simulation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from diskread import Disks

    from .config import ServerConfig
    from .logs import AccessLog

    Address = tuple[str, int] | Any

LONGEST_HEAD = 64 * 1024
"""Bytes of request line and headers together."""

LINGER = 2.0
"""Seconds in which what a client still sends after our reply is thrown away, lest a reset destroys the reply."""

UNSENT = 64 * 1024
"""Bytes that the kernel may hold of a response that it has not sent yet."""

AT_ONCE = 64 * 1024
"""Bytes of a body that are worth copying to send them with the head, in one system call and one segment."""

IN_A_ROW = 100
"""Requests of one connection that are answered directly before others have their turn, should it never have to wait."""

BACKLOG = 65_535  # the kernel caps it at net.core.somaxconn: listen(2)

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_HTTP = re.compile(_TOKEN + rb" \S+ HTTP/1\.[0-9]\r?\n?\Z")
_HTTP_BEGINNING = re.compile(rb"[A-Z]+ (/|https?://)")  # of a line that is too long for the line protocol

_NOT_ASCII = re.compile(r"[^\x20-\x7e\r\n]")
_ABSOLUTE = re.compile(r"https?://[^/?]*", re.IGNORECASE)
_MALFORMED = (
    email.errors.MissingHeaderBodySeparatorDefect,
    email.errors.FirstHeaderLineIsContinuationDefect,
    email.errors.InvalidHeaderDefect,
    email.errors.MisplacedEnvelopeHeaderDefect,
)

_REPLY_400 = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
_REPLY_408 = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
_REPLY_431 = b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

_REPLY_503 = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

_log = logging.getLogger("diskread.server")


class HeadTooLarge(ValueError):
    """A client sent more request line and headers than the server takes."""


class Connection(io.RawIOBase):
    """The bytes of a client as a raw stream: what the listener has read already, then the socket.

    Attributes:
        sock: The socket.
        budget: Bytes that the client may still send in the head of its request; None outside of a head.
    """

    def __init__(self, sock: socket.socket) -> None:
        """Wrap a socket."""
        super().__init__()
        self.sock = sock
        self.budget: int | None = None
        self._ahead = b""

    def readable(self) -> bool:
        """It is."""
        return True

    @property
    def ahead(self) -> bool:
        """Whether there is something that was read already."""
        return bool(self._ahead)

    def push_back(self, data: bytes) -> None:
        """Have the next reads return `data` first."""
        self._ahead = data + self._ahead

    def readinto(self, buffer: Any, /) -> int:
        """Read what is there; blocks the greenlet until something is, as long as the socket's time-out allows."""
        if self._ahead:
            count = min(len(buffer), len(self._ahead))
            buffer[:count], self._ahead = self._ahead[:count], self._ahead[count:]
        else:
            count = self.sock.recv_into(buffer)
            if not count and self.budget is not None:
                raise ConnectionAbortedError("the input ends within the head of a request")
        if self.budget is not None:
            self.budget -= count
            if self.budget < 0:
                raise HeadTooLarge(f"more than {LONGEST_HEAD} bytes of request line and headers")
        return count


class Handler(WSGIHandler):
    """HTTP on one connection: pywsgi's handler with limits on what and how slowly a client may send."""

    server: Server

    request_id: str | None = None
    """Of the present request, where it is logged or its client has asked for one."""

    def __init__(self, sock: socket.socket, address: Address, server: Server, connection: Connection) -> None:
        """Take over a connection of which the first bytes may have been read."""
        super().__init__(sock, address, server)  # type: ignore[arg-type]  # a tuple for TCP
        self.rfile.close()
        self.rfile = io.BufferedReader(connection, 8192)
        self.connection = connection
        self.received = time.monotonic()
        self.failed: Failed | None = None
        self._awaiting = True
        self._answered = 0
        self._head_timer: gevent.Timeout | None = None

    def read_requestline(self) -> str:
        """Wait for a request as long as an idle connection may last, then for its line as long as a head may take."""
        self._head_timer = None
        received = self._await_request()
        if not received:
            return ""
        self.connection.budget = LONGEST_HEAD
        if head.END not in received and head.END not in self.rfile.peek(1):
            self._head_timer = gevent.Timeout.start_new(self.server.request_timeout)
        line: str = super().read_requestline()
        # pywsgi splits and strips this as text, where 0x85 and 0xA0, which are bytes of UTF-8, are white space.
        return _NOT_ASCII.sub(lambda each: f"%{ord(each[0]):02X}", line)

    def _await_request(self) -> bytes:
        """What there is of the next request, once there is something. It has not been read yet."""
        self.connection.budget = None
        if self._awaiting:
            if not self.connection.ahead and self.server.draining:
                return b""  # as at the end of the input: who has his answer is not owed another one
            with self.server.idle(self.socket):
                self.rfile.peek(1)
            self.received = time.monotonic()
            self._awaiting = False
        return self.rfile.peek(1)

    def _answer_directly(self) -> bool:
        """Answer the next request, if there is a short way to do it."""
        self._awaiting = True
        data = self._await_request()
        if not data or self.server.direct is None or self.server.access_log is not None:
            return False
        try:
            found = self.server.direct.answer(data, lambda: self.server.draining)
        except Failed as error:
            self.failed = error
            return False
        if found is None:
            return False
        response, length = found
        self.rfile.read(length)
        self._sendall(response)
        self._answered += 1
        if not self._answered % IN_A_ROW:
            gevent.sleep(0)
        return True

    def handle_one_request(self) -> Any:
        """Serve one request; hang up on a client that cannot finish its head in time or in size."""
        # pywsgi would log a request that is none with what it knows of the last one.
        self.requestline, self._orig_status, self.response_length, self._unread = "", None, 0, False
        self.request_id = None
        if self._answer_directly():
            return None if self.server.draining else True
        try:
            result = super().handle_one_request()
        except gevent.Timeout as timeout:
            if timeout is not self._head_timer:
                raise
            result = "408", _REPLY_408
        finally:
            self._stop_head_timer()
        if isinstance(result, tuple):
            self.status, reply = result
            self._unread = True
            if self.server.access_log is not None:
                self.request_id = self.request_id or request_id()
                reply = reply[:-2] + f"{REQUEST_ID}: {self.request_id}\r\n\r\n".encode("ascii")
            self.socket.sendall(reply)
            self.response_length = len(reply)
            self.log_request()
            result = None
        if result is None and self._unread:
            _linger(self.socket)
        return result

    def _handle_client_error(self, ex: Exception) -> tuple[str, bytes]:
        # A client's mistake is worth no line in the log of a server that is open to all.
        # HTTPException: more than 100 headers; the status of headers: a line of them is longer than 64 KiB.
        if isinstance(ex, (HeadTooLarge, HTTPException)) or self.headers.status:
            return "431", _REPLY_431
        if isinstance(ex, (ValueError, OSError)):
            return "400", _REPLY_400
        reply: tuple[str, bytes] = super()._handle_client_error(ex)  # type: ignore[misc]
        return reply

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.close()

    def MessageClass(self, *_: object) -> Any:  # noqa: N802 - pywsgi's name for what reads the headers
        """Read the headers, quickly if they are plain."""
        found = head.plain(self.rfile.peek(1))
        if found is None:
            return super().MessageClass(self.rfile, 0)  # type: ignore[call-arg]  # it takes anything
        headers, length = found
        self.rfile.read(length)
        return headers

    def read_request(self, raw_requestline: str) -> Any:
        """Read the headers. A request body is never read: no resource takes one, so the connection ends after it."""
        try:
            result = super().read_request(raw_requestline)
        finally:
            self._stop_head_timer()
            self.connection.budget = None
        self._check_headers()
        wanted = self.headers.get(REQUEST_ID)
        if wanted is not None or self.server.access_log is not None:
            self.request_id = request_id(wanted)
        if self.content_length or self.headers.get("transfer-encoding"):
            self.close_connection = self._unread = True
            self.content_length = 0
            for name in ("content-length", "transfer-encoding", "expect"):
                del self.headers[name]
        assert self.path is not None
        absolute = _ABSOLUTE.match(self.path)
        if absolute:  # RFC 9112, 3.2.2
            self.path = "/" + self.path[absolute.end() :].removeprefix("/")
        return result

    def _check_headers(self) -> None:
        """Refuse what this server and a proxy in front of it could understand differently (RFC 9112, 11.2)."""
        if any(isinstance(defect, _MALFORMED) for defect in self.headers.defects) or self.headers.get_payload():
            raise ValueError("a line of the headers is none")
        if len(set(self.headers.get_all("content-length", ()))) > 1:
            raise ValueError("two lengths")

    def _sendall(self, data: bytes) -> None:
        """Send all of it; the socket's time-out is for a client that takes nothing, not for a slow one."""
        sent = self.socket.send(data)
        self.response_length += sent
        if sent < len(data):
            view = memoryview(data)[sent:]
            while view:
                sent = self.socket.send(view)
                self.response_length += sent
                view = view[sent:]

    def finalize_headers(self) -> None:
        """Add what the application leaves to the server. The date is formatted once in a second."""
        if self.provided_date is None:
            date = head.date()
            self.provided_date = date.decode("ascii")
            self._encoded_headers().append((b"Date", date))
        super().finalize_headers()

    def _write_with_headers(self, data: bytes) -> None:
        """Send the head, and with it what there is of the body, if that is not much."""
        self.headers_sent = True
        self.finalize_headers()
        status: Any = self.status  # bytes by now
        fields = [b"%b: %b\r\n" % each for each in self._encoded_headers()]
        start = b"HTTP/1.1 %b\r\n%b\r\n" % (status, b"".join(fields))
        if len(data) <= AT_ONCE and not self.response_use_chunked:
            self._sendall(start + data)
        else:
            self._sendall(start)
            super()._write(data)  # type: ignore[misc]

    def _encoded_headers(self) -> list[tuple[bytes, bytes]]:
        headers: Any = self.response_headers  # start_response of pywsgi has made bytes of them
        return headers  # type: ignore[no-any-return]

    def _headers(self) -> Iterator[tuple[str, str]]:
        headers: Any = self.headers
        if isinstance(headers, head.Headers):
            return headers.environ()
        return super()._headers()  # type: ignore[misc, no-any-return]

    def get_environ(self) -> dict[str, Any]:
        """Tell the application since when the request has been waiting."""
        environ: dict[str, Any] = super().get_environ()
        environ["diskread.received"] = self.received
        if self.failed is not None:
            environ["diskread.failed"], self.failed = self.failed, None
        if self.request_id is not None:
            environ["diskread.request_id"] = self.request_id
        return environ

    def start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        """Say so when this is the connection's last response."""
        if self.server.draining:
            self.close_connection = True
        if self.close_connection and self.request_version == "HTTP/1.1":
            headers = [*headers, ("Connection", "close")]
        if self.request_id is not None:
            headers = [*headers, (REQUEST_ID, self.request_id)]
        return super().start_response(status, headers, exc_info)

    def handle_error(self, t: type[BaseException] | None, v: BaseException | None, tb: TracebackType | None) -> None:
        """A body that fails midway: end the connection, so that no client takes what it got for the whole."""
        if isinstance(v, DiskError):
            path = printable((self.path or "").encode("latin-1"))
            _log.error("the body of %s broke off: %s", path, v, extra={"request_id": self.request_id})
        elif not isinstance(v, TimeoutError):  # of the socket: the client does not take what it asked for
            super().handle_error(t, v, tb)
        self.close_connection = True

    def log_request(self) -> None:
        """Write the access log; where there is none, do not even look at what would be in it."""
        if self.server.access_log is None:
            return
        status = (self._orig_status or self.status or "000").split()[0]
        request, identifier = self.requestline or "", self.request_id or request_id()
        self.server.log_request(self.client_address, request, status, self.response_length, self.received, identifier)


class _Idle:
    """Marks a socket as one that waits for a request, so that it may be closed: after the idle time-out, or by a drain.

    One timer looks after all of them: one for each wait would cost more than many a request.
    """

    __slots__ = ("_sock", "_sockets", "_timeout")

    def __init__(self, sockets: dict[socket.socket, float], sock: socket.socket) -> None:
        self._sockets = sockets
        self._sock = sock
        self._timeout = sock.gettimeout()

    def __enter__(self) -> None:
        self._sockets[self._sock] = time.monotonic()
        self._sock.settimeout(None)

    def __exit__(self, *_: object) -> None:
        del self._sockets[self._sock]
        self._sock.settimeout(self._timeout)


class Server(WSGIServer):
    """The server: line protocol and HTTP on one port."""

    handler_class = Handler

    def __init__(
        self,
        config: ServerConfig,
        app: Callable[..., Any],
        disks: Disks,
        access_log: AccessLog | None = None,
        listener: socket.socket | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Prepare; `start` binds the port and begins to accept.

        Args:
            config: Address and limits.
            app: The WSGI application.
            disks: What it serves: for what is answered without the application.
            access_log: What gets a line per request; None for none.
            listener: The socket to accept on, bound and listening already; None to make one.
            tls: What `tls_context` has made; None to serve in the clear.
        """
        self.idle_timeout = config.idle_timeout
        self.request_timeout = config.request_timeout
        self.draining = False
        self.access_log = access_log
        # Where there are tokens the application asks for them, and nothing is answered without it.
        simulation = Simulation(disks, stalls=config.stalls) if config.tokens is None else None
        self._simulation = simulation
        self.direct = None if simulation is None else Direct({**disks, **disks.mirrors}, simulation)
        self._idle: dict[socket.socket, float] = {}  # since when, in that order
        self._hang_up: Any = None  # gevent's watchers have no types
        self._connections = Pool(config.connections)
        self._per_client = config.connections_per_client
        self._clients: Counter[Any] = Counter()  # connections by address
        tls_arguments: dict[str, Any] = {} if tls is None else {"ssl_context": tls, "do_handshake_on_connect": False}
        super().__init__(
            (config.host, config.port) if listener is None else listener,
            app,
            backlog=BACKLOG if listener is None else None,
            spawn=self._connections,
            log=None,  # ours has more to tell
            error_log=sys.stderr,
            environ={"SERVER_NAME": config.host},  # saves pywsgi a look-up of our own name in the DNS
            **tls_arguments,
        )

    def init_socket(self) -> None:
        """Bind the port, and set what all connections inherit from the listening socket (tcp(7))."""
        super().init_socket()
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Without it, a slow client's full send buffer (4 MB) would have to drain by a third before a send goes on.
        self.socket.setsockopt(socket.IPPROTO_TCP, native_socket.TCP_NOTSENT_LOWAT, UNSENT)
        if self._hang_up is None:
            interval = min(1.0, self.idle_timeout / 10)
            self._hang_up = self.loop.timer(interval, interval, ref=False)
            self._hang_up.start(self._hang_up_on_idle)

    def _hang_up_on_idle(self) -> None:
        latest = time.monotonic() - self.idle_timeout
        for sock, since in list(self._idle.items()):
            if since > latest:
                break
            _end_input(sock)

    def idle(self, sock: socket.socket) -> _Idle:
        """A context in which the socket may be closed, because its client is not owed an answer."""
        return _Idle(self._idle, sock)

    def handle(self, sock: socket.socket, address: Address) -> None:
        """Serve one connection, in a greenlet of its own."""
        with self._one_more(address) as welcome:
            if welcome:
                self._serve(sock, address)
                return
            accepted = time.monotonic()
            with contextlib.suppress(OSError):
                sock.settimeout(LINGER)
                sock.sendall(_REPLY_503)
                if self.access_log is not None:
                    self.log_request(address, "", "503", len(_REPLY_503), accepted, request_id())
                _linger(sock)

    def wrap_socket_and_handle(self, client_socket: socket.socket, address: Address) -> None:
        """Serve one connection with TLS. The handshake may take as long as the head of a request."""
        with self._one_more(address) as welcome:
            if not welcome:
                return  # to say why would need the handshake
            wrap: Any = self.wrap_socket  # type: ignore[misc]  # the context's own, an attribute of this object
            with contextlib.closing(wrap(client_socket, **(self.ssl_args or {}))) as sock:
                try:
                    with self.idle(sock), gevent.Timeout(self.request_timeout):
                        sock.do_handshake()
                except (OSError, ValueError, gevent.Timeout):
                    return  # no client of ours; ValueError: it has gone already
                self._serve(sock, address)

    @contextlib.contextmanager
    def _one_more(self, address: Address) -> Iterator[bool]:
        """While this is entered, a client has one connection more; whether it may."""
        client = address[0] if isinstance(address, tuple) else None
        if not self._per_client or client is None:
            yield True
            return
        self._clients[client] += 1
        try:
            yield self._clients[client] <= self._per_client
        finally:
            self._clients[client] -= 1
            if not self._clients[client]:
                del self._clients[client]

    def _serve(self, sock: socket.socket, address: Address) -> None:
        accepted = time.monotonic()
        try:
            # Accepted just before a drain began: served if its request is here already.
            sock.settimeout(0.1 if self.draining else self.idle_timeout)
            line, rest = self._first_line(sock)
            if not line:
                return
            if _HTTP.match(line) or (len(line) > LONGEST_LINE and _HTTP_BEGINNING.match(line)):
                connection = Connection(sock)
                connection.push_back(line + rest)
                self.handler_class(sock, address, self, connection).handle()
                return
            reply = answer(line, self._simulation, accepted)
            sock.sendall(reply)
            if self.access_log is not None:
                text, status = os.fsdecode(line[:LONGEST_LINE].rstrip()), reply.partition(b",")[0].decode("ascii")
                self.log_request(address, text, status, len(reply), accepted, request_id())
            if rest or not line.endswith(b"\n"):
                _linger(sock)
        except (OSError, gevent.Timeout):
            pass  # the client went away, or was too slow: nobody is left to be told

    def _first_line(self, sock: socket.socket) -> tuple[bytes, bytes]:
        """The first line, and what came after it. The line has no end when the input ended or it is too long."""
        if self.draining:
            data: bytes = sock.recv(8192)
        else:
            with self.idle(sock):
                data = sock.recv(8192)
        received, newline, rest = data.partition(b"\n")
        if newline or not data:
            return received + newline, rest
        with gevent.Timeout(self.request_timeout):
            while len(data) <= LONGEST_LINE:
                more: bytes = sock.recv(8192)
                if not more:
                    break
                data += more
                if b"\n" in more:
                    break
        received, newline, rest = data.partition(b"\n")
        return received + newline, rest

    def log_request(
        self, address: Address, request: str, status: str, length: int, since: float, identifier: str
    ) -> None:
        """Write a line of the access log, which there is. `since` is the time at which the request began."""
        assert self.access_log is not None
        client = address[0] if isinstance(address, tuple) else "-"
        seconds = time.monotonic() - since
        with contextlib.suppress(OSError):  # a full disk is no reason not to serve the others
            self.access_log.write(client, request, status, length, seconds, identifier)

    def drain(self, timeout: float) -> bool:
        """Stop accepting and free the port now, hang up on idle clients, and let the others finish.

        Blocks the greenlet until they have, or the time is over.

        Args:
            timeout: Seconds that requests under way may take.

        Returns:
            Whether all of them finished.
        """
        self.draining = True
        self.close()
        for sock in list(self._idle):
            _end_input(sock)
        return self._connections.join(timeout)


def _end_input(sock: socket.socket) -> None:
    """Wake the greenlet that reads from a socket with an end of input; closing it under the greenlet would raise."""
    with contextlib.suppress(OSError):
        # With TLS as well it is TCP that ends: gevent's SSLSocket would be pulled out from under its reader.
        socket.socket.shutdown(sock, native_socket.SHUT_RDWR)


def _linger(sock: socket.socket) -> None:
    """End our side; then throw away what the client still sends, for a bounded time.

    Closing a socket with unread input sends a reset, which can destroy the reply on its way (RFC 9112, 9.6).
    """
    sock.shutdown(native_socket.SHUT_WR)
    sock.settimeout(LINGER)
    with gevent.Timeout(LINGER, False):  # type: ignore[arg-type]
        while sock.recv(65536):
            pass


def tls_context(certificate: str, key: str) -> ssl.SSLContext:
    """What a server needs for TLS. Reads both files: blocks.

    Args:
        certificate: File of the certificate and those between it and the root, PEM.
        key: File of its private key, PEM.

    Raises:
        ConfigError: One of them cannot be read, or they do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
    except OSError as error:
        raise ConfigError(f"tls_certificate {certificate}, tls_key {key}: {error}") from error
    return context
