"""Several worker processes: as one server to clients and operators, and none of them missed."""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
import pytest
from click.testing import CliRunner

from diskread import Disk, Disks, Limits, Mirror, State
from diskread.latency import Latency
from server.cli import main
from server.processes import _STATUSES, Processes, directory_of, merge, merge_mirrors
from tests.conftest import until

from .conftest import SMALL
from .raw_client import READY, Connection, http_request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from .conftest import StartServer
    from .raw_client import ServerProcess

# --- what they know together ---


@pytest.fixture
def status(tree: Path) -> Iterator[Disk]:
    with Disk("d1", tree, Limits(threads=3, queue=5, offline_after=math.inf, idle_probe=math.inf)) as disk:
        yield disk


def test_a_status_survives_the_way_to_another_process(status: Disk) -> None:
    status.read("small")
    status._counts.errors["EIO"] += 2
    mirror = Mirror("m", [status], hedge_after=math.inf)
    mirror.read("small")
    sent = [status.status], [mirror.status]
    received = _STATUSES.decode(msgspec.msgpack.encode(sent))
    assert received == sent
    assert merge_mirrors([mirror.status, mirror.status]).counts.answers == {"d1": 2}
    ((found,), _) = received
    assert isinstance(found.counts.errors, Counter)
    assert found.load.state is State.ONLINE


def test_numbers_add_up_and_the_worst_verdict_counts(tree: Path) -> None:
    limits = Limits(threads=3, queue=5)
    with Disk("d1", tree, limits) as one, Disk("d1", tree, limits) as other, Disk("d1", tree, limits) as third:
        one.read("small")
        other.read("large", 0, 5)
        one._counts.errors["EIO"] += 1
        other._counts.errors.update(["EIO", "ENOENT"])
        third.set_offline("to be replaced")
        merged = merge([each.status for each in (one, other, third)])
    assert (merged.limits.threads, merged.limits.queue, merged.limits.deadline) == (9, 15, limits.deadline)
    assert (merged.counts.reads, merged.counts.bytes) == (2, len(SMALL) + 5)
    assert merged.counts.errors == {"EIO": 2, "ENOENT": 1}
    assert (merged.load.state, merged.load.reason) == (State.OFFLINE, "by hand: to be replaced")
    assert merged.load.accepting, "the others take requests"
    assert merged.disk_time.count == 2
    assert merged.inline.reason is None or merged.inline.reason != ""


def test_histograms_add_up() -> None:
    one, other = Latency(), Latency()
    for seconds in (0.0002, 0.3, 100):
        one.record(seconds)
    other.record(0.3)
    with Disk("d1", None) as disk:
        merged = merge([replace(disk.status, queue_time=each) for each in (one, other)])
    assert merged.queue_time.count == 4
    assert merged.queue_time.total == pytest.approx(100.6002)


# --- one worker among others ---


def test_a_worker_alone(tmp_path: Path, tree: Path) -> None:
    directory = tmp_path / "workers"
    directory.mkdir()
    with Disk("d1", tree) as disk:
        disks = Disks([disk])
        with Processes(directory, disks) as alone:
            alone.set_offline("d1", "why not")
            assert alone.look().workers == 1
            assert [each.name for each in alone.look().disks] == ["d1"]
    assert not directory.exists(), "the last one removes the directory"


def test_who_comes_later_learns_what_was_taken_offline(tmp_path: Path, tree: Path) -> None:
    with Disk("d1", tree) as disk, Disk("d2", tree) as other:
        first = Processes(tmp_path, Disks([disk, other]))
        first.set_offline("d1", "to be replaced")
        first.set_offline("d2", "too")
        first.set_online("d2")
        (tmp_path / f"{os.getpid()}.sock").rename(tmp_path / "1.sock")  # as if it were another process
        later, later_other = Disk("d1", tree), Disk("d2", tree)
        with later, later_other, Processes(tmp_path, Disks([later, later_other])) as second:
            assert later.status.load.reason == "by hand: to be replaced"
            assert later_other.status.load.state is State.ONLINE
            assert second.look().workers == 2
            second.set_online("d1")
            assert disk.status.load.state is not State.OFFLINE, "the first one was told"
        first.close()


