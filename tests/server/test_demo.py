"""The demo: what its numbers mean, and that it shows what it promises."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from server.client import parse_address, resolve
from server.demo.load import Load, Plan, Sample, Summary, summarize
from server.demo.show import TOLERANCE, Act, suffered
from server.demo.stage import DISKS, FILES, HUNG, fill
from server.simulate import parse
from tests.server.test_client import blocked, closing, good, serving

if TYPE_CHECKING:
    from pathlib import Path

    from tests.server.test_client import Handler


def plan(**changes: float) -> Plan:
    times = {"begin": 0.0, "hang_begin": 1.0, "hang_end": 2.0, "end": 3.0, "rate": 50.0, "limit": 5.0, **changes}
    return Plan(disks=("a", "b"), hung="b", files=("file",), **times)


def test_sums_up_whatever_the_outcome() -> None:
    samples = [Sample(0.0, each / 1000, "answered") for each in range(1, 100)] + [Sample(0.0, 10.0, "missed")]
    summary = summarize(samples)
    assert summary.outcomes == {"answered": 99, "missed": 1}
    assert (summary.requests, summary.answered) == (100, 99)
    assert summary.p50 == pytest.approx(0.05, rel=0.01)
    assert summary.p99 == pytest.approx(0.099, rel=0.01)
    assert summary.worst == 10.0
    assert summarize([]) == Summary()


def test_the_hang_has_a_beginning_and_an_end() -> None:
    assert [plan().hanging(at) for at in (0.99, 1.0, 1.99, 2.0)] == [False, True, True, False]


def act(before: Summary, during: Summary) -> Act:
    return Act(before, during, before, Summary(), Summary())


@pytest.mark.parametrize(
    ("answered", "p99", "verdict"),
    [(100, 0.02, False), (100, 0.02 + TOLERANCE, False), (100, 0.05 + TOLERANCE, True), (99, 0.02, True)],
)
def test_healthy_disks_suffer_when_requests_fail_or_are_slow(answered: int, p99: float, verdict: bool) -> None:
    before = Summary(100, {"answered": 100}, 0.01, 0.02, 0.03)
    assert suffered(act(before, Summary(100, {"answered": answered}, 0.01, p99, 0.5))) is verdict


@pytest.mark.parametrize(("handler", "outcome"), [(good, "answered"), (closing, "failed")])
def test_sends_what_is_due_and_keeps_what_came_of_it(handler: Handler, outcome: str) -> None:
    now = time.monotonic()
    times = {"begin": now, "hang_begin": now + 0.2, "hang_end": now + 0.4, "end": now + 0.6}
    with serving(handler) as address:
        load = Load(resolve(*parse_address(address)), plan(**times))
        load.run()
    for disk in ("a", "b"):
        assert len(load.samples[disk]) == 30
        assert {sample.outcome for sample in load.samples[disk]} == {outcome}
    if outcome == "answered":
        hung = [each for each in load.samples["b"] if plan(**times).hanging(each.scheduled)]
        # Each of them had to wait for the end of the hang.
        assert all(each.scheduled + each.latency >= now + 0.39 for each in hung)
    assert load.during(["a", "b"], now, now + 0.3).requests == 30
    assert load.recent("a", 60.0).requests == 30


def test_a_server_that_blocks_suffers() -> None:
    # The verdict has to be able to go the other way: `blocked` stops this whole process, as a bad server would.
    now = time.monotonic()
    times = {"begin": now, "hang_begin": now + 0.2, "hang_end": now + 0.8, "end": now + 0.9, "rate": 10.0}
    with serving(blocked) as address:
        load = Load(resolve(*parse_address(address)), plan(**times))
        load.run()
    before = load.during(["a"], now, now + 0.2)
    assert suffered(act(before, load.during(["a"], now + 0.2, now + 0.8)))


def test_fills_its_disks(tmp_path: Path) -> None:
    fill(tmp_path)
    assert HUNG in DISKS
    for disk in DISKS:
        assert {file.name for file in (tmp_path / disk).iterdir()} == set(FILES)
        parse(f"0,0,{disk}/{FILES[0]}".encode())


def demo(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", "demo", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_shows_that_the_healthy_disks_do_not_notice() -> None:
    done = demo("--hang", "1", "--no-comparison", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["suffered"] is False
    assert result["gil_held"] is None
    assert (result["hang"], result["rate"]) == (1, 50)
    healthy = result["diskread"]["during"]
    assert healthy["requests"] == pytest.approx(3 * 50 * 1, abs=6)
    assert healthy["outcomes"] == {"answered": healthy["requests"]}
    assert 0 < healthy["p50"] <= healthy["p99"] <= healthy["worst"] * 1.001
    hung = result["diskread"]["hung_during"]
    assert hung["requests"] == pytest.approx(50, abs=3)
    assert hung["outcomes"].get("refused", 0) + hung["outcomes"].get("missed", 0) > 0
    assert hung["outcomes"].get("failed", 0) == 0
    assert "did not notice" in done.stderr


def test_says_when_it_cannot_run() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = demo("--port", str(taken.getsockname()[1]))
    assert done.returncode == 2
    assert "cannot listen" in done.stderr
    assert "Traceback" not in done.stderr
