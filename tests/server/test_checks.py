"""`diskread check --config`: what it finds, what it advises, and that it ends whatever hangs."""

from __future__ import annotations

import errno
import json
import os
import platform
import resource
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from click.testing import CliRunner

from diskread import DiskTimeout
from diskread.inline import Capability
from diskread.probe import Findings
from server import config as configuration
from server.checks import Finding, Report, disks, machine, places
from server.checks.apart import apart
from server.checks.bounded import within
from server.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from click.testing import Result

    from tests.server.raw_client import ServerProcess

    Write = Callable[..., Path]

# Python 3.12 warns of forks beside threads. The command forks before it has any; here there are those of other tests.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

EXT4 = 0xEF53


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a configuration of two disks with a file each, on any port that is free, and what else a test wants."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"content")

    def write(top: str = "port = 0\nconnections = 10", tables: str = "") -> Path:
        roots = "".join(f'[disk.{name}]\nroot = "{tmp_path / name}"\n' for name in ("a", "b"))
        path = tmp_path / "diskread.toml"
        path.write_text(f"{top}\n{roots}{tables}", "utf-8")
        return path

    return write


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["check", *map(str, arguments)])


def report(path: Path, *options: object) -> Report:
    """What it says as JSON, whose status has to be that of the exit."""
    result = run("--config", path, "--json", *options)
    found = msgspec.json.decode(result.stdout, type=Report)
    assert result.exit_code == (0 if found.ok else 1), result.output
    assert found.ok == all(each.verdict != "error" for each in found.findings)
    for each in found.findings:
        assert (each.next_step is None) == (each.verdict == "ok"), each
    return found


def about(findings: Iterable[Finding], subject: str) -> list[Finding]:
    return [each for each in findings if each.subject == subject]


def only(findings: Iterable[Finding]) -> Finding:
    (found,) = findings
    return found


def config(text: str = "", **more: Any) -> configuration.ServerConfig:
    return msgspec.structs.replace(msgspec.convert(json.loads(text or "{}"), configuration.ServerConfig), **more)


# A whole configuration.


def test_a_configuration_that_works(write: Write, tmp_path: Path) -> None:
    found = report(write(f'port = 0\nconnections = 10\naccess_log = "{tmp_path}/log"\nadmin_socket = "{tmp_path}/s"'))
    assert found.ok
    subjects = list(dict.fromkeys(each.subject for each in found.findings))
    assert subjects == [
        "user",
        "kernel",
        "descriptors",
        "threads",
        "127.0.0.1 port 0",
        "access log",
        "administrative socket",
        "disk a",
        "disk b",
    ]
    assert str(tmp_path / "a") in about(found.findings, "disk a")[0].text
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "diskread.toml"], "nothing was made"


def test_a_missing_disk_is_an_error_with_the_next_step(write: Write, tmp_path: Path) -> None:
    found = report(write(tables=f'[disk.c]\nroot = "{tmp_path}/nowhere"\n[disk.d]\nroot = "{tmp_path}/a/file"'))
    assert not found.ok
    missing, wrong = (only(about(found.findings, f"disk {name}")) for name in "cd")
    assert (missing.verdict, wrong.verdict) == ("error", "error")
    assert "No such file" in missing.text
    assert "mount it" in (missing.next_step or "")
    assert "has to be a directory" in (wrong.next_step or "")
    assert about(found.findings, "disk a")[0].verdict == "ok", "the others are looked at all the same"


def test_the_table_has_all_of_it(write: Write, tmp_path: Path) -> None:
    path = write(tables=f'[disk.c]\nroot = "{tmp_path}/nowhere"')
    result = run("--config", path)
    assert result.exit_code == 1
    words = " ".join(result.output.split())
    assert "-> mount it" in words
    assert "1 error," in words
    for subject in ("user", "kernel", "descriptors", "threads", "disk a", "disk b", "disk c"):
        assert subject in words


