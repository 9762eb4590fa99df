"""A process without descriptors, threads or memory left: refusals while it lasts, everything as before afterwards."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from .conftest import SMALL
from .server.raw_client import ServerProcess, http_request, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from .conftest import RunScript

    StartServer = Callable[..., ServerProcess]

pytestmark = pytest.mark.usefixtures("root")

MIB = 1 << 20
SPARSE = 2 << 30
"""Bytes of a file that takes no room on the disk, and more memory than the limited processes may have."""

LIBC = ctypes.CDLL(None, use_errno=True)
PR_CAPBSET_DROP = 24  # linux/prctl.h
CAP_SYS_ADMIN, CAP_SYS_RESOURCE = 21, 24  # linux/capability.h

NOBODY = 54_321
"""A user id that nobody uses, so that all of its processes are ours: RLIMIT_NPROC counts those of a user."""


@contextlib.contextmanager
def limit_of(pid: int, kind: int, soft: int) -> Iterator[None]:
    """Lower a limit of another process for a while; what it has in use already stays."""
    before, hard = resource.prlimit(pid, kind)
    resource.prlimit(pid, kind, (soft, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, kind, (before, hard))


@pytest.fixture
def start(tmp_path: Path, root: Path) -> Iterator[StartServer]:
    """Start servers of `root` as disk d1, with simulated stalls; killed after the test."""
    servers = []

    def start_one(*options: str, **popen: Any) -> ServerProcess:
        given = ("--disk", f"d1={root}", "--simulate", *options)
        servers.append(ServerProcess(tmp_path, *given, **popen))
        return servers[-1]

    yield start_one
    for server in servers:
        server.kill()


def get_small(server: ServerProcess) -> int:
    """Ask for the small file; the status of the answer, whose content is checked when it is 200."""
    response = server.http("/v1/d1/small")
    assert response.status != 200 or response.body == SMALL
    return response.status


def stalls_at_once(server: ServerProcess, count: int) -> list[int]:
    """First fields of the replies to so many stalls of disk d1 at a time: 0 for one that was carried out."""
    with ThreadPoolExecutor(count) as pool:
        replies = list(pool.map(server.line, [b"0,1000,d1/small\n"] * count))
    return sorted(int(reply.partition(b",")[0]) for reply in replies)


REFUSED = 3  # the line protocol's word for a disk that is busy


# -- descriptors ------------------------------------------------------------------------------------------------------


def test_no_descriptor_left_for_files_nor_for_connections(start: StartServer) -> None:
    descriptors = 40

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

    server = start(preexec_fn=limit)
    assert get_small(server) == 200
    until(lambda: server.sockets() == 1, "the connections to be closed")
    before = server.descriptors()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(descriptors + 20)]
        until(lambda: server.descriptors() == descriptors, "all descriptors to be taken")
        clients[0].send(http_request("/v1/d1/small", close=False))
        refused = clients[0].response()
        assert refused.status == 503
        assert "Retry-After" in refused.headers
        assert b"descriptor" in refused.body
        # The last ones are in the backlog. They wait for the first ones to go, and no longer.
        clients[-1].send(http_request("/v1/d1/small"))
        for client in clients[:-1]:
            client.close()
        served = clients[-1].response()
        assert (served.status, served.body) == (200, SMALL)
    assert get_small(server) == 200
    until(lambda: server.descriptors() <= before, "the descriptors to be given back")
    assert server.stop() == 0


def test_no_descriptor_left_in_the_library(root: Path, run_script: RunScript) -> None:
    done = run_script(
        """
import errno, os, resource, sys
from diskread import Disk, DiskBusy

