"""What a run found, as tables and pictures. All of it comes from the report: nothing here is measured or typed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import msgspec

from benchmarks.machine import Machine  # noqa: TC001 - msgspec needs the types of fields at run time

from .questions import Answers, Beside, Burst, Hang, Phase, Settings, Throughput
from .rows import Row  # noqa: TC001

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

SEED = ("c", "d", "csharp", "java", "scala", "nim", "jython", "go", "eventlet", "rust")
"""The ten rows of the original table."""

OURS, OURS_NATIVE = "diskread", "diskread-native"
BEGIN, END = "<!-- seedtable -->", "<!-- /seedtable -->"
NONE = "-"


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table.

    Attributes:
        row: What was started; None for a row of the original table that rows.toml does not have.
        name: Of the row.
        toolchain: Version of what it was built with.
        lacks: Why nothing could be asked of it; None when it could.
        answers: To what it was asked.
        elapsed: Seconds that it took to ask.
        others_cpu_share: Share of the machine's CPU time meanwhile that went neither to it nor to the load.
    """

    name: str
    row: Row | None
    toolchain: str = ""
    lacks: str | None = None
    answers: Answers = msgspec.field(default_factory=Answers)
    elapsed: float = 0.0
    others_cpu_share: float | None = None


class Report(msgspec.Struct, kw_only=True):
    """Everything that a run found.

    Attributes:
        format: Grows when the structure changes in a way that readers must know of.
        started: Time of day, ISO 8601, UTC.
        quick: Whether it was but a quick look.
        machine: The machine and the versions.
        load_average: 1, 5 and 15 minutes, before the run.
        settings: How much was asked.
        results: The rows.
        duration_s: Seconds that the run took.
    """

    format: int
    started: str
    quick: bool
    machine: Machine
    load_average: tuple[float, float, float]
    settings: Settings
    results: list[Result]
    duration_s: float = 0.0


# --- Tables -----------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, *, last_left: bool = False) -> list[str]:
    """A Markdown table; all columns but the first `left`, and the last if that is said, are aligned to the right."""
    aligned = ["---" if k < left or (last_left and k == len(head) - 1) else "--:" for k in range(len(head))]
    lines = [head, aligned, *rows]
    return ["| " + " | ".join(each.replace("|", "\\|") for each in line) + " |" for line in lines]


def markdown(report: Report) -> str:
    """The whole report."""
    settings = report.settings
    lines = [
        "# The table of the original experiment, measured",
        "",
        "Written by `python benchmarks/seedtable.py`; how to read it is in [README.md](../README.md#seedtablepy).",
    ]
    if report.quick:
        lines += ["", "**A quick look: short loads and short hangs. Not for quoting.**"]
    lines += ["", *seed_table(report), "", *_missing(report)]
    lines += [
        "## Simulated reads",
        "",
        f"Fast requests are of 10 ms, slow ones of {settings.slow:g} s; clients give up after {settings.patience:g} s. "
        f"Requests per second: {settings.clients} clients, reads of 0 ms.",
        "",
        *_simulated(report),
        "",
        "## A disk that really hangs",
        "",
        f"{settings.rate:g} requests per second to each of two disks, open-loop. One hangs for {settings.hang:g} s. "
        f"Clients give up after {settings.hang_patience:g} s; who got no right answer counts as having waited that "
        "long.",
        "",
        "![p99 of the healthy disk over time, by row](seedtable-hang.png)",
        "",
        *_healthy(report),
        "",
        *_sick(report),
        "",
        "![Threads and memory at the end of the hang, by row](seedtable-cost.png)",
        "",
        "## diskread against the others",
        "",
        *_ratios(report),
        "",
        *_bad_input(report),
        "## Machine",
        "",
        *table(("", ""), [*_machine(report)], left=2),
    ]
    return "\n".join(lines) + "\n"


