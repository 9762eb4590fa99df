"""Mirrors of disks that are well, or not there, or full: what is read, from which disk, and what is counted."""

from __future__ import annotations

import io
import math
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gevent
import pytest

from diskread import (
    CHUNK,
    Disk,
    DiskBusy,
    DiskFileChanged,
    DiskFileForbidden,
    DiskFileNotFound,
    DiskFileNotRegular,
    DiskOffline,
    DiskPathInvalid,
    Limits,
    Mirror,
)
from diskread.mirror import MirrorFile

from .conftest import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from diskread.limits import EngineName
    from diskread.raw_io import RawDiskFile

CONTENT = os.urandom(3 * CHUNK + 17)
MTIME_NS = 1_700_000_000_123_456_789

MakeMirror = Callable[..., Mirror]


def put(root: Path, name: str, content: bytes, mtime_ns: int = MTIME_NS) -> None:
    (root / name).write_bytes(content)
    os.utime(root / name, ns=(mtime_ns, mtime_ns))


@pytest.fixture
def roots(tmp_path: Path) -> list[Path]:
    """The same two files on three disks."""
    found = [tmp_path / name for name in "abc"]
    for root in found:
        root.mkdir()
        (root / "directory").mkdir()
        put(root, "large", CONTENT)
        put(root, "small", b"small")
    return found


@pytest.fixture
def make_mirror(nothing_left_behind: None, engine: EngineName) -> Iterator[MakeMirror]:
    """Make mirrors of disks on the given directories; all is closed after the test."""
    made = []

    def make(
        *roots: Path,
        hedge_after: float = math.inf,
        hedge_share: float = 0.05,
        checksum_suffix: str | None = None,
        **limits: Any,
    ) -> Mirror:
        chosen = Limits(**{"inline": "off", "idle": 0.2, "engine": engine, **limits})
        disks = [Disk(root.name, root, chosen) for root in roots]
        mirror = Mirror("m", disks, hedge_after=hedge_after, hedge_share=hedge_share, checksum_suffix=checksum_suffix)
        made.append(mirror)
        return made[-1]

    yield make
    for mirror in made:
        mirror.close()


def occupy(disk: Disk, gate: threading.Event) -> None:
    """Take all slots of a disk until the gate opens."""
    for _ in range(disk.limits.threads):
        gevent.spawn(disk.run, gate.wait, deadline=60)
    until(lambda: disk.status.load.in_flight == disk.limits.threads)


def test_reads_as_a_disk_does(make_mirror: MakeMirror, roots: list[Path]) -> None:
    mirror = make_mirror(*roots)
    assert mirror.read("small") == b"small"
    assert mirror.read("large") == CONTENT
    assert mirror.read(b"large", 5, 10) == CONTENT[5:15]
    assert mirror.read("large", len(CONTENT) - 3, 10) == CONTENT[-3:]
    stat = mirror.stat("large")
    assert (stat.size, stat.mtime_ns, stat.inode, stat.device) == (len(CONTENT), MTIME_NS, 0, 0)
    assert stat.disk in "abc"
    with mirror.open("large") as file:
        assert file.stat.size == len(CONTENT)
        assert file.disk in "abc"
        assert file.read(7, 8) == CONTENT[7:15]
        assert file.read() == CONTENT
        assert file.read(len(CONTENT) + 5) == b""
        assert b"".join(file.chunks()) == CONTENT
        assert b"".join(file.chunks(3, CHUNK + 5)) == CONTENT[3 : CHUNK + 5]
        assert max(map(len, file.chunks())) == CHUNK
        assert list(file.chunks(5, 5)) == []
    with mirror.open("small") as file:
        assert list(file.chunks()) == [b"small"]
    with pytest.raises(ValueError, match="was closed"):
        file.read()
    counts = mirror.status.counts
    assert counts.answers.total() == counts.reads
    assert (counts.hedges, dict(counts.failovers)) == (0, {})


def test_disks_take_turns(make_mirror: MakeMirror, roots: list[Path]) -> None:
    mirror = make_mirror(*roots)
    assert {mirror.stat("small").disk for _ in range(200)} == {"a", "b", "c"}


