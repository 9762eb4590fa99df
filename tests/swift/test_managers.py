"""The managers that Swift loads: same files as the stock ones, slots and deadlines, and nothing left behind."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import threading
import time
import weakref
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("swift", reason="needs OpenStack Swift: pip install swift")

import eventlet
from eventlet import tpool
from swift.common.exceptions import (
    DiskFileDeviceUnavailable,
    DiskFileError,
    DiskFileNotExist,
    DiskFileQuarantined,
    PartitionLockTimeout,
    ReplicationLockTimeout,
)
from swift.common.utils import md5
from swift.obj import diskfile

from diskread.swift import _object, devices, files, managers
from diskread.swift.configuration import read_settings
from diskread.swift.errors import DeviceOffline, DeviceTimeout

from .in_process import Log, Server, heartbeat
from .objects import POLICIES, data_file, disk_file, put, quiet, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.usefixtures("policies"),
    # Where it fails to open an object, Swift leaves closing its file to the interpreter.
    pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

DEADLINE = 0.3
LATE = 5.0
SEGMENT = 1 << 20  # bytes that are coded at a time, Swift's default


@pytest.fixture
def server(directory: Path) -> Server:
    return Server(directory, {"diskread_deadline": str(DEADLINE)})


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# -- the same objects ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [0, 1])
@pytest.mark.parametrize("size", [0, 1, 65536, 300_000, 3 << 20])
def test_what_is_written_is_read_back(server: Server, policy: int, size: int) -> None:
    content = os.urandom(size)
    if policy:
        # Readers check the fragments of an archive, so these have to be some.
        segments = [content[at : at + SEGMENT] for at in range(0, len(content), SEGMENT)] or [b"x"]
        content = b"".join(POLICIES[1].pyeclib_driver.encode(segment)[1] for segment in segments)
    put(server, content, policy=policy)
    stock_class = diskfile.ECDiskFileManager if policy else diskfile.DiskFileManager
    stock = stock_class(server.conf, Log())
    for manager in (server.manager(policy), stock):
        opened = manager.get_diskfile("d1", "0", "a", "c", "o", POLICIES[policy]).open()
        assert opened.content_length == len(content)
        assert b"".join(opened.reader()) == content
    assert stock.get_hashes("d1", "0", [], POLICIES[policy]) == server.manager(policy).get_hashes(
        "d1", "0", [], POLICIES[policy]
    )


def test_the_shortcut_is_taken_for_a_plain_object_only(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of the tests: without this, all others might take the long way."""
    taken: list[Any] = []

    def open_object(*some: Any) -> Any:
        taken.append(_object.open_object(*some))
        return taken[-1]

    monkeypatch.setattr(files, "open_object", open_object)
    put(server, b"content")
    disk_file(server).open().__exit__(None, None, None)
    assert taken.pop()[4] == b"content"
    server.ask("POST", "d1/0/a/c/o", headers={"X-Object-Meta-Color": "green"})
    assert disk_file(server).read_metadata()["X-Object-Meta-Color"] == "green"
    assert taken.pop() is None


def test_ranges(server: Server) -> None:
    content = os.urandom(2_000_000)
    put(server, content)
    for given, expected in (
        ("bytes=0-0", content[:1]),
        ("bytes=100-999999", content[100:1_000_000]),
        ("bytes=262143-262145", content[262143:262146]),
        ("bytes=1999990-", content[-10:]),
        ("bytes=-5", content[-5:]),
        ("bytes=0-1999999", content),
    ):
        answer = server.ask("GET", "d1/0/a/c/o", headers={"Range": given})
        assert (answer.status, answer.body) == (206, expected)
    several = server.ask("GET", "d1/0/a/c/o", headers={"Range": "bytes=0-4,300000-300009"})
    assert several.status == 206
    assert content[:5] in several.body
    assert content[300_000:300_010] in several.body
    assert not (server.directory / "d1/quarantined").exists()


