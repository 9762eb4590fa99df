"""eventlet: its hub and its green threads, whichever of its hubs is in use, patched or not."""

from __future__ import annotations

import os
import sys
import traceback
from collections import deque
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import eventlet
import greenlet
from eventlet import hubs, patcher

from .._syscalls import thread_ident
from .plain_threads import PlainThreads

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..limits import Limits

Result = TypeVar("Result")

_original_thread: Any = patcher.original("_thread")
"""As it is where nobody has patched it: these threads must be native ones."""

_of_this_thread: Any = patcher.original("threading").local()


def current() -> EventletHub:
    """The hub of this native thread; eventlet makes one where there is none. A forked child gets a new one."""
    found: EventletHub | None = getattr(_of_this_thread, "hub", None)
    hub = hubs.get_hub()
    if found is None or not found.is_of(hub):
        found = _of_this_thread.hub = EventletHub(hub)
    return found


class EventletHub:
    """See `diskread.hubs.Hub`.

    Native threads leave word in a deque and wake the hub through an eventfd(2), to which one listener belongs as long
    as the hub lives.
    """

    def __init__(self, hub: Any) -> None:
        self._process = os.getpid()
        self._hub = hub
        self._thread = thread_ident()
        self._words: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._listener = self.watch(self._bell, self._read_words)

    def is_of(self, hub: Any) -> bool:
        """Whether it is about this hub of eventlet's, in this process."""
        return self._hub is hub and self._process == os.getpid()

    def here(self) -> bool:
        return self._thread == thread_ident()

    def may_wait(self) -> bool:
        return greenlet.getcurrent() is not self._hub.greenlet

    def waiter(self) -> _Waiter:
        return _Waiter(self._hub)

    def timer(self, seconds: float, callback: Callable[..., None], *args: Any, ref: bool = False) -> _Timer:
        return _Timer(self._hub.schedule_call_global(seconds, callback, *args))

    def soon(self, callback: Callable[..., object], *args: Any) -> None:
        self._hub.schedule_call_global(0, callback, *args)

    def soon_from_any_thread(self, callback: Callable[..., object], *args: Any) -> None:
        self._words.append((callback, args))
        os.eventfd_write(self._bell, 1)

    def watch(self, descriptor: int, callback: Callable[..., None], *args: Any) -> _Watcher:
        return _Watcher(self._hub, descriptor, lambda: self._guarded(callback, args))

    def spawn(self, function: Callable[..., Result], *args: Any) -> _Spawned[Result]:
        return _Spawned(self._hub, eventlet.spawn(function, *args))

    def give_way(self) -> None:
        if self.may_wait():
            eventlet.sleep(0)

    def new_engine(self, limits: Limits) -> PlainThreads:
        return PlainThreads(limits, self, _original_thread.start_new_thread, _end_hub)

    def report(self, context: object) -> None:
        sys.stderr.write(f"in {context!r}:\n")
        traceback.print_exc()

    def _read_words(self) -> None:
        if self._process != os.getpid():  # a forked child has inherited the listener; the words are its parent's
            self._listener.stop()
            return
        os.eventfd_read(self._bell)  # not os.read, which may be patched, and would wait for its turn
        for _ in range(len(self._words)):
            callback, args = self._words.popleft()
            self._guarded(callback, args)

    def _guarded(self, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        """Call; eventlet would end the watch of a descriptor whose callback raises."""
        try:
            callback(*args)
        except Exception:  # noqa: BLE001  # told, and the others are not to suffer
            self.report(callback)

    def __del__(self) -> None:
        os.close(self._bell)


def _end_hub() -> None:
    """End the hub of this native thread, if a task has made eventlet give it one (a Timeout, a sleep).

    Else its greenlet would outlive the thread, and with greenlet 3.5 a garbage collection after that crashes: the
    memory of the thread's main greenlet, its parent, is free by then (seen in `green_is_gc`, called by `tp_traverse`).
    """
    hub = getattr(hubs._threadlocal, "hub", None)
    if hub is not None:
        if hub.running:
            hub.abort(wait=True)
        del hubs._threadlocal.hub
        hub.greenlet = None


class _Waiter:
    """Lets one green thread wait for one value."""

    __slots__ = ("_greenlet", "_hub", "_value")

    def __init__(self, hub: Any) -> None:
        self._hub = hub
        self._greenlet: greenlet.greenlet | None = None
        self._value: bool | None = None

    def get(self) -> bool:
        if self._value is None:
            self._greenlet = greenlet.getcurrent()
            try:
                return bool(self._hub.switch())
            finally:
                self._greenlet = None
        return self._value

    def switch(self, value: bool, /) -> None:
        if self._greenlet is None:
            self._value = value
        else:
            self._greenlet.switch(value)


class _Timer:
    def __init__(self, timer: Any) -> None:
        self._timer = timer

    def stop(self) -> None:
        self._timer.cancel()


class _Watcher:
    """A listener that stays. `ref` means nothing here: eventlet's loop never ends by itself."""

    def __init__(self, hub: Any, descriptor: int, callback: Callable[[], None]) -> None:
        self.ref = False
        self._hub = hub
        self._listener = hub.add(hub.READ, descriptor, lambda _descriptor: callback(), _ignore, _ignore)

    def stop(self) -> None:
        if self._listener is not None:
            listener, self._listener = self._listener, None
            self._hub.remove(listener)


def _ignore(*_: object) -> None:
    """Somebody has closed the descriptor under the hub's feet."""


class _Spawned(Generic[Result]):
    """A green thread."""

    def __init__(self, hub: Any, thread: Any) -> None:
        self._hub = hub
        self._thread = thread

    def get(self) -> Result:
        found: Result = self._thread.wait()
        return found

    def kill(self) -> None:
        # From the hub: who calls eventlet.kill from a green thread has to wait for its own next turn.
        self._hub.schedule_call_global(0, eventlet.kill, self._thread)
