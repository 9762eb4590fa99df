"""Disks for asyncio: the methods of `diskread.Disk` as coroutines, with the same promises.

async with diskread.aio.Disk("d1", "/srv/d1") as disk:
data = await disk.read("films/cat.mp4", 0, 1024, deadline=2)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeVar

from . import disk as _disk
from .disk import FIRST_CHUNK
from .hubs.asyncio import run

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from types import TracebackType

    from .disk import DiskStatus, FileStat, Path, StallTimes
    from .limits import Limits
    from .workers import OnChange

Result = TypeVar("Result")


class Disk:
    """A `diskread.Disk` of an asyncio loop: it belongs to the loop that uses it first.

    Every `await` is over at its deadline, and blocks its own task alone. A task that is cancelled leaves at once; the
    system call that it waited for ends when the kernel lets it, and its slot is free then. Parameters, results and
    errors are those of `diskread.Disk`.
    """

    def __init__(self, name: str, root: Path | None, limits: Limits | None = None) -> None:
        """See `diskread.Disk`. No loop needs to run yet."""
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
        """The disk at this moment. Never touches the device."""
        return self._disk.status

    @property
    def on_change(self) -> OnChange | None:
        """Called in the loop with the state and the reason whenever one has changed; a function, no coroutine."""
        return self._disk.on_change

    @on_change.setter
    def on_change(self, function: OnChange | None) -> None:
        self._disk.on_change = function

    async def read(
        self, path: Path, offset: int = 0, size: int | None = None, *, deadline: float | None = None
    ) -> bytes:
        """See `diskread.Disk.read`."""
        return await run(self._disk.read, path, offset, size, deadline=deadline)

    async def open(
        self, path: Path, *, offset: int = 0, size: int = FIRST_CHUNK, deadline: float | None = None
    ) -> DiskFile:
        """See `diskread.Disk.open`."""
        return DiskFile(await run(self._disk.open, path, offset=offset, size=size, deadline=deadline))

    async def stat(self, path: Path, *, deadline: float | None = None) -> FileStat:
        """See `diskread.Disk.stat`."""
        return await run(self._disk.stat, path, deadline=deadline)

    async def run(
        self, function: Callable[..., Result], *args: Any, deadline: float | None = None, **kwargs: Any
    ) -> Result:
        """See `diskread.Disk.run`: a blocking function, no coroutine."""
        return await run(self._disk.run, function, *args, deadline=deadline, **kwargs)

    async def stall(
        self,
        seconds: float,
        path: Path | None = None,
        *,
        longest_wait: float = math.inf,
        deadline: float | None = None,
    ) -> StallTimes:
        """See `diskread.Disk.stall`."""
        return await run(self._disk.stall, seconds, path, longest_wait=longest_wait, deadline=deadline)

    def watch(self) -> None:
        """See `diskread.Disk.watch`; in a running loop. Never blocks."""
        self._disk.watch()

    def set_offline(self, reason: str) -> None:
        """See `diskread.Disk.set_offline`; in a running loop. Never blocks."""
        self._disk.set_offline(reason)

    def set_online(self) -> None:
        """See `diskread.Disk.set_online`; in a running loop. Never blocks."""
        self._disk.set_online()

    def close(self) -> None:
        """See `diskread.Disk.close`. Never blocks."""
        self._disk.close()

    async def __aenter__(self) -> Disk:
        """Return the disk itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the disk."""
        self.close()

    def __repr__(self) -> str:
        """As that of `diskread.Disk`."""
        return repr(self._disk)


class DiskFile:
    """An open file of a disk. Made by `Disk.open`; close it with `close` or an `async with` block."""

    def __init__(self, file: _disk.DiskFile) -> None:
        """For `Disk.open` only."""
        self._file = file

    @property
    def stat(self) -> FileStat:
        """Size and modification time when the file was opened."""
        return self._file.stat

    async def read(self, offset: int = 0, size: int | None = None, *, deadline: float | None = None) -> bytes:
        """See `diskread.DiskFile.read`."""
        return await run(self._file.read, offset, size, deadline=deadline)

    async def chunks(
        self, start: int = 0, stop: int | None = None, *, deadline: float | None = None
    ) -> AsyncGenerator[bytes, None]:
        """See `diskread.DiskFile.chunks`: the next chunk is being read while the caller works on one."""
        chunks = self._file.chunks(start, stop, deadline=deadline)
        try:
            while (chunk := await run(next, chunks, None)) is not None:
                yield chunk
        finally:
            chunks.close()

    def close(self) -> None:
        """See `diskread.DiskFile.close`. Never blocks."""
        self._file.close()

    async def __aenter__(self) -> DiskFile:
        """Return the file itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()

    def __repr__(self) -> str:
        """As that of `diskread.DiskFile`."""
        return repr(self._file)
