"""Whether and how a disk is read on the hub's own thread: what the page cache has, and only where that cannot block.

The system calls are those of `_cached`, whose rules hold on ext4 and xfs (Linux 6.5 and newer). Everywhere else reads
go to the workers, and the status says why.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from dataclasses import dataclass

from ._cached import Tally, file_system, kernel_lacks

KNOWN = {0xEF53: "ext4", 0x58465342: "xfs"}
"""File systems on which none of the calls was ever seen to wait for a stalled device: type in statfs(2), name."""

OTHERS = {
    0x65735546: "FUSE",
    0x6969: "NFS",
    0x794C7630: "overlay",
    0x01021994: "tmpfs",
    0x9123683E: "btrfs",
    0x2FC12FC1: "zfs",
    0xFF534D42: "CIFS",
    0xFE534D42: "SMB",
}

LIMIT = 1024 * 1024
"""Bytes that are copied at a time: some 50 microseconds of a hub."""

WIDEST_WINDOW = 32 * 1024 * 1024
"""Bytes behind a range that may have to be looked at: a tenth of a millisecond."""

ST_NOATIME = 0x0400  # of statfs(2); not in the os module
FOR_GOOD = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True)
class Capability:
    """What a disk's file system and kernel allow.

    Attributes:
        reason: Why nothing can be read inline; None when it can.
        flags: Flags for opening a file: O_NOATIME, unless the file system keeps no access times.
        window: Bytes behind a range that have to be cached, too, lest the kernel read ahead.
    """

    reason: str | None
    flags: int = 0
    window: int = 0


@dataclass(frozen=True)
class InlineStatus:
    """What is read inline on a disk, and what was.

    Attributes:
        on: Whether reads are tried inline.
        reason: Why not; None when they are.
        hits: Reads (also opens and stats) that needed no worker: everything was in the page cache.
        partial: Reads of which the beginning was; the rest was read in a worker.
        misses: Reads of which nothing was.
        bytes: Bytes that were read inline.
        fallbacks: Reads that could not even be tried inline, by the name of the errno.
    """

    on: bool
    reason: str | None
    hits: int
    partial: int
    misses: int
    bytes: int
    fallbacks: Counter[str]


class Inline:
    """Whether a disk is read inline, and how. For one native thread; nothing here blocks.

    Attributes:
        on: Whether reads are tried inline.
        flags: See `Capability`.
        window: See `Capability`.
        tally: What was read.
    """

    def __init__(self, wanted: bool) -> None:
        """Begin without inline reads, until somebody has asked the disk.

        Args:
            wanted: Whether anybody wants them at all.
        """
        self.on = False
        self.flags = self.window = 0
        self.tally = Tally()
        self._wanted = wanted
        self._opened = 0
        self._not_cached = 0
        self._fallbacks: Counter[str] = Counter()
        self._known = False
        self._reason: str | None = None
        self.forget()

    def learn(self, capability: Capability) -> None:
        """The disk has been asked. What it was found out not to be able to stays so until `forget`."""
        if self._wanted and not self._known:
            self._known = True
            self.on, self._reason = capability.reason is None, capability.reason
            self.flags, self.window = capability.flags, capability.window

    def forget(self) -> None:
        """Another device may be there now."""
        self.on = self._known = False
        self._reason = "not known before the disk has answered" if self._wanted else "switched off"

    @property
    def open_question(self) -> bool:
        """Whether somebody should ask the disk."""
        return self._wanted and not self._known

    def opened(self) -> None:
        """A file was opened, or asked for its size, without a worker."""
        self._opened += 1

    def failed(self, error: int) -> None:
        """Nothing could be tried: `error` is an errno, or 0 for what only the slow way can judge."""
        if error == errno.EAGAIN:
            self._not_cached += 1
        elif error not in (0, errno.ENOENT):
            name = errno.errorcode.get(error, str(error))
            self._fallbacks[name] += 1
            if error in FOR_GOOD:
                self.on, self._reason = False, f"the file system has answered {name}"

    @property
    def status(self) -> InlineStatus:
        """All of it at this moment."""
        tally = self.tally
        return InlineStatus(
            on=self.on,
            reason=self._reason,
            hits=tally.hits + self._opened,
            partial=tally.partial,
            misses=tally.misses + self._not_cached,
            bytes=tally.bytes,
            fallbacks=Counter(self._fallbacks),
        )


def capability(root: int) -> Capability:
    """Ask file system and kernel what they allow. Blocks the native thread for as long as the disk takes.

    Args:
        root: Descriptor of the root directory.

    Raises:
        OSError: The file system does not say what it is.
    """
    kind, flags = file_system(root)
    if kind not in KNOWN:
        return Capability(f"the file system is {OTHERS.get(kind, f'of type {kind:#x}')}, not ext4 or xfs")
    lack = kernel_lacks(root)
    if lack is not None:
        call, error = lack
        return Capability(f"{call} says {os.strerror(error)}; Linux 6.5 is needed, and a seccomp filter that lets it")
    window = read_ahead(os.fstat(root).st_dev)
    if window > WIDEST_WINDOW:
        return Capability(
            f"the kernel reads ahead {window // 2**20} MiB on it (read_ahead_kb), more than can be checked"
        )
    return Capability(None, 0 if flags & ST_NOATIME else os.O_NOATIME, window)


def read_ahead(device: int) -> int:
    """How far the kernel reads ahead on a device, in bytes (it doubles nothing beyond: mm/readahead.c)."""
    path = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    for queue in (f"{path}/queue", f"{path}/../queue"):  # of a partition: the disk's
        try:
            with open(f"{queue}/read_ahead_kb", "rb") as file:
                return int(file.read()) * 1024
        except (OSError, ValueError):
            continue
    return 8 * 1024 * 1024  # more than anybody sets it to
