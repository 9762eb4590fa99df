"""The stage of the demo: directories that stand for disks, and the two servers."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from typing import TYPE_CHECKING

import gevent
from gevent import subprocess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DISKS = ("disk1", "disk2", "disk3", "disk4")
HUNG = "disk3"
FILES = tuple(f"file{number}" for number in range(16))
DEADLINE = 1.0
OFFLINE_AFTER = 2.0
SLOTS = 4


class StageError(Exception):
    """A server of the demo did not start; the message has what it said."""


def fill(root: Path) -> None:
    """Make a directory per disk, with files of 4 to 64 KiB of random bytes."""
    for disk in DISKS:
        (root / disk).mkdir()
        for number, file in enumerate(FILES):
            (root / disk / file).write_bytes(os.urandom((number + 1) * 4096))


@contextlib.contextmanager
def diskread_server(root: Path, port: int) -> Iterator[int]:
    """Run `diskread serve` on the directories; yields its port."""
    disks = [argument for disk in DISKS for argument in ("--disk", f"{disk}={root / disk}")]
    limits = ["--threads", str(SLOTS), "--queue", "16", "--deadline", str(DEADLINE)]
    limits += ["--offline-after", str(OFFLINE_AFTER)]
    command = [sys.executable, "-m", "server", "serve", "--simulate", "--port", str(port), *disks, *limits]
    with _running(command, stream="stderr") as (process, lines):
        said = []
        for line in lines:
            said.append(line)
            found = re.search(r"listens on http://[^ ]*:(\d+)/", line)
            if found:
                break
        else:
            raise StageError("diskread serve did not start:\n" + "".join(said))
        rest = gevent.spawn(_read_to_end, lines)  # a full pipe would stop the server at its next line of log
        try:
            yield int(found[1])
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
            rest.join()


@contextlib.contextmanager
def gil_held_server(root: Path, hang_begin: float, hang_end: float) -> Iterator[int]:
    """Run the comparison on the same directories; yields its port."""
    arguments = [str(root), HUNG, str(hang_begin), str(hang_end)]
    with _running([sys.executable, "-m", "server.demo.gil_held", *arguments], stream="stdout") as (process, lines):
        line = next(lines, "")
        if not line.strip().isdigit():
            raise StageError("the GIL-held server did not start")
        try:
            yield int(line)
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _running(command: list[str], stream: str) -> Iterator[tuple[subprocess.Popen[str], Iterator[str]]]:
    # Started without the demo's standard input, so that Ctrl-C at the terminal reaches the demo alone.
    # The stream that nobody reads is the demo's own.
    pipes = {"stdout": None, "stderr": None, stream: subprocess.PIPE}
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=pipes["stdout"],
        stderr=pipes["stderr"],
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process, iter(getattr(process, stream).readline, "")
        finally:
            if process.poll() is None:
                process.kill()


def _read_to_end(lines: Iterator[str]) -> None:
    for _ in lines:
        pass
