"""Bad input of every kind, from many clients at once, with good requests in between.

DISKREAD_BAD_INPUTS says how much of it: 2,000 unless told otherwise. The long run is 10,000:

    DISKREAD_BAD_INPUTS=10000 python -m pytest tests/server/test_bad_input.py -s
"""

from __future__ import annotations

import contextlib
import os
import queue
import random
import re
import threading
import time
from typing import TYPE_CHECKING

import pytest

from tests.server.conftest import LARGE, SMALL
from tests.server.raw_client import Connection, ServerProcess, http_request, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.server.conftest import StartServer

INPUTS = int(os.environ.get("DISKREAD_BAD_INPUTS", "2000"))
CLIENTS = 20
WARM_UP = 500
MEGABYTE = 1024 * 1024

TIME_LIMIT = 20.0
"""Seconds within which a bad input is answered or hung up on; the server's own limits are 1 s and 2 s."""

ERROR_LINE = re.compile(rb"[1-6],\d+,[^,\n]*\n\Z")
HTTP_REPLY = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n]+\r\n(?:[!-9;-~]+: [^\r\n]*\r\n)*\r\n")
LENGTH = re.compile(rb"(?i)\r\ncontent-length: (\d+)\r\n")


def is_error(reply: bytes) -> bool:
    """Whether a reply is well-formed and, if there is one at all, ends with an error."""
    if not reply.startswith(b"HTTP/"):
        return reply == b"" or ERROR_LINE.match(reply) is not None
    status = b""
    while reply:
        head = HTTP_REPLY.match(reply)
        if head is None:
            return False
        status, length = head[1], LENGTH.search(head[0])
        if length is None or len(reply) < head.end() + int(length[1]):
            return False
        reply = reply[head.end() + int(length[1]) :]
    return status[:1] in (b"4", b"5")