def test_a_worker_that_has_gone_is_forgotten(tmp_path: Path, tree: Path) -> None:
    with Disk("d1", tree) as disk, Processes(tmp_path, Disks([disk])) as alone:
        gone = socket.socket(socket.AF_UNIX)
        gone.bind(str(tmp_path / "1.sock"))
        gone.close()
        assert alone.look().workers == 1
        assert not (tmp_path / "1.sock").exists()


def test_a_worker_that_does_not_answer_is_left_out(
    tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.processes.PATIENCE", 0.1)
    with Disk("d1", tree) as disk, Processes(tmp_path, Disks([disk])) as alone, socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(tmp_path / "1.sock"))
        mute.listen()
        assert alone.look().workers == 1
    assert "1.sock did not answer" in caplog.text


def test_somebody_elses_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert directory_of(1) == directory_of(1) == tmp_path / "diskread-1"
    (tmp_path / "diskread-2").mkdir(mode=0o755)
    (tmp_path / "diskread-2").chmod(0o755)
    with pytest.raises(PermissionError, match="not ours alone"):
        directory_of(2)
    (tmp_path / "diskread-3").symlink_to(tmp_path / "diskread-1")
    with pytest.raises(OSError, match="diskread-3"):
        directory_of(3)


# --- the server ---


class Load:
    """A client that asks without end, each time on a new connection, and counts."""

    def __init__(self, server: ServerProcess, target: str) -> None:
        self.answers: Counter[int] = Counter()
        self.failures: list[str] = []
        self._server, self._target = server, target
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(0.005):
            try:
                self.answers[self._server.http(self._target).status] += 1
            except (OSError, AssertionError) as error:
                self.failures.append(repr(error))

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def children_of(process: int) -> set[int]:
    with open(f"/proc/{process}/task/{process}/children") as children:
        return {int(each) for each in children.read().split()}


def workers_of(server: ServerProcess) -> set[int]:
    return children_of(server.process.pid)


def until_workers(server: ServerProcess, condition: Callable[[set[int]], bool]) -> set[int]:
    until(lambda: condition(workers_of(server)) and server.status().workers == len(workers_of(server)))
    return workers_of(server)


def test_workers_are_one_server(start_server: StartServer, tree: Path) -> None:
    server = start_server("--workers", "2", "--disk", f"d1={tree}", "--threads", "4", "--queue", "10")
    until_workers(server, lambda each: len(each) == 2)
    for _ in range(20):
        assert server.http("/v1/d1/small").body == SMALL
    disk = server.disk("d1")
    assert (disk.reads, disk.slots, disk.queue) == (20, 4, 10)
    assert b'diskread_reads_total{disk="d1"} 20.0' in server.http("/metrics").body
    assert server.stop() == 0


def test_the_line_protocol_as_well(start_server: StartServer) -> None:
    server = start_server("--workers", "2")
    assert re.fullmatch(rb"7,\d+,some_file\n", server.line(b"7,10,some_file\n"))


def test_a_worker_that_is_killed_is_replaced(start_server: StartServer, tree: Path) -> None:
    server = start_server("--workers", "2", "--disk", f"d1={tree}")
    before = until_workers(server, lambda each: len(each) == 2)
    with Load(server, "/v1/d1/small") as load:
        os.kill(min(before), signal.SIGKILL)
        until_workers(server, lambda each: len(each) == 2 and min(before) not in each)
    assert load.answers[200] > 0
    assert set(load.answers) == {200}
    assert len(load.failures) <= 1, "only what the killed one was doing"


