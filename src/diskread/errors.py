"""What can go wrong with a read. One class for each thing that a caller may want to treat differently.

Every class is a `DiskError` and with it an `OSError`; where the standard library has a class for the same thing
(`FileNotFoundError`, `TimeoutError`, ...) ours inherits from it too, so that ordinary `except` clauses work.
The first line of each docstring is the text of the error.
"""

from __future__ import annotations

import errno
import os

from ._syscalls import Step


class DiskError(OSError):
    """The disk could not do what was asked.

    Attributes:
        disk: Name of the disk.
        path: The path as the caller gave it, as bytes, or None when no file was named.
        reason: What happened, in words.
    """

    default_errno = errno.EIO

    def __init__(self, disk: str, path: bytes | None, reason: str, code: int | None = None) -> None:
        """Build the error.

        Args:
            disk: Name of the disk.
            path: The path as the caller gave it, or None.
            reason: What happened, in words.
            code: errno; the class's own when None.
        """
        super().__init__(self.default_errno if code is None else code, reason)
        self.disk = disk
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        """Copy and pickle as they are, whatever a class's own constructor takes."""
        return _restore, (type(self), self.args, self.__dict__)

    def __str__(self) -> str:
        """Name the disk and the file, then say what happened."""
        where = self.disk if self.path is None else f"{self.disk}/{printable(self.path)}"
        return f"{where}: {self.reason}"


def _restore(kind: type[DiskError], args: tuple[object, ...], state: dict[str, object]) -> DiskError:
    error = kind.__new__(kind)
    OSError.__init__(error, *args)
    error.__dict__.update(state)
    return error


def printable(path: bytes) -> str:
    """A path as text for messages and logs: what is not printable is escaped, so that no path can forge a line."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in os.fsdecode(path))


class DiskBusy(DiskError):
    """The disk has no slot for this read: its queue is full, or all its slots are stuck. Raised at once.

    Also when the process has no thread or no descriptor left.
    """

    default_errno = errno.EBUSY


class DiskOffline(DiskError):
    """The disk is offline: it makes no progress, its root is not there, or somebody said so. Raised at once.

    Attributes:
        retry_after: Seconds until the next probe, after which the disk may be back; None when nobody knows.
    """

    default_errno = errno.ENODEV

    def __init__(
        self, disk: str, path: bytes | None, reason: str, code: int | None = None, *, retry_after: float | None = None
    ) -> None:
        """Build the error; see `DiskError` for the other parameters."""
        super().__init__(disk, path, reason, code)
        self.retry_after = retry_after


class DiskTimeout(DiskError, TimeoutError):
    """The read missed its deadline.

    Attributes:
        started: Whether it had a slot: False means that all its time went by in the queue and nothing was read.
    """

    default_errno = errno.ETIMEDOUT

    def __init__(self, disk: str, path: bytes | None, reason: str, *, started: bool) -> None:
        """Build the error; see `DiskError` for the first three parameters."""
        super().__init__(disk, path, reason)
        self.started = started


class DiskFileNotFound(DiskError, FileNotFoundError):
    """There is no such file on the disk."""

    default_errno = errno.ENOENT


class DiskFileForbidden(DiskError, PermissionError):
    """The file may not be read: no permission, or its path leads out of the disk or onto another device."""

    default_errno = errno.EACCES


class DiskFileNotRegular(DiskError):
    """The path names a directory, FIFO, socket or device node: only regular files are read."""

    default_errno = errno.EINVAL


class DiskPathInvalid(DiskError, ValueError):
    """The path cannot name a file: empty, absolute, too long, or with a NUL byte."""

    default_errno = errno.EINVAL


class DiskFileChanged(DiskError):
    """The file became shorter while it was being read: what was read so far is not the whole of it."""

    default_errno = errno.ESTALE


class DiskIOError(DiskError):
    """The disk answered, with an error: EIO and its kin. The errno says which."""


def root_lost(code: int) -> str:
    """Why a disk whose root cannot be opened is offline, in words.

    Args:
        code: errno; ESTALE stands for a root that is on another device than before.
    """
    if code == errno.ESTALE:
        return (
            "its root directory is on another device than before: was the disk unmounted? "
            "If this is the disk, put it online by hand"
        )
    return f"its root directory cannot be opened: {os.strerror(code)}"


_ACTION: dict[int, str] = {
    Step.STEP_STALL: "nanosleep",
    Step.STEP_OPEN: "open",
    Step.STEP_STAT: "fstat",
    Step.STEP_READ: "read",
    Step.STEP_MEMORY: "allocating the buffer",
}


def from_errno(disk: str, path: bytes | None, code: int, step: int) -> DiskError:
    """Turn the errno of a finished Job into the error that callers see. The one place where that is decided.

    Args:
        disk: Name of the disk.
        path: The path as the caller gave it.
        code: errno.
        step: The step that failed, a STEP_ constant of the extension.

    Returns:
        The error, ready to be raised.
    """
    words = os.strerror(code)
    if code in (errno.EMFILE, errno.ENFILE):
        return DiskBusy(disk, path, f"{words}: this process has no descriptor left; raise its limit (ulimit -n)", code)
    if step == Step.STEP_ROOT:
        return DiskOffline(disk, path, root_lost(code), code)
    if step == Step.STEP_TYPE:
        what = "is a directory" if code == errno.EISDIR else "is not a regular file"
        return DiskFileNotRegular(disk, path, f"{what}; only regular files are read", code)
    if step == Step.STEP_OPEN:
        if code in (errno.ENOENT, errno.ENOTDIR):
            return DiskFileNotFound(disk, path, words, code)
        if code in (errno.EACCES, errno.EPERM):
            return DiskFileForbidden(disk, path, words, code)
        if code in (errno.EXDEV, errno.ELOOP):
            return DiskFileForbidden(
                disk,
                path,
                "leads out of the disk, onto another device, or round in circles; a disk is one directory tree on "
                "one device: name a nested mount as a disk of its own",
                code,
            )
        if code in (errno.ENAMETOOLONG, errno.EINVAL):
            return DiskPathInvalid(disk, path, words, code)
        if code == errno.ENXIO:  # a socket, or a FIFO without a reader: open(2)
            return DiskFileNotRegular(disk, path, "is not a regular file; only regular files are read", code)
        if code == errno.ENOSYS:
            return DiskIOError(
                disk,
                path,
                "this kernel has no openat2(2), without which a path could lead out of the disk; Linux 5.6 or newer "
                "is needed (in a container: allow openat2 in the seccomp profile)",
                code,
            )
    return DiskIOError(disk, path, f"{_ACTION.get(step, 'the visit')} failed: {words}", code)