def test_text_in_brackets_is_shown_as_it_is(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_left_in_cgroup", lambda: iter([(1, "a limit", "a step")]))
    result = run("--config", write())
    assert result.exit_code == 1
    assert "[limits]" in result.output


@pytest.mark.parametrize("text", ["port = 'x'", "port = 70000", "nonsense", "colour = 1"])
def test_a_wrong_configuration_has_status_2(tmp_path: Path, text: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text, "utf-8")
    result = run("--config", path, "--json")
    assert result.exit_code == 2
    assert "wrong.toml" in result.output


def test_a_configuration_that_is_not_there_has_status_2(tmp_path: Path) -> None:
    result = run("--config", tmp_path / "nowhere.toml")
    assert result.exit_code == 2
    assert "nowhere.toml" in result.output


def test_wants_either_directories_or_a_configuration(write: Write, tmp_path: Path) -> None:
    for arguments in ((), ("--config", write(), tmp_path)):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "either directories or a configuration" in result.output


def test_directories_are_looked_at_as_ever(tmp_path: Path) -> None:
    result = run("--json", tmp_path, tmp_path / "nowhere")
    here, nowhere = json.loads(result.stdout)
    assert result.exit_code == 1
    assert (here["directory"], here["readable"]) == (str(tmp_path), True)
    assert (nowhere["readable"], nowhere["inline"]) == (False, False)


# Nothing hangs it.


@pytest.fixture
def stuck() -> Iterator[Callable[..., Any]]:
    """A call that does not return before the end of the test."""
    over = threading.Event()
    yield lambda *_: over.wait(60)
    over.set()


def test_a_call_that_hangs_ends_at_its_deadline(stuck: Callable[..., Any]) -> None:
    with pytest.raises(DiskTimeout):
        within(0.05, stuck)


def test_a_disk_that_hangs_hangs_neither_the_check_nor_the_other_disks(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stuck: Callable[..., Any]
) -> None:
    see = disks._see
    sick = os.fsencode(tmp_path / "b")
    monkeypatch.setattr(disks, "_see", lambda root: stuck() if root == sick else see(root))
    found = report(write(tables='[mirror.m]\ndisks = ["a", "b"]'), "--deadline", 2)
    hung = only(about(found.findings, "disk b"))
    assert (hung.verdict, "has not answered within 2 s" in hung.text) == ("error", True)
    assert about(found.findings, "disk a")[0].verdict == "ok"
    mirror = only(about(found.findings, "mirror m"))
    assert (mirror.verdict, mirror.text) == ("warning", "it has to do without b")


def test_a_log_on_a_file_system_that_hangs_is_an_error(
    monkeypatch: pytest.MonkeyPatch, stuck: Callable[..., Any]
) -> None:
    monkeypatch.setattr(places, "_place", stuck)
    found = only(places.files(config(access_log="/nowhere/log"), {}, 0.05))
    assert (found.verdict, "has not answered" in found.text) == ("error", True)


def test_a_configuration_on_a_disk_that_hangs_has_status_2(
    write: Write, monkeypatch: pytest.MonkeyPatch, stuck: Callable[..., Any]
) -> None:
    monkeypatch.setattr(configuration, "load", stuck)
    result = run("--config", write(), "--deadline", 0.05)
    assert result.exit_code == 2
    assert "has not answered" in result.output


def test_a_child_that_fails_is_told() -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        apart(lambda: 1 // 0)
    with pytest.raises(RuntimeError, match="gone without an answer"):
        apart(lambda: os._exit(1))


# The machine.


def limited(monkeypatch: pytest.MonkeyPatch, hard: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (min(hard, 1024), hard))


def descriptors(connections: int) -> Finding:
    settings = config('{"disk": {"a": {"root": "/srv/a", "threads": 6}}}', connections=connections)
    with configuration.make_disks(settings) as made:
        return only(machine.descriptors(settings, made))


@pytest.mark.parametrize(
    ("hard", "verdict"),
    [(169, "error"), (170, "warning"), (269, "warning"), (270, "ok"), (resource.RLIM_INFINITY, "ok")],
)
def test_descriptors_for_all_connections_and_a_file_on_each(
    monkeypatch: pytest.MonkeyPatch, hard: int, verdict: str
) -> None:
    limited(monkeypatch, hard)
    found = descriptors(100)  # and 6 slots, and 64 to spare
    assert found.verdict == verdict
    if verdict != "ok":
        assert "LimitNOFILE=270" in (found.next_step or "")
        fitting = (found.next_step or "").rpartition("connections = ")[2]
        assert descriptors(int(fitting)).verdict == "ok", "the advice is good"


def test_no_connections_are_advised_where_none_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 32)
    assert "connections" not in (descriptors(100).next_step or "")


def of_threads(monkeypatch: pytest.MonkeyPatch, left: int, engine: str) -> Finding:
    monkeypatch.setattr(machine, "_left_in_cgroup", lambda: iter([(left, "the cgroup", "TasksMax=")]))
    monkeypatch.setattr(machine, "_left_to_user", lambda: iter(()))
    settings = config(json.dumps({"disk": {"a": {"root": "/srv/a", "threads": 10, "engine": engine}}}))
    with configuration.make_disks(settings) as made:
        return only(machine.threads(made))


def test_threads_for_all_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_threads(monkeypatch, 26, "threadpool").verdict == "ok"
    assert of_threads(monkeypatch, 26, "native").verdict == "error", "other calls have a pool beside it"
    assert of_threads(monkeypatch, 36, "native").verdict == "ok"
    found = of_threads(monkeypatch, 25, "threadpool")
    assert found.verdict == "error"
    assert "may need 26; the cgroup leaves 25" in found.text
    assert "TasksMax=" in (found.next_step or "")


@pytest.mark.parametrize(("line", "mounted"), [("0::/system/unit", ""), ("3:cpu:/x\n8:pids:/system/unit", "pids")])
def test_the_limits_of_all_cgroups_above_count(tmp_path: Path, line: str, mounted: str) -> None:
    (tmp_path / "cgroup").write_text(line + "\n", "ascii")
    top = tmp_path / "sys" / mounted
    for directory, limit, current in ((top / "system", "100", "97"), (top / "system" / "unit", "max", "3")):
        directory.mkdir(parents=True)
        (directory / "pids.max").write_text(limit + "\n", "ascii")
        (directory / "pids.current").write_text(current + "\n", "ascii")
    assert list(machine.pids_left(tmp_path / "cgroup", tmp_path / "sys")) == [(3, 100)]


def test_a_limit_that_is_exceeded_leaves_none(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("0::/\n", "ascii")
    (tmp_path / "pids.max").write_text("10", "ascii")
    (tmp_path / "pids.current").write_text("12", "ascii")
    assert list(machine.pids_left(tmp_path / "cgroup", tmp_path)) == [(0, 10)]


def test_a_machine_without_cgroups_has_no_such_limit(tmp_path: Path) -> None:
    assert list(machine.pids_left(tmp_path / "nowhere", tmp_path)) == []


def test_the_threads_of_a_user_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: os.stat("/proc/self").st_uid or 4_000_000)
    limited(monkeypatch, 1000)
    ((left, text, _),) = machine._left_to_user()
    assert 0 <= left <= 1000
    assert "1000" in text


@pytest.mark.parametrize(
    ("lack", "release", "verdict", "step"),
    [
        (None, "6.8.0-31-generic", "ok", None),
        (("cachestat", errno.ENOSYS), "6.1.0", "warning", "Linux 6.5 or newer"),
        (("cachestat", errno.EPERM), "6.8.0-31-generic", "warning", "seccomp"),
    ],
)
def test_what_the_kernel_lacks(
    monkeypatch: pytest.MonkeyPatch, lack: tuple[str, int] | None, release: str, verdict: str, step: str | None
) -> None:
    monkeypatch.setattr(machine, "kernel_lacks", lambda _directory: lack)
    monkeypatch.setattr(platform, "release", lambda: release)
    found = only(machine.kernel())
    assert found.verdict == verdict
    assert (found.next_step is None) if step is None else (step in (found.next_step or ""))


def test_root_is_told_to_look_as_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert only(machine.user()).verdict == "warning"
    monkeypatch.setattr(os, "geteuid", lambda: 4_000_000)
    found = only(machine.user())
    assert (found.verdict, "4000000" in found.text) == ("ok", True)


# The address, the log, the socket.


def test_an_address_that_another_program_has_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(10)
        port = other.getsockname()[1]

        def hang_up() -> None:
            connection, _ = other.accept()
            connection.close()

        answering = threading.Thread(target=hang_up)
        answering.start()
        found = places.address(config(port=port), 10)
        answering.join()
    assert (found.verdict, found.text) == ("error", "another program listens there")
    assert str(port) in (found.next_step or "")
    assert places.address(config(port=port), 10).verdict == "ok"


def test_an_address_that_a_diskread_server_has_is_a_warning(server: ServerProcess) -> None:
    found = places.address(config(port=server.port), 10)
    assert (found.verdict, "a diskread server" in found.text) == ("warning", True)


def test_an_address_of_another_machine_is_an_error() -> None:
    found = places.address(config(host="192.0.2.1"), 10)  # TEST-NET-1: nobody has it, RFC 5737
    assert found.verdict == "error"
    assert "address of this machine" in (found.next_step or "")


@pytest.mark.parametrize("host", ["::1", "::"])
def test_addresses_of_ipv6(host: str) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6: {error}")
    assert places.address(config(host=host, port=0), 10).verdict == "ok"


def test_a_log_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    for wrong in (tmp_path / "nowhere" / "log", tmp_path):
        assert only(places.files(config(access_log=str(wrong)), {}, 10)).verdict == "error"
    assert only(places.files(config(access_log=str(tmp_path / "log")), {}, 10)).verdict == "ok"
    assert list(places.files(config(access_log="-"), {}, 10)) == []


def test_a_log_that_may_not_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    log.touch()
    monkeypatch.setattr(os, "access", lambda path, _mode, **_: os.fspath(path) != str(log))
    found = only(places.files(config(access_log=str(log)), {}, 10))
    assert (found.verdict, "no permission" in found.text) == ("error", True)


def test_a_socket_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "nowhere" / "socket", tmp_path / "file"):
        assert only(places.files(config(admin_socket=str(wrong)), {}, 10)).verdict == "error"


