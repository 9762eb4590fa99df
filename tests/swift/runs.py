"""Runs Swift's own tests, file by file, and gathers what each test has come to."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from .comparison import Outcome

REPOSITORY = Path(__file__).resolve().parents[2]
IN_PROCESS = {"SWIFT_TEST_IN_PROCESS": "1"}
FUNCTIONAL = ("test/functional/test_object.py", "test/functional/test_slo.py", "test/functional/tests.py")


@dataclass(frozen=True)
class Set:
    """Tests that run in the same environment.

    Args:
        name: What it is called.
        patterns: Files below Swift's source.
        rest: The directory whose other files belong to it as well when everything is to run.
        environment: Variables for Swift's tests.
    """

    name: str
    patterns: tuple[str, ...]
    rest: str
    environment: dict[str, str] = field(default_factory=dict)

    def files(self, source: Path, *, everything: bool) -> list[str]:
        """Their paths below the source."""
        found = [path for pattern in self.patterns for path in sorted(source.glob(pattern))]
        if everything:
            found += [path for path in sorted((source / self.rest).rglob("test*.py")) if path not in found]
        return [str(path.relative_to(source)) for path in found]

    def label(self, test: str) -> str:
        """The id of a test, such that no two sets have the same."""
        return f"{test} [ec]" if "SWIFT_TEST_IN_PROCESS_CONF_LOADER" in self.environment else test


SETS = (
    Set(
        "unit",
        (
            "test/unit/obj/test_*.py",
            "test/unit/cli/test_relinker.py",
            "test/unit/common/middleware/crypto/test_encryption.py",
            "test/unit/proxy/test_server.py",
            "test/unit/proxy/test_sysmeta.py",
        ),
        "test/unit",
    ),
    Set("functional", FUNCTIONAL, "test/functional", IN_PROCESS),
    Set(
        "functional-ec",
        FUNCTIONAL,
        "test/functional",
        {**IN_PROCESS, "SWIFT_TEST_IN_PROCESS_CONF_LOADER": "ec"},
    ),
)


@dataclass
class Run:
    """What the tests of a file have come to.

    Args:
        outcomes: By the id of the test.
        made: How many objects were made of each class that stands in.
    """

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    made: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Runner:
    """Runs files of tests, each in a process of its own.

    Args:
        python: An interpreter that has Swift and what its tests need.
        source: Swift's source.
        scratch: A directory on a file system with large extended attributes.
        logs: Where pytest's output goes.
        seconds: How long a test may take.
        only: An expression for pytest's -k, or the id of a test.
    """

    python: str
    source: Path
    scratch: Path
    logs: Path
    seconds: int = 120
    only: str | None = None

    def run(self, tests: Set, path: str, managers: str | None, wanted: list[str] | None = None) -> Run:
        """Run a file.

        A test that ends the process, by a crash or because it hangs, has failed; those behind it get a new process.

        Args:
            tests: The set that it belongs to.
            path: The file, below the source.
            managers: The module of the classes that stand in; None: Swift's own.
            wanted: Ids of the tests to run; None: those that `only` selects.
        """
        run = Run()
        while True:
            process = _Process(run, f"{tests.name}: {path} ({'ours' if managers else 'stock'})")
            status = process.follow(*self._command(tests, path, managers, wanted))
            left = [test for test in process.collected if test not in run.outcomes and test != process.started]
            if process.started is not None:
                how = f"signal {-status}" if status < 0 else f"status {status}; if it hung, the log has the stacks"
                run.outcomes[process.started] = Outcome("failed", why=f"the process ended in this test: {how}")
            elif left or status not in (0, 1, 5):  # 5: no tests
                run.outcomes[f"{path} (as a whole)"] = Outcome("failed", why=f"pytest ended with status {status}")
                return run
            if not left:
                return run
            wanted = left

    def _command(
        self, tests: Set, path: str, managers: str | None, wanted: list[str] | None
    ) -> tuple[list[str], dict[str, str], Path, Path]:
        command = [
            self.python,
            "-m",
            "pytest",
            "-p",
            "tests.swift.stand_in",
            "-o",
            "addopts=",
            "-p",
            "no:cacheprovider",
        ]
        command += ["-q", "--tb=short", f"--timeout={self.seconds}", "--timeout-method=thread"]
        if managers:
            command += ["--managers", managers]
        if wanted is not None:
            listed = self.scratch / "wanted.json"
            listed.write_text(json.dumps(wanted))
            command += ["--tests", str(listed)]
        elif self.only and "::" not in self.only and not self.only.startswith("test/"):
            command += ["-k", self.only]
        command.append(self.only if wanted is None and self.only and "::" in self.only else path)
        environment = {
            **os.environ,
            **tests.environment,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
            "PYTHONPYCACHEPREFIX": str(self.scratch / "pycache"),
            "TMPDIR": str(self.scratch),
        }
        name = f"{tests.name}-{path.replace('/', '.')}-{'ours' if managers else 'stock'}.log"
        return command, environment, self.source, self.logs / name


class _Process:
    """One process of pytest."""

    def __init__(self, run: Run, title: str) -> None:
        self.collected: list[str] = []
        self.started: str | None = None
        self._run = run
        self._title = title
        self._unfinished = ""

    def follow(self, command: list[str], environment: dict[str, str], source: Path, log: Path) -> int:
        """Start it and take in what it tells until it ends; returns its exit status."""
        with tempfile.TemporaryDirectory(dir=environment["TMPDIR"], ignore_cleanup_errors=True) as temporary:
            results = Path(temporary, "outcomes")
            results.touch()
            with results.open(encoding="utf-8") as lines, log.open("ab") as output:
                process = subprocess.Popen(
                    [*command, "--outcomes", str(results)],
                    cwd=source,
                    env={**environment, "TMPDIR": temporary},
                    stdout=output,
                    stderr=output,
                )
                try:
                    while process.poll() is None:
                        with contextlib.suppress(subprocess.TimeoutExpired):
                            process.wait(1.0)
                        self._read(lines)
                        self._show(end="\r")
                    self._read(lines)
                    self._show(end="\n")
                finally:
                    process.kill()
                    process.wait()
        return process.returncode

    def _read(self, lines: IO[str]) -> None:
        while text := lines.readline():
            self._unfinished += text
            if self._unfinished.endswith("\n"):
                self._take(json.loads(self._unfinished))
                self._unfinished = ""

    def _take(self, line: dict[str, Any]) -> None:
        match line:
            case {"collected": tests}:
                self.collected = tests
            case {"started": test}:
                self.started = test
            case {"made": counts}:
                for name, count in counts.items():
                    self._run.made[name] = self._run.made.get(name, 0) + count
            case {"id": test, **outcome}:
                self.started = None
                self._run.outcomes[test] = Outcome(**outcome)

    def _show(self, end: str) -> None:
        if end == "\n" or sys.stderr.isatty():
            failed = sum(each.outcome == "failed" for each in self._run.outcomes.values())
            count = len(self._run.outcomes)
            print(f"{self._title}: {count:,} run, {failed:,} failed", end=end, file=sys.stderr, flush=True)
