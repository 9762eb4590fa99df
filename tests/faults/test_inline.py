"""Inline reads while the device has stopped: whatever is cached is served, and the hub is never held up.

A call that blocks leaves a trace that preemption on a busy machine does not leave: a voluntary context switch of the
thread (getrusage(2), RUSAGE_THREAD). So that is what tells a hub that was held up from one that was not running.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import resource
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from diskread import Disk, DiskOffline, Limits
from diskread.health import State
from diskread.swift._object import open_object, reopen_object
from tests.conftest import until

from .conftest import set_up
from .injectors import Dying, drop_cached

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from .injectors import Kind

Result = TypeVar("Result")

PAGE = 4096
LARGE = 4 * 1024 * 1024
READS = 10_000
LONGEST_PAUSE = 0.02


def switches() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


class Pauses:
    """How long calls on the hub's thread took, and how many of them have waited for something."""

    def __init__(self) -> None:
        self.longest = 0.0
        self.blocked = 0

    def measure(self, call: Callable[..., Result], *arguments: Any) -> Result:
        before, began = switches(), time.monotonic()
        result = call(*arguments)
        took = time.monotonic() - began
        self.longest = max(self.longest, took)
        self.blocked += took > LONGEST_PAUSE and switches() > before
        return result


@pytest.fixture
def content(tmp_path: Path) -> Path:
    directory = tmp_path / "content"
    directory.mkdir()
    for number in range(8):
        (directory / f"f{number}").write_bytes(random.Random(number).randbytes(LARGE))
    return directory


@pytest.fixture
def dying(content: Path) -> Iterator[Dying]:
    with set_up(Dying, content) as disk:
        yield disk


