"""Disks that go offline and come back while a server serves them: what clients get, what operators see."""

from __future__ import annotations

import json
import math
import re
import subprocess
import time
from typing import TYPE_CHECKING

import gevent
import msgspec
import pytest
from click.testing import CliRunner
from falcon.testing import TestClient

from diskread import Disk, DiskBusy, DiskOffline, Disks, Limits, State
from server.app import create_app
from server.cli import main
from server.config import ConfigError, load, make_disks
from server.table import reasons, state_of
from tests.server.conftest import SMALL
from tests.server.raw_client import PATIENCE, ServerProcess, holding, until
from tests.server.test_table import WELL

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.server.conftest import StartServer

QUICK = """
probe_interval = 0.05
probe_interval_max = 0.1
"""


def log_of(server: ServerProcess, disk: str) -> list[str]:
    """What the log says of a disk's state: level and text of each line."""
    lines = re.findall(rf"^[-\d]+ [:,\d]+ (\w+ disk {disk} is .*)$", server.said(), re.MULTILINE)
    return [re.sub(r"after \d+\.\d s", "after N s", line) for line in lines]


# --- At the start ---


def test_a_disk_without_its_root_is_offline_from_the_start(start_server: StartServer, tree: Path) -> None:
    server = start_server("--disk", f"d1={tree}", "--disk", f"lost={tree}/nowhere", "--disk", f"file={tree}/small")
    until(lambda: log_of(server, "lost") and log_of(server, "file"), "the log to say so")
    for name, why in (("lost", "No such file or directory"), ("file", "Not a directory")):
        reason = f"its root directory cannot be opened: {why}"
        response = server.http(f"/v1/{name}/small")
        assert response.status == 503
        assert json.loads(response.body)["title"] == "The disk is offline"
        assert reason in json.loads(response.body)["description"]
        assert int(response.headers["Retry-After"]) >= 1
        disk = server.disk(name)
        assert (disk.state, disk.reason, disk.accepting, disk.changes) == ("offline", reason, False, 1)
        assert disk.probes >= 1
        assert disk.next_probe is not None
        assert log_of(server, name) == [f"WARNING disk {name} is offline: {reason}"]
    assert server.line(b"0,0,lost/small\n").startswith(b"3,")
    assert server.http("/v1/d1/small").body == SMALL
    assert server.http("/readyz").status == 200


def test_healthy_disks_are_online_when_the_server_says_that_it_listens(start_server: StartServer, tree: Path) -> None:
    server = start_server(*(option for number in range(4) for option in ("--disk", f"d{number}={tree}")))
    # The first requests: nobody is told that a disk has not answered yet.
    assert [server.http(f"/v1/d{number}/small").status for number in range(4)] == [200] * 4
    assert [disk.probes for disk in server.status().disks] == [1] * 4
    assert "offline" not in server.said()
    assert "answered yet" not in server.said()


def test_with_no_disk_online_it_starts_and_is_not_ready(start_server: StartServer, tree: Path) -> None:
    server = start_server("--disk", f"lost={tree}/nowhere")
    assert server.http("/readyz").status == 503
    assert server.http("/healthz").status == 200
    assert server.stop() == 0


def test_who_connects_before_the_first_answers_is_served(start_server: StartServer, tree: Path, tmp_path: Path) -> None:
    # The port is bound before the disks are asked: whoever is early waits in the backlog, and gets no 503.
    server = start_server("--disk", f"d1={tree}")
    port = server.port
    server.stop()
    early = start_server("--disk", f"d1={tree}", port=port)
    assert early.http("/v1/d1/small").status == 200


def test_a_root_that_comes_is_found_without_anybody_asking(
    start_server: StartServer, tmp_path: Path, tree: Path
) -> None:
    config = tmp_path / "diskread.toml"
    config.write_text(f'[limits]{QUICK}[disk.later]\nroot = "{tmp_path}/later"\n')
    server = start_server("--config", str(config))
    assert server.disk("later").state == "offline"
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "small").write_bytes(SMALL)
    until(lambda: server.disk("later").accepting, "a probe to find it")
    assert server.http("/v1/later/small").body == SMALL
    until(lambda: "back online" in server.said(), "the log to say so")
    assert log_of(server, "later")[-1] == "INFO disk later is back online after N s"


