"""The log of slow and stuck reads: what it says, and how much at most."""

from __future__ import annotations

import logging
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diskread.slow_log import BURST, PERIOD, SlowLog


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, "diskread")
    return caplog


def test_what_is_fast_is_not_logged(lines: pytest.LogCaptureFixture) -> None:
    log = SlowLog("d1", 1.0)
    log.finished(b"file", 4096, queue=100.0, disk=0.999, stuck=False, now=0.0)
    assert lines.messages == [], "time in the queue is not the disk's"


def test_what_is_slow_is_logged_with_both_times(lines: pytest.LogCaptureFixture) -> None:
    SlowLog("d1", 1.0).finished(b"some/file", 4096, queue=0.25, disk=1.0, stuck=False, now=0.0)
    assert lines.messages == ["d1/some/file slow: 4096 bytes, 0.250 s in the queue, 1.000 s at the disk"]
    assert [(record.name, record.levelname) for record in lines.records] == [("diskread", "WARNING")]


def test_what_is_stuck_is_logged_when_it_becomes_stuck_and_again_when_it_ends(lines: pytest.LogCaptureFixture) -> None:
    log = SlowLog("d1", 1.0)
    log.stuck(b"file", 4096, queue=0.5, disk=9.5, now=0.0)
    log.finished(b"file", 4096, queue=0.5, disk=60.0, stuck=True, now=50.0)
    assert lines.messages == [
        "d1/file stuck: 4096 bytes asked for, 0.500 s in the queue, 9.500 s at the disk so far",
        "d1/file was stuck and is back: 4096 bytes after 60.000 s at the disk",
    ]


def test_what_is_no_read_has_no_bytes(lines: pytest.LogCaptureFixture) -> None:
    log = SlowLog("d1", 1.0)
    log.finished(b"file", 0, queue=0.25, disk=1.0, stuck=False, now=0.0)
    log.stuck(b"file", 0, queue=0.5, disk=9.5, now=0.0)
    log.finished(b"file", 0, queue=0.5, disk=60.0, stuck=True, now=50.0)
    assert lines.messages == [
        "d1/file slow: 0.250 s in the queue, 1.000 s at the disk",
        "d1/file stuck: 0.500 s in the queue, 9.500 s at the disk so far",
        "d1/file was stuck and is back after 60.000 s at the disk",
    ]


def test_what_was_stuck_is_logged_at_its_end_even_when_it_was_not_slow(lines: pytest.LogCaptureFixture) -> None:
    SlowLog("d1", math.inf).finished(b"file", 4096, queue=0.0, disk=0.1, stuck=True, now=0.0)
    assert len(lines.messages) == 1


def test_slow_may_be_switched_off(lines: pytest.LogCaptureFixture) -> None:
    SlowLog("d1", math.inf).finished(b"file", 4096, queue=0.0, disk=1e9, stuck=False, now=0.0)
    assert lines.messages == []


def test_operations_without_a_path_name_the_disk(lines: pytest.LogCaptureFixture) -> None:
    SlowLog("d1", 1.0).finished(None, 4096, queue=0.0, disk=2.0, stuck=False, now=0.0)
    assert lines.messages == ["d1 slow: 4096 bytes, 0.000 s in the queue, 2.000 s at the disk"]


def test_no_path_can_forge_a_line(lines: pytest.LogCaptureFixture) -> None:
    SlowLog("d1", 1.0).finished(b"a\nd2/b slow\x1b[31m\xff", 4096, queue=0.0, disk=2.0, stuck=False, now=0.0)
    (message,) = lines.messages
    assert message.isprintable()


def test_a_flood_is_cut_off_and_the_next_line_says_how_much_was_left_out(lines: pytest.LogCaptureFixture) -> None:
    log = SlowLog("d1", 1.0)
    for _ in range(BURST + 7):
        log.stuck(b"file", 4096, queue=0.0, disk=10.0, now=100.0)
    assert len(lines.messages) == BURST
    log.stuck(b"file", 4096, queue=0.0, disk=10.0, now=100.0 + PERIOD)
    assert len(lines.messages) == BURST + 1
    assert lines.messages[-1].endswith(" (7 lines like this one were left out)")
    log.stuck(b"file", 4096, queue=0.0, disk=10.0, now=100.0 + PERIOD)
    assert "left out" not in lines.messages[-1], "they are named once"


def test_each_disk_has_a_flood_of_its_own(lines: pytest.LogCaptureFixture) -> None:
    first, second = SlowLog("d1", 1.0), SlowLog("d2", 1.0)
    for _ in range(BURST + 1):
        first.stuck(b"file", 4096, queue=0.0, disk=10.0, now=0.0)
    second.stuck(b"file", 4096, queue=0.0, disk=10.0, now=0.0)
    assert lines.messages[-1].startswith("d2/file ")


@settings(deadline=None, database=None)
@given(gaps=st.lists(st.floats(0, 20), min_size=1, max_size=200))
def test_no_more_than_a_burst_and_then_the_rate_whatever_comes(gaps: list[float]) -> None:
    seen: list[float] = []
    now = 0.0
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(now)  # type: ignore[method-assign]
    logger = logging.getLogger("diskread")
    logger.addHandler(handler)
    try:
        log = SlowLog("d1", 1.0)
        for gap in gaps:
            now += gap
            log.stuck(b"file", 4096, queue=0.0, disk=10.0, now=now)
    finally:
        logger.removeHandler(handler)
    for first, began in enumerate(seen):
        for count, ended in enumerate(seen[first:], 1):
            assert count <= BURST + (ended - began) * BURST / PERIOD + 1e-6
    assert len(seen) >= min(len(gaps), BURST)


def test_a_program_that_asks_for_no_log_gets_none() -> None:
    program = """
from diskread.slow_log import SlowLog
SlowLog("d1", 1.0).stuck(b"file", 4096, queue=0.0, disk=10.0, now=0.0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == ("", "")
