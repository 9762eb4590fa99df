"""Archives on a disk that really hangs: who reads one is told at the deadline, and nobody else notices."""

from __future__ import annotations

import io
import random
import tarfile
import zipfile
from typing import TYPE_CHECKING

import gevent
import pytest

from diskread import CHUNK, DiskIOError, DiskOffline, DiskTimeout
from tests.conftest import until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from diskread import Disk, DiskFile

    from .injectors import FaultFS
    from .witnesses import Beside

NOISE = random.Random(11).randbytes(4 * CHUNK)


@pytest.fixture
def archive(make_faultfs: Callable[..., FaultFS]) -> FaultFS:
    """A disk without a page cache, with an archive of which the first member is long and does not compress."""
    faultfs = make_faultfs("--direct-io")
    with zipfile.ZipFile(faultfs.backing / "zip", "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("noise", NOISE)
        made.writestr("last", b"last")
    return faultfs


def online(disk: Disk, path: str) -> bool:
    """Whether the disk answers again."""
    try:
        disk.read(path, 0, 1)
    except (DiskTimeout, DiskOffline):
        return False
    return True


@pytest.mark.parametrize("buffer_size", [None, 8192, 2 * CHUNK])
def test_zipfile_on_a_disk_that_hangs(
    archive: FaultFS, make_sick: Callable[..., Disk], beside: Beside, buffer_size: int | None
) -> None:
    disk = make_sick(archive.root)
    archive.hang(range=(2 * CHUNK, 2 * CHUNK + 1))
    with disk.open("zip").as_io() as raw:
        stream = raw if buffer_size is None else io.BufferedReader(raw, buffer_size)
        with zipfile.ZipFile(stream) as opened:
            with pytest.raises(DiskTimeout):
                opened.read("noise")
            assert archive.held(), "it was this very read that hung"
            archive.release()
            until(lambda: online(disk, "zip"), "the disk to come back")
            # The stream has survived it: who asks again gets everything.
            stream.seek(0)
            assert opened.read("noise") == NOISE
            assert opened.read("last") == b"last"
        stream.close()


def test_many_readers_of_archives_and_a_disk_that_hangs_from_the_start(
    archive: FaultFS, make_sick: Callable[..., Disk], beside: Beside
) -> None:
    disk = make_sick(archive.root)
    files = [disk.open("zip", size=0) for _ in range(4)]
    archive.hang("read")

    def read(file: DiskFile) -> object:
        with file.as_io() as raw, pytest.raises((DiskTimeout, zipfile.BadZipFile)) as caught:
            zipfile.ZipFile(raw)
        # Any OSError while zipfile looks for the end of the archive makes it "not a zip file".
        return caught.value.__context__ if isinstance(caught.value, zipfile.BadZipFile) else caught.value

    readers = [gevent.spawn(read, file) for file in files]
    gevent.joinall(readers, timeout=30, raise_error=True)
    assert [type(reader.value) for reader in readers] == [DiskTimeout] * 4
    archive.release()


def test_an_error_of_the_device_passes_through(archive: FaultFS, make_sick: Callable[..., Disk]) -> None:
    with tarfile.open(archive.backing / "tar", "w") as made:
        made.add(archive.backing / "zip", "zip")
    disk = make_sick(archive.root)
    archive.fail(path="tar", range=(2 * CHUNK, 2 * CHUNK + 1))
    with disk.open("tar").as_io() as raw, tarfile.open(fileobj=raw) as opened:
        inner = opened.extractfile("zip")
        assert inner is not None
        with pytest.raises(DiskIOError):
            inner.read()


def test_a_reader_of_an_archive_can_be_killed(
    archive: FaultFS, make_sick: Callable[..., Disk], beside: Beside, tmp_path: Path
) -> None:
    disk = make_sick(archive.root, deadline=60, offline_after=60, idle_probe=100)
    archive.hang(range=(2 * CHUNK, 2 * CHUNK + 1))

    def read() -> None:
        with disk.open("zip").as_io() as raw, io.BufferedReader(raw) as stream, zipfile.ZipFile(stream) as opened:
            opened.read("noise")

    reader = gevent.spawn(read)
    archive.wait_held(1, sleep=gevent.sleep)
    reader.kill(timeout=20)
    assert reader.dead
    archive.release()
