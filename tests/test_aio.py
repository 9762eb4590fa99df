"""Disks of an asyncio loop: the same calls as coroutines. What they promise is in test_hubs.py."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest

from diskread import DiskFileNotFound, DiskTimeout, FileStat, Limits
from diskread._syscalls import stall
from diskread.aio import Disk

if TYPE_CHECKING:
    from pathlib import Path

CONTENT = os.urandom(700_001)
LIMITS = Limits(threads=2, queue=5, deadline=20, idle=0.2)


def test_every_method(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT)

    async def main() -> None:
        async with Disk("d1", tmp_path, LIMITS) as disk:
            assert (disk.name, disk.root, disk.limits) == ("d1", str(tmp_path), LIMITS)
            assert await disk.read("a", 3, 5) == CONTENT[3:8]
            found = await disk.stat("a")
            assert isinstance(found, FileStat)
            assert await disk.run(os.listdir, tmp_path) == ["a"]
            assert (await disk.stall(0.001)).disk >= 0.001
            async with await disk.open("a") as file:
                assert file.stat == found
                assert await file.read(5) == CONTENT[5:]
                assert b"".join([chunk async for chunk in file.chunks(1, 600_000)]) == CONTENT[1:600_000]
            with pytest.raises(ValueError, match="closed"):
                await file.read()
            with pytest.raises(DiskFileNotFound):
                await disk.read("b")
            assert disk.status.counts.reads >= 4

    asyncio.run(main())


def test_a_deadline_and_a_cancellation_leave_the_loop_alone() -> None:
    async def main() -> None:
        async with Disk("d1", None, LIMITS) as disk:
            ticks = 0

            async def tick() -> None:
                nonlocal ticks
                while True:
                    await asyncio.sleep(0.01)
                    ticks += 1

            ticking = asyncio.create_task(tick())
            with pytest.raises(DiskTimeout):
                await disk.run(stall, 0.6, deadline=0.3)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(disk.run(stall, 0.6), 0.1)
            assert ticks >= 5
            ticking.cancel()
            assert (disk.status.counts.timeouts, disk.status.counts.abandoned) == (1, 1)
            while disk.status.load.in_flight:
                await asyncio.sleep(0.01)

    asyncio.run(main())


def test_a_disk_belongs_to_one_loop() -> None:
    disk = Disk("d1", None, LIMITS)

    async def ask() -> int:
        return await disk.run(abs, -1)

    assert asyncio.run(ask()) == 1
    with pytest.raises(RuntimeError, match="belongs to"):
        asyncio.run(ask())
