"""Servers that fork: started in a session of their own, and gone for good when `stop` returns."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TYPE_CHECKING

from tests.faults.injectors import wait_until

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

START_SECONDS = 60.0
TERM_SECONDS, KILL_SECONDS = 10.0, 5.0


class StartError(RuntimeError):
    """A server did not start; the message has the end of its log."""


class StillRunningError(RuntimeError):
    """A server has not ended: it would go on to answer on its port (SO_REUSEPORT), beside the next one."""


class Ports:
    """Free ports on loopback that nobody else is given as long as this is open.

    Each is bound, with SO_REUSEPORT and without listening: so Swift's servers, which set the same option, can bind it
    as well, and the kernel gives it to nobody who asks for any port.
    """

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []

    def take(self) -> int:
        """One more port."""
        reserved = socket.socket()
        self._sockets.append(reserved)
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        port: int = reserved.getsockname()[1]
        return port

    def close(self) -> None:
        """Give them back."""
        for reserved in self._sockets:
            reserved.close()


class Server:
    """A server with all the processes that it forks.

    Attributes:
        name: What messages call it.
        process: The one that was started, the leader of the session.
        log: The file that takes its output.
    """

    def __init__(self, name: str, command: Sequence[str | Path], log: Path, env: Mapping[str, str]) -> None:
        """Start it; only the main thread may do so, since servers die with the thread that started them."""
        self.name = name
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env},
                start_new_session=True,
            )

    def wait_answering(self, ports: Sequence[int], processes: int) -> None:
        """Return as soon as so many processes run and /healthcheck is answered on each port.

        Raises:
            StartError: it has ended, or did not get there within a minute.
        """

        def ready() -> bool:
            if self.process.poll() is not None:
                raise StartError(f"{self.name} has ended with status {self.process.returncode}: {self.log_tail()}")
            return len(self.pids()) >= processes and all(map(_answers, ports))

        try:
            wait_until(ready, f"{self.name} to answer", START_SECONDS, lambda _: time.sleep(0.05))
        except TimeoutError as error:
            raise StartError(f"{error}: {self.log_tail()}") from error

    def pids(self) -> list[int]:
        """The processes of it that run, without those that have ended and wait for their parent (state Z)."""
        found = []
        for entry in filter(str.isdecimal, os.listdir("/proc")):
            fields = _stat(entry)
            # proc_pid_stat(5), behind the name of the program: state, parent, process group, session
            if fields and int(fields[3]) == self.process.pid and fields[0] not in ("Z", "X"):
                found.append(int(entry))
        return found

    def memory(self) -> int:
        """Proportional set size of all its processes together, in bytes: what they share counts once."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        return total

    def terminate(self) -> None:
        """Ask it to end (SIGTERM). Does not wait."""
        self._signal(signal.SIGTERM)

    def stop(self, term_seconds: float = TERM_SECONDS, kill_seconds: float = KILL_SECONDS) -> None:
        """End it, and return when the last of its processes has gone. Idempotent.

        Args:
            term_seconds: For how long it may end by itself, before it is killed.
            kill_seconds: For how long to wait then.

        Raises:
            StillRunningError: one is still there, in uninterruptible sleep most likely: lift the stall first.
        """
        for number, patience in ((signal.SIGTERM, term_seconds), (signal.SIGKILL, kill_seconds)):
            self._signal(number)
            try:
                wait_until(self._gone, f"{self.name} to end", patience, lambda _: time.sleep(0.02))
            except TimeoutError:
                continue
            return
        left = ", ".join(_describe(pid) for pid in self.pids())
        raise StillRunningError(f"{self.name} does not end, not even by SIGKILL: {left}")

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _gone(self) -> bool:
        # The leader's number is that of the session: it is not reaped, nor used again, before all others have gone.
        return self.pids() == [] and self.process.poll() is not None

    def log_tail(self, lines: int = 15) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) or "it says nothing"


def stop_all(servers: Sequence[Server]) -> None:
    """Stop each of them, whatever becomes of the others.

    Raises:
        StillRunningError: at least one is still there.
    """
    failures = []
    for server in servers:
        server.terminate()  # all of them first: each takes its time
    for server in servers:
        try:
            server.stop()
        except StillRunningError as error:
            failures.append(str(error))
    if failures:
        raise StillRunningError("; ".join(failures))


def _answers(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/healthcheck")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _stat(pid: str | int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _describe(pid: int) -> str:
    try:
        states = {_stat(f"{pid}/task/{thread}")[0] for thread in os.listdir(f"/proc/{pid}/task")}
    except (OSError, IndexError):
        return f"{pid} (gone by now)"
    return f"{pid} (threads in state {', '.join(sorted(states))})"