def test_the_directory_of_a_unit_need_not_be_there_yet() -> None:
    found = only(places.files(config(admin_socket="/run/diskread-that-is-not-there/socket"), {}, 10))
    assert (found.verdict, "RuntimeDirectory=" in (found.next_step or "")) == ("warning", True)


def test_a_log_on_a_disk_that_is_served_is_a_warning(write: Write, tmp_path: Path) -> None:
    found = report(write(f'port = 0\nconnections = 10\naccess_log = "{tmp_path}/a/log"'))
    assert only(about(found.findings, "access log")).verdict == "warning"
    assert "disk a" in only(about(found.findings, "access log")).text


# Disks and mirrors, as they may be seen.


def seen(
    device: str = "sda",
    *,
    sample: bytes | None = b"file",
    direct: bool = True,
    searchable: bool = True,
    owned: bool = True,
    reason: str | None = None,
    flags: int = 0,
) -> disks.Seen:
    return disks.Seen(
        Findings(1, sample, direct, Capability(reason, flags, 128 * 1024)), device, EXT4, searchable, owned
    )


def said(looks: dict[str, disks.Seen | Finding], **more: Any) -> list[Finding]:
    text = json.dumps({"disk": {name: {"root": f"/srv/{name}", **more} for name in looks}})
    with configuration.make_disks(config(text)) as made:
        return list(disks.describe(made, looks))


