"""Open-loop load over HTTP, in a process of its own: requests leave on schedule, however the server is doing.

Every answer is compared with the file, byte for byte, and noted with the time at which its request was *due*: a
server that stands still makes every request late that was due meanwhile, not only the one that it stands still for.
Times are those of CLOCK_MONOTONIC, which all processes of a machine share (clock_gettime(2)).
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gevent
import msgspec
from gevent import socket

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RANGE = 4096
"""Bytes of a request: a small random read, which is what disks are slowest at."""

LOST = -1
"""Instead of a status: no answer came, or half of one."""

WRONG = -2
"""Instead of a status: the bytes were not those of the file."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to ask for.

    Attributes:
        port: TCP port of the server on loopback.
        begin: When the first requests are due.
        seconds: For how long.
        rate: Requests per second and disk.
        timeout: Seconds after which a request counts as lost.
        seed: Of the random choice of files and ranges.
        rates: The same for single disks, where it differs.
        content: For each disk a directory with a copy of its files, to ask for and to compare with.
        output: File for the answers.
    """

    port: int
    begin: float
    seconds: float
    rate: float
    timeout: float
    seed: int
    content: dict[str, str]
    output: str
    rates: dict[str, float] = {}


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """What became of a request.

    Attributes:
        disk: Which one was asked.
        due: When the request should have left.
        end: When the last byte of its answer had come.
        status: HTTP status; LOST or WRONG.
    """

    disk: str
    due: float
    end: float
    status: int


class Load:
    """The load, running."""

    def __init__(self, plan: Plan) -> None:
        """Start it; the requests begin at `plan.begin`, for which a second from now is soon enough."""
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


class _NoAnswer(OSError):
    """The server hung up without a byte of an answer."""


class _Client:
    """Asks one disk, on as many connections as there are requests at a time; kept alive as long as all goes well."""

    def __init__(self, plan: Plan, disk: str, files: Mapping[str, bytes], answers: list[Answer]) -> None:
        self._plan = plan
        self._disk = disk
        self._files = files
        self._names = sorted(files)
        self._answers = answers
        self._idle: list[Any] = []
        self._random = random.Random(f"{plan.seed} {disk}")

    def run(self, shift: float) -> None:
        """Send the requests on schedule, `shift` seconds after the beginning; return when all are answered."""
        rate = self._plan.rates.get(self._disk, self._plan.rate)
        under_way = set()
        for number in range(int(self._plan.seconds * rate)):
            due = self._plan.begin + shift + number / rate
            if (wait := due - time.monotonic()) > 0:
                gevent.sleep(wait)
            request = gevent.spawn(self._ask, due)
            under_way.add(request)
            request.rawlink(under_way.discard)
        gevent.joinall(list(under_way))

    def _ask(self, due: float) -> None:
        name = self._random.choice(self._names)
        content = self._files[name]
        start = self._random.randrange(max(1, len(content) - RANGE))
        try:
            with gevent.Timeout(self._plan.timeout):
                status, body = self._exchange(name, start)
            if status == 206 and body != content[start : start + RANGE]:
                status = WRONG
        except (OSError, ValueError, gevent.Timeout):
            status = LOST
        self._answers.append(Answer(self._disk, due, time.monotonic(), status))

    def _exchange(self, name: str, start: int) -> tuple[int, bytes]:
        # A server may hang up on a connection that was idle for long, and cross the next request in doing so: as
        # clients do, ask again on another (RFC 9112, 9.3.1), unless a part of the answer has come.
        while self._idle:
            try:
                return self._exchange_on(self._idle.pop(), name, start)
            except _NoAnswer:
                continue
        return self._exchange_on(socket.create_connection(("127.0.0.1", self._plan.port)), name, start)

    def _exchange_on(self, sock: Any, name: str, start: int) -> tuple[int, bytes]:
        try:
            data = b""
            try:
                sock.sendall(self._request(name, start))
                data = _receive(sock)
            except ConnectionError as error:
                raise _NoAnswer from error
            while b"\r\n\r\n" not in data:
                data += _receive(sock)
            head, _, body = data.partition(b"\r\n\r\n")
            lines = head.lower().split(b"\r\n")
            length = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
            while len(body) < length:
                body += _receive(sock)
        except BaseException:
            sock.close()
            raise
        if b"connection: close" in lines:
            sock.close()
        else:
            self._idle.append(sock)
        return int(head[9:12]), body

    def _request(self, name: str, start: int) -> bytes:
        return (
            f"GET /v1/{self._disk}/{name} HTTP/1.1\r\nHost: localhost\r\n"
            f"Range: bytes={start}-{start + RANGE - 1}\r\n\r\n".encode()
        )


def _receive(sock: Any) -> bytes:
    data: bytes = sock.recv(65536)
    if not data:
        raise ConnectionError("the server hung up in the middle of an answer")
    return data


def main() -> None:
    """Carry out the plan that the command line says."""
    plan = msgspec.json.decode(sys.argv[1], type=Plan)
    answers: list[Answer] = []
    clients = []
    for disk, directory in plan.content.items():
        files = {path.name: path.read_bytes() for path in Path(directory).iterdir() if path.is_file()}
        clients.append(_Client(plan, disk, files, answers))
    shift = 1 / plan.rate / len(clients)  # the disks' requests are spread evenly, not sent four at a time
    gevent.joinall(
        [gevent.spawn(client.run, number * shift) for number, client in enumerate(clients)], raise_error=True
    )
    Path(plan.output).write_bytes(msgspec.msgpack.encode(answers))


if __name__ == "__main__":
    main()
