"""The metrics: that Prometheus can read them, that they keep to its conventions, and that they move."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import gevent
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from diskread import Disk, DiskBusy, DiskFileNotFound, DiskOffline, Disks, DiskTimeout, Limits, State
from diskread.latency import BOUNDS
from diskread.metrics import DiskCollector
from tests.server.conftest import SMALL
from tests.server.raw_client import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from prometheus_client.core import Metric

    from tests.server.conftest import StartServer

GAUGES = {
    "diskread_slots",
    "diskread_in_flight",
    "diskread_stuck",
    "diskread_waiting",
    "diskread_threads",
    "diskread_oldest_age_seconds",
    "diskread_state_age_seconds",
    "diskread_inline",
}
COUNTERS = {
    "diskread_reads",
    "diskread_read_bytes",
    "diskread_timeouts",
    "diskread_rejections",
    "diskread_abandoned",
    "diskread_probes",
    "diskread_state_changes",
    "diskread_errors",
    "diskread_inline_hits",
    "diskread_inline_partial_hits",
    "diskread_inline_misses",
    "diskread_inline_fallbacks",
}
HISTOGRAMS = {"diskread_queue_seconds", "diskread_disk_seconds"}


def parse(text: str) -> dict[str, Metric]:
    """As Prometheus would read it; raises where it is not OpenMetrics."""
    families = list(text_string_to_metric_families(text))  # type: ignore[no-untyped-call]
    assert len({family.name for family in families}) == len(families)
    return {family.name: family for family in families}


def scrape(*disks: Disk) -> dict[str, Metric]:
    registry = CollectorRegistry()
    registry.register(DiskCollector(lambda: Disks(disks).status))
    return parse(generate_latest(registry).decode())  # type: ignore[no-untyped-call]


def value(disk: Disk, sample: str, **labels: str) -> float:
    """One sample of one disk."""
    wanted = {"disk": disk.name, **labels}
    found = [
        each.value
        for family in scrape(disk).values()
        for each in family.samples
        if each.name == sample and each.labels == wanted
    ]
    assert len(found) == 1, (sample, wanted)
    return float(found[0])


@pytest.fixture
def disk(tree: Path) -> Iterator[Disk]:
    with Disk("d1", tree, Limits(threads=1, queue=1, deadline=0.2, inline="off")) as disk:
        yield disk


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def wait_for(condition: Callable[[], object]) -> None:
    with gevent.Timeout(PATIENCE):
        while not condition():
            gevent.sleep(0.005)


def test_there_is_all_of_it_for_each_disk(disk: Disk, tree: Path) -> None:
    with Disk("d2", tree) as other:
        families = scrape(disk, other)
    assert {name for name, family in families.items() if family.type == "gauge"} == GAUGES
    assert {name for name, family in families.items() if family.type == "counter"} == COUNTERS
    assert {name for name, family in families.items() if family.type == "histogram"} == HISTOGRAMS
    assert families["diskread_state"].type == "stateset"
    for family in families.values():
        disks = {sample.labels["disk"] for sample in family.samples}
        by_errno = family.name in ("diskread_errors", "diskread_inline_fallbacks")
        assert disks == (set() if by_errno else {"d1", "d2"})


def test_names_keep_to_the_conventions(disk: Disk) -> None:
    with pytest.raises(DiskFileNotFound):
        disk.read("missing")
    for name, family in scrape(disk).items():
        assert name.startswith("diskread_")
        assert family.documentation.endswith("."), name
        unit = name.rpartition("_")[2] if name.endswith(("_seconds", "_bytes")) else ""
        assert family.unit == unit, name
        if family.type == "counter":
            assert {sample.name for sample in family.samples} <= {f"{name}_total"}
            assert not name.endswith("_total")


def test_a_disk_that_nobody_has_used_can_be_measured(disk: Disk) -> None:
    assert value(disk, "diskread_reads_total") == 0
    assert value(disk, "diskread_disk_seconds_count") == 0
    assert value(disk, "diskread_state", diskread_state="online") == 1


def test_no_disks_are_no_error() -> None:
    assert all(not family.samples for family in scrape().values())


def test_reads_bytes_and_errors_are_counted(disk: Disk) -> None:
    disk.read("small")
    disk.read("small")
    with pytest.raises(DiskFileNotFound):
        disk.read("missing")
    assert value(disk, "diskread_reads_total") == 2
    assert value(disk, "diskread_read_bytes_total") == 2 * len(SMALL)
    assert value(disk, "diskread_errors_total", errno="ENOENT") == 1


def test_histograms_count_each_read_once_and_add_up(disk: Disk, gate: threading.Event) -> None:
    for _ in range(3):
        disk.read("small")
    disk.run(gate.wait, 0.12)
    families = scrape(disk)
    for name in HISTOGRAMS:
        samples = families[name].samples
        buckets = [(float(each.labels["le"]), each.value) for each in samples if each.name == f"{name}_bucket"]
        assert [bound for bound, _ in buckets] == [*BOUNDS, float("inf")]
        counts = [count for _, count in buckets]
        assert counts == sorted(counts), "each bucket contains those before it"
        assert counts[-1] == 4 == value(disk, f"{name}_count")
    of_disk = {
        float(each.labels["le"]): each.value
        for each in families["diskread_disk_seconds"].samples
        if each.name == "diskread_disk_seconds_bucket"
    }
    assert of_disk[0.1] <= 3, "what took 0.12 s is in none of the buckets below"
    assert of_disk[60.0] == 4
    assert value(disk, "diskread_disk_seconds_sum") >= 0.12


def test_time_in_the_queue_is_apart_from_time_at_the_disk(disk: Disk, gate: threading.Event) -> None:
    first = gevent.spawn(lambda: disk.run(gate.wait, 0.15, deadline=PATIENCE))
    wait_for(lambda: disk.status.load.in_flight)
    second = gevent.spawn(lambda: disk.read("small", deadline=PATIENCE))
    wait_for(lambda: disk.status.load.waiting)
    assert value(disk, "diskread_waiting") == 1
    assert value(disk, "diskread_in_flight") == 1
    for each in (first, second):
        each.get(timeout=PATIENCE)
    assert value(disk, "diskread_queue_seconds_count") == 2
    assert value(disk, "diskread_queue_seconds_sum") > 0


def test_what_goes_wrong_is_counted(disk: Disk, gate: threading.Event) -> None:
    with pytest.raises(DiskTimeout):
        disk.run(gate.wait, 60)
    assert value(disk, "diskread_timeouts_total") == 1
    assert value(disk, "diskread_stuck") == 1
    assert value(disk, "diskread_oldest_age_seconds") >= 0.19
    assert value(disk, "diskread_state", diskread_state="suspect") == 1
    with pytest.raises(DiskBusy):
        disk.read("small")
    assert value(disk, "diskread_rejections_total") == 1
    gate.set()
    wait_for(lambda: not disk.status.load.in_flight)
    assert value(disk, "diskread_stuck") == 0
    killed = gevent.spawn(disk.stall, 0.1)
    wait_for(lambda: disk.status.load.in_flight)
    killed.kill()
    assert value(disk, "diskread_abandoned_total") == 1


def test_the_state_and_its_changes(disk: Disk) -> None:
    disk.set_offline("to be replaced")
    with pytest.raises(DiskOffline):
        disk.read("small")
    for state in State:
        assert value(disk, "diskread_state", diskread_state=state.value) == (state is State.OFFLINE)
    assert value(disk, "diskread_state_changes_total") == 1
    assert value(disk, "diskread_rejections_total") == 1
    disk.set_online()
    assert value(disk, "diskread_state", diskread_state="half-open") == 1
    disk.read("small")
    assert value(disk, "diskread_state", diskread_state="online") == 1
    assert value(disk, "diskread_state_changes_total") == 3
    assert value(disk, "diskread_state_age_seconds") < PATIENCE


def test_probes_are_counted_and_are_nobodys_reads(disk: Disk) -> None:
    disk.watch()
    wait_for(lambda: disk.status.load.state is State.ONLINE)
    assert value(disk, "diskread_probes_total") == 1
    assert value(disk, "diskread_reads_total") == 0
    assert value(disk, "diskread_disk_seconds_count") == 0


def test_a_server_tells_all_of_it(start_server: StartServer, tree: Path) -> None:
    server = start_server("--disk", f"d1={tree}", "--disk", f"lost={tree}/nowhere")
    assert server.http("/v1/d1/small").status == 200
    assert server.http("/v1/lost/small").status == 503
    families = parse(server.http("/metrics").body.decode())
    assert families.keys() > GAUGES | COUNTERS | HISTOGRAMS | {"diskread_state", "process_open_fds"}
    samples = {
        (sample.name, sample.labels.get("disk"), sample.labels.get("diskread_state")): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert samples["diskread_disk_seconds_count", "d1", None] == 1
    assert samples["diskread_state", "lost", "offline"] == 1
    assert samples["diskread_probes_total", "lost", None] >= 1
    assert samples["diskread_rejections_total", "lost", None] == 1


def test_what_is_read_inline_is_no_operation_at_the_disk(tree: Path) -> None:
    with Disk("d1", tree, Limits()) as disk:
        for _ in range(5):
            disk.read("small")
        if not disk.status.inline.on:
            pytest.skip(str(disk.status.inline.reason))
        assert value(disk, "diskread_inline") == 1
        assert value(disk, "diskread_inline_hits_total") == 4
        assert value(disk, "diskread_disk_seconds_count") == 1
        assert value(disk, "diskread_reads_total") == 5
        assert value(disk, "diskread_read_bytes_total") == 5 * len(SMALL)
