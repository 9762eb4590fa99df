"""A mirror of two disks, one of which is slow, now and then slow, or hangs: what do clients get, and what does it cost?

Every read reaches its disk (FUSE, past the page cache), the load is open-loop and compares every byte. README.md says
how to read the result.
"""

from __future__ import annotations

import contextlib
import importlib.util
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from hdrh.histogram import HdrHistogram
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if not __package__:  # run as a script: its own directory is on the path, the one above is not
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.hang import latencies, percentile_ms, statuses
from benchmarks.load import Load, Plan
from benchmarks.report import RESULTS, Environment, Run, Table, Verdict, document, spread, verdict_table, write
from tests.faults.injectors import FaultFS, SetupError
from tests.server.raw_client import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from benchmarks.load import Answer
    from server.status import MirrorDocument

NAME = "mirror"
FILES, SIZE = 8, 1 << 20
SHARE = 0.05
FIXED = 0.05
"""Seconds: `hedge_after` of the mirror that does not go by p95."""

TARGETS = {"b": "the better disk alone", "p95": 'mirror, "p95"', "fixed": f"mirror, {FIXED * 1000:g} ms"}
MIRRORS = {"p95": '"p95"', "fixed": str(FIXED)}

SLOW, HICCUP = 0.02, 0.1
FAULTS: dict[str, tuple[str, Callable[[FaultFS], None]]] = {
    "none": ("both disks are well", lambda _: None),
    "slow": (f"each read of a takes {SLOW * 1000:g} ms more", lambda disk: disk.delay(SLOW)),
    "now and then": (
        f"a tenth of the reads of a take {HICCUP * 1000:g} ms more",
        lambda disk: disk.delay(HICCUP, range=(0, SIZE // 10)),
    ),
    "hang": ("a hangs", lambda disk: disk.hang()),
}
WARM_UP = 1.0
"""Seconds at the begin that do not count: connections are made, and nothing is known of the disks yet."""

PATIENCE = 20.0
SETTLE = 0.5


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """What the clients got in a part of a run.

    Attributes:
        name: "before", "during" or "after" the fault.
        seconds: Its length.
        requests: Requests that were due in it.
        statuses: What became of them; 206 with the right bytes is what they should.
        p50_ms, p99_ms, p99_9_ms, max_ms: Of the time from when a request was due to its last byte; of right answers.
        window_p99_ms: p99 of each second in a row.
        histogram: All of them in microseconds, an encoded HdrHistogram.
    """

    name: str
    seconds: float
    requests: int
    statuses: dict[str, int]
    p50_ms: float
    p99_ms: float
    p99_9_ms: float
    max_ms: float
    window_p99_ms: list[float]
    histogram: str

    @property
    def failed(self) -> int:
        """Requests that were not answered right."""
        return self.requests - self.statuses.get("206", 0)


class Scene(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a server.

    Attributes:
        fault: What was wrong with disk a: a key of FAULTS.
        target: Who was asked: a key of TARGETS.
        phases: Before, during and after the fault.
        requests: Requests that were sent in all.
        reads: Reads that reached each disk, as its file system has counted them.
        hedges, hedges_won, hedges_refused, failovers, answers: What the mirror has counted.
    """

    fault: str
    target: str
    phases: list[Phase]
    requests: int
    reads: dict[str, int]
    hedges: int = 0
    hedges_won: int = 0
    hedges_refused: int = 0
    failovers: dict[str, int] = {}
    answers: dict[str, int] = {}

    @property
    def extra(self) -> float:
        """Reads that reached a disk beyond one for each request, as a share of the requests."""
        return sum(self.reads.values()) / self.requests - 1

    def phase(self, name: str) -> Phase:
        """The phase of that name."""
        return next(each for each in self.phases if each.name == name)


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The result: every run, in the order in which they were made. Times in seconds unless the name says otherwise."""

    environment: Environment
    rate: float
    share: float
    hedge_after: float
    lead: float
    seconds: float
    hang: float
    scenes: list[Scene]
    verdicts: list[Verdict]


def write_files(disks: Sequence[FaultFS]) -> None:
    """The same files on all disks, with the same times."""
    noise = random.Random(0)
    for number in range(FILES):
        content = noise.randbytes(SIZE)
        for disk in disks:
            (disk.backing / f"f{number}").write_bytes(content)


@contextlib.contextmanager
def serving(roots: dict[str, Path], directory: Path) -> Iterator[ServerProcess]:
    """The server with both disks, alone and as mirrors; its limits are the defaults."""
    lines = [f'[disk.{name}]\nroot = "{root}"' for name, root in roots.items()]
    for name, after in MIRRORS.items():
        lines += [f"[mirror.{name}]", 'disks = ["a", "b"]', f"hedge_after = {after}", f"hedge_share = {SHARE}"]
    config = directory / "diskread.toml"
    config.write_text("\n".join(lines))
    server = ServerProcess(directory, "--config", str(config))
    try:
        for name in roots:
            server.wait_for_first_answer(name)
        yield server
    finally:
        server.kill()


def run(fault: str, target: str, rate: float, lead: float, seconds: float, after: float) -> Scene:
    """Measure: `lead` seconds without the fault, `seconds` with it, `after` seconds without it again."""
    with contextlib.ExitStack() as stack:
        disks = {name: stack.enter_context(FaultFS("--direct-io", max_stall=seconds + 60)) for name in ("a", "b")}
        write_files(list(disks.values()))
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(serving({name: disk.root for name, disk in disks.items()}, directory))
        reads_before = {name: disk.counters().get("read", 0) for name, disk in disks.items()}
        begin = time.monotonic() + 1.5
        load = Load(
            Plan(
                port=server.port,
                begin=begin,
                seconds=lead + seconds + after,
                rate=rate,
                timeout=PATIENCE,
                seed=0,
                content={target: str(disks["b"].backing)},
                output=str(directory / "answers"),
            )
        )
        stack.callback(load.kill)
        sleep_until(begin + lead)
        faulty = time.monotonic()
        FAULTS[fault][1](disks["a"])
        sleep_until(faulty + seconds)
        lifted = time.monotonic()
        disks["a"].release()
        answers = load.answers()
        mirror = next((each for each in server.status().mirrors if each.name == target), None)
        reads = {name: disk.counters().get("read", 0) - reads_before[name] for name, disk in disks.items()}
        end = begin + lead + seconds + after
        phases = [phase("before", answers, begin + WARM_UP, faulty), phase("during", answers, faulty, lifted)]
        if after:
            phases.append(phase("after", answers, lifted, end))
        scene = Scene(fault=fault, target=target, phases=phases, requests=len(answers), reads=reads)
        if server.stop() != 0:
            raise click.ClickException("the server did not end in peace")
        return scene if mirror is None else with_counts(scene, mirror)


def with_counts(scene: Scene, mirror: MirrorDocument) -> Scene:
    """A run with what the mirror has counted."""
    counts = ("hedges", "hedges_won", "hedges_refused", "failovers", "answers")
    counted: Scene = msgspec.structs.replace(scene, **{name: getattr(mirror, name) for name in counts})
    return counted


def sleep_until(when: float) -> None:
    time.sleep(max(0.0, when - time.monotonic()))


def phase(name: str, answers: Sequence[Answer], begin: float, end: float) -> Phase:
    """The requests that were due between two times."""
    due = [each for each in answers if begin <= each.due < end]
    right = [each for each in due if each.status == 206]
    histogram = latencies(right)
    windows: list[list[Answer]] = [[] for _ in range(int(end - begin) + 1)]
    for each in right:
        windows[int(each.due - begin)].append(each)
    return Phase(
        name=name,
        seconds=end - begin,
        requests=len(due),
        statuses=statuses(due),
        p50_ms=percentile_ms(histogram, 50),
        p99_ms=percentile_ms(histogram, 99),
        p99_9_ms=percentile_ms(histogram, 99.9),
        max_ms=histogram.get_max_value() / 1000,
        window_p99_ms=[percentile_ms(latencies(window), 99) for window in windows if window],
        histogram=histogram.encode().decode("ascii"),
    )


def verdicts(scenes: Sequence[Scene]) -> list[Verdict]:
    """What is promised of a mirror one of whose disks hangs."""
    found = []
    for target in MIRRORS:
        hung = [each for each in scenes if (each.fault, each.target) == ("hang", target)]
        if not hung:
            continue
        failed = [sum(part.failed for part in each.phases) for each in hung]
        extra = [each.hedges / each.requests for each in hung]
        found += [
            Verdict(
                promise=f"{TARGETS[target]}: requests that fail while a disk hangs",
                ratio=spread([float(each) for each in failed]),
                bound=0,
                at_most=True,
            ),
            Verdict(
                promise=f"{TARGETS[target]}: hedges per request, all of the run",
                ratio=spread(extra),
                bound=SHARE,
                at_most=True,
            ),
        ]
        if target == "fixed":
            allowed = [2 * each.phase("before").p99_ms + FIXED * 1000 for each in hung]
            p99 = [each.phase("during").p99_ms for each in hung]
            found.append(
                Verdict(
                    promise=f"{TARGETS[target]}: p99 while a disk hangs : (2 x p99 before + hedge_after)",
                    ratio=spread([each / bound for each, bound in zip(p99, allowed, strict=True)]),
                    bound=1,
                    at_most=True,
                )
            )
    return found


def tables(report: Report) -> list[Table]:
    """What was found, for people."""
    promises = verdict_table(report.verdicts)
    faults = Table(
        "While the fault lasts",
        ("disk a", "asked", "requests", "failed", "p50 ms", "p99 ms", "p99.9 ms", "max ms", "p99 : better disk"),
        "Medians of the rounds. The last column compares with the better disk alone in the same round.",
    )
    costs = Table(
        "What it costs",
        (
            "disk a",
            "asked",
            "extra reads",
            "hedges",
            "won",
            "refused",
            "fail-overs from a",
            "from b",
            "answers of a, b",
        ),
        "Means of the rounds, of the whole run. Extra reads are counted by the disks themselves.",
    )
    for fault in FAULTS:
        alone = [each for each in report.scenes if (each.fault, each.target) == (fault, "b")]
        for target, title in TARGETS.items():
            rounds = [each for each in report.scenes if (each.fault, each.target) == (fault, target)]
            if not rounds:
                continue
            during = [each.phase("during") for each in rounds]
            middle = {
                name: statistics.median(getattr(each, name) for each in during)
                for name in ("p50_ms", "p99_ms", "p99_9_ms", "max_ms")
            }
            ratios = [each.p99_ms / other.phase("during").p99_ms for each, other in zip(during, alone, strict=False)]
            faults.rows.append(
                [
                    FAULTS[fault][0],
                    title,
                    str(sum(each.requests for each in during)),
                    str(sum(each.failed for each in during)),
                    *(f"{value:.2f}" for value in middle.values()),
                    f"{statistics.median(ratios):.2f}" if ratios else "-",
                ]
            )
            if target in MIRRORS:
                costs.rows.append([FAULTS[fault][0], title, *cost_of(rounds)])
    return [promises, faults, costs]


def cost_of(rounds: Sequence[Scene]) -> list[str]:
    counts = [
        statistics.mean(getattr(each, name) for each in rounds) for name in ("hedges", "hedges_won", "hedges_refused")
    ]
    failovers = [statistics.mean(each.failovers.get(disk, 0) for each in rounds) for disk in "ab"]
    answers = [statistics.mean(each.answers.get(disk, 0) for each in rounds) for disk in "ab"]
    return [
        f"{statistics.mean(each.extra for each in rounds):.1%}",
        *(f"{each:.0f}" for each in (*counts, *failovers)),
        ", ".join(f"{each:.0f}" for each in answers),
    ]


def plot(report: Report, path: Path) -> None:
    """Draw the distributions while the fault lasts, and the hang second by second.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    shown = [fault for fault in FAULTS if any(each.fault == fault for each in report.scenes)]
    points = [1 - 10 ** (-each / 20) for each in range(61)]  # to 99.9%, evenly on the axis
    colours = dict(zip(TARGETS, ("black", "tab:blue", "tab:orange"), strict=True))
    with mpl.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3}):
        figure, axes = plt.subplots(2, len(shown), figsize=(3.2 * len(shown), 5.6), squeeze=False, layout="constrained")
        for fault, (upper, lower) in zip(shown, axes.T, strict=True):
            for target, title in TARGETS.items():
                rounds = [each for each in report.scenes if (each.fault, each.target) == (fault, target)]
                if not rounds:
                    continue
                together = HdrHistogram(1, 60_000_000, 3)
                for each in rounds:
                    together.decode_and_add(each.phase("during").histogram)
                at = [percentile_ms(together, 100 * point) for point in points]
                upper.plot([1 / (1 - point) for point in points], at, label=title, color=colours[target])
                second = [value for each in rounds[0].phases for value in each.window_p99_ms]
                lower.step(range(len(second)), second, where="post", color=colours[target])
            upper.set(xscale="log", yscale="log", title=FAULTS[fault][0])
            upper.set_xticks([2, 10, 100, 1000], ["50%", "90%", "99%", "99.9%"])
            lower.set(yscale="log", xlabel="seconds, first round")
            before = len(rounds[0].phase("before").window_p99_ms)
            during = len(rounds[0].phase("during").window_p99_ms)
            lower.axvspan(before, before + during, color="gray", alpha=0.2, linewidth=0)
        axes[0][0].set_ylabel("ms, by percentile, during the fault")
        axes[1][0].set_ylabel("p99 of each second, ms")
        axes[0][0].legend(fontsize=8)
        figure.savefig(path, dpi=110)
        plt.close(figure)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--rate", type=click.FloatRange(1, 2000), default=150.0, help="Requests per second.")
@click.option("--rounds", type=click.IntRange(1), default=3, help="Rounds; in each, all take their turn.")
@click.option("--lead", type=click.FloatRange(2), default=5.0, help="Seconds before the fault.")
@click.option("--seconds", type=click.FloatRange(2), default=10.0, help="Seconds of a fault that is no hang.")
@click.option("--hang", type=click.FloatRange(2), default=60.0, help="Seconds of the hang.")
@click.option("--after", type=click.FloatRange(0), default=10.0, help="Seconds after the hang.")
@click.option("--faults", default=",".join(FAULTS), help="Which, with commas in between.")
@click.option("--no-plot", is_flag=True, help="Leave the picture out; matplotlib is not needed then.")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=RESULTS, help="Directory for mirror.*."
)
def main(
    *,
    rate: float,
    rounds: int,
    lead: float,
    seconds: float,
    hang: float,
    after: float,
    faults: str,
    no_plot: bool,
    output: Path,
) -> None:
    """Measure a mirror of two disks against the better disk alone. Needs root and /dev/fuse.

    \b
    Examples:
      sudo python benchmarks/mirror.py                                     # under 20 minutes
      sudo python benchmarks/mirror.py --rounds 1 --lead 2 --seconds 3 --hang 5 --after 3 --output /tmp/mirror
    """
    wanted = [each.strip() for each in faults.split(",")]
    if wrong := [each for each in wanted if each not in FAULTS]:
        raise click.UsageError(f"no such fault: {', '.join(wrong)}; there are {', '.join(FAULTS)}")
    if not no_plot and importlib.util.find_spec("matplotlib") is None:
        raise click.UsageError("the picture needs matplotlib (pip install 'diskread[plots]'); or give --no-plot")
    taken, scenes = Run(), []
    order = [(fault, target) for _ in range(rounds) for fault in wanted for target in TARGETS]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=len(order))
            for fault, target in order:
                progress.update(task, description=f"{FAULTS[fault][0]}: {TARGETS[target]}")
                hangs = fault == "hang"
                scenes.append(run(fault, target, rate, lead, hang if hangs else seconds, after if hangs else 0.0))
                progress.advance(task)
    except SetupError as error:
        raise click.ClickException(str(error)) from error
    report = Report(
        environment=taken.environment(),
        rate=rate,
        share=SHARE,
        hedge_after=FIXED,
        lead=lead,
        seconds=seconds,
        hang=hang,
        scenes=scenes,
        verdicts=verdicts(scenes),
    )
    found = tables(report)
    intro = f"Open-loop load, {rate:g} requests per second of 4 KiB, {rounds} rounds."
    text = document("A mirror of two disks", NAME, intro, report.environment, found, plot=not no_plot)
    write(output, NAME, report, text, found)
    if not no_plot:
        plot(report, output / f"{NAME}.png")


if __name__ == "__main__":
    main()
