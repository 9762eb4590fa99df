"""Inline reads: what the page cache has, on the hub's own thread, and nothing else than a worker would read."""

from __future__ import annotations

import errno
import os
import random
from typing import TYPE_CHECKING

import gevent
import pytest
from gevent import socket
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diskread import Disk, DiskError, DiskFileNotFound, DiskFileNotRegular, DiskPathInvalid, Limits
from diskread.inline import Capability, Inline, capability
from tests.conftest import LARGE, SMALL, descriptors, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    MakeDisk = Callable[..., Disk]

PAGE = 4096
CONTENT = random.Random(5).randbytes(3 * 1024 * 1024 + 777)


def capability_of(directory: Path) -> Capability:
    descriptor = os.open(directory, os.O_PATH)
    try:
        return capability(descriptor)
    finally:
        os.close(descriptor)


@pytest.fixture
def cached(root: Path, make_disk: MakeDisk, monkeypatch: pytest.MonkeyPatch) -> Disk:
    """A disk whose files are in the page cache, with its inline reads on, as if the kernel did not read ahead."""
    reason = capability_of(root).reason
    if reason is not None:
        pytest.skip(f"no inline reads in the directory of the tests: {reason}")
    monkeypatch.setattr("diskread.inline.read_ahead", lambda _device: 0)
    (root / "big").write_bytes(CONTENT)
    os.sync()
    disk = make_disk(inline="auto")
    for name in ("small", "large", "empty", "big", "directory/inner"):
        disk.read(name)
    assert disk.status.inline.on
    return disk


def visits(disk: Disk) -> int:
    return disk.status.disk_time.count


def evict(path: Path, offset: int = 0, size: int = 0) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def cache_only(path: Path, stop: int) -> None:
    """Have the beginning of a file in the page cache and nothing else. (A cached folio can be larger than a page.)"""
    evict(path)
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    assert len(os.pread(descriptor, stop, 0)) == stop
    os.close(descriptor)


def test_what_is_cached_needs_no_visit(cached: Disk) -> None:
    before = visits(cached), cached.status.inline, cached.status.counts
    assert cached.read("small") == SMALL
    assert cached.read("directory/inner") == b"inner"
    assert cached.stat("large").size == len(LARGE)
    with cached.open("large") as file:
        assert file.read(5, 7) == LARGE[5:12]
        assert b"".join(file.chunks()) == LARGE
    after = cached.status
    assert visits(cached) == before[0]
    assert after.inline.hits > before[1].hits
    assert after.counts.reads > before[2].reads
    assert after.counts.bytes - before[2].bytes >= len(SMALL) + len(LARGE)


@pytest.mark.parametrize("inline", ["auto", "off"])
def test_off_is_off(inline: str, root: Path, make_disk: MakeDisk) -> None:
    disk = make_disk(inline=inline)
    for _ in range(3):
        assert disk.read("small") == SMALL
    status = disk.status.inline
    if inline == "off":
        assert (status.on, status.reason, status.hits, visits(disk)) == (False, "switched off", 0, 3)
    else:
        assert status.on == (status.reason is None)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    offset=st.integers(0, len(CONTENT) + 9),
    size=st.none() | st.integers(0, len(CONTENT) + 9),
    gone=st.tuples(st.integers(0, len(CONTENT)), st.integers(1, len(CONTENT))),
)
def test_whatever_is_cached_the_bytes_are_those_of_the_file(
    cached: Disk, root: Path, offset: int, size: int | None, gone: tuple[int, int]
) -> None:
    evict(root / "big", *gone)
    expected = CONTENT[offset:] if size is None else CONTENT[offset : offset + size]
    assert cached.read("big", offset, size) == expected
    evict(root / "big", *gone)
    with cached.open("big", offset=offset, size=min(5000, len(CONTENT))) as file:
        assert file.read(offset, size) == expected
        evict(root / "big", *gone)
        assert b"".join(file.chunks(offset, None if size is None else offset + size)) == expected


