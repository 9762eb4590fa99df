"""Reading and writing the files of objects: the stock classes, with everything that touches the device in its workers.

What the stock methods do stays theirs: they run as they are, in a worker. Rewritten is only what hands work to
eventlet's tpool (from a worker that would wait for the wrong hub), and the loop that writes, which gathers what it is
given: a hop for each 64 KiB from the network would cost a third of the throughput.

A file that is opened where blocking does not matter (`Device.here`) is a stock one in every respect.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import traceback
from typing import TYPE_CHECKING, Any

from swift.common.utils import Timestamp, md5
from swift.common.utils.pickle import unpickle
from swift.obj import diskfile

from ..inline import LIMIT
from ._object import open_object
from .errors import DeviceOffline

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..descriptor import Descriptor
    from .devices import Device

FIRST_SIZE = 1 << 18
"""Bytes that the visit that opens an object brings with it: all of a small one."""

WRITE_SIZE = 1 << 20
"""Bytes that are gathered before they are written."""


class ProtectedFile:
    """An open file of a device, as Swift's readers use one: read, seek, tell, close.

    What is in the page cache is read on the hub, the rest by a worker. Its methods block the calling green thread at
    most until the deadline, never the hub.
    """

    def __init__(self, device: Device, descriptor: Descriptor, name: str, size: int, first: bytes) -> None:
        """For `FileMixin.open` only.

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
            The bytes; fewer than `size` only at the end of the file.

        Raises:
            DeviceOffline: As `Device.run` says.
            DeviceTimeout: As `Device.run` says.
            OSError: What the device answers: EIO and its kin.
            ValueError: It was closed.
        """
        descriptor = self._descriptor.fileno()
        if not self._device.here():
            data = _read_at(descriptor, self._position, size if size >= 0 else max(0, self._size - self._position))
        elif size < 0:
            data = self._read(max(0, self._size - self._position))
        else:
            data = self._read(size)
        self._position += len(data)
        return data

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
            data = self._buffer[start : start + size]
            if len(data) == size or self._position + len(data) >= self._size:
                return data
            self._position += len(data)
            try:
                return data + self._read(size - len(data))
            finally:
                self._position -= len(data)
        if self._reader is not None and size <= LIMIT:
            found = self._reader.read(self._position, size)
            if isinstance(found, bytes):
                self._device.give_way()
                return found
        # From one hop to the next a worker brings more than was asked for, as read-ahead does: the hop costs the same.
        wanted = max(size, self._ahead)
        self._ahead = min(4 * wanted, self._device.settings.read_size)
        data = self._device.use(self._descriptor, _read_at, self._position, wanted, about=self.name)
        if len(data) > size:
            self._buffer, self._buffer_start = data, self._position
            return data[:size]
        return data


class ReaderMixin:
    """What a stock reader does by itself with the file, beside reading."""

    _fp: Any
    _diskfile: Any
    _data_file: str
    _keep_cache: bool

    def _drop_cache(self, fd: int, offset: int, length: int) -> None:
        if not isinstance(self._fp, ProtectedFile):
            super()._drop_cache(fd, offset, length)
        elif not self._keep_cache:
            self._fp.drop_cache(offset, length)

    def _quarantine(self, msg: str) -> None:
        stock = super()._quarantine
        self._diskfile.device.run(stock, msg, about=self._data_file)


class WriterMixin(diskfile.BaseDiskFileWriter):
    """The stock writers' methods, in the workers of the device.

    It has to come between the stock writer of a policy and the base class, whose `_put` that one calls by name.
    """

    _bytes_per_sync: int
    _chunks_etag: Any
    _datadir: str
    _diskfile: Any
    _extension: str
    _fd: int | None
    _finalize_put: Callable[..., None]
    _last_sync: int
    _name: str
    _put_succeeded: bool
    _tmppath: str | None
    _upload_size: int
    logger: Any
    manager: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._descriptor: Descriptor | None = None
        self._unwritten: list[bytes] = []
        self._unwritten_size = 0
        self._written = 0
        self._in_worker = False

    @property
    def _device(self) -> Device:
        device: Device = self._diskfile.device
        return device

    def open(self) -> Any:
        if self._fd is not None or not self._device.here():
            return super().open()
        self._in_worker = True
        stock, stock_close = super().open, super().close

        def visit() -> int:
            try:
                stock()
            except BaseException:
                stock_close()  # which does nothing unless the file was opened
                raise
            # Whoever has the device asked for it closes it, this object or, if it is not wanted any more, a worker.
            descriptor, self._fd = self._fd, None
            assert descriptor is not None
            return descriptor

        self._descriptor = self._device.open(visit, self._datadir)
        self._fd = self._descriptor.fileno()
        return self

    def write(self, chunk: bytes) -> None:
        if self._descriptor is None:
            super().write(chunk)
            return
        if not self._fd:
            raise ValueError("Writer is not open")
        self._chunks_etag.update(chunk)
        self._upload_size += len(chunk)
        self._unwritten.append(chunk)
        self._unwritten_size += len(chunk)
        if self._unwritten_size >= WRITE_SIZE:
            self._device.use(self._descriptor, self._write_all, self._take_unwritten(), about=self._datadir)

    def close(self) -> None:
        if not self._in_worker:
            super().close()
            return
        self._fd = None
        if self._descriptor is not None:
            self._descriptor.close()
        if self._tmppath and not self._put_succeeded:
            try:
                self._device.run(os.unlink, self._tmppath, about=self._tmppath)
            except Exception:
                self.logger.exception("Error removing tempfile: %s", self._tmppath)
        self._tmppath = None

    def _put(self, metadata: dict[str, Any], cleanup: bool = True, *args: Any, **kwargs: Any) -> None:
        if self._descriptor is None:
            super()._put(metadata, cleanup, *args, **kwargs)
            return
        timestamp = Timestamp(metadata["X-Timestamp"])
        of_type = metadata.get("Content-Type-Timestamp")
        filename = self.manager.make_on_disk_filename(
            timestamp, self._extension, *args, ctype_timestamp=Timestamp(of_type) if of_type else of_type, **kwargs
        )
        metadata["name"] = self._name
        target_path = os.path.join(self._datadir, filename)
        unwritten = self._take_unwritten()
        log_context = getattr(self.logger, "thread_locals", None)

        def visit(descriptor: int) -> None:
            self._write_all(descriptor, unwritten)
            self._finalize_put(metadata, target_path, cleanup, logger_thread_locals=log_context)

        self._device.use(self._descriptor, visit, about=target_path)

    def _take_unwritten(self) -> list[bytes]:
        chunks, self._unwritten, self._unwritten_size = self._unwritten, [], 0
        return chunks

    def _write_all(self, descriptor: int, chunks: list[bytes]) -> None:
        """Write, and bring large files to the device in portions, as the stock method does. In a worker."""
        for chunk in chunks:
            rest = memoryview(chunk)
            while rest:
                count = os.write(descriptor, rest)
                self._written += count
                rest = rest[count:]
            since = self._written - self._last_sync
            if since >= self._bytes_per_sync:
                diskfile.fdatasync(descriptor)
                diskfile.drop_buffer_cache(descriptor, self._last_sync, since)
                self._last_sync = self._written


class CommitMixin:
    """The second phase of the writers of erasure-coded policies, in a worker."""

    _datadir: str
    _descriptor: Descriptor | None
    _device: Device
    _diskfile: Any
    _finalize_durable: Callable[..., None]
    manager: Any

    def commit(self, timestamp: Any) -> None:
        if self._descriptor is None:
            super().commit(timestamp)
            return
        path, durable_path = (
            os.path.join(
                self._datadir,
                self.manager.make_on_disk_filename(timestamp, ".data", self._diskfile._frag_index, **more),
            )
            for more in ({}, {"durable": True})
        )
        self._device.run(self._finalize_durable, path, durable_path, timestamp, about=durable_path)


class FileMixin(diskfile.BaseDiskFile):
    """The stock disk files' methods, in the workers of the device."""

    _fp: Any
    _name: Any

    @property
    def device(self) -> Device:
        """The device that it is on."""
        device: Device = self.manager.device_at(self._device_path)
        return device

    def open(self, modernize: bool = False, current_time: Any = None) -> Any:
        return self._open(modernize, current_time, first=FIRST_SIZE)

    def read_metadata(self, current_time: Any = None) -> Any:
        with self._open(False, current_time, first=0):
            return self.get_metadata()

    def purge(self, *args: Any, **kwargs: Any) -> None:
        self.device.run(super().purge, *args, about=self._datadir, **kwargs)

    def _open(self, modernize: bool, current_time: Any, *, first: int) -> Any:
        device, stock = self.device, super().open
        if not device.here():
            return stock(modernize=modernize, current_time=current_time)
        begin = b""

        def visit() -> int:
            nonlocal begin
            found = None if modernize else open_object(os.fsencode(self._datadir), first)
            if found is not None:
                descriptor, name, metadata, checksum, begin = found
                try:
                    if self._take(descriptor, os.fsdecode(name), metadata, checksum, current_time):
                        return descriptor
                except BaseException:
                    os.close(descriptor)
                    raise
                os.close(descriptor)
            if not self.manager.get_dev_path(device.name):
                raise DeviceOffline(f"{device.name} is not mounted")
            try:
                stock(modernize=modernize, current_time=current_time)
            except BaseException as error:
                # The file may be open still, held by the frames of the traceback: it is not for the hub to close it.
                traceback.clear_frames(error.__traceback__)
                raise
            file, self._fp = self._fp, None
            with file:
                descriptor = os.dup(file.fileno())
            with contextlib.suppress(OSError):  # who reads it finds out, and the stock reader knows what to do
                begin = _read_at(descriptor, 0, first)
            return descriptor

        descriptor = device.open(visit, self._datadir)
        device.seen()
        self._fp = ProtectedFile(device, descriptor, self._data_file, self._content_length, begin)
        return self

    def _take(self, descriptor: int, name: str, metadata: bytes, checksum: bytes | None, current_time: Any) -> bool:
        """Do what the stock method does with the only file of an object. In a worker.

        Returns:
            Whether it was that simple. If not, that method has to begin anew.
        """
        if checksum is not None and md5(metadata, usedforsecurity=False).hexdigest().encode() != checksum:
            return False
        try:
            known = diskfile._decode_metadata(unpickle(metadata, encoding="bytes"), b"_codecs\nencode" in metadata[:32])
        except Exception:  # noqa: BLE001 - whatever it is: the stock method knows what it means
            return False
        self._data_file = self._get_ondisk_files([name], self.policy).get("data_file")
        if self._data_file != os.path.join(self._datadir, name):
            return False
        self._datafile_metadata, self._metadata = known, dict(known)
        if self._name is None:
            self._name = known["name"]
            self._verify_name_matches_hash(self._data_file)
        self._verify_data_file(self._data_file, _Opened(descriptor), current_time)
        return True


class _Opened:
    """A descriptor, where the stock method wants a file."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor


def _read_at(descriptor: int, offset: int, size: int) -> bytes:
    """Read a range of a file up to its end. In a worker."""
    pieces = []
    while size > 0 and (data := os.pread(descriptor, size, offset)):
        pieces.append(data)
        offset, size = offset + len(data), size - len(data)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
