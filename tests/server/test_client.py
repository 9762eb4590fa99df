"""The measuring client against servers that behave and servers that do not."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket as stdlib_socket
import struct
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

import gevent
import msgspec
import pytest
from click.testing import CliRunner
from gevent.pool import Pool
from gevent.server import StreamServer
from hypothesis import given
from hypothesis import strategies as st

from server import client
from server.client import Request
from server.commands.request import request as request_command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from click.testing import Result as Invocation
    from gevent.socket import socket

    from server.client import Protocol

    Handler = Callable[[socket, Any], None]

FILE = Request(0, 10, b"some_file")

#: Longer than any reply in these tests takes on a loaded machine, in seconds.
PATIENCE = 20.0


# --- Small servers. Each handler serves one connection, in either protocol. ---


def read_line(connection: socket) -> bytes:
    received = b""
    while b"\n" not in received and (piece := connection.recv(4096)):
        received += piece
    return received.partition(b"\n")[0].rstrip(b"\r")


def reply_to(line: bytes, status: int | None = None) -> bytes:
    """The reply that the protocol asks for, once the read is done; with another status when one is given."""
    if line.startswith(b"GET /"):
        _, ms, path = unquote_to_bytes(line.split(b" ")[1][1:]).split(b",")
        body = b"%b,%b" % (ms, path)
        return b"HTTP/1.1 %d Text\r\nContent-Length: %d\r\n\r\n%b" % (status or 200, len(body), body)
    rc, ms, path = line.split(b",")
    return b"%d,%b,%b\n" % (int(rc) if status is None else status, ms, path)


def read_ms(line: bytes) -> int:
    return int(line.split(b",")[1])


def reader(sleep: Callable[[float], object]) -> Handler:
    """A handler that simulates reads with the given way to sleep."""

    def handle(connection: socket, _address: object) -> None:
        line = read_line(connection)
        if line:
            sleep(read_ms(line) / 1000)
            connection.sendall(reply_to(line))

    return handle


good = reader(gevent.sleep)
"""Greenlets that sleep cooperatively: no problem."""

blocked = reader(time.sleep)
"""Sleeps in the one thread that all greenlets share: the problem. Not for the process of the tests."""


def closing(connection: socket, _address: object) -> None:
    """Closes without a reply."""
    read_line(connection)


def resetting(connection: socket, _address: object) -> None:
    """Closes without a reply, with a reset."""
    read_line(connection)
    connection.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_LINGER, struct.pack("ii", 1, 0))


def silent(_connection: socket, _address: object) -> None:
    """Never answers."""
    gevent.sleep(PATIENCE)


def saying(*pieces: bytes) -> Handler:
    """A handler that answers the same to everybody, in pieces."""

    def handle(connection: socket, _address: object) -> None:
        read_line(connection)
        for piece in pieces:
            connection.sendall(piece)
            gevent.sleep(0.01)

    return handle


@contextlib.contextmanager
def serving(handler: Handler, host: str = "127.0.0.1") -> Iterator[str]:
    """Run a server in this process; yields its HOST:PORT."""
    server = StreamServer((host, 0), handler, backlog=1024, spawn=Pool(5000))
    server.start()
    try:
        yield f"[{host}]:{server.server_port}" if ":" in host else f"{host}:{server.server_port}"
    finally:
        server.stop(timeout=0)


@contextlib.contextmanager
def nobody() -> Iterator[str]:
    """An address at which nothing listens: the port is bound, so that nobody else can take it."""
    with stdlib_socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def send(
    address: str,
    request: Request = FILE,
    *,
    protocol: Protocol = "line",
    limit: float = PATIENCE,
    scheduled: float | None = None,
) -> client.Reply:
    server = client.resolve(*client.parse_address(address))
    return client.send(server, request, protocol=protocol, limit=limit, scheduled=scheduled)


# --- Parsing ---


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"0,4634,some_file\n", Request(0, 4634, b"some_file")),
        (b"200,0,some_file\r\n", Request(200, 0, b"some_file")),
        (b" -1 , 7 , a file", Request(-1, 7, b" a file")),
        (b"0,3600000,\xff\xfe", Request(0, 3_600_000, b"\xff\xfe")),
    ],
)
def test_parse_request(line: bytes, expected: Request) -> None:
    assert Request.parse(line) == expected


@pytest.mark.parametrize(
    "line", [b"", b"1,2", b"x,y,z", b"0,-1,a", b"0,1.5,a", b"0,3600001,a", b"0,1,a,b", b"0,1_0,a", b"0,1,a\nb"]
)
def test_parse_request_refuses(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"RC,MS,PATH|one hour"):
        Request.parse(line)


@given(
    st.integers(-(10**9), 10**9),
    st.integers(0, client.MAX_MS),
    st.text(st.characters(codec="utf-8", exclude_characters=",\r\n")),
)
def test_a_request_reads_itself_back(rc: int, ms: int, path: str) -> None:
    request = Request(rc, ms, path.encode())
    assert Request.parse(str(request).encode()) == request


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:80", ("127.0.0.1", 80)),
        ("localhost", ("localhost", 7000)),
        (":8000", ("127.0.0.1", 8000)),
        ("[::1]:7001", ("::1", 7001)),
        ("[::1]", ("::1", 7000)),
    ],
)
def test_parse_address(text: str, expected: tuple[str, int]) -> None:
    assert client.parse_address(text) == expected


@pytest.mark.parametrize("text", ["::1", "host:port", "host:0", "host:65536", "[::1]7000", "a:1:2", "[]:1"])
def test_parse_address_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"HOST:PORT|not a port"):
        client.parse_address(text)


# --- Replies ---


def test_line() -> None:
    with serving(good) as address:
        reply = send(address, Request(3, 50, b"caf\xe9 \xff"))
    assert (reply.status, reply.total_ms, reply.path) == (3, 50, b"caf\xe9 \xff")
    assert reply.succeeded(Request(3, 50, b""), "line")
    assert 0.05 <= reply.latency < PATIENCE
    assert 0 <= reply.connect <= reply.latency


def test_http() -> None:
    with serving(good) as address:
        request = Request(0, 50, b"a b/caf\xe9")
        reply = send(address, request, protocol="http")
    assert (reply.status, reply.total_ms, reply.path) == (200, 50, b"a b/caf\xe9")
    assert reply.succeeded(request, "http")
    assert 0.05 <= reply.latency < PATIENCE


def test_ipv6() -> None:
    try:
        with serving(good, "::1") as address:
            assert address.startswith("[::1]:")
            assert str(client.resolve(*client.parse_address(address))) == address
            assert send(address).status == 0
            assert send(address, protocol="http").status == 200
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")


@pytest.mark.parametrize(
    "pieces",
    [
        (b"0,10,", b"some_", b"file\n"),
        (b"0,10,some_file\r\n",),
        (b"0,10,some_file",),
        (b"0, 10,some_file\n\0\0\0\0",),
    ],
    ids=["in pieces", "CRLF", "no newline", "padded"],
)
def test_line_replies_of_all_kinds(pieces: tuple[bytes, ...]) -> None:
    with serving(saying(*pieces)) as address:
        reply = send(address)
    assert (reply.status, reply.total_ms, reply.path) == (0, 10, b"some_file")


def test_bad_input_echoes_no_path() -> None:
    with serving(saying(b"2,0,\n")) as address:
        reply = send(address)
    assert (reply.status, reply.path) == (client.BAD_INPUT, b"")
    assert not reply.succeeded(FILE, "line")


@pytest.mark.parametrize(
    "response",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n10,some_file",
        b"HTTP/1.0 200 OK\nContent-Type: text/plain\n\n10,some_file\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n10,\r\n9\r\nsome_file\r\n0\r\n\r\n",
    ],
    ids=["length", "bare LF until the end", "chunked"],
)
def test_http_replies_of_all_kinds(response: bytes) -> None:
    with serving(saying(response)) as address:
        reply = send(address, protocol="http")
    assert (reply.status, reply.total_ms, reply.path) == (200, 10, b"some_file")


def test_http_status_is_reported() -> None:
    with serving(saying(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 4\r\n\r\nlate")) as address:
        reply = send(address, protocol="http")
    assert (reply.status, reply.total_ms) == (408, None)
    assert not reply.succeeded(FILE, "http")


def test_latency_counts_from_the_schedule() -> None:
    with serving(good) as address:
        reply = send(address, scheduled=time.monotonic() - 3)
    assert reply.latency > 3
    assert reply.connect < reply.latency - 3


# --- Failures ---


@pytest.mark.parametrize("protocol", ["line", "http"])
def test_refused(protocol: Protocol) -> None:
    with nobody() as address, pytest.raises(client.ConnectError, match="refused") as caught:
        send(address, protocol=protocol)
    assert not caught.value.connected


def test_unknown_name() -> None:
    with pytest.raises(client.ConnectError, match="cannot look up"):
        client.resolve("no such host", 7000)


def test_out_of_file_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with serving(good) as address:
        server = client.resolve(*client.parse_address(address))
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with pytest.raises(client.ExhaustedError, match="Too many open files"):
                client.connect(server)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("protocol", ["line", "http"])
@pytest.mark.parametrize("handler", [closing, resetting])
def test_closed_without_a_reply(handler: Handler, protocol: Protocol) -> None:
    with serving(handler) as address, pytest.raises(client.ClosedError, match="without a reply") as caught:
        send(address, protocol=protocol)
    assert caught.value.connected


@pytest.mark.parametrize(
    ("protocol", "said"),
    [
        ("line", b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        ("line", b"garbage\n"),
        ("line", b"0,10,other_file\n"),
        ("line", b"0,10,some_fi"),
        ("line", b"\n"),
        ("line", b"x" * 50_000),
        ("http", b"2,0,\n"),
        ("http", b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\ngarbage"),
        ("http", b"HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n10,other_file"),
        ("http", b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n10,some_fi"),
    ],
)
def test_malformed(protocol: Protocol, said: bytes) -> None:
    with serving(saying(said)) as address, pytest.raises(client.MalformedReplyError) as caught:
        send(address, protocol=protocol)
    assert caught.value.connected


@pytest.mark.parametrize("protocol", ["line", "http"])
def test_time_limit(protocol: Protocol) -> None:
    with serving(silent) as address, pytest.raises(client.RequestTimeoutError, match=r"within 0\.2 s") as caught:
        send(address, protocol=protocol, limit=0.2)
    assert 0.2 <= caught.value.latency < PATIENCE
    assert caught.value.connected


def test_time_limit_counts_from_the_schedule() -> None:
    with serving(silent) as address, pytest.raises(client.RequestTimeoutError) as caught:
        send(address, limit=PATIENCE, scheduled=time.monotonic() - PATIENCE)
    assert PATIENCE <= caught.value.latency < 2 * PATIENCE


def test_interruption_sets_the_event_and_lets_go() -> None:
    before = signal.getsignal(signal.SIGINT)
    with client.interruption() as interrupted:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted.wait(PATIENCE)
    assert signal.getsignal(signal.SIGINT) is before


# --- diskread request ---


def invoke_request(*arguments: str, stdin: bytes | None = None) -> Invocation:
    return CliRunner().invoke(request_command, arguments, input=stdin)


def test_request_all_in_time() -> None:
    with serving(good) as address:
        done = invoke_request(address, "--count", "20", "--concurrency", "4")
    assert done.exit_code == 0, done.output
    assert "20 of 20 requests" in done.stdout
    assert "0 failed, 0 slow" in done.stdout
    assert "p99" in done.stdout


@pytest.mark.parametrize("protocol", ["line", "http"])
def test_request_list_from_standard_input_as_json(protocol: Protocol) -> None:
    with serving(good) as address:
        done = invoke_request(
            *(address, "--protocol", protocol, "--file-list", "-", "--count", "3", "--json"),
            stdin=b"0,1,a\n\n0,30,b\r\n",
        )
    assert done.exit_code == 0, done.output
    summary = msgspec.json.decode(done.stdout)
    assert (summary["planned"], summary["completed"], summary["slow"]) == (6, 6, 0)
    assert summary["failed"] == {}
    assert summary["ended"] == "complete"
    assert summary["latency"]["max"] >= 0.03


def test_request_shows_the_slow_ones() -> None:
    with serving(good) as address:
        done = invoke_request(
            *(address, "--file-list", "-", "--count", "1", "--timeout", "1", "--concurrency", "2"),
            stdin=b"0,1,quick\n0,60000,slow_file\n",
        )
    assert done.exit_code == 1
    assert "***client timeout 1." in done.stderr
    assert "0,60000,slow_file" in done.stderr
    assert "quick" not in done.stderr
    assert "0 failed, 1 slow (over 1 s)" in done.stdout


def test_request_counts_failures() -> None:
    with serving(closing) as address:
        done = invoke_request(address, "--count", "30", "--json")
    assert done.exit_code == 1
    assert msgspec.json.decode(done.stdout)["failed"] == {"closed": 30}
    assert done.stderr.count("failed: ") == 10
    assert "without a reply" in done.stderr


def test_request_counts_another_status_as_failed() -> None:
    with serving(saying(b"5,0,some_file\n")) as address:
        done = invoke_request(address, "--count", "2")
    assert done.exit_code == 1
    assert "2 status 5" in done.stdout


def test_request_to_nobody() -> None:
    with nobody() as address:
        done = invoke_request(address, "--concurrency", "5")
    assert done.exit_code == 2
    assert "refused" in done.stderr
    assert "diskread serve" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "stdin", "expected"),
    [
        (("host:port",), b"", "HOST:PORT"),
        (("--count", "0"), b"", "--count"),
        (("--file-list", "-"), b"0,1,a\n0,x,b\n", "line 2"),
        (("--file-list", "-"), b"\n\n", "no requests"),
        (("--file-list", "/does/not/exist"), b"", "No such file"),
    ],
)
def test_request_usage(arguments: tuple[str, ...], stdin: bytes, expected: str) -> None:
    done = invoke_request(*arguments, stdin=stdin)
    assert done.exit_code == 2
    assert expected in done.stderr


def test_request_stops_in_time() -> None:
    with serving(good) as address:
        done = invoke_request(address, "--max-time", "0.3", "--count", "1000000", "--json")
    assert done.exit_code == 1
    summary = msgspec.json.decode(done.stdout)
    assert summary["ended"] == "out of time"
    assert 0 < summary["completed"] < summary["planned"]


def test_request_interrupted_says_what_it_has() -> None:
    served = 0

    def interrupting(connection: socket, address: object) -> None:
        nonlocal served
        served += 1
        if served == 3:
            os.kill(os.getpid(), signal.SIGINT)
            gevent.sleep(PATIENCE)
        good(connection, address)

    with serving(interrupting) as address:
        done = invoke_request(address)
    assert done.exit_code == 130
    assert "2 of 1000 requests" in done.stdout
    assert "Interrupted" in done.stdout
    assert "Traceback" not in done.output


def test_request_help_has_an_example() -> None:
    done = invoke_request("--help")
    assert done.exit_code == 0
    assert "\n    diskread request --count 10\n" in done.stdout
    assert "Exit status" in done.stdout
