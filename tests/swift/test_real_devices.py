"""An object server with one worker, one of its devices a real file system on a block device that stops answering.

The device is mounted anew, so that nothing of it is in the page cache: who asks for anything on it waits in the kernel,
uninterruptibly. Needs root; what a machine cannot make is skipped with the reason.
"""

from __future__ import annotations

import contextlib
import os
import random
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.faults.conftest import set_up
from tests.faults.injectors import Dying, Throttled, thread_state, wait_until

from .cluster import ObjectServer, Settings, missing, missing_diskread
from .conftest import HANGS, LATE, LIMITS, skip_if

if TYPE_CHECKING:
    from pathlib import Path

    from tests.faults.injectors import Kind

    from .processes import Server

pytestmark = pytest.mark.timeout(180)

CLIENT_SECONDS = LATE + 1
MAX_STALL = 40.0
SIZE = 300_000
HUNG = [f"hung{number}" for number in range(4)]
OTHERS = [f"other{number}" for number in range(20)]


def content(name: str) -> bytes:
    return random.Random(name).randbytes(SIZE)


def stall(disk: Dying | Throttled, server: Server) -> None:
    """Let the device answer nothing any more."""
    if isinstance(disk, Dying):
        disk.hang_all()
        return
    for pid in server.pids():
        disk.enter_process(pid)
    disk.stall()


def lift(disk: Dying | Throttled) -> None:
    if isinstance(disk, Dying):
        disk.release()
    else:
        disk.lift()


def stuck(server: Server) -> int:
    """How many threads of a server wait for a device."""
    threads = [thread for pid in server.pids() for thread in os.listdir(f"/proc/{pid}/task")]
    return sum(thread_state(int(thread)) == "D" for thread in threads)


@pytest.mark.parametrize(
    ("diskread", "injector", "kind"),
    [
        pytest.param(False, Dying, "ext4", id="stock-dying-ext4", marks=HANGS),
        pytest.param(True, Dying, "ext4", id="diskread-dying-ext4"),
        pytest.param(True, Dying, "xfs", id="diskread-dying-xfs"),
        pytest.param(True, Throttled, "ext4", id="diskread-throttled-ext4"),
        pytest.param(True, Throttled, "xfs", id="diskread-throttled-xfs"),
    ],
)
def test_a_device_stops_answering(
    tmp_path: Path, diskread: bool, injector: type[Dying | Throttled], kind: Kind
) -> None:
    skip_if(missing(memcached=False) or (missing_diskread() if diskread else None))
    settings = Settings(diskread=diskread, devices=2, object_server=LIMITS if diskread else {})
    with contextlib.ExitStack() as stack:
        disk = set_up(injector, empty=kind, max_stall=MAX_STALL)
        stack.callback(disk.close)
        roots = {"d1": disk.root, "d2": tmp_path / "d2"}
        for name in ("d2", "first", "second"):
            (tmp_path / name).mkdir()
        with ObjectServer(tmp_path / "first", Settings(devices=2), roots) as server:
            for device, names in (("d1", HUNG), ("d2", OTHERS)):
                for name in names:
                    if (answer := server.request("PUT", device, name, content(name))).status != 201:
                        raise RuntimeError(f"PUT {name}: {answer}")
        disk.remount()
        server = stack.enter_context(ObjectServer(tmp_path / "second", settings, roots))
        stack.callback(lift, disk)  # first of all: who waits for the device cannot be killed
        pool = stack.enter_context(ThreadPoolExecutor(len(HUNG) + 1))
        stack.callback(lift, disk)  # and no client waits until it is given up

        def get(device: str, name: str) -> tuple[int, bool, bool]:
            """Status, whether it was the right content, whether it was in time."""
            answer = server.request("GET", device, name, timeout=CLIENT_SECONDS)
            return answer.status, answer.body == content(name), answer.seconds < LATE

        def put(device: str, name: str) -> tuple[int, bool]:
            answer = server.request("PUT", device, name, content(name), timeout=CLIENT_SECONDS)
            return answer.status, answer.seconds < LATE

        stall(disk, server.object_server)
        hung = [pool.submit(get, "d1", name) for name in HUNG]
        hung_put = pool.submit(put, "d1", "new")
        wait_until(lambda: stuck(server.object_server), "a thread to wait for the device")
        for name in OTHERS:
            assert get("d2", name) == (200, True, True)
            assert put("d2", f"{name}-again") == (201, True)
        assert {each.result() for each in hung} <= {(503, False, True), (507, False, True)}
        assert hung_put.result() in ((503, True), (507, True))
        assert stuck(server.object_server), "the device has not hung all the time"
        wait_until(lambda: get("d1", HUNG[0])[0] == 507, "the breaker to open", 30)
        assert get("d2", OTHERS[0]) == (200, True, True)

        lift(disk)
        wait_until(lambda: get("d1", HUNG[0]) == (200, True, True), "the device to come back", 30)
        assert [get("d1", name) for name in HUNG] == [(200, True, True)] * len(HUNG)
        assert put("d1", "new") == (201, True)
