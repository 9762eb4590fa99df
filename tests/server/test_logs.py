"""Logs as text and as JSON, and the ids of requests in them."""

from __future__ import annotations

import io
import json
import logging
import re
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import gevent
import pytest

from server import logs
from server.logs import AccessLog, request_id
from tests.server.raw_client import ServerProcess, http_request, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.server.conftest import StartServer

MADE = re.compile(r"[0-9a-f]{16}")


@pytest.mark.parametrize(
    "wanted",
    ["1", "7b0d5f3e-9c1c-4a53-8d0e-2f1a6b1f0c11", "01J9ZQ4Y6H", "1-67891233-abcdef01=/+@:_", "a" * 128],
)
def test_takes_an_id_that_is_fit_for_a_log(wanted: str) -> None:
    assert request_id(wanted) == wanted


@pytest.mark.parametrize(
    "wanted", [None, "", " ", "a b", 'a"b', "a\nb", "a\n", "a\x1b[2J", "ü", "a" * 129, "a,b", "{}"]
)
def test_makes_one_where_there_is_none(wanted: str | None) -> None:
    made = {request_id(wanted) for _ in range(100)}
    assert len(made) == 100
    assert all(MADE.fullmatch(each) for each in made)


# --- With an access log ---


class Logging:
    """A server with an access log, and the entries of that."""

    def __init__(self, start_server: StartServer, directory: Path, *options: str) -> None:
        self.file = directory / "access.log"
        self.server: ServerProcess = start_server("--access-log", str(self.file), *options)

    def entries(self, count: int) -> list[str]:
        until(lambda: self.file.read_text("utf-8").count("\n") >= count, "the access log")
        found = self.file.read_text("utf-8").splitlines()
        assert len(found) == count
        return found


@pytest.fixture(params=["text", "json"])
def log_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def logging_server(start_server: StartServer, tmp_path: Path, tree: Path, log_format: str) -> Iterator[Logging]:
    options = ["--simulate", "--disk", f"d1={tree}", "--disk", "lost=/nowhere", "--log-format", log_format]
    found = Logging(start_server, tmp_path, *options)
    yield found
    assert "Traceback" not in found.server.said()


def id_of(entry: str) -> str:
    return str(json.loads(entry)["request_id"]) if entry.startswith("{") else entry.rpartition(" ")[2]


def test_the_id_in_the_log_is_the_one_in_the_response(logging_server: Logging) -> None:
    requests = {
        "from-the-client.1": http_request("/v1/d1/small", {"X-Request-Id": "from-the-client.1"}),
        "in-small-letters": http_request("/v1/d1/none", {"x-request-id": "in-small-letters"}),
        "of-HEAD": http_request("/v1/d1/small", {"X-Request-Id": "of-HEAD"}, method="HEAD"),
        "offline": http_request("/v1/lost/small", {"X-Request-Id": "offline"}),
        "": http_request("/healthz"),
        " ": http_request("/healthz", {"X-Request-Id": "not fit"}),
        "bad": b"GET /healthz HTTP/1.1\r\nno header\r\n\r\n",
    }
    for number, (wanted, request) in enumerate(requests.items(), 1):
        with logging_server.server.connect() as connection:
            connection.send(request)
            _, headers, _ = connection.head("HEAD" if wanted == "of-HEAD" else "GET")
            connection.rest()
        assert headers.get_all("X-Request-Id") == [id_of(logging_server.entries(number)[-1])]
        if wanted.strip(" ") not in ("", "bad"):
            assert headers["X-Request-Id"] == wanted
        else:
            assert MADE.fullmatch(headers["X-Request-Id"])


def test_each_request_of_a_connection_has_its_own(logging_server: Logging) -> None:
    with logging_server.server.connect() as connection:
        for headers in ({"X-Request-Id": "first"}, {}, {}):
            connection.send(http_request("/healthz", headers, close=False))
            connection.response()
        connection.send(b"GET / HTTP/1.1\r\nno header\r\n\r\n")
        connection.rest()
    found = [id_of(each) for each in logging_server.entries(4)]
    assert found[0] == "first"
    assert len(set(found)) == 4


def test_a_line_of_the_line_protocol_has_one_too(logging_server: Logging) -> None:
    assert logging_server.server.line(b"7,0,some_file\n").endswith(b",some_file\n")
    (entry,) = logging_server.entries(1)
    assert MADE.fullmatch(id_of(entry))


