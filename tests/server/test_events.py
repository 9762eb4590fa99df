"""Server-Sent Events: what clients are told, and what they can do to the server."""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING

import gevent
import msgspec
import pytest
from falcon.testing import TestClient
from gevent.queue import Queue

from diskread import Disk, Disks
from diskread.slow_log import SlowLog
from server import events as events_module
from server.app import create_app
from server.config import ServerConfig
from server.events import EventDocument, Events, TooManyClients
from server.listener import Server
from server.status import ServerStatus, look_at
from tests.conftest import until
from tests.server.raw_client import Connection, ServerProcess, http_request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from tests.server.conftest import StartServer

    MakeEvents = Callable[..., Events]


@pytest.fixture
def disks() -> Iterator[Disks]:
    with Disks(Disk(f"disk{number}", None) for number in range(64)) as disks:
        yield disks


@pytest.fixture
def make_events(disks: Disks) -> Iterator[MakeEvents]:
    """Make events that look only when they are told to, unless they get another interval."""
    made = []

    def make(**options: float) -> Events:
        made.append(Events(ServerStatus(look_at(disks), simulate=False), **{"interval": 3600.0, **options}))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.close()


def parse(event: bytes) -> tuple[str, EventDocument]:
    """Name and data of an event."""
    fields = dict(line.split(b": ", 1) for line in event.split(b"\n") if line)
    return fields[b"event"].decode(), msgspec.json.decode(fields[b"data"], type=EventDocument)


class Client:
    """Takes what a client is sent at once, as a server does that sends it."""

    def __init__(self, events: Events) -> None:
        self._taken: Queue[bytes] = Queue()
        self._stream = events.subscribe()
        self._greenlet = gevent.spawn(self._take)

    def _take(self) -> None:
        for piece in self._stream:
            self._taken.put(piece)

    def event(self) -> bytes:
        """The next event, whatever pieces it comes in."""
        data = b""
        while not data.endswith(b"\n\n"):
            data += self._taken.get(timeout=20)
        return data

    def ended(self) -> bool:
        """Wait for the end; whether there was nothing else before it."""
        self._greenlet.join(20)
        return self._greenlet.successful() and self._taken.empty()


def whole(pieces: Iterator[bytes]) -> bytes:
    """The next event, whatever pieces it comes in."""
    data = b""
    while not data.endswith(b"\n\n"):
        data += next(pieces)
    return data


def chunks(connection: Connection) -> Iterator[bytes]:
    """The chunks of a response until its regular end."""
    while length := int(connection.reader.readline(), 16):
        yield connection.reader.read(length)
        connection.reader.read(2)
    connection.reader.read(2)


def open_stream(server: ServerProcess) -> Connection:
    """Ask for events and read the head of the response."""
    connection = server.connect()
    connection.send(http_request("/events", close=False))
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += connection.reader.readline()
    assert head.startswith(b"HTTP/1.1 200 "), head
    for line in (b"content-type: text/event-stream\r\n", b"cache-control: no-store\r\n"):
        assert line in head
    return connection


def test_a_running_server_tells_each_second(server: ServerProcess) -> None:
    with open_stream(server) as connection:
        pieces = chunks(connection)
        name, history = parse(whole(pieces))
        assert name == "history"
        assert [disk.name for disk in history.status.disks] == ["d1", "lost", "simulated"]
        assert history.timeline[-1].disks["lost"].state == "offline"
        assert set(history.recent) == {"d1", "lost", "simulated"}
        last = history.timeline[-1].at
        for _ in range(2):
            name, second = parse(whole(pieces))
            assert name == "second"
            assert len(second.timeline) == 1
            assert second.timeline[0].at > last
            last = second.timeline[0].at
            assert second.status.disks[1].reason == server.disk("lost").reason


def test_head_opens_no_stream(server: ServerProcess) -> None:
    response = server.http("/events", method="HEAD")
    assert response.status == 200
    assert response.headers["Content-Type"] == "text/event-stream"
    assert server.http("/events", method="POST").status == 405


