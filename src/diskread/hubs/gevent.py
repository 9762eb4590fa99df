"""gevent, the default: its hub, its greenlets, its threadpool."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import gevent
import gevent.hub
from gevent.hub import Waiter
from gevent.threadpool import ThreadPool

from .._syscalls import thread_ident

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..engines import Completed, Runnable
    from ..limits import Limits

Result = TypeVar("Result")

_READABLE = 1
"""The event of an io watcher of gevent that its descriptor can be read."""


def current() -> GeventHub:
    """The hub of this native thread; gevent makes one where there is none."""
    return GeventHub(gevent.get_hub())


class GeventHub:
    """See `diskread.hubs.Hub`."""

    def __init__(self, hub: gevent.hub.Hub) -> None:
        self._hub = hub
        self._thread = hub.thread_ident
        self.waiter: Callable[[], Waiter[bool]] = partial(Waiter, hub)

    def here(self) -> bool:
        return self._thread == thread_ident()

    def may_wait(self) -> bool:
        return gevent.getcurrent() is not self._hub

    def timer(self, seconds: float, callback: Callable[..., None], *args: Any, ref: bool = False) -> _Watcher:
        timer = self._hub.loop.timer(seconds, ref=ref)
        timer.start(callback, *args)
        return _Watcher(timer)

    def soon(self, callback: Callable[..., object], *args: Any) -> None:
        self._hub.loop.run_callback(callback, *args)

    def soon_from_any_thread(self, callback: Callable[..., object], *args: Any) -> None:
        self._hub.loop.run_callback_threadsafe(callback, *args)

    def watch(self, descriptor: int, callback: Callable[..., None], *args: Any) -> _Watcher:
        watcher = self._hub.loop.io(descriptor, _READABLE, ref=False)
        watcher.start(callback, *args)
        return _Watcher(watcher)

    def spawn(self, function: Callable[..., Result], *args: Any) -> _Spawned[Result]:
        return _Spawned(gevent.spawn(function, *args))

    def give_way(self) -> None:
        if gevent.getcurrent() is self._hub:
            return
        # Not gevent.sleep(0): greenlets that only do that have their turns one after the other, and the loop looks at
        # its sockets some ten times a second.
        timer = self._hub.loop.timer(0)
        try:
            self._hub.wait(timer)
        finally:
            timer.close()

    def new_engine(self, limits: Limits) -> ThreadpoolEngine:
        return ThreadpoolEngine(limits, self._hub)

    def report(self, context: object) -> None:
        self._hub.handle_error(context, *sys.exc_info())


class _Watcher:
    """A watcher of gevent's, which has to be closed when it is stopped."""

    def __init__(self, watcher: Any) -> None:  # gevent's watchers have no types
        self._watcher = watcher

    @property
    def ref(self) -> bool:
        found: bool = self._watcher.ref
        return found

    @ref.setter
    def ref(self, value: bool) -> None:
        self._watcher.ref = value

    def stop(self) -> None:
        if self._watcher is not None:
            watcher, self._watcher = self._watcher, None
            watcher.stop()
            watcher.close()


class _Spawned(Generic[Result]):
    """A greenlet of gevent's."""

    def __init__(self, greenlet: gevent.Greenlet[..., Result]) -> None:
        self._greenlet = greenlet

    def get(self) -> Result:
        return self._greenlet.get()

    def kill(self) -> None:
        self._greenlet.kill(block=False)


class ThreadpoolEngine:
    """gevent's threadpool: runs anything. Its threads take the GIL before and after each task."""

    def __init__(self, limits: Limits, hub: gevent.hub.Hub) -> None:
        self._limits = limits
        self._hub = hub
        self._in_flight = 0
        self.pool = self._new_pool()

    def _new_pool(self) -> ThreadPool:
        idle = self._limits.idle
        return ThreadPool(self._limits.threads, self._hub, idle_task_timeout=idle)  # type: ignore[arg-type]  # takes any number

    @property
    def threads(self) -> int:
        """Threads that are alive, idle ones included."""
        return self.pool.size

    def start(self, task: Runnable, completed: Completed) -> None:
        """See `Engine.start`."""
        if not self.pool.maxsize:  # something to close has turned up after the threads were let go
            self.pool = self._new_pool()
        if self.pool.size <= self._in_flight:
            # Before the task is in the pool's line, from where nobody can take it back if this fails.
            self.pool.size = self._in_flight + 1
        result = self.pool.spawn(task.run)
        self._in_flight += 1
        result.rawlink(partial(self._over, completed))

    def _over(self, completed: Completed, _result: object) -> None:
        self._in_flight -= 1
        completed()

    def dismiss(self) -> None:
        """See `Engine.dismiss`."""
        if self.pool.maxsize:
            self.pool.maxsize = 0  # unlike ThreadPool.kill() this does not wait for the threads