def test_a_disk_with_which_all_is_well() -> None:
    verdicts = [each.verdict for each in said({"a": seen("sda"), "b": seen("sdb")})]
    assert verdicts == ["ok"] * 4
    assert "ext4 on device sda" in said({"a": seen()})[0].text


@pytest.mark.parametrize(
    ("look", "verdict", "step"),
    [
        (seen(searchable=False), "error", "chmod o+x /srv/a"),
        (seen(sample=None, direct=False), "warning", "is it mounted"),
        (seen(direct=False), "warning", "on this file system"),
        (seen(reason="the file system is FUSE, not ext4 or xfs"), "warning", "nothing is wrong"),
        (seen(reason="the kernel reads ahead 64 MiB on it"), "warning", "read_ahead_kb"),
        (seen(flags=os.O_NOATIME, owned=False), "warning", "noatime"),
    ],
)
def test_a_disk_with_which_something_is_not(look: disks.Seen, verdict: str, step: str) -> None:
    found = only(each for each in said({"a": look}) if each.verdict != "ok")
    assert (found.verdict, step in (found.next_step or "")) == (verdict, True), found


def test_access_times_matter_only_where_they_are_kept_and_reads_are_inline() -> None:
    assert {each.verdict for each in said({"a": seen(owned=False)})} == {"ok"}
    assert {each.verdict for each in said({"a": seen(flags=os.O_NOATIME, owned=False)}, inline="off")} == {"ok"}


