"""What Swift loads: the managers of its disk files, with everything that touches a device on that device's slots."""

from __future__ import annotations

import contextlib
import fcntl
import os
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from eventlet import Timeout, sleep
from swift.common.exceptions import (
    DiskFileDeviceUnavailable,
    DiskFileError,
    PartitionLockTimeout,
    ReplicationLockTimeout,
)
from swift.common.utils import get_zero_indexed_base_string, mkdirs
from swift.obj import diskfile

from ..disk import CLOCK
from .configuration import read_settings
from .devices import Devices
from .errors import DeviceOffline
from .files import FileMixin
from .reading import ReaderMixin
from .writing import CommitMixin, WriterMixin

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping

    from ..descriptor import Descriptor
    from .devices import Device

CHUNK_SIZE = 1 << 20
"""Bytes of a chunk of an answer, where disk_chunk_size does not say. Swift's own default, 64 KiB, costs more hops."""

LOCK_POLL = 0.1
"""Seconds between two attempts to get a lock that somebody else has."""


class DiskFileReader(ReaderMixin, diskfile.DiskFileReader):
    """Reads an object of a replicated policy."""


class DiskFileWriter(diskfile.DiskFileWriter, WriterMixin):
    """Writes an object of a replicated policy."""


class DiskFile(FileMixin, diskfile.DiskFile):
    """An object of a replicated policy."""

    reader_cls = DiskFileReader
    writer_cls = DiskFileWriter


class ECDiskFileReader(ReaderMixin, diskfile.ECDiskFileReader):
    """Reads a fragment archive."""


class ECDiskFileWriter(CommitMixin, diskfile.ECDiskFileWriter, WriterMixin):
    """Writes a fragment archive."""


class ECDiskFile(FileMixin, diskfile.ECDiskFile):
    """A fragment archive of an object of an erasure-coded policy."""

    reader_cls = ECDiskFileReader
    writer_cls = ECDiskFileWriter


