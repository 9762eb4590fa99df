"""asyncio: coroutines wait for a disk in greenlets, for which `run` awaits what they wait for."""

from __future__ import annotations

import _thread
import asyncio
import sys
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from greenlet import getcurrent, greenlet

from .._syscalls import thread_ident
from .plain_threads import PlainThreads

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..limits import Limits

Result = TypeVar("Result")


def current() -> AsyncioHub:
    """The running loop of this thread.

    Raises:
        RuntimeError: None runs.
    """
    return AsyncioHub(asyncio.get_running_loop())


async def run(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Call a function that waits as greenlets do. Blocks neither the loop nor its thread.

    Args:
        function: What to call; it waits by means of an `AsyncioHub` alone.
        args: For the function.
        kwargs: For the function.

    Returns:
        What the function returns.

    Raises:
        BaseException: What the function raises. A cancellation is raised in it where it waits.
    """
    inside = _Bridge(function)
    found = inside.switch(*args, **kwargs)
    while not inside.dead:
        try:
            value = await found
        except BaseException as error:  # noqa: BLE001  # raised where the function waits, cancellation included
            found = inside.throw(error)
        else:
            found = inside.switch(value)
    result: Result = found
    return result


class _Bridge(greenlet):
    """Runs what waits; switches to its parent, the coroutine in `run`, with a future that has to be awaited."""


class AsyncioHub:
    """See `diskread.hubs.Hub`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread = thread_ident()

    def here(self) -> bool:
        return self._thread == thread_ident() and asyncio._get_running_loop() is self._loop

    def may_wait(self) -> bool:
        return isinstance(getcurrent(), _Bridge)

    def waiter(self) -> _Waiter:
        return _Waiter(self._loop)

    def timer(self, seconds: float, callback: Callable[..., None], *args: Any, ref: bool = False) -> _Timer:
        return _Timer(self._loop.call_later(seconds, callback, *args))

    def soon(self, callback: Callable[..., object], *args: Any) -> None:
        self._loop.call_soon(callback, *args)

    def soon_from_any_thread(self, callback: Callable[..., object], *args: Any) -> None:
        self._loop.call_soon_threadsafe(callback, *args)

    def watch(self, descriptor: int, callback: Callable[..., None], *args: Any) -> _Watcher:
        return _Watcher(self._loop, descriptor, callback, args)

    def spawn(self, function: Callable[..., Result], *args: Any) -> _Spawned[Result]:
        return _Spawned(self._loop.create_task(run(function, *args)))

    def give_way(self) -> None:
        if self.may_wait():
            waiter = self.waiter()
            self._loop.call_soon(waiter.switch, True)
            waiter.get()

    def new_engine(self, limits: Limits) -> PlainThreads:
        return PlainThreads(limits, self, _thread.start_new_thread)

    def report(self, context: object) -> None:
        error = sys.exc_info()[1]
        self._loop.call_exception_handler({"message": f"in {context!r}", "exception": error})


class _Waiter:
    """Lets one greenlet wait for one value."""

    __slots__ = ("_future",)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._future: asyncio.Future[bool] = loop.create_future()

    def get(self) -> bool:
        coroutine = getcurrent().parent
        assert coroutine is not None
        return bool(coroutine.switch(self._future))

    def switch(self, value: bool, /) -> None:
        if not self._future.done():
            self._future.set_result(value)


class _Timer:
    def __init__(self, handle: asyncio.TimerHandle) -> None:
        self._handle = handle

    def stop(self) -> None:
        self._handle.cancel()


class _Watcher:
    """A reader of the loop's. `ref` means nothing here: the loop lasts as long as what it was asked to run."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, descriptor: int, callback: Callable[..., None], args: tuple[Any, ...]
    ) -> None:
        self.ref = False
        self._loop = loop
        self._descriptor = descriptor
        loop.add_reader(descriptor, callback, *args)

    def stop(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            self._loop.remove_reader(descriptor)


class _Spawned(Generic[Result]):
    """A task of asyncio's that runs the bridge."""

    def __init__(self, task: asyncio.Task[Result]) -> None:
        self._task = task

    def get(self) -> Result:
        coroutine = getcurrent().parent
        assert coroutine is not None
        found: Result = coroutine.switch(self._task)
        return found

    def kill(self) -> None:
        self._task.cancel()