def test_disks_on_one_device_hang_together() -> None:
    warned = [each for each in said({"a": seen("sda"), "b": seen("sda")}) if each.verdict == "warning"]
    assert [(each.subject, "as disk a" in each.text) for each in warned] == [("disk b", True)]


def test_a_disk_that_is_not_mounted_is_on_the_device_of_the_system() -> None:
    system = disks.device_name(os.stat("/").st_dev)
    (warned,) = (each for each in said({"a": seen(system)}) if each.verdict == "warning")
    assert "root file system" in warned.text
    assert "mounted" in (warned.next_step or "")


def test_a_configuration_without_disks_is_a_warning() -> None:
    assert only(said({})).verdict == "warning"


BROKEN = Finding("disk", "error", "broken", "mend it")


@pytest.mark.parametrize(
    ("looks", "verdict", "text"),
    [
        ((seen("sda"), seen("sdb")), "ok", "each on a device of its own"),
        ((seen("sda"), seen("sda")), "warning", "not each on a device"),
        ((seen("sda"), BROKEN), "warning", "without b"),
        ((seen("sda"), seen("sdb", searchable=False)), "warning", "without b"),
        ((BROKEN, BROKEN), "error", "none of its disks"),
    ],
)
def test_mirrors(looks: tuple[disks.Seen | Finding, ...], verdict: str, text: str) -> None:
    table = {"disk": {"a": {"root": "/srv/a"}, "b": {"root": "/srv/b"}}, "mirror": {"m": {"disks": ["a", "b"]}}}
    with configuration.make_disks(config(json.dumps(table))) as made:
        found = only(disks.mirrors(made, dict(zip("ab", looks, strict=True))))
    assert (found.verdict, text in found.text) == (verdict, True), found


def test_a_device_without_a_name_has_its_number() -> None:
    assert disks.device_name(os.makedev(0, 999)) == "0:999"


def test_the_process_ends_with_the_status(write: Write, tmp_path: Path) -> None:
    path = write(tables=f'[disk.c]\nroot = "{tmp_path}/nowhere"')
    command = [sys.executable, "-m", "server", "check", "--config", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert not json.loads(done.stdout)["ok"]


# --- Tokens and TLS ---


def test_tokens_and_tls_have_to_be_usable(write: Write, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(CliRunner().invoke(main, ["token", "t", "--allow", "a"]).stderr)
    assert only(about(report(write(f'port = 0\ntokens = "{tokens}"')).findings, "tokens")).verdict == "ok"
    tokens.write_text("[token.t]\nsha256 = 'x'\nallow = ['a']")
    top = f'port = 0\ntokens = "{tokens}"\ntls_certificate = "{tokens}"\ntls_key = "{tmp_path}/none"'
    found = report(write(top))
    assert not found.ok
    for subject in ("tokens", "TLS"):
        each = only(about(found.findings, subject))
        assert each.verdict == "error"
        assert str(tokens) in each.text
