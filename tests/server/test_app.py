"""The WSGI application: the experiment over HTTP, and what it is in a server other than ours."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest
from falcon.testing import TestClient

from diskread import Disk, DiskIOError, Disks, Limits
from server.app import create_app
from server.config import ConfigError
from server.simulate import SIMULATED
from tests.server.conftest import LARGE, SMALL

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.server.raw_client import ServerProcess

# --- GET /RC,MS,PATH ---


@pytest.mark.parametrize("target", ["/200,10,some_file", "/0,10,d1/small", "/-5,10,x", "/+5,+10,x", "/200,10,x?query"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_answers_the_second_generation(server: ServerProcess, target: str, version: str) -> None:
    response = server.http(target, version=version)
    assert response.status == 200
    total, _, path = response.body.partition(b",")
    assert int(total) >= 10
    assert path.decode() == target.partition("?")[0].split(",", 2)[2]
    assert response.headers["Content-Length"] == str(len(response.body))
    assert response.headers["Content-Type"].startswith("text/plain")
    assert response.headers["Connection"] == "close"


def test_echoes_the_path_unescaped(server: ServerProcess) -> None:
    assert re.fullmatch(rb"\d+,a b\xff/\xc3\xa9", server.http("/0,0,a%20b%FF/%C3%A9").body)
    assert re.fullmatch(rb"\d+,x", server.http("/%30%2C0%2cx").body)


@pytest.mark.parametrize(
    "target",
    ["/x,10,y", "/0,x,y", "/0,-1,y", "/0,1.5,y", "/0,3600001,y", "/0,1", "/0,1,", "/,,", "/0,1,a,b", "/0,1,a%2Cb"],
)
def test_bad_input_is_400(server: ServerProcess, target: str) -> None:
    response = server.http(target)
    assert response.status == 400
    assert json.loads(response.body)["title"] == "Bad input"
    assert json.loads(response.body)["description"]


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE"])
def test_only_get_stalls(server: ServerProcess, method: str) -> None:
    response = server.http("/0,60000,some_file", method=method)
    assert response.status == 405
    assert response.headers["Allow"] == "GET"


@pytest.mark.parametrize(("target", "status"), [("/0,0,d1/missing", 404), ("/0,0,d1/../x", 403), ("/0,0,lost/x", 503)])
def test_a_file_that_cannot_be_read_has_its_own_status(server: ServerProcess, target: str, status: int) -> None:
    assert server.http(target).status == status


# --- In any server ---


@pytest.fixture
def disk(tree: Path) -> Disk:
    return Disk("d1", tree, Limits(threads=2))


@pytest.fixture
def client(disk: Disk) -> TestClient:
    return TestClient(create_app(Disks([disk, Disk(SIMULATED, None)])))


Call = tuple[str, dict[str, str], bytes]


def call(app: Callable[..., Any], target: str, method: str = "GET", **environ: str) -> Call:
    """Call a WSGI application as a server would that checks everything: PEP 3333."""
    environment: dict[str, Any] = {"SCRIPT_NAME": "", "PATH_INFO": target, "REQUEST_METHOD": method, **environ}
    environment["QUERY_STRING"] = ""
    setup_testing_defaults(environment)
    answer: list[Any] = []

    def start_response(status: str, headers: list[tuple[str, str]], _exc_info: object = None) -> Callable[..., None]:
        answer[:] = [status, dict(headers)]
        return lambda _data: None

    body = validator(app)(environment, start_response)
    try:
        content = b"".join(body)
    finally:
        body.close()  # type: ignore[attr-defined]
    return answer[0], answer[1], content


@pytest.mark.parametrize(
    ("target", "method", "status"),
    [
        ("/v1/d1/small", "GET", 200),
        ("/v1/d1/large", "GET", 200),
        ("/v1/d1/empty", "GET", 200),
        ("/v1/d1/large", "HEAD", 200),
        ("/v1/d1/missing", "GET", 404),
        ("/v1/d1/missing", "HEAD", 404),
        ("/v1/d1/small", "POST", 405),
        ("/0,1,some_file", "GET", 200),
        ("/0,1", "GET", 400),
        ("/", "GET", 200),
        ("/status", "GET", 200),
        ("/metrics", "GET", 200),
        ("/healthz", "GET", 200),
        ("/readyz", "GET", 200),
    ],
)
def test_keeps_to_the_rules_of_wsgi(disk: Disk, target: str, method: str, status: int) -> None:
    told, headers, body = call(create_app(Disks([disk, Disk(SIMULATED, None)])), target, method)
    assert told.startswith(f"{status} ")
    if method == "HEAD":
        assert body == b""
    else:
        assert len(body) == int(next(value for name, value in headers.items() if name.lower() == "content-length"))


def test_a_conditional_request_keeps_to_the_rules_of_wsgi(disk: Disk) -> None:
    told, _, body = call(create_app(Disks([disk])), "/v1/d1/small", HTTP_IF_NONE_MATCH="*")
    assert (told, body) == ("304 Not Modified", b"")
    told, _, body = call(create_app(Disks([disk])), "/v1/d1/large", HTTP_RANGE="bytes=-5")
    assert (told, body) == ("206 Partial Content", LARGE[-5:])


def test_a_body_that_is_never_sent_closes_its_file(disk: Disk) -> None:
    environment: dict[str, Any] = {"SCRIPT_NAME": "", "PATH_INFO": "/v1/d1/large"}
    setup_testing_defaults(environment)
    body = create_app(Disks([disk]))(environment, lambda *_: lambda _data: None)
    body.close()  # type: ignore[attr-defined]  # a file left open warns, and warnings are errors


def test_a_bug_of_ours_tells_the_client_nothing(
    client: TestClient, disk: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the secret")

    monkeypatch.setattr(disk, "open", fail)
    result = client.simulate_get("/v1/d1/small")
    assert result.status_code == 500
    assert "secret" not in result.text
    assert "GET /v1/d1/small failed" in caplog.text
    assert "the secret" in caplog.text


def test_an_io_error_is_500_and_in_the_log(
    client: TestClient, disk: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise DiskIOError("d1", b"small", "read failed: Input/output error")

    monkeypatch.setattr(disk, "open", fail)
    result = client.simulate_get("/v1/d1/small")
    assert result.status_code == 500
    assert "Input/output error" in result.json["description"]
    assert "d1/small: read failed" in caplog.text


def test_takes_its_configuration_from_the_environment(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "diskread.toml"
    monkeypatch.setenv("DISKREAD_CONFIG", str(file))
    with pytest.raises(ConfigError, match=r"diskread\.toml"):
        create_app()
    file.write_text(f'[disk.here]\nroot = "{tree}"\n')
    client = TestClient(create_app())
    assert client.simulate_get("/v1/here/small").content == SMALL
    assert client.simulate_get("/0,1,some_file").status_code == 400


def test_without_a_configuration_it_simulates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISKREAD_CONFIG", raising=False)
    assert TestClient(create_app()).simulate_get("/0,1,some_file").status_code == 200