def seed_table(report: Report) -> list[str]:
    """The original's columns and those that it could not have."""
    head = (
        "File", "Language", "Problem? 1 slow; 8 slow", "a disk hangs: healthy answered within 1 s", "their p99, ms",
        "threads", "MiB", "Tool",
    )  # fmt: skip
    lines = []
    for each in report.results:
        file = each.row.file if each.row else each.name
        language = each.row.language if each.row else ""
        if each.lacks:
            lines.append([f"`{file}`", language, *[NONE] * 5, f"not measured: {each.lacks}"])
            continue
        hang = each.answers.hang
        during = _phase(hang, "hang")
        lines.append(
            [
                f"`{file}`",
                language,
                verdict(each.answers),
                f"{during.healthy_in_time / max(1, during.healthy.count):.1%}" if during else NONE,
                f"{during.healthy.p99_ms:,.0f}" if during else NONE,
                f"{hang.threads_end:,}" if hang else NONE,
                _mib(hang.memory_end) if hang else NONE,
                each.toolchain,
            ]
        )
    return table(head, lines, left=2, last_left=True)


def verdict(answers: Answers) -> str:
    """Does a slow read hold up the others: beside one and beside eight."""
    letters = {True: "**Y**", False: "N", None: NONE}
    return "; ".join(letters[each] for each in answers.problem)


def _missing(report: Report) -> list[str]:
    lines = []
    for each in report.results:
        if each.lacks:
            lines.append(f"* **{each.name}** was not measured: {each.lacks}.")
        lines += [f"* **{each.name}**, {name}: {why}." for name, why in sorted(each.answers.failures.items())]
    return ["What could not be asked:", "", *lines, ""] if lines else []


def _measured(report: Report) -> list[Result]:
    return [each for each in report.results if not each.lacks]


def _simulated(report: Report) -> list[str]:
    (small, small_ms), (large, large_ms) = report.settings.small_burst, report.settings.large_burst
    head = (
        "row", "schedules a blocking read", "worst fast beside 1, ms", "beside 8, ms", f"{small} x {small_ms} ms, s",
        f"{large:,} x {large_ms / 1000:g} s, s", "failed", "MiB most", "KiB per request", "threads most",
        "line, per s", "HTTP kept alive, per s",
    )  # fmt: skip
    lines = []
    for each in _measured(report):
        a = each.answers
        lines.append(
            [
                each.name,
                each.row.schedules if each.row else "",
                _some(a.one_slow, _worst),
                _some(a.many_slow, _worst),
                _some(a.small_burst, lambda b: f"{b.wall:.2f}{_failures(b)}"),
                _some(a.large_burst, lambda b: f"{b.wall:.2f}"),
                _some(a.large_burst, lambda b: f"{b.answers.count - b.answers.ok:,}"),
                _some(a.large_burst, lambda b: _mib(b.memory_most)),
                _some(a.large_burst, lambda b: f"{(b.memory_most - b.memory_before) / 1024 / b.count:.0f}"),
                _some(a.large_burst, lambda b: f"{b.threads_most:,}"),
                _some(a.line, _per_second),
                _some(a.http, _per_second),
            ]
        )
    return table(head, lines, left=2)


def _failures(burst: Burst) -> str:
    failed = burst.answers.count - burst.answers.ok
    return f" ({failed} failed)" if failed else ""


def _worst(beside: Beside) -> str:
    failed = beside.fast.count - beside.fast.ok
    return f"{beside.fast.max_ms:,.0f}" + (f" ({failed} failed)" if failed else "")


def _per_second(throughput: Throughput) -> str:
    failed = throughput.answers.count - throughput.answers.ok
    return f"{throughput.per_second:,.0f}" + (f" ({failed:,} failed)" if failed else "")


def _healthy(report: Report) -> list[str]:
    head = (
        "row", "healthy p50 before, ms", "hang", "after", "p99 before, ms", "hang", "after",
        "right answers per s before", "hang", "after", "failed in the hang",
    )  # fmt: skip
    lines = []
    for each in _measured(report):
        if each.answers.hang is None:
            continue
        phases = each.answers.hang.phases
        during = _phase(each.answers.hang, "hang")
        lines.append(
            [
                each.name,
                *(f"{phase.healthy.p50_ms:,.1f}" for phase in phases),
                *(f"{phase.healthy.p99_ms:,.1f}" for phase in phases),
                *(f"{phase.healthy_per_second:.0f}" for phase in phases),
                _outcomes({name: n for name, n in during.healthy.outcomes.items() if name != "ok"}) if during else NONE,
            ]
        )
    return table(head, lines)


