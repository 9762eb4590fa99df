"""What systemd is told, by a socket that stands in for it."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from typing import TYPE_CHECKING

import gevent
import pytest

from server.service_manager import ServiceManager
from tests.conftest import until
from tests.server.raw_client import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.server.conftest import StartServer


class Systemd:
    """Receives what a service says."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)

    def next(self) -> bytes:
        """Wait for the next message, without gevent."""
        self.socket.settimeout(PATIENCE)
        return self.socket.recv(4096)

    def all(self) -> list[bytes]:
        """What has come and was not asked for yet."""
        self.socket.setblocking(False)
        found = []
        while True:
            try:
                found.append(self.socket.recv(4096))
            except BlockingIOError:
                return found


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Systemd]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@diskread-test-{os.getpid()}"
    found = Systemd(address)
    yield found
    found.socket.close()


def test_a_server_says_when_it_is_ready_that_it_lives_and_that_it_stops(
    systemd: Systemd, start_server: StartServer
) -> None:
    environment = {**os.environ, "NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "200000"}
    environment.pop("WATCHDOG_PID", None)
    server = start_server("--simulate", env=environment)
    assert systemd.next() == b"READY=1"
    with server.connect():
        pass
    assert [systemd.next() for _ in range(3)] == [b"WATCHDOG=1"] * 3
    with server.connect() as connection:
        connection.send(b"0,1000,some_file\n")
        until(lambda: server.disk("simulated").in_flight, "the request to begin")
        server.process.send_signal(signal.SIGTERM)
        while (said := systemd.next()) == b"WATCHDOG=1":
            pass
        assert said == b"STOPPING=1"
        assert systemd.next() == b"WATCHDOG=1", "while it drains, too"
    assert server.wait() == 0


def test_a_hub_that_stands_still_is_not_heard_of(systemd: Systemd) -> None:
    manager = ServiceManager({"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "20000"})
    manager.ready()
    until(systemd.all, "the watchdog")
    systemd.all()
    time.sleep(0.2)  # the whole native thread, as a blocking system call would
    assert systemd.all() == []
    until(systemd.all, "the watchdog, now that the hub turns again")
    manager.close()
    gevent.sleep(0.05)
    systemd.all()
    gevent.sleep(0.05)
    assert systemd.all() == []


def test_the_abort_of_the_watchdog_leaves_where_the_hub_stood(start_server: StartServer) -> None:
    server = start_server("--simulate", env={**os.environ, "WATCHDOG_USEC": "60000000"})
    server.process.send_signal(signal.SIGABRT)
    assert server.wait() == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in server.said()
    assert re.search(r'File ".*/(gevent|server)/.*", line \d+ in ', server.said())  # the hub, or what it just ran


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, 0),
        ({"WATCHDOG_USEC": "3000000"}, 3),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, 0),
        ({"WATCHDOG_USEC": "soon"}, 0),
    ],
)
def test_whose_watchdog_it_is(environment: dict[str, str], seconds: float) -> None:
    assert ServiceManager(environment).watchdog == seconds


def test_a_manager_that_has_gone_is_no_error(tmp_path: Path) -> None:
    for environment in ({}, {"NOTIFY_SOCKET": str(tmp_path / "none"), "WATCHDOG_USEC": "1000"}):
        manager = ServiceManager(environment)
        manager.ready()
        gevent.sleep(0.01)
        manager.stopping()
        manager.close()
