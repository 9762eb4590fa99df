"""`diskread serve`: how it starts, how it stops, and what it says when it cannot."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from server.cli import main
from tests.server.conftest import SMALL
from tests.server.raw_client import ServerProcess, holding, http_request, until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.server.conftest import StartServer

MEGABYTE = 1024 * 1024


def serve(*options: str) -> subprocess.CompletedProcess[str]:
    """Run a `serve` that is expected not to start."""
    command = [
        sys.executable,
        "-m",
        "server",
        "serve",
        *(options if "--port" in options else [*options, "--port", "0"]),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except subprocess.TimeoutExpired:
        pytest.fail(f"the server started with {options}")
    assert "Traceback" not in done.stderr, done.stderr
    return done


# --- Stopping ---


def test_sigterm_lets_requests_finish(start_server: StartServer) -> None:
    server = start_server("--simulate")
    with (
        holding(server, b"0,1000,some_file\n") as line,
        holding(server, http_request("/0,1000,some_file", close=False)) as web,
        server.connect() as idle,
        server.connect() as kept,
    ):
        kept.send(http_request("/healthz", close=False))
        assert kept.response().status == 200
        until(lambda: server.disk("simulated").in_flight == 2, "the requests to begin")
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        # Who is owed nothing is hung up on at once.
        assert idle.rest() == kept.rest() == b""
        assert server.process.poll() is None
        # Another server can have the port while requests are under way.
        successor = start_server("--simulate", port=server.port)
        assert successor.http("/healthz").status == 200
        assert line.rest().startswith(b"0,1")
        response = web.response()
        assert (response.status, response.headers["Connection"]) == (200, "close")
        assert web.rest() == b""
    assert server.wait() == 0
    assert time.monotonic() - begun < 15, "the drain took far longer than the requests under way"
    assert "cut off" not in server.said()


def test_sigterm_lets_a_body_finish_and_does_not_wait_for_another_request(
    start_server: StartServer, tree: Path
) -> None:
    server = start_server("--disk", f"d1={tree}", "--drain-timeout", "8")
    with server.connect() as connection:
        connection.send(http_request("/v1/d1/sparse", close=False))
        _, _, length = connection.head()
        server.process.send_signal(signal.SIGTERM)
        until(lambda: "the port is free" in server.said(), "the drain to begin")
        left = length
        while left and (piece := connection.reader.read(min(left, MEGABYTE))):
            left -= len(piece)
        assert left == 0
        begun = time.monotonic()
        assert connection.rest() == b""
        assert server.wait() == 0
    assert time.monotonic() - begun < 6, "it waited for a client that is owed nothing"
    assert "cut off" not in server.said()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_stops_at_once(start_server: StartServer, number: int) -> None:
    begun = time.monotonic()
    server = start_server("--simulate")
    assert server.stop(number) == 0
    assert time.monotonic() - begun < 15
    assert "Traceback" not in server.said()


def test_stuck_slots_do_not_keep_the_process(start_server: StartServer, tree: Path) -> None:
    options = ["--simulate", "--disk", f"d1={tree}", "--deadline", "0.2", "--drain-timeout", "20"]
    server = start_server(*options)
    assert server.line(b"0,60000,d1/small\n").startswith(b"4,")
    assert server.disk("d1").stuck == 1
    begun = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - begun < 10


def test_a_drain_ends_after_its_timeout(start_server: StartServer) -> None:
    server = start_server("--simulate", "--drain-timeout", "0.3")
    with holding(server, b"0,60000,some_file\n") as cut:
        until(lambda: server.disk("simulated").in_flight == 1, "the request to begin")
        begun = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begun < 10
        assert cut.rest() == b""
    assert "some requests were cut off" in server.said()


def test_a_second_signal_does_not_wait(start_server: StartServer) -> None:
    server = start_server("--simulate")
    with holding(server, b"0,60000,some_file\n"):
        until(lambda: server.disk("simulated").in_flight == 1, "the request to begin")
        server.process.send_signal(signal.SIGTERM)
        until(lambda: "the port is free" in server.said(), "the drain to begin")
        assert server.process.poll() is None
        assert server.stop() == 1


# --- Starting ---


def test_starts_with_what_it_says(start_server: StartServer, tree: Path) -> None:
    server = start_server("--disk", f"d1={tree}", "--disk", f"lost={tree}/nowhere", "--threads", "3")
    until(lambda: "lost is offline" in server.said(), "the verdict on the disks")
    said = server.said()
    assert f"disk d1: {tree}, 3 slots" in said
    assert "disk lost is offline: its root directory cannot be opened: No such file or directory" in said
    assert "simulate" not in said


def test_warns_of_stalls_that_everybody_may_ask_for(start_server: StartServer) -> None:
    server = start_server("--simulate", "--host", "0.0.0.0")
    assert "WARNING 0.0.0.0 is no loopback address" in server.said()


def test_without_disks_it_simulates(start_server: StartServer) -> None:
    assert start_server().line(b"0,5,some_file\n").startswith(b"0,")
    assert start_server("--no-simulate").line(b"0,5,some_file\n") == b"2,0,\n"


def test_either_engine_serves_files_and_stalls(start_server: StartServer, tree: Path) -> None:
    server = start_server("--engine", "native", "--simulate", "--disk", f"d1={tree}")
    assert server.http("/v1/d1/small").body == SMALL
    assert server.line(b"7,20,d1/small\n").startswith(b"7,")


def test_options_win_over_the_file(start_server: StartServer, tree: Path, tmp_path: Path) -> None:
    file = tmp_path / "diskread.toml"
    file.write_text(
        f"""
        port = 1
        idle_timeout = 5
        [limits]
        threads = 3
        queue = 7
        [disk.d1]
        root = "{tree}/directory"
        deadline = 2.5
        [disk.d2]
        root = "{tree}"
        queue = 9
        """
    )
    server = start_server("--config", str(file), "--threads", "4", "--disk", f"d1={tree}", "--disk", f"d3={tree}")
    document = server.status()
    assert not document.simulate
    assert {disk.name: (disk.root, disk.slots, disk.queue, disk.deadline) for disk in document.disks} == {
        "d1": (str(tree), 4, 7, 2.5),
        "d2": (str(tree), 4, 9, 10.0),
        "d3": (str(tree), 4, 7, 10.0),
    }
    assert server.http("/v1/d1/small").body == SMALL


def test_a_port_that_is_taken_is_said_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = serve("--port", str(port))
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in done.stderr
    assert "--port" in done.stderr


@pytest.mark.parametrize(
    ("host", "why"), [("192.0.2.1", "cannot listen on 192.0.2.1"), ("host.invalid", "cannot listen on host.invalid")]
)
def test_an_address_that_is_not_ours_is_said_so(host: str, why: str) -> None:
    done = serve("--host", host)
    assert done.returncode == 1
    assert why in done.stderr


def test_a_wrong_file_is_said_so_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "diskread.toml"
    file.write_text("port = 7000\n\nthread = 5\n")
    done = serve("--config", str(file))
    assert done.returncode == 2
    assert f"{file}:3: thread: there is no such key" in done.stderr


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--config", "/nowhere/diskread.toml"], "/nowhere/diskread.toml"),
        (["--disk", "photos"], "NAME=DIR"),
        (["--disk", "=/srv"], "NAME=DIR"),
        (["--disk", "photos="], "NAME=DIR"),
        (["--disk", "v1=/srv"], "v1"),
        (["--disk", "simulated=/srv"], "simulated"),
        (["--disk", "a,b=/srv"], "a,b"),
        (["--disk", "a/b=/srv"], "a/b"),
        (["--disk", "..=/srv"], ".."),
        (["--disk", "a=/srv/1", "--disk", "a=/srv/2"], "a"),
        (["--threads", "0"], "threads"),
        (["--queue", "-1"], "queue"),
        (["--deadline", "0"], "deadline"),
        (["--deadline", "nan"], "deadline"),
        (["--idle-timeout", "0"], "idle"),
        (["--request-timeout", "-1"], "request"),
        (["--drain-timeout", "nan"], "drain"),
        (["--connections", "0"], "connections"),
        (["--connections", "99999999999999999999"], "connections"),
        (["--port", "65536"], "port"),
        (["--port", "x"], "port"),
        (["surplus"], "surplus"),
    ],
)
def test_wrong_options_are_said_so(options: list[str], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.commands.serve.run", lambda _config: pytest.fail(f"it would start with {options}"))
    result = CliRunner().invoke(main, ["serve", *options])
    assert result.exit_code == 2, result.output
    assert why in result.output


def test_an_access_log_that_cannot_be_written_is_said_so(tmp_path: Path) -> None:
    done = serve("--access-log", str(tmp_path / "nowhere" / "log"))
    assert done.returncode == 1
    assert "cannot write the access log" in done.stderr


def test_raises_its_limit_of_descriptors(server: ServerProcess) -> None:
    with open(f"/proc/{server.process.pid}/limits", encoding="ascii") as limits:
        (line,) = (line for line in limits if line.startswith("Max open files"))
    soft, hard = line.split()[3:5]
    assert soft == hard
