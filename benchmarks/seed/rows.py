"""The rows of the table as peers/rows.toml describes them: is the toolchain there, install it, build, start."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PEERS = REPOSITORY / "benchmarks" / "peers"
CACHE = REPOSITORY / ".cache" / "peers"
BUILD_SECONDS = 300.0


class RowError(Exception):
    """A row cannot be measured; the message says why."""


class Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One row of the table; rows.toml says what the fields mean."""

    name: str
    file: str
    language: str
    schedules: str
    needs: str
    start: list[str]
    version: list[str]
    keep_alive: bool
    root: tuple[str, ...] = ("--root", "{root}")
    disk: list[str] = []
    table: bool = True
    packages: list[str] = []
    pip: list[str] = []
    check: list[str] = []
    build: list[list[str]] = []

    @property
    def source(self) -> Path:
        """Directory of the source."""
        return PEERS / self.name

    @property
    def built(self) -> Path:
        """Directory of what is built from it."""
        return CACHE / self.name

    def words(self, command: Sequence[str], **values: object) -> list[str]:
        """A command of rows.toml with its places filled in."""
        places = {"source": self.source, "build": self.built, "python": sys.executable, **values}
        return [_fill(word, places) for word in command]

    def lacks(self) -> str | None:
        """What is missing before the row can be built, and how to get it; None when nothing is."""
        program = self.words([self.needs])[0]
        if shutil.which(program) is None:
            return f"{self.needs} is not there: apt-get install {' '.join(self.packages)}, or seedtable.py --install"
        if self.check and _run(self.words(self.check)).returncode != 0:
            wanted = f"pip install {' '.join(self.pip)}" if self.pip else f"apt-get install {' '.join(self.packages)}"
            return f"its check fails: {wanted}, or seedtable.py --install"
        return None

    def toolchain(self) -> str:
        """Its version: the first line that says one."""
        done = _run(self.words(self.version))
        lines = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines()]
        return next((line for line in lines if line and not line.startswith("Picked up")), "unknown")

    def make(self) -> None:
        """Build it, unless that is done and neither source nor commands nor toolchain have changed.

        Raises:
            RowError: A command fails; the message has the end of what it said.
        """
        if not self.build:
            return
        stamp, now = self.built / ".built", self._fingerprint()
        if stamp.exists() and stamp.read_text() == now:
            return
        self.built.mkdir(parents=True, exist_ok=True)
        for command in self.build:
            done = _run(self.words(command), cwd=self.built)
            if done.returncode != 0:
                said = (done.stderr + done.stdout).strip().splitlines()[-3:]
                raise RowError(f"its build fails: {command[0]}: {' / '.join(said) or f'exit {done.returncode}'}")
        stamp.write_text(now)

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(msgspec.json.encode([self.build, self.toolchain()]))
        for path in sorted(each for each in self.source.rglob("*") if each.is_file()):
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()


def _fill(word: str, places: dict[str, object]) -> str:
    # Not str.format: a word may be a program text with braces of its own.
    for name, value in places.items():
        word = word.replace("{" + name + "}", str(value))
    return word


def _run(command: Sequence[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=BUILD_SECONDS, check=False, cwd=cwd
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def load_rows(path: Path = PEERS / "rows.toml") -> list[Row]:
    """All rows, in the order of the file.

    Raises:
        msgspec.ValidationError: A field is missing, unknown, or of another type.
    """
    tables = tomllib.loads(path.read_text("utf-8"))["row"]
    return [msgspec.convert({"name": name, **table}, Row) for name, table in tables.items()]


def install(rows: Iterable[Row], say: Callable[[str], None]) -> None:
    """Install the toolchains of the rows that lack theirs; packages of Debian need root.

    Args:
        rows: Which.
        say: Told each command before it is run.

    Raises:
        RowError: apt-get or pip fails, or there is no apt-get, or this is not root.
    """
    lacking = [row for row in rows if row.lacks() is not None]
    packages = sorted({package for row in lacking for package in row.packages})
    modules = sorted({module for row in lacking for module in row.pip})
    commands = []
    if packages:
        if shutil.which("apt-get") is None or os.geteuid() != 0:
            raise RowError(f"as root and with apt-get only; what is missing: {' '.join(packages)}")
        commands += [["apt-get", "-q", "update"]]
        commands += [["apt-get", "install", "-q", "-y", "--no-install-recommends", *packages]]
    if modules:
        commands += [[sys.executable, "-m", "pip", "install", "--quiet", *modules]]
    if not commands:
        say("All toolchains are there.")
    for command in commands:
        say(" ".join(command))
        if subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode != 0:
            raise RowError(f"{' '.join(command[:2])} has failed")
