"""Files of a disk as raw streams: like any other binary stream, for Python itself and for what reads files with it."""

from __future__ import annotations

import csv
import errno
import gzip
import io
import os
import random
import shutil
import tarfile
import zipfile
from typing import TYPE_CHECKING, BinaryIO, cast

import gevent
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from diskread import CHUNK, DiskFileChanged, DiskTimeout
from diskread.raw_io import LARGEST_READ

from .conftest import LARGE, SMALL, MakeDisk, descriptors, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from diskread import DiskFile
    from diskread.raw_io import RawDiskFile

thorough = settings(
    deadline=None, database=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

SIZE = len(LARGE)
offsets = st.integers(-20, 20) | st.integers(-SIZE - 20, SIZE + 20)
sizes = st.none() | st.integers(-1, 70_000) | st.integers(CHUNK - 2, CHUNK + 2) | st.integers(0, SIZE + 20)
calls = st.one_of(
    st.tuples(st.just("seek"), offsets, st.integers(0, 2)),
    st.tuples(st.just("read"), sizes),
    st.tuples(st.just("readinto"), st.integers(0, 3 * CHUNK)),
    st.tuples(st.just("readline"), st.integers(-1, 300)),
    st.tuples(st.just("tell")),
)


def outcome(stream: BinaryIO, call: str, *arguments: int | None) -> object:
    """What a call on a stream comes to."""
    if call == "readinto":
        assert arguments[0] is not None
        buffer = bytearray(arguments[0])
        return stream.readinto(buffer), bytes(buffer)  # type: ignore[attr-defined]  # all have it but BinaryIO
    return getattr(stream, call)(*arguments)


@thorough
@given(st.lists(calls, max_size=8), st.sampled_from([None, 1, 8192, 100_000, 2 * CHUNK]))
@example([("seek", -1, 0)], None)
@example([("seek", -SIZE - 1, 2), ("tell",)], None)
@example([("seek", SIZE + 5, 0), ("read", 1), ("read", None), ("seek", -7, 1), ("read", -1), ("tell",)], None)
@example([("read", CHUNK), ("read", CHUNK + 1), ("readinto", 2 * CHUNK)], None)
def test_it_is_like_bytes_in_memory(
    make_disk: MakeDisk, sequence: list[tuple[str, int, int]], buffer_size: int | None
) -> None:
    with make_disk() as disk, disk.open("large").as_io() as raw:
        stream = cast("BinaryIO", raw if buffer_size is None else io.BufferedReader(raw, buffer_size))
        model = io.BytesIO(LARGE)
        for call, *arguments in sequence:
            if call == "seek":
                start = (0, model.tell(), SIZE)[arguments[1]]
                if start + arguments[0] < 0:  # BytesIO stops at 0, a file says no
                    with pytest.raises(OSError, match="Invalid argument") as caught:
                        stream.seek(*arguments)
                    assert caught.value.errno == errno.EINVAL
                    model.seek(stream.tell())
                    continue
            assert outcome(stream, call, *arguments) == outcome(model, call, *arguments), call
            assert stream.tell() == model.tell()
        stream.close()


@pytest.fixture
def file(make_disk: MakeDisk) -> DiskFile:
    return make_disk().open("large")


def test_it_is_a_stream_for_reading_without_a_descriptor(file: DiskFile) -> None:
    with file.as_io() as raw:
        assert (raw.readable(), raw.seekable(), raw.writable(), raw.isatty()) == (True, True, False, False)
        for call in (raw.fileno, raw.truncate):
            with pytest.raises(io.UnsupportedOperation):
                call()
        with pytest.raises(ValueError, match="SEEK_SET"):
            raw.seek(0, 3)
        with pytest.raises(TypeError):
            raw.seek(1.5)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            raw.readinto(b"read-only")
        assert raw.tell() == 0


def test_reads_into_any_buffer(file: DiskFile) -> None:
    with file.as_io() as raw:
        numbers = memoryview(bytearray(800)).cast("Q")
        assert raw.readinto(numbers) == 800
        assert numbers.tobytes() == LARGE[:800]


def test_closing_it_closes_the_file(file: DiskFile, root: Path) -> None:
    raw = file.as_io()
    raw.read(10)
    raw.close()
    raw.close()
    assert raw.closed
    assert "closed" in repr(raw)
    for call in (raw.read, raw.readall, raw.tell, raw.readable, raw.seekable, lambda: raw.seek(0), raw.__enter__):
        with pytest.raises(ValueError, match="closed"):
            call()
    with pytest.raises(ValueError, match="closed"):
        raw.readinto(bytearray(0))
    with pytest.raises(ValueError, match="closed"):
        file.read(0, 1)
    until(lambda: str(root / "large") not in descriptors().values(), "the descriptor to be closed")


def test_a_stream_of_a_closed_file_is_of_no_use(file: DiskFile) -> None:
    raw = file.as_io()
    raw.seek(0, io.SEEK_END)
    file.close()
    with pytest.raises(ValueError, match="closed"):
        raw.read(1)  # nothing would be left, but that is no answer
    with pytest.raises(ValueError, match="closed"):
        file.as_io()
    raw.close()


@pytest.mark.parametrize("deadline", [0, -1, float("nan")])
def test_a_deadline_that_is_none_is_refused(file: DiskFile, deadline: float) -> None:
    with file, pytest.raises(ValueError, match="deadline"):
        file.as_io(deadline=deadline)


def test_its_deadline_is_that_of_each_read(make_disk: MakeDisk) -> None:
    disk = make_disk(threads=1)
    with disk.open("large", size=0).as_io(deadline=0.05) as raw:
        holder = gevent.spawn(disk.stall, 1.0)
        until(lambda: disk.status.load.in_flight == 1, "the stall to begin")
        for size in (10, SIZE):
            with pytest.raises(DiskTimeout):
                raw.read(size)
        assert not holder.ready()
        assert raw.tell() == 0
        holder.get(timeout=30)


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_one_that_was_forgotten_is_closed_by_the_finalizer_of_its_file(
    make_disk: MakeDisk, root: Path, layers: int
) -> None:
    wrap: Callable[[RawDiskFile], object] = [
        lambda raw: raw,
        io.BufferedReader,
        lambda raw: io.TextIOWrapper(io.BufferedReader(raw), "latin-1"),
    ][layers]
    streams = [wrap(make_disk().open("large").as_io())]
    with pytest.warns(ResourceWarning, match="unclosed <DiskFile d1/large>"):
        streams.clear()
    until(lambda: str(root / "large") not in descriptors().values(), "the descriptor to be closed")


def test_a_file_that_shrinks_is_not_taken_for_a_whole_one(make_disk: MakeDisk, root: Path) -> None:
    with make_disk().open("large", size=0).as_io() as raw:
        os.truncate(root / "large", 1000)
        assert raw.read(2000) == LARGE[:1000]
        with pytest.raises(DiskFileChanged, match="byte 1000"):
            raw.read(1)
        with pytest.raises(DiskFileChanged):
            raw.read()
        assert raw.tell() == 1000


def test_a_file_that_grows_ends_where_it_did(make_disk: MakeDisk, root: Path) -> None:
    with make_disk().open("large").as_io() as raw:
        with (root / "large").open("ab") as grown:
            grown.write(b"more")
        assert raw.seek(0, io.SEEK_END) == SIZE
        assert raw.read() == b""
        raw.seek(0)
        assert raw.read() == LARGE


def test_asks_the_disk_for_one_piece_and_not_for_the_end(make_disk: MakeDisk) -> None:
    disk = make_disk()
    with disk.open("large", size=0) as file, file.as_io() as raw:
        before = disk.status.counts.reads
        assert raw.readinto(bytearray(LARGEST_READ)) == LARGEST_READ
        assert raw.read(LARGEST_READ) == LARGE[LARGEST_READ : 2 * LARGEST_READ]
        assert disk.status.counts.reads == before + 2
        raw.seek(0, io.SEEK_END)
        assert raw.read(10) == b""
        assert disk.status.counts.reads == before + 2, "the end is known"


def test_a_buffer_belongs_to_one_greenlet_at_a_time(make_disk: MakeDisk) -> None:
    # The buffer's own lock is one of native threads: it must not be what the hub waits for.
    with make_disk().open("large", size=0).as_io() as raw, io.BufferedReader(raw) as buffered:
        readers = [gevent.spawn(buffered.read, 10) for _ in range(2)]
        gevent.joinall(readers, timeout=30)
        outcomes = {type(reader.exception) for reader in readers}
        assert outcomes == {type(None), RuntimeError}


# -- what reads files ------------------------------------------------------------------------------------------------


MEMBERS = {"empty": b"", "short": SMALL, "long": LARGE, "noise": random.Random(3).randbytes(3 * CHUNK + 1)}


@pytest.mark.parametrize("buffer_size", [None, 8192, CHUNK])
def test_zipfile_reads_it(make_disk: MakeDisk, root: Path, buffer_size: int | None) -> None:
    with zipfile.ZipFile(root / "zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in MEMBERS.items():
            archive.writestr(name, content)
    with make_disk().open("zip").as_io() as raw:
        stream = raw if buffer_size is None else io.BufferedReader(raw, buffer_size)
        with zipfile.ZipFile(stream) as archive:
            assert archive.testzip() is None
            assert {name: archive.read(name) for name in archive.namelist()} == MEMBERS
        stream.close()


def test_zipfile_reads_a_directory_larger_than_any_piece(make_disk: MakeDisk, root: Path) -> None:
    with zipfile.ZipFile(root / "zip", "w") as archive:
        for each in range(3000):
            archive.writestr(f"{each:0120}", b"x")
    with make_disk().open("zip").as_io() as raw, zipfile.ZipFile(raw) as archive:
        assert archive.start_dir < (root / "zip").stat().st_size - LARGEST_READ
        assert len(archive.namelist()) == 3000


@pytest.mark.parametrize("name", ["small", "large", "empty", "directory/inner"])
def test_zipfile_says_when_a_file_is_none(make_disk: MakeDisk, name: str) -> None:
    with make_disk().open(name).as_io() as raw:
        assert not zipfile.is_zipfile(raw)
        with pytest.raises(zipfile.BadZipFile):
            zipfile.ZipFile(raw)


@pytest.mark.parametrize("mode", ["w:", "w:gz", "w:xz"])
@pytest.mark.parametrize("way", ["r:*", "r|*"])
def test_tarfile_reads_it(make_disk: MakeDisk, root: Path, mode: str, way: str) -> None:
    with tarfile.open(root / "tar", mode) as archive:  # type: ignore[call-overload]
        for name, content in MEMBERS.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    found = {}
    with (
        make_disk().open("tar").as_io() as raw,
        io.BufferedReader(raw, CHUNK) as stream,
        tarfile.open(fileobj=stream, mode=way) as archive,  # type: ignore[call-overload]
    ):
        for entry in archive:
            content = archive.extractfile(entry)
            assert content is not None
            found[entry.name] = content.read()
    assert found == MEMBERS


def test_gzip_reads_it(make_disk: MakeDisk, root: Path) -> None:
    (root / "gz").write_bytes(gzip.compress(LARGE) + gzip.compress(SMALL))
    with make_disk().open("gz").as_io() as raw, gzip.open(raw) as stream:
        assert stream.read() == LARGE + SMALL


def test_csv_reads_it_as_text(make_disk: MakeDisk, root: Path) -> None:
    rows = [[str(each), f"é{each}", 'a "quoted"\nvalue'] for each in range(5000)]
    with (root / "csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    with (
        make_disk().open("csv").as_io() as raw,
        io.BufferedReader(raw) as buffered,
        io.TextIOWrapper(buffered, "utf-8", newline="") as text,
    ):
        assert list(csv.reader(text)) == rows


@pytest.mark.parametrize("size", [0, 1000, CHUNK, 2 * CHUNK])
def test_copyfileobj_copies_it(make_disk: MakeDisk, tmp_path: Path, size: int) -> None:
    with make_disk().open("large").as_io() as raw, (tmp_path / "copy").open("wb") as copy:
        shutil.copyfileobj(raw, copy, size)
    assert (tmp_path / "copy").read_bytes() == LARGE