def test_sighup_reads_the_configuration_again_and_drops_no_request(
    start_server: StartServer, tree: Path, tmp_path: Path
) -> None:
    file = tmp_path / "diskread.toml"
    file.write_text(f"[disk.d1]\nroot = '{tree}'\n[disk.old]\nroot = '{tree}'\n")
    server = start_server("--workers", "2", "--config", str(file))
    before = until_workers(server, lambda each: len(each) == 2)
    assert server.http("/v1/old/small").status == 200
    file.write_text(f"[disk.d1]\nroot = '{tree}'\nthreads = 6\n[disk.new]\nroot = '{tree}'\n")
    with Load(server, "/v1/d1/small") as load:
        server.process.send_signal(signal.SIGHUP)
        until_workers(server, lambda each: len(each) == 2 and not each & before)
        assert server.http("/v1/new/small").body == SMALL
        assert server.http("/v1/old/small").status == 404
        assert server.disk("d1").slots == 6
    assert (set(load.answers), load.failures) == ({200}, [])

    file.write_text("[disk.d1]\nroot = 7\n")
    server.process.send_signal(signal.SIGHUP)
    until(lambda: "stays what it was" in server.said())
    assert f"{file}:2" in server.said()
    assert server.http("/v1/new/small").body == SMALL


def test_sigusr2_puts_another_program_in_its_place_and_drops_no_request(
    start_server: StartServer, tree: Path, tmp_path: Path
) -> None:
    path = str(tmp_path / "admin.sock")
    server = start_server("--workers", "2", "--disk", f"d1={tree}", "--admin-socket", path)
    before = until_workers(server, lambda each: len(each) == 2)
    with Load(server, "/v1/d1/small") as load:
        server.process.send_signal(signal.SIGUSR2)
        until(lambda: len(workers_of(server)) == 3, "the new program")
        (new,) = workers_of(server) - before
        until(lambda: len(children_of(new)) == 2, "its workers")
        try:
            server.process.send_signal(signal.SIGTERM)
            assert server.wait() == 0
            until(lambda: server.status().workers == 2)
            answered = load.answers[200]
            until(lambda: load.answers[200] > answered + 20, "the new program to answer")
            assert CliRunner().invoke(main, ["disk", "list", "--socket", path]).exit_code == 0
        finally:
            load.__exit__()
            os.kill(new, signal.SIGTERM)
    assert (set(load.answers), load.failures) == ({200}, [])
    until(lambda: not os.path.exists(f"/proc/{new}"), "the new program to end")


def test_an_operator_reaches_all_workers_and_those_to_come(
    start_server: StartServer, tree: Path, tmp_path: Path
) -> None:
    path = str(tmp_path / "admin.sock")
    server = start_server("--workers", "2", "--disk", f"d1={tree}", "--admin-socket", path)
    before = until_workers(server, lambda each: len(each) == 2)
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert CliRunner().invoke(main, ["disk", "offline", "d1", "--reason", "worn", "--socket", path]).exit_code == 0
    assert [server.http("/v1/d1/small").status for _ in range(10)] == [503] * 10
    os.kill(min(before), signal.SIGKILL)
    until_workers(server, lambda each: len(each) == 2 and min(before) not in each)
    assert [server.http("/v1/d1/small").status for _ in range(10)] == [503] * 10
    assert CliRunner().invoke(main, ["disk", "online", "d1", "--socket", path]).exit_code == 0
    until(lambda: [server.http("/v1/d1/small").status for _ in range(10)] == [200] * 10)


def test_a_configuration_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "diskread.toml"
    file.write_text("prot = 7000\n")
    result = CliRunner().invoke(main, ["serve", "--workers", "2", "--config", str(file)])
    assert result.exit_code == 2
    assert f"{file}:1: prot" in result.output


def test_gunicorn_itself_can_run_it(tree: Path, tmp_path: Path) -> None:
    file = tmp_path / "diskread.toml"
    file.write_text(f"[disk.d1]\nroot = '{tree}'\n")
    command = [sys.executable, "-m", "gunicorn", "server.app:application", "-k", "server.gunicorn.Worker"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "-w", "2", "-b", "127.0.0.1:0"], stderr=log, env={**os.environ, "DISKREAD_CONFIG": str(file)}
        )
    try:
        until(lambda: READY.search((tmp_path / "log").read_text()), "gunicorn to listen")
        found = READY.search((tmp_path / "log").read_text())
        assert found
        with Connection(int(found[1])) as connection:
            connection.send(http_request("/v1/d1/small"))
            assert connection.response().body == SMALL
    finally:
        process.terminate()
        assert process.wait(20) == 0
