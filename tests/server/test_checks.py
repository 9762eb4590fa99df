"""`diskread check --config`: what it finds out about a configuration and the machine, and what is to be done."""

from __future__ import annotations

import json
import os
import resource
import socket
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from server.checks import machine, places
from server.cli import main
from server.config import DiskConfig, LimitsConfig, ServerConfig, make_disks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from server.checks import Finding
    from tests.server.raw_client import ServerProcess

    Check = Callable[..., "tuple[int, list[dict[str, Any]]]"]


def only(findings: Iterable[Finding]) -> Finding:
    (found,) = findings
    return found


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture
def check(tmp_path: Path, free_port: int) -> Check:
    """Run the command on a configuration; its status, and its findings."""

    def run(text: str, *options: str) -> tuple[int, list[dict[str, Any]]]:
        file = tmp_path / "diskread.toml"
        file.write_text(f"port = {free_port}\n{text}" if "port" not in text else text)
        result = CliRunner().invoke(main, ["check", "--config", str(file), "--json", *options])
        report = json.loads(result.stdout)
        assert report["ok"] == (result.exit_code == 0)
        return result.exit_code, report["findings"]

    return run


def about(findings: list[dict[str, Any]], subject: str) -> list[dict[str, Any]]:
    return [each for each in findings if each["subject"] == subject]


def test_a_configuration_that_works(check: Check, tmp_path: Path, free_port: int) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"x")
    log = tmp_path / "access.log"
    socket_path = tmp_path / "admin.sock"
    status, found = check(
        f'port = {free_port}\nconnections = 10\naccess_log = "{log}"\nadmin_socket = "{socket_path}"\n'
        f'[disk.a]\nroot = "{tmp_path / "a"}"'
    )
    assert status == 0
    assert {each["subject"] for each in found} == {
        "user",
        "kernel",
        "descriptors",
        "threads",
        f"127.0.0.1 port {free_port}",
        "access log",
        "administrative socket",
        "disk a",
    }
    assert about(found, f"127.0.0.1 port {free_port}")[0]["verdict"] == "ok"
    assert "answers" in about(found, "disk a")[0]["text"]
    assert not log.exists(), "it is looked at, not made"
    assert not socket_path.exists()
    for each in found:
        assert (each["verdict"] == "ok") == (each["next_step"] is None), each


