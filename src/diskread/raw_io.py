"""A file of a disk as Python's own file interface has it, for everything that reads files: zipfile, tarfile, csv."""

from __future__ import annotations

import errno
import io
import os
from operator import index
from typing import TYPE_CHECKING

from .errors import DiskFileChanged

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _typeshed import WriteableBuffer

    from .disk import DiskFile
    from .mirror import MirrorFile

LARGEST_READ = 256 * 1024
"""Bytes that are read in one piece; more than that is streamed, which reads ahead."""


class RawDiskFile(io.RawIOBase):
    """An open file of a disk or mirror as an unbuffered, seekable binary stream. Made by their `as_io`.

    Reads block the calling greenlet, never the hub, and raise the `DiskError` of `DiskFile.read`. The position stays
    where it was then: the same read can be tried again. (A buffer or a decompressor around the stream may have lost
    its place: seek before trying again, or start anew.)

    Like any stream it has one position, so it is for one greenlet at a time; there is no descriptor (`fileno`), which
    others could read from without the disk's protection. The stream ends where the file did when it was opened.
    """

    def __init__(self, file: DiskFile | MirrorFile, deadline: float | None = None) -> None:
        """For `DiskFile.as_io` only; see there."""
        super().__init__()
        self._file: DiskFile | MirrorFile | None = file
        self._deadline = deadline
        self._position = 0

    def readable(self) -> bool:
        """Yes, unless it was closed (ValueError then)."""
        self._open_file()
        return True

    def seekable(self) -> bool:
        """Yes, unless it was closed (ValueError then)."""
        self._open_file()
        return True

    def tell(self) -> int:
        """The position in bytes. Does not touch the disk."""
        self._open_file()
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position, which may be behind the end. Does not touch the disk.

        Args:
            offset: Bytes.
            whence: From where they count: io.SEEK_SET, SEEK_CUR, or SEEK_END for the end that the file had when it was
                opened.

        Returns:
            The new position.

        Raises:
            OSError: EINVAL, as lseek(2) has it: the position would be negative.
            ValueError: Another `whence`, or the stream was closed.
        """
        file = self._open_file()
        origins = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: file.stat.size}
        if whence not in origins:
            raise ValueError(f"whence must be SEEK_SET (0), SEEK_CUR (1) or SEEK_END (2), not {whence}")
        position = origins[whence] + index(offset)
        if position < 0:
            # Not ValueError: zipfile knows by an OSError that a file is too short to be an archive.
            raise OSError(errno.EINVAL, f"{os.strerror(errno.EINVAL)}: position {position} is before the file")
        self._position = position
        return position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Fill the buffer from the position on.

        Args:
            buffer: A writable buffer: a bytearray, memoryview, ... Up to 256 KiB are one `DiskFile.read`; more is
                streamed in pieces of that size, each with the deadline of its own.

        Returns:
            Bytes read; fewer than the buffer has only at the end of the file.

        Raises:
            DiskFileChanged: The file has become shorter.
            DiskError: As `DiskFile.read` says.
            ValueError: The stream or its file was closed.
        """
        with memoryview(buffer) as given, given.cast("B") as view:
            count = 0
            for piece in self._pieces(len(view)):
                view[count : count + len(piece)] = piece
                count += len(piece)
        self._position += count
        return count

    def read(self, size: int | None = -1, /) -> bytes:
        """Read from the position on: like `readinto`, but without a copy for up to 256 KiB.

        Args:
            size: Bytes at most; None or a negative number reads to the end of the file.

        Returns:
            The bytes; fewer than `size` only at the end of the file.

        Raises:
            DiskError: As `readinto` says.
            ValueError: As `readinto` says.
        """
        wanted = -1 if size is None else index(size)
        pieces = list(self._pieces(self._left() if wanted < 0 else wanted))
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._position += len(data)
        return data

    def readall(self) -> bytes:
        """Read to the end of the file; see `read`."""
        return self.read()

    def close(self) -> None:
        """Close the stream and its file. Never blocks."""
        file, self._file = self._file, None
        if file is not None:
            file.close()
        super().close()

    def __del__(self) -> None:
        """Let the file's own finalizer close it: closing is not for finalizers, which run in the middle of anything."""

    def _dealloc_warn(self, _source: object) -> None:
        # Buffers call this in their finalizer, before they close what they have been reading from.
        self._file = None

    def __repr__(self) -> str:
        """The file, and whether the stream is closed."""
        return f"<RawDiskFile {'closed' if self._file is None else repr(self._file)}>"

    def _open_file(self) -> DiskFile | MirrorFile:
        if self._file is None:
            raise ValueError("I/O operation on closed file")
        self._file._check_open()
        return self._file

    def _left(self) -> int:
        return max(0, self._open_file().stat.size - self._position)

    def _pieces(self, size: int) -> Iterator[bytes]:
        """The bytes from the position on; does not move it, so that an error leaves it where it was."""
        file, start, size = self._open_file(), self._position, min(size, self._left())
        if size > LARGEST_READ:
            yield from file.chunks(start, start + size, deadline=self._deadline)
        elif size:
            data = file.read(start, size, deadline=self._deadline)
            if not data:
                disk = file._disk if isinstance(file._disk, str) else file._disk.name
                raise DiskFileChanged(
                    disk, file._path, f"the file ends before byte {start} now, it had {file.stat.size} bytes"
                )
            yield data
