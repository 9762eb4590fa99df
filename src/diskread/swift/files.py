"""Opening objects: the stock disk files, with everything that touches the device in one visit to it."""

from __future__ import annotations

import contextlib
import os
import traceback
from typing import TYPE_CHECKING, Any

from swift.common.exceptions import DiskFileError
from swift.common.utils import md5
from swift.common.utils.pickle import unpickle
from swift.obj import diskfile

from ._object import open_object
from .errors import DeviceOffline
from .metadata_cache import SETTLE, Known
from .reading import LITTLE, ProtectedFile, read_at

if TYPE_CHECKING:
    from .devices import Device

SETTLE_NS = int(SETTLE * 1e9)

FIRST_SIZE = 1 << 18
"""Bytes that the visit that opens an object brings with it, if they are in the page cache; if not, `LITTLE`."""


class FileMixin(diskfile.BaseDiskFile):
    """The stock disk files' methods, in the workers of the device."""

    _first = FIRST_SIZE
    _fp: Any
    _name: Any

    @property
    def device(self) -> Device:
        """The device that it is on."""
        device: Device = self.manager.device_at(self._device_path)
        return device

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        self._first = 0
        try:
            return super().read_metadata(*args, **kwargs)
        finally:
            del self._first

    def purge(self, *args: Any, **kwargs: Any) -> None:
        self.device.run(super().purge, *args, about=self._datadir, **kwargs)

    def open(self, modernize: bool = False, current_time: Any = None) -> Any:
        device, stock = self.device, super().open
        if not device.here():
            return stock(modernize=modernize, current_time=current_time)
        if not modernize and self._open_again(device, current_time):
            return self
        first, begin = self._first, b""
        opened: Known | None = None

        def visit() -> int:
            nonlocal begin, opened
            directory, needed = os.fsencode(self._datadir), min(first, LITTLE)
            found = None if modernize else open_object(directory, needed, first, SETTLE_NS)
            if found is not None:
                descriptor, name, packed, checksum, begin, identity = found
                try:
                    metadata = _unpacked(packed, checksum)
                    if metadata is not None and self._take(descriptor, name, metadata, current_time):
                        if identity is not None:
                            opened = Known(name, identity, metadata)
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
                _forget_files(error)
                raise
            file, self._fp = self._fp, None
            if file is None:  # the stock method passes over most errors of open(2), EIO among them
                raise DiskFileError(f"{self._data_file} cannot be opened")
            with file:
                descriptor = os.dup(file.fileno())
            with contextlib.suppress(OSError):  # who reads it finds out, and the stock reader knows what to do
                begin = read_at(descriptor, 0, min(first, LITTLE))
            return descriptor

        descriptor = device.open(visit, self._datadir)
        if opened is not None:
            device.remember(self._datadir, opened)
        self._fp = ProtectedFile(device, descriptor, self._data_file, self._content_length, begin)
        return self

    def _open_again(self, device: Device, current_time: Any) -> bool:
        """Open an object that is remembered. Never blocks: nothing of it touches the device.

        Returns:
            Whether it could be done.
        """
        found = device.reopen(self._datadir)
        if found is None:
            return False
        known, descriptor = found
        try:
            same = self._take(descriptor.fileno(), known.name, known.metadata, current_time)
        except BaseException:
            device.close(descriptor)
            raise
        if same:
            self._fp = ProtectedFile(device, descriptor, self._data_file, self._content_length, b"")
        else:
            device.close(descriptor)
        return same

    def _take(self, descriptor: int, name: bytes, metadata: dict[str, Any], current_time: Any) -> bool:
        """Do what the stock method does with the only file of an object.

        Returns:
            Whether it was that simple. If not, that method has to begin anew.
        """
        file_name = os.fsdecode(name)
        self._data_file = self._get_ondisk_files([file_name], self.policy).get("data_file")
        if self._data_file != os.path.join(self._datadir, file_name):
            return False
        self._datafile_metadata, self._metadata = dict(metadata), dict(metadata)
        if self._name is None:
            self._name = metadata["name"]
            self._verify_name_matches_hash(self._data_file)
        self._verify_data_file(self._data_file, _Opened(descriptor), current_time)
        return True


def _unpacked(metadata: bytes, checksum: bytes | None) -> dict[str, Any] | None:
    """The metadata of an object; None if only the stock method can say what is wrong with them."""
    if checksum is not None and md5(metadata, usedforsecurity=False).hexdigest().encode() != checksum:
        return None
    try:
        found = diskfile._decode_metadata(unpickle(metadata, encoding="bytes"), b"_codecs\nencode" in metadata[:32])
    except Exception:  # noqa: BLE001 - whatever it is: the stock method knows what it means
        return None
    return dict(found)


def _forget_files(error: BaseException | None) -> None:
    """Let go of what the frames that an error came through have: a file may be open still.

    The stock method closes none when it fails. That must not be left to the garbage collector, which would do it in
    the hub.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


class _Opened:
    """A descriptor, where the stock method wants a file."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor
