"""The documentation is true: each block of code in README.md and docs/ is executed, and compared with what it prints.

* ```python: the blocks of a page are one program, in a process of its own.
* ```console: the lines that begin with `$ ` are the commands of one shell per page; each has to succeed. What is below
  a command is what it prints, `...` standing for anything.
* ```toml: a configuration of the server; behind the comment "file of tokens" that.
* ```text: is no code. Right after a ```python block, behind the comment "output", it is what that block prints.

Pages speak of /srv/..., /run/diskread and port 7000; here these are a directory of the test and a free port. A block
that cannot be run here has a comment before it that says why: "not run: needs systemd".
"""

from __future__ import annotations

import contextlib
import doctest
import inspect
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from diskread import errors
from diskread.metrics import DiskCollector, MirrorCollector
from diskread.wsgi import status_of
from server import access, config

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md"))]
LANGUAGES = ("python", "console", "toml", "text")
TOKENS = "file of tokens"
SECONDS = 30
"""That a command, or a program, may take: far more than it does."""

# A fence, and the comment on the line before it, a blank line between them or not.
BLOCK = re.compile(
    r"(?:^<!-- *(?P<comment>[^\n]*?) *-->\n\n?)?^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    comment: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def not_run(self) -> bool:
        return re.match(r"not run: \w", self.comment) is not None


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    found = [
        Block(page, text.count("\n", 0, each.start("text")), each["language"], each["comment"] or "", each["text"])
        for each in BLOCK.finditer(text)
    ]
    assert len(found) * 2 == len(re.findall(r"^ *```", text, re.MULTILINE)), f"{page.name}: a fence is not closed"
    return found


BLOCKS = {page: blocks_of(page) for page in PAGES}


def to_run(page: Path, language: str) -> list[Block]:
    return [block for block in BLOCKS[page] if block.language == language and not block.not_run]


def pages_with(language: str) -> list[object]:
    return [pytest.param(page, id=page.stem) for page in PAGES if to_run(page, language)]


def matches(expected: str, got: str) -> bool:
    return doctest.OutputChecker().check_output(expected, got, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)


class Place(NamedTuple):
    """Where the code of a page runs."""

    directory: Path
    port: int

    def here(self, text: str) -> str:
        """The same text, about this place."""
        text = text.replace("/srv/", f"{self.directory}/srv/").replace("/run/diskread/", f"{self.directory}/run/")
        text = text.replace("7000", str(self.port))
        text = re.sub(r"diskread serve(?!.*--port)", f"diskread serve --port {self.port}", text)
        return re.sub(r"diskread status(?!.*http)", f"diskread status http://127.0.0.1:{self.port}", text)

    def there(self, text: str) -> str:
        """What was printed here, as the page has it."""
        return text.replace(f"{self.directory}/srv/", "/srv/").replace(str(self.port), "7000")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Files where the pages have them, `diskread` as a command, and a port that is free."""
    for name in ("a", "b", "photos", "films"):
        for directory in ("some", "2026"):
            (tmp_path / "srv" / name / directory).mkdir(parents=True)
        for file in ("some/file", "2026/cat.jpg", "2026/film.mp4"):
            (tmp_path / "srv" / name / file).write_bytes(b"content\n" * 40_000)
            os.utime(tmp_path / "srv" / name / file, (10**9, 10**9))  # as disks of a mirror have it
        with zipfile.ZipFile(tmp_path / "srv" / name / "films.zip", "w") as archive:
            archive.writestr("film.mp4", b"content")
    (tmp_path / "run").mkdir()
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "diskread"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m server "$@"\n')
    program.chmod(0o755)
    gunicorn = tmp_path / "bin" / "gunicorn"
    gunicorn.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gunicorn "$@"\n')
    gunicorn.chmod(0o755)
    (tmp_path / "work").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return Place(tmp_path, listener.getsockname()[1])


# --- Every block ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    for block in BLOCKS[page]:
        assert block.not_run or block.language in LANGUAGES, f"{block.where}: nothing runs {block.language or 'this'}"
        assert block.language != "console" or block.not_run or block.text.startswith("$ "), f"{block.where}: no command"


def test_few_blocks_are_not_run() -> None:
    code = [block for blocks in BLOCKS.values() for block in blocks if block.language != "text"]
    not_run = [block.where for block in code if block.not_run]
    assert len(not_run) <= len(code) / 4, not_run


def test_the_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


# --- Python -----------------------------------------------------------------------------------------------------------

RUNNER = """
import contextlib, io, json, sys
namespace = {"__name__": "__main__"}
for page, line, text in json.load(sys.stdin):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\\n" * line + text, page, "exec"), namespace)
    print(json.dumps(printed.getvalue()), flush=True)
"""


@pytest.mark.parametrize("page", pages_with("python"))
def test_python(page: Path, place: Place) -> None:
    blocks = to_run(page, "python")
    program = json.dumps([(page.name, block.line, place.here(block.text)) for block in blocks])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUNNER],
        input=program,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        cwd=place.directory / "work",
    )
    assert done.returncode == 0, done.stderr
    printed = dict(zip(blocks, map(json.loads, done.stdout.splitlines()), strict=True))
    for block, after in zip(BLOCKS[page], [*BLOCKS[page][1:], None], strict=True):
        if block in printed and after is not None and after.comment == "output":
            got = place.there(printed[block])
            assert matches(after.text, got), f"{after.where}: what is printed is\n{got}"


def test_output_follows_the_block_that_prints_it() -> None:
    for blocks in BLOCKS.values():
        for before, block in zip([None, *blocks], blocks, strict=False):
            if block.comment == "output":
                assert before is not None
                assert before.language == "python", block.where
                assert not before.not_run, block.where


# --- Commands ---------------------------------------------------------------------------------------------------------


class Shell:
    """A shell in which one command follows the other, as on a page."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._errors = place.directory / "stderr"
        environment = {
            **os.environ,
            "PATH": f"{place.directory / 'bin'}:{os.environ['PATH']}",
            "COLUMNS": "200",
            "PS1": "",
        }
        with self._errors.open("wb") as stderr:
            self._process = subprocess.Popen(
                ["bash", "--norc", "--noprofile"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=place.directory / "work",
                env=environment,
                text=True,
                start_new_session=True,
            )

    def run(self, command: str) -> tuple[int, str]:
        """Run a command; its exit status and what it has written to standard output."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command}\nstatus=$?; echo; echo END $status\n")
        self._process.stdin.flush()
        lines: list[str] = []
        too_late = threading.Timer(SECONDS, os.killpg, (self._process.pid, signal.SIGKILL))
        too_late.start()
        try:
            for line in self._process.stdout:
                if line.startswith("END "):
                    break
                lines.append(line)
            else:
                raise AssertionError(f"{command}: the shell has ended, or was after {SECONDS} s: {self.said()}")
        finally:
            too_late.cancel()
            too_late.join()
        if command.endswith("&") and re.match(r"diskread serve|.*\bgunicorn ", command):
            self._wait_for_server()
        return int(line.split()[1]), "".join(lines).removesuffix("\n")

    def _wait_for_server(self) -> None:
        ends = time.monotonic() + SECONDS
        while time.monotonic() < ends:
            try:
                with urlopen(f"http://127.0.0.1:{self._place.port}/status", timeout=5) as answer:
                    if all(disk["state"] == "online" for disk in json.load(answer)["disks"]):
                        return
            except HTTPError as error:  # it wants a token
                error.close()
                if error.code == HTTPStatus.UNAUTHORIZED:
                    return
            except OSError:
                pass
            time.sleep(0.02)
        raise AssertionError(f"the server is not well: {self.said()}")

    def said(self) -> str:
        """Standard error of everything so far."""
        return self._errors.read_text("utf-8", "replace")

    def end(self) -> None:
        """Stop whatever was started in the background; servers first get the chance to do so by themselves."""
        for each in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, each)
            ends = time.monotonic() + 5
            while time.monotonic() < ends and self._group_lives():
                self._process.poll()
                time.sleep(0.02)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()
        self._process.wait(SECONDS)

    def _group_lives(self) -> bool:
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return False
        return True


@pytest.fixture
def shell(place: Place) -> Iterator[Shell]:
    missing = [program for program in ("bash", "curl", "nc") if shutil.which(program) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    running = Shell(place)
    try:
        yield running
    finally:
        running.end()


def commands_of(block: Block) -> list[tuple[str, str]]:
    """The commands of a block, each with what it prints; a line that ends in a backslash goes on in the next."""
    found: list[tuple[str, str]] = []
    for line in block.text.splitlines(keepends=True):
        if line.startswith("$ "):
            found.append((line[2:].rstrip("\n"), ""))
        elif found[-1][0].endswith("\\") and not found[-1][1]:
            found[-1] = (found[-1][0] + "\n" + line.removeprefix("> ").rstrip("\n"), "")
        else:
            found[-1] = (found[-1][0], found[-1][1] + line)
    return found


@pytest.mark.parametrize("page", pages_with("console"))
def test_console(page: Path, place: Place, shell: Shell) -> None:
    for file in REPOSITORY.glob("examples/*.py"):  # pages name them as one does in a checkout
        (place.directory / "work" / "examples").mkdir(exist_ok=True)
        shutil.copy(file, place.directory / "work" / "examples")
    # The configuration that a page shows is the one that its commands name.
    for block in to_run(page, "toml"):
        if block.comment == TOKENS:
            continue
        (place.directory / "work" / "diskread.toml").write_text(place.here(block.text))
    for block in to_run(page, "console"):
        for command, expected in commands_of(block):
            status, got = shell.run(place.here(command))
            assert status == 0, f"{block.where}: {command}: exit status {status}\n{got}\n{shell.said()}"
            got = place.there(got)
            assert not expected or matches(expected, got), f"{block.where}: {command} prints\n{got}\n{shell.said()}"


# --- Configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages_with("toml"))
def test_toml(page: Path, tmp_path: Path) -> None:
    for block in to_run(page, "toml"):
        path = tmp_path / "diskread.toml"
        path.write_text(block.text, "utf-8")
        try:
            access.load(path) if block.comment == TOKENS else config.load(path)
        except config.ConfigError as error:
            pytest.fail(f"{block.where}: {error}")


def test_the_reference_is_what_the_code_says() -> None:
    done = subprocess.run(
        [sys.executable, REPOSITORY / "scripts" / "configuration-reference", "--check"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# --- Pages that have to be complete -----------------------------------------------------------------------------------


def test_every_alert_has_its_section() -> None:
    rules = (REPOSITORY / "deploy" / "prometheus" / "diskread.rules.yml").read_text("utf-8")
    alerts = re.findall(r"- alert: (\w+)", rules)
    sections = re.findall(r"^### (Diskread\w+)$", (DOCS / "operations.md").read_text("utf-8"), re.MULTILINE)
    assert sections == alerts
    assert len(alerts) > 5


def test_the_metrics_are_those_that_there_are() -> None:
    described = re.findall(r"`(diskread_\w+)`", (DOCS / "operations.md").read_text("utf-8"))
    families = [*DiskCollector(list).collect(), *MirrorCollector(list).collect()]
    there = [each.name + ("_total" if each.type == "counter" else "") for each in families]
    assert sorted(described) == sorted(there)


def test_every_error_has_its_row_and_its_status() -> None:
    rows = re.findall(r"^\| `(Disk\w+)` \| (\d+) \|", (DOCS / "errors.md").read_text("utf-8"), re.MULTILINE)
    expected = {}
    for name, kind in inspect.getmembers(errors, inspect.isclass):
        if issubclass(kind, errors.DiskError) and kind is not errors.DiskError:
            more = {"started": True} if kind is errors.DiskTimeout else {}
            expected[name] = int(status_of(kind("a", None, "reason", **more)))
    assert {name: int(status) for name, status in rows} == expected


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r"^ +- .*?(\w[\w-]*\.md)$", (REPOSITORY / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(page.name for page in DOCS.glob("*.md"))
