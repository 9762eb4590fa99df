"""Mirrors over HTTP: which disk has answered, what clients can rely on, what operators see."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from server.table import tables

from .raw_client import until

if TYPE_CHECKING:
    from pathlib import Path

    from .conftest import StartServer
    from .raw_client import ServerProcess

CONTENT = os.urandom(900_000)
SMALL = b"small" * 100
MTIME_NS = 1_700_000_000_123_456_789


@pytest.fixture
def roots(tmp_path: Path) -> dict[str, Path]:
    """Two disks with the same files."""
    found = {name: tmp_path / name for name in "ab"}
    for root in found.values():
        root.mkdir()
        for name, content in (("large", CONTENT), ("small", SMALL)):
            (root / name).write_bytes(content)
            os.utime(root / name, ns=(MTIME_NS, MTIME_NS))
    return found


@pytest.fixture
def mirrored(start_server: StartServer, roots: dict[str, Path], tmp_path: Path) -> ServerProcess:
    """A server with these two disks and a mirror of them."""
    config = tmp_path / "diskread.toml"
    lines = [f'[disk.{name}]\nroot = "{root}"' for name, root in roots.items()]
    lines += ["[mirror.m]", 'disks = ["a", "b"]', "hedge_after = inf"]
    config.write_text("\n".join(lines))
    return start_server("--config", str(config), "--admin-socket", str(tmp_path / "admin"))


def test_the_disks_take_turns_and_look_like_one(mirrored: ServerProcess) -> None:
    answered, described = set(), set()
    for _ in range(60):
        response = mirrored.http("/v1/m/large")
        assert (response.status, response.body) == (200, CONTENT)
        answered.add(response.headers["Diskread-Disk"])
        described.add((response.headers["ETag"], response.headers["Last-Modified"]))
    assert answered == {"a", "b"}
    assert len(described) == 1, "a copy that is as fresh must have the same ETag, whichever disk it came from"
    etag = described.pop()[0]
    for _ in range(4):
        response = mirrored.http("/v1/m/large", {"If-None-Match": etag})
        assert (response.status, response.body) == (304, b"")
        response = mirrored.http("/v1/m/large", {"If-Range": etag, "Range": "bytes=5-14"})
        assert (response.status, response.body) == (206, CONTENT[5:15])
        assert response.headers["Diskread-Disk"] in "ab"
    assert "Diskread-Disk" not in mirrored.http("/v1/a/large").headers


def test_a_small_cached_file_takes_the_short_way(mirrored: ServerProcess) -> None:
    for disk in "ab":
        mirrored.wait_for_first_answer(disk)
        inline = mirrored.disk(disk).inline
        assert inline is not None
        if not inline.on:
            pytest.skip(str(inline.reason))
        assert mirrored.http(f"/v1/{disk}/small").body == SMALL  # the first visit opens the root
    answered = set()
    for _ in range(100):
        with mirrored.connect() as connection:
            connection.send(b"GET /v1/m/small HTTP/1.1\r\nHost: x\r\n\r\n")
            connection.half_close()
            found = re.search(rb"\r\nETag: .*\r\nDiskread-Disk: ([ab])\r\n", connection.rest(), re.DOTALL)
        if found is not None:  # the application would have written both in small letters
            answered.add(found[1])
    assert answered == {b"a", b"b"}


def test_head_and_small_files(mirrored: ServerProcess) -> None:
    for _ in range(20):
        with mirrored.connect() as connection:
            connection.send(b"GET /v1/m/small HTTP/1.1\r\nHost: x\r\n\r\n")
            response = connection.response()
        assert (response.status, response.body) == (200, SMALL)
        assert response.headers["Diskread-Disk"] in "ab"
        odd = mirrored.http("/v1/m/small", {"X-Odd": "1"})
        assert {name: odd.headers[name] for name in ("ETag", "Last-Modified", "Content-Type")} == {
            name: response.headers[name] for name in ("ETag", "Last-Modified", "Content-Type")
        }
    response = mirrored.http("/v1/m/large", method="HEAD")
    assert (response.status, response.headers["Content-Length"]) == (200, str(len(CONTENT)))
    assert response.headers["Diskread-Disk"] in "ab"
    assert mirrored.http("/v1/m/none").status == 404
    assert mirrored.http("/v1/none/large").status == 404


def test_a_disk_that_is_not_there_from_the_start(
    start_server: StartServer, roots: dict[str, Path], tmp_path: Path
) -> None:
    roots["a"].rename(tmp_path / "gone")
    config = tmp_path / "diskread.toml"
    config.write_text(
        f'[disk.a]\nroot = "{roots["a"]}"\n[disk.b]\nroot = "{roots["b"]}"\n[mirror.m]\ndisks = ["a", "b"]\n'
    )
    server = start_server("--config", str(config))
    assert server.http("/v1/a/large").status == 503
    for _ in range(10):
        response = server.http("/v1/m/large")
        assert (response.status, response.body) == (200, CONTENT)
        assert response.headers["Diskread-Disk"] == "b"
    assert server.stop() == 0


def test_operators_see_what_it_does(mirrored: ServerProcess) -> None:
    for _ in range(20):
        mirrored.http("/v1/m/large")
    (mirror,) = mirrored.status().mirrors
    assert (mirror.name, mirror.disks, mirror.accepting) == ("m", ["a", "b"], True)
    assert (mirror.hedge_after, mirror.hedge_share) == (None, 0.05)
    assert mirror.reads >= 20
    assert set(mirror.answers) == set(mirror.failovers) == {"a", "b"}
    assert sum(mirror.answers.values()) >= 20
    assert (mirror.hedges, mirror.hedges_won, mirror.hedges_refused) == (0, 0, 0)
    metrics = mirrored.http("/metrics").body.decode()
    for name in ("reads", "hedges", "hedges_won", "hedges_refused"):
        assert re.search(rf'^diskread_mirror_{name}_total{{mirror="m"}} \d', metrics, re.MULTILINE), name
    for name in ("failovers", "answers"):
        for disk in "ab":
            assert f'diskread_mirror_{name}_total{{disk="{disk}",mirror="m"}}' in metrics
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - nobody reads it
    console.print(tables(mirrored.status(), "title"))
    console.file.close()
    shown = console.export_text()
    assert "fail-overs" in shown
    assert re.search(rf"^\s*m +a +{mirror.answers['a']} ", shown, re.MULTILINE)
    assert "mirror m: a, b" in mirrored.said()
    page = mirrored.http("/").body
    assert b"The mirrors of this server" in page


def test_a_server_without_mirrors_shows_none(start_server: StartServer, tree: Path) -> None:
    server = start_server("--disk", f"d1={tree}")
    until(lambda: server.disk("d1").state == "online", "the disk")
    assert server.status().mirrors == []
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - nobody reads it
    console.print(tables(server.status(), "title"))
    console.file.close()
    assert "hedges" not in console.export_text()
