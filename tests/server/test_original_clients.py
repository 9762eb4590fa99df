"""The clients of the original experiment: netcat, ab, siege and curl. And a thousand of them at once."""

from __future__ import annotations

import re
import resource
import shutil
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.server.conftest import SMALL
from tests.server.raw_client import PATIENCE, ServerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.server.conftest import StartServer


def run(*command: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run a program; skip the test where there is none."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, timeout=60, check=False, **options)


@pytest.mark.parametrize(
    ("options", "request_"),
    # Without -N, nothing but a newline would tell the server that the line is complete.
    [([], "0,10,some_file\n"), (["-N"], "0,10,some_file\n"), (["-N"], "0,10,some_file")],
    ids=["nc", "nc -N", "nc -N without a newline"],
)
def test_netcat(server: ServerProcess, tmp_path: Path, options: list[str], request_: str) -> None:
    if options and b"-N" not in run("nc", "-h").stderr:
        pytest.skip("this nc has no -N")
    file = tmp_path / "request"
    file.write_text(request_)
    with file.open() as stdin:
        done = run("nc", *options, "127.0.0.1", str(server.port), stdin=stdin)
    assert done.returncode == 0
    assert re.fullmatch(rb"0,\d+,some_file\n", done.stdout)


def test_netcat_one_after_the_other(server: ServerProcess) -> None:
    """As the original's shell script does it, with the request of its test file made shorter."""
    for _ in range(20):
        done = run("nc", "127.0.0.1", str(server.port), input=b"0,5,some_file\n")
        assert re.fullmatch(rb"0,\d+,some_file\n", done.stdout)


@pytest.mark.parametrize("options", [[], ["-k"]], ids=["close", "keep-alive"])
def test_apache_bench(server: ServerProcess, options: list[str]) -> None:
    done = run("ab", *options, "-n", "200", "-c", "50", f"{server.url}/200,10,some_file")
    said = done.stdout.decode()
    assert done.returncode == 0, done.stderr
    assert re.search(r"Complete requests: +200\n", said), said
    assert "Non-2xx" not in said, said
    failed = re.search(r"Failed requests: +(\d+)\n", said)
    assert failed, said
    if failed[1] != "0":
        # A body "9,..." among bodies "10,..." counts as failed: its length is another one.
        kinds = re.search(r"\(Connect: (\d+), Receive: (\d+), Length: (\d+), Exceptions: (\d+)\)", said)
        assert kinds, said
        assert (kinds[1], kinds[2], kinds[4]) == ("0", "0", "0"), said
    if options:
        kept = re.search(r"Keep-Alive requests: +(\d+)\n", said)
        assert kept
        assert int(kept[1]) == 200


def test_apache_bench_on_a_file(server: ServerProcess) -> None:
    said = run("ab", "-n", "200", "-c", "50", f"{server.url}/v1/d1/small").stdout.decode()
    assert re.search(r"Failed requests: +0\n", said), said
    assert re.search(r"Document Length: +1024 bytes\n", said), said


def test_siege(server: ServerProcess, tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin:/usr/local/bin"}
    done = run("siege", "-b", "-r", "2", "-c", "50", f"{server.url}/200,50,some_file", env=home)
    said = (done.stdout + done.stderr).decode("utf-8", "replace").lower()
    assert done.returncode == 0, said
    availability = re.search(r'availability"?:\s+([\d.]+)', said)
    assert availability, said
    assert float(availability[1]) == 100.0, said
    failed = re.search(r'failed[_ ]transactions"?:\s+(\d+)', said)
    assert failed, said
    assert failed[1] == "0", said


def test_curl(server: ServerProcess) -> None:
    done = run("curl", "-sS", "-w", "%{http_code}", f"{server.url}/200,10,some_file")
    assert re.fullmatch(rb"\d+,some_file200", done.stdout)
    assert run("curl", "-sS", f"{server.url}/v1/d1/small").stdout == SMALL
    assert run("curl", "-sS", "-r", "5-9", f"{server.url}/v1/d1/small").stdout == SMALL[5:10]
    assert (
        run("curl", "-sS", "--path-as-is", "-o", "/dev/null", "-w", "%{http_code}", f"{server.url}/v1/d1/../x").stdout
        == b"403"
    )
    both = run("curl", "-sS", "-v", f"{server.url}/v1/d1/small", f"{server.url}/v1/d1/small")
    assert both.stdout == SMALL * 2
    assert b"Re-using existing" in both.stderr
    assert run("curl", "-sS", "-f", "-X", "DELETE", f"{server.url}/v1/d1/small").returncode == 22


def test_curl_continues_a_download(server: ServerProcess, tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.write_bytes(SMALL[:100])
    assert run("curl", "-sS", "-C", "-", "-o", str(part), f"{server.url}/v1/d1/small").returncode == 0
    assert part.read_bytes() == SMALL


# --- A thousand at once ---


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip("this process may not have enough descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_descriptors")
def test_a_thousand_reads_of_a_second_take_about_a_second(start_server: StartServer) -> None:
    server = start_server("--simulate")
    server.line(b"0,0,warm_up\n")
    sockets = []
    begun = time.monotonic()
    try:
        for _ in range(1000):
            sockets.append(socket.create_connection(("127.0.0.1", server.port), PATIENCE))
            sockets[-1].sendall(b"0,1000,some_file\n")
        replies = [sock.recv(100) for sock in sockets]
        wall = time.monotonic() - begun
    finally:
        for sock in sockets:
            sock.close()
    totals = [int(reply.split(b",")[1]) for reply in replies if re.fullmatch(rb"0,\d+,some_file\n", reply)]
    assert len(totals) == 1000, [reply for reply in replies if not reply.startswith(b"0,")][:5]
    assert min(totals) >= 1000
    print(
        f"\n1,000 reads of 1 s: {wall:.2f} s, longest {max(totals)} ms, peak {server.memory('VmHWM') / 2**20:.0f} MiB, "
        f"{server.threads()} threads"
    )
    assert wall < 5
    assert server.memory("VmHWM") < 200 * 2**20
