"""The disk of each device of a Swift server: one per process, whichever storage policies keep something on it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import math
import os
import time
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import eventlet
from eventlet import hubs, tpool
from swift.common.utils import dump_recon_cache

from .._cached import CachedReader
from .._syscalls import thread_ident
from ..calls import Call, OpeningCall
from ..descriptor import Descriptor
from ..disk import CLOCK, Disk
from ..errors import DiskBusy, DiskError, DiskOffline, DiskTimeout
from ..health import State
from ..inline import LIMIT, Capability, capability
from ._object import reopen_object
from .errors import DeviceOffline, DeviceTimeout
from .metadata_cache import MetadataCache

if TYPE_CHECKING:
    from collections.abc import Callable

    from .configuration import Settings
    from .metadata_cache import Known

Result = TypeVar("Result")

CLOSE_WITHIN = 0.05
"""Seconds for which files that are no longer used are gathered: to close each by itself would cost a hop each."""

MOST_TO_CLOSE = 100
"""Files that are gathered at most."""

RECENTLY = 1.0
"""Seconds for which a device that was found mounted is taken to be so, until it is looked at where it is used."""


class Device:
    """One device: runs what touches it in its disk's workers, and says so where Swift's operators look.

    It belongs to the native thread that made it. Called from there its methods block the calling green thread, never
    the hub. Everywhere else (eventlet's tpool, the workers themselves) they do what is asked for on the spot: such a
    thread may block.
    """

    def __init__(self, path: str, name: str, settings: Settings, logger: Any, recon_file: str) -> None:
        """Does not touch the device.

        Args:
            path: Where it is mounted.
            name: Its name.
            settings: Limits and deadlines.
            logger: Swift's, which is also its client of statsd.
            recon_file: Where recon keeps what the object server tells it.
        """
        self.path = path
        self.name = name
        self.settings = settings
        self._known = MetadataCache(settings.metadata_cache)
        self._logger = logger
        self._recon_file = recon_file
        self._home = thread_ident()
        self._disk = _MountedDisk(name, path, settings.limits, hub="eventlet")
        self._disk.on_change = partial(_changed, weakref.ref(self))
        self._number: int | None = None  # of the file system that is mounted there: st_dev in stat(2)
        self._seen = -math.inf
        self._seen_mounted = False
        self._to_close: list[int] = []
        self._root = os.fsencode(path) + b"/"

    @property
    def disk(self) -> Disk:
        """The disk that it is."""
        return self._disk

    def here(self) -> bool:
        """Whether the caller must not block: it is a green thread of the hub that serves everybody."""
        return self._home == thread_ident() and eventlet.getcurrent() is not hubs.get_hub().greenlet

    def run(
        self,
        function: Callable[..., Result],
        *args: Any,
        about: str | None = None,
        deadline: float | None = None,
        **kwargs: Any,
    ) -> Result:
        """Run a blocking call on the device's slots.

        Args:
            function: What to call with the other arguments.
            about: The path that it is about, for the log.
            deadline: Seconds for all of it; None: diskread_deadline.

        Raises:
            DeviceOffline: The device is offline.
            DeviceTimeout: The deadline passed, or no slot is free.
            Exception: Whatever the function raises.
        """
        if not self.here():
            return function(*args, **kwargs)
        call = Call(lambda: function(*args, **kwargs))
        result: Result = self._translated(
            lambda: self._disk._call(call, self._disk._ends(deadline), self._label(about))
        )
        return result

    def open(self, function: Callable[[], int], about: str) -> Descriptor:
        """Run a call that opens a descriptor; closed in a worker when nobody waits for it any more.

        Args:
            function: What to call. It returns the descriptor.
            about: The path that is opened, for the log.

        Raises:
            DeviceOffline: As `run` says.
            DeviceTimeout: As `run` says.
            Exception: Whatever the function raises.
        """
        call = OpeningCall(function)
        self._translated(lambda: self._disk._call(call, self._disk._ends(None), self._label(about)))
        return Descriptor(self._disk, call.take_descriptor())

    def reopen(self, directory: str) -> tuple[Known, Descriptor] | None:
        """Open an object that is remembered, if it is the same and that takes no worker. Never blocks.

        Args:
            directory: The path of its directory.

        Returns:
            What is known of it, and its file, open; None if it has to be opened as if nothing were.
        """
        inline = self._disk._inline
        known = self._known.get(directory) if inline.on and self.here() else None
        if known is None:
            return None
        number = reopen_object(os.fsencode(directory), known.name, known.identity, inline.flags)
        if number >= 0:
            inline.opened()
            return known, Descriptor(self._disk, number)
        if number != -errno.EAGAIN:  # it is another one, or there is none
            self._known.forget(directory)
        inline.failed(0 if number == -errno.ESTALE else -number)
        return None

    def remember(self, directory: str, known: Known) -> None:
        """Remember an object that was opened, where that can be of use."""
        if self._disk._inline.on and self.settings.metadata_cache and self.here():
            self._known.remember(directory, known)

    def use(self, descriptor: Descriptor, function: Callable[..., Result], *args: Any, about: str) -> Result:
        """Run a blocking call with a descriptor of the device as its first argument; see `run`."""
        if not self.here():
            return function(descriptor.fileno(), *args)
        call = Call(lambda: function(descriptor.fileno(), *args))
        result: Result = self._translated(lambda: descriptor._call(call, self._disk._ends(None), self._label(about)))
        return result

    def close(self, descriptor: Descriptor) -> None:
        """Close a descriptor in a worker, soon. Never blocks."""
        if not self.here():
            descriptor.close()
            return
        number = descriptor.detach()
        if number >= 0:
            self._to_close.append(number)
            if len(self._to_close) == 1:
                eventlet.spawn_after(CLOSE_WITHIN, self._close_all)
            elif len(self._to_close) == MOST_TO_CLOSE:
                eventlet.spawn_n(self._close_all)

    def look(self, function: Callable[[], Result], *, mount_check: bool) -> Result:
        """Run a call that sees whether it is there, and learn in the same hop what may be read inline on it.

        Args:
            function: What to call. It returns nothing (or what is false) if it is not.
            mount_check: Whether that asks for a mount point, and not for a directory only.

        Raises:
            DeviceOffline: As `run` says.
            DeviceTimeout: As `run` says.
            Exception: Whatever the function raises.
        """
        if not self.here():
            return function()
        found: Result
        found, number, allowed = self.run(_look, function, self.path, self._number)
        if allowed is not None:
            # Another device than before, or the first one.
            self._number = number
            self._disk._inline.forget()
            self._disk._inline.learn(allowed)
        if found:
            self._seen, self._seen_mounted = CLOCK(), mount_check
        return found

    def inline_reader(self, descriptor: int, size: int) -> CachedReader | None:
        """What reads a file as far as it is in the page cache; None where that could block.

        Args:
            descriptor: The file, open. Reads leave its access time alone from now on: updates wait for the journal.
            size: Its size in bytes.
        """
        inline = self._disk._inline
        if not inline.on or not self.here():
            return None
        if inline.flags:
            try:
                fcntl.fcntl(descriptor, fcntl.F_SETFL, inline.flags)
            except OSError as error:  # EPERM: somebody else's file
                inline.failed(error.errno or 0)
                return None
        return CachedReader(descriptor, size, LIMIT, inline.window, inline.tally)

    def give_way(self) -> None:
        """Let others have their turn, now and then: what is read at once never waits, and so never stops by itself."""
        if self._disk._inline.tally.due:
            self._disk._give_way()

    def recently_seen(self, *, mount_check: bool) -> bool:
        """Whether it was seen to be there a moment ago. Who uses it then looks again where that may block."""
        return CLOCK() < self._seen + RECENTLY and (self._seen_mounted or not mount_check)

    @property
    def unknown(self) -> bool:
        """Whether it was never seen to be mounted, and nothing is under way on it."""
        return self._seen < 0 and not self._disk._workers.glance()[2]

    def _close_all(self) -> None:
        numbers, self._to_close = self._to_close, []
        if not numbers:
            return
        try:
            self._disk.run(_close_each, numbers)
        except DiskError:  # the device hangs: what the worker has not taken is closed when the kernel lets it
            while numbers:
                self._disk._workers.close_descriptor(numbers.pop())

    def _label(self, about: str | None) -> bytes | None:
        if about is None:
            return None
        path = os.fsencode(about)
        return path[len(self._root) :] if path.startswith(self._root) else path

    def _translated(self, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except DiskTimeout as error:
            self._count("timeouts")
            raise DeviceTimeout(str(error)) from None
        except DiskBusy as error:
            self._count("busy")
            raise DeviceTimeout(str(error)) from None
        except DiskOffline as error:
            self._count("rejections")
            raise DeviceOffline(str(error)) from None

    def _count(self, what: str) -> None:
        self._logger.increment(f"diskread.{self.name}.{what}")

    def tell(self, state: State, reason: str | None) -> None:
        """Say that its state has changed: to the log, to statsd and to recon. In a green thread: it may wait."""
        self._count(state.value.replace("-", "_"))
        if state is State.OFFLINE:
            self._logger.error("Device %s is offline: %s", self.name, reason)
        elif state is State.SUSPECT:
            self._logger.warning("Device %s is suspect: an operation has missed its deadline", self.name)
        else:
            self._logger.info("Device %s is %s", self.name, state.value)
        load = self._disk.status.load
        entry = {"state": state.value, "reason": reason, "since": time.time(), "stuck": load.stuck, "pid": os.getpid()}
        tpool.execute(dump_recon_cache, {"diskread": {self.name: entry}}, self._recon_file, self._logger)

    def tell_slow(self, kind: str, message: str) -> None:
        """Say that an operation is slow, stuck or back, as the slow log does: so often at most. In a green thread."""
        self._count(kind)
        self._logger.warning("%s", message)


def _close_each(numbers: list[int]) -> None:
    """In a worker, or whoever else takes a number from the list."""
    with contextlib.suppress(IndexError):
        while True:
            number = numbers.pop()
            with contextlib.suppress(OSError):  # it is closed all the same: close(2)
                os.close(number)


def _look(function: Callable[[], Result], path: str, known: int | None) -> tuple[Result, int | None, Capability | None]:
    """In a worker: what the function finds; and of another file system than the known one number and capability."""
    found = function()
    if found:
        with contextlib.suppress(OSError):  # not known then: the next look asks again
            root = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                number = os.fstat(root).st_dev
                if number != known:
                    return found, number, capability(root)
            finally:
                os.close(root)
    return found, None, None


class _MountedDisk(Disk):
    """A disk whose device may be exchanged: Swift checks by itself that something is mounted there (mount_check)."""

    def _make_probe(self) -> tuple[Call, Callable[[], None]]:
        self._root_device = None
        return super()._make_probe()


class Devices:
    """The devices of a manager. Those of all managers of a process are the same."""

    def __init__(self, settings: Settings, logger: Any, recon_file: str) -> None:
        """See `Device` for the parameters."""
        self._settings = settings
        self._logger = logger
        self._recon_file = recon_file
        self._devices: dict[str, Device] = {}

    def at(self, path: str) -> Device:
        """The device that is mounted at a path; made when it is first asked for."""
        device = self._devices.get(path)
        if device is None:
            key = (path, thread_ident())
            device = _all.get(key)
            if device is None:
                name = os.path.basename(path.rstrip("/")) or path
                device = _all[key] = Device(path, name, self._settings, self._logger, self._recon_file)
                _slow_log.devices[name] = device
                weakref.finalize(device, _close, device.disk).atexit = False
            self._devices[path] = device
        return device

    def forget(self, path: str) -> None:
        """There is no such device: whoever asks for anything is not to make the process grow."""
        self._devices.pop(path, None)


_all: weakref.WeakValueDictionary[tuple[str, int], Device] = weakref.WeakValueDictionary()


def _close(disk: Disk) -> None:
    """Close a disk that nobody uses any more, from whichever thread and in the middle of anything."""
    crew = disk._workers._crew
    if crew is not None and crew.process == os.getpid():
        with contextlib.suppress(RuntimeError, ValueError, OSError):  # the loop has gone: so have its threads
            crew.hub.soon_from_any_thread(disk.close)


def _changed(reference: weakref.ref[Device], state: State, reason: str | None) -> None:
    device = reference()
    if device is not None:
        # We are in the hub, which must not wait: a handler of Swift's logger may.
        eventlet.spawn_n(device.tell, state, reason)


class _SlowLog(logging.Handler):
    """Brings the lines about slow and stuck operations into Swift's log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.devices: weakref.WeakValueDictionary[str, Device] = weakref.WeakValueDictionary()

    def createLock(self) -> None:  # noqa: N802 - the name is that of logging.Handler
        self.lock = None  # only green threads of one hub come here, and none waits in `emit`

    def emit(self, record: logging.LogRecord) -> None:
        device = self.devices.get(getattr(record, "disk", ""))
        if device is not None:
            eventlet.spawn_n(device.tell_slow, record.__dict__["slow_read"].kind, record.getMessage())


_slow_log = _SlowLog()
logging.getLogger("diskread").addHandler(_slow_log)
