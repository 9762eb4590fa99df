"""What runs the tasks of a disk in native threads: gevent's threadpool, or threads that never touch Python.

An engine does not count slots: it is given no more tasks at a time than it has threads. Nothing here waits for a
thread, and all of it is called on the hub's thread.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Protocol

from gevent.event import Event
from gevent.threadpool import ThreadPool

from ._engine import Engine as NativeThreads
from ._syscalls import Job

if TYPE_CHECKING:
    from collections.abc import Callable

    import gevent.hub
    from gevent.event import AsyncResult

    from .limits import Limits

    Waiter = AsyncResult[None] | Event
    """What a greenlet waits on for the end of a task."""


class Runnable(Protocol):
    """A task, as far as an engine is concerned."""

    def run(self) -> None:
        """Do the work. Must not raise."""


class Engine(Protocol):
    """Native threads of one disk in this process."""

    @property
    def threads(self) -> int:
        """Threads that are alive, idle ones included."""

    def start(self, task: Runnable, completed: Callable[[], None]) -> Waiter:
        """Run a task in a thread. Never blocks.

        Args:
            task: What to run.
            completed: Called in the hub when it is over, before any greenlet that waits for it; must not block.

        Raises:
            RuntimeError: No thread can be started; nothing will be run.
        """

    def dismiss(self) -> None:
        """Let the threads go. Waits for none of them; a later `start` brings new ones."""


def new_engine(limits: Limits, hub: gevent.hub.Hub) -> Engine:
    """The engine that the limits ask for; it starts no thread before there is work."""
    return NativeEngine(limits, hub) if limits.engine == "native" else ThreadpoolEngine(limits, hub)


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

    def start(self, task: Runnable, completed: Callable[[], None]) -> Waiter:
        """See `Engine.start`."""
        if not self.pool.maxsize:  # something to close has turned up after the threads were let go
            self.pool = self._new_pool()
        if self.pool.size <= self._in_flight:
            # Before the task is in the pool's line, from where nobody can take it back if this fails.
            self.pool.size = self._in_flight + 1
        result: AsyncResult[None] = self.pool.spawn(task.run)
        self._in_flight += 1

        def over(_result: AsyncResult[None]) -> None:
            self._in_flight -= 1
            completed()

        result.rawlink(over)
        return result

    def dismiss(self) -> None:
        """See `Engine.dismiss`."""
        if self.pool.maxsize:
            self.pool.maxsize = 0  # unlike ThreadPool.kill() this does not wait for the threads


class NativeEngine:
    """Threads that make the visits of `Job`s without Python, and a threadpool for everything else.

    A thread of this kind needs the GIL at no time, so a Job is at the disk at once and comes to its end however busy
    the interpreter is. One watcher of the hub collects everything that is over, any number of jobs at a time.

    The two kinds of threads share the disk's slots, so that no more of them are in the kernel than there are slots;
    idle ones there may be more, until they leave.
    """

    def __init__(self, limits: Limits, hub: gevent.hub.Hub) -> None:
        self._limits = limits
        self._hub = hub
        self._process = os.getpid()
        self._others = ThreadpoolEngine(limits, hub)
        self._running: dict[Job, tuple[Callable[[], None], Event]] = {}
        self._native: NativeThreads | None = None
        self._watcher: Any = None  # gevent's watchers have no types

    @property
    def threads(self) -> int:
        """Threads that are alive, idle ones included."""
        return self._others.threads + (self._native.threads if self._native is not None else 0)

    def start(self, task: Runnable, completed: Callable[[], None]) -> Waiter:
        """See `Engine.start`."""
        if not isinstance(task, Job):
            return self._others.start(task, completed)
        if self._native is None:
            self._native = NativeThreads(self._limits.threads, self._limits.idle)
            self._watcher = self._hub.loop.io(self._native.fileno(), 1)  # 1: readable
        self._native.submit(task)
        if not self._running:
            # Only while something is in flight: the watcher keeps the hub, and so the program, waiting for it.
            self._watcher.start(self._collect)
        over = Event()
        self._running[task] = completed, over
        return over

    def _collect(self) -> None:
        """Some jobs are over. Runs in the hub."""
        if self._native is None or self._process != os.getpid():
            self._forget()  # a forked child has inherited the watcher
            return
        for job in self._native.completed():
            completed, over = self._running.pop(job)
            try:
                completed()
            except Exception:  # noqa: BLE001  # like gevent's own links: the others in the batch are not to suffer
                self._hub.handle_error(self, *sys.exc_info())
            over.set()
        if not self._running and self._watcher is not None:
            self._watcher.stop()

    def _forget(self) -> None:
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher.close()
        self._watcher = self._native = None

    def dismiss(self) -> None:
        """See `Engine.dismiss`."""
        self._others.dismiss()
        if self._native is not None and not self._running:
            self._native.close()
            self._forget()