def test_what_is_cached_needs_no_thread(make_mirror: MakeMirror, roots: list[Path]) -> None:
    mirror = make_mirror(*roots, inline="auto")
    for disk in mirror.disks:
        disk.read("large")  # opens the root, and asks what may be read inline
        if not disk.status.inline.on:
            pytest.skip(str(disk.status.inline.reason))
    in_threads = [disk.status.disk_time.count for disk in mirror.disks]
    for _ in range(50):
        assert mirror.read("large", 0, 1000) == CONTENT[:1000]
        found = mirror.read_cached("small")
        if found is not None:
            assert found[1] == b"small"
    assert sum(disk.status.inline.hits for disk in mirror.disks) > 20
    assert sum(disk.status.disk_time.count for disk in mirror.disks) - sum(in_threads) < 50


@pytest.mark.parametrize("lost", ["root", "by hand"])
def test_a_disk_that_is_offline_costs_nothing(lost: str, make_mirror: MakeMirror, roots: list[Path]) -> None:
    mirror = make_mirror(roots[0] / "nowhere" if lost == "root" else roots[0], roots[1])
    if lost == "by hand":
        mirror.disks[0].set_offline("to be replaced")
    for _ in range(20):
        assert mirror.read("large") == CONTENT
    assert mirror.status.counts.answers == {"b": 20}
    assert mirror.status.accepting
    mirror.disks[1].set_offline("to be replaced, too")
    with pytest.raises(DiskOffline, match=r"offline.*mirror m:.*offline"):
        mirror.read("large")
    assert not mirror.status.accepting


def test_a_busy_disk_is_left_for_another_and_all_busy_is_busy(
    make_mirror: MakeMirror, roots: list[Path], gate: threading.Event
) -> None:
    mirror = make_mirror(*roots[:2], threads=1, queue=0)
    occupy(mirror.disks[0], gate)
    for _ in range(10):
        assert mirror.read("small") == b"small"
    assert mirror.status.counts.answers == {"b": 10}
    occupy(mirror.disks[1], gate)
    with pytest.raises(DiskBusy, match="mirror m"):
        mirror.read("small")
    gate.set()
    until(lambda: all(not disk.status.load.in_flight for disk in mirror.disks))
    assert mirror.read("small") == b"small"


def test_no_such_file_is_what_all_say(make_mirror: MakeMirror, roots: list[Path]) -> None:
    mirror = make_mirror(*roots)
    with pytest.raises(DiskFileNotFound):
        mirror.read("none")
    put(roots[2], "new", b"new")
    for _ in range(12):
        assert mirror.read("new") == b"new"
    assert mirror.status.counts.answers == {"c": 12}
    assert not mirror.status.counts.failovers, "a disk without the file has not failed"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("directory", DiskFileNotRegular),
        ("../b/small", DiskFileForbidden),
        ("", DiskPathInvalid),
        ("/x", DiskPathInvalid),
    ],
)
def test_what_a_path_names_is_the_same_everywhere(
    path: str, kind: type[Exception], make_mirror: MakeMirror, roots: list[Path]
) -> None:
    mirror = make_mirror(*roots)
    with pytest.raises(kind) as caught:
        mirror.read(path)
    assert "mirror" not in str(caught.value), "asked another disk"


def test_a_stream_goes_on_from_another_disk_at_the_same_byte(make_mirror: MakeMirror, roots: list[Path]) -> None:
    mirror = make_mirror(*roots)
    with mirror.open("large") as file:
        got: list[bytes] = []
        left: set[str] = set()
        for chunk in file.chunks():
            got.append(chunk)
            if len(left) < 2:
                left.add(file.disk)
                next(disk for disk in mirror.disks if disk.name == file.disk).set_offline("gone")
        assert b"".join(got) == CONTENT
        assert file.disk not in left
        assert len(left) == 2
    assert mirror.status.counts.failovers.keys() == left


