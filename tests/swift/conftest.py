"""Fixtures: a cluster of which one device hangs, each test once with Swift as it comes and once with diskread.

With Swift as it comes each of these tests has to fail: one that passes there would show nothing. That takes most of the
time (a minute more), so only those in CONTROLS are run by default, and all with DISKREAD_SWIFT_TESTS=all in the
environment:

    sudo DISKREAD_SWIFT_TESTS=all python -m pytest tests/swift

They need Swift, and where a cluster or a device that hangs is needed, memcached, root and /dev/fuse.
"""

from __future__ import annotations

import contextlib
import os
import time
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.conftest import make_faultfs, set_up
from tests.faults.injectors import FaultFS, wait_until

from .cluster import Cluster, ObjectServer, Settings, ask, missing, missing_diskread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["make_faultfs"]

CONTROLS = {"test_healthy_devices_are_not_touched[stock]", "test_a_device_stops_answering[stock-dying-ext4]"}
"""What is run with Swift as it comes, whatever the environment says."""

DEADLINE = 0.5
"""Seconds that diskread gives an operation."""

NODE_TIMEOUT = 8.0
"""Seconds that the proxy waits for an object server: so long that what is answered earlier was not saved by it."""

LATE = 5.0
"""Seconds that no answer takes that the deadline has cut short, not even on a loaded machine."""

LIMITS = {
    "diskread_deadline": str(DEADLINE),
    "diskread_offline_after": "1.5",
    "diskread_probe_interval": "0.1",
    "diskread_probe_interval_max": "0.4",
}
"""With the breaker: tests see the device before and after it has opened."""


HANGS = pytest.mark.xfail(
    strict=True, raises=(AssertionError, OSError, HTTPException), reason="Swift as it comes hangs"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what only says again, and slowly, that Swift as it comes hangs."""
    if os.environ.get("DISKREAD_SWIFT_TESTS") == "all":
        return
    again = pytest.mark.skip(reason="that Swift as it comes hangs here too is shown with DISKREAD_SWIFT_TESTS=all")
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and callspec.params.get("diskread") is False and item.name not in CONTROLS:
            item.add_marker(again)


def skip_if(reason: str | None) -> None:
    """Skip for that reason, if there is one."""
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(
    scope="module", params=[pytest.param(False, id="stock", marks=HANGS), pytest.param(True, id="diskread")]
)
def diskread(request: pytest.FixtureRequest) -> bool:
    """Whether diskread is loaded. Without it each of these tests has to fail: else it would show nothing."""
    wanted: bool = request.param
    if wanted:
        skip_if(missing_diskread())
    return wanted


@pytest.fixture(scope="module")
def running(diskread: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, FaultFS]]:
    """A cluster for all tests of a module, with four devices on a single hub, and what d1 is."""
    skip_if(missing())
    settings = Settings(
        diskread=diskread,
        node_timeout=NODE_TIMEOUT,
        object_server=LIMITS if diskread else {},
        # The proxy is to ask the device that hangs each time: otherwise it would leave it alone for a minute.
        proxy={"error_suppression_interval": "0"},
    )
    with set_up(FaultFS) as sick, Cluster(tmp_path_factory.mktemp("cluster"), settings, {"d1": sick.root}) as cluster:
        yield cluster, sick
        # A process in uninterruptible sleep does not end.
        sick.release()


@pytest.fixture
def sick(running: tuple[Cluster, FaultFS]) -> Iterator[FaultFS]:
    """The device d1, of which every operation can hang; after the test it is well again."""
    cluster, device = running
    yield device
    device.release()

    def well() -> bool:
        return ask(cluster.object_ports["d1"], "GET", cluster.object_path("d1", "absent")).status == 404

    wait_until(well, "the device to come back", 30, lambda _: time.sleep(0.05))


@pytest.fixture
def cluster(running: tuple[Cluster, FaultFS], sick: FaultFS) -> Cluster:
    """A cluster whose device d1 can hang; the proxy asks it first."""
    return running[0]


@pytest.fixture
def make_object_server(tmp_path: Path) -> Iterator[Callable[..., ObjectServer]]:
    """Start an object server alone: make_object_server(settings, roots)."""
    skip_if(missing(memcached=False))
    with contextlib.ExitStack() as stack:

        def make(*arguments: Any) -> ObjectServer:
            return stack.enter_context(ObjectServer(tmp_path, *arguments))

        yield make


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where a server in this process has its devices, d1 and d2."""
    for name in ("d1", "d2"):
        (tmp_path / name).mkdir()
    try:
        os.setxattr(tmp_path / "d1", "user.probe", b"x" * 1000)
    except OSError:
        pytest.skip("needs a file system with extended attributes for temporary files")
    return tmp_path


@pytest.fixture
def policies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage policies for a server in this process: 0 replicated, 1 erasure-coded."""
    from swift.common import storage_policy

    from .objects import POLICIES

    monkeypatch.setattr(storage_policy, "_POLICIES", POLICIES)
