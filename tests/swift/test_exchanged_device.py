"""A device is taken out, and another one put in its place, under a server that goes on. Needs root."""

from __future__ import annotations

import os
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("swift", reason="needs OpenStack Swift: pip install swift")

from diskread.swift import devices, files
from tests.faults.injectors import Dying

from .in_process import Server
from .objects import data_file, quiet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("policies")

SOON = devices.RECENTLY + 0.1


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Mounts an image by its name ("" none) on d1 in place of what is there."""
    if (reason := Dying.why_not()) is not None:
        pytest.skip(reason)
    place = tmp_path / "d1"
    place.mkdir()
    mounted = False

    def exchange(name: str) -> None:
        nonlocal mounted
        if mounted:
            subprocess.run(["umount", place], check=True)
            mounted = False
        if name:
            image = tmp_path / f"{name}.img"
            if not image.exists():
                image.touch()
                os.truncate(image, 64 << 20)
                subprocess.run(["mkfs.ext4", "-q", image], check=True)
            subprocess.run(["mount", "-o", "loop", image, place], check=True)
            mounted = True

    yield exchange
    if mounted:
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture
def server(tmp_path: Path, mount: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server whose only device has one object, which it remembers."""
    mount("first")
    monkeypatch.setattr(files, "SETTLE_NS", 0)
    server = Server(tmp_path, {"mount_check": "true"})
    assert server.ask("PUT", "d1/0/a/c/o", b"first").status == 201
    time.sleep(0.02)
    for _ in range(2):
        assert server.ask("GET", "d1/0/a/c/o").body == b"first"
    assert len(server.device("d1")._known) == 1
    quiet(server)
    return server


def test_of_a_device_that_was_taken_out_nothing_is_read(server: Server, mount: Callable[[str], None]) -> None:
    mount("")
    assert server.ask("GET", "d1/0/a/c/o").status == 507
    quiet(server)
    mount("first")
    time.sleep(SOON)
    assert server.ask("GET", "d1/0/a/c/o").body == b"first"


@pytest.mark.parametrize("verb", ["PUT", "POST", "DELETE", "REPLICATE"])
def test_nothing_is_written_where_none_is_mounted(server: Server, mount: Callable[[str], None], verb: str) -> None:
    mount("")
    found = server.ask(verb, "d1/0" if verb == "REPLICATE" else "d1/0/a/c/o", b"new" if verb == "PUT" else b"")
    assert found.status == 507
    assert os.listdir(server.directory / "d1") == []


def test_what_lies_below_the_mount_point_is_soon_not_read_any_more(
    server: Server, mount: Callable[[str], None]
) -> None:
    """Who forgot to mount a device may have written there."""
    mount("")
    path = server.directory / "d1"
    other = Server(server.directory, {"mount_check": "false"})
    assert other.ask("PUT", "d1/0/a/c/o", b"below").status == 201
    quiet(other)
    assert data_file(other).is_relative_to(path)
    time.sleep(SOON)
    ends = time.monotonic() + 2 * SOON
    while time.monotonic() < ends:
        assert server.ask("GET", "d1/0/a/c/o").status == 507


def test_another_device_has_other_objects(server: Server, mount: Callable[[str], None]) -> None:
    mount("second")
    assert server.ask("GET", "d1/0/a/c/o").status == 404
    assert server.ask("PUT", "d1/0/a/c/o", b"second").status == 201
    time.sleep(0.02)
    for _ in range(2):
        assert server.ask("GET", "d1/0/a/c/o").body == b"second"
    quiet(server)
    mount("first")
    assert server.ask("GET", "d1/0/a/c/o").body == b"first"


def test_what_may_be_read_inline_is_asked_of_each_device_anew(
    server: Server, mount: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.device("d1").disk.status.inline.on
    mount("")
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", server.directory / "d1"], check=True)
    try:
        time.sleep(SOON)
        assert server.ask("GET", "d1/0/a/c/o").status == 404
        status = server.device("d1").disk.status.inline
        assert not status.on
        assert status.reason is not None
        assert "tmpfs" in status.reason
        quiet(server)
    finally:
        subprocess.run(["umount", "--lazy", server.directory / "d1"], check=True)
    mount("first")
    time.sleep(SOON)
    assert server.ask("GET", "d1/0/a/c/o").body == b"first"
    assert server.device("d1").disk.status.inline.on
