"""The end of a process: it does not wait for what is stuck."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from .conftest import RunScript

STUCK = """
import sys
import gevent
from diskread import Disk, DiskTimeout, Limits

disk = Disk("d1", sys.argv[1], Limits(threads=3))
file = disk.open("large")
abandoned = gevent.spawn(disk.stall, 600)
try:
    disk.stall(600, "large", deadline=0.05)
except DiskTimeout:
    pass
waiting = gevent.spawn(disk.run, __import__("time").sleep, 600)
gevent.sleep(0.05)
assert disk.status.load.in_flight == 3
print("stuck", flush=True)
"""

ENDINGS = {
    "end": ("", 0),
    "sys.exit": ("sys.exit()", 0),
    "sys.exit with a code": ("sys.exit(5)", 5),
    "exception": ("raise LookupError('unhandled')", 1),
    "closed": ("file.close(); disk.close()", 0),
    "greenlet": ("gevent.spawn(gevent.sleep, 0.05).join()", 0),
    "killed": ("abandoned.kill(); waiting.kill(); disk.close()", 0),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_process_ends_although_threads_are_stuck(run_script: RunScript, root: Path, ending: str) -> None:
    last_line, code = ENDINGS[ending]
    started = time.monotonic()
    result = run_script(STUCK + last_line, root, timeout=60)
    assert time.monotonic() - started < 30
    assert (result.returncode, result.stdout) == (code, "stuck\n")
    if code == 1:
        assert result.stderr.startswith("Traceback")
        assert result.stderr.strip().endswith("LookupError: unhandled")
    else:
        assert result.stderr == ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -15), (signal.SIGINT, -2)])
def test_a_signal_ends_a_process_although_threads_are_stuck(
    tmp_path: Path, root: Path, number: signal.Signals, code: int
) -> None:
    script = tmp_path / "script.py"
    # Short sleeps: a signal that comes just before the hub's epoll_wait(2) does not wake it, whoever uses gevent (which
    # is why the server takes its signals through the event loop).
    script.write_text(STUCK + "while True: gevent.sleep(0.1)")
    with subprocess.Popen([sys.executable, str(script), str(root)], stdout=subprocess.PIPE, stderr=-3) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"stuck\n"
        process.send_signal(number)
        assert process.wait(30) == code