def _sick(report: Report) -> list[str]:
    head = (
        "row", "the hung disk's clients got", "and waited for it, p50 ms", "threads before", "end of hang",
        "MiB before", "end of hang", "served again, s", "recovered, s", "lives", "ends on SIGTERM in, s",
    )  # fmt: skip
    lines = []
    for each in _measured(report):
        hang, during = each.answers.hang, _phase(each.answers.hang, "hang")
        if hang is None or during is None:
            continue
        lines.append(
            [
                each.name,
                _outcomes(during.sick_got),
                f"{during.sick.p50_ms:,.0f}",
                f"{hang.threads_before:,}",
                f"{hang.threads_end:,}",
                _mib(hang.memory_before),
                _mib(hang.memory_end),
                "never" if hang.served_again is None else f"{hang.served_again:.2f}",
                "never" if hang.recovered is None else f"{hang.recovered:.2f}",
                "yes" if hang.lives else "**no**",
                f"{hang.end_seconds:.1f}",
            ]
        )
    return table(head, lines, left=2)


def _ratios(report: Report) -> list[str]:
    found = {each.name: each.answers for each in _measured(report)}
    ours = found.get(OURS)
    if ours is None:
        return ["diskread itself was not measured."]
    ways: list[tuple[str, Callable[[Answers], float | None]]] = [
        ("requests per second, line", lambda a: a.line.per_second if a.line else None),
        ("requests per second, HTTP", lambda a: a.http.per_second if a.http else None),
        ("wall time of 1,000 at once", lambda a: a.large_burst.wall if a.large_burst else None),
        ("memory at 1,000 at once", lambda a: a.large_burst.memory_most if a.large_burst else None),
        (
            "memory per request at 1,000 at once",
            lambda a: max(1, a.large_burst.memory_most - a.large_burst.memory_before) if a.large_burst else None,
        ),
    ]
    others = [name for name in found if name != OURS]
    lines = []
    for title, value in ways:
        mine = value(ours)
        theirs = [value(found[name]) for name in others]
        lines.append([title, *(f"{mine / each:.2f}" if mine and each else NONE for each in theirs)])
    return ["diskread's figure divided by that of each row.", "", *table(("", *others), lines)]


def _bad_input(report: Report) -> list[str]:
    lines = []
    for each in _measured(report):
        bad = each.answers.bad_input
        if bad is not None:
            wrong = "; ".join(f"{name}: {reply}" for name, reply in bad.wrong.items())
            survives = f"**no**: {', '.join(bad.fatal)}" if bad.fatal else "yes"
            lines.append([each.name, survives, f"{len(bad.wrong)} of {bad.asked}", f"`{wrong}`" if wrong else ""])
    if not lines:
        return []
    return [
        "## Bad input",
        "",
        *table(("row", "survives", "other replies than the wire's", "which"), lines, left=4),
        "",
    ]


def _machine(report: Report) -> list[tuple[str, str]]:
    shares = [each.others_cpu_share for each in report.results if each.others_cpu_share is not None]
    return [
        *report.machine.lines(),
        ("Run", f"{report.started}, {report.duration_s / 60:.0f} minutes"),
        ("Load average before it", f"{report.load_average[0]:.2f}"),
        (
            "CPU time that went neither to the row nor to the load, by row",
            f"{min(shares):.0%} to {max(shares):.0%}" if shares else "unknown",
        ),
    ]


def _phase(hang: Hang | None, name: str) -> Phase | None:
    return next((each for each in hang.phases if each.name == name), None) if hang else None


def _some(value: Any, text: Callable[[Any], str]) -> str:
    return NONE if value is None else text(value)


def _outcomes(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items()) or "none"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"


# --- README -----------------------------------------------------------------------------------------------------------