def test_each_thing_that_is_wrong_has_a_next_step(check: Check, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        status, found = check(
            f'port = {port}\naccess_log = "/nowhere/log"\nadmin_socket = "/nowhere/admin.sock"\n'
            f'[disk.gone]\nroot = "{tmp_path / "gone"}"\n[disk.file]\nroot = "{tmp_path / "file"}"\n'
            f'[disk.empty]\nroot = "{tmp_path / "empty"}"\n'
        )
    assert status == 1
    for subject, verdict, text, step in (
        (f"127.0.0.1 port {port}", "error", "another program listens", "ss -ltnp"),
        ("access log", "error", "/nowhere/log", "directory"),
        ("administrative socket", "error", "/nowhere", "directory"),
        ("disk gone", "error", "No such file", "mount it"),
        ("disk file", "error", "Not a directory", "has to be a directory"),
    ):
        (each,) = about(found, subject)
        assert each["verdict"] == verdict
        assert text in each["text"]
        assert step in each["next_step"]
    assert any("no file was found" in each["text"] for each in about(found, "disk empty"))


def test_a_server_that_is_running_is_no_error(server: ServerProcess, check: Check) -> None:
    _, found = check(f"port = {server.port}\n")
    (each,) = about(found, f"127.0.0.1 port {server.port}")
    assert (each["verdict"], "diskread server" in each["text"]) == ("warning", True)


def test_a_log_on_the_device_of_a_disk_would_hang_with_it(check: Check, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    _, found = check(f'access_log = "{tmp_path / "log"}"\n[disk.a]\nroot = "{tmp_path}"')
    (each,) = about(found, "access log")
    assert (each["verdict"], "same device as disk a" in each["text"]) == ("warning", True)


def test_a_mirror_that_has_to_do_without_a_disk(check: Check, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    disks = f'[disk.a]\nroot = "{tmp_path}"\n[disk.b]\nroot = "{tmp_path}/gone"\n[disk.c]\nroot = "{tmp_path}/gone"\n'
    _, found = check(disks + '[mirror.m]\ndisks = ["a", "b"]\n[mirror.n]\ndisks = ["b", "c"]\n')
    for subject, verdict, text in (("mirror m", "warning", "without b"), ("mirror n", "error", "b, c")):
        (each,) = about(found, subject)
        assert each["verdict"] == verdict
        assert text in each["text"]


def test_tokens_and_tls_have_to_be_usable(check: Check, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(CliRunner().invoke(main, ["token", "t", "--allow", "a"]).stderr)
    status, found = check(f'tokens = "{tokens}"')
    assert (status, about(found, "tokens")[0]["verdict"]) == (0, "ok")
    tokens.write_text("[token.t]\nsha256 = 'x'\nallow = ['a']")
    status, found = check(f'tokens = "{tokens}"\ntls_certificate = "{tokens}"\ntls_key = "{tmp_path}/none"')
    assert status == 1
    for subject in ("tokens", "TLS"):
        (each,) = about(found, subject)
        assert each["verdict"] == "error"
        assert each["next_step"]
        assert str(tokens) in each["text"]


def test_disks_on_one_device_are_told(check: Check, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"x")
    status, found = check("".join(f'[disk.{name}]\nroot = "{tmp_path / name}"\n' for name in "ab"))
    assert status == 0, "it works, if worse than it could"
    same = [each for each in about(found, "disk b") if "same device" in each["text"]]
    assert same[0]["verdict"] == "warning"


def test_inline_reads_that_are_turned_off_are_no_finding_to_act_on(check: Check, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    _, found = check(f'[limits]\ninline = "off"\n[disk.a]\nroot = "{tmp_path}"')
    assert any(each["verdict"] == "ok" and 'inline = "off"' in each["text"] for each in about(found, "disk a"))


def test_for_people_it_is_a_table(tmp_path: Path, free_port: int) -> None:
    file = tmp_path / "diskread.toml"
    file.write_text(f'port = {free_port}\n[disk.a]\nroot = "{tmp_path / "gone"}"')
    result = CliRunner().invoke(main, ["check", "--config", str(file)])
    assert result.exit_code == 1
    assert "error" in result.output
    assert "disk a" in result.output
    assert "-> mount it" in result.output


@pytest.mark.parametrize("text", ["port = 'x'", "surf = 1", "not toml"])
def test_a_configuration_that_cannot_be_read_is_a_wrong_option(text: str, tmp_path: Path) -> None:
    file = tmp_path / "diskread.toml"
    file.write_text(text)
    result = CliRunner().invoke(main, ["check", "--config", str(file)])
    assert result.exit_code == 2
    assert str(file) in result.output


def test_it_is_about_directories_or_a_configuration(tmp_path: Path) -> None:
    for arguments in ([], ["--config", "x", str(tmp_path)]):
        result = CliRunner().invoke(main, ["check", *arguments])
        assert result.exit_code == 2
        assert "either directories or a configuration" in result.output


def test_an_address_that_is_not_of_this_machine_is_an_error() -> None:
    found = places.address(ServerConfig(host="192.0.2.1", port=7000), 5.0)
    assert found.verdict == "error"
    assert found.next_step is not None
    assert "ip address" in found.next_step


@pytest.mark.parametrize(
    ("hard", "verdict"), [(resource.RLIM_INFINITY, "ok"), (5000, "ok"), (1500, "warning"), (500, "error")]
)
def test_descriptors_for_connections_and_files(hard: int, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _limit: (hard, hard))
    config = ServerConfig(connections=1000, disk={"a": DiskConfig(root="/")})
    with make_disks(config) as disks:
        found = only(machine.descriptors(config, disks))
    assert found.verdict == verdict
    if found.next_step is not None:
        suggested = int(found.next_step.rpartition(" ")[2])
        assert 0 < suggested < 1000
        better = ServerConfig(connections=suggested, disk=config.disk)
        with make_disks(better) as disks:
            assert only(machine.descriptors(better, disks)).verdict == "ok", "the next step helps"


def test_threads_for_all_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ServerConfig(limits=LimitsConfig(threads=50), disk={"a": DiskConfig(root="/"), "b": DiskConfig(root="/")})
    with make_disks(config) as disks:
        monkeypatch.setattr(machine, "_left_in_cgroup", lambda: [(116, "the limit", "raise it")])
        monkeypatch.setattr(machine, "_left_to_user", list)
        assert only(machine.threads(disks)).verdict == "ok"
        monkeypatch.setattr(machine, "_left_in_cgroup", lambda: [(115, "the limit", "raise it")])
        found = only(machine.threads(disks))
    assert (found.verdict, found.text) == ("error", "all slots together may need 116; the limit leaves 115")


def test_every_cgroup_on_the_way_up_counts(tmp_path: Path) -> None:
    mounted, of_process = tmp_path / "cgroup", tmp_path / "of_process"
    inner = mounted / "system.slice" / "diskread.service"
    inner.mkdir(parents=True)
    for directory, limit, current in ((inner, "max", "3"), (inner.parent, "100", "40"), (mounted, "1000", "2000")):
        (directory / "pids.max").write_text(limit + "\n")
        (directory / "pids.current").write_text(current + "\n")
    of_process.write_text("0::/system.slice/diskread.service\n")
    assert list(machine.pids_left(of_process, mounted)) == [(60, 100), (0, 1000)]
    of_process.write_text("5:cpu:/x\n8:pids:/a\n")  # version 1: a hierarchy of its own for each controller
    (mounted / "pids" / "a").mkdir(parents=True)
    (mounted / "pids" / "a" / "pids.max").write_text("7")
    (mounted / "pids" / "a" / "pids.current").write_text("2")
    assert list(machine.pids_left(of_process, mounted)) == [(5, 7)]
    assert list(machine.pids_left(tmp_path / "none", mounted)) == []


def test_root_is_told_that_it_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    found = only(machine.user())
    assert (found.verdict, found.next_step is not None) == ("warning", True)
    monkeypatch.setattr(os, "geteuid", lambda: 4_000_000)  # nobody's
    assert "4000000" in only(machine.user()).text
