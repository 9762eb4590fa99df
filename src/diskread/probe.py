"""Asks the device itself whether it answers: past the page cache, below the root that the disk is known to have."""

from __future__ import annotations

import errno
import mmap
import os
import random
import stat
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .inline import Capability, capability

if TYPE_CHECKING:
    from collections.abc import Generator

BLOCK = 4096
"""Bytes that a probe reads, and the alignment that O_DIRECT wants at most: open(2)."""

DEEPEST = 8
"""Levels of directories, the root included, that are searched for a file to read."""

MOST_ENTRIES = 200
"""Directory entries that are looked at in that search."""

NOT_TO_BE_HAD = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENXIO)
"""Why one file or directory cannot be opened, which is no fault of the disk."""

OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""What this process lacks: no answer of the disk."""


class _Unsuitable(Exception):
    """Reading this file would not ask the device."""


class RootLost(OSError):
    """The root cannot be opened, or it is on another device: unmounted, and an empty mount point is no empty disk."""


@dataclass(frozen=True)
class Findings:
    """What a probe found out.

    Attributes:
        device: Device number of the root (`st_dev`).
        sample: A file that can be read, relative to the root; None when the disk has none within reach.
        direct: Whether it was read past the page cache with O_DIRECT.
        capability: What the file system allows to be read inline.
    """

    device: int
    sample: bytes | None
    direct: bool
    capability: Capability


def probe(root: bytes, device: int | None, sample: bytes | None) -> Findings:
    """Open the root and read a block of a file on it. Blocks the native thread for as long as the disk takes.

    Args:
        root: The root directory.
        device: Device number that the root has to have; None when it is not known yet.
        sample: A file to read, relative to the root; None looks for one. A disk without files within reach has its
            root directory read instead, which its page cache may answer.

    Raises:
        RootLost: The root cannot be opened, or it is on another device.
        OSError: The file cannot be read; or this process has no descriptor or memory left (`OUT_OF_RESOURCES`).
    """
    try:
        # O_PATH: the root need not be readable, only searchable, for the files in it to be read.
        directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in OUT_OF_RESOURCES:
            raise
        raise RootLost(error.errno, error.strerror) from error
    try:
        found = os.fstat(directory).st_dev
        allows = capability(directory)
        if device is not None and found != device:
            raise RootLost(errno.ESTALE, "another device is there now: was it unmounted?")
        if sample is not None:
            try:
                return Findings(found, sample, _read_block(directory, sample), allows)
            except _Unsuitable:
                pass  # the file has gone, which is no fault of the disk: look for another
        with closing(_files(directory, found)) as paths:
            for path in paths:
                try:
                    return Findings(found, path, _read_block(directory, path), allows)
                except _Unsuitable:
                    continue
        return Findings(found, None, False, allows)
    finally:
        os.close(directory)


def _files(directory: int, device: int) -> Generator[bytes, None, None]:
    """The paths of regular files: depth first, because large disks have many directories, and on this device only."""
    left = MOST_ENTRIES

    def search(parent: int, name: str, prefix: bytes, depth: int) -> Generator[bytes, None, None]:
        nonlocal left
        try:
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        except OSError as error:
            if error.errno in NOT_TO_BE_HAD:
                return
            raise
        try:
            with os.scandir(inner) as entries:
                for entry in entries:
                    left -= 1
                    if left < 0:
                        return
                    try:
                        # Not the methods of the entry: some versions of Python hold the GIL in them.
                        found = os.stat(entry.name, dir_fd=inner, follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    path = prefix + os.fsencode(entry.name)
                    if stat.S_ISREG(found.st_mode):
                        yield path
                    elif stat.S_ISDIR(found.st_mode) and found.st_dev == device and depth < DEEPEST:
                        yield from search(inner, entry.name, path + b"/", depth + 1)
        finally:
            os.close(inner)

    return search(directory, ".", b"", 1)


def _read_block(directory: int, path: bytes, *, direct: bool = True) -> bool:
    """Read a block of a file from the device; returns whether O_DIRECT could be had for it.

    Raises:
        _Unsuitable: It has gone, may not be read, or has no content.
        OSError: The disk answered, with an error.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
    try:
        descriptor = os.open(path, flags, dir_fd=directory)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or not found.st_size:
                raise _Unsuitable
            offset = random.randrange(max(1, found.st_size // BLOCK)) * BLOCK
            if not direct:
                os.posix_fadvise(descriptor, offset, BLOCK, os.POSIX_FADV_DONTNEED)
            with mmap.mmap(-1, BLOCK) as block:  # aligned to a page, as O_DIRECT wants it
                os.preadv(descriptor, [block], offset)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in NOT_TO_BE_HAD:
            raise _Unsuitable from error
        if direct and error.errno == errno.EINVAL:  # the file system has no O_DIRECT, or wants larger blocks: open(2)
            return _read_block(directory, path, direct=False)
        raise
    return direct