def readme_section(report: Report, results: str) -> str:
    """What stands between the marks in the README.

    Args:
        report: What was measured.
        results: Directory of the results, as the README has to name it.
    """
    settings = report.settings
    lines = [
        BEGIN,
        *seed_table(report),
        "",
        f"`Problem?` is the question of the original experiment, with one slow read of {settings.slow:g} s and with "
        f"eight. The columns after it are what it could not ask: a disk hangs for {settings.hang:g} s under "
        f"{settings.rate:g} requests per second, and so many go to a healthy disk as well; threads and memory are "
        "those at the end of the hang.",
        "",
        f"![p99 of the healthy disk over time while another one hangs]({results}/seedtable-hang.png)",
        END,
    ]
    return "\n".join(lines)


def rewrite_readme(path: Path, report: Report, results: str) -> None:
    """Replace what stands between the marks.

    Raises:
        ValueError: The file has no marks.
    """
    text = path.read_text("utf-8")
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{path} has no section between {BEGIN} and {END}")
    path.write_text(pattern.sub(lambda _: readme_section(report, results), text, count=1), "utf-8")


# --- Pictures ---------------------------------------------------------------------------------------------------------


def plot(report: Report, directory: Path) -> None:
    """Draw seedtable-hang.png and seedtable-cost.png.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    measured = [(each, each.answers.hang) for each in report.results if each.answers.hang is not None]
    if not measured:
        return
    measured.sort(key=lambda pair: pair[0].name not in (OURS, OURS_NATIVE))
    style: dict[Any, Any] = {"font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(style):
        columns = min(5, len(measured))
        lines = -(-len(measured) // columns)
        figure, axes = plt.subplots(
            lines, columns, figsize=(2.6 * columns, 2.1 * lines + 0.5), sharex=True, sharey=True, squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for axis in axes.flat[len(measured) :]:
            axis.set_visible(False)
        for axis, (result, hang) in zip(axes.flat, measured, strict=False):
            _plot_row(axis, result.name, hang)
        figure.supxlabel(
            "seconds; shaded: the other disk hangs; in time: answered right within a second, in the hang", fontsize=9
        )
        figure.supylabel("p99 of the healthy disk, ms", fontsize=9)
        figure.savefig(directory / "seedtable-hang.png", dpi=110)
        plt.close(figure)

        figure, pair = plt.subplots(1, 2, figsize=(10, 0.28 * len(measured) + 1.2), sharey=True, layout="constrained")
        names = [result.name for result, _ in measured]
        ways: list[tuple[str, Callable[[Hang], float], Callable[[Hang], float]]] = [
            ("threads", lambda h: h.threads_before, lambda h: h.threads_end),
            ("resident memory, MiB", lambda h: h.memory_before / 2**20, lambda h: h.memory_end / 2**20),
        ]
        for axis, (title, before, end) in zip(pair, ways, strict=True):
            ends = [end(hang) for _, hang in measured]
            axis.barh(names, ends, color=[_color(name) for name in names])
            axis.plot([before(hang) for _, hang in measured], names, "k|", markersize=10, label="before the hang")
            if title == "threads":
                axis.set_xscale("log")
            axis.set_xlabel(f"{title}, at the end of the hang")
            axis.bar_label(axis.containers[0], [f" {each:,.0f}" for each in ends], fontsize=8)
            axis.margins(x=0.15)
        pair[0].invert_yaxis()
        figure.legend(*pair[1].get_legend_handles_labels(), loc="outside lower right", fontsize=8)
        figure.savefig(directory / "seedtable-cost.png", dpi=110)
        plt.close(figure)


def _plot_row(axis: Any, name: str, hang: Hang) -> None:
    during = _phase(hang, "hang")
    assert during is not None
    axis.axvspan(during.begin, during.end, color="gray", alpha=0.2, linewidth=0)
    # The first second makes connections and fills caches.
    seconds = [each for each in hang.seconds if each.at >= 1]
    axis.step([each.at for each in seconds], [each.p99_ms for each in seconds], where="post", color=_color(name))
    axis.set_yscale("log")
    axis.set_title(f"{name}: {during.healthy_in_time / max(1, during.healthy.count):.0%} in time", fontsize=9)


def _color(name: str) -> str:
    return "tab:blue" if name in (OURS, OURS_NATIVE) else "tab:orange"