def test_an_unmounted_disk_is_offline(start_server: StartServer, tmp_path: Path) -> None:
    point = tmp_path / "mounted"
    point.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "none", str(point)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mount: {done.stderr.strip()}")
    try:
        (point / "small").write_bytes(SMALL)
        config = tmp_path / "diskread.toml"
        limits = f"offline_after = 0.2\nidle_probe = 0.3{QUICK}"
        config.write_text(f'[limits]\n{limits}[disk.d1]\nroot = "{point}"\n')
        server = start_server("--config", str(config))
        assert server.http("/v1/d1/small").status == 200
    finally:
        subprocess.run(["umount", "--lazy", str(point)], check=True)
    until(lambda: server.disk("d1").state == "offline", "the idle probe to find out")
    response = server.http("/v1/d1/small")
    assert (response.status, b"unmounted" in response.body) == (503, True)


# --- While it serves ---


def test_a_stall_takes_the_disk_offline_and_it_comes_back_by_itself(start_server: StartServer, tree: Path) -> None:
    options = ["--simulate", "--threads", "1", "--deadline", "0.3", "--offline-after", "0.6"]
    server = start_server(*options, "--disk", f"d1={tree}", "--disk", f"d2={tree}")
    began = time.monotonic()
    with holding(server, b"0,3000,d1\n"):
        until(lambda: server.disk("d1").state == "offline", "the verdict")
        seconds = time.monotonic() - began
        response = server.http("/v1/d1/small")
        if time.monotonic() - began < 2.5:  # else this machine is too slow to say
            assert seconds >= 0.6
            assert response.status == 503
            assert "no operation has completed for 0.6 s" in json.loads(response.body)["description"]
            assert int(response.headers["Retry-After"]) >= 1
            assert server.line(b"0,0,d1/small\n").startswith(b"3,")
        assert server.http("/v1/d2/small").body == SMALL
    until(lambda: server.http("/v1/d1/small").status == 200, "the disk to come back")
    until(lambda: server.disk("d1").state == "online", "the disk to be online")
    until(lambda: len(log_of(server, "d1")) == 3, "the log to say so")
    assert log_of(server, "d1") == [
        "WARNING disk d1 is offline: no operation has completed for 0.6 s",
        "INFO disk d1 is half-open after N s offline: one request at a time may try",
        "INFO disk d1 is back online after N s",
    ]
    assert log_of(server, "d2") == []
    assert server.disk("d1").changes >= 3


def test_status_and_its_command_show_the_reason(start_server: StartServer, tree: Path) -> None:
    server = start_server("--disk", f"d1={tree}", "--disk", f"lost={tree}/nowhere")
    shown = CliRunner().invoke(main, ["status", server.url])
    assert shown.exit_code == 1
    assert "lost: offline for" in shown.output
    assert "No such file or directory" in " ".join(shown.output.split())
    assert "d1: " not in shown.output


def test_a_drain_with_a_disk_offline_is_over_at_once(start_server: StartServer, tree: Path) -> None:
    options = ["--simulate", "--threads", "1", "--deadline", "0.1", "--offline-after", "0.3", "--drain-timeout", "60"]
    server = start_server(*options, "--disk", f"d1={tree}")
    server.line(b"0,60000,d1\n")
    until(lambda: server.disk("d1").state == "offline", "the verdict")
    assert server.stop() == 0


# --- What a client is told about when to come back ---


@pytest.fixture
def disk(tree: Path) -> Iterator[Disk]:
    with Disk("d1", tree) as disk:
        yield disk