def test_a_byte_of_a_large_object_costs_no_more_than_a_little(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    put(server, bytes(4 << 20))
    reader = disk_file(server).open().reader()
    reader._fp._reader = None  # as if nothing were in the page cache
    asked = []
    device = server.device("d1")
    real = device.use

    def use(*some: Any, **more: Any) -> Any:
        asked.append(some[3])
        return real(*some, **more)

    monkeypatch.setattr(device, "use", use)
    assert b"".join(reader.app_iter_range(3 << 20, (3 << 20) + 1)) == b"\0"
    assert asked[0] == 1 << 16


@pytest.mark.parametrize("damage", ["checksum", "pickle", "size", "name"])
def test_what_is_damaged_is_quarantined(server: Server, damage: str) -> None:
    put(server, b"content")
    path = data_file(server)
    if damage == "checksum":
        os.setxattr(path, "user.swift.metadata_checksum", b"0" * 32)
    elif damage == "pickle":
        os.setxattr(path, "user.swift.metadata", b"no pickle")
        os.removexattr(path, "user.swift.metadata_checksum")
    elif damage == "size":
        os.truncate(path, 3)
    else:
        known = diskfile.read_metadata(path)
        os.setxattr(path, "user.swift.metadata", b"")
        diskfile.write_metadata(path, {key: value for key, value in known.items() if key != "name"})
    before = descriptors()
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(DiskFileQuarantined):
            disk_file(server).open()
        quiet(server)
        assert descriptors() <= before  # nothing is left for the garbage collector to close in the hub
    finally:
        gc.enable()
    assert list((server.directory / "d1/quarantined").rglob("*.data"))


def test_an_object_whose_file_cannot_be_opened(server: Server) -> None:
    """The stock method passes over this error, and its callers find out by a KeyError."""
    put(server, b"content")
    path = data_file(server)
    path.unlink()
    path.symlink_to(path.name)
    with pytest.raises(DiskFileError, match=r"\.data cannot be opened"):
        disk_file(server).open()


def test_an_object_whose_content_is_damaged_is_quarantined_by_who_reads_it(server: Server) -> None:
    put(server, b"content")
    with open(data_file(server), "r+b") as file:
        file.write(b"C")
    assert server.ask("GET", "d1/0/a/c/o").body == b"Content"
    assert server.ask("GET", "d1/0/a/c/o").status == 404
    assert list((server.directory / "d1/quarantined").rglob("*.data"))


def test_every_verb(server: Server) -> None:
    assert server.ask("GET", "d1/0/a/c/o").status == 404
    assert server.ask("PUT", "d1/0/a/c/o", b"one").status == 201
    assert server.ask("POST", "d1/0/a/c/o", headers={"X-Object-Meta-A": "b"}).status == 202
    head = server.ask("HEAD", "d1/0/a/c/o")
    assert (head.status, head.headers["X-Object-Meta-A"]) == (200, "b")
    assert server.ask("REPLICATE", "d1/0").status == 200
    assert server.ask("DELETE", "d1/0/a/c/o").status == 204
    assert server.ask("GET", "d1/0/a/c/o").status == 404
    assert server.ask("GET", "nowhere/0/a/c/o").status == 507


# -- a hang ----------------------------------------------------------------------------------------------------------


def hang_its_open(server: Server) -> Path:
    """Put a FIFO in place of the file of an object: whoever opens that to read it waits for a writer.

    Returns:
        Another name of it: the first worker that goes on finds that it is no file, and moves the object away.
    """
    put(server, b"content")
    path, fifo = data_file(server), server.directory / "fifo"
    path.unlink()
    os.mkfifo(fifo)
    path.hardlink_to(fifo)
    return fifo


@pytest.fixture
def fifo(server: Server) -> Iterator[Path]:
    """An object that hangs when it is opened."""
    path = hang_its_open(server)
    yield path
    # Whoever waits to open it for reading goes on with that.
    until(lambda: _nobody_waits(server, path), "the workers to return")


def _nobody_waits(server: Server, path: Path) -> bool:
    with contextlib.suppress(OSError):  # nobody waits any more
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    return not server.device("d1").disk.status.load.in_flight


def test_a_missed_deadline_is_503_and_holds_up_nobody(server: Server, fifo: Path) -> None:
    assert server.ask("PUT", "d2/0/a/c/o", b"well").status == 201
    with heartbeat() as gaps:
        answer = server.ask("GET", "d1/0/a/c/o")
        well = server.ask("GET", "d2/0/a/c/o")
    assert answer.status == 503
    assert b"missed its deadline" in answer.body
    assert DEADLINE * 0.9 <= answer.seconds < LATE
    assert (well.status, well.body) == (200, b"well")
    assert max(gaps) < LATE / 2


def test_slots_are_a_bound_and_so_is_the_line(directory: Path) -> None:
    limits = {"diskread_deadline": "20", "diskread_threads": "2", "diskread_queue": "1"}
    server = Server(directory, limits)
    path = hang_its_open(server)
    asked = [eventlet.spawn(server.ask, "GET", "d1/0/a/c/o") for _ in range(3)]
    until(lambda: server.device("d1").disk.status.load.waiting == 1, "two to hang and one to wait")
    before = threading.active_count()
    answer = server.ask("GET", "d1/0/a/c/o")
    assert answer.status == 503
    assert answer.seconds < LATE
    assert b"slots are taken" in answer.body
    assert "diskread.d1.busy" in server.log.counted
    assert server.device("d1").disk.status.load.threads == 2
    assert threading.active_count() == before
    until(lambda: _nobody_waits(server, path), "the workers to return")
    for each in asked:
        each.wait()


def test_a_stuck_device_is_known_to_all_policies(server: Server, fifo: Path) -> None:
    assert server.manager(0).device("d1") is server.manager(1).device("d1")
    assert server.ask("GET", "d1/0/a/c/o").status == 503
    assert server.manager(1).device("d1").disk.status.load.stuck == 1


def test_a_file_that_is_opened_too_late_is_closed(server: Server, fifo: Path) -> None:
    before = descriptors()
    assert server.ask("GET", "d1/0/a/c/o").status == 503
    until(lambda: _nobody_waits(server, fifo), "the worker to return")
    until(lambda: descriptors() <= before, "the descriptors to be closed")


def test_a_killed_green_thread_leaves_at_once(server: Server, fifo: Path) -> None:
    thread = eventlet.spawn(server.ask, "GET", "d1/0/a/c/o")
    until(lambda: bool(server.device("d1").disk.status.load.in_flight), "it to hang")
    begin = time.monotonic()
    thread.kill()
    assert time.monotonic() - begin < LATE
    assert server.device("d1").disk.status.counts.abandoned == 1


# -- where blocking does not matter ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["tpool", "thread"])
def test_elsewhere_everything_is_done_on_the_spot(server: Server, where: str) -> None:
    """The replicator hashes in eventlet's tpool, the relinker has no hub at all."""
    put(server, b"content")

    def work() -> tuple[bytes, Any, bool]:
        put(server, b"other", name="other")
        opened = disk_file(server).open()
        with server.manager().partition_lock("d1", POLICIES[0], "0", name="mine", timeout=1):
            hashes = server.manager().get_hashes("d1", "0", [], POLICIES[0])
        return b"".join(opened.reader()), hashes, server.device("d1").here()

    if where == "tpool":
        content, hashes, here = tpool.execute(work)
    else:
        found: list[Any] = []
        thread = eventlet.patcher.original("threading").Thread(target=lambda: found.append(work()))
        thread.start()
        thread.join()
        content, hashes, here = found[0]
    assert content == b"content"
    assert len(hashes) in (1, 2)
    assert not here
    assert b"".join(disk_file(server, "other").open().reader()) == b"other"


def test_a_file_opened_on_the_hub_can_be_read_elsewhere(server: Server) -> None:
    put(server, bytes(500_000))
    reader = disk_file(server).open().reader()
    assert tpool.execute(lambda: b"".join(reader)) == bytes(500_000)


# -- locks -----------------------------------------------------------------------------------------------------------


def test_a_lock_waits_without_a_slot_and_is_that_of_swift(server: Server) -> None:
    path = server.directory / "d1/objects/7"
    path.mkdir(parents=True)
    with open(path / ".lock-reconstruct", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with (
            pytest.raises(PartitionLockTimeout),
            server.manager().partition_lock("d1", POLICIES[0], "7", name="reconstruct", timeout=0.3),
        ):
            pass
        waiting = eventlet.spawn(_hold, server)
        eventlet.sleep(0.3)
        assert server.device("d1").disk.status.load.in_flight == 0
        fcntl.flock(other, fcntl.LOCK_UN)
        assert waiting.wait()
    with server.manager().replication_lock("d1", POLICIES[0], "7"):
        server.manager().replication_lock_timeout = 0
        with pytest.raises(ReplicationLockTimeout), server.manager().replication_lock("d1", POLICIES[0], "8"):
            pass


def test_no_lock_is_taken_where_no_device_is_mounted(server: Server) -> None:
    manager = server.manager()
    manager.mount_check = True
    with pytest.raises(DiskFileDeviceUnavailable), manager.partition_lock("d1", POLICIES[0], "7"):
        pass
    with pytest.raises(DiskFileDeviceUnavailable), manager.replication_lock("d1", POLICIES[0], "7"):
        pass
    assert os.listdir(server.directory / "d1") == []


def _hold(server: Server) -> bool:
    with server.manager().partition_lock("d1", POLICIES[0], "7", name="reconstruct", timeout=20):
        return True


# -- what stays ------------------------------------------------------------------------------------------------------


def test_names_of_devices_that_there_are_none_of_do_not_stay(server: Server) -> None:
    threads = threading.active_count()
    before = descriptors()
    for number in range(50):
        assert server.ask("GET", f"no{number}/0/a/c/o").status == 507
    gc.collect()
    assert len(server.manager()._devices._devices) == 0
    until(lambda: threading.active_count() <= threads, "the threads to leave")
    assert descriptors() <= before


def test_files_are_closed_together(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    put(server, b"content")
    device, before = server.device("d1"), descriptors()
    closings = []
    real = device._disk.run

    def run(*some: Any) -> Any:
        closings.append(some)
        return real(*some)

    monkeypatch.setattr(device._disk, "run", run)
    begin = time.monotonic()
    for _ in range(20):
        assert server.ask("GET", "d1/0/a/c/o").body == b"content"
    quiet(server)
    assert descriptors() <= before
    assert len(closings) <= (time.monotonic() - begin) / devices.CLOSE_WITHIN + 1


def test_a_writer_that_is_given_up_leaves_nothing(server: Server) -> None:
    before = descriptors()
    writer = disk_file(server).writer(size=10)
    writer.open()
    writer.write(b"12345")
    writer.close()
    until(lambda: descriptors() <= before, "the descriptor to be closed")
    assert [path for path in (server.directory / "d1").rglob("*") if path.is_file()] == []
    with pytest.raises(ValueError, match="not open"):
        writer.write(b"more")


def test_a_device_that_nobody_uses_any_more_lets_its_threads_go(directory: Path) -> None:
    threads = threading.active_count()
    server = Server(directory)
    put(server, b"content")
    device = weakref.ref(server.device("d1"))
    del server

    def gone() -> bool:
        gc.collect()
        return device() is None

    until(gone, "the device to go")
    until(lambda: threading.active_count() <= threads, "the threads to leave")


def test_the_worker_that_used_eventlet_ends_without_a_trace(directory: Path) -> None:
    """What stock methods do there makes hubs; greenlets that outlive their thread crash the garbage collector."""
    for _ in range(10):
        server = Server(directory)
        put(server, b"content")
        server.device("d1").run(eventlet.sleep, 0.001)
        del server
        gc.collect()
        eventlet.sleep(0.01)
        assert [[[]] for _ in range(1000)]
    gc.collect()


# -- what Swift's operators see ----------------------------------------------------------------------------------------


def test_splice_is_off(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stock(self: Any, conf: Any, logger: Any) -> None:
        real(self, conf, logger)
        self.use_splice = True

    real = diskfile.BaseDiskFileManager.__init__
    monkeypatch.setattr(diskfile.BaseDiskFileManager, "__init__", stock)
    log = Log()
    assert not managers.DiskFileManager({"devices": str(directory)}, log).use_splice
    assert any("splice is not used" in line for line in log.told)


def test_entry_points() -> None:
    found = {each.name: each for each in entry_points(group="swift.diskfile") if each.value.startswith("diskread.")}
    if not found:
        pytest.skip("diskread is not installed: python -m pip install -e .")
    assert found["replication.fs"].load() is managers.DiskFileManager
    assert found["erasure_coding.fs"].load() is managers.ECDiskFileManager
    apps = [each for each in entry_points(group="paste.app_factory") if each.value.startswith("diskread.")]
    assert [each.name for each in apps] == ["object"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("diskread_deadlin", "1", "there is no setting diskread_deadlin; there are diskread_deadline, "),
        ("diskread_deadline", "soon", "diskread_deadline must be a number, not 'soon'"),
        ("diskread_deadline", "-1", "diskread_deadline must be a positive number of seconds, not -1.0"),
        ("diskread_deadline", "nan", "diskread_deadline must be a number, not 'nan'"),
        ("diskread_threads", "2.5", "diskread_threads must be a whole number, not '2.5'"),
        ("diskread_threads", "0", "diskread_threads must be between 1 and 10000, not 0"),
        ("diskread_inline", "maybe", "diskread_inline must be 'auto' or 'off', not 'maybe'"),
        ("diskread_hash_deadline", "0", "diskread_hash_deadline must be a positive number of seconds, not 0.0"),
        ("diskread_read_size", "1", "diskread_read_size must be between 4096 and 67108864 bytes, not 1"),
    ],
)
def test_a_wrong_setting_ends_the_start_with_its_name(directory: Path, key: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as raised:
        Server(directory, {key: value})
    assert str(raised.value).startswith(message)


def test_settings() -> None:
    assert read_settings({"devices": "/srv"}).limits.deadline == 5
    settings = read_settings({"diskread_threads": "3", "diskread_deadline": "2", "diskread_read_size": "65536"})
    assert (settings.limits.threads, settings.limits.deadline, settings.read_size) == (3, 2.0, 65536)


def test_errors_are_what_handlers_and_daemons_know() -> None:
    late, off = DeviceTimeout("d1: missed its deadline"), DeviceOffline("d1: offline")
    assert late.status_int == 503
    assert isinstance(late, DiskFileError)
    assert str(late) == "d1: missed its deadline"
    assert isinstance(off, DiskFileDeviceUnavailable)
    assert not isinstance(late, DiskFileNotExist)


def test_the_etag_is_that_of_the_content(server: Server) -> None:
    content = os.urandom(2_500_000)
    answer = server.ask("PUT", "d1/0/a/c/o", content)
    assert answer.headers["ETag"].strip('"') == md5(content, usedforsecurity=False).hexdigest()
    assert server.ask("GET", "d1/0/a/c/o").body == content
