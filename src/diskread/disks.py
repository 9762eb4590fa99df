"""A set of disks by name, and the mirrors that are made of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from .disk import Disk, DiskStatus

if TYPE_CHECKING:
    from types import TracebackType

    from .mirror import Mirror, MirrorStatus


class Disks(Mapping[str, Disk]):
    """Disks by name, in the order in which they were given. Each has slots of its own: none can hold up another."""

    def __init__(self, disks: Iterable[Disk], mirrors: Iterable[Mirror] = ()) -> None:
        """Collect disks.

        Args:
            disks: The disks; their names must differ.
            mirrors: Mirrors of these disks; their names must differ from all others.

        Raises:
            ValueError: Two have the same name, or a mirror has a disk that is none of these.
        """
        self._disks: dict[str, Disk] = {}
        for disk in disks:
            if disk.name in self._disks:
                raise ValueError(f"two disks are called {disk.name}; give each a name of its own")
            self._disks[disk.name] = disk
        self._mirrors: dict[str, Mirror] = {}
        for mirror in mirrors:
            if mirror.name in self._disks or mirror.name in self._mirrors:
                raise ValueError(f"a mirror needs a name of its own: there is a {mirror.name} already")
            if not set(mirror.disks) <= set(self._disks.values()):
                raise ValueError(f"mirror {mirror.name} has a disk that is not among the others")
            self._mirrors[mirror.name] = mirror

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

    @property
    def mirrors(self) -> Mapping[str, Mirror]:
        """The mirrors by name."""
        return MappingProxyType(self._mirrors)

    @property
    def mirror_status(self) -> list[MirrorStatus]:
        """All mirrors at this moment. Never touches a device."""
        return [mirror.status for mirror in self._mirrors.values()]

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
