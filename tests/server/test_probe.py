"""The probe's verdict on servers with the problem, without it, and on what is no such server at all."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
from typing import TYPE_CHECKING, Any

import gevent
import msgspec
import pytest
from click.testing import CliRunner
from gevent.server import StreamServer
from rich.console import Console

from server import client
from server.commands.probe import probe as probe_command
from server.probe import CouldNotAskError, Latency, Parameters, Result, probe, render
from tests.server.test_client import (
    PATIENCE,
    blocked,
    closing,
    good,
    nobody,
    read_line,
    read_ms,
    reply_to,
    saying,
    serving,
    silent,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

    from click.testing import Result as Invocation
    from gevent.socket import socket

    from server.client import Protocol
    from tests.server.test_client import Handler

PARTS = ["baseline", "one_slow", "many_slow", "idle_clients", "burst"]

#: A short question with wide tolerances: a healthy server on a loaded machine keeps within them.
EASY = Parameters(
    slow=0.5,
    slow_count=3,
    fast_count=9,
    spacing=0.01,
    idle_count=20,
    burst_count=40,
    burst_ms=100,
    tolerance=0.4,
    limit=PATIENCE,
)

#: A shorter one for servers that fail it by far.
SHORT = Parameters(
    slow=0.3,
    slow_count=2,
    fast_count=4,
    spacing=0.01,
    idle_count=10,
    burst_count=10,
    burst_ms=50,
    tolerance=0.1,
    limit=PATIENCE,
)


def options(parameters: Parameters) -> list[str]:
    """The same question on the command line."""
    return [
        *("--slow", str(parameters.slow), "--slow-count", str(parameters.slow_count)),
        *("--fast-count", str(parameters.fast_count), "--idle", str(parameters.idle_count)),
        *("--burst", str(parameters.burst_count), "--burst-ms", str(parameters.burst_ms)),
        *("--tolerance", str(parameters.tolerance), "--limit", str(parameters.limit)),
    ]


def invoke(*arguments: str) -> Invocation:
    return CliRunner().invoke(probe_command, arguments)


def ask(address: str, parameters: Parameters = SHORT, protocol: Protocol = "line") -> Result:
    server = client.resolve(*client.parse_address(address))
    return probe(server, parameters=parameters, protocol=protocol)


def serve_blocked(ready: Connection) -> None:
    """Body of the child process: a server in which every read holds up the event loop."""
    server = StreamServer(("127.0.0.1", 0), blocked)
    server.start()
    ready.send(server.server_port)
    server.serve_forever()


@contextlib.contextmanager
def blocked_server() -> Iterator[str]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve_blocked, args=(theirs,), daemon=True)
    process.start()
    try:
        assert ours.poll(PATIENCE)
        yield f"127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()
        process.close()
        ours.close()
        theirs.close()


# --- The verdict ---


def test_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[Result] = []

    def remember(*arguments: Any, **options: Any) -> Result:
        results.append(probe(*arguments, **options))
        return results[-1]

    monkeypatch.setattr("server.probe.probe", remember)
    with serving(good) as address:
        done = invoke(address, "--protocol", "http", *options(EASY))
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith("\nProblem? N\n")
    assert "0.4 s longer than the baseline" in done.stdout, "the thresholds are stated"
    assert "40 x 100 ms at once" in done.stdout
    assert "9/9" in done.stderr, "progress is shown"
    [result] = results
    assert msgspec.json.decode(msgspec.json.encode(result), type=Result) == result
    assert not result.problem
    assert (result.server, result.protocol, result.stopped_after) == (address, "http", None)
    assert [part.name for part in result.parts] == PARTS
    assert [part.problem for part in result.parts] == [None, False, False, False, False]
    assert [part.count for part in result.parts] == [9, 9, 9, 9, 40]
    assert [len(part.slow_samples) for part in result.parts] == [0, 1, 3, 1, 0]
    for part in result.parts:
        assert part.failures == {}
        assert len(part.samples) == part.count
        assert part.latency.max == max(sample.latency for sample in part.samples)
        assert all(sample.latency >= EASY.slow for sample in part.slow_samples)


def test_problem() -> None:
    """Nor does a stall hide itself: each request that was due during it waits for its end, not just the first."""
    with blocked_server() as address:
        done = invoke(address, "--json", *options(SHORT))
    assert done.exit_code == 1, done.output
    result = msgspec.json.decode(done.stdout, type=Result)
    assert result.problem
    assert [part.problem for part in result.parts] == [None, True, True, True, True]
    _, one_slow, many_slow, _, burst = result.parts
    assert [sample.scheduled for sample in one_slow.samples] == pytest.approx([0.06, 0.12, 0.18, 0.24])
    assert all(sample.failure is None for sample in one_slow.samples)
    for part, stall in (one_slow, SHORT.slow), (many_slow, SHORT.slow_count * SHORT.slow):
        for sample in part.samples:
            assert sample.latency >= stall - sample.scheduled
    assert burst.wall >= SHORT.burst_count * SHORT.burst_ms / 1000
    assert "beside 2 x 0.3 s" in shown(result)


def test_failing_beside_a_slow_read_is_a_problem() -> None:
    slow_reads = 0

    def refusing_when_busy(connection: socket, _address: object) -> None:
        nonlocal slow_reads
        line = read_line(connection)
        if not line:
            return
        if slow_reads:
            connection.sendall(reply_to(line, status=3))
            return
        slow = read_ms(line) == SHORT.slow * 1000
        slow_reads += slow
        gevent.sleep(read_ms(line) / 1000)
        slow_reads -= slow
        connection.sendall(reply_to(line))

    with serving(refusing_when_busy) as address:
        done = invoke(address, *options(SHORT))
    assert done.exit_code == 1, done.output
    assert done.stdout.endswith("\nProblem? Y\n")
    assert "4/4" in done.stdout
    assert "4 status 3 (the disk is busy or offline)" in done.stdout


def test_a_server_that_stops_answering_has_the_problem() -> None:
    dead = False

    def dying(connection: socket, _address: object) -> None:
        nonlocal dead
        line = read_line(connection)
        if line and not dead:
            gevent.sleep(read_ms(line) / 1000)
            connection.sendall(reply_to(line))
            dead = read_ms(line) == SHORT.slow * 1000

    with serving(dying) as address:
        result = ask(address)
    assert result.problem
    assert [part.name for part in result.parts] == PARTS[:2]
    assert result.stopped_after == result.parts[-1].title
    assert "stopped answering after" in shown(result)


# --- What cannot be asked ---


def echo(connection: socket, _address: object) -> None:
    connection.sendall(read_line(connection) + b"\n")


def impatient(connection: socket, _address: object) -> None:
    """Simulates short reads, and ends long ones before they can hold anything up."""
    line = read_line(connection)
    gevent.sleep(min(read_ms(line), 20) / 1000)
    connection.sendall(reply_to(line, status=4 if read_ms(line) > 200 else None))


@pytest.mark.parametrize(
    ("handler", "protocol", "expected"),
    [
        (closing, "line", "closed the connection without a reply"),
        (saying(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "line", "--protocol http"),
        (saying(b"2,0,\n"), "http", "--protocol line"),
        (silent, "line", "no reply"),
        (saying(b"2,0,\n"), "line", "--simulate"),
        (saying(b"5,0,some_file\n"), "line", "status 5 (the file is not there"),
        (saying(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"), "http", "HTTP 404"),
        (echo, "line", "does not simulate reads"),
        (impatient, "line", "status 4 (the read missed its deadline)"),
    ],
)
def test_could_not_ask(handler: Handler, protocol: str, expected: str) -> None:
    # A slow read of 0.6 s that ends after 20 ms, and an echo that should take 1 s: no load blurs these.
    arguments = ["--slow", "0.6", "--slow-count", "1", "--fast-count", "2", "--limit", "3", "--tolerance", "0.35"]
    if handler is silent:
        arguments[arguments.index("--limit") + 1] = "0.3"
    if handler is echo:
        arguments += ["--fast-ms", "1000"]
    with serving(handler) as address:
        done = invoke(address, "--protocol", protocol, *arguments)
    assert done.exit_code == 2, done.output
    assert expected in done.stderr
    assert "Problem?" not in done.stdout


def test_nobody_listens() -> None:
    with nobody() as address:
        done = invoke(address)
    assert done.exit_code == 2
    assert "refused" in done.stderr
    assert "diskread serve" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("host:port",), "HOST:PORT"),
        (("127.0.0.1:1", "--slow", "1", "--tolerance", "2"), "too long to notice"),
        ((), "Missing argument"),
    ],
)
def test_usage(arguments: tuple[str, ...], expected: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert expected in done.stderr


def test_an_idle_server_that_fails_cannot_be_asked() -> None:
    served = 0

    def flaky(connection: socket, address: object) -> None:
        nonlocal served
        served += 1
        if served != 7:
            good(connection, address)

    with serving(flaky) as address, pytest.raises(CouldNotAskError, match="1 closed of 4"):
        ask(address)


def test_a_shortage_on_this_side_is_no_problem_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[socket] = []

    def connect(server: client.Server) -> socket:
        if sum(connection.fileno() >= 0 for connection in opened) >= 8:
            raise client.ExhaustedError("Too many open files")
        opened.append(real_connect(server))
        return opened[-1]

    real_connect = client.connect
    monkeypatch.setattr(client, "connect", connect)
    parameters = msgspec.structs.replace(SHORT, slow_count=1, tolerance=0.2)
    with serving(good) as address, pytest.raises(CouldNotAskError, match="ulimit -n"):
        ask(address, parameters)
    assert all(connection.fileno() < 0 for connection in opened), "none is left open"


def test_interrupted() -> None:
    def interrupting(connection: socket, _address: object) -> None:
        line = read_line(connection)
        if read_ms(line) == SHORT.slow * 1000:
            os.kill(os.getpid(), signal.SIGINT)
            gevent.sleep(PATIENCE)
        gevent.sleep(read_ms(line) / 1000)
        connection.sendall(reply_to(line))

    with serving(interrupting) as address:
        done = invoke(address, *options(SHORT))
    assert done.exit_code == 130
    assert "no verdict" in done.stderr
    assert "Problem?" not in done.stdout


# --- Figures and output ---


def shown(result: Result) -> str:
    console = Console(file=io.StringIO(), width=120)
    with console.capture() as capture:
        console.print(render(result))
    return capture.get()


def test_latency() -> None:
    latency = Latency.of([index / 1000 for index in range(1, 101)] + [20.0000001])
    assert latency.min == 0.001
    assert latency.p50 == pytest.approx(0.051, rel=1e-3)
    assert latency.p99 == pytest.approx(0.1, rel=1e-3)
    assert latency.max == 20.0000001


def test_parameters() -> None:
    defaults = Parameters()
    assert (defaults.burst_ideal, defaults.burst_tolerance) == (0.2, 4.0)
    with pytest.raises(ValueError, match="too long to notice"):
        Parameters(slow=1, tolerance=0.95)


def test_help_teaches() -> None:
    done = invoke("--help")
    assert done.exit_code == 0
    for expected in ("\n    diskread probe 127.0.0.1:7000\n", "diskread serve --simulate", "Exit status", "1.5 s"):
        assert expected in done.stdout
