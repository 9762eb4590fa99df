"""What is remembered of the objects of a device: to open one again without asking the device, while it is the same."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

SETTLE = 2.0
"""Seconds that an object has to be unchanged before it is remembered.

The kernel dates changes by a clock that ticks every 1 to 10 ms: of two changes within a tick the second cannot be seen.
After two seconds no change can leave the date as it was, unless somebody sets the clock of the machine back to it.
"""


@dataclass(frozen=True)
class Known:
    """An object as it was when it was opened.

    Attributes:
        name: The name of its only file.
        identity: By which to know it again; see `_object.reopen_object`.
        metadata: What Swift keeps with it. Not to be changed.
    """

    name: bytes
    identity: bytes
    metadata: dict[str, Any]


class MetadataCache:
    """The objects that were opened last, by the path of their directory. For one native thread."""

    def __init__(self, size: int) -> None:
        """Begin with none.

        Args:
            size: How many are remembered at most.
        """
        self._size = size
        self._known: OrderedDict[str, Known] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, directory: str) -> Known | None:
        """What is known of an object; None if nothing is."""
        known = self._known.get(directory)
        if known is not None:
            self._known.move_to_end(directory)
        return known

    def remember(self, directory: str, known: Known) -> None:
        """Remember an object, and forget the one that was not asked for the longest if that is one too many."""
        self._known[directory] = known
        self._known.move_to_end(directory)
        if len(self._known) > self._size:
            self._known.popitem(last=False)

    def forget(self, directory: str) -> None:
        """It is not the same any more."""
        self._known.pop(directory, None)
