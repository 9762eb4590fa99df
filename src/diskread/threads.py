"""Disks for programs of native threads: the methods of `diskread.Disk` for any thread, with the same promises.

disk = diskread.threads.Disk("d1", "/srv/d1")
data = disk.read("films/cat.mp4", 0, 1024, deadline=2)

What belongs to one thread in `diskread.Disk` belongs here to a thread that the first call starts: it runs a loop of
asyncio's for all disks of the process. So each call takes two hops, there and to the disk, cached data too.

Not for programs that gevent or eventlet have patched: theirs are no native threads, and they have disks of their own.
"""

from __future__ import annotations

import asyncio
import atexit
import math
import os
import threading
from typing import TYPE_CHECKING, Any, TypeVar

from . import disk as _disk
from .disk import FIRST_CHUNK
from .hubs.asyncio import run

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from types import TracebackType

    from .disk import DiskStatus, FileStat, Path, StallTimes
    from .limits import Limits
    from .workers import OnChange

Result = TypeVar("Result")


class Disk:
    """A `diskread.Disk` that any native thread may call, also several at a time.

    Every call is over at its deadline, and blocks the calling thread alone. Parameters, results and errors are those of
    `diskread.Disk`. A signal handler that raises in the main thread (Ctrl-C does) ends its call at once; the system
    call that it waited for ends when the kernel lets it, and its slot is free then.

    RuntimeError is raised by a call in the thread of the loop itself, which is where `on_change` is called.
    """

    def __init__(self, name: str, root: Path | None, limits: Limits | None = None) -> None:
        """See `diskread.Disk`. Starts no thread."""
        self._disk = _disk.Disk(name, root, limits, hub="asyncio")

    @property
    def name(self) -> str:
        """The name of the disk."""
        return self._disk.name

    @property
    def limits(self) -> Limits:
        """The limits of the disk."""
        return self._disk.limits

    @property
    def root(self) -> str | None:
        """The root directory, None for a disk without files."""
        return self._disk.root

    @property
    def status(self) -> DiskStatus:
        """The disk at this moment. Never touches the device; takes a hop to the loop."""
        return _loop.call(lambda: self._disk.status)

    @property
    def on_change(self) -> OnChange | None:
        """Called in the thread of the loop with the state and the reason whenever one has changed; must not block."""
        return self._disk.on_change

    @on_change.setter
    def on_change(self, function: OnChange | None) -> None:
        self._disk.on_change = function

    def read(self, path: Path, offset: int = 0, size: int | None = None, *, deadline: float | None = None) -> bytes:
        """See `diskread.Disk.read`."""
        return _loop.call(self._disk.read, path, offset, size, deadline=deadline)

    def open(self, path: Path, *, offset: int = 0, size: int = FIRST_CHUNK, deadline: float | None = None) -> DiskFile:
        """See `diskread.Disk.open`."""
        return DiskFile(_loop.call(self._disk.open, path, offset=offset, size=size, deadline=deadline))

    def stat(self, path: Path, *, deadline: float | None = None) -> FileStat:
        """See `diskread.Disk.stat`."""
        return _loop.call(self._disk.stat, path, deadline=deadline)

    def run(self, function: Callable[..., Result], *args: Any, deadline: float | None = None, **kwargs: Any) -> Result:
        """See `diskread.Disk.run`."""
        result: Result = _loop.call(self._disk.run, function, *args, deadline=deadline, **kwargs)
        return result

    def stall(
        self,
        seconds: float,
        path: Path | None = None,
        *,
        longest_wait: float = math.inf,
        deadline: float | None = None,
    ) -> StallTimes:
        """See `diskread.Disk.stall`."""
        return _loop.call(self._disk.stall, seconds, path, longest_wait=longest_wait, deadline=deadline)

    def watch(self) -> None:
        """See `diskread.Disk.watch`."""
        _loop.call(self._disk.watch)

    def set_offline(self, reason: str) -> None:
        """See `diskread.Disk.set_offline`."""
        _loop.call(self._disk.set_offline, reason)

    def set_online(self) -> None:
        """See `diskread.Disk.set_online`."""
        _loop.call(self._disk.set_online)

    def close(self) -> None:
        """See `diskread.Disk.close`."""
        _loop.call(self._disk.close)

    def __enter__(self) -> Disk:
        """Return the disk itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the disk."""
        self.close()

    def __repr__(self) -> str:
        """As that of `diskread.Disk`."""
        return repr(self._disk)


