"""What runs the tasks of a disk in native threads: those of the hub's own kind, or threads that never touch Python.

An engine does not count slots: it is given no more tasks at a time than it has threads. Nothing here waits for a
thread, and all of it is called on the hub's thread.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from typing import TYPE_CHECKING, Protocol

from ._engine import Engine as NativeThreads
from ._syscalls import Job

if TYPE_CHECKING:
    from collections.abc import Callable

    from .hubs import Hub, Watcher
    from .limits import Limits

    Completed = Callable[[], None]


class Runnable(Protocol):
    """A task, as far as an engine is concerned."""

    def run(self) -> None:
        """Do the work. Must not raise."""


class Engine(Protocol):
    """Native threads of one disk in this process."""

    @property
    def threads(self) -> int:
        """Threads that are alive, idle ones included."""

    def start(self, task: Runnable, completed: Completed) -> None:
        """Run a task in a thread. Never blocks.

        Args:
            task: What to run.
            completed: Called in the hub when it is over, with whatever result; must not block.

        Raises:
            RuntimeError: No thread can be started; nothing will be run.
        """

    def dismiss(self) -> None:
        """Let the threads go. Waits for none of them; a later `start` brings new ones."""


def new_engine(limits: Limits, hub: Hub) -> Engine:
    """The engine that the limits ask for; it starts no thread before there is work."""
    return NativeEngine(limits, hub) if limits.engine == "native" else hub.new_engine(limits)


class NativeEngine:
    """Threads that make the visits of `Job`s without Python, and the hub's own kind for everything else.

    A thread of this kind needs the GIL at no time, so a Job is at the disk at once and comes to its end however busy
    the interpreter is. One watcher of the hub collects everything that is over, any number of jobs at a time.

    The two kinds of threads share the disk's slots, so that no more of them are in the kernel than there are slots;
    idle ones there may be more, until they leave.
    """

    def __init__(self, limits: Limits, hub: Hub) -> None:
        self._limits = limits
        self._hub = hub
        self._process = os.getpid()
        self._others = hub.new_engine(limits)
        self._running: dict[Job, Completed] = {}
        self._native: NativeThreads | None = None
        self._watcher: Watcher | None = None

    @property
    def threads(self) -> int:
        """Threads that are alive, idle ones included."""
        return self._others.threads + (self._native.threads if self._native is not None else 0)

    def start(self, task: Runnable, completed: Completed) -> None:
        """See `Engine.start`."""
        if not isinstance(task, Job):
            self._others.start(task, completed)
            return
        (self._native or self._begin()).submit(task)
        if not self._running:
            _BUSY.add(self)
            if self._watcher is not None:
                self._watcher.ref = True
        self._running[task] = completed

    def dismiss(self) -> None:
        """See `Engine.dismiss`."""
        self._others.dismiss()
        if self._native is not None and not self._running:
            self._native.close()
            self._forget()

    def __del__(self) -> None:
        """Stop watching, in the hub: finalizers run in any thread, and watchers are for the hub's alone."""
        if self._native is not None and self._watcher is not None and self._process == os.getpid():
            with contextlib.suppress(ValueError, RuntimeError):  # the loop has gone before
                self._hub.soon_from_any_thread(_stop, self._watcher, self._native)

    def _begin(self) -> NativeThreads:
        self._native = NativeThreads(self._limits.threads, self._limits.idle)
        self._watcher = self._hub.watch(self._native.fileno(), _look, weakref.ref(self))
        return self._native

    def _collect(self) -> None:
        """Some jobs are over. Runs in the hub."""
        if self._native is None:
            return
        if self._process != os.getpid():  # a forked child has inherited the watcher
            self._forget()
            return
        for job in self._native.completed():
            try:
                self._running.pop(job)()
            except Exception:  # noqa: BLE001  # like gevent's own links: the others in the batch are not to suffer
                self._hub.report(self)
        if not self._running:
            _BUSY.discard(self)
            if self._watcher is not None:
                self._watcher.ref = False

    def _forget(self) -> None:
        _BUSY.discard(self)
        if self._native is not None and self._watcher is not None:
            _stop(self._watcher, self._native)
        self._watcher = self._native = None


_BUSY: set[NativeEngine] = set()
"""Engines with jobs under way. The loop keeps none alive, so that a disk that nobody uses any more can go; but what is
under way has to be collected, and the program has to wait for it."""


def _look(reference: weakref.ref[NativeEngine]) -> None:
    engine = reference()
    if engine is not None:
        engine._collect()


def _stop(watcher: Watcher, _native: NativeThreads) -> None:
    """Stop watching what belongs to `_native`, whose descriptor must not be closed before."""
    watcher.stop()
