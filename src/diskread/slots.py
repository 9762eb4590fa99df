"""The slots of a disk: who may go into the kernel, in the order of asking. Pure: whoever waits does so elsewhere."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

Visit = TypeVar("Visit")


class Slots(Generic[Visit]):
    """A number of slots and a line of visits that wait for one.

    A slot that becomes free is handed to the visit that has waited longest, and to no newcomer: with gevent's semaphore
    a greenlet that reads in a loop would starve the others until their deadlines.
    """

    def __init__(self, count: int) -> None:
        """Start with all slots free.

        Args:
            count: How many there are.
        """
        self._count = count
        self._free = count
        self._line: OrderedDict[Visit, None] = OrderedDict()

    @property
    def waiting(self) -> int:
        """Visits that wait for a slot."""
        return len(self._line)

    @property
    def unused(self) -> bool:
        """Whether all slots are free."""
        return self._free == self._count

    def take(self) -> bool:
        """Take a slot if one is free, which it never is while somebody waits."""
        if not self._free:
            return False
        self._free -= 1
        return True

    def wait(self, visit: Visit) -> None:
        """Put a visit at the end of the line."""
        self._line[visit] = None

    def leave(self, visit: Visit) -> None:
        """Take a visit out of the line, if it is there."""
        self._line.pop(visit, None)

    def release(self) -> Visit | None:
        """Give a slot back.

        Returns:
            The visit that has it now, the first in line; None when the slot is free.
        """
        if not self._line:
            self._free += 1
            return None
        visit, _ = self._line.popitem(last=False)
        return visit

    def send_away(self) -> list[Visit]:
        """Empty the line, and return who was in it."""
        line = list(self._line)
        self._line.clear()
        return line
