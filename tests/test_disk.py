"""Disks and their files: contents, errors, closing, and what is counted."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import random
import shutil
import threading
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from diskread import (
    CHUNK,
    FIRST_CHUNK,
    Disk,
    DiskBusy,
    DiskError,
    DiskFile,
    DiskFileChanged,
    DiskFileForbidden,
    DiskFileNotFound,
    DiskFileNotRegular,
    DiskIOError,
    DiskOffline,
    DiskPathInvalid,
    DiskTimeout,
    Limits,
    State,
)

from .conftest import LARGE, SMALL, MakeDisk, RunScript, descriptors, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

thorough = settings(
    deadline=None, database=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
PATTERN = random.Random(7).randbytes(4 * CHUNK)


def open_files(root: Path) -> list[str]:
    """The regular files under the root that this process has open."""
    return [target for target in descriptors().values() if target.startswith(f"{root}/")]


def all_closed(root: Path) -> None:
    until(lambda: not open_files(root), "all files to be closed")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    """A disk for tests that make many reads: they would otherwise start a thread for each."""
    with Disk("shared", tmp_path_factory.mktemp("shared"), Limits(idle=5)) as disk:
        yield disk
    until(lambda: not disk.status.load.threads)


def write(disk: Disk, name: str, content: bytes) -> bytes:
    assert disk.root is not None
    (Path(disk.root) / name).write_bytes(content)
    return content


# -- contents ---------------------------------------------------------------------------------------------------------

EDGES = sorted(
    {0, 1, 4096, 3 * CHUNK + 17}
    | {edge + near for edge in (FIRST_CHUNK, CHUNK, 2 * CHUNK, FIRST_CHUNK + CHUNK) for near in (-1, 0, 1)}
)


@pytest.mark.parametrize("size", EDGES)
def test_a_file_of_any_size_is_read_whole(make_disk: MakeDisk, root: Path, size: int) -> None:
    disk = make_disk()
    content = write(disk, "file", PATTERN[:size])
    assert disk.read("file") == content
    assert disk.read("file", 0, size) == content
    assert disk.read("file", 0, size + 1) == content
    assert disk.stat("file").size == size
    with disk.open("file") as file:
        assert file.stat == disk.stat("file")
        chunks = list(file.chunks())
        assert b"".join(chunks) == content
        assert all(0 < len(chunk) <= CHUNK for chunk in chunks)
        assert file.read() == content
        assert b"".join(file.chunks()) == content, "a second time"
    all_closed(root)


@thorough
@given(
    length=st.integers(0, len(PATTERN)),
    offset=st.integers(0, len(PATTERN) + 5),
    size=st.one_of(st.none(), st.integers(0, len(PATTERN))),
)
@example(length=FIRST_CHUNK, offset=FIRST_CHUNK, size=None)
@example(length=3 * FIRST_CHUNK, offset=FIRST_CHUNK, size=None)
@example(length=3 * FIRST_CHUNK, offset=1, size=None)
def test_any_range_of_any_file(shared: Disk, length: int, offset: int, size: int | None) -> None:
    content = write(shared, "file", PATTERN[:length])
    wanted = content[offset:] if size is None else content[offset : offset + size]
    assert shared.read("file", offset, size) == wanted


@thorough
@given(
    length=st.integers(0, len(PATTERN)),
    first_offset=st.one_of(st.just(0), st.integers(0, len(PATTERN))),
    first_size=st.one_of(st.sampled_from([0, 1, FIRST_CHUNK, CHUNK]), st.integers(0, len(PATTERN))),
    ranges=st.lists(
        st.tuples(st.integers(0, len(PATTERN) + 5), st.one_of(st.none(), st.integers(0, len(PATTERN) + 5))), max_size=4
    ),
)
@example(length=100, first_offset=0, first_size=100, ranges=[(200, None), (100, None), (100, 5)])
@example(length=100, first_offset=50, first_size=10, ranges=[(0, None), (55, 5), (55, 6), (49, 1)])
def test_any_range_of_an_open_file(
    shared: Disk, length: int, first_offset: int, first_size: int, ranges: list[tuple[int, int | None]]
) -> None:
    content = write(shared, "file", PATTERN[:length])
    with shared.open("file", offset=first_offset, size=first_size) as file:
        for offset, size in ranges:
            wanted = content[offset:] if size is None else content[offset : offset + size]
            assert file.read(offset, size) == wanted
            stop = None if size is None else offset + size
            assert b"".join(file.chunks(offset, stop)) == wanted
    all_closed(Path(str(shared.root)))


def test_a_first_piece_that_holds_all_needs_no_second_visit(make_disk: MakeDisk, root: Path) -> None:
    disk = make_disk()
    with disk.open("small") as file:
        assert not open_files(root), "closed by the visit that opened it"
        reads = disk.status.counts.reads
        assert file.read() == SMALL
        assert file.read(10, 20) == SMALL[10:30]
        assert b"".join(file.chunks(5, 900)) == SMALL[5:900]
        assert disk.status.counts.reads == reads


def test_an_empty_range_needs_no_visit(make_disk: MakeDisk, root: Path) -> None:
    # On a hung disk a visit for nothing would take a whole deadline.
    disk = make_disk(threads=1, queue=0, deadline=60)
    gate = threading.Event()
    with disk.open("large") as file:
        with pytest.raises(DiskTimeout):
            disk.run(gate.wait, 60, deadline=0.02)
        rejections = disk.status.counts.rejections
        for start, stop in ((0, 0), (500_000, 500_000), (600_000, 5), (len(LARGE), None), (len(LARGE) + 9, None)):
            assert list(file.chunks(start, stop)) == []
        assert disk.status.counts.rejections == rejections
        gate.set()
        until(lambda: not disk.status.load.in_flight)


@pytest.mark.parametrize("path", ["small", b"small", Path("small"), os.fsencode("directory/../small"), "./small"])
def test_a_path_may_be_text_bytes_or_a_path(make_disk: MakeDisk, path: Any) -> None:
    assert make_disk().read(path) == SMALL


def test_a_name_that_is_no_text(make_disk: MakeDisk, root: Path) -> None:
    name = b"\xff\n"
    Path(os.fsdecode(os.fsencode(root) + b"/" + name)).write_bytes(b"found")
    disk = make_disk()
    assert disk.read(name) == b"found"
    assert disk.read(os.fsdecode(name)) == b"found"
    with disk.open(name) as file:
        assert file.read() == b"found"
        # A warning about the file can be printed then, and forges no line.
        assert repr(file).isprintable()


def test_many_at_a_time(make_disk: MakeDisk) -> None:
    disk = make_disk(threads=4, queue=1000, deadline=60)
    readers = [gevent.spawn(disk.read, "large", index * 1000, 5000) for index in range(300)]
    gevent.joinall(readers, raise_error=True)
    assert [each.value for each in readers] == [LARGE[index * 1000 : index * 1000 + 5000] for index in range(300)]


# -- what goes wrong --------------------------------------------------------------------------------------------------


def reads(disk: Disk, path: Any) -> list[Callable[[], object]]:
    return [
        lambda: disk.read(path),
        lambda: disk.read(path, 0, 10),
        lambda: disk.open(path),
        lambda: disk.stat(path),
        lambda: disk.stall(0, path),
    ]


@pytest.mark.parametrize(
    ("path", "expected", "code"),
    [
        ("missing", DiskFileNotFound, errno.ENOENT),
        ("small/deeper", DiskFileNotFound, errno.ENOTDIR),
        ("small/", DiskFileNotFound, errno.ENOTDIR),
        ("directory", DiskFileNotRegular, errno.EISDIR),
        (".", DiskFileNotRegular, errno.EISDIR),
        ("fifo", DiskFileNotRegular, errno.EINVAL),
        ("out", DiskFileForbidden, errno.EXDEV),
        ("..", DiskFileForbidden, errno.EXDEV),
        ("loop", DiskFileForbidden, errno.ELOOP),
        ("n" * 300, DiskPathInvalid, errno.ENAMETOOLONG),
        ("p/" * 2500, DiskPathInvalid, errno.ENAMETOOLONG),
        ("", DiskPathInvalid, errno.EINVAL),
        ("/etc/passwd", DiskPathInvalid, errno.EINVAL),
        ("//small", DiskPathInvalid, errno.EINVAL),
        ("a\0b", DiskPathInvalid, errno.EINVAL),
    ],
)
def test_paths_that_name_no_file(
    make_disk: MakeDisk, root: Path, path: str, expected: type[DiskError], code: int
) -> None:
    os.mkfifo(root / "fifo")
    (root / "out").symlink_to("/etc/passwd")
    (root / "loop").symlink_to("loop")
    disk = make_disk()
    for call in reads(disk, path):
        with pytest.raises(expected) as caught:
            call()
        assert type(caught.value) is expected
        assert (caught.value.errno, caught.value.disk, caught.value.path) == (code, "d1", os.fsencode(path))
    in_visit = 0 if code == errno.EINVAL and expected is DiskPathInvalid else 5
    assert sum(disk.status.counts.errors.values()) == in_visit
    assert not in_visit or set(disk.status.counts.errors) == {errno.errorcode[code]}
    assert (disk.status.counts.reads, disk.status.counts.timeouts, disk.status.counts.rejections) == (0, 0, 0)
    assert disk.read("small") == SMALL


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(make_disk: MakeDisk, root: Path) -> None:
    (root / "small").chmod(0)
    with pytest.raises(DiskFileForbidden):
        make_disk().read("small")


@pytest.mark.parametrize("inline", ["auto", "off"])
def test_a_path_that_is_no_text(make_disk: MakeDisk, inline: str) -> None:
    disk = make_disk(inline=inline)
    disk.read("small")
    for ask in (disk.read, disk.open, disk.stat):
        with pytest.raises(DiskPathInvalid, match="no text"):
            ask("\ud800")


@pytest.mark.parametrize("number", [-1, 2**63, 2**64, 1.5, "1", None])
def test_bad_numbers(make_disk: MakeDisk, root: Path, number: Any) -> None:
    disk = make_disk()
    with disk.open("large") as file:
        calls: list[Callable[[], object]] = [
            lambda: disk.read("small", number),
            lambda: disk.read("small", number, 10),
            lambda: disk.open("small", offset=number),
            lambda: disk.open("small", size=number),
            lambda: disk.open("large", offset=number),
            lambda: file.read(number),
            lambda: file.read(number, 10),
            lambda: list(file.chunks(number)) if number != 2**63 and number != 2**64 else int("x"),
        ]
        if number is not None:
            calls += [lambda: disk.read("small", 0, number), lambda: file.read(0, number)]
        for call in calls:
            with pytest.raises((ValueError, TypeError)):
                call()
    all_closed(root)
    until(lambda: not disk.status.load.in_flight)
    assert disk.read("small") == SMALL


@pytest.mark.parametrize("size", [2**40, 2**50, 2**62, 2**63 - 1])
def test_a_huge_size_is_an_error_or_the_whole_file(
    make_disk: MakeDisk, root: Path, size: int, capfd: pytest.CaptureFixture[str]
) -> None:
    # Above PY_SSIZE_T_MAX - 33 CPython raises OverflowError instead of MemoryError; nobody may take that for success.
    disk = make_disk()

    def attempt(call: Callable[[], bytes]) -> bytes | int | None:
        try:
            return call()
        except DiskIOError as error:
            assert "buffer" in error.reason  # noqa: PT017 - either outcome is right
            return error.errno

    assert attempt(lambda: disk.read("small", 0, size)) in (SMALL, errno.ENOMEM)
    assert attempt(lambda: disk.open("small", size=size).read()) in (SMALL, errno.ENOMEM)
    with disk.open("large", size=0) as file:
        assert attempt(lambda: file.read(0, size)) in (LARGE, errno.ENOMEM)
    all_closed(root)
    assert capfd.readouterr().err == ""


def test_a_file_larger_than_memory(make_disk: MakeDisk, root: Path) -> None:
    with (root / "sparse").open("wb") as sparse:
        sparse.write(b"start")
        try:
            sparse.truncate(2**43)
        except OSError:
            pytest.skip("no sparse files of this size here")
    disk = make_disk()
    assert disk.stat("sparse").size == 2**43
    assert disk.read("sparse", 2**43 - 10, 100) == bytes(10)
    with disk.open("sparse") as file:
        first, second = itertools.islice(file.chunks(), 2)
        assert first.startswith(b"start")
        assert second == bytes(CHUNK)
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() != "1":
        with pytest.raises(DiskIOError, match="allocating the buffer failed"):
            disk.read("sparse")
    all_closed(root)


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), 1e10, "1", None])
def test_bad_times(make_disk: MakeDisk, seconds: Any) -> None:
    disk = make_disk()
    with pytest.raises((ValueError, TypeError)):
        disk.stall(seconds)
    with pytest.raises((ValueError, TypeError)):
        disk.stall(seconds, "small")


@pytest.mark.parametrize("deadline", [0, -1, float("nan"), "1"])
def test_bad_deadlines(make_disk: MakeDisk, deadline: Any) -> None:
    disk = make_disk()
    with disk.open("large") as file:
        for call in (
            lambda: disk.read("small", deadline=deadline),
            lambda: disk.open("small", deadline=deadline),
            lambda: disk.stat("small", deadline=deadline),
            lambda: disk.run(os.getpid, deadline=deadline),
            lambda: disk.stall(0, deadline=deadline),
            lambda: disk.stall(0, "small", deadline=deadline),
            lambda: file.read(300_000, 10, deadline=deadline),
            lambda: list(file.chunks(deadline=deadline)),
        ):
            with pytest.raises((ValueError, TypeError)):
                call()


# -- the root ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", None])
def test_a_disk_needs_a_name(name: Any) -> None:
    with pytest.raises(ValueError, match="name"):
        Disk(name, "/")


def test_a_root_is_bytes_text_or_a_path(root: Path, nothing_left_behind: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    for each in (root, str(root), os.fsencode(root), "root", Path("root"), "root/../root/."):
        with Disk("d1", each) as disk:
            monkeypatch.chdir("/")  # a relative root means the directory at the time when the disk was made
            assert disk.root == str(root)
            assert disk.read("small") == SMALL
            monkeypatch.chdir(root.parent)


def test_a_root_with_a_nul_byte() -> None:
    with pytest.raises(ValueError, match="NUL"):
        Disk("d1", "/a\0b")


def test_a_disk_without_files(nothing_left_behind: None) -> None:
    with Disk("d1", None) as disk:
        assert disk.root is None
        assert disk.run(os.getpid) == os.getpid()
        assert disk.stall(0.01).disk >= 0.01
        for call in reads(disk, "small"):
            with pytest.raises(DiskPathInvalid, match="no files"):
                call()


@pytest.mark.parametrize(("name", "code"), [("missing", errno.ENOENT), ("small", errno.ENOTDIR)])
def test_a_root_that_is_not_there_is_an_offline_disk(
    root: Path, nothing_left_behind: None, name: str, code: int
) -> None:
    with Disk("d1", root / name) as disk:
        first, *later = reads(disk, "small")
        with pytest.raises(DiskOffline, match="root directory") as caught:
            first()
        assert caught.value.errno == code
        for call in later:
            with pytest.raises(DiskOffline, match="root directory") as caught:
                call()
            assert caught.value.errno == errno.ENODEV, "nobody has looked again"
            assert caught.value.retry_after is not None


def test_a_root_that_appears_later(root: Path, nothing_left_behind: None) -> None:
    with Disk("d1", root / "later", Limits(probe_interval=0.05, probe_interval_max=0.1)) as disk:
        with pytest.raises(DiskOffline):
            disk.read("file")
        (root / "later").mkdir()
        (root / "later" / "file").write_bytes(b"content")
        until(lambda: disk.status.load.accepting, "a probe that finds it")
        assert disk.read("file") == b"content"


def test_a_root_that_is_removed(make_disk: MakeDisk, root: Path) -> None:
    disk = make_disk()
    assert disk.read("small") == SMALL
    with disk.open("large") as file:
        shutil.rmtree(root)
        with pytest.raises(DiskFileNotFound):
            disk.read("small")
        assert file.read() == LARGE, "an open file outlives its name"


def test_a_root_that_is_moved_stays_the_one_that_was_opened(make_disk: MakeDisk, root: Path) -> None:
    disk = make_disk()
    assert disk.read("small") == SMALL
    root.rename(root.parent / "moved")
    root.mkdir()
    (root / "small").write_bytes(b"another")
    assert disk.read("small") == SMALL


def test_the_root_is_opened_once_and_closed_with_the_disk(make_disk: MakeDisk, root: Path) -> None:
    disk = make_disk(threads=8)
    readers = [gevent.spawn(disk.stall, 0.05, "small") for _ in range(8)]
    gevent.joinall(readers, raise_error=True)
    gc.collect()
    until(lambda: list(descriptors().values()).count(str(root)) == 1)
    disk.close()
    until(lambda: str(root) not in descriptors().values())


def test_the_root_stays_open_for_a_job_that_needs_it(make_disk: MakeDisk, root: Path) -> None:
    disk = make_disk(threads=2)
    assert disk.read("small") == SMALL
    reader = gevent.spawn(disk.stall, 0.3, "large")
    until(lambda: disk.status.load.in_flight)
    disk.close()
    assert str(root) in descriptors().values()
    with pytest.raises(RuntimeError, match="closed"):  # the first visit still works; there is none after it
        reader.get()
    until(lambda: str(root) not in descriptors().values())
    all_closed(root)


# -- run and stall ----------------------------------------------------------------------------------------------------


def test_run_returns_what_the_function_returns(make_disk: MakeDisk, root: Path) -> None:
    disk = make_disk()
    assert sorted(disk.run(os.listdir, root)) == ["directory", "empty", "large", "small"]
    assert disk.run(int, "ff", base=16, deadline=5) == 255
    assert disk.run(lambda: None) is None
    assert disk.run(threading.get_ident) != threading.get_ident()
    assert disk.status.counts.reads == 4


@pytest.mark.parametrize(
    "error", [LookupError("x"), KeyboardInterrupt(), SystemExit(3), StopIteration(), gevent.GreenletExit(), OSError(5)]
)
def test_run_raises_what_the_function_raises(
    make_disk: MakeDisk, error: BaseException, capfd: pytest.CaptureFixture[str]
) -> None:
    disk = make_disk(threads=1)

    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        disk.run(fail)
    assert caught.value is error
    assert disk.read("small") == SMALL
    assert capfd.readouterr().err == ""


def test_nothing_is_printed_when_things_go_wrong(make_disk: MakeDisk, capfd: pytest.CaptureFixture[str]) -> None:
    disk = make_disk(threads=1, queue=0)
    for path in ("missing", "directory", "../small"):
        for call in reads(disk, path):
            with pytest.raises(DiskError):
                call()
    with pytest.raises(DiskTimeout):
        disk.stall(0.2, "missing", deadline=0.01)
    with pytest.raises(DiskBusy):
        disk.read("small")
    until(lambda: not disk.status.load.in_flight)
    assert capfd.readouterr() == ("", "")


def test_a_function_that_nobody_waits_for_goes_on_to_its_end(make_disk: MakeDisk, gate: threading.Event) -> None:
    disk, done = make_disk(threads=1), threading.Event()

    def work() -> None:
        gate.wait(60)
        done.set()

    with pytest.raises(DiskTimeout):
        disk.run(work, deadline=0.02)
    gate.set()
    until(done.is_set)


def test_the_times_of_a_stall(make_disk: MakeDisk) -> None:
    disk = make_disk(threads=1, deadline=60)
    times = disk.stall(0.2)
    assert 0.2 <= times.disk < 5
    assert 0 <= times.queue < 5
    first = gevent.spawn(disk.stall, 0.3)
    until(lambda: disk.status.load.in_flight == 1)
    second = gevent.spawn(disk.stall, 0.1, "large")
    gevent.joinall([first, second], raise_error=True)
    assert second.get().queue >= 0.1
    assert second.get().disk >= 0.1
    assert disk.status.counts.bytes >= len(LARGE)


def test_the_deadline_of_a_stall_covers_the_reading_after_it(make_disk: MakeDisk, root: Path) -> None:
    disk = make_disk(threads=1)
    with pytest.raises(DiskTimeout) as caught:
        disk.stall(0.3, "large", deadline=0.1)
    assert caught.value.started
    all_closed(root)


# -- open files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["large", "small", "empty"])
def test_close_closes(make_disk: MakeDisk, root: Path, name: str) -> None:
    file = make_disk().open(name)
    file.close()
    file.close()
    for size in (None, 5, 0):
        with pytest.raises(ValueError, match="was closed"):
            file.read(0, size)
    with pytest.raises(ValueError, match="was closed"):
        list(file.chunks())
    assert file.stat.size == (root / name).stat().st_size, "what is known stays known"
    all_closed(root)


def test_leaving_the_block_closes(make_disk: MakeDisk, root: Path) -> None:
    disk = make_disk()

    def fail() -> None:
        with disk.open("large"):
            assert open_files(root)
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    all_closed(root)


def test_a_file_is_closed_after_the_read_that_is_under_way(
    make_disk: MakeDisk, root: Path, gate: threading.Event
) -> None:
    disk = make_disk(threads=1, deadline=60)
    file = disk.open("large")
    blocker = gevent.spawn(disk.run, gate.wait, 60)
    until(lambda: disk.status.load.in_flight == 1)
    reader = gevent.spawn(file.read, 300_000, 10)
    until(lambda: disk.status.load.waiting == 1)
    file.close()
    gevent.sleep(0.02)
    assert open_files(root), "the read needs it"
    gate.set()
    assert reader.get() == LARGE[300_000:300_010]
    all_closed(root)
    assert blocker.get()


def test_a_file_is_closed_after_a_read_that_was_given_up(
    make_disk: MakeDisk, root: Path, gate: threading.Event
) -> None:
    disk = make_disk(threads=1, deadline=60)
    file = disk.open("large")
    gevent.spawn(disk.run, gate.wait, 60)
    until(lambda: disk.status.load.in_flight == 1)
    with pytest.raises(DiskTimeout):
        file.read(300_000, 10, deadline=0.02)
    file.close()
    assert open_files(root), "closing waits for a slot, too: close(2) can hang"
    gate.set()
    all_closed(root)


def test_closing_goes_before_reading(make_disk: MakeDisk, root: Path, gate: threading.Event) -> None:
    disk = make_disk(threads=1, deadline=60)
    file = disk.open("large")
    gevent.spawn(disk.run, gate.wait, 60)
    until(lambda: disk.status.load.in_flight == 1)
    reader = gevent.spawn(disk.run, lambda: open_files(root))
    until(lambda: disk.status.load.waiting == 1)
    file.close()
    gate.set()
    assert reader.get() == []


@pytest.mark.parametrize("how_many", [1, 3])
def test_files_may_be_closed_after_their_disk(make_disk: MakeDisk, root: Path, how_many: int) -> None:
    # The threads are gone by then: a descriptor that went into the old pool's queue would stay open for ever, and the
    # next one would block its caller.
    disk = make_disk(threads=1)
    files = [disk.open("large") for _ in range(how_many)]
    disk.close()
    until(lambda: disk.status.load.threads == 0)

    def close_all() -> None:
        for file in files:
            file.close()

    closing = gevent.spawn(close_all)
    closing.join(5)
    assert closing.dead, "close() blocks"
    all_closed(root)
    until(lambda: disk.status.load.threads == 0 and not disk.status.load.in_flight)


def test_files_may_be_closed_while_the_threads_of_their_disk_leave(root: Path, nothing_left_behind: None) -> None:
    # The pool must not count on a thread that has been told to leave and is not gone yet.
    for microseconds in range(0, 400, 2):
        disk = Disk("d1", root, Limits(threads=2))
        files = [disk.open("large") for _ in range(2)]
        gevent.joinall([gevent.spawn(disk.stall, 0.001) for _ in range(2)])
        disk.close()
        time.sleep(microseconds / 1e6)
        for file in files:
            file.close()
        all_closed(root)


def test_the_disk_is_closed_while_files_are_being_closed(make_disk: MakeDisk, root: Path) -> None:
    disk = make_disk(threads=1)
    files = [disk.open("large") for _ in range(5)]
    for file in files:
        file.close()
    disk.close()
    all_closed(root)
    until(lambda: disk.status.load.threads == 0)


def test_a_disk_is_closed_between_the_two_visits_of_a_read(make_disk: MakeDisk, root: Path) -> None:
    disk = make_disk(threads=1)
    reader = gevent.spawn(disk.read, "large")
    gevent.sleep(0)
    assert disk.status.load.in_flight == 1
    disk.close()
    with pytest.raises(RuntimeError, match="closed"):
        reader.get()
    all_closed(root)
    until(lambda: disk.status.load.threads == 0)


def test_a_call_from_another_thread_leaks_nothing(make_disk: MakeDisk, root: Path) -> None:
    # A read that is refused counts as under way no longer: the file and the root are closed when nothing is.
    disk = make_disk()
    file, refused = disk.open("large"), []
    calls: list[Callable[[], object]] = [lambda: file.read(300_000, 10), lambda: disk.read("small")]

    def work() -> None:
        for call in calls:
            try:
                call()
            except RuntimeError as error:
                refused.append(error)

    in_a_thread(work)
    assert len(refused) == 2
    file.close()
    all_closed(root)
    disk.close()
    until(lambda: str(root) not in descriptors().values())


def drop(files: list[DiskFile]) -> None:
    """Let go of files without closing them."""
    files.clear()
    gc.collect()


def in_a_thread(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def test_a_file_that_nobody_closed_is_closed_with_a_warning(make_disk: MakeDisk, root: Path) -> None:
    disk = make_disk()
    files = [disk.open("large")]
    with pytest.warns(ResourceWarning, match="unclosed <DiskFile d1/large>"):
        drop(files)
    all_closed(root)
    files.append(disk.open("small"))  # nothing is open any more
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drop(files)


def test_a_file_that_is_collected_in_another_thread_is_closed(make_disk: MakeDisk, root: Path) -> None:
    disk = make_disk()
    files = [disk.open("large")]
    with pytest.warns(ResourceWarning, match="unclosed"):
        in_a_thread(lambda: drop(files))
    all_closed(root)


def test_a_file_is_closed_even_if_the_warning_is_an_error(
    make_disk: MakeDisk, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, reported = make_disk(), []
    monkeypatch.setattr("sys.unraisablehook", lambda report: reported.append(report.exc_type))
    files = [disk.open("large")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drop(files)
    assert reported == [ResourceWarning]
    all_closed(root)


def test_a_finalizer_may_run_inside_of_the_pools_own_code(run_script: RunScript, root: Path) -> None:
    # The garbage collector may run DiskFile.__del__ while the hub's thread is inside of the pool's queue and
    # holds its lock (CPython 3.12 collects between any two bytecodes). The file must not enter the pool then: the
    # lock is not reentrant, and the whole server would hang.
    result = run_script(
        "import os, sys, threading, gevent\n"
        "from diskread import Disk\n"
        "disk = Disk('d1', sys.argv[1])\n"
        "file = disk.open('large')\n"
        "threading.Timer(10, os._exit, [9]).start()\n"
        "with disk._workers._crew.engine.pool.task_queue._mutex:\n"
        "    del file\n"
        "while any(os.readlink(f'/proc/self/fd/{fd}').endswith('/large') for fd in os.listdir('/proc/self/fd')\n"
        "          if os.path.exists(f'/proc/self/fd/{fd}')):\n"
        "    gevent.sleep(0.01)\n"
        "os._exit(0)\n",
        root,
    )
    assert result.returncode == 0, "deadlock"


def test_a_read_that_misses_its_deadline_leaves_the_file_usable(
    make_disk: MakeDisk, root: Path, gate: threading.Event
) -> None:
    disk = make_disk(threads=1, deadline=60)
    with disk.open("large") as file:
        gevent.spawn(disk.run, gate.wait, 60)
        until(lambda: disk.status.load.in_flight == 1)
        with pytest.raises(DiskTimeout):
            file.read(300_000, 10, deadline=0.02)
        gate.set()
        assert file.read(300_000, 10) == LARGE[300_000:300_010]
    all_closed(root)


# -- streams ----------------------------------------------------------------------------------------------------------


def test_a_file_that_becomes_shorter(make_disk: MakeDisk, root: Path) -> None:
    disk = make_disk()
    with disk.open("large") as file:
        chunks = file.chunks()
        received = [next(chunks)]
        os.truncate(root / "large", 100_000)
        with pytest.raises(DiskFileChanged, match=f"was to be read up to {len(LARGE)}") as caught:
            received += chunks
        assert caught.value.errno == errno.ESTALE
        # What was read ahead before the file was cut may be there as well.
        assert LARGE.startswith(b"".join(received))
        assert len(b"".join(received)) >= FIRST_CHUNK
        assert file.read(90_000, 50_000) == LARGE[90_000:100_000]
    all_closed(root)


def test_a_file_that_becomes_longer(make_disk: MakeDisk, root: Path) -> None:
    with make_disk().open("large") as file:
        chunks = file.chunks()
        received = next(chunks)
        with (root / "large").open("ab") as writer:
            writer.write(b"more" * 100_000)
        assert received + b"".join(chunks) == LARGE
        assert file.read() == LARGE
        assert file.read(len(LARGE), 4) == b"more", "an explicit range is read as it is now"


def test_a_stream_that_is_left_early_leaves_nothing(make_disk: MakeDisk, root: Path) -> None:
    disk = make_disk(threads=2)
    for taken in range(4):
        with disk.open("large") as file:
            chunks = file.chunks()
            for _ in range(taken):
                next(chunks)
            chunks.close()
            with pytest.raises(StopIteration):
                next(chunks)
    all_closed(root)
    until(lambda: not disk.status.load.in_flight)


def test_a_consumer_that_is_killed_leaves_nothing(make_disk: MakeDisk, root: Path, gate: threading.Event) -> None:
    disk = make_disk(threads=1, deadline=60)
    received = []

    def consume() -> None:
        with disk.open("large") as file:
            for chunk in file.chunks():
                received.append(chunk)
                occupied.append(gevent.spawn(disk.run, gate.wait, 60))
                gevent.sleep(0.01)

    occupied: list[gevent.Greenlet[..., Any]] = []
    consumer = gevent.spawn(consume)
    until(lambda: received and disk.status.load.in_flight)
    gevent.sleep(0.05)
    consumer.kill()
    gate.set()
    gevent.joinall(occupied)
    all_closed(root)
    until(lambda: not disk.status.load.in_flight and not disk.status.load.waiting)


def test_the_next_chunk_is_read_while_the_last_is_in_use(make_disk: MakeDisk) -> None:
    disk = make_disk()
    with disk.open("large") as file:
        chunks = file.chunks()
        next(chunks)
        reads_before = disk.status.counts.reads
        until(lambda: disk.status.counts.reads > reads_before, "a chunk to be read ahead")
        gevent.sleep(0.02)
        assert disk.status.counts.reads == reads_before + 1, "one chunk ahead, not more"
        chunks.close()


def test_an_error_during_read_ahead_comes_after_the_chunk_before_it(
    make_disk: MakeDisk, root: Path, gate: threading.Event, capfd: pytest.CaptureFixture[str]
) -> None:
    disk = make_disk(threads=1, queue=0)
    with disk.open("large") as file:
        occupied = gevent.spawn(disk.run, gate.wait, 60)
        until(lambda: disk.status.load.in_flight == 1)
        chunks = file.chunks()
        assert next(chunks) == LARGE[:FIRST_CHUNK]
        with pytest.raises(DiskBusy):
            next(chunks)
        with pytest.raises(StopIteration):
            next(chunks)
        gate.set()
        occupied.join()
    all_closed(root)
    assert capfd.readouterr().err == ""


def test_the_deadline_is_for_each_chunk(make_disk: MakeDisk) -> None:
    with make_disk().open("large") as file:
        received = []
        for chunk in file.chunks(deadline=0.3):
            received.append(chunk)
            gevent.sleep(0.2)  # a slow consumer
        assert b"".join(received) == LARGE


def test_a_file_that_is_closed_in_the_middle_of_a_stream(make_disk: MakeDisk, root: Path) -> None:
    disk = make_disk()
    file = disk.open("large")
    chunks = file.chunks()
    received = next(chunks)
    gevent.sleep(0.01)
    file.close()
    with pytest.raises(ValueError, match="was closed"):
        received += b"".join(chunks)
    assert LARGE.startswith(received)
    all_closed(root)


def test_a_negative_start(make_disk: MakeDisk) -> None:
    with make_disk().open("small") as file, pytest.raises(ValueError, match="negative"):
        list(file.chunks(-1))


def test_two_streams_of_one_file(make_disk: MakeDisk) -> None:
    with make_disk(threads=2).open("large") as file:
        pairs = itertools.zip_longest(file.chunks(), file.chunks(), fillvalue=b"")
        first, second = map(b"".join, zip(*pairs, strict=True))
        assert first == second == LARGE


# -- the status -------------------------------------------------------------------------------------------------------


def test_the_counts(make_disk: MakeDisk, gate: threading.Event) -> None:
    disk = make_disk(threads=1, queue=0)
    assert disk.read("small") == SMALL
    assert disk.read("large") == LARGE
    with pytest.raises(DiskFileNotFound):
        disk.read("missing")
    with pytest.raises(DiskTimeout):
        disk.run(gate.wait, 60, deadline=0.02)
    with pytest.raises(DiskBusy):
        disk.read("small")
    gate.set()
    until(lambda: not disk.status.load.in_flight)
    with pytest.raises(gevent.Timeout), gevent.Timeout(0.02):
        disk.stall(0.1)
    counts = disk.status.counts
    assert (counts.reads, counts.bytes) == (3, len(SMALL) + len(LARGE)), "the large one takes two visits"
    assert dict(counts.errors) == {"ENOENT": 1}
    assert (counts.timeouts, counts.rejections, counts.abandoned) == (1, 1, 1)
    until(lambda: not disk.status.load.in_flight)


def test_the_status_is_that_of_one_moment(make_disk: MakeDisk, root: Path) -> None:
    disk = make_disk(threads=2)
    before = disk.status
    assert (before.name, before.root, before.limits.threads) == ("d1", str(root), 2)
    assert (before.load.state, before.load.threads, before.load.accepting) == (State.ONLINE, 0, True)
    assert disk.read("small") == SMALL
    with pytest.raises(DiskFileNotFound):
        disk.read("missing")
    assert (before.counts.reads, before.counts.bytes, dict(before.counts.errors)) == (0, 0, {})
    assert (disk.status.counts.reads, dict(disk.status.counts.errors)) == (1, {"ENOENT": 1})


def test_what_is_shown(make_disk: MakeDisk, root: Path) -> None:
    disk = make_disk()
    assert repr(disk) == f"<Disk d1 at {root}>"
    with disk.open("directory/inner") as file:
        assert isinstance(file, DiskFile)
        assert repr(file) == "<DiskFile d1/directory/inner>"
    found = (root / "directory" / "inner").stat()
    assert disk.stat("directory/inner") == file.stat
    assert (file.stat.mtime_ns, file.stat.inode, file.stat.device) == (found.st_mtime_ns, found.st_ino, found.st_dev)


def test_a_disk_costs_nothing_until_it_is_used(run_script: RunScript) -> None:
    started = time.monotonic()
    result = run_script("import diskread\nfor n in range(10000): diskread.Disk(str(n), '/nowhere')\n")
    assert (result.returncode, result.stderr) == (0, "")
    assert time.monotonic() - started < 20


def test_what_was_asked_before_a_disk_was_put_online_by_hand_says_nothing_of_it_afterwards(make_disk: MakeDisk) -> None:
    disk = make_disk()
    disk.read("small")
    ask, tell = disk._make_probe()
    disk.set_online()  # another device may have been mounted
    ask.run()
    tell()
    assert disk._root_device is None
    slow = gevent.spawn(disk.read, "small")
    gevent.sleep(0)
    disk.set_online()
    assert slow.get(timeout=20) == SMALL
    assert (disk._root_device, disk._root_fd) == (None, -1)
    assert disk.read("small") == SMALL
    assert disk._root_fd >= 0
