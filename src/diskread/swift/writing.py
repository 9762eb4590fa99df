"""Writing objects: the stock writers, with everything that touches the device in its workers.

What the stock methods do stays theirs: they run as they are, in a worker. Rewritten is only what hands work to
eventlet's tpool (from a worker that would wait for the wrong hub), and the loop that writes, which gathers what it is
given: a hop for each 64 KiB from the network would cost a third of the throughput.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from swift.common.utils import Timestamp
from swift.obj import diskfile

from .errors import DeviceOffline

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..descriptor import Descriptor
    from .devices import Device

WRITE_SIZE = 1 << 20
"""Bytes that are gathered before they are written."""


class WriterMixin(diskfile.BaseDiskFileWriter):
    """The stock writers' methods, in the workers of the device.

    It has to come between the stock writer of a policy and the base class, whose `_put` that one calls by name.
    """

    _bytes_per_sync: int
    _chunks_etag: Any
    _datadir: str
    _diskfile: Any
    _extension: str
    _finalize_put: Callable[..., None]
    _last_sync: int
    _name: str
    _put_succeeded: bool
    _tmppath: str | None
    _upload_size: int
    logger: Any
    manager: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._unwritten: list[bytes] = []
        self._unwritten_size = 0
        self._written = 0
        self._number: int | None = None
        super().__init__(*args, **kwargs)
        self._descriptor: Descriptor | None = None
        self._in_worker = False

    @property
    def _fd(self) -> int | None:
        """The descriptor of the file, with everything written that there is; the stock methods set it."""
        if self._unwritten:
            self._visit(self._write_all, self._take_unwritten(), about=self._datadir)
        return self._number

    @_fd.setter
    def _fd(self, number: int | None) -> None:
        self._number = number

    @property
    def _device(self) -> Device:
        device: Device = self._diskfile.device
        return device

    def open(self) -> Any:
        if self._number is not None or not self._device.here():
            return super().open()
        self._in_worker = True
        stock, stock_close = super().open, super().close

        def visit() -> int:
            if not self.manager.get_dev_path(self._device.name):  # not to write below an empty mount point
                raise DeviceOffline(f"{self._device.name} is not mounted")
            try:
                stock()
            except BaseException:
                stock_close()  # which does nothing unless the file was opened
                raise
            # Whoever has the device asked for it closes it, this object or, if it is not wanted any more, a worker.
            descriptor, self._number = self._number, None
            assert descriptor is not None
            return descriptor

        self._descriptor = self._device.open(visit, self._datadir)
        self._number = self._descriptor.fileno()
        return self

    def write(self, chunk: bytes) -> None:
        if not self._number:
            raise ValueError("Writer is not open")
        self._chunks_etag.update(chunk)
        self._upload_size += len(chunk)
        self._unwritten.append(chunk)
        self._unwritten_size += len(chunk)
        if self._unwritten_size >= WRITE_SIZE:
            self._visit(self._write_all, self._take_unwritten(), about=self._datadir)

    def close(self) -> None:
        if not self._in_worker:
            super().close()
            return
        self._number = None
        self._take_unwritten()
        if self._descriptor is not None:
            self._descriptor.close()
        if self._tmppath and not self._put_succeeded:
            try:
                self._device.run(os.unlink, self._tmppath, about=self._tmppath)
            except Exception:
                self.logger.exception("Error removing tempfile: %s", self._tmppath)
        self._tmppath = None

    def _put(self, metadata: dict[str, Any], cleanup: bool = True, *args: Any, **kwargs: Any) -> None:
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

        self._visit(visit, about=target_path)

    def _visit(self, function: Callable[..., None], *args: Any, about: str) -> None:
        """Call something with the descriptor, in a worker unless the file was opened where blocking does not matter."""
        if self._descriptor is not None:
            self._device.use(self._descriptor, function, *args, about=about)
        else:
            function(self._number, *args)

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
    _device: Device
    _diskfile: Any
    _finalize_durable: Callable[..., None]
    manager: Any

    def commit(self, timestamp: Any) -> None:
        path, durable_path = (
            os.path.join(
                self._datadir,
                self.manager.make_on_disk_filename(timestamp, ".data", self._diskfile._frag_index, **more),
            )
            for more in ({}, {"durable": True})
        )
        self._device.run(self._finalize_durable, path, durable_path, timestamp, about=durable_path)