@pytest.mark.parametrize(
    ("error", "header"),
    [
        (DiskOffline("d1", b"small", "offline", retry_after=0.0), "1"),
        (DiskOffline("d1", b"small", "offline", retry_after=0.2), "1"),
        (DiskOffline("d1", b"small", "offline", retry_after=1.01), "2"),
        (DiskOffline("d1", b"small", "offline", retry_after=30.0), "30"),
        (DiskOffline("d1", b"small", "by hand"), None),
        (DiskBusy("d1", b"small", "busy"), "1"),
    ],
)
@pytest.mark.parametrize("target", ["/v1/d1/small", "/0,0,d1/small"])
def test_retry_after(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, error: Exception, header: str | None, target: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(disk, "open", fail)
    monkeypatch.setattr(disk, "stall", fail)
    result = TestClient(create_app(Disks([disk]))).simulate_get(target)
    assert result.status_code == 503
    assert result.headers.get("Retry-After") == header


# --- The hook ---


def test_changes_are_told_in_order_and_once(disk: Disk) -> None:
    told: list[tuple[State, str | None]] = []
    disk.read("small")
    disk.on_change = lambda state, reason: told.append((state, reason))
    assert disk.on_change is not None
    disk.set_offline("one")
    disk.set_offline("one")
    disk.set_offline("two")
    disk.set_online()
    assert told == [], "not in the middle of the change"
    disk.read("small")
    disk.read("small")
    gevent.sleep(0.01)
    assert told == [
        (State.OFFLINE, "by hand: one"),
        (State.OFFLINE, "by hand: two"),
        (State.HALF_OPEN, None),
        (State.ONLINE, None),
    ]


def test_a_hook_that_fails_harms_nobody(disk: Disk, capfd: pytest.CaptureFixture[str]) -> None:
    def fail(_state: State, _reason: str | None) -> None:
        raise RuntimeError("of the hook")

    disk.on_change = fail
    disk.set_offline("x")
    disk.set_online()
    assert disk.read("small") == SMALL
    gevent.sleep(0.01)
    assert disk.status.load.in_flight == 0
    assert "of the hook" in capfd.readouterr().err


def next_probe(disk: Disk) -> float | None:
    return disk.status.load.next_probe


def test_what_comes_next(disk: Disk, tree: Path) -> None:
    assert next_probe(disk) is None, "nobody has used it"
    disk.read("small")
    assert 0 < (next_probe(disk) or 0) <= disk.limits.idle_probe
    disk.set_offline("x")
    assert next_probe(disk) is None
    with Disk("d2", tree) as watched, Disk("d3", None) as without_files:
        watched.watch()
        assert next_probe(watched) == 0.0, "it is under way"
        with gevent.Timeout(PATIENCE):
            while watched.status.load.state is not State.ONLINE:
                gevent.sleep(0.002)
        without_files.stall(0.0)
        assert next_probe(without_files) is None


# --- The table ---


@pytest.mark.parametrize(
    ("state", "accepting", "word"),
    [
        ("online", True, "online"),
        ("suspect", False, "refusing"),
        ("offline", False, "offline"),
        ("half-open", True, "half-open"),
        ("half-open", False, "half-open"),
    ],
)
def test_the_word_for_a_state(state: str, accepting: bool, word: str) -> None:
    assert str(state_of(msgspec.structs.replace(WELL, state=state, accepting=accepting))) == word


def test_the_reasons_below_the_table() -> None:
    hung = msgspec.structs.replace(WELL, name="hung", state="offline", reason="[it] hangs", since=12.3)
    assert reasons([WELL]) is None
    for next_probe, end in ((None, ""), (0.0, "; a probe is under way"), (1.25, "; next probe in 1.2 s")):
        text = reasons([WELL, msgspec.structs.replace(hung, next_probe=next_probe)])
        assert str(text) == f"hung: offline for 12 s: [it] hangs{end}"


# --- The configuration ---


def test_limits_of_health_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "diskread.toml"
    file.write_text(
        """
        [limits]
        offline_after = 5
        slow = 0.5
        [disk.a]
        root = "/a"
        offline_after = 20
        probe_interval = 2
        probe_interval_max = 60
        [disk.b]
        root = "/b"
        idle_probe = 6
        [disk.c]
        root = "/c"
        offline_after = inf
        """
    )
    disks = make_disks(load(file))
    assert disks["a"].limits == Limits(
        offline_after=20, idle_probe=60, probe_interval=2, probe_interval_max=60, slow=0.5
    )
    assert disks["b"].limits == Limits(offline_after=5, idle_probe=6, slow=0.5)
    assert (disks["c"].limits.offline_after, disks["c"].limits.idle_probe) == (math.inf, math.inf)
    assert disks["c"].limits.slow == 0.5


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("[limits]\noffline_after = 0", 2, "limits.offline_after"),
        ("[limits]\noffline_after = nan", 2, "limits.offline_after"),
        ("[limits]\noffline_after = 'x'", 2, "limits.offline_after"),
        ("[limits]\nidle_probe = 10", 2, "limits.idle_probe"),
        ("[limits]\nslow = -1", 2, "limits.slow"),
        ("[disk.a]\nroot = '/a'\nprobe_interval = 0", 3, "disk.a.probe_interval"),
        ("[disk.a]\nroot = '/a'\nprobe_interval_max = 0.5", 3, "disk.a.probe_interval_max"),
    ],
)
def test_wrong_limits_of_health_are_said_so(tmp_path: Path, text: str, line: int, key: str) -> None:
    file = tmp_path / "diskread.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(f"diskread.toml:{line}: {key}: ")):
        load(file)


def test_the_option(start_server: StartServer, tree: Path) -> None:
    result = CliRunner().invoke(main, ["serve", "--disk", f"d1={tree}", "--offline-after", "0"])
    assert (result.exit_code, "offline_after" in result.output) == (2, True)
    assert start_server("--disk", f"d1={tree}", "--offline-after", "3600").http("/v1/d1/small").status == 200
