"""Asks the device itself whether it answers: past the page cache, below the root that the disk is known to have."""

from __future__ import annotations

import errno
import mmap
import os
import random
from dataclasses import dataclass

BLOCK = 4096
"""Bytes that a probe reads, and the alignment that O_DIRECT wants at most: open(2)."""

DEEPEST = 3
"""Levels of directories below the root that are searched for a file to read."""

MOST_ENTRIES = 200
"""Directory entries that are looked at in that search."""


class RootLost(OSError):
    """The root cannot be opened, or it is on another device: unmounted, and an empty mount point is no empty disk."""


@dataclass(frozen=True)
class Findings:
    """What a probe found out.

    Attributes:
        device: Device number of the root (`st_dev`).
        sample: A file that can be read, relative to the root; None when the disk has none within reach.
        direct: Whether it was read past the page cache with O_DIRECT.
    """

    device: int
    sample: bytes | None
    direct: bool


def probe(root: bytes, device: int | None, sample: bytes | None) -> Findings:
    """Open the root and read a block of a file on it. Blocks the native thread for as long as the disk takes.

    Args:
        root: The root directory.
        device: Device number that the root has to have; None when it is not known yet.
        sample: A file to read, relative to the root; None looks for one. A disk without files within reach has its
            root directory read instead, which its page cache may answer.

    Raises:
        RootLost: The root cannot be opened, or it is on another device.
        OSError: The file cannot be read.
    """
    try:
        directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise RootLost(error.errno, error.strerror) from error
    try:
        found = os.fstat(directory).st_dev
        if device is not None and found != device:
            raise RootLost(errno.ESTALE, "another device is there now: was it unmounted?")
        if sample is not None:
            try:
                return Findings(found, sample, _read_block(directory, sample))
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EISDIR):
                    raise
                # The file has gone, which is no fault of the disk: look for another.
        sample = _find_file(directory)
        direct = sample is not None and _read_block(directory, sample)
        return Findings(found, sample, direct)
    finally:
        os.close(directory)


def _find_file(directory: int) -> bytes | None:
    """The path of a regular file with content, searched a few levels deep on this device only."""
    device = os.fstat(directory).st_dev
    levels = [b""]
    looked_at = 0
    for _ in range(DEEPEST):
        deeper = []
        for level in levels:
            inner = os.open(
                level or b".", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory
            )
            try:
                with os.scandir(inner) as entries:
                    for entry in entries:
                        looked_at += 1
                        if looked_at > MOST_ENTRIES:
                            return None
                        name = os.fsencode(entry.name)
                        path = level + b"/" + name if level else name
                        if entry.is_dir(follow_symlinks=False):
                            deeper.append(path)
                        elif entry.is_file(follow_symlinks=False):
                            stat = entry.stat(follow_symlinks=False)
                            if stat.st_size and stat.st_dev == device:
                                return path
            finally:
                os.close(inner)
        levels = deeper
    return None


def _read_block(directory: int, path: bytes) -> bool:
    """Read a block of a file from the device; returns whether O_DIRECT could be had for it."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags | os.O_DIRECT, dir_fd=directory)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: the file system has no O_DIRECT (open(2))
            raise
        descriptor = os.open(path, flags, dir_fd=directory)
        direct = False
    else:
        direct = True
    try:
        blocks = max(1, os.fstat(descriptor).st_size // BLOCK)
        offset = random.randrange(blocks) * BLOCK
        if direct:
            with mmap.mmap(-1, BLOCK) as block:  # aligned to a page, as O_DIRECT wants it
                os.preadv(descriptor, [block], offset)
        else:
            os.posix_fadvise(descriptor, offset, BLOCK, os.POSIX_FADV_DONTNEED)
            os.pread(descriptor, BLOCK, offset)
    finally:
        os.close(descriptor)
    return direct
