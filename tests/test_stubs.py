"""The type stub of the extension says what the extension does."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

# What Cython adds to modules. Everything else must be in the stub.
ALLOWED = ["__pyx_capi__", "__test__", "__reduce_cython__", "__setstate_cython__"]

PROGRAM = """
import diskread
from diskread import Disk, DiskFile, Limits
from diskread._syscalls import CloseMode, Job, Step, pread

def use(disk: Disk) -> None:
    reveal_type(disk.read("file", 0, 10, deadline=1.5))
    reveal_type(disk.run(len, "abc"))
    reveal_type(disk.open(b"file"))
    reveal_type(disk.stat("file").size)
    reveal_type(disk.status.load.waiting)
    reveal_type(diskread.Disks([disk])["a"])
    with disk.open("file") as file:
        for chunk in file.chunks(0, None):
            reveal_type(chunk)

job = Job(root=b"/", path=b"file", close_mode=CloseMode.CLOSE_NEVER)
reveal_type(job)
reveal_type(job.take_data())
reveal_type(job.stat)
reveal_type(pread(0, 1, 2))
reveal_type(Step.STEP_OPEN)
Job(b"/", 1)
Job(path="text")
Limits(threads="8")
class Child(Job): ...
"""

REVEALED = [
    "bytes",
    "int",
    "diskread.disk.DiskFile",
    "int",
    "int",
    "diskread.disk.Disk",
    "bytes",
    "diskread._syscalls.Job",
    "bytes",
    "tuple[int, int, int, int] | None",
    "bytes",
    "Literal[diskread._syscalls.Step.STEP_OPEN]?",
]


def run_mypy(module: str, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"MYPY_CACHE_DIR": str(cwd / "cache")},
        check=False,
    )


@pytest.mark.parametrize("module", ["_cached", "_syscalls", "_engine", "swift._object"])
def test_the_stub_and_the_extension_agree(tmp_path: Path, module: str) -> None:
    allowed = tmp_path / "allowed"
    allowed.write_text("".join(f"diskread.{module}.(.*[.])?{name}\n" for name in ALLOWED))
    options: list[str | Path] = ["--allowlist", allowed, "--ignore-unused-allowlist"]  # versions of Cython differ
    result = run_mypy("mypy.stubtest", f"diskread.{module}", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_program_is_checked_against_the_package(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    result = run_mypy("mypy", "--strict", "--no-pretty", "program.py", cwd=tmp_path)
    lines = result.stdout.splitlines()
    # mypy before 2.0 says builtins.int where later ones say int.
    revealed = [line.split('"')[1].replace("builtins.", "") for line in lines if "Revealed type" in line]
    assert revealed == REVEALED, result.stdout
    errors = [line for line in lines if ": error:" in line]
    program = PROGRAM.splitlines()
    assert [program[int(line.split(":")[1]) - 1] for line in errors] == [
        'Job(b"/", 1)',
        'Job(path="text")',
        'Limits(threads="8")',
        "class Child(Job): ...",
    ], result.stdout