def test_only_the_missing_part_is_read_in_a_worker(cached: Disk, root: Path) -> None:
    cache_only(root / "big", 1024 * 1024)
    before = cached.status
    assert cached.read("big", 500_000, 1_000_000) == CONTENT[500_000:1_500_000]
    after = cached.status
    assert after.inline.partial == before.inline.partial + 1
    assert visits(cached) == before.disk_time.count + 1
    assert after.counts.bytes - before.counts.bytes == 1_000_000
    assert after.inline.bytes - before.inline.bytes == (1024 * 1024 - 500_000) // 65536 * 65536


def test_a_page_that_is_read_ahead_from_has_to_have_the_window_behind_it_cached(
    cached: Disk, root: Path, monkeypatch: pytest.MonkeyPatch, make_disk: MakeDisk
) -> None:
    monkeypatch.setattr("diskread.inline.read_ahead", lambda _device: 128 * 1024)
    disk = make_disk(inline="auto")
    disk.read("small")
    with disk.open("big", size=0) as file:
        cache_only(root / "big", 1024 * 1024)
        before = disk.status.inline
        file.read(1024 * 1024 - 128 * 1024 - PAGE, PAGE)
        assert disk.status.inline.hits == before.hits + 1
        gevent.sleep(0.01)
        file.read(1024 * 1024 - 128 * 1024, PAGE)
        assert disk.status.inline.misses == before.misses + 1


def test_the_end_of_a_file_that_grows_or_shrinks(cached: Disk, root: Path) -> None:
    with cached.open("big", size=0) as file:
        os.truncate(root / "big", 10_000)
        assert file.read(0, 20_000) == CONTENT[:10_000]
        with (root / "big").open("ab") as grown:
            grown.write(b"more")
        assert file.read(9_999, 20_000) == CONTENT[9_999:10_000] + b"more"


def test_access_times_are_left_alone_because_updates_wait_for_the_journal(cached: Disk, root: Path) -> None:
    for name in ("small", "large"):
        os.utime(root / name, (1, os.stat(root / name).st_mtime))  # older than a day: relatime would update it
    hits = cached.status.inline.hits
    assert cached.read("small") == SMALL
    with cached.open("large") as file:
        assert file.read() == LARGE
    assert cached.status.inline.hits >= hits + 2
    assert [os.stat(root / name).st_atime for name in ("small", "large")] == [1, 1]


def test_a_replaced_file_is_never_served_stale(cached: Disk, root: Path) -> None:
    for number in range(50):
        content = b"%d" % number * 3000
        (root / "new").write_bytes(content)
        os.replace(root / "new", root / "small")
        assert cached.read("small") == content
        with cached.open("small") as file:
            assert file.read() == content
    os.unlink(root / "small")
    with pytest.raises(DiskFileNotFound):
        cached.read("small")


def test_a_file_that_was_deleted_while_open_is_closed_by_a_worker(cached: Disk, root: Path) -> None:
    file = cached.open("big", size=0)
    os.unlink(root / "big")
    before = descriptors()
    assert any("big (deleted)" in name for name in before.values())
    file.close()
    until(lambda: not any("big (deleted)" in name for name in descriptors().values()))


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("missing", DiskFileNotFound),
        ("directory", DiskFileNotRegular),
        ("small/x", DiskError),
        ("/etc/passwd", DiskPathInvalid),
        ("../x", DiskError),
        ("", DiskPathInvalid),
        ("a\0b", DiskPathInvalid),
        (b"\xff\xfe", DiskFileNotFound),
        ("\udcff", DiskFileNotFound),
    ],
)
def test_errors_are_those_of_the_slow_way(cached: Disk, make_disk: MakeDisk, path: str | bytes, kind: type) -> None:
    slow = make_disk(inline="off")
    for ask in (Disk.read, Disk.stat, Disk.open):
        with pytest.raises(kind) as here:
            ask(cached, path)
        with pytest.raises(kind) as there:
            ask(slow, path)
        assert type(here.value) is type(there.value)
        assert str(here.value) == str(there.value)


