"""Fixtures: clusters of which one device hangs, each test once with Swift as it comes and once with diskread."""

from __future__ import annotations

import contextlib
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.conftest import make_faultfs, set_up

from .cluster import Cluster, ObjectServer, Settings, missing, missing_diskread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.faults.injectors import FaultFS

__all__ = ["make_faultfs", "set_up"]

DEADLINE = 1.0
"""Seconds that diskread gives an operation."""

NODE_TIMEOUT = 8.0
"""Seconds that the proxy waits for an object server: so long that what is answered earlier was not saved by it."""

LATE = 5.0
"""Seconds that no answer takes that the deadline has cut short, not even on a loaded machine."""


@pytest.fixture(
    params=[
        pytest.param(
            False,
            id="stock",
            marks=pytest.mark.xfail(
                strict=True, raises=(AssertionError, OSError, HTTPException), reason="Swift as it comes hangs"
            ),
        ),
        pytest.param(True, id="diskread"),
    ]
)
def diskread(request: pytest.FixtureRequest) -> bool:
    """Whether diskread is loaded. Without it each of these tests has to fail: else it would show nothing."""
    wanted: bool = request.param
    if wanted and (reason := missing_diskread()) is not None:
        pytest.skip(reason)
    return wanted


@pytest.fixture
def settings(diskread: bool) -> Settings:
    """One object server with one worker: four devices on a single hub."""
    return Settings(
        diskread=diskread,
        node_timeout=NODE_TIMEOUT,
        object_server={"diskread_deadline": str(DEADLINE)} if diskread else {},
    )


def skip_if(reason: str | None) -> None:
    """Skip for that reason, if there is one."""
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def sick(make_faultfs: Callable[..., FaultFS]) -> FaultFS:
    """The device d1, of which every operation can hang."""
    skip_if(missing())
    return make_faultfs()


@pytest.fixture
def cluster(tmp_path: Path, sick: FaultFS, settings: Settings) -> Iterator[Cluster]:
    """A cluster whose device d1 can hang; the proxy asks it first."""
    with contextlib.ExitStack() as stack:
        stack.callback(sick.release)
        running = stack.enter_context(Cluster(tmp_path, settings, {"d1": sick.root}))
        # First of all: a process in uninterruptible sleep does not end.
        stack.callback(sick.release)
        yield running


@pytest.fixture
def make_object_server(tmp_path: Path) -> Iterator[Callable[..., ObjectServer]]:
    """Start an object server alone: make_object_server(settings, roots)."""
    skip_if(missing(memcached=False))
    with contextlib.ExitStack() as stack:

        def make(*arguments: Any) -> ObjectServer:
            return stack.enter_context(ObjectServer(tmp_path, *arguments))

        yield make
