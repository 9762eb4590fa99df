"""The benchmarks run and write what their readers rely on. Their figures are nobody's business here."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import gevent
import msgspec
import pytest
from hdrh.histogram import HdrHistogram

from benchmarks import gil, machine
from diskread._syscalls import stall

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    *("--concurrency", "1,3"),
    *("--repetitions", "2"),
    *("--stall", "4"),
    *("--window", "0.02"),
    *("--blocks", "16"),
]


def run_gil(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gil.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory with the results of a tiny run, and what the run printed."""
    output = tmp_path_factory.mktemp("benchmark") / "results"
    done = run_gil("--quick", "--no-plot", "--output", str(output), *TINY)
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def test_report(result: tuple[Path, str]) -> None:
    output, _ = result
    report = msgspec.json.decode((output / "gil.json").read_bytes(), type=gil.Report)
    assert report.settings.concurrency == (1, 3)
    assert len(report.idle_repetitions) == 2
    assert [each.name for each in report.scenarios] == ["stall", "uncached", "cached"]
    for scenario in report.scenarios:
        points = [(each.concurrency, each.mode) for each in scenario.points]
        assert points == [(1, "held"), (1, "released"), (3, "held"), (3, "released")]
        assert [each.concurrency for each in scenario.ratios] == [1, 3]
        for point in scenario.points:
            assert len(point.repetitions) == 2
            assert all(each.calls % point.concurrency == 0 and each.calls > 0 for each in point.repetitions)
            assert all(each.elapsed_s >= 0.02 for each in point.repetitions)
            assert point.wall_s.low <= point.wall_s.median <= point.wall_s.high
            late = point.lateness_s
            assert 0 < late.p50 <= late.p99 <= late.p99_9 <= late.max
            assert late.count == sum(each.lateness_s.count for each in point.repetitions)
            assert HdrHistogram.decode(late.histogram).get_total_count() == late.count
    assert {(each.bytes, each.function) for each in report.serial} == set(
        itertools.product((4096, 1 << 20), ("os.pread", "pread", "pread_holding_gil"))
    )


def test_held_stalls_come_one_after_another(result: tuple[Path, str]) -> None:
    output, _ = result
    report = msgspec.json.decode((output / "gil.json").read_bytes(), type=gil.Report)
    if not report.machine.gil:
        pytest.skip("this Python has no GIL to hold")
    held = next(each for each in report.scenarios[0].points if (each.concurrency, each.mode) == (3, "held"))
    assert held.wall_s.low >= 3 * 0.004  # a lower bound: however loaded the machine is, it cannot be less


def test_results_name_no_path_and_no_host(result: tuple[Path, str]) -> None:
    output, _ = result
    for name in ("gil.json", "gil.md"):
        text = (output / name).read_text()
        assert str(output) not in text
        assert str(ROOT) not in text
    assert not (output / "gil.png").exists()


def test_markdown_has_the_tables_of_the_terminal(result: tuple[Path, str]) -> None:
    output, printed = result
    titles = [line[4:] for line in (output / "gil.md").read_text().splitlines() if line.startswith("### ")]
    assert len(titles) == 7
    for title in titles:
        assert title in printed


def test_plot(result: tuple[Path, str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'diskread[plots]'")
    output, _ = result
    gil.plot(msgspec.json.decode((output / "gil.json").read_bytes(), type=gil.Report), tmp_path / "gil.png")
    assert (tmp_path / "gil.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--concurrency", "one"], "try 1,4,16"),
        (["--concurrency", "0"], "1 to 1024"),
        (["--concurrency", "32", "--blocks", "16"], "larger --blocks"),
    ],
)
def test_refused(arguments: list[str], said: str) -> None:
    done = run_gil(*arguments)
    assert done.returncode == 2
    assert said in done.stderr


def test_ticker_records_every_tick_of_a_hub_that_stands_still() -> None:
    ticker = gil.Ticker()
    gevent.sleep(0.002)
    stall(0.03)  # on the hub's own thread
    late = ticker.stop()
    # At least 29 ticks were due while the hub stood still, each 1 ms less late than the one before.
    worst = late.index(max(late))
    run = late[worst : worst + 29]
    assert late[worst] >= 28_000_000
    assert len(run) == 29
    assert [first - second for first, second in itertools.pairwise(run)] == [gil.TICK_NS] * 28


def test_distribution() -> None:
    found = gil.distribution([1_000_000 * each for each in range(1, 1001)])
    assert found.count == 1000
    assert found.max == 1.0
    assert found.p50 == pytest.approx(0.5, rel=0.002)
    assert found.p99 == pytest.approx(0.99, rel=0.002)


def test_machine() -> None:
    described = machine.describe()
    assert described.cores >= 1
    assert "unknown" not in (described.cython, described.diskread, described.gevent)
    assert machine.file_system(ROOT) != "unknown"


def test_cpu_of_others_is_a_share() -> None:
    clock = machine.CpuClock()
    gevent.sleep(0.05)
    share = clock.others_share()
    assert share is None or 0 <= share <= 1.5  # /proc/stat counts in ticks of 10 ms