def hung_up_with(connection: Connection) -> bytes:
    """What comes until the server hangs up. Here a reset is as good: the client did not keep to the rules either."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.sock.recv(65_536):
            received += piece
    return received


# --- The kinds. Each does its worst on a connection of its own, and returns the reply if it stays to read it. ---


def sending(make: Callable[[random.Random], bytes]) -> Callable[[random.Random, Connection], bytes]:
    """A client that sends something, perhaps in two pieces, ends its input and waits for the reply."""

    def client(chance: random.Random, connection: Connection) -> bytes:
        data = make(chance)
        cut = chance.randrange(len(data) + 1) if chance.random() < 0.3 else len(data)
        connection.send_as_much_as_goes(data[:cut])
        connection.send_as_much_as_goes(data[cut:])
        with contextlib.suppress(OSError):
            connection.half_close()
        return hung_up_with(connection)

    client.__name__ = make.__name__
    return client


@sending
def garbage(chance: random.Random) -> bytes:
    return chance.choice([b"", b"x", b"\0", b"\xff"]) + chance.randbytes(chance.choice([1, 10, 100, 5_000, 70_000]))


@sending
def no_request(chance: random.Random) -> bytes:
    lines = [b"", b",", b",,", b"x,y,z", b"1,2", b"1,2,3,4", b"0,-1,x", b"0,1.5,x", b"0,99999999999,x", b"0,1e9,x"]
    lines += [
        b"0,10,",
        b"\xff,10,x",
        b"0,\xb2,x",
        b"0x0,1,x",
        b"0,1" + b"0" * 4000 + b",x",
        b"GET /",
        b"GET / HTTP/2.0",
    ]
    return chance.choice(lines) + chance.choice([b"", b"\n", b"\r\n", b"\r", b"\n0,0,d1/small\n"])


@sending
def long_line(chance: random.Random) -> bytes:
    return chance.choice([b"", b"0,0,", b"GET /", b"POST http://x/"]) + b"x" * chance.choice([5_000, 70_000, 1_000_000])


@sending
def no_file(chance: random.Random) -> bytes:
    names = [b"missing", b"..", b"../x", b"../../etc/passwd", b"/etc/passwd", b"//", b"way out", b"circle", b"fifo"]
    names += [b"directory", b".", b"", b"a\0b", b"\0", b"x" * 300, b"d/" * 1_000, b"\xff", b"small/", b"%2e%2e/x"]
    name = chance.choice(names)
    if chance.random() < 0.4:
        return b"0,0,d1/%b\n" % (name or b"missing")
    escaped = b"".join(b"%%%02x" % byte if chance.random() < 0.3 or byte <= 32 else b"%c" % byte for byte in name)
    return http_request(b"/v1/d1/" + escaped)


@sending
def bad_escape(chance: random.Random) -> bytes:
    return http_request(
        chance.choice(["/v1/d1/%", "/v1/d1/%zz", "/v1/d1/%u0041", "/%2", "/v1/%00/x", "/0,%,x", "/%0d%0aX:y"])
    )


@sending
def bad_range(chance: random.Random) -> bytes:
    value = chance.choice(["9999-", "-0", "5-1", "a-b", "-", "--1", "9" * 5_000 + "-", "0-0-0"])
    return http_request(chance.choice(["/v1/d1/small", "/v1/d1/empty"]), {"Range": f"bytes={value}"})


@sending
def bad_http(chance: random.Random) -> bytes:
    method = chance.choice(["get", "POST", "PUT", "TRACE", "CONNECT", "PRI", "!"])
    first = (
        f"{method} {chance.choice(['/v1/d1/small', '/missing', '*', 'x:1', '//'])} HTTP/1.{chance.choice('0129')}\r\n"
    )
    fields = ["Content-Length: -1", "Content-Length: x", "Transfer-Encoding: chunked", "Expect: 100-continue"]
    fields += [
        "Content-Length: 1000000",
        "If-Match: garbage",
        "Range: x",
        "Host:",
        f"X: {'y' * 70_000}",
        "X: 1\r\n" * 150,
    ]
    chosen = "".join(f"{field}\r\n" for field in chance.sample(fields, chance.randrange(4)))
    return (first + "Host: x\r\n" + chosen + "\r\n").encode() + chance.choice(
        [b"", b"zz\r\n", b"5\r\nhe", b"x" * 20_000]
    )


@sending
def bad_after_good(chance: random.Random) -> bytes:
    return http_request("/v1/d1/small", close=False) + chance.choice([b"garbage\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"])


@sending
def half_request(chance: random.Random) -> bytes:
    request = chance.choice(
        [http_request("/v1/d1/small"), b"POST /0,0,x HTTP/1.1\r\nContent-Length: 9\r\n\r\nx", b"12,1"]
    )
    return request[: chance.randrange(min(len(request), 60))]


def reset(chance: random.Random, connection: Connection) -> None:
    requests = [
        b"0,0,d1/large\n",
        b"0,0",
        http_request("/v1/d1/large"),
        http_request("/v1/d1/large")[:30],
        b"x" * 9_000,
    ]
    connection.send_as_much_as_goes(chance.choice(requests))
    connection.reset()


def hang_up(chance: random.Random, connection: Connection) -> None:
    connection.send_as_much_as_goes(chance.choice([b"", b"0,", b"0,0,d1/large\n", http_request("/v1/d1/sparse")]))


def reset_while_reading(_chance: random.Random, connection: Connection) -> None:
    connection.send(http_request("/v1/d1/sparse", close=False))
    connection.sock.recv(1_000)
    connection.reset()


def slow(chance: random.Random, connection: Connection) -> bytes:
    """Sends a byte now and then, longer than the server lets a client take."""
    request = chance.choice([b"GET /healthz HTTP/1.1\r\nX: ", b"0,0,", http_request("/healthz", close=False) + b"GET "])
    connection.send(request)
    connection.sock.settimeout(0.2)
    received = b""
    ends = time.monotonic() + TIME_LIMIT
    while time.monotonic() < ends:
        try:
            piece = connection.sock.recv(65_536)
            received += piece
            if not piece:
                return received
            continue
        except TimeoutError:
            connection.send_as_much_as_goes(b"x")
        except ConnectionError:
            return received
    raise AssertionError("the server has all the time in the world")


KINDS: list[Callable[[random.Random, Connection], bytes | None]] = [
    *(garbage, no_request, long_line, no_file, bad_escape, bad_range, bad_http, bad_after_good, half_request),
    *(reset, hang_up, reset_while_reading),
]


def good(chance: random.Random, connection: Connection) -> None:
    """A client that keeps to the rules, and is served whatever the others do."""
    match chance.randrange(4):
        case 0:
            connection.send(b"7,0,d1/small\n")
            assert re.fullmatch(rb"7,\d+,d1/small\n", connection.rest())
        case 1:
            connection.send(b"7,1,some_file\r\n")
            assert re.fullmatch(rb"7,\d+,some_file\n", connection.rest())
        case 2:
            connection.send(http_request("/v1/d1/large"))
            response = connection.response()
            assert (response.status, response.body) == (200, LARGE)
        case _:
            for _ in range(2):
                connection.send(http_request("/v1/d1/small", {"Range": "bytes=5-9"}, close=False))
                response = connection.response()
                assert (response.status, response.body) == (206, SMALL[5:10])


class Crowd:
    """Many clients at once. What goes wrong is kept, not raised: it happens in threads."""

    def __init__(self, server: ServerProcess) -> None:
        self._port = server.port
        self._seeds: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.good = 0
        self.slowest = 0.0
        self.complaints: list[str] = []

    def run(self, seeds: range) -> None:
        for seed in seeds:
            self._seeds.put(seed)
        threads = [threading.Thread(target=self._clients) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _clients(self) -> None:
        with contextlib.suppress(queue.Empty):
            while len(self.complaints) < 20:
                seed = self._seeds.get_nowait()
                self._one(seed, random.Random(seed))

    def _one(self, seed: int, chance: random.Random) -> None:
        kind = slow if seed % 50 == 0 else chance.choice(KINDS)
        begun = time.monotonic()
        try:
            with Connection(self._port) as connection:
                connection.sock.settimeout(TIME_LIMIT)
                reply = kind(chance, connection)
            if reply is not None and not is_error(reply):
                self.complaints.append(f"{kind.__name__}, seed {seed}: {reply[:300]!r}")
            self.slowest = max(self.slowest, time.monotonic() - begun)
            if seed % 4 == 0:
                with Connection(self._port) as connection:
                    good(chance, connection)
                self.good += 1
        except (OSError, AssertionError) as error:
            self.complaints.append(f"{kind.__name__}, seed {seed}: {error!r}")


@pytest.mark.timeout(60 + INPUTS / 50)
def test_bad_input_leaves_no_trace(start_server: StartServer, tree: Path) -> None:
    server = start_server(
        *("--disk", f"d1={tree}", "--simulate", "--request-timeout", "1", "--idle-timeout", "2"),
        *("--queue", "1000", "--deadline", "60"),
    )
    for path in (b"d1", b"some_file"):  # as many threads as there can be later: they stay for a minute
        connections = [server.connect() for _ in range(CLIENTS + 5)]
        for connection in connections:
            connection.send(b"0,300,%b\n" % path)
        for connection in connections:
            assert connection.rest()
            connection.close()
    crowd = Crowd(server)
    crowd.run(range(INPUTS, INPUTS + WARM_UP))
    assert not crowd.complaints
    until(lambda: server.sockets() == 1, "the server to hang up on all of them")
    descriptors, threads, memory = server.descriptors(), server.threads(), server.memory()

    crowd = Crowd(server)
    begun = time.monotonic()
    crowd.run(range(INPUTS))
    wall = time.monotonic() - begun
    assert not crowd.complaints, "\n".join(crowd.complaints)
    assert crowd.good == len(range(0, INPUTS, 4))
    until(lambda: server.sockets() == 1, "the server to hang up on all of them")
    until(lambda: server.descriptors() <= descriptors, "the server to close its files")
    assert server.threads() <= threads
    growth = server.memory() - memory
    print(
        f"\n{INPUTS} bad inputs and {crowd.good} good requests in {wall:.1f} s, slowest bad {crowd.slowest:.2f} s;"
        f"\ndescriptors {descriptors} -> {server.descriptors()}, threads {threads} -> {server.threads()}, RSS "
        f"{memory / MEGABYTE:.1f} MiB {growth / MEGABYTE:+.1f}, peak {server.memory('VmHWM') / MEGABYTE:.1f} MiB"
    )
    assert growth < 10 * MEGABYTE
    assert "Traceback" not in server.said(), server.said()[-3000:]
    assert server.stop() == 0


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        (b"", True),
        (b"2,0,\n", True),
        (b"5,0,d1/x\n", True),
        (b"0,0,x\n", False),
        (b"2,0,", False),
        (b"2,0,\n2,0,\n", False),
        (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nxHTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", False),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", False),
        (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 5\r\n\r\nx", False),
        (b"HTTP/1.1 400 Bad Request\nContent-Length: 0\n\n", False),
    ],
)
def test_the_judge_knows_an_error_when_it_sees_one(reply: bytes, verdict: bool) -> None:
    assert is_error(reply) is verdict
