"""Fixtures of the server's tests: a tree of files, a server that serves it, and a way to start others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from tests.server.raw_client import ServerProcess

if TYPE_CHECKING:
    from pathlib import Path

StartServer = Callable[..., ServerProcess]

SMALL = bytes(range(256)) * 4
LARGE = bytes(each % 251 for each in range(700_001))

#: File names that have come to grief in some server: as they are on the disk, and as a client writes them in a URL.
NAMES = {
    b"a b": "a%20b",
    "ü à Å ✓".encode(): "%C3%BC%20%C3%A0%20%C3%85%20%E2%9C%93",
    b"\xff\xfe not UTF-8": "%FF%FE%20not%20UTF-8",
    b"100%": "100%25",
    b"%41": "%2541",
    b"A": "%41",
    b"a,b": "a,b",
    b"a+b": "a+b",
    b"what?": "what%3F",
    b"#1": "%231",
    b"new\nline": "new%0Aline",
    b"semi;colon=1": "semi;colon=1",
    b"...": "...",
    b"back\\slash": "back%5Cslash",
}


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with everything that a path may name."""
    root = tmp_path_factory.mktemp("tree")
    (root / "small").write_bytes(SMALL)
    (root / "large").write_bytes(LARGE)
    (root / "empty").write_bytes(b"")
    (root / "page.html").write_bytes(b"<p>page</p>")
    (root / "archive.tar.gz").write_bytes(b"gz")
    (root / "directory").mkdir()
    (root / "directory" / "inner").write_bytes(b"inner")
    for name in NAMES:
        with open(os.fsencode(root) + b"/" + name, "wb") as file:
            file.write(b"named " + name)
    (root / "link").symlink_to("directory/inner")
    (root / "way out").symlink_to("/etc/hostname")
    (root / "circle").symlink_to("circle")
    os.mkfifo(root / "fifo")
    with open(root / "sparse", "wb") as file:
        file.truncate(100 * 1024 * 1024)
    return root


@pytest.fixture(scope="session")
def access_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the shared server writes its access log."""
    return tmp_path_factory.mktemp("log") / "access.log"


@pytest.fixture(scope="session")
def server(tree: Path, access_log: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server for all tests that leave it as it was: disk `d1`, disk `lost` without a root, simulated stalls."""
    directory = tmp_path_factory.mktemp("server")
    options = ["--disk", f"d1={tree}", "--disk", f"lost={tree}/nowhere", "--simulate", "--access-log", str(access_log)]
    running = ServerProcess(directory, *options)
    yield running
    assert running.stop() == 0, running.said()
    assert "Traceback" not in running.said(), running.said()


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """Start a server with options of one's own; it is gone after the test."""
    started = []

    def start(*options: str, **more: object) -> ServerProcess:
        started.append(ServerProcess(tmp_path, *options, **more))  # type: ignore[arg-type]  # for Popen
        return started[-1]

    yield start
    for each in started:
        each.kill()
