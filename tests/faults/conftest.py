"""Fixtures: disks that really hang. They skip where the machine cannot make one, but not where CI can."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from diskread import Disk, Limits
from tests.conftest import until

from .injectors import Dying, FaultFS, SetupError, Throttled
from .witnesses import Beside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

InjectorT = TypeVar("InjectorT", bound=FaultFS | Throttled | Dying)


def set_up(injector: type[InjectorT], *arguments: Any, **options: Any) -> InjectorT:
    """Make the disk, or skip the test with the reason why not."""
    try:
        return injector(*arguments, **options)
    except SetupError as error:
        if os.environ.get("CI") == "true" and injector.machine_lacks() is None:
            raise
        pytest.skip(f"{injector.__name__}: {error}")


@pytest.fixture
def make_faultfs() -> Iterator[Callable[..., FaultFS]]:
    """Make as many FaultFS as a test needs, with options of faultfs.py: make_faultfs("--direct-io")."""
    with contextlib.ExitStack() as stack:
        yield lambda *options: stack.enter_context(set_up(FaultFS, *options))


@pytest.fixture
def faultfs(make_faultfs: Callable[..., FaultFS]) -> FaultFS:
    """A FUSE file system of which every operation can hang."""
    return make_faultfs()


@pytest.fixture
def throttled() -> Iterator[Throttled]:
    """An ext4 with files f0 to f7 that is slow or stuck for the threads that enter its throttle."""
    with set_up(Throttled) as disk:
        yield disk


@pytest.fixture
def dying() -> Iterator[Dying]:
    """An ext4 with files f0 to f7 on a block device that can stop answering."""
    with set_up(Dying) as disk:
        yield disk


@pytest.fixture
def make_sick(nothing_left_behind: None) -> Iterator[Callable[..., Disk]]:
    """Make a disk on a directory that can hang, with limits that let a test be quick."""
    disks: list[Disk] = []

    def make(root: Path, **limits: Any) -> Disk:
        chosen = {
            "threads": 4,
            "queue": 4,
            "deadline": 0.3,
            "idle": 0.2,
            "offline_after": 0.5,
            "idle_probe": 0.8,
            "probe_interval": 0.1,
            "probe_interval_max": 0.4,
            **limits,
        }
        disks.append(Disk("sick", root, Limits(**chosen)))
        return disks[-1]

    yield make
    for disk in disks:
        disk.close()
        until(lambda disk=disk: not disk.status.load.in_flight, "the slots of the sick disk")  # type: ignore[misc]


@pytest.fixture
def beside(tmp_path: Path, nothing_left_behind: None) -> Iterator[Beside]:
    """A healthy disk in use beside the sick one; the test fails if it noticed anything."""
    (tmp_path / "file").write_bytes(b"well" * 1000)
    with Disk("healthy", tmp_path, Limits(deadline=30, idle=0.2)) as disk:
        witness = Beside(disk, "file", b"well" * 1000)
        yield witness
        witness.noticed_nothing()
