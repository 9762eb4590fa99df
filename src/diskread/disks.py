"""A set of disks by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from .disk import Disk, DiskStatus

if TYPE_CHECKING:
    from types import TracebackType


class Disks(Mapping[str, Disk]):
    """Disks by name, in the order in which they were given. Each has slots of its own: none can hold up another."""

    def __init__(self, disks: Iterable[Disk]) -> None:
        """Collect disks.

        Args:
            disks: The disks; their names must differ.

        Raises:
            ValueError: Two disks have the same name.
        """
        self._disks: dict[str, Disk] = {}
        for disk in disks:
            if disk.name in self._disks:
                raise ValueError(f"two disks are called {disk.name}; give each a name of its own")
            self._disks[disk.name] = disk

    def __getitem__(self, name: str) -> Disk:
        """The disk with that name.

        Raises:
            KeyError: There is none.
        """
        return self._disks[name]

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._disks)

    def __len__(self) -> int:
        """The number of disks."""
        return len(self._disks)

    @property
    def status(self) -> list[DiskStatus]:
        """All disks at this moment. Never touches a device."""
        return [disk.status for disk in self._disks.values()]

    def watch(self) -> None:
        """Begin to watch all disks now: each is OFFLINE until it has answered a first probe. Never blocks."""
        for disk in self._disks.values():
            disk.watch()

    def close(self) -> None:
        """Close all disks. Never blocks."""
        for disk in self._disks.values():
            disk.close()

    def __enter__(self) -> Disks:
        """Return the set itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all disks."""
        self.close()
