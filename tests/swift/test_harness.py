"""The harness: servers start, stop for good, and say so when they cannot."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from tests.faults.injectors import wait_until

from .cluster import ERASURE_CODED, REPLICATED, Cluster, ObjectServer, Settings, missing
from .conftest import skip_if
from .processes import Ports, Server, StartError, StillRunningError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.faults.injectors import FaultFS


def test_an_object_server_alone(make_object_server: Callable[..., ObjectServer]) -> None:
    server = make_object_server(Settings(devices=2, workers=2))
    assert server.request("PUT", "d2", "o", b"hello").status == 201
    assert server.request("GET", "d2", "o").body == b"hello"
    assert server.request("GET", "d1", "o").status == 404
    assert len(server.object_server.pids()) == 3
    assert server.object_server.memory() > 10 << 20


@pytest.mark.parametrize("settings", [Settings(), Settings(servers_per_port=1, concurrent_gets=True)])
def test_a_cluster_puts_three_copies_where_it_says(tmp_path: Path, settings: Settings) -> None:
    skip_if(missing())
    with Cluster(tmp_path, settings) as cluster:
        for policy, directory in ((REPLICATED, "objects"), (ERASURE_CODED, "objects-1")):
            name = cluster.names_on("d1", 1, policy)[0]
            assert cluster.request("PUT", cluster.path(name, policy), b"x" * 100_000).status == 201
            assert cluster.request("GET", cluster.path(name, policy)).body == b"x" * 100_000
            holders = {each for each in settings.names() if [*(cluster.device(each) / directory).rglob("*.data")]}
            assert holders == set(cluster.devices_of(name, policy))
            assert len(holders) == 3
        assert len(cluster.object_server.pids()) == 1 + (settings.servers_per_port * 4 or settings.workers)
        servers = list(cluster.servers.values())
    assert [server.pids() for server in servers] == [[]] * 5


def test_nothing_is_left_after_an_exception(tmp_path: Path) -> None:
    skip_if(missing(memcached=False))
    with pytest.raises(ZeroDivisionError), ObjectServer(tmp_path, Settings(workers=3)) as running:  # noqa: PT012
        server = running.object_server
        assert len(server.pids()) == 4
        raise ZeroDivisionError
    assert server.pids() == []


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    skip_if(missing(memcached=False))
    running = ObjectServer(tmp_path, Settings(policy={"diskfile_module": "egg:swift#nothing.fs"}))
    with pytest.raises(StartError, match=r"nothing\.fs"):
        running.__enter__()
    assert running.object_server.pids() == []


def test_a_server_that_is_stuck_is_reported(
    make_faultfs: Callable[..., FaultFS], make_object_server: Callable[..., ObjectServer]
) -> None:
    """Beyond the reach of SIGKILL: its worker waits in the kernel, and would hold the port."""
    sick = make_faultfs()
    server = make_object_server(Settings(devices=1), {"d1": sick.root})
    assert server.request("PUT", "d1", "o", b"hello").status == 201
    sick.hang("*")

    def get() -> None:
        with pytest.raises(OSError):  # noqa: PT011 - of whatever kind: the server has ended
            server.request("GET", "d1", "o")

    client = threading.Thread(target=get)
    client.start()
    sick.wait_held(1)
    with pytest.raises(StillRunningError, match=r"not even by SIGKILL: [0-9]+ "):
        server.object_server.stop(0.2, 0.5)
    sick.release()
    client.join()
    server.object_server.stop()
    assert server.object_server.pids() == []


def test_a_killed_test_run_leaves_no_server_behind(tmp_path: Path) -> None:
    skip_if(missing(memcached=False))
    program = f"""
import pathlib, signal
from tests.swift.cluster import ObjectServer, Settings
with ObjectServer(pathlib.Path({str(tmp_path)!r}), Settings(workers=2)) as server:
    print(*server.object_server.pids(), flush=True)
    signal.pause()
"""
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    with run:
        assert run.stdout is not None
        pids = [int(each) for each in run.stdout.readline().split()]
        assert len(pids) == 3
        run.send_signal(signal.SIGKILL)

    def gone(pid: int) -> bool:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                return stat.read().rpartition(") ")[2][0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    wait_until(lambda: all(map(gone, pids)), "the servers to go")


def test_a_port_is_open_to_swift_and_closed_to_others() -> None:
    ports = Ports()
    port = ports.take()
    try:
        with socket.socket() as swift, socket.socket() as other:
            swift.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            swift.bind(("127.0.0.1", port))
            swift.listen()
            with pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", port))
            with socket.create_connection(("127.0.0.1", port)):
                swift.accept()[0].close()
    finally:
        ports.close()


def test_children_that_outlive_their_parent_are_waited_for(tmp_path: Path) -> None:
    """Swift's parent ends at once; a worker may take its time."""
    program = """
import os, signal, time
if os.fork():
    time.sleep(60)
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), print("ended", flush=True), os._exit(0)))
print("ready", flush=True)
time.sleep(60)
"""
    server = Server("slow", [sys.executable, "-c", program], tmp_path / "log", {})
    wait_until(lambda: server.log_tail() == "ready", "the child")
    assert len(server.pids()) == 2
    server.stop()
    assert server.pids() == []
    assert server.log_tail() == "ready\nended"