with Disk("d1", sys.argv[1]) as disk:
    first = disk.read("small")
    before = sorted(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    for _ in range(100):
        try:
            disk.read("small")
        except DiskBusy as error:
            assert error.errno == errno.EMFILE, error
        else:
            raise AssertionError("read without a descriptor")
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert disk.read("small") == first
    assert sorted(os.listdir("/proc/self/fd")) == before
    print(disk.status.load.state.value)
""",
        root,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "online\n", "")


# -- threads ----------------------------------------------------------------------------------------------------------


PROCESSES = 5
"""Threads that the user of the limited server may have, in all of his processes together."""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: to be a user who has no other processes")


def limit_threads() -> None:
    """Between fork and exec, give up what frees root of RLIMIT_NPROC, and nothing else (copy_process in kernel/fork.c).

    That is its real user, and two capabilities. Being root in effect, the process can still read Python and the tree.
    """
    for capability in (CAP_SYS_ADMIN, CAP_SYS_RESOURCE):
        if LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")
    os.setresuid(NOBODY, 0, 0)
    resource.setrlimit(resource.RLIMIT_NPROC, (PROCESSES, PROCESSES))


@needs_root
def test_no_thread_at_all_not_even_at_the_start(start: StartServer) -> None:
    others = [subprocess.Popen(["sleep", "60"], user=NOBODY) for _ in range(PROCESSES)]
    try:
        server = start(preexec_fn=limit_threads)
        for _ in range(5):
            refused = server.http("/v1/d1/small")
            assert refused.status == 503
            assert "Retry-After" in refused.headers
        assert server.http("/healthz").status == 200
        assert server.threads() == 1
    finally:
        for other in others:
            other.kill()
            other.wait()
    until(lambda: get_small(server) == 200, "a thread to be had")
    assert server.stop() == 0


@needs_root
def test_fewer_threads_than_the_disk_has_slots(start: StartServer) -> None:
    server = start("--threads", "8", preexec_fn=limit_threads)
    until(lambda: get_small(server) == 200, "a thread to be had")
    for _ in range(2):
        # Whoever gets one of the threads that can be had is served; nobody waits for one that cannot be started.
        assert stalls_at_once(server, 8) == [0] * (PROCESSES - 1) + [REFUSED] * (8 - (PROCESSES - 1))
        until(lambda: server.disk("d1").in_flight == 0, "the stalls to end")
    assert stalls_at_once(server, PROCESSES - 1) == [0] * (PROCESSES - 1)
    assert server.stop() == 0


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sparse(root: Path) -> Path:
    """A file of 2 GiB without content."""
    file = root / "sparse"
    file.touch()
    os.truncate(file, SPARSE)
    return file


def address_space(server: ServerProcess) -> int:
    return server.memory("VmSize")


def test_more_bytes_than_memory_in_the_library(root: Path, sparse: Path, run_script: RunScript) -> None:
    done = run_script(
        """
import resource, sys
import gevent
from diskread import Disk, DiskIOError

with Disk("d1", sys.argv[1]) as disk:
    first = disk.read("small")
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    for size in (2 << 30, None):
        try:
            disk.read("sparse", 0, size)
        except DiskIOError as error:
            print(error.strerror, error.errno)
    assert disk.read("small") == first
    with disk.open("sparse") as file:
        try:
            file.read()
        except DiskIOError as error:
            print(error.strerror, error.errno)
        assert file.read(1 << 20, 1 << 20) == bytes(1 << 20)
    while disk.status.load.in_flight:  # the file is being closed
        gevent.sleep(0.01)
    print(disk.status.load.state.value)
""",
        root,
    )
    assert (done.returncode, done.stderr) == (0, "")
    *refusals, end = done.stdout.splitlines()
    assert len(refusals) == 3
    assert all(each.endswith(f" {errno.ENOMEM}") for each in refusals)
    assert end == "online"


def test_more_bytes_than_memory_over_http(start: StartServer, sparse: Path) -> None:
    server = start()
    assert get_small(server) == 200
    with limit_of(server.process.pid, resource.RLIMIT_AS, address_space(server) + 256 * MIB), server.connect() as one:
        # All of it, in one range: it is streamed, so no more than two chunks are in memory at a time.
        one.send(http_request("/v1/d1/sparse", {"Range": f"bytes=0-{SPARSE - 1}"}))
        status, _, length = one.head()
        assert (status, length) == (206, SPARSE)
        assert one.reader.read(32 * MIB) == bytes(32 * MIB)
        one.reset()
        assert get_small(server) == 200
    assert server.stop() == 0


def test_no_memory_for_the_stack_of_a_thread(start: StartServer) -> None:
    server = start("--threads", "8")
    assert get_small(server) == 200
    with limit_of(server.process.pid, resource.RLIMIT_AS, address_space(server) + 4 * MIB):
        found = stalls_at_once(server, 8)  # each new thread wants a stack of some 8 MiB
        assert set(found) == {0, REFUSED}
        assert server.http("/healthz").status == 200
    until(lambda: server.disk("d1").in_flight == 0, "the stalls to end")
    assert stalls_at_once(server, 8) == [0] * 8
    assert server.stop() == 0