class DiskFile:
    """An open file of a disk. Made by `Disk.open`; close it with `close` or a `with` block."""

    def __init__(self, file: _disk.DiskFile) -> None:
        """For `Disk.open` only."""
        self._file = file

    @property
    def stat(self) -> FileStat:
        """Size and modification time when the file was opened."""
        return self._file.stat

    def read(self, offset: int = 0, size: int | None = None, *, deadline: float | None = None) -> bytes:
        """See `diskread.DiskFile.read`."""
        return _loop.call(self._file.read, offset, size, deadline=deadline)

    def chunks(
        self, start: int = 0, stop: int | None = None, *, deadline: float | None = None
    ) -> Generator[bytes, None, None]:
        """See `diskread.DiskFile.chunks`: the next chunk is being read while the caller works on one."""
        chunks = self._file.chunks(start, stop, deadline=deadline)
        try:
            while (chunk := _loop.call(next, chunks, None)) is not None:
                yield chunk
        finally:
            _loop.call(chunks.close)

    def close(self) -> None:
        """See `diskread.DiskFile.close`."""
        _loop.call(self._file.close)

    def __enter__(self) -> DiskFile:
        """Return the file itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()

    def __repr__(self) -> str:
        """As that of `diskread.DiskFile`."""
        return repr(self._file)


class _Loop:
    """A loop of asyncio's in a native thread of its own, started by the first call in each process."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._of_parents: list[asyncio.AbstractEventLoop] = []

    def call(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Run a function that waits as greenlets do in the loop, and wait for it; see `diskread.hubs.asyncio.run`.

        Raises:
            RuntimeError: The caller is in the loop's own thread.
            BaseException: What the function raises.
        """
        loop = self._running()
        if self._thread is threading.current_thread():
            raise RuntimeError("the thread that all disks of diskread.threads share must not wait for one of them")

        outcome: list[Result] = []
        errors: list[BaseException] = []
        task: list[asyncio.Task[None]] = []
        over = threading.Lock()
        over.acquire()  # released by whoever has the outcome: a concurrent.futures.Future would cost twice as much

        async def attempt() -> None:
            try:
                outcome.append(await run(function, *args, **kwargs))
            except BaseException as error:  # noqa: BLE001  # SystemExit, too, is the caller's and does not end the loop
                errors.append(error)
            finally:
                over.release()

        def start() -> None:
            task.append(loop.create_task(attempt()))

        def cancel() -> None:
            task[0].cancel()

        loop.call_soon_threadsafe(start)
        try:
            over.acquire()
        except BaseException:  # of a signal handler: nobody waits any more
            loop.call_soon_threadsafe(cancel)
            raise
        try:
            if errors:
                raise errors[0]
            return outcome[0]
        finally:
            errors.clear()  # or the error and its traceback would have each other

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                # A daemon: nobody waits for it in the end, any more than for a stuck thread.
                self._thread = threading.Thread(target=self._loop.run_forever, name="diskread", daemon=True)
                self._thread.start()
            return self._loop

    def stop(self) -> None:
        """The program ends."""
        loop, thread = self._loop, self._thread
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(1.0)
            if not thread.is_alive():
                loop.close()

    def forked(self) -> None:
        """In the child of fork(2): it has no thread but the caller's, and all descriptors."""
        self._lock = threading.Lock()
        if self._loop is not None:
            # Never closed: it would take its descriptors out of the epoll(7) that the parent goes on to use.
            self._of_parents.append(self._loop)
        self._loop = self._thread = None


_loop = _Loop()
os.register_at_fork(after_in_child=_loop.forked)
atexit.register(_loop.stop)
