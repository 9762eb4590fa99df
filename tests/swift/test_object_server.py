"""Swift's object server on diskread, in process: a device hangs in each of its operations, and nobody else notices."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("swift", reason="needs OpenStack Swift: pip install swift")

import eventlet

from tests.faults.conftest import make_faultfs  # noqa: F401 - a fixture

from .in_process import Server, heartbeat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.faults.injectors import FaultFS

pytestmark = pytest.mark.timeout(60)

DEADLINE = 0.4
LATE = 5.0
"""Seconds that no answer takes which the deadline has cut short, not even on a loaded machine."""

CONTENT = bytes(range(256)) * 1200  # 300 KiB: more than the visit that opens it brings
VERBS = {"GET": 200, "HEAD": 200, "PUT": 201, "POST": 202, "DELETE": 204}
LIMITS = {
    "diskread_deadline": str(DEADLINE),
    "diskread_offline_after": "1.2",
    "diskread_probe_interval": "0.1",
    "diskread_probe_interval_max": "0.2",
}


@pytest.fixture
def sick(make_faultfs: Callable[..., FaultFS]) -> FaultFS:  # noqa: F811
    return make_faultfs()


@pytest.fixture
def server(tmp_path: Path, sick: FaultFS) -> Iterator[Server]:
    """Two devices: d1 can hang, d2 is a directory."""
    (tmp_path / "d1").symlink_to(sick.root)
    (tmp_path / "d2").mkdir()
    try:
        os.setxattr(tmp_path / "d2", "user.probe", b"x" * 1000)
    except OSError:
        pytest.skip("needs a file system with extended attributes for temporary files")
    server = Server(tmp_path, LIMITS)
    for device in ("d1", "d2"):
        assert server.ask("PUT", f"{device}/0/a/c/o", CONTENT).status == 201
    yield server
    sick.release()


def seconds_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something, while green threads go on."""
    with eventlet.Timeout(30, RuntimeError(f"waited in vain for {what}")):
        while not condition():
            eventlet.sleep(0.02)


@pytest.mark.parametrize(
    ("verb", "operation"),
    [
        *((verb, "*") for verb in VERBS),
        *(("GET", operation) for operation in ("opendir", "open", "getxattr", "read")),
        *(("PUT", operation) for operation in ("create", "write", "setxattr", "fsync", "rename")),
        ("DELETE", "unlink"),
        ("POST", "create"),
    ],
)
def test_a_hang_is_answered_at_the_deadline(server: Server, sick: FaultFS, verb: str, operation: str) -> None:
    sick.hang(operation)
    with heartbeat() as gaps:
        others = eventlet.spawn(lambda: [server.ask("GET", "d2/0/a/c/o") for _ in range(5)])
        answer = server.ask(verb, "d1/0/a/c/o", CONTENT if verb == "PUT" else b"")
        assert [each.status for each in others.wait()] == [200] * 5
    assert sick.held(), "nothing has hung"
    assert answer.status == 503
    assert DEADLINE * 0.9 <= answer.seconds < LATE
    assert max(gaps) < LATE / 2
    assert "diskread.d1.timeouts" in server.log.counted
    sick.release()
    seconds_until(lambda: server.ask("GET", "d1/0/a/c/nothing").status == 404, "the device to come back")


def test_a_device_that_stays_stuck_is_refused_at_once_and_comes_back(server: Server, sick: FaultFS) -> None:
    sick.hang("*")
    assert server.ask("GET", "d1/0/a/c/o").status == 503
    seconds_until(lambda: server.ask("GET", "d1/0/a/c/o").status == 507, "the breaker to open")
    for verb in VERBS:
        answer = server.ask(verb, "d1/0/a/c/o", CONTENT if verb == "PUT" else b"")
        assert answer.status == 507
        assert answer.seconds < DEADLINE
    assert server.ask("REPLICATE", "d1/0").status == 507
    recon = json.loads((server.directory / "object.recon").read_text())["diskread"]["d1"]
    assert recon["state"] == "offline"
    assert recon["pid"] == os.getpid()
    assert "no operation has completed" in recon["reason"]
    assert any("Device d1 is offline: no operation has completed" in line for line in server.log.told)
    assert "diskread.d1.offline" in server.log.counted
    assert "diskread.d1.rejections" in server.log.counted
    assert "diskread.d1.stuck" in server.log.counted
    assert any("stuck" in line and "objects/0/" in line for line in server.log.told), server.log.told
    sick.release()
    seconds_until(lambda: server.ask("GET", "d1/0/a/c/o").status == 200, "the device to come back")
    assert server.ask("GET", "d1/0/a/c/o").body == CONTENT
    seconds_until(lambda: "diskread.d1.online" in server.log.counted, "the news")
    seconds_until(lambda: _recon_state(server) == "online", "recon to be told")


def _recon_state(server: Server) -> str:
    state: str = json.loads((server.directory / "object.recon").read_text())["diskread"]["d1"]["state"]
    return state


def test_a_hang_in_mid_stream_ends_the_answer(server: Server, sick: FaultFS) -> None:
    """The proxy goes on with another replica then; what was sent is right."""
    sick.hang("read", path="*.data", range=(1 << 18, 1 << 30))
    reader = server.manager().get_diskfile("d1", "0", "a", "c", "o", _policy()).open().reader()
    got = []
    with pytest.raises(Exception, match="deadline") as raised:
        got.extend(iter(reader))
    assert type(raised.value).__name__ == "DeviceTimeout"
    assert CONTENT.startswith(b"".join(got))
    assert got, "what was read before has to come"
    assert not (sick.backing / "quarantined").exists()


def _policy() -> object:
    from swift.common.storage_policy import POLICIES

    return POLICIES[0]


def test_an_error_of_the_device_means_quarantine_as_ever(server: Server, sick: FaultFS) -> None:
    sick.fail("read", path="*.data")
    reader = server.manager().get_diskfile("d1", "0", "a", "c", "o", _policy()).open().reader()
    with pytest.raises(OSError, match="Input/output error"):
        list(reader)
    assert (sick.backing / "quarantined").exists()


def test_what_opened_late_is_closed(server: Server, sick: FaultFS) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for operation, verb in (("getxattr", "GET"), ("setxattr", "PUT"), ("read", "GET")):
        sick.hang(operation)
        assert server.ask(verb, "d1/0/a/c/o", b"new" if verb == "PUT" else b"").status == 503
        sick.release()
        seconds_until(lambda: server.ask("HEAD", "d1/0/a/c/o").status == 200, "the device to come back")
    seconds_until(lambda: len(os.listdir("/proc/self/fd")) <= before, "the descriptors to be closed")
