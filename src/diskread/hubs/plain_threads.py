"""Native threads of our own, for loops that bring no thread pool which would do."""

from __future__ import annotations

import weakref
from _queue import Empty, SimpleQueue  # by this name, for neither gevent nor eventlet puts one of its own there
from _thread import TIMEOUT_MAX
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..engines import Completed, Runnable
    from ..limits import Limits
    from . import Hub

    Work = tuple[Runnable, Callable[[], None]]
    StartThread = Callable[[Callable[..., None], tuple[object, ...]], int]


class PlainThreads:
    """Runs any task. See `diskread.engines.Engine`.

    All of its state belongs to the hub's thread, so that there is no lock: a thread that has been idle for long asks
    the hub whether it may leave. Like those of gevent's threadpool the threads are daemons: the end of the program
    waits for none of them.
    """

    def __init__(
        self,
        limits: Limits,
        hub: Hub,
        start_thread: StartThread,
        leave: Callable[[], None] = lambda: None,
    ) -> None:
        """No thread is started before there is work.

        Args:
            limits: How long a thread may be idle.
            hub: Where completions are told.
            start_thread: `_thread.start_new_thread`, as it was before anybody patched it.
            leave: What a thread calls when it ends.
        """
        self._idle = min(limits.idle, TIMEOUT_MAX)
        self._hub = hub
        self._start_thread = start_thread
        self._leave = leave
        self._work: SimpleQueue[Work | None] = SimpleQueue()
        self._threads = 0
        self._in_flight = 0

    @property
    def threads(self) -> int:
        """Threads that are alive, idle ones included."""
        return self._threads

    def start(self, task: Runnable, completed: Completed) -> None:
        """See `Engine.start`."""
        if self._threads <= self._in_flight:
            # With the name of the engine alone: one that nobody uses any more is not kept by its idle threads.
            self._start_thread(_run, (self._work, self._idle, self._hub, weakref.ref(self), self._leave))
            self._threads += 1
        self._in_flight += 1
        self._work.put((task, lambda: self._over(completed)))

    def dismiss(self) -> None:
        """See `Engine.dismiss`."""
        self._idle = 0.0  # those that are busy leave afterwards
        while self._threads > self._in_flight:
            self._let_go()

    def __del__(self) -> None:
        """Let idle threads go; there are no others, for what is under way keeps its engine."""
        for _ in range(self._threads):
            self._work.put(None)  # which may be called from anywhere, finalizers included (queue.SimpleQueue.put)

    def _over(self, completed: Completed) -> None:
        self._in_flight -= 1
        completed()
        if not self._idle:
            self.dismiss()

    def _let_go(self) -> None:
        self._threads -= 1
        self._work.put(None)

    def _has_been_idle(self) -> None:
        """A thread asks whether it may leave. Whichever takes the word from the queue does."""
        if self._threads > self._in_flight:
            self._let_go()


def _run(
    work: SimpleQueue[Work | None],
    idle: float,
    hub: Hub,
    engine: weakref.ref[PlainThreads],
    leave: Callable[[], None],
) -> None:
    """What a thread does. The loop may go while a task is at the disk: nobody is left to be told then."""
    with suppress(RuntimeError, ValueError, OSError):
        while True:
            try:
                found = work.get(timeout=idle)
            except Empty:
                hub.soon_from_any_thread(_has_been_idle, engine)
                continue
            if found is None:
                break
            task, over = found
            task.run()
            hub.soon_from_any_thread(over)
            # What was under way is kept by the loop until it is over, and not by a thread that is idle.
            del found, task, over
    leave()


def _has_been_idle(reference: weakref.ref[PlainThreads]) -> None:
    engine = reference()
    if engine is not None:
        engine._has_been_idle()