@pytest.mark.parametrize("number", [-1, -(2**63), 2**63, 2**64])
def test_bad_numbers(cached: Disk, number: int) -> None:
    with cached.open("small") as file:
        for ask in (
            lambda: cached.read("small", number),
            lambda: cached.read("small", 0, number),
            lambda: cached.open("small", offset=number),
            lambda: cached.open("small", size=number),
            lambda: file.read(number),
            lambda: file.read(0, number),
        ):
            with pytest.raises(ValueError, match="must"):
                ask()


@pytest.mark.parametrize("number", [1.5, "1", None])
def test_what_is_no_number(cached: Disk, number: object) -> None:
    with pytest.raises(TypeError):
        cached.read("small", number)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="deadline"):
        cached.read("small", deadline=-1)


def test_reading_in_a_loop_lets_others_have_their_turn(cached: Disk) -> None:
    turns = 0

    def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            gevent.sleep(0)

    other = gevent.spawn(count)
    left, right = socket.socketpair()
    served = 0

    def answer() -> None:
        nonlocal served
        while left.recv(1):
            left.send(b"x")
            served += 1

    def ask() -> None:
        while True:
            right.send(b"x")
            right.recv(1)

    talk = [gevent.spawn(answer), gevent.spawn(ask)]
    with cached.open("big", size=0) as file:
        for _ in range(3000):
            file.read(0, PAGE)
    assert turns >= 10
    assert served >= 5, "sockets have their turn as well"
    gevent.killall([other, *talk])
    left.close()
    right.close()


def test_after_close_and_by_hand_nothing_is_served(cached: Disk) -> None:
    cached.set_offline("test")
    with pytest.raises(DiskError, match="by hand"):
        cached.read("small")
    cached.set_online()
    assert cached.read("small") == SMALL
    cached.close()
    with pytest.raises(RuntimeError, match="closed"):
        cached.read("small")


def test_a_chain_of_large_reads_leaks_nothing_when_killed(cached: Disk) -> None:
    def read() -> None:
        while True:
            cached.read("big")

    greenlets = [gevent.spawn(read) for _ in range(5)]
    gevent.sleep(0.05)
    gevent.killall(greenlets)


# -- the policy --------------------------------------------------------------------------------------------------------


@pytest.fixture
def inline() -> Inline:
    policy = Inline(True)
    policy.learn(Capability(None, os.O_NOATIME, 128 * 1024))
    return policy


def test_nothing_is_known_at_first() -> None:
    policy = Inline(True)
    assert (policy.on, policy.status.reason) == (False, "not known before the disk has answered")
    policy.learn(Capability("no"))
    policy.learn(Capability(None))
    assert (policy.on, policy.status.reason) == (False, "no"), "what was found out stays"
    policy.forget()
    policy.learn(Capability(None, 1, 2))
    assert (policy.on, policy.flags, policy.window, policy.status.reason) == (True, 1, 2, None)


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_an_answer_that_will_not_change_ends_inline_reads_for_good(inline: Inline, error: int) -> None:
    inline.failed(error)
    assert not inline.on
    assert inline.status.reason == f"the file system has answered {errno.errorcode[error]}"
    inline.learn(Capability(None))
    assert not inline.on


@pytest.mark.parametrize("error", [errno.EPERM, errno.EACCES, errno.EMFILE, errno.EXDEV])
def test_other_errors_concern_the_file_alone(inline: Inline, error: int) -> None:
    inline.failed(error)
    assert inline.on
    assert inline.status.fallbacks == {errno.errorcode[error]: 1}


def test_a_miss_is_no_fallback(inline: Inline) -> None:
    inline.failed(errno.EAGAIN)
    inline.failed(errno.ENOENT)
    inline.failed(0)
    status = inline.status
    assert (status.misses, status.fallbacks) == (1, {})


def test_a_file_system_that_is_not_known_to_be_safe_says_why(tmp_path: Path) -> None:
    assert capability_of(_proc()).reason == "the file system is of type 0x9fa0, not ext4 or xfs"
    with Disk("proc", "/proc", Limits()) as disk:
        disk.read("version", 0, 10)
        assert disk.status.inline.on is False
        assert "0x9fa0" in str(disk.status.inline.reason)


def _proc() -> Path:
    from pathlib import Path

    return Path("/proc")
