"""The slots of a disk: who may go into the kernel, in the order of asking."""

from __future__ import annotations

from collections import OrderedDict

from gevent.event import Event


class SentAway(Exception):
    """There will be no slot for those who wait: the line was sent away."""


class _Turn(Event):  # type: ignore[misc,unused-ignore]
    """The place of one greenlet in the line."""

    granted = False


class Slots:
    """A number of slots and a line of greenlets that wait for one. For one native thread.

    gevent's semaphore would do but for its order: its `acquire` takes a slot that has just become free although
    others wait for it, so that a greenlet that reads in a loop starves them until their deadlines. Here a slot that
    becomes free is handed to the one that has waited longest.
    """

    def __init__(self, count: int) -> None:
        """Start with all slots free.

        Args:
            count: How many there are.
        """
        self._count = count
        self._free = count
        self._line: OrderedDict[_Turn, None] = OrderedDict()

    @property
    def waiting(self) -> int:
        """Greenlets that wait for a slot."""
        return len(self._line)

    @property
    def unused(self) -> bool:
        """Whether all slots are free. A slot that was handed to a greenlet which has not run since is not."""
        return self._free == self._count

    def take(self) -> bool:
        """Take a slot if one is free, which it never is while somebody waits. Never blocks."""
        if not self._free:
            return False
        self._free -= 1
        return True

    def wait(self, timeout: float | None) -> bool:
        """Take a slot; wait in line for it. Blocks the greenlet.

        Args:
            timeout: Seconds to wait at most; None for as long as it takes.

        Returns:
            Whether there was one in time.

        Raises:
            SentAway: By `send_away`.

        Whatever else ends the wait (gevent.Timeout, a killed greenlet) passes through, and no slot is lost.
        """
        if self.take():
            return True
        turn = _Turn()
        self._line[turn] = None
        try:
            turn.wait(timeout)
        except BaseException:
            if turn.granted:
                self.release()  # the slot came in the same turn of the hub
            raise
        finally:
            self._line.pop(turn, None)
        if turn.is_set() and not turn.granted:
            raise SentAway
        return turn.granted

    def release(self) -> None:
        """Give a slot back: to the first in line, if there is one. Never blocks; may be called in the hub."""
        if self._line:
            turn, _ = self._line.popitem(last=False)
            turn.granted = True
            turn.set()
        else:
            self._free += 1

    def send_away(self) -> None:
        """Tell everybody in line that there will be no slot: their waits end now. Never blocks."""
        while self._line:
            turn, _ = self._line.popitem(last=False)
            turn.set()
