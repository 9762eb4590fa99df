"""Reading objects: a file that the stock readers read from without touching the device on the hub."""

from __future__ import annotations

import errno
import io
import os
from typing import TYPE_CHECKING

from swift.obj import diskfile

from ..inline import LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..descriptor import Descriptor
    from .devices import Device

LITTLE = 1 << 16
"""Bytes that are asked for at the least, behind a range too: the stock reader takes an empty answer for the end."""


class ProtectedFile:
    """An open file of a device, as Swift's readers use one: read, seek, tell, close.

    What is in the page cache is read on the hub, the rest by a worker. Its methods block the calling green thread at
    most until the deadline, never the hub.
    """

    def __init__(self, device: Device, descriptor: Descriptor, name: str, size: int, first: bytes) -> None:
        """For `FileMixin` only.

        Args:
            device: Its device.
            descriptor: It, open; taken over.
            name: Its path.
            size: Its size in bytes.
            first: The bytes that it begins with, as far as they were read already.
        """
        self._device = device
        self._descriptor = descriptor
        self.name = name
        self.closed = False
        self._size = size
        self._position = 0
        self._buffer, self._buffer_start = first, 0
        self._ahead = 0
        self._stop: int | None = None
        self._reader = device.inline_reader(descriptor.fileno(), size)

    def fileno(self) -> int:
        """The number of its descriptor; for whoever may block."""
        return self._descriptor.fileno()

    def tell(self) -> int:
        """The position, in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position; returns it. Does not touch the device."""
        origins = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}
        position = origins[whence] + offset
        if position < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = position
        return position

    def read(self, size: int = -1) -> bytes:
        """Read from the position on.

        Args:
            size: Bytes at most; negative: to the end.

        Returns:
            The bytes; fewer than `size` also before the end of the file, none only there.

        Raises:
            DeviceOffline: As `Device.run` says.
            DeviceTimeout: As `Device.run` says.
            OSError: What the device answers: EIO and its kin.
            ValueError: It was closed.
        """
        if size < 0:
            return b"".join(iter(lambda: self.read(LIMIT), b""))
        descriptor = self._descriptor.fileno()
        if self._stop is not None:
            size = min(size, max(self._stop - self._position, LITTLE))
        data = self._read(size) if self._device.here() else read_at(descriptor, self._position, size)
        self._position += len(data)
        return data

    def read_until(self, stop: int | None) -> None:
        """Expect to be read up to a position only: a device is not to bring a whole chunk for the sake of a byte.

        Args:
            stop: The position, in bytes; None: the end.
        """
        self._stop = stop

    def drop_cache(self, offset: int, length: int) -> None:
        """Tell the kernel that a part of it need not stay in the page cache. May be left out if the device hangs."""
        self._device.use(self._descriptor, diskfile.drop_buffer_cache, offset, length, about=self.name)

    def close(self) -> None:
        """Close it in a worker. Never blocks."""
        if not self.closed:
            self.closed = True
            self._reader = None
            self._buffer = b""
            self._device.close(self._descriptor)

    def __enter__(self) -> ProtectedFile:
        """Return the file itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def _read(self, size: int) -> bytes:
        start = self._position - self._buffer_start
        if 0 <= start < len(self._buffer):
            return self._buffer[start : start + size]  # less than was asked for, maybe: the rest is for the next call
        if self._reader is not None and size <= LIMIT:
            found = self._reader.read(self._position, size)
            if isinstance(found, bytes):
                self._device.give_way()
                return found
        # From one hop to the next a worker brings more than was asked for, as read-ahead does: the hop costs the same.
        wanted = max(size, self._ahead)
        self._ahead = min(4 * wanted, self._device.settings.read_size)
        data = self._device.use(self._descriptor, read_at, self._position, wanted, about=self.name)
        if len(data) > size:
            self._buffer, self._buffer_start = data, self._position
            return data[:size]
        return data


class ReaderMixin(diskfile.BaseDiskFileReader):
    """What a stock reader does by itself with the file, beside reading."""

    def app_iter_range(self, start: int | None, stop: int | None) -> Iterator[bytes]:
        if isinstance(self._fp, ProtectedFile):
            self._fp.read_until(stop)
        yield from super().app_iter_range(start, stop)

    def _drop_cache(self, fd: int, offset: int, length: int) -> None:
        if not isinstance(self._fp, ProtectedFile):
            super()._drop_cache(fd, offset, length)
        elif not self._keep_cache:
            self._fp.drop_cache(offset, length)

    def _quarantine(self, msg: str) -> None:
        stock = super()._quarantine
        self._diskfile.device.run(stock, msg, about=self._data_file)


def read_at(descriptor: int, offset: int, size: int) -> bytes:
    """Read a range of a file up to its end. In a worker."""
    pieces = []
    while size > 0 and (data := os.pread(descriptor, size, offset)):
        pieces.append(data)
        offset, size = offset + len(data), size - len(data)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
