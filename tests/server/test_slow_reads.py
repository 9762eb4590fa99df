"""The last lines of the log of slow reads."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from diskread.slow_log import SlowLog
from server.slow_reads import SlowReads

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def kept() -> Iterator[SlowReads]:
    handler = SlowReads(length=3)
    logger = logging.getLogger("diskread")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def test_keeps_what_was_slow_or_stuck(kept: SlowReads) -> None:
    log = SlowLog("d1", 1.0)
    log.finished(b"dir/file\n\xff", 4096, queue=0.25, disk=1.5, stuck=False, now=0.0)
    log.stuck(b"file", 100, queue=0.5, disk=9.5, now=1.0)
    log.finished(None, 7, queue=0.0, disk=60.0, stuck=True, now=2.0)
    slow, stuck, back = kept.lines
    assert (slow.disk, slow.kind, slow.bytes, slow.queue, slow.seconds) == ("d1", "slow", 4096, 0.25, 1.5)
    assert slow.path is not None
    assert slow.path.isprintable()
    assert (stuck.path, stuck.kind, stuck.bytes, stuck.seconds) == ("file", "stuck", 100, 9.5)
    assert (back.path, back.kind, back.bytes) == (None, "back", 7)


def test_keeps_the_last_lines_only_and_counts_all(kept: SlowReads) -> None:
    for number in range(10):
        SlowLog(f"d{number}", 1.0).stuck(b"file", 1, queue=0.0, disk=1.0, now=0.0)
    assert [line.disk for line in kept.lines] == ["d7", "d8", "d9"]
    assert kept.count == 10


def test_says_how_many_lines_were_left_out(kept: SlowReads) -> None:
    log = SlowLog("d1", 1.0)
    for _ in range(15):
        log.stuck(b"file", 1, queue=0.0, disk=1.0, now=0.0)
    log.stuck(b"file", 1, queue=0.0, disk=1.0, now=100.0)
    assert kept.lines[-1].left_out == 5


def test_other_lines_are_none_of_its_business(kept: SlowReads) -> None:
    logging.getLogger("diskread.server").warning("disk %s is offline", "d1")
    logging.getLogger("diskread").warning("something else")
    assert (kept.lines, kept.count) == ([], 0)
