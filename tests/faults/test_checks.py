"""`diskread check`, on a file system that really hangs."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from .injectors import FaultFS


@pytest.mark.parametrize("operation", ["getattr", "opendir", "read", "*"])
def test_a_hung_disk_is_told_and_does_not_hang_it(faultfs: FaultFS, tmp_path: Path, operation: str) -> None:
    (faultfs.backing / "file").write_bytes(bytes(10_000))
    (tmp_path / "file").write_bytes(bytes(10_000))
    path = tmp_path / "diskread.toml"
    path.write_text(f'port = 0\n[disk.sick]\nroot = "{faultfs.root}"\n[disk.well]\nroot = "{tmp_path}"\n', "utf-8")
    faultfs.hang(operation)
    command = [sys.executable, "-m", "server", "check", "--config", str(path), "--deadline", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    findings = json.loads(done.stdout)["findings"]
    (sick,) = (each for each in findings if each["subject"] == "disk sick")
    assert (sick["verdict"], "has not answered within 1 s" in sick["text"]) == ("error", True)
    well = [each["verdict"] for each in findings if each["subject"] == "disk well"]
    assert well
    assert "error" not in well


def test_a_hung_directory_does_not_hang_it(faultfs: FaultFS) -> None:
    faultfs.hang("*")
    command = [sys.executable, "-m", "server", "check", str(faultfs.root), "--deadline", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert not json.loads(done.stdout)[0]["readable"]
