"""Blocking calls with a deadline, for looking at what may hang."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeVar

from diskread import Disk, Limits

if TYPE_CHECKING:
    from collections.abc import Callable

Result = TypeVar("Result")


def within(deadline: float, function: Callable[..., Result], *args: Any) -> Result:
    """Call a function in a native thread of its own. Blocks the greenlet, never the hub.

    Args:
        deadline: Seconds that it may take. A thread that is stuck then holds up nobody, the end of the process neither.
        function: What to call with the other arguments; it must not use gevent.

    Raises:
        DiskTimeout: It has not returned within the deadline.
        Exception: Whatever the function raises.
    """
    limits = Limits(threads=1, deadline=deadline, offline_after=math.inf, slow=math.inf)
    with Disk(getattr(function, "__name__", "call"), None, limits) as disk:
        return disk.run(function, *args)
