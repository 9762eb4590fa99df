"""Objects on a server in this process, made by its managers' own means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import eventlet
from swift.common.storage_policy import ECStoragePolicy, StoragePolicy, StoragePolicyCollection
from swift.common.utils import Timestamp

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .in_process import Server

POLICIES = StoragePolicyCollection(
    [
        StoragePolicy(0, "replicated", is_default=True),
        ECStoragePolicy(1, "coded", ec_type="liberasurecode_rs_vand", ec_ndata=2, ec_nparity=1),
    ]
)


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something, while green threads go on."""
    with eventlet.Timeout(30, RuntimeError(f"waited in vain for {what}")):
        while not condition():
            eventlet.sleep(0.02)


def disk_file(server: Server, name: str = "o", policy: int = 0, device: str = "d1", **more: Any) -> Any:
    return server.manager(policy).get_diskfile(device, "0", "a", "c", name, POLICIES[policy], **more)


def put(server: Server, content: bytes, name: str = "o", policy: int = 0) -> None:
    """Write an object (or a fragment archive of one) by the manager's own means."""
    more: dict[str, Any] = {"frag_index": 1} if policy else {}
    stamp = Timestamp.now()
    with disk_file(server, name, policy, **more).create(size=len(content)) as writer:
        for start in range(0, len(content), 65536):
            writer.write(content[start : start + 65536])
        size, etag = writer.chunks_finished()
        assert size == len(content)
        metadata = {
            "X-Timestamp": stamp.internal,
            "Content-Length": str(size),
            "Content-Type": "text/plain",
            "ETag": etag,
        }
        if policy:
            metadata |= {"X-Object-Sysmeta-Ec-Frag-Index": "1", "X-Object-Sysmeta-Ec-Etag": etag}
        writer.put(metadata)
        writer.commit(stamp)
    quiet(server)


def quiet(server: Server, name: str = "d1") -> None:
    """Wait until nothing is under way on a device, not even the closing of files."""
    device = server.device(name)
    if device.here():
        until(lambda: not device._to_close and not device.disk.status.load.in_flight, "the device to be quiet")


def data_file(server: Server) -> Path:
    return next((server.directory / "d1").rglob("*.data"))
