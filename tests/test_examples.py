"""The examples: each is started as its first lines say, and asked."""

from __future__ import annotations

import http.client
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import pytest

from .conftest import LARGE, SMALL, until

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = Path(__file__).parent.parent / "examples"
SERVERS = {"pywsgi_server": "gevent", "flask_application": "flask", "falcon_application": "falcon"}


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes


class Client:
    """Asks a server that was started."""

    def __init__(self, url: str) -> None:
        self._url = urlsplit(url)

    def __call__(self, path: str, headers: dict[str, str] | None = None, method: str = "GET") -> Answer:
        assert self._url.port is not None
        connection = http.client.HTTPConnection("127.0.0.1", self._url.port, timeout=30)
        try:
            connection.request(method, self._url.path + path, headers=headers or {})
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()


@pytest.fixture(params=SERVERS)
def ask(request: pytest.FixtureRequest, root: Path) -> Iterator[Client]:
    """Each of the servers, on a free port."""
    needed = SERVERS[request.param]
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    program = EXAMPLES / f"{request.param}.py"
    with subprocess.Popen(
        [sys.executable, program, root, "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        try:
            url = server.stdout.readline().strip()
            assert url, server.stderr.read()
            yield Client(url)
        finally:
            server.terminate()
        assert "Traceback" not in server.stderr.read()


def test_a_server_sends_files_and_what_a_request_wants_of_them(ask: Client, root: Path) -> None:
    for name, content in (("small", SMALL), ("large", LARGE), ("empty", b""), ("directory/inner", b"inner")):
        whole = ask(name)
        assert (whole.status, whole.body) == (200, content)
        assert whole.headers["Content-Length"] == str(len(content))
        assert whole.headers["Content-Type"] == "application/octet-stream"
        head = ask(name, method="HEAD")
        assert (head.status, head.body) == (200, b"")
        for header in ("Content-Length", "Content-Type", "ETag", "Last-Modified"):
            assert head.headers[header] == whole.headers[header]
        fresh = ask(name, {"If-None-Match": whole.headers["ETag"]})
        assert (fresh.status, fresh.body) == (304, b"")
        assert "Content-Type" not in fresh.headers
    (root / "Zoë 1.png").write_bytes(b"picture")
    picture = ask("Zo%C3%AB%201.png")
    assert (picture.body, picture.headers["Content-Type"]) == (b"picture", "image/png")
    part = ask("large", {"Range": "bytes=100000-399999"})
    assert (part.status, part.body) == (206, LARGE[100_000:400_000])
    assert part.headers["Content-Range"] == f"bytes 100000-399999/{len(LARGE)}"
    assert ask("small", {"Range": "bytes=-1"}).body == SMALL[-1:]


def test_a_server_says_what_the_disk_said(ask: Client, root: Path) -> None:
    missing = ask("missing")
    assert missing.status == 404
    assert b"photos/missing" in missing.body
    assert ask("directory").status == 404
    (root / "out").symlink_to("/etc/hostname")
    assert ask("out").status == 403
    assert ask("x" * 300).status == 400
    beyond = ask("small", {"Range": "bytes=9999-"})
    assert (beyond.status, beyond.headers["Content-Range"]) == (416, f"bytes */{len(SMALL)}")
    assert ask("small", {"If-Match": '"other"'}).status == 412
    assert ask("small", method="POST").status == 405
    root.rename(root.with_name("elsewhere"))
    assert ask("small").status == 200, "the disk is still there"


def test_a_server_says_when_the_disk_is_not_there(ask: Client, root: Path) -> None:
    root.rename(root.with_name("elsewhere"))  # before the first request
    lost = ask("small")
    assert lost.status == 503
    assert b"root directory" in lost.body
    until(lambda: "Retry-After" in ask("small").headers, "the disk to be offline, and probes to be due")


def test_the_gevent_application_checks_archives(tmp_path: Path) -> None:
    roots = [tmp_path / "a", tmp_path / "b"]
    for root in roots:
        root.mkdir()
        with zipfile.ZipFile(root / "sound.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("member", LARGE)
    damaged = bytearray((roots[0] / "sound.zip").read_bytes())
    damaged[100] ^= 0xFF
    (roots[0] / "damaged.zip").write_bytes(damaged)
    (roots[0] / "none.zip").write_bytes(b"no archive")
    (roots[1] / "directory.zip").mkdir()
    program: list[str | Path] = [sys.executable, EXAMPLES / "gevent_application.py", *roots, tmp_path / "nowhere"]
    result = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    said = dict(line.removeprefix(f"{tmp_path}/").split(": ", 1) for line in result.stdout.splitlines())
    assert said.pop("a/sound.zip") == said.pop("b/sound.zip") == "sound"
    assert said.pop("a/damaged.zip").startswith("damaged")
    assert said.pop("a/none.zip") == "damaged: File is not a zip file"
    assert said.pop("b/directory.zip").startswith("not checked")
    assert said.pop("nowhere").startswith("not checked")
    assert not said