class ManagerMixin:
    """The stock managers' methods, in the workers of the device that they are about."""

    devices: str
    logger: Any
    mount_check: bool
    replication_concurrency_per_device: int
    replication_lock_timeout: int
    use_splice: bool

    def __init__(self, conf: Mapping[str, Any], logger: Any) -> None:
        """See `swift.obj.diskfile.BaseDiskFileManager`.

        Args:
            conf: The server's configuration; see `diskread.swift.configuration` for the settings of diskread.
            logger: Swift's.

        Raises:
            ValueError: A setting that there is none of, or a value that cannot be.
        """
        super().__init__(conf, logger)  # type: ignore[call-arg]
        if self.use_splice:
            self.use_splice = False
            self.logger.warning("diskread: splice is not used, because it would read from the devices in the hub")
        self._settings = read_settings(conf)
        if "disk_chunk_size" not in conf:
            self.disk_chunk_size = CHUNK_SIZE
        recon_file = os.path.join(conf.get("recon_cache_path", "/var/cache/swift"), "object.recon")
        self._devices = Devices(self._settings, logger, recon_file)

    def device(self, name: str) -> Device:
        """The device of a name."""
        return self._devices.at(os.path.join(self.devices, name))

    def device_at(self, path: str) -> Device:
        """The device that is mounted at a path."""
        return self._devices.at(path)

    def get_dev_path(self, device: str, mount_check: bool | None = None) -> str | None:
        stock = super().get_dev_path
        if mount_check is False:
            path: str = stock(device, mount_check)
            return path
        found = self.device(device)
        try:
            checked: str | None = found.look(
                partial(stock, device, mount_check), mount_check=bool(mount_check or self.mount_check)
            )
        except DeviceOffline:
            return None
        if checked is None and found.unknown:
            self._devices.forget(found.path)
        return checked

    def get_diskfile(
        self, device: str, partition: Any, account: str, container: str, obj: str, policy: Any, **kwargs: Any
    ) -> Any:
        found = self.device(device)
        if found.recently_seen(mount_check=self.mount_check):
            # Opening it looks whether the device is mounted; asking for it would cost one more hop.
            return self.diskfile_cls(  # type: ignore[attr-defined]
                self, found.path, partition, account, container, obj, policy=policy, use_splice=False, **kwargs
            )
        return super().get_diskfile(device, partition, account, container, obj, policy, **kwargs)

    def get_diskfile_and_filenames_from_hash(
        self, device: str, partition: Any, object_hash: str, policy: Any, **kwargs: Any
    ) -> Any:
        stock = super().get_diskfile_and_filenames_from_hash
        return self.device(device).run(stock, device, partition, object_hash, policy, **kwargs)

    def get_hashes(
        self, device: str, partition: Any, suffixes: Iterable[str] | None, policy: Any, skip_rehash: bool = False
    ) -> Any:
        found = self.device(device)
        path = self.get_dev_path(device)
        if not path:
            raise DiskFileDeviceUnavailable
        partition_path = diskfile.get_part_path(path, policy, partition)
        valid = [suffix for suffix in suffixes or [] if diskfile.valid_suffix(suffix)]

        def visit() -> Any:
            if skip_rehash:
                for suffix in valid:
                    self.invalidate_hash(os.path.join(partition_path, suffix))  # type: ignore[attr-defined]
                return None
            if not os.path.exists(partition_path):
                return {}
            return self._get_hashes(device, partition, policy, recalculate=valid)[1]  # type: ignore[attr-defined]

        return found.run(visit, about=partition_path, deadline=self._settings.hash_deadline)

    def yield_suffixes(self, device: str, partition: Any, policy: Any) -> Generator[Any, None, None]:
        stock = super().yield_suffixes
        yield from self.device(device).run(lambda: list(stock(device, partition, policy)))

    def yield_hashes(
        self, device: str, partition: Any, policy: Any, suffixes: Iterable[str] | None = None, **kwargs: Any
    ) -> Generator[Any, None, None]:
        found, stock = self.device(device), super().yield_hashes
        if not found.here():
            yield from stock(device, partition, policy, suffixes=suffixes, **kwargs)
            return
        if suffixes is None:
            suffixes = [suffix for _, suffix in self.yield_suffixes(device, partition, policy)]
        for suffix in suffixes:
            # One at a time: a partition has up to 4096 of them, and each has its own deadline.
            visit = partial(stock, device, partition, policy, suffixes=[suffix], **kwargs)
            yield from found.run(lambda visit=visit: list(visit()))

    def cleanup_ondisk_files(self, hsh_path: str, **kwargs: Any) -> Any:
        stock = super().cleanup_ondisk_files
        return self._device_of(hsh_path).run(stock, hsh_path, about=hsh_path, **kwargs)

    def pickle_async_update(
        self, device: str, account: str, container: str, obj: str, data: Any, timestamp: Any, policy: Any
    ) -> None:
        stock = super().pickle_async_update
        self.device(device).run(stock, device, account, container, obj, data, timestamp, policy)

    @contextmanager
    def replication_lock(self, device: str, policy: Any, partition: Any) -> Generator[bool, None, None]:
        found = self.device(device)
        if not found.here():
            with super().replication_lock(device, policy, partition):
                yield True
            return
        ends = CLOCK() + self.replication_lock_timeout
        with self.partition_lock(device, policy, partition, name="replication", timeout=self.replication_lock_timeout):
            limit = self.replication_concurrency_per_device
            if not limit:
                yield True
                return
            with self._lock(found, found.path, None, limit, ends - CLOCK(), ReplicationLockTimeout):
                yield True

    @contextmanager
    def partition_lock(
        self, device: str, policy: Any, partition: Any, name: str | None = None, timeout: float | None = None
    ) -> Generator[bool, None, None]:
        found = self.device(device)
        if not found.here():
            with super().partition_lock(device, policy, partition, name, timeout):
                yield True
            return
        path = os.path.join(found.path, diskfile.get_data_dir(policy), str(partition))
        seconds = self.replication_lock_timeout if timeout is None else timeout
        with self._lock(found, path, name, 1, seconds, PartitionLockTimeout):
            yield True

    @contextmanager
    def _lock(
        self, device: Device, directory: str, name: str | None, limit: int, seconds: float, timeout: type[Timeout]
    ) -> Generator[None, None, None]:
        """Hold one of the locks on a directory, the same that `swift.common.utils.lock_path` takes.

        That one waits in the thread that calls it: in a worker it would hold a slot for as long, and look like a hang.

        Args:
            device: The device that the directory is on.
            directory: Made if it is not there.
            name: To tell locks of different kinds on one directory apart.
            limit: How many may hold it at a time.
            seconds: How long to wait for it.
            timeout: What is raised after that.
        """

        def visit() -> int:
            if not self.get_dev_path(device.name):  # not to make the directory below an empty mount point
                raise DiskFileDeviceUnavailable
            return _take_lock(directory, path, limit)

        path = f"{directory}/.lock" + (f"-{name}" if name else "")
        ends = CLOCK() + seconds
        while True:
            try:
                held: Descriptor = device.open(visit, path)
                break
            except _Taken:
                if CLOCK() >= ends:
                    error = timeout(seconds, path)
                    error.cancel()  # made is started, with eventlet's timeouts
                    raise error from None
            sleep(min(LOCK_POLL, max(0.0, ends - CLOCK())))
        with held:
            try:
                yield
            finally:
                with contextlib.suppress(DiskFileError):  # the device hangs: closing it unlocks it, whenever that is
                    device.use(held, fcntl.flock, fcntl.LOCK_UN, about=path)

    def _device_of(self, path: str) -> Device:
        return self.device(os.path.relpath(path, self.devices).split(os.sep, 1)[0])


class DiskFileManager(ManagerMixin, diskfile.DiskFileManager):
    """The manager of replicated policies: `diskfile_module = egg:diskread#replication.fs`."""

    diskfile_cls = DiskFile


class ECDiskFileManager(ManagerMixin, diskfile.ECDiskFileManager):
    """The manager of erasure-coded policies: `diskfile_module = egg:diskread#erasure_coding.fs`."""

    diskfile_cls = ECDiskFile


class _Taken(Exception):
    """Somebody else has the lock."""


def _take_lock(directory: str, path: str, limit: int) -> int:
    """In a worker."""
    mkdirs(directory)
    for number in range(limit):
        descriptor = os.open(get_zero_indexed_base_string(path, number), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        else:
            return descriptor
    raise _Taken
