"""The command line: help that teaches, statuses that scripts can go by."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import click
import pytest
from click.testing import CliRunner

from server.cli import main
from server.status import version
from tests.server.raw_client import PATIENCE, ServerProcess

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

    from tests.server.conftest import StartServer

COMMANDS = ["check", "completion", "demo", "disk", "probe", "request", "serve", "status", "token"]


def diskread(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_lists_its_commands() -> None:
    result = diskread("--help")
    assert result.exit_code == 0
    listed = result.output.partition("Commands:")[2]
    assert re.findall(r"^  (\w+) +\S", listed, re.MULTILINE) == COMMANDS
    assert diskread("-h").output == result.output


@pytest.mark.parametrize("name", COMMANDS)
def test_explains_each_command_and_option(name: str) -> None:
    result = diskread(name, "--help")
    assert result.exit_code == 0
    command = main.commands[name]
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            for option in parameter.opts + parameter.secondary_opts:
                assert option in result.output
    assert len(result.output.partition("Options:")[0].splitlines()) > 3, "what the command does"
    assert all(len(line) <= 100 for line in result.output.splitlines())
    if name != "completion":
        assert "Exit status" in result.output


@pytest.mark.parametrize("name", ["serve", "demo", "status"])
def test_help_has_the_defaults(name: str) -> None:
    shown = diskread(name, "--help").output
    for default in {"serve": ["127.0.0.1", "7000", "60", "30"], "demo": ["10", "50"], "status": ["1.0"]}[name]:
        assert re.search(rf"default:\s+{re.escape(default)}", shown), default


def test_tells_its_version() -> None:
    result = diskread("--version")
    assert (result.exit_code, result.output) == (0, f"diskread, version {version()}\n")


def test_a_command_that_does_not_exist_is_an_error() -> None:
    result = diskread("surf")
    assert result.exit_code == 2
    assert "No such command 'surf'" in result.output


@pytest.mark.parametrize("module", ["server", "server.cli"])
def test_runs_as_a_module(module: str) -> None:
    command = [sys.executable, "-m", module, "--version"]
    if module == "server.cli":
        command = [sys.executable, "-c", "from server.cli import main; main(prog_name='diskread')", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout == f"diskread, version {version()}\n"


@pytest.mark.parametrize(
    ("shell", "mark"), [("bash", "complete -o nosort"), ("zsh", "#compdef diskread"), ("fish", "complete --no-files")]
)
def test_prints_completion_scripts(shell: str, mark: str) -> None:
    result = diskread("completion", shell)
    assert result.exit_code == 0
    assert mark in result.output
    assert "_DISKREAD_COMPLETE" in result.output


def test_completes_commands() -> None:
    environment = {"_DISKREAD_COMPLETE": "bash_complete", "COMP_WORDS": "diskread s", "COMP_CWORD": "1"}
    result = CliRunner().invoke(main, [], prog_name="diskread", env=environment)
    assert result.output.split() == ["plain,serve", "plain,status"]


# --- status ---


@pytest.fixture
def well(start_server: StartServer, tree: Path) -> ServerProcess:
    """A server of which every disk is well."""
    return start_server("--simulate", "--disk", f"d1={tree}")


def test_status_shows_a_healthy_server(well: ServerProcess) -> None:
    for url in (well.url, f"{well.url}/", f"127.0.0.1:{well.port}"):
        result = diskread("status", url)
        assert result.exit_code == 0, result.output
        assert "d1" in result.output
        assert "online" in result.output


def test_status_as_json_is_the_servers_own(well: ServerProcess) -> None:
    result = diskread("status", well.url, "--json")
    assert result.exit_code == 0
    assert [disk["name"] for disk in json.loads(result.output)["disks"]] == ["d1", "simulated"]


def test_status_tells_scripts_of_a_disk_that_refuses(start_server: StartServer, tree: Path) -> None:
    server = start_server("--simulate", "--disk", f"d1={tree}", "--threads", "1", "--deadline", "0.1")
    server.line(b"0,60000,d1\n")
    result = diskread("status", server.url)
    assert result.exit_code == 1
    assert "refusing" in result.output
    assert diskread("status", server.url, "--json").exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["http://127.0.0.1:1"], "does not answer"),
        (["ftp://127.0.0.1"], "not an http address"),
        (["http://"], "not"),
        (["http://[::1"], ""),
        (["localhost:port"], "port"),
        (["http://a b/"], ""),
        (["--watch", "--json"], "exclude"),
        (["--watch", "--interval", "0"], "--interval"),
    ],
)
def test_status_says_when_it_cannot_ask(arguments: list[str], why: str) -> None:
    result = diskread("status", *arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert why in result.output


@pytest.mark.parametrize("reply", [b"", b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}"])
def test_status_says_when_somebody_else_answers(reply: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            with listening.accept()[0] as connection:
                connection.recv(10_000)
                connection.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        result = diskread("status", f"127.0.0.1:{listening.getsockname()[1]}")
        thread.join()
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit), result.exception


def test_status_is_not_fooled_by_another_page(server: ServerProcess) -> None:
    assert diskread("status", f"{server.url}/v1/d1").exit_code == 2
    assert "404" in diskread("status", f"{server.url}/v1/d1").output


def test_status_watches_until_interrupted(well: ServerProcess) -> None:
    command = [sys.executable, "-m", "server", "status", well.url, "--watch", "--interval", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        watchdog = threading.Timer(PATIENCE, process.kill)
        watchdog.start()
        threading.Timer(1.5, process.send_signal, [signal.SIGINT]).start()
        out, _ = process.communicate()
        watchdog.cancel()
    assert process.returncode == 0
    assert "d1" in out
