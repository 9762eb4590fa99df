"""The benchmarks of reads run and write what their readers rely on. Their figures are nobody's business here."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from benchmarks import busyhub, coldread, hop, hotpath, http_files, report

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parent.parent


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=ROOT)


def check_text(name: str, output: Path, printed: str, tables: Sequence[report.Table]) -> None:
    text = (output / f"{name}.md").read_text()
    for each in tables:
        assert each.title in printed
        assert f"### {each.title}" in text
    for written in (text, (output / f"{name}.json").read_text()):
        assert str(output) not in written
        assert str(ROOT) not in written
    assert not (output / f"{name}.png").exists()


def test_hop(tmp_path: Path) -> None:
    done = run("hop", "--rounds", "1", "--window", "0.01", "--concurrency", "1,3", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = msgspec.json.decode((tmp_path / "hop.json").read_bytes(), type=hop.Report)
    loops = {each for each in hop.PEERS if each not in found.environment.missing}
    assert {"gevent", "asyncio", "threads"} <= loops
    assert {(cell.loop, cell.callers) for cell in found.cells} == {
        (loop, callers) for loop in loops for callers in (1, 3)
    }
    assert all(min(cell.ours_us + cell.peer_us) > 0 for cell in found.cells)
    check_text("hop", tmp_path, done.stdout, hop.tables(found))


def test_hotpath(tmp_path: Path) -> None:
    tiny = ["--family", "gevent", "--rounds", "2", "--window", "0.001", "--concurrency", "1,3", "--no-plot"]
    done = run("hotpath", *tiny, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = msgspec.json.decode((tmp_path / "hotpath.json").read_bytes(), type=hotpath.Report)
    ways = {each.way for each in found.cells}
    assert {"os.pread", "Disk.read, threadpool engine", "gevent.threadpool.apply, open file"} <= ways
    assert len(found.cells) == len(ways) * 3 * 2
    for cell in found.cells:
        assert len(cell.wall_s) == len(cell.cpu_s) == 2
        assert min(cell.wall_s) > 0
        if cell.way == "os.pread":
            assert cell.to_pread == report.Spread(1, 1, 1)
    # Those that did not take part are named, and a promise about them is neither kept nor broken.
    assert not ways & set(found.environment.missing)
    assert found.verdicts[-1].kept is None
    check_text("hotpath", tmp_path, done.stdout, hotpath.tables(found))


@pytest.mark.parametrize("family", ["eventlet", "asyncio", "trio"])
def test_a_family_reads_or_says_what_it_lacks(family: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(8192))
    process = hotpath.Process(family, tmp_path)
    with contextlib.closing(process):
        assert process.readers or process.missing
        for name in process.readers:
            for readers in (1, 3):
                found = process.measure(name=name, path="file", size=4096, span=8192, concurrency=readers, count=6)
                assert found["wall_s"] > 0


def test_coldread(tmp_path: Path) -> None:
    tiny = ["--size", "64", "--depths", "1,2", "--rounds", "1", "--seconds", "0.1", "--no-plot"]
    done = run("coldread", *tiny, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = msgspec.json.decode((tmp_path / "coldread.json").read_bytes(), type=coldread.Report)
    measured = {(each.way, each.pattern, each.depth) for each in found.cells}
    assert {(coldread.POOL, what, depth) for what in ("random", "sequential") for depth in (1, 2)} <= measured
    assert (f"{coldread.CHUNKS}, threadpool", "stream", 1) in measured
    assert ("fio" in found.environment.missing) != ((coldread.PSYNC, "random", 2) in measured)
    assert all(each.samples[0].reads > 0 for each in found.cells)
    check_text("coldread", tmp_path, done.stdout, coldread.tables(found))


def test_busyhub(tmp_path: Path) -> None:
    done = run("busyhub", "--quick", "--rounds", "1", "--seconds", "0.3", "--no-plot", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = msgspec.json.decode((tmp_path / "busyhub.json").read_bytes(), type=busyhub.Report)
    assert {(each.way, each.share) for each in found.cells} >= {(busyhub.POOL, 0), (busyhub.APPLY, 50)}
    for cell in found.cells:
        (sample,) = cell.samples
        assert sample.reads > 0
        assert (sample.busy_share > 0) == (cell.share > 0)
        for percentile in ("p50", "p99", "p99_9"):  # histograms keep three digits
            assert getattr(sample.disk, percentile) <= 1.01 * getattr(sample.total, percentile)
            assert getattr(sample.added, percentile) <= 1.01 * getattr(sample.total, percentile)
    check_text("busyhub", tmp_path, done.stdout, busyhub.tables(found))


def test_http_files(tmp_path: Path) -> None:
    files = {4096: 3, 65_536: 3}
    about = report.Run()
    with http_files.test_files(tmp_path, files) as (root, place), contextlib.ExitStack() as stack:
        servers = http_files.start_servers(root, place, list(files), about, stack)  # looks at what they serve
        names = {each.name for each in servers}
        assert {http_files.BARE, http_files.OURS} <= names
        assert len(names) + len(about.missing) == 7
        assert all(each.cpu_s() >= 0 for each in servers)


def test_a_load_generator_is_understood(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = """\
  Latency Distribution
     50%  950.00us
     75%    1.10ms
     90%    1.40ms
     99%    1.03s
  1000 requests in 1.10s, 4.00MB read
  Socket errors: connect 0, read 1, write 0, timeout 2
  Non-2xx or 3xx responses: 4
Requests/sec:    900.00
"""

    class Server:
        port = 1

        def path(self, size: int, number: int | None = None) -> str:
            return f"/{size}/{number}"

    settings = msgspec.structs.replace(http_files.QUICK, files={4096: 100})
    for more, rate in (("", 900.0), ("All files: 0.5\n", 200.0)):
        done = subprocess.CompletedProcess([], 0, stdout=more + said)
        monkeypatch.setattr(subprocess, "run", lambda *_args, _done=done, **_kw: _done)
        found = http_files.wrk(Server(), 4096, not more, settings, tmp_path)  # type: ignore[arg-type]
        assert found == (1000, 7, rate, 950 * 1e-6, 1.03)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("hop", ["--rounds", "0"], "rounds"),
        ("hotpath", ["--concurrency", "one"], "try 1,4,16"),
        ("coldread", ["--depths", "0"], "1 to 1024"),
        ("http_files", ["--seconds", "0"], "1<=x<=60"),
    ],
)
def test_refused(name: str, arguments: list[str], said: str) -> None:
    done = run(name, *arguments)
    assert done.returncode == 2
    assert said in done.stderr


def test_verdicts() -> None:
    def kept(median: float, *, at_most: bool) -> bool | None:
        ratio = report.Spread(median, 0, 100)
        return report.Verdict(promise="it", ratio=ratio, bound=5, at_most=at_most).kept

    assert kept(5, at_most=True)
    assert not kept(5.1, at_most=True)
    assert kept(5, at_most=False)
    assert not kept(4.9, at_most=False)
