"""Who may ask for what: tokens, TLS, connections of one client."""

from __future__ import annotations

import base64
import hmac
import http.client
import os
import shutil
import socket
import ssl
import subprocess
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from server import access
from server.cli import main
from server.config import ConfigError
from tests.server.conftest import SMALL
from tests.server.raw_client import PATIENCE, until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.server.conftest import StartServer
    from tests.server.raw_client import ServerProcess

SEGMENTS = st.binary(min_size=1, max_size=3).filter(lambda each: b"/" not in each and each not in (b".", b".."))


def table(name: str, *allow: str) -> str:
    allowed = ", ".join(f'"{each}"' for each in allow)
    return f'[token.{name}]\nsha256 = "{access.digest(secret(name).encode()).hex()}"\nallow = [{allowed}]\n'


def secret(name: str) -> str:
    return f"secret-of-{name}"


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret(name)}"}


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.toml"
    path.write_text(
        table("whole", "d1") + table("part", "d1/directory/") + table("views", "status") + table("stall", "simulated")
    )
    return path


@pytest.fixture
def guarded(start_server: StartServer, tokens: Path, tree: Path) -> ServerProcess:
    return start_server("--disk", f"d1={tree}", "--disk", f"d2={tree}", "--simulate", "--tokens", str(tokens))


# --- Prefixes and files ---


@given(st.lists(SEGMENTS, max_size=3), st.lists(SEGMENTS, max_size=5))
def test_a_prefix_matches_whole_segments_and_nothing_else(below: list[bytes], path: list[bytes]) -> None:
    prefix = access.Prefix(b"d", tuple(below))
    assert prefix.matches(b"d", b"/".join(path)) is (path[: len(below)] == below and (bool(path) or not below))
    assert not prefix.matches(b"e", b"/".join(path))


@given(
    st.lists(SEGMENTS, min_size=1, max_size=3),
    st.lists(st.one_of(SEGMENTS, st.sampled_from([b"", b".", b".."])), max_size=5),
)
def test_no_path_that_is_not_plain_is_below_a_prefix(below: list[bytes], rest: list[bytes]) -> None:
    matches = access.Prefix(b"d", tuple(below)).matches(b"d", b"/".join([*below, *rest]))
    assert matches is not bool({b"", b".", b".."} & set(rest))


