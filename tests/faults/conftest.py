"""Fixtures: disks that really hang. They skip where the machine cannot make one, but not where CI can."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from .injectors import Dying, FaultFS, SetupError, Throttled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

InjectorT = TypeVar("InjectorT", FaultFS, Throttled, Dying)


def set_up(injector: type[InjectorT], *arguments: Any) -> InjectorT:
    """Make the disk, or skip the test with the reason why not."""
    try:
        return injector(*arguments)
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
