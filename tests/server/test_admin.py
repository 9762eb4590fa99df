"""The administrative socket and `diskread disk`: who may use them, what they do, and what they say when they cannot."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from click.testing import CliRunner

from diskread import Disk, Disks
from server.admin import AdminServer, AdminSocketError, create_app
from server.cli import main
from server.config import ConfigError, ServerConfig, check, load
from server.status import DiskDocument, StatusDocument
from tests.server.conftest import SMALL
from tests.server.raw_client import PATIENCE, ServerProcess, holding, http_request, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from click.testing import Result

    from tests.server.conftest import StartServer


@pytest.fixture
def path() -> Iterator[str]:
    """Where to make a socket; short, because paths of sockets are."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield f"{directory}/admin.sock"


@pytest.fixture
def admin(start_server: StartServer, tree: Path, path: str) -> ServerProcess:
    """A server with an administrative socket and two disks."""
    return start_server("--disk", f"d1={tree}", "--disk", f"d2={tree}", "--admin-socket", path)


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=PATIENCE)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(self._path)


def ask(path: str, method: str, target: str, body: bytes | None = None) -> tuple[int, bytes]:
    connection = _Connection(path)
    try:
        connection.request(method, target, body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def take_offline(path: str, name: str, reason: str = "to be replaced") -> DiskDocument:
    status, body = ask(path, "PUT", f"/disks/{name}/offline", json.dumps({"reason": reason}).encode())
    assert status == 200, body
    return msgspec.json.decode(body, type=DiskDocument)


def diskread(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(main, ["disk", *arguments], env={"DISKREAD_ADMIN_SOCKET": None, **environment})


# --- What it does ---


def test_offline_and_online_again_while_serving(admin: ServerProcess, path: str) -> None:
    assert admin.http("/v1/d1/small").body == SMALL
    document = take_offline(path, "d1")
    assert (document.name, document.state, document.reason) == ("d1", "offline", "by hand: to be replaced")
    assert (document.accepting, document.next_probe) == (False, None)
    response = admin.http("/v1/d1/small")
    assert response.status == 503
    assert "by hand: to be replaced" in json.loads(response.body)["description"]
    assert "Retry-After" not in response.headers, "nobody knows when"
    assert admin.http("/v1/d2/small").body == SMALL
    assert admin.http("/readyz").status == 200
    assert admin.disk("d1").reason == "by hand: to be replaced"

    status, body = ask(path, "PUT", "/disks/d1/online")
    assert (status, msgspec.json.decode(body, type=DiskDocument).state) == (200, "half-open")
    assert admin.http("/v1/d1/small").body == SMALL
    assert admin.disk("d1").state == "online"
    until(lambda: "disk d1 is back online after" in admin.said(), "the log to say so")
    said = admin.said()
    for line in (
        "INFO disk d1: an operator takes it offline",
        "WARNING disk d1 is offline: by hand: to be replaced",
        "INFO disk d1: an operator puts it online",
        "INFO disk d1 is half-open after ",
    ):
        assert line in said
    assert "disk d2 is" not in said


def test_with_every_disk_offline_the_server_is_not_ready(admin: ServerProcess, path: str) -> None:
    for name in ("d1", "d2"):
        take_offline(path, name)
    assert admin.http("/readyz").status == 503
    assert admin.http("/healthz").status == 200


def test_a_second_reason_replaces_the_first(admin: ServerProcess, path: str) -> None:
    take_offline(path, "d1", "first")
    assert take_offline(path, "d1", "second").reason == "by hand: second"
    until(lambda: "disk d1 is offline: by hand: second" in admin.said(), "the log to say so")


def test_online_of_a_disk_that_is_online_changes_nothing(admin: ServerProcess, path: str) -> None:
    before = admin.disk("d1").changes
    status, body = ask(path, "PUT", "/disks/d1/online")
    assert (status, json.loads(body)["state"]) == (200, "online")
    assert admin.disk("d1").changes == before


def test_lists_the_disks(admin: ServerProcess, path: str) -> None:
    status, body = ask(path, "GET", "/disks")
    assert status == 200
    assert [disk.name for disk in msgspec.json.decode(body, type=StatusDocument).disks] == ["d1", "d2"]


def test_the_line_protocol_refuses_a_disk_that_is_offline(start_server: StartServer, tree: Path, path: str) -> None:
    server = start_server("--simulate", "--disk", f"d1={tree}", "--admin-socket", path)
    take_offline(path, "d1")
    assert server.line(b"0,0,d1/small\n").startswith(b"3,")
    take_offline(path, "simulated")
    assert server.line(b"0,0,x\n").startswith(b"3,")
    assert ask(path, "PUT", "/disks/simulated/online")[0] == 200
    assert server.line(b"0,0,x\n").startswith(b"0,")


# --- Who may use it ---


@pytest.mark.parametrize(
    ("method", "target"), [("PUT", "/disks/d1/offline"), ("PUT", "/disks/d1/online"), ("GET", "/disks")]
)
def test_the_public_port_has_no_such_path(admin: ServerProcess, method: str, target: str) -> None:
    with admin.connect() as connection:
        body = b'{"reason": "mischief"}'
        connection.send(http_request(target, {"Content-Length": str(len(body))}, method=method) + body)
        assert connection.response().status == 404
    assert admin.disk("d1").state == "online"


def test_the_socket_is_for_its_owner_alone(start_server: StartServer, tree: Path, path: str, tmp_path: Path) -> None:
    # Whatever the umask: one that takes nothing away must not open it.
    server = start_server("--disk", f"d1={tree}", "--admin-socket", path, umask=0)
    found = os.lstat(path)
    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_uid == os.geteuid()
    assert server.stop() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_another_user_is_told_who_may(admin: ServerProcess, path: str) -> None:
    # It becomes the other user when all is imported: others may not be allowed to read this Python's files.
    program = (
        "import os, sys\n"
        "from server.cli import main\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "main(['disk', 'list', '--socket', sys.argv[1]])\n"
    )
    command = [sys.executable, "-c", program, path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 2
    assert f"no permission to open {path}" in done.stderr
    assert "sudo" in done.stderr


# --- The file ---


def test_without_the_option_there_is_none(start_server: StartServer, tree: Path) -> None:
    assert "administrative socket" not in start_server("--disk", f"d1={tree}").said()


def test_is_removed_at_the_end(admin: ServerProcess, path: str) -> None:
    assert f"administrative socket at {path}" in admin.said()
    assert admin.stop() == 0
    assert not os.path.lexists(path)


def test_the_socket_of_a_dead_server_is_replaced(
    admin: ServerProcess, start_server: StartServer, tree: Path, path: str
) -> None:
    admin.kill()
    assert os.path.lexists(path)
    assert diskread("list", "--socket", path).exit_code == 2
    start_server("--disk", f"d3={tree}", "--admin-socket", path)
    assert take_offline(path, "d3").state == "offline"


def test_the_socket_of_a_living_server_is_not(admin: ServerProcess, path: str) -> None:
    command = [sys.executable, "-m", "server", "serve", "--port", "0", "--admin-socket", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1
    assert f"another server has the administrative socket {path}" in done.stderr
    assert "--admin-socket" in done.stderr
    assert "Traceback" not in done.stderr
    assert take_offline(path, "d1").state == "offline", "the first one has it still"


def test_a_successor_can_have_it_while_requests_are_under_way(start_server: StartServer, path: str) -> None:
    first = start_server("--simulate", "--admin-socket", path)
    with holding(first, b"0,2000,x\n") as connection:
        until(lambda: first.disk("simulated").in_flight == 1, "the request to begin")
        first.process.send_signal(signal.SIGTERM)
        until(lambda: "the port is free" in first.said(), "the drain to begin")
        start_server("--simulate", "--admin-socket", path, port=first.port)
        assert connection.rest().startswith(b"0,2")
    assert first.wait() == 0
    assert ask(path, "GET", "/disks")[0] == 200, "the first one has not removed the socket of the second"


def test_removes_no_socket_but_its_own(path: str) -> None:
    server = AdminServer(path, create_app(Disks([]), simulate=False))
    os.unlink(path)
    with AdminServer(path, create_app(Disks([]), simulate=False)):
        server.close()
        assert os.path.lexists(path)
    assert not os.path.lexists(path)


def test_a_file_that_is_no_socket_is_left_alone(path: str) -> None:
    Path(path).write_text("precious")
    with pytest.raises(AdminSocketError, match="exists and is no socket"):
        AdminServer(path, create_app(Disks([]), simulate=False))
    assert Path(path).read_text() == "precious"


def test_a_directory_that_is_not_there_is_said_so(path: str) -> None:
    with pytest.raises(AdminSocketError, match=r"cannot make .*: No such file or directory; make its directory"):
        AdminServer(f"{path}/admin.sock", create_app(Disks([]), simulate=False))


# --- Wrong requests ---


@pytest.mark.parametrize(
    ("method", "target", "body", "status", "says"),
    [
        ("PUT", "/disks/nope/offline", b'{"reason": "x"}', 404, "there are: d1"),
        ("PUT", "/disks/nope/online", None, 404, "there are: d1"),
        ("PUT", "/disks/d1/offline", None, 400, "the body must be"),
        ("PUT", "/disks/d1/offline", b"to be replaced", 400, "the body must be"),
        ("PUT", "/disks/d1/offline", b"[]", 400, "the body must be"),
        ("PUT", "/disks/d1/offline", b"{}", 400, "reason"),
        ("PUT", "/disks/d1/offline", b'{"reason": 5}', 400, "the body must be"),
        ("PUT", "/disks/d1/offline", b'{"reason": "x", "until": "y"}', 400, "until"),
        ("PUT", "/disks/d1/offline", b'{"reason": " "}', 400, "one line of 1 to 500"),
        ("PUT", "/disks/d1/offline", b'{"reason": "a\\n2026-01-01 INFO forged"}', 400, "one line of 1 to 500"),
        ("PUT", "/disks/d1/offline", b'{"reason": "' + b"x" * 501 + b'"}', 400, "one line of 1 to 500"),
        ("PUT", "/disks/d1/offline", b'{"reason": "' + b"x" * 100_000 + b'"}', 400, "the body must be"),
        ("GET", "/disks/d1/offline", None, 405, ""),
        ("POST", "/disks/d1/online", None, 405, ""),
        ("PUT", "/disks", None, 405, ""),
        ("PUT", "/disks/d1/sideways", None, 404, ""),
        ("GET", "/v1/d1/small", None, 404, ""),
    ],
)
def test_a_wrong_request_is_said_so_and_changes_nothing(
    path: str, tree: Path, method: str, target: str, body: bytes | None, status: int, says: str
) -> None:
    from falcon.testing import TestClient

    disks = Disks([Disk("d1", tree)])
    result = TestClient(create_app(disks, simulate=False)).simulate_request(method, target, body=body)
    assert result.status_code == status
    assert says in result.text
    assert (disks["d1"].status.load.state.value, disks["d1"].status.load.changes) == ("online", 0)


def test_who_does_not_speak_http_harms_nobody(admin: ServerProcess, path: str) -> None:
    silent = socket.socket(socket.AF_UNIX)
    silent.connect(path)
    for rubbish in (b"\0\xff\n", b"GET\n\n", b"PUT /disks/d1/offline HTTP/1.1\r\nContent-Length: 99\r\n\r\n{"):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            sock.sendall(rubbish)
    assert ask(path, "GET", "/disks")[0] == 200
    assert admin.disk("d1").state == "online"
    assert admin.stop() == 0, "it does not wait for a client that says nothing"
    silent.close()


# --- diskread disk ---


def test_the_command_takes_a_disk_offline_and_back(admin: ServerProcess, path: str) -> None:
    result = diskread("offline", "d1", "--reason", "to be replaced", "--socket", path)
    assert (result.exit_code, result.output) == (0, "d1 is offline: by hand: to be replaced\n")
    assert admin.http("/v1/d1/small").status == 503
    listed = diskread("list", DISKREAD_ADMIN_SOCKET=path)
    assert listed.exit_code == 1, "a disk refuses"
    assert "d1: offline for 0 s: by hand: to be replaced" in listed.output
    shown = CliRunner().invoke(main, ["status", admin.url])
    assert shown.exit_code == 1
    assert "d1: offline for" in shown.output
    result = diskread("online", "d1", "--socket", path)
    assert (result.exit_code, result.output) == (0, "d1 is half-open: one request at a time may try\n")
    assert admin.http("/v1/d1/small").status == 200
    assert diskread("list", "--socket", path).exit_code == 0


def test_the_command_tells_what_is_still_under_way(start_server: StartServer, tree: Path, path: str) -> None:
    server = start_server("--simulate", "--disk", f"d1={tree}", "--admin-socket", path)
    with holding(server, b"0,60000,d1/small\n"):
        until(lambda: server.disk("d1").in_flight == 1, "the stall to begin")
        result = diskread("offline", "d1", "--reason", "x", "--socket", path)
    assert "1 operations on it are still under way" in result.output


def test_the_command_speaks_json(admin: ServerProcess, path: str) -> None:
    documents = [
        json.loads(diskread(*arguments, "--json", "--socket", path).output)
        for arguments in (["offline", "d1", "--reason", "x"], ["list"], ["online", "d1"])
    ]
    assert documents[0]["reason"] == "by hand: x"
    assert [disk["state"] for disk in documents[1]["disks"]] == ["offline", "online"]
    assert documents[2]["state"] == "half-open"


def test_the_command_finds_the_socket_in_the_configuration(
    start_server: StartServer, tree: Path, path: str, tmp_path: Path
) -> None:
    file = tmp_path / "diskread.toml"
    file.write_text(f'admin_socket = "{path}"\n[disk.d1]\nroot = "{tree}"\n')
    server = start_server("--config", str(file))
    # What is said on the command line wins over the environment.
    result = diskread("offline", "d1", "--reason", "x", "--config", str(file), DISKREAD_ADMIN_SOCKET="/nowhere")
    assert result.exit_code == 0, result.output
    assert server.disk("d1").state == "offline"
    file.write_text("port = 7000\n")
    result = diskread("list", "--config", str(file))
    assert result.exit_code == 2
    assert "names no admin_socket" in result.output


def test_an_unknown_disk_is_said_so_with_those_there_are(admin: ServerProcess, path: str) -> None:
    for arguments in (["offline", "ü %41?", "--reason", "x"], ["online", "nope"], ["online", ""]):
        result = diskread(*arguments, "--socket", path)
        assert result.exit_code == 1
        assert f"there is no disk called {arguments[1]}; there are: d1, d2" in result.output
    result = diskread("online", "d1/small", "--socket", path)
    assert result.exit_code == 1
    assert "there is no disk called d1/small" in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["list"], "--socket PATH"),
        (["list", "--socket", "/nowhere/admin.sock"], "is the server running, with --admin-socket"),
        (["list", "--socket", "/" + "x" * 200], "too long"),
        (["list", "--config", "/nowhere/diskread.toml"], "cannot be read"),
        (["offline", "d1", "--socket", "/nowhere"], "--reason"),
        (["offline", "--reason", "x"], "NAME"),
        (["online"], "NAME"),
        (["sideways"], "No such command"),
    ],
)
def test_says_when_it_cannot_ask(arguments: list[str], says: str) -> None:
    result = diskread(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert says in result.output


@pytest.mark.parametrize("reply", [b"", b"SSH-2.0\r\n", b"HTTP/1.1 200 OK\r\n\r\n[]", b"HTTP/1.1 404 No\r\n\r\nno"])
def test_a_socket_of_somebody_else_is_said_so(path: str, reply: bytes) -> None:
    program = (
        "import socket, sys\n"
        "listening = socket.socket(socket.AF_UNIX)\n"
        "listening.bind(sys.argv[1]); listening.listen(); print(flush=True)\n"
        "connection, _ = listening.accept()\n"
        "connection.recv(9999); connection.sendall(bytes.fromhex(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", program, path, reply.hex()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        result = diskread("list", "--socket", path)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit), result.exception


@pytest.mark.parametrize("name", ["offline", "online", "list"])
def test_help_explains(name: str) -> None:
    result = diskread(name, "--help")
    assert result.exit_code == 0
    for text in ("Exit status", "--socket PATH", "--config FILE", "DISKREAD_ADMIN_SOCKET", "--json"):
        assert text in result.output


# --- The configuration ---


def test_a_path_that_cannot_be_is_said_so(tmp_path: Path) -> None:
    assert ServerConfig().admin_socket is None
    assert check(ServerConfig(admin_socket="/" + "x" * 106)).admin_socket
    for wrong, says in (("", "must be a path"), ("a\0b", "must be a path"), ("é" * 54, "at most 107 bytes")):
        with pytest.raises(ConfigError, match=f"admin_socket: .*{says}"):
            check(ServerConfig(admin_socket=wrong))
    file = tmp_path / "diskread.toml"
    file.write_text("\nadmin_socket = 5\n")
    with pytest.raises(ConfigError, match=r"diskread\.toml:2: admin_socket: expected"):
        load(file)