@pytest.mark.parametrize("text", ["", "/", "/d1", "d1//a", "d1/../d2", "d1/.", "..", "status/x", "d1/a//", "d1/a\0"])
def test_what_is_no_prefix(text: str) -> None:
    with pytest.raises(ValueError, match=r"segment|begin|views"):
        access.prefix(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[token.a]\nsha256 = 'ab'\nallow = ['d1']", r":2: token\.a\.sha256: .*64"),
        (table("a"), r":3: token\.a\.allow: allows nothing"),
        (table("a", "d1/../x"), r":3: token\.a\.allow: .*segment"),
        (table("a", "d1") + "more = 1", r":4: token\.a\.more: there is no such key"),
        ("[token.a]\nallow = ['d1']", r"sha256 is missing"),
        ("token = 1", "table of its own"),
        ("[tokens.a]", "tables"),
        ("[token", "not TOML"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        access.load(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        access.load(tmp_path / "none.toml")


def test_every_token_is_compared_even_after_the_right_one(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    original = hmac.compare_digest

    def compare(left: bytes, right: bytes) -> bool:
        compared.append(left)
        return bool(original(left, right))

    monkeypatch.setattr(hmac, "compare_digest", compare)
    loaded = access.load(tokens)
    found = access.find(loaded, secret("whole").encode())
    assert found is loaded[0]
    assert len(compared) == len(loaded) == 4
    assert access.find(loaded, b"another") is None
    assert len(compared) == 8


# --- A server with tokens ---


@pytest.mark.parametrize("path", ["/v1/d1/small", "/", "/status", "/metrics", "/events", "/0,0,x", "/none", "//status"])
@pytest.mark.parametrize(
    "header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer"}, {"Authorization": "Basic !"}]
)
def test_nothing_without_a_token(guarded: ServerProcess, path: str, header: dict[str, str]) -> None:
    response = guarded.http(path, header)
    assert response.status == 401
    assert response.headers["WWW-Authenticate"].startswith("Bearer")


def test_what_is_public_and_what_tokens_allow(guarded: ServerProcess) -> None:
    for path, name, status in [
        ("/healthz", None, 200),
        ("/readyz", None, 200),
        ("/v1/d1/small", "whole", 200),
        ("/v1/d2/small", "whole", 403),
        ("/v1/d1/none", "whole", 404),
        ("/v1/d1/directory/inner", "part", 200),
        ("/v1/d1/directory/none", "part", 404),
        ("/status", "views", 200),
        ("/metrics", "views", 200),
        ("/", "views", 200),
        ("/v1/d1/small", "views", 403),
        ("/status", "whole", 403),
        ("/0,0,some_file", "stall", 200),
        ("/0,0,some_file", "whole", 403),
        ("/0,0,d1/small", "stall", 403),
    ]:
        assert guarded.http(path, {} if name is None else bearer(name)).status == status, (path, name)


@pytest.mark.parametrize(
    "path",
    [
        "small",
        "none",
        "directory/../small",
        "directory/%2e%2e/small",
        "directory/..%2Fsmall",
        "directory%2F..%2Fsmall",
        "directory//../small",
        "./directory/inner",
        "/directory/inner",
        "directoryx",
        "directory",
    ],
)
def test_no_way_around_a_prefix(guarded: ServerProcess, path: str) -> None:
    allowed = path == "directory"  # it is below itself, and no file
    for target in (f"/v1/d1/{path}", f"http://localhost/v1/d1/{path}"):
        assert guarded.http(target, bearer("part")).status == (404 if allowed else 403)


@pytest.mark.parametrize(
    "target", ["//v1/d2/small", "//status", "/%2Fstatus", "//healthz", "/v1//d2/small", "/status/"]
)
def test_lenient_routers_are_no_way_around(guarded: ServerProcess, target: str) -> None:
    assert guarded.http(target, bearer("whole")).status in (403, 404)


def test_a_browser_shows_its_token_as_a_password(guarded: ServerProcess) -> None:
    pair = base64.b64encode(f"operator:{secret('views')}".encode()).decode()
    assert guarded.http("/status", {"Authorization": f"Basic {pair}"}).status == 200


def test_the_line_protocol_has_no_place_for_a_token(guarded: ServerProcess) -> None:
    assert guarded.line(b"0,0,d1/small\n") == b"5,0,d1/small\n"
    assert guarded.line(b"0,0,some_file\n") == b"5,0,some_file\n"


def test_a_changed_file_counts_and_a_broken_one_does_not(guarded: ServerProcess, tokens: Path) -> None:
    new = tokens.with_suffix(".new")
    new.write_text(table("fresh", "d1"))
    os.replace(new, tokens)
    until(lambda: guarded.http("/v1/d1/small", bearer("fresh")).status == 200, "the new tokens")
    assert guarded.http("/v1/d1/small", bearer("whole")).status == 401
    tokens.write_text("[token")
    until(lambda: "the tokens stay what they were" in guarded.said(), "the complaint")
    assert guarded.http("/v1/d1/small", bearer("fresh")).status == 200


def test_the_command_makes_what_the_file_takes(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["token", "a.b", "--allow", "d1", "--allow", "d1/x y/"])
    assert result.exit_code == 0, result.output
    path = tmp_path / "tokens.toml"
    path.write_text(result.stderr)
    found = access.find(access.load(path), result.stdout.strip().encode())
    assert found is not None
    assert found.name == "a.b"
    assert found.allows(b"d1", b"small")
    assert CliRunner().invoke(main, ["token", "a", "--allow", "d1/../d2"]).exit_code == 2


# --- Connections of one client, warnings ---


def test_one_connection_too_many_of_a_client(start_server: StartServer) -> None:
    server = start_server("--simulate", "--connections-per-client", "2")
    first, second = server.connect(), server.connect()
    with first, second:
        for each in (first, second):  # served, not just in the backlog
            each.send(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
            assert each.response().status == 200
        with server.connect() as third:
            assert third.response().status == 503
            assert third.rest() == b""
    until(lambda: _answers(server), "the connections to be given back")


def _answers(server: ServerProcess) -> bool:
    with server.connect() as connection:
        connection.send(b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        return connection.response().status == 200


def test_listening_to_others_without_tokens_and_tls_warns(start_server: StartServer, tree: Path) -> None:
    server = start_server("--disk", f"d1={tree}", "--host", "0.0.0.0")
    until(lambda: "--tls-certificate" in server.said(), "the warnings")
    assert "--tokens" in server.said()


def test_loopback_warns_of_nothing(guarded: ServerProcess) -> None:
    assert "WARNING" not in guarded.said()


# --- TLS ---


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    directory = tmp_path_factory.mktemp("tls")
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-out", str(certificate), "-keyout", str(key)], check=True, capture_output=True)
    return certificate, key


@pytest.mark.parametrize("workers", [[], ["--workers", "2"]])
def test_tls(
    start_server: StartServer, tree: Path, tokens: Path, certificate: tuple[Path, Path], workers: list[str]
) -> None:
    files = ["--tls-certificate", str(certificate[0]), "--tls-key", str(certificate[1])]
    more = ["--tokens", str(tokens), "--request-timeout", "2", *workers]
    server = start_server("--disk", f"d1={tree}", *files, *more)
    # A client that never begins its handshake holds up nobody, and is hung up on.
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as silent:
        context = ssl.create_default_context(cafile=str(certificate[0]))
        connection = http.client.HTTPSConnection("127.0.0.1", server.port, timeout=PATIENCE, context=context)
        for path, expected in [("small", SMALL), ("large", (tree / "large").read_bytes())]:
            connection.request("GET", f"/v1/d1/{path}", headers=bearer("whole"))
            assert connection.getresponse().read() == expected
        assert silent.recv(1) == b""
    result = CliRunner().invoke(
        main, ["status", f"https://127.0.0.1:{server.port}", "--ca", str(certificate[0]), "--token", secret("views")]
    )
    assert result.exit_code == 0, result.output
    # Ending it hangs up on the idle connection, in order.
    assert server.stop() == 0, server.said()
    connection.close()
    assert "Traceback" not in server.said()


def test_a_certificate_needs_its_key(certificate: tuple[Path, Path]) -> None:
    result = CliRunner().invoke(main, ["serve", "--tls-certificate", str(certificate[0])])
    assert result.exit_code == 2
    assert "tls_key" in result.output
