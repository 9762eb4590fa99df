"""A row's server, running: started, watched from outside, stopped."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from .rows import REPOSITORY, Row, RowError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

START_SECONDS = 40.0
STOP_SECONDS = 5.0
PORTS = range(20_000, 32_000)
"""Below the ports that the kernel gives to clients (ip_local_port_range)."""


class Usage(msgspec.Struct, frozen=True):
    """What a server used at a time.

    Attributes:
        at: When, on `time.monotonic`; in a result, seconds since the load began.
        memory: Resident memory of its processes, in bytes.
        threads: Native threads of its processes.
    """

    at: float
    memory: int
    threads: int


class Peer:
    """The server of a row, in processes of its own."""

    def __init__(self, row: Row, root: Path | None = None, disks: Sequence[str] = ()) -> None:
        """Start it and wait until it answers.

        Args:
            row: Which.
            root: Directory from which it reads; without one it only sleeps.
            disks: Names of the directories in it that are disks of their own.

        Raises:
            RowError: It does not.
        """
        self.row = row
        self.port = _free_port()
        command = row.words(row.start, port=self.port)
        if root is not None:
            command += row.words(row.root, root=root)
            for disk in disks:
                command += row.words(row.disk, root=root, disk=disk)
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed in stop()
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                cwd=REPOSITORY,
                start_new_session=True,  # a launcher and what it launches end together
            )
        except OSError as error:
            raise RowError(f"it does not start: {error}") from error
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_until_it_answers(self) -> None:
        ends = time.monotonic() + START_SECONDS
        while True:
            if self.process.poll() is not None:
                raise RowError(f"it does not start: exit status {self.process.returncode}: {self.complaint()}")
            with contextlib.suppress(OSError):
                # A file that is not there: an answer is all that is wanted, and it is the same with a root or without.
                if self.ask(b"0,0,healthy/f0\n", timeout=5.0):
                    return
            if time.monotonic() > ends:
                raise RowError(f"it does not answer within {START_SECONDS:g} s of its start: {self.complaint()}")
            time.sleep(0.05)

    def ask(self, data: bytes, timeout: float) -> bytes:
        """Send bytes on a new connection and return what comes until the end of the first line.

        Raises:
            OSError: No connection, or no answer in time.
        """
        with socket.create_connection(("127.0.0.1", self.port), timeout) as sock:
            sock.sendall(data)
            received = b""
            while b"\n" not in received:
                piece = sock.recv(65536)
                if not piece:
                    break
                received += piece
            return received

    def answers(self, timeout: float = 10.0) -> bool:
        """Whether it still answers a request for nothing but an answer."""
        try:
            return self.ask(b"0,0,healthy/f0\n", timeout).startswith((b"0,", b"5,"))
        except OSError:
            return False

    def alive(self) -> bool:
        """Whether its process is still there."""
        return self.process.poll() is None

    def usage(self) -> Usage:
        """What it uses now."""
        memory = threads = 0
        for pid in _tree(self.process.pid):
            with contextlib.suppress(OSError):
                fields = dict(
                    line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
                )
                memory += int(fields.get("VmRSS", "0 kB").split()[0]) * 1024
                threads += int(fields.get("Threads", "0"))
        return Usage(time.monotonic(), memory, threads)

    def complaint(self) -> str:
        """The last that it said on stderr."""
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - 2000))
        lines = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1].strip() if lines else "it says nothing"

    def stop(self) -> float:
        """SIGTERM, and SIGKILL to whatever is left; returns the seconds that it took to end by itself."""
        begin = time.monotonic()
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        took = time.monotonic() - begin
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # in state D until the disk is released
            self.process.wait(STOP_SECONDS)
        self._stderr.close()
        return took


def _tree(root: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                # The name, second field of proc_pid_stat(5), may hold anything but ends with the last parenthesis.
                parent = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def _free_port() -> int:
    for port in random.sample(PORTS, 100):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                sock.bind(("127.0.0.1", port))
                return port
    raise RowError("no TCP port is free")
