"""What the server tells of itself, above all while its disks hang."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import gevent
import msgspec
import pytest
from falcon.testing import TestClient
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from diskread import Disk, Disks, DiskTimeout, Limits
from server.app import create_app
from server.status import StatusDocument, describe, fetch, version
from tests.server.raw_client import PATIENCE, ServerProcess, until

if TYPE_CHECKING:
    from pathlib import Path

    from prometheus_client.core import Metric

    from tests.server.conftest import StartServer


def metrics(server: ServerProcess) -> dict[str, Metric]:
    """What /metrics says, as Prometheus reads it."""
    families = text_string_to_metric_families(server.http("/metrics").body.decode())  # type: ignore[no-untyped-call]
    return {family.name: family for family in families}


OF_ITSELF = ["/", "/status", "/metrics", "/healthz", "/readyz"]


def stick(disk: Disk, seconds: float) -> None:
    """Have a slot of the disk hang."""
    with pytest.raises(DiskTimeout):
        disk.stall(seconds)


@pytest.mark.parametrize("target", OF_ITSELF)
def test_get_and_head(server: ServerProcess, target: str) -> None:
    get, head = (server.http(target, method=method) for method in ("GET", "HEAD"))
    assert get.status == head.status == 200
    assert get.headers["Content-Type"] == head.headers["Content-Type"]
    assert server.http(target, method="POST").status == 405


def test_status_of_a_running_server(server: ServerProcess) -> None:
    response = server.http("/status")
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["Cache-Control"] == "no-store"
    document = msgspec.json.decode(response.body, type=StatusDocument)
    assert document.version == version()
    assert document.uptime >= 0
    assert document.simulate
    assert [disk.name for disk in document.disks] == ["d1", "lost", "simulated"]
    assert document.disks[2].root is None


def test_describes_a_disk_that_hangs(tree: Path) -> None:
    with Disk("d1", tree, Limits(threads=1, queue=5, deadline=0.1)) as disk:
        disk.read("small")
        stick(disk, 0.3)
        document = describe(disk.status)
    assert (document.name, document.root, document.state) == ("d1", str(tree), "suspect")
    assert (document.slots, document.queue, document.deadline) == (1, 5, 0.1)
    assert (document.in_flight, document.stuck, document.accepting) == (1, 1, False)
    assert (document.reads, document.bytes, document.timeouts) == (1, 1024, 1)
    assert document.oldest > 0


def test_counts_what_goes_wrong(server: ServerProcess) -> None:
    before = server.disk("d1")
    server.http("/v1/d1/missing")
    server.http("/v1/d1/small")
    after = server.disk("d1")
    assert after.errors["ENOENT"] == before.errors.get("ENOENT", 0) + 1
    assert after.bytes - before.bytes == 1024


def test_metrics_are_open_metrics(server: ServerProcess) -> None:
    server.http("/v1/d1/missing")
    response = server.http("/metrics")
    assert response.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    families = metrics(server)
    for family in families.values():
        assert family.documentation, family.name
    slots = {sample.labels["disk"]: sample.value for sample in families["diskread_slots"].samples}
    assert slots == {"d1": 8, "lost": 8, "simulated": 1024}
    assert families["diskread_read_bytes"].type == "counter"
    assert families["diskread_state"].type == "stateset"
    errors = [sample.labels for sample in families["diskread_errors"].samples]
    assert {"disk": "d1", "errno": "ENOENT"} in errors
    assert "process_open_fds" in families
    assert all(value.labels.get("disk") != "" for family in families.values() for value in family.samples)


def test_ready_as_long_as_one_disk_takes_requests(tree: Path) -> None:
    one, two = (Disk(name, tree, Limits(threads=1, deadline=0.1)) for name in ("one", "two"))
    client = TestClient(create_app(Disks([one, two])))
    assert client.simulate_get("/readyz").status_code == 200
    stick(one, 1.0)
    assert client.simulate_get("/readyz").status_code == 200
    stick(two, 1.0)
    result = client.simulate_get("/readyz")
    assert (result.status_code, result.text) == (503, "no disk takes requests\n")
    assert client.simulate_get("/healthz").text == "ok\n"
    with gevent.Timeout(PATIENCE):
        while client.simulate_get("/readyz").status_code == 503:
            gevent.sleep(0.02)


def test_answers_while_every_slot_hangs(start_server: StartServer, tree: Path) -> None:
    server = start_server("--simulate", "--disk", f"d1={tree}", "--threads", "2", "--deadline", "0.1")
    connections = [server.connect() for _ in range(2)]
    for connection in connections:
        connection.send(b"0,60000,d1/small\n")
        assert connection.rest().startswith(b"4,")
        connection.close()
    disk = server.disk("d1")
    assert (disk.stuck, disk.accepting, disk.state) == (2, False, "suspect")
    for target in OF_ITSELF:
        expected = 503 if target == "/readyz" else 200  # the disk for simulated stalls is not what users want to read
        assert server.http(target).status == expected
    stuck = metrics(server)["diskread_stuck"].samples
    assert {sample.labels["disk"]: sample.value for sample in stuck} == {"d1": 2, "simulated": 0}


def test_fetches_the_status_of_a_server(server: ServerProcess) -> None:
    document = fetch(f"{server.url}/status", PATIENCE)
    assert document is not None
    assert document.disks[0].name == "d1"


@pytest.mark.parametrize("target", ["/healthz", "/metrics", "/nowhere", "/v1/d1/small"])
def test_fetches_nothing_else(server: ServerProcess, target: str) -> None:
    assert fetch(server.url + target, PATIENCE) is None


@pytest.mark.parametrize("reply", [b"", b"SSH-2.0\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}"])
def test_fetches_nothing_from_who_is_no_server(reply: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            with listening.accept()[0] as connection:
                connection.recv(10_000)
                connection.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        assert fetch(f"http://127.0.0.1:{listening.getsockname()[1]}/status", PATIENCE) is None
        thread.join()


def test_fetches_nothing_from_who_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/status"
        assert fetch(address, 0.1) is None
    assert fetch(address, PATIENCE) is None


def test_a_stuck_slot_that_returns_is_seen(start_server: StartServer, tree: Path) -> None:
    server = start_server("--simulate", "--disk", f"d1={tree}", "--threads", "1", "--deadline", "0.1")
    server.line(b"0,600,d1\n")
    until(lambda: server.disk("d1").accepting, "the slot to come back")
    disk = server.disk("d1")
    assert (disk.state, disk.stuck, disk.in_flight, disk.oldest) == ("online", 0, 0, 0.0)
