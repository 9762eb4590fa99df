"""`/events`: the status of all disks each second, as Server-Sent Events, and what was before.

The format is that of the HTML standard, 9.2. One greenlet looks at the disks once a second, for however many clients;
the greenlets of the clients only send what it has made.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import falcon
import gevent
import msgspec
from gevent.event import AsyncResult

from .slow_reads import SlowReadDocument, SlowReads
from .status import StatusDocument  # noqa: TC001 - msgspec wants it when it decodes
from .timeline import Percentiles, Sample, Timeline

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator

    from greenlet import greenlet

    from .status import ServerStatus

CLIENTS = 32
"""Clients at a time; each has a connection and a greenlet."""

HEARTBEAT = 15.0
"""Seconds without an event after which a comment tells the client, and all proxies on the way, that we are here."""

PIECE = 64 * 1024
"""Bytes that are sent at a time ..."""

TAKE_WITHIN = 10.0
"""... and the seconds that a client may need to take them; then it is dropped."""

_RETRY = b"retry: 1000\n\n"  # milliseconds until a browser connects again


class EventDocument(msgspec.Struct):
    """The data of an event.

    An event `history` has all that is kept, and replaces what the client knew; an event `second` has only what is new.

    Attributes:
        status: As in `/status`.
        recent: Percentiles of the last minute, by disk.
        timeline: Samples, the oldest first.
        slow_reads: Lines of the log of slow reads, the oldest first.
    """

    status: StatusDocument
    recent: dict[str, Percentiles]
    timeline: list[Sample]
    slow_reads: list[SlowReadDocument]


class TooManyClients(Exception):
    """There are as many clients as there may be, or the server is about to end."""


class Events:
    """Looks at the disks once a second, keeps what it saw, and tells those who listen.

    Looking begins with `start`, or with the first client. What is told is encoded once for all clients, and not at all
    when nobody listens.

    Attributes:
        closed: Whether there will be no other event.
    """

    def __init__(self, status: ServerStatus, *, interval: float = 1.0, clients: int = CLIENTS) -> None:
        """Prepare; nothing runs before `start`.

        Args:
            status: What to tell of.
            interval: Seconds between two looks.
            clients: Clients at a time.
        """
        self._status = status
        self._interval = interval
        self._limit = clients
        self._timeline = Timeline()
        self._slow_reads = SlowReads()
        self._clients: set[_Stream] = set()
        self._looking: gevent.Greenlet[[], None] | None = None
        self.closed = False
        self._number = 0
        self._document: StatusDocument | None = None
        self._lines: list[SlowReadDocument] = []
        self._lines_told = 0
        self._history: bytes | None = None
        self._next: AsyncResult[tuple[int, bytes] | None] = AsyncResult()

    def start(self) -> None:
        """Begin to look, unless that was done. Blocks as `look` does; the greenlet belongs to this process and hub."""
        if self._looking is None and not self.closed:
            logging.getLogger("diskread").addHandler(self._slow_reads)
            self.look()
            self._looking = gevent.spawn(self._look_again_and_again)

    def close(self) -> None:
        """End all streams and stop looking. Never blocks: a client that does not take what it is sent is hung up on."""
        self.closed = True
        logging.getLogger("diskread").removeHandler(self._slow_reads)
        if self._looking is not None:
            self._looking.kill(block=False)
        self._next.set(None)
        for client in self._clients:
            client.interrupt()

    def subscribe(self) -> Iterable[bytes]:
        """What a new client is to be sent: an iterable of bytes with a `close`, as WSGI has them.

        Raises:
            TooManyClients: There are as many clients as there may be.
        """
        if self.closed:
            raise TooManyClients("the server is about to end")
        if len(self._clients) >= self._limit:
            raise TooManyClients(f"there are {self._limit} clients already, as many as there may be")
        self.start()
        stream = _Stream(self)
        self._clients.add(stream)
        return stream

    def leave(self, client: _Stream) -> None:
        """Forget a client."""
        self._clients.discard(client)

    def history(self) -> tuple[int, bytes]:
        """The number of the last look, and the event with all that is kept."""
        if self._history is None:
            self._history = self._event(b"history", self._timeline.samples, self._lines)
        return self._number, self._history

    def next(self, wait: float) -> tuple[int, bytes] | None:
        """Wait for the next look. Blocks the greenlet.

        Args:
            wait: Seconds to wait at most.

        Returns:
            Its number, and the event with what is new; None when there was none in that time, or it is all over.
        """
        return self._next.wait(timeout=wait)

    def look(self) -> None:
        """Look at the disks now, and tell those who listen. Blocks the greenlet where other processes are asked."""
        seen = self._status.look()
        self._document = self._status.document(seen)
        sample = self._timeline.record(self._document.uptime, seen.disks)
        self._lines = self._slow_reads.lines
        new = self._slow_reads.count - self._lines_told
        self._lines_told += new
        self._number += 1
        self._history = None
        if self._clients:
            event = self._event(b"second", [sample], self._lines[-new:] if new else [])
            told, self._next = self._next, AsyncResult()
            told.set((self._number, event))

    def _look_again_and_again(self) -> None:
        due = time.monotonic()
        while True:
            # A look that came late (a busy hub, a machine that slept) is no reason to hurry the next ones.
            due = max(due + self._interval, time.monotonic())
            gevent.sleep(due - time.monotonic())
            self.look()

    def _event(self, name: bytes, samples: list[Sample], lines: list[SlowReadDocument]) -> bytes:
        assert self._document is not None
        document = EventDocument(self._document, self._timeline.recent, samples, lines)
        return b"event: %b\ndata: %b\n\n" % (name, msgspec.json.encode(document))


class _Stream:
    """What one client is sent. It need not keep up: it misses seconds, and gets all that is kept again then."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._sending: greenlet | None = None
        self._pieces: Generator[bytes, None, None] | None = None

    def __iter__(self) -> Iterator[bytes]:
        self._pieces = self._all()
        return self._pieces

    def _all(self) -> Generator[bytes, None, None]:
        known, event = self._events.history()
        yield from self._send(_RETRY + event)
        while not self._events.closed:
            following = self._events.next(HEARTBEAT)
            if following is not None:
                if following[0] != known + 1:
                    following = self._events.history()
                known, event = following
                yield from self._send(event)
            elif not self._events.closed:
                yield from self._send(b": still here\n\n")

    def _send(self, data: bytes) -> Generator[bytes, None, None]:
        """Hand data to the server, which sends it before it comes back for more."""
        for start in range(0, len(data), PIECE):
            self._sending = gevent.getcurrent()
            try:
                with gevent.Timeout(TAKE_WITHIN, TimeoutError("the client does not take what it is sent")):
                    yield data[start : start + PIECE]
            finally:
                self._sending = None

    def interrupt(self) -> None:
        """Hang up on the client if something is being sent to it; otherwise it learns of the end by itself."""
        if self._sending is not None:
            gevent.kill(self._sending, TimeoutError("the server ends"))

    def close(self) -> None:
        """The client is gone, or the stream is over."""
        if self._pieces is not None:
            self._pieces.close()
        self._events.leave(self)


class EventsResource:
    """`/events`: Server-Sent Events."""

    def __init__(self, events: Events) -> None:
        """Tell of these."""
        self._events = events

    def on_get(self, _request: falcon.Request, response: falcon.Response) -> None:
        """Begin to send; ends when the client goes, does not take what it is sent, or the server ends."""
        try:
            response.stream = self._events.subscribe()
        except TooManyClients as error:
            raise falcon.HTTPServiceUnavailable(description=str(error), retry_after=10) from error
        self._describe(response)

    def on_head(self, _request: falcon.Request, response: falcon.Response) -> None:
        """Send the headers only."""
        self._describe(response)

    @staticmethod
    def _describe(response: falcon.Response) -> None:
        response.content_type = "text/event-stream"
        response.cache_control = ["no-store"]
        response.set_header("X-Accel-Buffering", "no")  # nginx in front would collect what is to be seen now
