"""The promises of the server, on file systems that really hang: what HTTP clients get, of which disk, and when."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.server.raw_client import ServerProcess, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from .injectors import Dying, FaultFS

    Serve = Callable[..., ServerProcess]
    MakeFaultFS = Callable[..., FaultFS]

CONTENT = os.urandom(1_000_000)
DEADLINE = 0.5
HEALTHY = ("h1", "h2", "h3")


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start a server with three healthy disks and one, called `sick`, on the directory given."""
    started: list[ServerProcess] = []

    def start(sick: Path, *options: str) -> ServerProcess:
        disks = ["--disk", f"sick={sick}"]
        for name in HEALTHY:
            (tmp_path / name).mkdir()
            (tmp_path / name / "x").write_bytes(CONTENT)
            disks += ["--disk", f"{name}={tmp_path / name}"]
        limits = ["--threads", "2", "--queue", "2", "--deadline", str(DEADLINE)]
        started.append(ServerProcess(tmp_path, *disks, *limits, *options))
        return started[-1]

    yield start
    for server in started:
        server.kill()


def get(server: ServerProcess, disk: str, file: str = "x") -> tuple[int, bytes]:
    response = server.http(f"/v1/{disk}/{file}")
    return response.status, response.body


class Traffic:
    """Asks the healthy disks in turn until it is ended, and keeps what it got."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._over = threading.Event()
        self.statuses: set[int] = set()
        self.slowest = 0.0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            for disk in HEALTHY:
                began = time.monotonic()
                status, body = get(self._server, disk)
                self.slowest = max(self.slowest, time.monotonic() - began)
                self.statuses.add(status if body == CONTENT else -status)

    def __enter__(self) -> Traffic:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def test_504_then_503_and_back_while_the_others_go_on(faultfs: FaultFS, serve: Serve) -> None:
    (faultfs.backing / "x").write_bytes(CONTENT)
    server = serve(faultfs.root)
    assert get(server, "sick", "x") == (200, CONTENT)
    for disk in HEALTHY:
        assert get(server, disk)[0] == 200
    descriptors = server.descriptors()
    with Traffic(server) as traffic:
        faultfs.hang()
        for _ in range(2):
            began = time.monotonic()
            assert get(server, "sick")[0] == 504
            assert time.monotonic() - began >= DEADLINE
        # Both slots are stuck: from now on nobody waits for the deadline.
        for _ in range(20):
            response = server.http("/v1/sick/x")
            assert response.status == 503
            assert response.headers["Retry-After"] == "1"
            assert b"missed their deadline" in response.body
        assert server.disk("sick").stuck == 2
        assert server.disk("sick").threads == 2
        assert server.http("/readyz").status == 200
        faultfs.release()
        until(lambda: server.disk("sick").in_flight == 0, "the stuck reads to end")
        assert get(server, "sick") == (200, CONTENT)
    assert traffic.statuses == {200}
    assert traffic.slowest < 5, "a healthy disk waited for the sick one"
    until(lambda: server.descriptors() <= descriptors, "all descriptors to be closed")
    assert server.stop() == 0


def test_a_busy_disk_under_load_costs_its_own_clients_only(faultfs: FaultFS, serve: Serve) -> None:
    (faultfs.backing / "x").write_bytes(CONTENT)
    server = serve(faultfs.root)
    faultfs.hang()
    with Traffic(server) as traffic, ThreadPoolExecutor(20) as clients:
        statuses = [each[0] for each in clients.map(lambda _: get(server, "sick"), range(100))]
    assert set(statuses) == {503, 504}
    assert server.disk("sick").threads == 2
    assert traffic.statuses == {200}
    faultfs.release()


def test_a_body_that_hangs_midway_is_cut_short(make_faultfs: MakeFaultFS, serve: Serve) -> None:
    faultfs = make_faultfs("--direct-io")
    (faultfs.backing / "x").write_bytes(CONTENT)
    server = serve(faultfs.root)
    faultfs.hang(range=(900_000, 900_001))
    with server.connect() as connection:
        connection.send(b"GET /v1/sick/x HTTP/1.1\r\nHost: x\r\n\r\n")
        status, headers, _ = connection.head()
        assert (status, headers["Content-Length"]) == (200, "1000000")
        body = connection.rest()
    assert len(body) < 900_001
    assert CONTENT.startswith(body)
    faultfs.release()
    until(lambda: server.disk("sick").in_flight == 0, "the stuck read to end")
    assert get(server, "sick") == (200, CONTENT)
    assert "broke off" in server.said()
    assert "Traceback" not in server.said()


def test_sigterm_during_a_hang_frees_the_port_at_once(faultfs: FaultFS, serve: Serve) -> None:
    (faultfs.backing / "x").write_bytes(CONTENT)
    server = serve(faultfs.root, "--drain-timeout", "30")
    faultfs.hang()
    assert get(server, "sick")[0] == 504
    assert server.stop() == 0  # nothing is owed to anybody, so it does not wait for the stuck thread


def test_sigterm_with_threads_in_state_d(dying: Dying, serve: Serve, tmp_path: Path) -> None:
    server = serve(dying.root)
    dying.stop()
    response = server.http("/v1/sick/f3")
    assert response.status == 504
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    (tmp_path / "second").mkdir()

    def port_is_free() -> bool:
        try:
            second = ServerProcess(tmp_path / "second", port=server.port)
        except AssertionError:
            return False
        second.kill()
        return True

    assert port_is_free()
    assert time.monotonic() - began < 10
    dying.resume()
    assert server.wait() == 0


def test_a_server_starts_with_a_dead_disk_present(faultfs: FaultFS, serve: Serve) -> None:
    (faultfs.backing / "x").write_bytes(CONTENT)
    faultfs.hang("lookup")
    faultfs.hang("getattr")
    faultfs.hang("open")
    began = time.monotonic()
    server = serve(faultfs.root)
    assert time.monotonic() - began < 20
    for disk in HEALTHY:
        assert get(server, disk) == (200, CONTENT)
    assert get(server, "sick")[0] == 503
    faultfs.release()
    until(lambda: server.disk("sick").state == "online", "its first answer")
    assert get(server, "sick") == (200, CONTENT)


def test_the_line_protocol_on_a_hung_disk(faultfs: FaultFS, serve: Serve) -> None:
    (faultfs.backing / "x").write_bytes(CONTENT)
    server = serve(faultfs.root)
    faultfs.hang()
    replies = [server.line(b"0,0,sick/x\n") for _ in range(3)]
    assert [reply[:2] for reply in replies] == [b"4,", b"4,", b"3,"]
    assert all(reply.endswith(b",sick/x\n") for reply in replies)
    assert server.line(b"0,0,h1/x\n").startswith(b"0,")
    faultfs.release()
