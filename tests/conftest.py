"""Fixtures of the library's tests: files, disks that close themselves, and a look at what a test left behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import gevent
import pytest

from diskread import Disk, Limits

if TYPE_CHECKING:
    from diskread.limits import EngineName

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So does a shell start what it runs in the background, and every process that a test starts would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

MakeDisk = Callable[..., Disk]
RunScript = Callable[..., "subprocess.CompletedProcess[str]"]

SMALL = bytes(range(256)) * 4
LARGE = bytes(each % 251 for each in range(700_001))


SWIFT = Path(__file__).resolve().parent / "swift"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Tests of Swift run in a process of their own: Swift, once imported, changes modules that others use."""
    asked = [Path(each.split("::")[0]).resolve() for each in config.args]
    alone = all(each.is_relative_to(SWIFT) for each in asked)
    return True if collection_path == SWIFT and not alone else None


def until(condition: Callable[[], object], what: str = "the condition", seconds: float = 20.0) -> None:
    """Let the hub run until the condition holds; fail when it does not within a time that no machine needs."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, f"waited {seconds} s for {what}"
        gevent.sleep(0.005)


def descriptors() -> dict[int, str]:
    """The open descriptors of this process and what they lead to."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the one that listed the directory
            continue
    return found


def native_threads() -> set[str]:
    """The ids of the native threads of this process."""
    return set(os.listdir("/proc/self/task"))


@pytest.fixture(scope="module")
def nothing_to_collect() -> None:
    """Collect what the tests of other modules have left to the garbage collector, before it does so in this one."""
    gc.collect()
    gevent.sleep(0.01)


@pytest.fixture
def nothing_left_behind(nothing_to_collect: None) -> Iterator[None]:
    """Fail a test after which a descriptor or a native thread stays behind."""
    watcher = gevent.get_hub().loop.async_()  # makes the loop open its own descriptors now
    watcher.start(lambda: None)
    watcher.stop()
    watcher.close()
    descriptors_before, threads_before = descriptors(), native_threads()
    yield

    def left() -> tuple[dict[int, str], set[str]]:
        return dict(descriptors().items() - descriptors_before.items()), native_threads() - threads_before

    for attempt in range(1, 5_001):
        if not any(left()):
            break
        if attempt % 200 == 0:
            gc.collect()
        gevent.sleep(0.002)
    assert left() == ({}, set())
    assert not descriptors_before.keys() - descriptors().keys(), "a descriptor that was not the test's was closed"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory with a small file, a large file, an empty file and a directory."""
    directory = tmp_path / "root"
    directory.mkdir()
    (directory / "small").write_bytes(SMALL)
    (directory / "large").write_bytes(LARGE)
    (directory / "empty").write_bytes(b"")
    (directory / "directory").mkdir()
    (directory / "directory" / "inner").write_bytes(b"inner")
    return directory


@pytest.fixture(params=["threadpool", "native"])
def engine(request: pytest.FixtureRequest) -> EngineName:
    """Each engine that there is."""
    name: EngineName = request.param
    return name


@pytest.fixture
def make_disk(nothing_left_behind: None, root: Path, engine: EngineName) -> Iterator[MakeDisk]:
    """Make disks on `root` with the given limits, with each engine; they are closed after the test."""
    disks = []

    def make(**limits: float) -> Disk:
        # Most tests are about the workers; those of inline reads ask for them.
        disks.append(Disk("d1", root, Limits(**{"inline": "off", "engine": engine, **limits})))  # type: ignore[arg-type]
        return disks[-1]

    yield make
    for disk in disks:
        disk.close()


@pytest.fixture
def gate(nothing_left_behind: None) -> Iterator[threading.Event]:
    """An event for blocking calls to wait for; set after the test in any case."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def run_script(tmp_path: Path) -> RunScript:
    """Run a Python program in a fresh interpreter, which has `timeout` seconds to end."""

    def run(text: str, *arguments: object, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "script.py"
        script.write_text(text)
        command = [sys.executable, str(script), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)

    return run