def test_an_event_is_made_once_for_all_and_not_at_all_for_nobody(
    make_events: MakeEvents, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []
    encode = msgspec.json.encode

    def count(document: object) -> bytes:
        encoded.append(document)
        return encode(document)

    monkeypatch.setattr(msgspec.json, "encode", count)
    events = make_events()
    events.start()
    for _ in range(5):
        events.look()
    assert not encoded
    clients = [Client(events) for _ in range(3)]
    assert len({each.event() for each in clients}) == 1
    assert len(encoded) == 1
    events.look()
    assert len({each.event() for each in clients}) == 1
    assert len(encoded) == 2


def test_who_comes_late_is_told_what_was_before(make_events: MakeEvents) -> None:
    events = make_events()
    events.start()
    SlowLog("disk7", 1.0).stuck(b"some/file", 4096, queue=0.0, disk=9.0, now=0.0)
    for _ in range(400):
        events.look()
    client = Client(events)
    name, history = parse(client.event())
    assert (name, len(history.timeline)) == ("history", 300)
    assert [(line.disk, line.path, line.kind) for line in history.slow_reads] == [("disk7", "some/file", "stuck")]
    SlowLog("disk8", 1.0).stuck(b"another", 4096, queue=0.0, disk=9.0, now=0.0)
    events.look()
    name, second = parse(client.event())
    assert (name, len(second.timeline)) == ("second", 1)
    assert [line.disk for line in second.slow_reads] == ["disk8"], "what is new, and nothing twice"


def test_who_missed_something_is_told_all_again(make_events: MakeEvents) -> None:
    events = make_events()
    client = Client(events)
    client.event()
    events.look()
    events.look()  # before the client could take the first
    gevent.sleep(0)
    assert parse(client.event())[0] == "second"
    events.look()
    name, document = parse(client.event())
    assert name == "history"
    assert len(document.timeline) == 4


def test_there_are_only_so_many_clients(disks: Disks, make_events: MakeEvents) -> None:
    events = make_events(clients=2)
    client = TestClient(create_app(disks, events=events))
    first, _second = events.subscribe(), events.subscribe()
    refused = client.simulate_get("/events")
    assert refused.status_code == 503
    assert refused.headers["Retry-After"] == "10"
    assert "2 clients already" in refused.json["description"]
    close(first)  # never begun: a client that was gone at once
    events.subscribe()
    with pytest.raises(TooManyClients):
        events.subscribe()


def close(stream: Iterable[bytes]) -> None:
    """As a WSGI server does when it is done."""
    stream.close()  # type: ignore[attr-defined]


def test_nothing_runs_before_the_first_client(disks: Disks) -> None:
    before = list(logging.getLogger("diskread").handlers)
    events = Events(ServerStatus(look_at(disks), simulate=False))
    create_app(disks, events=events)
    assert logging.getLogger("diskread").handlers == before
    events.subscribe()
    assert len(logging.getLogger("diskread").handlers) == len(before) + 1
    events.close()
    assert logging.getLogger("diskread").handlers == before


def test_a_heartbeat_when_there_is_nothing_to_tell(make_events: MakeEvents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "HEARTBEAT", 0.01)
    client = Client(make_events())
    client.event()
    assert client.event() == b": still here\n\n"
    assert client.event() == b": still here\n\n"


def test_after_the_end_there_are_no_streams(disks: Disks, make_events: MakeEvents) -> None:
    events = make_events()
    client = Client(events)
    client.event()
    events.close()
    assert client.ended()
    result = TestClient(create_app(disks, events=events)).simulate_get("/events")
    assert result.status_code == 503
    assert "about to end" in result.json["description"]


class Deaf:
    """A server in this process, and a client of its events that reads nothing."""

    def __init__(self, disks: Disks, events: Events) -> None:
        self.server = Server(ServerConfig(port=0), create_app(disks, events=events), disks)
        self.server.start()
        assert self.server.server_port is not None
        self.client = Connection(self.server.server_port, receive_buffer=4096)
        self.client.send(http_request("/events", close=False))


@pytest.fixture
def deaf(disks: Disks, make_events: MakeEvents) -> Iterator[tuple[Deaf, Events]]:
    events = make_events(interval=0.005)
    deaf = Deaf(disks, events)
    yield deaf, events
    deaf.client.close()
    deaf.server.stop()


def blocked(events: Events) -> bool:
    """Whether something is being sent to a client that does not take it."""
    return any(stream._sending is not None for stream in events._clients)


def test_who_does_not_read_is_dropped(
    deaf: tuple[Deaf, Events], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(events_module, "TAKE_WITHIN", 0.2)
    _server, events = deaf
    until(lambda: events._clients, "the client")
    until(lambda: not events._clients, "the client to be dropped")
    assert "Traceback" not in capsys.readouterr().err


def test_who_does_not_read_holds_up_no_drain(deaf: tuple[Deaf, Events], capsys: pytest.CaptureFixture[str]) -> None:
    both, events = deaf
    until(lambda: events._clients, "the client")
    number = events._number
    until(lambda: blocked(events) and events._number > number + 50, "its buffers to be full")
    events.close()
    assert both.server.drain(5.0), "it was cut off at the end of the drain, not at its beginning"
    assert not events._clients
    assert "Traceback" not in capsys.readouterr().err


def test_a_drain_ends_streams_regularly(start_server: StartServer, tree: Path) -> None:
    server = start_server("--disk", f"d1={tree}", "--drain-timeout", "20")
    with open_stream(server) as connection:
        pieces = chunks(connection)
        whole(pieces)
        assert server.stop() == 0
        for piece in pieces:
            assert piece.startswith(b"event: second")
        assert connection.rest() == b"", "the last chunk was there, then the end"
    assert "cut off" not in server.said()


def test_who_goes_away_leaves_nothing_behind(start_server: StartServer, tree: Path) -> None:
    server = start_server("--disk", f"d1={tree}")
    sockets = server.sockets()
    for hang_up in (Connection.close, Connection.reset):
        connections = [open_stream(server) for _ in range(3)]
        for connection in connections:
            hang_up(connection)
    until(lambda: server.sockets() <= sockets, "the sockets to be closed")
    assert "Traceback" not in server.said()


def test_a_client_of_http_1_0_gets_a_stream_without_chunks(server: ServerProcess) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
        sock.sendall(b"GET /events HTTP/1.0\r\n\r\n")
        data = b""
        while b"event: second\n" not in data:
            data += sock.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    assert body.startswith(b"retry: 1000\n\nevent: history\n")
