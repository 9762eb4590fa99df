"""An open descriptor on a disk, for everything beyond reading: writes, fsync, attributes, locks."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, TypeVar

from .calls import Call

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from .disk import Disk

Result = TypeVar("Result")


class Descriptor:
    """A descriptor that was opened by a call on a disk. Made by `Disk.run_open`.

    Its calls block the calling greenlet, never the hub. It is closed in a worker, and not before the last call that
    knows it has returned, even if the caller gave up long before: its number must not stand for another file by then.
    """

    def __init__(self, disk: Disk, number: int) -> None:
        """For `Disk.run_open` only.

        Args:
            disk: Its disk.
            number: The descriptor, which is taken over.
        """
        self._disk = disk
        self._number = number
        self._in_flight = 0
        self._closed = False

    def fileno(self) -> int:
        """Its number. Whoever uses it directly may block.

        Raises:
            ValueError: It was closed.
        """
        if self._closed:
            raise ValueError(f"{self!r} was closed")
        return self._number

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def run(self, function: Callable[..., Result], *args: Any, deadline: float | None = None, **kwargs: Any) -> Result:
        """Run a blocking call with the descriptor on the disk's slots; see `Disk.run`.

        Args:
            function: What to call with the number of the descriptor and the other arguments.
            deadline: Seconds for all of it; None: that of the disk's limits.

        Returns:
            What the function returns.

        Raises:
            DiskError: As `Disk.run` says.
            ValueError: It was closed.
            Exception: Whatever the function raises.
        """
        number = self.fileno()
        ends = self._disk._ends(deadline)
        result: Result = self._call(Call(lambda: function(number, *args, **kwargs)), ends, None)
        return result

    def detach(self) -> int:
        """Hand its number over to the caller, who closes it.

        Returns:
            The number; -1 when a call with it is under way. It is closed here in that case, like any other.

        Raises:
            ValueError: It was closed.
        """
        number = self.fileno()
        if self._in_flight:
            self.close()
            return -1
        self._closed = True
        return number

    def close(self) -> None:
        """Close it in a worker as soon as nothing uses it any more. Never blocks."""
        if not self._closed:
            self._closed = True
            self._close_unused()

    def __enter__(self) -> Descriptor:
        """Return the descriptor itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:
        """Close it when its last user forgot to."""
        if not getattr(self, "_closed", True):
            self._closed = True
            self._disk._workers.close_descriptor_of_finalizer(self._number)
            _warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)  # last: it may be an error

    def __repr__(self) -> str:
        """Disk and number."""
        return f"<Descriptor {self._number} on {self._disk.name}>"

    def _call(self, call: Call, ends: float, path: bytes | None) -> Any:
        self._in_flight += 1
        return self._disk._call(call, ends, path, self._returned)

    def _returned(self) -> None:
        self._in_flight -= 1
        if self._closed:
            self._close_unused()

    def _close_unused(self) -> None:
        if not self._in_flight:
            self._disk._workers.close_descriptor(self._number)
