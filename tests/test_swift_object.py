"""The extension that opens Swift's objects: without Swift."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from typing import TYPE_CHECKING

import pytest

from diskread._cached import file_system
from diskread.inline import KNOWN
from diskread.swift._object import open_object, reopen_object

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NAME = "1700000000.00000.data"
TICK = 0.02
"""Seconds after which a change has another time than one before: the kernel's clock ticks every 10 ms at the latest."""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An object."""
    path = tmp_path / "hash"
    path.mkdir()
    (path / NAME).write_bytes(b"content")
    try:
        os.setxattr(path / NAME, "user.swift.metadata", b"metadata")
    except OSError:
        pytest.skip("needs a file system with extended attributes for temporary files")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if file_system(descriptor)[0] not in KNOWN:
            pytest.skip("needs ext4 or xfs for temporary files")
    finally:
        os.close(descriptor)
    time.sleep(TICK)
    return path


def opened(directory: Path, settle: float = 0.0) -> tuple[bytes, bytes | None]:
    """Name and identity."""
    found = open_object(bytes(directory), 1 << 16, 1 << 16, int(settle * 1e9))
    assert found is not None
    descriptor, name, metadata, checksum, data, identity = found
    os.close(descriptor)
    assert (metadata, checksum, data) == (b"metadata", None, b"content")
    return name, identity


def reopened(directory: Path, identity: bytes | None, name: str = NAME) -> int:
    assert identity is not None
    result = reopen_object(bytes(directory), name.encode(), identity, os.O_NOATIME)
    if result >= 0:
        os.close(result)
        return 0
    return -result


def test_an_object_that_is_the_same_is_opened_again(directory: Path) -> None:
    name, identity = opened(directory)
    assert name.decode() == NAME
    assert identity is not None
    descriptor = reopen_object(bytes(directory), name, identity, os.O_NOATIME)
    assert descriptor >= 0
    try:
        assert os.pread(descriptor, 100, 0) == b"content"
        assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_NOATIME
        assert fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    finally:
        os.close(descriptor)


def replace_by_a_copy(directory: Path) -> None:
    path = directory / NAME
    content = path.read_bytes()
    path.rename(directory.parent / "old")
    path.write_bytes(content)
    os.setxattr(path, "user.swift.metadata", b"metadata")


CHANGES: dict[str, Callable[[Path], object]] = {
    "content": lambda directory: (directory / NAME).write_bytes(b"CONTENT"),
    "size": lambda directory: os.truncate(directory / NAME, 3),
    "metadata": lambda directory: os.setxattr(directory / NAME, "user.swift.metadata", b"METADATA"),
    "checksum": lambda directory: os.setxattr(directory / NAME, "user.swift.metadata_checksum", b"0" * 32),
    "more metadata": lambda directory: os.setxattr(directory / NAME, "user.swift.metadata1", b"more"),
    "another file": lambda directory: (directory / "1700000001.00000.meta").touch(),
    "a copy": replace_by_a_copy,
    "another name": lambda directory: (directory / NAME).rename(directory / "1700000001.00000.data"),
    "another link": lambda directory: os.link(directory / NAME, directory.parent / "link"),
    "mode": lambda directory: (directory / NAME).chmod(0o600),
    "no file": lambda directory: (directory / NAME).unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_it_makes_it_another_one(directory: Path, change: str) -> None:
    _, identity = opened(directory)
    assert reopened(directory, identity) == 0
    CHANGES[change](directory)
    assert reopened(directory, identity) == errno.ESTALE


def test_a_change_and_back_is_a_change(directory: Path) -> None:
    _, identity = opened(directory)
    status = os.stat(directory / NAME)
    (directory / NAME).write_bytes(b"CONTENT")
    (directory / NAME).write_bytes(b"content")
    os.utime(directory / NAME, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert reopened(directory, identity) == errno.ESTALE


def test_another_directory_in_its_place_is_another_object(directory: Path) -> None:
    _, identity = opened(directory)
    directory.rename(directory.with_name("old"))
    assert reopened(directory, identity) in (errno.ENOENT, errno.EAGAIN)
    assert reopened(directory.with_name("old"), identity) in (0, errno.ESTALE)  # some file systems date the renaming
    directory.mkdir()
    os.link(directory.with_name("old") / NAME, directory / NAME)
    assert reopened(directory, identity) == errno.ESTALE


def test_what_has_just_changed_has_no_identity(directory: Path) -> None:
    assert opened(directory, settle=30.0)[1] is None
    time.sleep(0.5)
    assert opened(directory, settle=0.4)[1] is not None
    (directory / NAME).chmod(0o600)
    assert opened(directory, settle=30.0)[1] is None
    time.sleep(0.5)
    assert opened(directory, settle=0.4)[1] is not None
    (directory / "other").touch()
    (directory / "other").unlink()
    assert opened(directory, settle=30.0)[1] is None


def test_what_is_not_in_the_dentry_cache_is_not_opened(directory: Path) -> None:
    _, identity = opened(directory)
    try:
        with open("/proc/sys/vm/drop_caches", "w") as file:
            file.write("2")
    except OSError:
        pytest.skip("needs root to drop the dentry cache")
    assert reopened(directory, identity) in (0, errno.EAGAIN)  # the kernel drops what it likes
    assert opened(directory)[1] == identity


def test_parameters(directory: Path) -> None:
    _, identity = opened(directory)
    assert identity is not None
    for wrong in (b"", identity[:-1], identity + b"x"):
        with pytest.raises(ValueError, match=f"an identity has {len(identity)} bytes, not {len(wrong)}"):
            reopen_object(bytes(directory), NAME.encode(), wrong, 0)
    assert reopen_object(bytes(directory) + b"\0", NAME.encode(), identity, 0) == -errno.EINVAL
    assert reopen_object(bytes(directory), b"\0", identity, 0) == -errno.EINVAL
    assert reopen_object(bytes(directory), b"../hash/" + NAME.encode(), identity, 0) in (-errno.EXDEV, -errno.EAGAIN)
    assert reopen_object(bytes(directory / NAME), NAME.encode(), identity, 0) == -errno.ENOTDIR
    with pytest.raises(TypeError):
        reopen_object(None, NAME.encode(), identity, 0)  # type: ignore[arg-type]


def test_nothing_stays_open(directory: Path) -> None:
    _, identity = opened(directory)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        assert reopened(directory, identity) == 0
    os.setxattr(directory / NAME, "user.swift.metadata", b"METADATA")
    for _ in range(100):
        assert reopened(directory, identity) == errno.ESTALE
    (directory / "other").touch()
    for _ in range(100):
        assert reopened(directory, identity) == errno.ESTALE
    assert len(os.listdir("/proc/self/fd")) == before
