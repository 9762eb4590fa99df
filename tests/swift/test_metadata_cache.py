"""Objects that are remembered: the same answers as from the device, and without asking it."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("swift", reason="needs OpenStack Swift: pip install swift")

import eventlet
from eventlet import tpool
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from swift.common.exceptions import DiskFileDeleted
from swift.common.utils import Timestamp
from swift.obj import diskfile

from diskread.swift import devices, files
from diskread.swift.metadata_cache import SETTLE, Known, MetadataCache

from .in_process import Log, Server
from .objects import POLICIES, data_file, disk_file, put, quiet

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.usefixtures("policies"),
    # Where it fails to open an object, Swift leaves closing its file to the interpreter.
    pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

TICK = 0.02
"""Seconds after which a change has another time than the one before: the kernel's clock ticks every 10 ms or sooner."""


class Asked:
    """How often the device was asked to open something."""

    def __init__(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        device = server.device("d1")
        real = device.open
        self.times = 0

        def asked(*some: Any) -> Any:
            self.times += 1
            return real(*some)

        monkeypatch.setattr(device, "open", asked)

    def by(self, function: Callable[[], Any]) -> tuple[Any, int]:
        """What a function returns, and how often it asked."""
        before = self.times
        return function(), self.times - before


def made(directory: Path, monkeypatch: pytest.MonkeyPatch, **more: str) -> Server:
    """A server that remembers at once, where that is possible at all."""
    monkeypatch.setattr(files, "SETTLE_NS", 0)
    server = Server(directory, more)
    server.manager().get_dev_path("d1")
    status = server.device("d1").disk.status.inline
    if not status.on:
        pytest.skip(f"nothing is read inline: {status.reason}")
    return server


@pytest.fixture
def server(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    return made(directory, monkeypatch)


@pytest.fixture
def asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(server, monkeypatch)


def settled() -> None:
    time.sleep(TICK)


# -- what is remembered ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [0, 1])
@pytest.mark.parametrize("size", [0, 300_000])
def test_an_object_is_asked_for_once(server: Server, asked: Asked, policy: int, size: int) -> None:
    content = b"".join(POLICIES[1].pyeclib_driver.encode(bytes(max(size, 1)))[1:2]) if policy else os.urandom(size)
    put(server, content, policy=policy)
    settled()

    def read() -> tuple[bytes, Any, Any]:
        opened = disk_file(server, policy=policy).open()
        return b"".join(opened.reader()), opened.get_metadata(), opened.get_datafile_metadata()

    first, times = asked.by(read)
    assert (first[0], times) == (content, 1)
    again, times = asked.by(read)
    assert (again, times) == (first, 0)
    assert server.device("d1").disk.status.counts.timeouts == 0


def test_every_verb_that_reads(server: Server, asked: Asked) -> None:
    assert server.ask("PUT", "d1/0/a/c/o", b"content", {"X-Object-Meta-A": "b"}).status == 201
    settled()
    first = {verb: server.ask(verb, "d1/0/a/c/o") for verb in ("GET", "HEAD")}
    again, times = asked.by(lambda: {verb: server.ask(verb, "d1/0/a/c/o") for verb in ("GET", "HEAD")})
    assert times == 0
    assert again["GET"].body == b"content"
    for verb, answer in again.items():
        assert answer.status == 200
        assert dict(answer.headers) == dict(first[verb].headers)
    part, times = asked.by(lambda: server.ask("GET", "d1/0/a/c/o", headers={"Range": "bytes=2-4"}))
    assert (part.status, part.body, times) == (206, b"nte", 0)
    none, times = asked.by(lambda: server.ask("GET", "d1/0/a/c/o", headers={"If-None-Match": part.headers["ETag"]}))
    assert (none.status, times) == (304, 0)


def test_what_has_just_changed_is_not_remembered(
    directory: Path, server: Server, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SETTLE_NS", int(SETTLE * 1e9))
    put(server, b"content")
    for _ in range(3):
        assert asked.by(lambda: server.ask("GET", "d1/0/a/c/o").body) == (b"content", 1)
    time.sleep(SETTLE + TICK)
    assert asked.by(lambda: server.ask("GET", "d1/0/a/c/o").body) == (b"content", 1)
    assert asked.by(lambda: server.ask("GET", "d1/0/a/c/o").body) == (b"content", 0)


def test_what_is_handed_out_may_be_changed(server: Server) -> None:
    put(server, b"content")
    settled()
    for _ in range(3):
        opened = disk_file(server).open()
        for metadata in (opened.get_metadata(), opened.get_datafile_metadata()):
            assert "new" not in metadata
            metadata["new"] = metadata["ETag"] = "changed"
        with opened:
            pass
    assert server.ask("GET", "d1/0/a/c/o").body == b"content"


def test_no_more_than_the_setting_says(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = made(directory, monkeypatch, diskread_metadata_cache="2")
    asked = Asked(server, monkeypatch)
    for name in "abc":
        put(server, name.encode(), name=name)
    settled()
    for _ in range(2):
        for name in "abc":
            assert server.ask("GET", f"d1/0/a/c/{name}").body == name.encode()
    assert len(server.device("d1")._known) == 2
    assert asked.by(lambda: server.ask("GET", "d1/0/a/c/c").body) == (b"c", 0)
    assert asked.by(lambda: server.ask("GET", "d1/0/a/c/a").body) == (b"a", 1)


@pytest.mark.parametrize(("setting", "value"), [("diskread_metadata_cache", "0"), ("diskread_inline", "off")])
def test_nothing_is_remembered_where_that_is_switched_off(
    directory: Path, monkeypatch: pytest.MonkeyPatch, setting: str, value: str
) -> None:
    monkeypatch.setattr(files, "SETTLE_NS", 0)
    server = Server(directory, {setting: value})
    asked = Asked(server, monkeypatch)
    put(server, b"content")
    settled()
    for _ in range(3):
        assert asked.by(lambda: server.ask("GET", "d1/0/a/c/o").body) == (b"content", 1)
    assert len(server.device("d1")._known) == 0


def test_the_least_recently_used_is_forgotten_first() -> None:
    cache = MetadataCache(2)
    first, second, third = (Known(name, b"", {}) for name in (b"1", b"2", b"3"))
    cache.remember("1", first)
    cache.remember("2", second)
    assert cache.get("1") is first
    cache.remember("3", third)
    assert [cache.get(each) for each in "123"] == [first, None, third]
    cache.remember("1", third)
    assert (len(cache), cache.get("1")) == (2, third)
    cache.forget("1")
    cache.forget("1")
    assert (len(cache), cache.get("1")) == (1, None)


# -- what has changed --------------------------------------------------------------------------------------------------


def answer(server: Server) -> tuple[int, bytes, dict[str, str]]:
    """What a client gets: status, body, and the headers that do not tell the time of the answer."""
    found = server.ask("GET", "d1/0/a/c/o")
    return found.status, found.body, {key: value for key, value in found.headers.items() if key != "Date"}


def stock(server: Server) -> Server:
    """A server that remembers nothing, on the same devices."""
    other = Server(server.directory, server.settings, Log())
    for policy in POLICIES:
        other.app._diskfile_router.policy_to_manager[int(policy)] = diskfile.DiskFileManager(other.conf, Log())
    return other


def write_in_place(server: Server) -> None:
    data_file(server).write_bytes(b"CONTENT")


def add_a_checksum(server: Server) -> None:
    os.setxattr(data_file(server), "user.swift.metadata_checksum", b"0" * 32)


CHANGES: dict[str, Callable[[Server], object]] = {
    "PUT": lambda server: server.ask("PUT", "d1/0/a/c/o", b"new"),
    "POST": lambda server: server.ask("POST", "d1/0/a/c/o", headers={"X-Object-Meta-Color": "green"}),
    "DELETE": lambda server: server.ask("DELETE", "d1/0/a/c/o"),
    "content": write_in_place,
    "size": lambda server: os.truncate(data_file(server), 3),
    "metadata": lambda server: os.setxattr(data_file(server), "user.swift.metadata", b"no pickle"),
    "checksum": add_a_checksum,
    "no file": lambda server: data_file(server).unlink(),
    "no directory": lambda server: data_file(server).parent.rename(server.directory / "away"),
    "no partition": lambda server: (server.directory / "d1/objects").rename(server.directory / "away"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_has_changed_is_seen_at_once(server: Server, asked: Asked, change: str) -> None:
    put(server, b"content")
    settled()
    before = answer(server)
    assert asked.by(lambda: answer(server)) == (before, 0)
    CHANGES[change](server)
    after = answer(server)
    assert after != before
    if change not in ("content", "size", "metadata", "checksum"):  # of which the first who sees it has quarantined it
        assert after == answer(stock(server))
    assert asked.times


def test_an_object_that_expires_while_it_is_remembered(server: Server) -> None:
    soon = str(int(time.time()) + 2)
    assert server.ask("PUT", "d1/0/a/c/o", b"content", {"X-Delete-At": soon}).status == 201
    settled()
    for _ in range(2):
        assert server.ask("GET", "d1/0/a/c/o").status == 200
    quiet(server)
    before = len(os.listdir("/proc/self/fd"))
    time.sleep(max(0.0, int(soon) - time.time()) + 0.1)
    for _ in range(20):
        found = server.ask("GET", "d1/0/a/c/o")
        assert found.status == 404
        assert "X-Backend-Timestamp" in found.headers
    quiet(server)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_another_name_for_the_same_directory_is_a_collision_as_ever(server: Server) -> None:
    put(server, b"content")
    settled()
    for _ in range(2):
        assert server.ask("GET", "d1/0/a/c/o").status == 200
    manager = server.manager()
    path = str(data_file(server).parent)
    wrong = manager.diskfile_cls(
        manager, server.device("d1").path, "0", "a", "c", "other", policy=POLICIES[0], _datadir=path
    )
    with pytest.raises(Exception, match="does not match") as raised:
        wrong.open()
    assert type(raised.value).__name__ == "DiskFileCollision"
    found = manager.get_diskfile_from_hash("d1", "0", os.path.basename(path), POLICIES[0])
    assert found.open().get_metadata()["name"] == "/a/c/o"


def test_what_is_not_in_the_dentry_cache_is_opened_by_a_worker(
    server: Server, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(server, b"content")
    settled()
    assert server.ask("GET", "d1/0/a/c/o").body == b"content"
    with monkeypatch.context() as patch:  # what the kernel keeps of it is not ours to say
        patch.setattr(devices, "reopen_object", lambda *_: -errno.EAGAIN)
        misses = server.device("d1").disk.status.inline.misses
        assert asked.by(lambda: server.ask("GET", "d1/0/a/c/o").body) == (b"content", 1)
        assert server.device("d1").disk.status.inline.misses > misses
    assert asked.by(lambda: server.ask("GET", "d1/0/a/c/o").body) == (b"content", 0)


def test_where_it_may_not_be_opened_that_is_not_tried_for_ever(
    server: Server, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(server, b"content")
    settled()
    assert server.ask("GET", "d1/0/a/c/o").body == b"content"
    with monkeypatch.context() as patch:
        patch.setattr(devices, "reopen_object", lambda *_: -errno.ENOSYS)
        assert asked.by(lambda: server.ask("GET", "d1/0/a/c/o").body) == (b"content", 1)
    status = server.device("d1").disk.status.inline
    assert not status.on
    assert status.reason == "the file system has answered ENOSYS"
    assert asked.by(lambda: server.ask("GET", "d1/0/a/c/o").body) == (b"content", 1)


STEPS = st.lists(st.sampled_from(["PUT", "POST", "DELETE", "GET", "HEAD", "GET", "auditor"]), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_no_sequence_of_requests_tells_it_from_a_server_that_remembers_nothing(
    server: Server, steps: list[str]
) -> None:
    other = stock(server)
    name = f"d1/0/a/c/{time.monotonic_ns()}"
    for number, step in enumerate(steps):
        if step in ("GET", "HEAD"):
            for _ in range(2):
                mine, theirs = server.ask(step, name), other.ask(step, name)
                assert (mine.status, mine.body) == (theirs.status, theirs.body)
                headers = ({k: v for k, v in each.headers.items() if k != "Date"} for each in (mine, theirs))
                assert next(headers) == next(headers)
        elif step == "auditor":
            for each in server.manager().object_audit_location_generator(POLICIES[0], device_dirs=["d1"]):
                found = server.manager().get_diskfile_from_audit_location(each)
                with contextlib.suppress(DiskFileDeleted), found.open():
                    pass
        else:
            body = str(number).encode() if step == "PUT" else b""
            stamp = {"X-Timestamp": Timestamp.now().internal, "X-Object-Meta-Number": str(number)}
            assert server.ask(step, name, body, stamp).status in (201, 202, 204, 404)
            eventlet.sleep(TICK)


def test_elsewhere_nothing_is_taken_from_it(server: Server) -> None:
    """It belongs to the thread of the hub."""
    put(server, b"content")
    settled()
    assert server.ask("GET", "d1/0/a/c/o").body == b"content"
    assert tpool.execute(server.device("d1").reopen, str(data_file(server).parent)) is None
    known = next(iter(server.device("d1")._known._known.values()))
    tpool.execute(server.device("d1").remember, "elsewhere", known)
    assert len(server.device("d1")._known) == 1
