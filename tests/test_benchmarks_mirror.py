"""The benchmark of mirrors runs on a disk that really hangs, and writes what its readers rely on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest
from click.testing import CliRunner
from hdrh.histogram import HdrHistogram

from benchmarks import mirror
from tests.faults.injectors import FaultFS

if TYPE_CHECKING:
    from pathlib import Path


def test_a_tiny_run(tmp_path: Path) -> None:
    if (reason := FaultFS.why_not()) is not None:
        pytest.skip(reason)
    options = ["--rounds", "1", "--lead", "2", "--hang", "2", "--after", "1", "--rate", "40", "--faults", "hang"]
    done = CliRunner().invoke(mirror.main, [*options, "--no-plot", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    report = msgspec.json.decode((tmp_path / "mirror.json").read_bytes(), type=mirror.Report)
    assert [each.target for each in report.scenes] == ["b", "p95", "fixed"]
    for scene in report.scenes:
        assert [each.name for each in scene.phases] == ["before", "during", "after"]
        assert scene.requests == 200
        assert "-2" not in {status for each in scene.phases for status in each.statuses}, "wrong bytes"
        during = scene.phase("during")
        histogram = HdrHistogram.decode(during.histogram)
        assert histogram.get_total_count() == during.requests - during.failed
        assert scene.reads["b"] > 0
    alone, *mirrors = report.scenes
    assert alone.reads["a"] == 0
    for scene in mirrors:
        assert scene.reads["a"] > 0
        assert scene.hedges <= 1 + mirror.SHARE * (scene.requests + 10)
        assert scene.answers["a"] + scene.answers["b"] >= scene.requests - sum(each.failed for each in scene.phases)
    assert len(report.verdicts) == 5
    text = (tmp_path / "mirror.md").read_text()
    assert all(title in text for title in mirror.TARGETS.values())


def test_asks_for_a_fault_that_there_is() -> None:
    done = CliRunner().invoke(mirror.main, ["--faults", "flood", "--no-plot"])
    assert done.exit_code == 2
    assert "no such fault: flood; there are none, slow" in done.output
