"""fork(2): a child has slots of its own, whatever its parent's are doing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from .conftest import LARGE, RunScript

if TYPE_CHECKING:
    from pathlib import Path

FORK = """
import os, sys, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: that is the point
import gevent, gevent.os
from diskread import Disk, DiskBusy, Limits

root, how = sys.argv[1:]
fork = {"os": os.fork, "gevent": gevent.os.fork}[how]

def open_files():
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return [os.readlink(link) for link in links if os.path.lexists(link)]

def in_child():
    load = disk.status.load
    assert (load.in_flight, load.threads, load.waiting) == (0, 0, 0), load
    with gevent.Timeout(20):
        assert len(disk.read("large")) == expected
        assert len(file.read(300000, 10)) == 10
        child_only = [gevent.spawn(disk.read, "small") for _ in range(50)]
        gevent.joinall(child_only, raise_error=True)
        assert disk.status.counts.reads == before + 53, disk.status.counts
        file.close()
        while any(name.endswith("/large") for name in open_files()):
            gevent.sleep(0.01)
        disk.close()
        while disk.status.load.threads:
            gevent.sleep(0.01)

expected = os.path.getsize(root + "/large")
disk = Disk("d1", root, Limits(threads=1, queue=100, deadline=30, inline="off"))
assert len(disk.read("large")) == expected
file = disk.open("large")
stuck = gevent.spawn(disk.stall, 1.5)
while not disk.status.load.in_flight:
    gevent.sleep(0.001)
before = disk.status.counts.reads
pid = fork()
if pid == 0:
    status = 1
    try:
        in_child()
        status = 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)
assert disk.status.load.in_flight == 1
if how == "os":
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            break
        gevent.sleep(0.01)
else:
    status = gevent.os.waitpid(pid, 0)[1]
assert status == 0, status
assert disk.status.counts.reads == before, "what the child read is not the parent's"
stuck.join()
assert disk.status.counts.reads == before + 1
assert len(disk.read("large")) == expected
file.close()
disk.close()
print("ok")
"""


@pytest.mark.parametrize("how", ["os", "gevent"])
def test_a_child_reads_while_its_parents_slots_are_stuck(run_script: RunScript, root: Path, how: str) -> None:
    result = run_script(FORK, root, how, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "ok\n", "")


USED_FIRST_IN_THE_CHILD = """
import os, sys
import gevent
from diskread import Disk

disk = Disk("d1", sys.argv[1])
children = []
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        ok = len(disk.read("large")) == int(sys.argv[2])
        os._exit(0 if ok else 1)
    children.append(pid)
print([os.waitpid(pid, 0)[1] for pid in children])
"""


def test_disks_made_before_the_fork_and_used_after_it(run_script: RunScript, root: Path) -> None:
    result = run_script(USED_FIRST_IN_THE_CHILD, root, len(LARGE), timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "[0, 0, 0]\n", "")