@pytest.mark.parametrize("other", ["longer", "newer", "missing", "directory"])
def test_never_bytes_of_two_versions(other: str, make_mirror: MakeMirror, roots: list[Path]) -> None:
    mirror = make_mirror(*roots[:2])
    with mirror.open("large") as file:
        first, second = mirror.disks if file.disk == "a" else mirror.disks[::-1]
        victim = roots["ab".index(second.name)]
        if other == "longer":
            put(victim, "large", CONTENT + b"!")
        elif other == "newer":
            put(victim, "large", CONTENT, MTIME_NS + 1)
        else:
            (victim / "large").unlink()
            if other == "directory":
                (victim / "large").mkdir()
        chunks = file.chunks()
        assert CONTENT.startswith(next(chunks))
        gevent.sleep(0.05)  # the next chunk is on its way
        first.set_offline("gone")
        with pytest.raises(DiskFileChanged, match="that was opened"):
            list(chunks)


def test_a_file_cut_short_under_way_goes_on_from_a_copy_of_what_it_was(
    make_mirror: MakeMirror, roots: list[Path]
) -> None:
    mirror = make_mirror(*roots[:2])
    with mirror.open("large") as file:
        os.truncate(roots["ab".index(file.disk)] / "large", 100_000)
        assert b"".join(file.chunks()) == CONTENT
    with mirror.open("large") as file:  # now they differ, and each is served as it is
        assert b"".join(file.chunks()) == CONTENT[: file.stat.size]
        for root in roots[:2]:
            os.truncate(root / "large", 70_000)
        with pytest.raises(DiskFileChanged):
            file.read(80_000, 1000)


def test_python_reads_its_files_as_streams(make_mirror: MakeMirror, roots: list[Path]) -> None:
    mirror = make_mirror(*roots[:2])
    with mirror.open("large").as_io() as raw, io.BufferedReader(raw, CHUNK) as stream:
        assert stream.read(1000) == CONTENT[:1000]
        os.truncate(roots["ab".index(mirror_disk(raw))] / "large", 100_000)
        assert stream.read() == CONTENT[1000:]
        assert stream.seek(-5, io.SEEK_END) == len(CONTENT) - 5
        assert stream.read() == CONTENT[-5:]
    with mirror.open("large") as file, pytest.raises(ValueError, match="deadline"):
        file.as_io(deadline=0)


def mirror_disk(raw: RawDiskFile) -> str:
    file = raw._file
    assert isinstance(file, MirrorFile)
    return file.disk


@pytest.mark.parametrize(
    ("first", "second", "same_time", "goes_on"),
    [
        ("abc  large\n", "ABC", False, True),
        ("abc", "abd", True, False),
        (None, "abc", True, True),
        ("abc", None, False, False),
        ("", "", False, False),
    ],
)
def test_checksum_files_say_which_copies_are_the_same(
    first: str | None,
    second: str | None,
    same_time: bool,
    goes_on: bool,
    make_mirror: MakeMirror,
    roots: list[Path],
) -> None:
    mirror = make_mirror(*roots[:2], checksum_suffix=".sum")
    for number, (root, said) in enumerate(zip(roots, (first, second), strict=False)):
        put(root, "large", CONTENT, MTIME_NS + (0 if same_time else number))
        if said is not None:
            (root / "large.sum").write_text(said)
    with mirror.open("large") as file:
        os.truncate(roots["ab".index(file.disk)] / "large", 100_000)
        if goes_on:
            assert b"".join(file.chunks()) == CONTENT
        else:
            with pytest.raises(DiskFileChanged, match="another version"):
                list(file.chunks())


