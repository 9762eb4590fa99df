"""The table's machinery: what it reports is what happened, and what could not be asked is in the report, by name."""

from __future__ import annotations

import shutil
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING

import msgspec
import pytest
from click.testing import CliRunner
from hdrh.histogram import HdrHistogram

from benchmarks import growth, isolation, seedtable
from benchmarks.seed import bad_input, load, process, questions, report, rows
from tests.faults.injectors import FaultFS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None and shutil.which("gcc") is None, reason="the load generator needs a C compiler"
)
PYTHON_ROWS = (
    *("eventlet", "python-threads", "python-asyncio", "gevent-hub", "gevent-threadpool"),
    *("eventlet-tpool", "anyio"),
)
TINY = msgspec.structs.replace(
    questions.QUICK, slow=0.5, patience=10.0, closed_seconds=0.3, rate=50.0, lead=1.0, hang=2.0, after=1.5
)


def row(name: str) -> rows.Row:
    """A row that can be measured here, or a skip that says why not."""
    found = next(each for each in rows.load_rows() if each.name == name)
    if (lacks := found.lacks()) is not None:
        pytest.skip(f"{name}: {lacks}")
    return found


@pytest.fixture
def scripted() -> Iterator[int]:
    """A server that answers by what the path says; the number is its port."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:

        def serve() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(sock,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def answer(sock: socket.socket) -> None:
    with sock:
        path = sock.recv(1000).rstrip().rpartition(b",")[2]
        replies = {b"ok": b"0,1,ok\n", b"busy": b"3,0,busy\n", b"other": b"0,1,somebody\n", b"words": b"hello\n"}
        if path == b"silent":
            sock.recv(1000)
        sock.sendall(replies.get(path, b""))


@needs_compiler
def test_generator_tells_outcomes_apart(scripted: int) -> None:
    paths = ["ok", "busy", "other", "words", "closed", "silent"]
    plan = [load.Planned(0.02 * number, number, f"0,0,{path}") for number, path in enumerate(paths)]
    looks: list[float] = []
    seen = load.open_loop(scripted, plan, 1.0, looks.append)
    found = {paths[each.tag]: each.outcome for each in seen.answers}
    assert found == {
        "ok": "ok",
        "busy": "status-3",
        "other": "wrong",
        "words": "wrong",
        "closed": "closed",
        "silent": "timeout",
    }
    assert all(each.end >= each.due == 0.02 * each.tag for each in seen.answers)
    assert looks
    timeout = next(each for each in seen.answers if each.outcome == "timeout")
    assert timeout.latency >= 1.0


@needs_compiler
def test_nobody_there_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    seen = load.open_loop(port, [load.Planned(0.0, 0, "0,0,f")], 1.0, lambda _: None)
    assert [each.outcome for each in seen.answers] == ["refused"]
    assert {each.outcome for each in load.closed_loop(port, "line", 3, 5.0, "0,0,f", lambda _: None).answers} == {
        "refused"
    }


def test_failures_do_not_make_latencies_better() -> None:
    answers = [load.Answer(0, 0.0, 0.001, 0.0, "ok")] * 50 + [load.Answer(0, 0.0, 0.001, None, "refused")] * 50
    found = load.latencies(answers, patience=10.0)
    assert found.p99_ms > 9_000
    assert found.ok == 50
    assert HdrHistogram.decode(found.histogram).get_total_count() == 100


def test_recovery_counts_from_the_lift() -> None:
    def sick(due: float, end: float, outcome: str = "ok") -> load.Answer:
        return load.Answer(questions.SICK, due, end, due, outcome)

    answers = [sick(9.0, 10.5), sick(10.2, 10.3, "status-3"), sick(10.6, 10.9), sick(11.0, 12.5), sick(13.0, 13.1)]
    assert questions.served_again(answers, 10.0) == pytest.approx(0.9)
    assert questions.recovered(answers, 10.0, 20.0) == pytest.approx(1.0)
    assert questions.recovered([*answers, sick(19.5, 20.0, "timeout")], 10.0, 20.0) is None
    assert questions.served_again([sick(11.0, 21.0, "timeout")], 10.0) is None


def test_rows_of_the_file() -> None:
    names = [each.name for each in rows.load_rows()]
    assert len(set(names)) == len(names)
    assert {report.OURS, report.OURS_NATIVE, *PYTHON_ROWS} <= set(names)
    for each in rows.load_rows():
        assert each.name in (report.OURS, report.OURS_NATIVE) or any(each.source.iterdir())


@needs_compiler
@pytest.mark.parametrize("name", [report.OURS, "python-threads", "python-asyncio"])  # the others share their protocol
def test_bad_input_is_answered_and_survived(name: str) -> None:
    found = bad_input.ask_bad_input(row(name), late=False, progress=lambda _: None)
    assert (found.wrong, found.fatal) == ({}, [])
    assert found.asked > 30


@pytest.mark.parametrize("name", PYTHON_ROWS)
def test_python_rows_read_below_their_root_only(name: str, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "file").write_bytes(b"x" * 100_000)
    (tmp_path / "outside").write_bytes(b"x")
    with process.Peer(row(name), tmp_path / "root") as peer:
        assert peer.ask(b"4,0,file\n", 10.0).startswith(b"4,")
        for path in (b"none", b"../outside", b"/etc/passwd", b"file/x", b"a/../file"):
            assert peer.ask(b"4,0," + path + b"\n", 10.0).startswith(b"5,")
        assert b" 404 " in peer.ask(b"GET /200,0,none HTTP/1.0\r\n\r\n", 10.0)


@needs_compiler
def test_a_row_that_has_the_problem_is_told_from_one_that_has_not() -> None:
    threads = questions.beside(row("python-threads"), TINY, 1)
    hub = questions.beside(row("gevent-hub"), TINY, 1)
    assert (threads.problem, hub.problem) == (False, True)
    assert threads.slow == hub.slow == {"ok": 1}


@needs_compiler
@pytest.mark.skipif(FaultFS.why_not() is not None, reason=f"FaultFS: {FaultFS.why_not()}")
def test_hang_is_real() -> None:
    hub = questions.hang(row("gevent-hub"), TINY, lambda _: None)
    threads = questions.hang(row("python-threads"), TINY, lambda _: None)
    for found in (hub, threads):
        assert [each.name for each in found.phases] == ["before", "hang", "after"]
        assert found.phases[0].sick.ok == found.phases[0].sick.count
        assert found.lives
        assert found.served_again is not None
        during = found.phases[1]
        assert during.sick_got.get("ok", 0) < 10  # those that were under way when it began
    assert hub.phases[1].healthy_in_time < hub.phases[1].healthy.count * 0.7
    assert threads.threads_end > threads.threads_before + 30


def test_builds_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(rows, "PEERS", tmp_path / "peers")
    source = tmp_path / "peers" / "it" / "server.x"
    source.parent.mkdir(parents=True)
    source.write_text("one")
    count = "import pathlib, sys; p = pathlib.Path('count'); p.write_text((p.read_text() if p.exists() else '') + 'x')"
    it = rows.Row(
        name="it", file="x", language="x", schedules="x", needs="{python}", keep_alive=True,
        build=[["{python}", "-c", count], ["cp", "{source}/server.x", "{build}/server"]],
        version=["{python}", "-V"], start=["{build}/server"],
    )  # fmt: skip
    for text, builds in (("one", "x"), ("one", "x"), ("two", "xx")):
        source.write_text(text)
        it.make()
        assert (it.built / "count").read_text() == builds
        assert (it.built / "server").read_text() == text


def test_what_cannot_be_measured_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = {"language": "x", "schedules": "x", "needs": "{python}", "version": ["{python}", "-V"], "keep_alive": True}
    made = [
        rows.Row(name="absent", file="x", start=["x"], **{**python, "needs": "no-such-compiler"}),  # type: ignore[arg-type]
        rows.Row(name="broken", file="x", start=["x"], build=[[sys.executable, "-c", "exit('no way')"]], **python),  # type: ignore[arg-type]
        rows.Row(name="dying", file="x", start=[sys.executable, "-c", "exit('alas')"], **python),  # type: ignore[arg-type]
    ]
    monkeypatch.setattr(rows, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(rows, "PEERS", tmp_path / "peers")
    monkeypatch.setattr(seedtable, "load_rows", lambda: made)
    monkeypatch.setattr(seedtable, "build_generator", lambda: None)
    output = tmp_path / "out"
    done = CliRunner().invoke(
        seedtable.main, ["--quick", "--no-plot", "--questions", "one_slow", "--output", str(output)]
    )
    assert done.exit_code == 0, done.output
    text = (output / "seedtable.md").read_text()
    assert "no-such-compiler is not there" in text
    assert "no way" in text
    assert "alas" in text
    for name in report.SEED:  # none of them is in this file
        assert f"**{name}** was not measured" in text


@needs_compiler
def test_report_and_readme(tmp_path: Path) -> None:
    """One row, two questions: JSON that can be read back, and a section that is rewritten from it alone."""
    done = CliRunner().invoke(
        seedtable.main,
        ["--quick", "--no-plot", "--rows", "python-threads", "--questions", "one_slow,line", "--output", str(tmp_path)],
    )
    assert done.exit_code == 0, done.output
    found = msgspec.json.decode((tmp_path / "seedtable.json").read_bytes(), type=report.Report)
    [only] = found.results
    assert only.answers.failures == {}
    assert only.answers.line is not None
    assert only.answers.line.answers.ok > 0
    assert only.answers.hang is None
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.rewrite_readme(readme, found, "results")
    once = readme.read_text()
    assert "old" not in once
    assert "python-threads/server.py" in once
    assert once.startswith("before\n")
    assert once.endswith("\nafter\n")
    report.rewrite_readme(readme, found, "results")
    assert readme.read_text() == once
    readme.write_text("nothing")
    with pytest.raises(ValueError, match="no section"):
        report.rewrite_readme(readme, found, "results")


def test_unknown_rows_and_questions_are_refused() -> None:
    for option in ("--rows", "--questions"):
        done = CliRunner().invoke(seedtable.main, [option, "nonsense"])
        assert done.exit_code == 2
        assert "nonsense" in done.output


def test_stop_ends_a_server_that_does_not_listen_to_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "STOP_SECONDS", 0.3)
    program = (
        "import signal, socket, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "s = socket.create_server(('127.0.0.1', int(sys.argv[1])))\n"
        "while True:\n c, _ = s.accept(); c.recv(100); c.sendall(b'0,0,f\\n'); c.close()\n"
    )
    stubborn = rows.Row(
        name="stubborn", file="x", language="x", schedules="x", needs="{python}", version=["x"], keep_alive=False,
        start=[sys.executable, "-c", program, "{port}"],
    )  # fmt: skip
    peer = process.Peer(stubborn)
    begin = time.monotonic()
    peer.stop()
    assert not peer.alive()
    assert time.monotonic() - begin < 30


@needs_compiler
@pytest.mark.skipif(FaultFS.why_not() is not None, reason=f"FaultFS: {FaultFS.why_not()}")
def test_isolation(tmp_path: Path) -> None:
    """Several disks, several of which hang; every scenario is in the result."""
    options = ["--rows", report.OURS, "--disks", "3", "--hung", "2", "--rate", "60", "--lead", "2", "--hang", "2"]
    options += ["--after", "2", "--patience", "2", "--no-plot", "--output", str(tmp_path)]
    done = CliRunner().invoke(isolation.main, options)
    assert done.exit_code == 0, done.output
    found = msgspec.json.decode((tmp_path / "isolation.json").read_bytes(), type=isolation.Report)
    assert [(each.disks, each.hung, each.failure) for each in found.scenarios] == [(4, 1, None), (3, 2, None)]
    for each in found.scenarios:
        assert each.found is not None
        assert each.found.phases[1].sick_got.get("ok", 0) < each.found.phases[1].sick.count / 2
        assert each.found.phases[0].healthy.ok > 0


@needs_compiler
def test_growth(tmp_path: Path) -> None:
    options = ["--rows", "diskread,python-threads", "--stuck", "20", "--disks", "2", "--connections", "20"]
    done = CliRunner().invoke(growth.main, [*options, "--no-plot", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    found = msgspec.json.decode((tmp_path / "growth.json").read_bytes(), type=growth.Report)
    assert [each.failure for each in found.points] == [None] * 5
    for each in found.points:
        if each.what == "stuck":
            assert each.used is not None
            assert each.used.threads > 20
        if each.fast is not None:
            assert each.fast.count == growth.RATE * growth.SECONDS
