"""Disks for programs of native threads: the same calls from any of them. What they promise is in test_hubs.py."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from diskread import DiskFileNotFound, DiskTimeout, FileStat, Limits, State
from diskread._syscalls import stall
from diskread.threads import Disk

from .conftest import until

if TYPE_CHECKING:
    from pathlib import Path

    from .conftest import RunScript

CONTENT = os.urandom(700_001)
LIMITS = Limits(threads=2, queue=5, deadline=20, idle=0.2)


def test_every_method(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    with Disk("d1", tmp_path, LIMITS) as disk:
        assert (disk.name, disk.root, disk.limits) == ("d1", str(tmp_path), LIMITS)
        assert disk.read("a", 3, 5) == CONTENT[3:8]
        found = disk.stat("a")
        assert isinstance(found, FileStat)
        assert disk.run(os.listdir, tmp_path) == ["a"]
        assert disk.stall(0.001).disk >= 0.001
        with disk.open("a") as file:
            assert file.stat == found
            assert file.read(5) == CONTENT[5:]
            assert b"".join(file.chunks(1, 600_000)) == CONTENT[1:600_000]
            chunks = file.chunks()
            assert CONTENT.startswith(next(chunks))
            chunks.close()  # in the middle
        with pytest.raises(ValueError, match="closed"):
            file.read()
        with pytest.raises(DiskFileNotFound):
            disk.read("b")
        disk.watch()
        disk.set_offline("by hand")
        assert disk.status.load.state is State.OFFLINE
        disk.set_online()
        assert disk.read("a", 0, 1) == CONTENT[:1]
        assert disk.status.counts.reads >= 4
        assert "d1" in repr(disk)
        assert "a" in repr(file)


def test_from_many_threads_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    with Disk("d1", tmp_path, Limits(threads=4, queue=100, deadline=60)) as disk, disk.open("a", size=0) as file:
        wrong: list[object] = []

        def work(number: int) -> None:
            for offset in range(number, len(CONTENT), 50_000):
                if disk.read("a", offset, 99) != CONTENT[offset : offset + 99]:
                    wrong.append(offset)
            if file.read(number) != CONTENT[number:]:
                wrong.append(number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert wrong == []


def test_a_signal_ends_a_call_of_the_main_thread() -> None:
    class Alarm(Exception):
        pass

    def handler(*_: object) -> None:
        raise Alarm

    with Disk("d1", None, LIMITS) as disk:
        before = signal.signal(signal.SIGALRM, handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            begin = time.monotonic()
            with pytest.raises(Alarm):
                disk.run(stall, 5.0)
            assert time.monotonic() - begin < 4.5
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        until(lambda: disk.status.counts.abandoned == 1)
        assert disk.run(abs, -1) == 1


def test_whatever_a_function_raises_is_the_callers() -> None:
    def leave() -> None:
        raise SystemExit(3)

    with Disk("d1", None, LIMITS) as disk:
        for _ in range(2):
            with pytest.raises(SystemExit):
                disk.run(leave)
        assert disk.run(abs, -1) == 1


def test_the_thread_of_the_loop_must_not_wait() -> None:
    with Disk("d1", None, Limits(deadline=0.1, threads=2)) as disk:
        errors: list[str] = []

        def on_change(_state: State, _reason: str | None) -> None:
            try:
                disk.run(abs, -1)
            except RuntimeError as error:
                errors.append(str(error))

        disk.on_change = on_change
        assert disk.on_change is on_change
        disk.set_offline("by hand")
        until(lambda: bool(errors))
        assert "must not wait for one of them" in errors[0]


def test_a_fork_and_an_end_while_something_hangs(run_script: RunScript) -> None:
    found = run_script(
        "import os, sys, threading\n"
        "from diskread import DiskTimeout, Limits\n"
        "from diskread.threads import Disk\n"
        "disk = Disk('d1', '/', Limits(threads=2, inline='off'))\n"
        "print(len(disk.read('etc/passwd', 0, 4)), flush=True)\n"
        "child = os.fork()\n"
        "for _ in range(100): assert disk.run(abs, -5) == 5\n"
        "print(len(disk.read('etc/passwd', 0, 4)), flush=True)\n"
        "if not child: sys.exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "assert disk.run(abs, -5) == 5\n"
        "reader, writer = os.pipe()\n"
        "try: disk.run(os.read, reader, 1, deadline=0.1)\n"
        "except DiskTimeout: print('late')\n"
        "threading.Thread(target=disk.run, args=(os.read, reader, 1), daemon=True).start()\n"
        "print('end')\n"
    )
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.splitlines() == ["4", "4", "4", "7", "late", "end"]


def test_a_missed_deadline() -> None:
    with Disk("d1", None, LIMITS) as disk:
        begin = time.monotonic()
        with pytest.raises(DiskTimeout):
            disk.run(stall, 3.0, deadline=0.2)
        assert time.monotonic() - begin < 2.5
        assert disk.status.counts.timeouts == 1
        until(lambda: not disk.status.load.in_flight)