@pytest.mark.parametrize("log_format", ["json"])
def test_an_entry_as_json(logging_server: Logging) -> None:
    server = logging_server.server
    body = server.http("/v1/d1/small", {"X-Request-Id": "x"}).body
    server.line(b"-7,20,some_file\n")
    server.line(b"+" + b"9" * 18 + b',0,\xff \x1b"{some_file\n')
    get, line, odd = map(json.loads, logging_server.entries(3))
    assert get.pop("bytes") > len(body)
    assert 0 < get.pop("seconds") < 60
    assert datetime.fromisoformat(get.pop("time")).utcoffset() == timedelta(0)
    assert get == {
        "logger": "diskread.access",
        "client": "127.0.0.1",
        "request": "GET /v1/d1/small HTTP/1.1",
        "status": 200,
        "request_id": "x",
    }
    assert (line["request"], line["status"]) == ("-7,20,some_file", -7)
    assert line["seconds"] >= 0.02
    assert odd["status"] == 10**18 - 1
    assert odd["request"].isprintable()


def test_seconds_are_those_of_the_request(logging_server: Logging) -> None:
    server = logging_server.server
    server.http("/0,50,some_file")
    with server.connect() as connection:
        connection.send(b"GET /healthz HTTP/1.1\r\nno header\r\n\r\n")
        connection.rest()
    for entry, least in zip(logging_server.entries(2), (0.05, 0), strict=True):
        seconds = json.loads(entry)["seconds"] if entry.startswith("{") else float(entry.split()[-2])
        assert least <= seconds < 60


# --- Without an access log ---


def test_without_a_log_only_who_asks_is_told_an_id(start_server: StartServer) -> None:
    server = start_server("--simulate")
    for target in ("/healthz", "/200,0,some_file"):
        assert "X-Request-Id" not in server.http(target).headers
        assert server.http(target, {"X-Request-Id": "mine"}).headers["X-Request-Id"] == "mine"
        assert MADE.fullmatch(server.http(target, {"X-Request-Id": "not fit"}).headers["X-Request-Id"])


# --- Standard error ---


def test_standard_error_as_json(start_server: StartServer, tree: Path) -> None:
    server = start_server("--log-format", "json", "--disk", f"d1={tree}", "--disk", "lost=/nowhere", "--simulate")
    server.line(b"0,1500,d1/small\n")
    until(lambda: "slow" in server.said(), "the slow read")
    assert server.stop() == 0
    entries = [json.loads(line) for line in server.said().splitlines()]
    assert all({"time", "level", "logger", "message"} <= entry.keys() for entry in entries)
    (offline,) = (entry for entry in entries if entry.get("state") == "offline")
    assert (offline["disk"], offline["level"], offline["logger"]) == ("lost", "WARNING", "diskread.server")
    assert "lost is offline: its root" in offline["message"]
    (slow,) = (entry for entry in entries if entry["logger"] == "diskread")
    assert slow["disk"] == "d1"


@pytest.fixture
def root_logger(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `configure` changes in this process is as before after the test."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    yield
    vars(gevent.get_hub()).pop("print_exception", None)


@pytest.mark.usefixtures("root_logger")
def test_what_failed_is_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json")
    try:
        raise ValueError("several\nlines")
    except ValueError as error:
        logging.getLogger("diskread.server").error("it %s", "failed \udcff", exc_info=error, extra={"request_id": "x"})
    gevent.spawn(lambda: 1 / 0).join()
    failed, greenlet = map(json.loads, capsys.readouterr().err.splitlines())
    assert (failed["message"], failed["request_id"]) == ("it failed \\udcff", "x")
    assert failed["exception"].endswith("ValueError: several\nlines")
    assert "ZeroDivisionError" in greenlet["exception"]
    assert greenlet["level"] == "ERROR"


@pytest.mark.usefixtures("root_logger")
def test_text_tells_of_the_request(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("text")
    log = logging.getLogger("diskread.server")
    log.error("it failed", extra={"request_id": "x"})
    log.error("it failed", extra={"request_id": None})
    log.info("said")
    first, second, third = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"[\d-]+ [\d:,]+ ERROR it failed \[request x\]", first)
    assert second.endswith(" ERROR it failed")
    assert third.endswith(" INFO said")


class Full(io.StringIO):
    def write(self, _text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_log_that_cannot_be_written_says_so() -> None:
    entry: tuple[Any, ...] = ("127.0.0.1", "GET / HTTP/1.1", "200", 1, 0.1, "x")
    with pytest.raises(OSError, match="No space"):
        AccessLog(Full(), "json").write(*entry)
