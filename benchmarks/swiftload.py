"""Load on Swift: open-loop through a proxy, in a process of its own, and closed-loop on one object server.

Open-loop: requests leave on schedule, however the servers are doing, and latency counts from when a request was due. A
request that fails counts with the time after which its client knew; after `patience` it gives up. Times are those of
CLOCK_MONOTONIC, which all processes of a machine share (clock_gettime(2)).
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TYPE_CHECKING

import gevent
import gevent.socket
import msgspec

if not __package__:  # run as a script: its own directory is on the path, the one above is not
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.load import LOST, WRONG, Answer

if TYPE_CHECKING:
    from collections.abc import Sequence


class Stream(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of one kind.

    Attributes:
        name: What the results call it.
        method: GET or PUT.
        paths: What to ask for, by turns in random order.
        rate: Requests per second.
    """

    name: str
    method: str
    paths: list[str]
    rate: float


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to ask for.

    Attributes:
        port: TCP port of the proxy on loopback.
        begin: When the first requests are due.
        seconds: For how long.
        patience: Seconds after which a client gives up.
        size: Bytes of an object; its content follows from its path, see `content`.
        streams: The requests.
        output: File for the answers.
    """

    port: int
    begin: float
    seconds: float
    patience: float
    size: int
    streams: list[Stream]
    output: str


def content(path: str, size: int) -> bytes:
    """The bytes of an object."""
    return random.Random(path).randbytes(size)


class Load:
    """The open-loop load, running."""

    def __init__(self, plan: Plan) -> None:
        """Start it; the requests begin at `plan.begin`, for which two seconds from now are soon enough."""
        self._output = Path(plan.output)
        command = [sys.executable, __file__, msgspec.json.encode(plan).decode()]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def answers(self) -> Sequence[Answer]:
        """Wait for the end, and return all answers in the order in which they came."""
        if self._process.wait() != 0:
            raise RuntimeError(f"the load generator has failed with exit status {self._process.returncode}")
        return msgspec.msgpack.decode(self._output.read_bytes(), type=list[Answer])

    def kill(self) -> None:
        """End it early."""
        self._process.kill()
        self._process.wait()


def _run_stream(plan: Plan, stream: Stream, shift: float, answers: list[Answer]) -> None:
    chooser = random.Random(stream.name)
    under_way = set()
    for number in range(int(plan.seconds * stream.rate)):
        due = plan.begin + shift + number / stream.rate
        if (wait := due - time.monotonic()) > 0:
            gevent.sleep(wait)
        request = gevent.spawn(_ask, plan, stream, chooser.choice(stream.paths), due, answers)
        under_way.add(request)
        request.rawlink(under_way.discard)
    gevent.joinall(list(under_way))


def _ask(plan: Plan, stream: Stream, path: str, due: float, answers: list[Answer]) -> None:
    expected = _contents[path]
    try:
        with gevent.Timeout(plan.patience), contextlib.closing(HTTPConnection("127.0.0.1", plan.port)) as connection:
            connection.sock = gevent.socket.create_connection(("127.0.0.1", plan.port))
            connection.request(stream.method, path, expected if stream.method == "PUT" else None)
            answer = connection.getresponse()
            body, status = answer.read(), answer.status
        if stream.method == "GET" and status == 200 and body != expected:
            status = WRONG
    except (OSError, HTTPException, gevent.Timeout):
        status = LOST
    answers.append(Answer(stream.name, due, time.monotonic(), status))


_contents: dict[str, bytes] = {}


def main() -> None:
    """Carry out the plan that the command line says."""
    plan = msgspec.json.decode(sys.argv[1], type=Plan)
    answers: list[Answer] = []
    _contents.update({path: content(path, plan.size) for stream in plan.streams for path in stream.paths})
    streams = [
        # Spread evenly, not sent all at a time.
        gevent.spawn(_run_stream, plan, stream, number / len(plan.streams) / stream.rate, answers)
        for number, stream in enumerate(plan.streams)
    ]
    gevent.joinall(streams, raise_error=True)
    Path(plan.output).write_bytes(msgspec.msgpack.encode(answers))


def download(port: int, path: str, size: int, md5: str, clients: int, seconds: float) -> int:
    """GET an object again and again, each client on a connection of its own; the first body of each is verified.

    Blocks for that time, in native threads of this process.

    Returns:
        How many were complete within the time.

    Raises:
        RuntimeError: an answer was not what it should be.
    """
    counts: list[int] = []
    failures: list[BaseException] = []
    ends = time.monotonic() + seconds
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()

    def client() -> None:
        count, buffer = 0, bytearray(size + 65536)
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
                while time.monotonic() < ends:
                    body = _receive(connection, request, memoryview(buffer), size)
                    if count == 0 and hashlib.md5(body, usedforsecurity=False).hexdigest() != md5:
                        raise RuntimeError("the body is not that of the object")
                    count += time.monotonic() < ends
        except (OSError, RuntimeError) as error:
            failures.append(error)
        counts.append(count)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise RuntimeError(f"a download failed: {failures[0]}") from failures[0]
    return sum(counts)


def _receive(connection: socket.socket, request: bytes, buffer: memoryview, size: int) -> memoryview:
    connection.sendall(request)
    filled, head = 0, -1
    while head < 0 or filled < head + size:
        received = connection.recv_into(buffer[filled:])
        if not received:
            raise ConnectionError("the server hung up in the middle of an answer")
        filled += received
        if head < 0 and (end := bytes(buffer[: min(filled, 65536)]).find(b"\r\n\r\n")) >= 0:
            head = end + 4
            if not bytes(buffer[:12]).endswith(b" 200"):
                raise RuntimeError(f"answered {bytes(buffer[:head]).decode(errors='replace')!r}")
    return buffer[head : head + size]


if __name__ == "__main__":
    main()
