"""Event loops that a disk can live in, behind one small interface; all that the core knows of any of them.

A hub is the loop of one native thread. Everything about a disk happens in its hub's thread, except the blocking calls
themselves. Those who call a disk are greenlets of that hub: gevent's and eventlet's own, or what `diskread.aio` runs a
call in on behalf of a coroutine.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..engines import Engine
    from ..limits import Limits

HubName = Literal["gevent", "eventlet", "asyncio"]

NAMES: tuple[HubName, ...] = ("gevent", "eventlet", "asyncio")

Result = TypeVar("Result")
Outcome_co = TypeVar("Outcome_co", covariant=True)


class Waiter(Protocol):
    """Lets one greenlet wait for one value."""

    def get(self) -> bool:
        """Wait for the value, or return it if it is there already. Blocks the greenlet, never the hub.

        Whatever the loop throws into the greenlet (a kill, a timeout, a cancellation) passes through.
        """

    def switch(self, value: bool, /) -> None:
        """Give the value. Only in the hub; the greenlet goes on at once or soon. A second value is lost."""


class Timer(Protocol):
    """Calls something once, unless it is stopped before."""

    def stop(self) -> None:
        """Call nothing. Harmless when it is over."""


class Watcher(Protocol):
    """Calls something each time a descriptor can be read.

    Attributes:
        ref: Whether the loop has to go on for its sake, where a loop ends by itself (gevent).
    """

    ref: bool

    def stop(self) -> None:
        """End watching."""


class Spawned(Protocol[Outcome_co]):
    """A function that runs in a greenlet of its own."""

    def get(self) -> Outcome_co:
        """Wait for what the function returns. Blocks the greenlet, never the hub."""

    def kill(self) -> None:
        """End the greenlet soon, wherever it waits. Never blocks."""


class Hub(Protocol):
    """The event loop of one native thread. Nothing here but `give_way` blocks, and that only the greenlet."""

    def here(self) -> bool:
        """Whether the caller runs in this hub's thread, while the loop is its current one."""

    def may_wait(self) -> bool:
        """Whether the caller, in this hub's thread, is a greenlet that can wait: not the loop itself."""

    def waiter(self) -> Waiter:
        """Something for the calling greenlet to wait with."""

    def timer(self, seconds: float, callback: Callable[..., None], *args: Any, ref: bool = False) -> Timer:
        """Call something in the hub.

        Args:
            seconds: From now.
            callback: Must not block.
            args: For the callback.
            ref: Whether the loop has to go on for its sake, where a loop ends by itself (gevent).
        """

    def soon(self, callback: Callable[..., object], *args: Any) -> None:
        """Call something in the hub, soon; in the hub's thread only."""

    def soon_from_any_thread(self, callback: Callable[..., object], *args: Any) -> None:
        """Call something in the hub, soon. Also for finalizers: takes no lock that the interrupted thread may hold.

        Raises:
            Exception: ValueError or RuntimeError, when the loop has gone.
        """

    def watch(self, descriptor: int, callback: Callable[..., None], *args: Any) -> Watcher:
        """Call something in the hub each time a descriptor can be read, until it is stopped."""

    def spawn(self, function: Callable[..., Result], *args: Any) -> Spawned[Result]:
        """Run a function in a greenlet of its own, soon. It must not raise an Exception."""

    def give_way(self) -> None:
        """Let everybody else have a turn, sockets too. Does nothing in the hub itself."""

    def new_engine(self, limits: Limits) -> Engine:
        """Threads that run any task; none is started before there is work."""

    def report(self, context: object) -> None:
        """Tell of the exception that is being handled, which nobody else will hear of. Raises nothing."""


def current(name: HubName) -> Hub:
    """The hub of the calling native thread.

    Raises:
        RuntimeError: asyncio, and no loop runs in this thread.
        ImportError: The loop's package is not installed.
    """
    hub: Hub = import_module(f"{__name__}.{name}").current()
    return hub


def check_name(name: str) -> None:
    """Refuse a hub that there is none of.

    Raises:
        ValueError: It says which there are.
    """
    if name not in NAMES:
        raise ValueError(f"hub must be one of {', '.join(map(repr, NAMES))}, not {name!r}")