@contextlib.contextmanager
def tags_used_up(root: Path, count: int = 200) -> Iterator[None]:
    """More requests outstanding than the device has tags: who sends one more waits for a tag, whatever its flags."""

    def read(number: int) -> None:
        descriptor = os.open(root / f"f{2 + number % 6}", os.O_RDONLY | os.O_DIRECT)
        with mmap.mmap(-1, PAGE) as block, contextlib.suppress(OSError):
            os.preadv(descriptor, [block], number // 6 * 65536 % LARGE)
        os.close(descriptor)

    threads = [threading.Thread(target=read, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    yield
    for thread in threads:
        thread.join(60)


@contextlib.contextmanager
def kept_in_memory(path: Path) -> Iterator[None]:
    """Have all of a file in the page cache, and keep the kernel from taking any of it back (mlock(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    descriptor = os.open(path, os.O_RDONLY)
    size = os.fstat(descriptor).st_size
    address = libc.mmap(None, ctypes.c_size_t(size), mmap.PROT_READ, mmap.MAP_SHARED, descriptor, ctypes.c_long(0))
    os.close(descriptor)
    assert address not in (None, ctypes.c_void_p(-1).value)
    assert libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size)) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        assert libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size)) == 0


def read_ahead_marker(path: Path) -> None:
    """Read the first quarter as other programs do: the kernel reads ahead, and leaves a marker where it goes on."""
    descriptor = os.open(path, os.O_RDONLY)
    for offset in range(0, LARGE // 4, PAGE):
        os.pread(descriptor, PAGE, offset)
    os.close(descriptor)


def new_disk(root: Path) -> Disk:
    disk = Disk("sick", root, Limits(deadline=2.0, offline_after=1.0, idle_probe=1.5, probe_interval=0.1))
    disk.read("f7", 0, PAGE)
    assert disk.status.inline.on, disk.status.inline.reason
    return disk


def test_markers_and_used_up_tags_do_not_hold_up_the_hub(dying: Dying, content: Path) -> None:
    expected = (content / "f0").read_bytes()
    whole = (content / "f1").read_bytes()
    with kept_in_memory(dying.root / "f1"), new_disk(dying.root) as disk:
        assert disk.read("f1") == whole
        assert disk.read("f7") == (content / "f7").read_bytes()
        drop_cached(dying.root / "f0")
        read_ahead_marker(dying.root / "f0")
        file, cached = disk.open("f0", size=0), disk.open("f1", size=0)
        reader = file._reader
        assert reader is not None
        dying.hang()
        with tags_used_up(dying.root):
            pauses, partly = Pauses(), 0
            before = disk.status.inline.hits
            for number in range(READS):
                offset = number * PAGE % LARGE
                if number % 2:
                    assert pauses.measure(cached.read, offset, PAGE) == whole[offset : offset + PAGE]
                else:  # of this file a part is cached, with a marker in it: what cannot be had is a miss
                    found = pauses.measure(reader.read, offset, PAGE)
                    assert found is not None
                    data = found if isinstance(found, bytes) else found[0]
                    partly += bool(data)
                    assert data in (b"", expected[offset : offset + PAGE])
            assert disk.status.inline.hits - before >= READS // 2
            dying.release()
        assert pauses.blocked == 0, f"the longest took {pauses.longest:.3f} s"
        file.close()
        cached.close()
        until(lambda: disk.status.load.in_flight == 0)


def test_an_offline_disk_serves_what_is_cached(dying: Dying, content: Path) -> None:
    whole = (content / "f1").read_bytes()
    with kept_in_memory(dying.root / "f1"), new_disk(dying.root) as disk:
        assert disk.read("f1") == whole
        dying.hang()
        drop_cached(dying.root / "f0")
        until(lambda: disk.status.load.state is State.OFFLINE)
        pauses = Pauses()
        for number in range(1000):
            offset = number * PAGE % LARGE
            assert pauses.measure(disk.read, "f1", offset, PAGE) == whole[offset : offset + PAGE]
        with disk.open("f1") as file:
            assert b"".join(file.chunks()) == whole
        with pytest.raises(DiskOffline):
            disk.read("f0")
        assert pauses.blocked == 0, f"the longest took {pauses.longest:.3f} s"
        dying.release()
        until(lambda: disk.status.load.state is State.ONLINE and not disk.status.load.in_flight)
        assert disk.read("f0") == (content / "f0").read_bytes()


def test_a_fragmented_file_whose_extents_are_not_in_memory(content: Path) -> None:
    """ext4 keeps more than four extents of a file in blocks of their own, to be read before its data can be."""
    holes = content / "f0"
    with holes.open("wb") as file:  # the copy into the image keeps the holes: each piece is an extent
        for number in range(0, LARGE // PAGE, 4):
            file.seek(number * PAGE)
            file.write(random.Random(number).randbytes(PAGE))
    with set_up(Dying, content) as dying, new_disk(dying.root) as disk:
        with disk.open("f0", size=0) as file_of_disk:
            reader = file_of_disk._reader
            assert reader is not None
            dying.hang()
            pauses = Pauses()
            with tags_used_up(dying.root):
                for number in range(READS):
                    pauses.measure(reader.read, number * PAGE % LARGE, PAGE)
                dying.release()
        assert pauses.blocked == 0, f"the longest took {pauses.longest:.3f} s"
        until(lambda: disk.status.load.in_flight == 0)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_remembered_object_is_opened_while_its_device_hangs(kind: Kind) -> None:
    """Whatever hangs beside it: readers of the device, and writers in its directory that wait for the journal."""
    with set_up(Dying, empty=kind) as dying:
        objects = [dying.root / f"object{number}" for number in range(200)]
        for directory in objects:
            directory.mkdir()
            # Long names: a directory of XFS that is not all in its inode is read ahead by whoever opens it to read.
            (directory / ("n" * 200)).write_bytes(b"content")
            os.setxattr(directory / ("n" * 200), "user.swift.metadata", b"metadata" * 20)
            for number in range(3):
                (directory / f"{number}{'n' * 200}").touch()
                (directory / f"{number}{'n' * 200}").unlink()
        (dying.root / "cold").write_bytes(random.Random(0).randbytes(LARGE))
        os.sync()
        dying.remount()
        time.sleep(0.05)  # after which a change has another time than those before
        identities = []
        for directory in objects:
            found = open_object(bytes(directory), PAGE, PAGE, 0)
            assert found is not None
            os.close(found[0])
            assert found[5] is not None
            identities.append(found[5])
        name = ("n" * 200).encode()
        dying.hang_all()

        def hang(number: int) -> None:
            with contextlib.suppress(OSError):
                if number % 2:
                    with open(objects[number] / "new", "wb") as file:
                        file.write(b"new")
                        os.fsync(file.fileno())
                else:
                    descriptor = os.open(dying.root / "cold", os.O_RDONLY | os.O_DIRECT)
                    with mmap.mmap(-1, PAGE) as block:
                        os.preadv(descriptor, [block], number * PAGE)
                    os.close(descriptor)

        threads = [threading.Thread(target=hang, args=(number,), daemon=True) for number in range(40)]
        for thread in threads:
            thread.start()
        time.sleep(1.0)
        assert any(thread.is_alive() for thread in threads), "nothing hangs"
        pauses, again = Pauses(), 0
        for number in range(READS):
            which = number % len(objects)
            result = pauses.measure(reopen_object, bytes(objects[which]), name, identities[which], os.O_NOATIME)
            if result >= 0:
                again += 1
                pauses.measure(os.close, result)
            else:  # a directory that is being written in is not the same any more, or not known to be
                assert which < len(threads), os.strerror(-result)
        assert again >= READS // 2
        assert pauses.blocked == 0, f"the longest took {pauses.longest:.3f} s"
        with open("/proc/sys/vm/drop_caches", "w") as file:
            file.write("2")
        for which in range(len(objects)):
            result = pauses.measure(reopen_object, bytes(objects[which]), name, identities[which], os.O_NOATIME)
            if result >= 0:
                pauses.measure(os.close, result)
        assert pauses.blocked == 0, f"the longest took {pauses.longest:.3f} s"
        dying.release()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