def test_the_checksum_of_a_file_that_was_replaced_meanwhile_does_not_count(
    make_mirror: MakeMirror, roots: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = make_mirror(*roots[:2], checksum_suffix=".sum")
    newer = os.urandom(len(CONTENT))
    for root in roots[:2]:
        (root / "large.sum").write_text("old")
    read = Disk.read

    def replace_and_read(disk: Disk, path: Any, *arguments: Any, **named: Any) -> bytes:
        for root in roots[:2]:  # just after it was opened
            (root / "large.sum").unlink()
            put(root, "newer", newer, MTIME_NS + 1)
            os.replace(root / "newer", root / "large")
            (root / "large.sum").write_text("new")
        return read(disk, path, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Disk, "read", replace_and_read)
        file = mirror.open("large")
    with file, pytest.raises(DiskFileChanged, match="another version"):
        file._read_on(next(disk for disk in mirror.disks if disk.name != file.disk), 0, 10, 5.0)


def test_a_stream_that_is_dropped_leaves_nothing(make_mirror: MakeMirror, roots: list[Path]) -> None:
    mirror = make_mirror(*roots)
    file = mirror.open("large")
    next(file.chunks())
    file.close()
    file.close()


@pytest.mark.parametrize("when", [0.0, 0.0005, 0.005])
def test_a_reader_that_is_killed_leaves_nothing(when: float, make_mirror: MakeMirror, roots: list[Path]) -> None:
    mirror = make_mirror(*roots, hedge_after=0.002, hedge_share=1)

    def read() -> None:
        with mirror.open("large") as file:
            assert b"".join(file.chunks()) == CONTENT

    readers = [gevent.spawn(read) for _ in range(20)]
    gevent.sleep(when)
    gevent.killall(readers)
    until(lambda: all(not disk.status.load.in_flight for disk in mirror.disks))


def test_a_late_disk_is_hedged_and_both_answers_leave_nothing(
    make_mirror: MakeMirror, roots: list[Path], gate: threading.Event
) -> None:
    mirror = make_mirror(*roots[:2], hedge_after=0.01, hedge_share=1, threads=1)
    for disk in mirror.disks:
        occupy(disk, gate)
    asking = [gevent.spawn(mirror.open, "large", deadline=60) for _ in range(10)]
    gevent.sleep(0.1)
    gate.set()
    for each in asking:
        with each.get() as file:
            assert file.read() == CONTENT


def test_the_loser_is_abandoned_at_once(make_mirror: MakeMirror, roots: list[Path], gate: threading.Event) -> None:
    mirror = make_mirror(*roots[:2], threads=1)
    first, second = mirror.disks
    occupy(first, gate)
    other = threading.Event()
    occupy(second, other)
    reading = gevent.spawn(mirror.read, "small", deadline=2.0)
    until(lambda: first.status.load.waiting and second.status.load.waiting, "both disks to be asked")
    other.set()
    assert reading.get() == b"small"
    until(lambda: not first.status.load.waiting, "the loser to leave the line", 1.0)
    assert first.status.counts.abandoned == 1
    assert not gate.is_set()


def test_it_cannot_be_made_of_nonsense(roots: list[Path]) -> None:
    disk = Disk("a", roots[0])
    for name, disks in (("", [disk]), ("m", []), ("m", [disk, disk]), ("m", [disk, Disk("s", None)])):
        with pytest.raises(ValueError, match="mirror"):
            Mirror(name, disks)
    with pytest.raises(ValueError, match="hedge_after"):
        Mirror("m", [disk], hedge_after=0)
    with pytest.raises(ValueError, match="deadline"):
        Mirror("m", [disk]).read("small", deadline=0)
    for suffix in ("", "/sum", "\0"):
        with pytest.raises(ValueError, match="suffix"):
            Mirror("m", [disk], checksum_suffix=suffix)


def test_it_is_not_for_the_hub(make_mirror: MakeMirror, roots: list[Path]) -> None:
    mirror, said = make_mirror(*roots), []

    def ask() -> None:
        try:
            mirror.read("small")
        except RuntimeError as error:
            said.append(str(error))

    gevent.get_hub().loop.run_callback(ask)
    until(lambda: said)
    assert "spawn a greenlet" in said[0]


def test_after_close(make_mirror: MakeMirror, roots: list[Path]) -> None:
    with make_mirror(*roots) as mirror:
        assert mirror.read("small") == b"small"
    with pytest.raises(RuntimeError, match="closed"):
        mirror.read("small")
