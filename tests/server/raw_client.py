"""A server in a process of its own, and clients that say exactly what a test wants them to say."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from server.status import DiskDocument, StatusDocument

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

PATIENCE = 30.0
"""Seconds after which a test fails that waits for something which takes well under a second on an idle machine."""

READY = re.compile(r"(?:listens on|Listening at:) https?://\S*:(\d+)")

LINE_REPLY = re.compile(rb"[+-]?\d+,\d+,[^,\n]*\n\Z")


def until(condition: Callable[[], object], what: str = "the condition", seconds: float = PATIENCE) -> None:
    """Wait for a condition without gevent; fail when it takes longer than any machine needs."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, f"waited {seconds} s for {what}"
        time.sleep(0.01)


@dataclass
class Response:
    """One HTTP response."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes


class Connection:
    """One connection of a client that may misbehave."""

    def __init__(self, port: int, *, receive_buffer: int | None = None, host: str = "127.0.0.1") -> None:
        """Connect; with a small receive buffer for a client that takes its time."""
        self.sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.sock.settimeout(PATIENCE)
        if receive_buffer is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            # Small segments keep the server's send buffer on loopback small, too.
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        self.sock.connect((host, port))
        self.reader = self.sock.makefile("rb")

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.reader.close()
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def send_as_much_as_goes(self, data: bytes) -> None:
        """Send what the server takes before it hangs up."""
        with contextlib.suppress(ConnectionError):
            self.sock.sendall(data)

    def half_close(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Hang up with a reset instead of a FIN."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def rest(self) -> bytes:
        """What comes until the server hangs up. A reset is an error: it can destroy a reply on its way."""
        return self.reader.read()

    def response(self, method: str = "GET") -> Response:
        """Read one response, strictly: CRLF line ends, a Content-Length, all of the body."""
        status, headers, length = self.head(method)
        body = self.reader.read(length)
        assert len(body) == length, f"{len(body)} of {length} bytes came"
        return Response(status, headers, body)

    def head(self, method: str = "GET") -> tuple[int, http.client.HTTPMessage, int]:
        """Read status and headers of one response; the number is the length of its body."""
        line = self.reader.readline()
        found = re.match(rb"HTTP/1\.1 (\d{3}) [ -~]+\r\n\Z", line)
        assert found, f"no status line: {line!r}"
        status = int(found[1])
        raw = b""
        while (header := self.reader.readline()) != b"\r\n":
            assert re.match(rb"[!-9;-~]+: [^\r\n]*\r\n\Z", header), f"no header: {header!r}"
            raw += header
        headers = http.client.parse_headers(_Lines(raw))
        bodiless = method == "HEAD" or status in (204, 304)
        assert bodiless or "content-length" in headers, f"neither a length nor chunks: {raw!r}"
        return status, headers, 0 if bodiless else int(headers["content-length"])


class _Lines:
    """What `http.client.parse_headers` wants to read."""

    def __init__(self, raw: bytes) -> None:
        self._lines = iter([*raw.splitlines(keepends=True), b"\r\n"])

    def readline(self, _limit: int = -1) -> bytes:
        return next(self._lines, b"")


def http_request(
    target: str | bytes,
    headers: Mapping[str, str] | Iterable[tuple[str, str]] = (),
    *,
    method: str = "GET",
    version: str = "1.1",
    close: bool = True,
) -> bytes:
    """The bytes of a request. The target goes out as it is."""
    fields = [("Host", "localhost"), *([("Connection", "close")] if close else [])]
    fields += list(headers.items() if hasattr(headers, "items") else headers)
    target = target.encode() if isinstance(target, str) else target
    head = b"".join(f"{name}: {value}\r\n".encode("latin-1") for name, value in fields)
    return method.encode() + b" " + target + b" HTTP/" + version.encode() + b"\r\n" + head + b"\r\n"


class ServerProcess:
    """`diskread serve` in a process of its own, on a port that the kernel chose."""

    def __init__(self, directory: Path, *options: str, port: int = 0, **popen: Any) -> None:
        """Start it and wait until it listens."""
        self._stderr = directory / f"stderr-{time.monotonic_ns()}"
        command = [sys.executable, "-m", "server", "serve", "--port", str(port), *options]
        with self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=stderr, **popen)
        try:
            until(lambda: READY.search(self.said()) or self.process.poll() is not None, "the server to listen")
            found = READY.search(self.said())
            assert found, self.said()
        except BaseException:
            self.kill()
            raise
        self.port = int(found[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def said(self) -> str:
        """What it has written to standard error so far."""
        return self._stderr.read_text("utf-8", "backslashreplace")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stop it; returns its exit status."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        return self.process.wait(PATIENCE)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdout, self.process.stdin):
            if stream is not None:
                stream.close()

    def connect(self, *, receive_buffer: int | None = None) -> Connection:
        return Connection(self.port, receive_buffer=receive_buffer)

    def line(self, data: bytes, *, half_close: bool = False) -> bytes:
        """Send bytes, return everything that comes back until the server hangs up."""
        with self.connect() as connection:
            connection.send(data)
            if half_close:
                connection.half_close()
            return connection.rest()

    def http(
        self,
        target: str | bytes,
        headers: Mapping[str, str] | Iterable[tuple[str, str]] = (),
        *,
        method: str = "GET",
        version: str = "1.1",
    ) -> Response:
        """Send one request on a connection of its own, which the server has to close after its response."""
        with self.connect() as connection:
            connection.send(http_request(target, headers, method=method, version=version))
            response = connection.response(method)
            assert connection.rest() == b""
            return response

    def status(self) -> StatusDocument:
        """What its /status says."""
        return msgspec.json.decode(self.http("/status").body, type=StatusDocument)

    def disk(self, name: str) -> DiskDocument:
        """What its /status says of one disk."""
        return next(disk for disk in self.status().disks if disk.name == name)

    def wait_for_first_answer(self, name: str) -> None:
        """Wait until the first probe of a disk is over: it takes a slot for a moment."""
        until(lambda: self.disk(name).state == "online" and not self.disk(name).in_flight, f"the answer of {name}")

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def _links(self) -> Iterator[str]:
        """What its descriptors lead to."""
        for name in os.listdir(f"/proc/{self.process.pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                yield os.readlink(f"/proc/{self.process.pid}/fd/{name}")

    def sockets(self) -> int:
        """Its open sockets; one of them listens."""
        return sum(link.startswith("socket:") for link in self._links())

    def open_files(self, path: Path) -> int:
        """How many times it has a file open."""
        return sum(link == str(path) for link in self._links())

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def memory(self, what: str = "VmRSS") -> int:
        """Resident memory in bytes; VmHWM is its peak so far."""
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as status:
            for line in status:
                if line.startswith(f"{what}:"):
                    return int(line.split()[1]) * 1024
        raise AssertionError(what)


@contextlib.contextmanager
def holding(server: ServerProcess, request: bytes) -> Iterator[Connection]:
    """A request under way: sent, not answered yet."""
    with server.connect() as connection:
        connection.send(request)
        yield connection
