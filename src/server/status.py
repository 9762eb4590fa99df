"""What the server tells of itself: `/status`, `/metrics`, `/healthz`, `/readyz`. Never touches a device."""

from __future__ import annotations

import contextlib
import http.client
import math
import time
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import falcon
import gevent.socket
import msgspec
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from diskread.metrics import DiskCollector, MirrorCollector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client.core import Metric

    from diskread import Disks, DiskStatus, MirrorStatus

    Look = Callable[[], "Seen"]


class InlineDocument(msgspec.Struct):
    """Reads on the hub's own thread: what the page cache has.

    Attributes:
        on: Whether they are tried.
        reason: Why not.
        hits: Reads (also opens) that needed no thread.
        partial: Reads of which the beginning was cached.
        misses: Reads of which nothing was.
        bytes: Bytes that were read inline.
        fallbacks: Reads that could not be tried, by errno.
    """

    on: bool
    reason: str | None
    hits: int
    partial: int
    misses: int
    bytes: int
    fallbacks: dict[str, int]


class DiskDocument(msgspec.Struct):
    """A disk in `/status`. Times are in seconds."""

    name: str
    root: str | None
    state: str
    accepting: bool
    """Whether a read would get a slot or a place in the queue."""
    slots: int
    queue: int
    deadline: float
    threads: int
    in_flight: int
    stuck: int
    waiting: int
    oldest: float
    reads: int
    bytes: int
    errors: dict[str, int]
    timeouts: int
    rejections: int
    abandoned: int
    reason: str | None = None
    """Why it is offline."""
    since: float = 0.0
    """For how long the state has been what it is."""
    changes: int = 0
    """How often the state has changed."""
    probes: int = 0
    """How many probes were sent."""
    next_probe: float | None = None
    """Time to the next one; 0 while one is under way, null when none will be sent."""
    inline: InlineDocument | None = None


class MirrorDocument(msgspec.Struct):
    """A mirror in `/status`; see `diskread.MirrorCounts`."""

    name: str
    disks: list[str]
    accepting: bool
    """Whether one of its disks takes reads."""
    hedge_after: float | str | None
    """Seconds, or "p95"; null stands for never."""
    hedge_share: float
    reads: int
    hedges: int
    hedges_won: int
    hedges_refused: int
    failovers: dict[str, int]
    """By name of the disk that failed."""
    answers: dict[str, int]
    """By name of the disk that answered."""


class StatusDocument(msgspec.Struct):
    """The body of `/status`."""

    version: str
    uptime: float
    simulate: bool
    disks: list[DiskDocument]
    mirrors: list[MirrorDocument] = []
    workers: int = 1
    """Worker processes of which this is the sum."""


@dataclass(frozen=True)
class Seen:
    """What a look at the server brings.

    Attributes:
        disks: The disks, as all worker processes together have them.
        mirrors: The mirrors, likewise.
        workers: How many worker processes that is.
    """

    disks: list[DiskStatus]
    mirrors: list[MirrorStatus]
    workers: int = 1


def look_at(disks: Disks) -> Look:
    """A look at the disks of this process alone."""
    return lambda: Seen(disks.status, disks.mirror_status)


def version() -> str:
    """The version of the installed package, "unknown" in a tree that was never installed."""
    try:
        return metadata.version("diskread")
    except metadata.PackageNotFoundError:
        return "unknown"


def describe(disk: DiskStatus) -> DiskDocument:
    """Flatten the status of a disk."""
    load, counts, limits, inline = disk.load, disk.counts, disk.limits, disk.inline
    return DiskDocument(
        name=disk.name,
        root=disk.root,
        state=load.state.value,
        accepting=load.accepting,
        slots=limits.threads,
        queue=limits.queue,
        deadline=limits.deadline,
        threads=load.threads,
        in_flight=load.in_flight,
        stuck=load.stuck,
        waiting=load.waiting,
        oldest=round(load.oldest, 3),
        reads=counts.reads,
        bytes=counts.bytes,
        errors=dict(counts.errors),
        timeouts=counts.timeouts,
        rejections=counts.rejections,
        abandoned=counts.abandoned,
        reason=load.reason,
        since=round(load.since, 3),
        changes=load.changes,
        probes=load.probes,
        next_probe=None if load.next_probe is None else round(load.next_probe, 3),
        inline=InlineDocument(
            on=inline.on,
            reason=inline.reason,
            hits=inline.hits,
            partial=inline.partial,
            misses=inline.misses,
            bytes=inline.bytes,
            fallbacks=dict(inline.fallbacks),
        ),
    )


def describe_mirror(mirror: MirrorStatus) -> MirrorDocument:
    """Flatten the status of a mirror."""
    counts = mirror.counts
    return MirrorDocument(
        name=mirror.name,
        disks=list(mirror.disks),
        accepting=mirror.accepting,
        hedge_after=None if mirror.hedge_after == math.inf else mirror.hedge_after,
        hedge_share=mirror.hedge_share,
        reads=counts.reads,
        hedges=counts.hedges,
        hedges_won=counts.hedges_won,
        hedges_refused=counts.hedges_refused,
        failovers={disk: counts.failovers[disk] for disk in mirror.disks},
        answers={disk: counts.answers[disk] for disk in mirror.disks},
    )


def fetch(address: str, timeout: float) -> StatusDocument | None:
    """Ask a server for its status over gevent, so that other greenlets go on meanwhile.

    Args:
        address: URL of `/status`.
        timeout: Seconds for the whole of it.

    Returns:
        The document; None when no answer came, or another one.
    """
    parts = urlsplit(address)
    server = (parts.hostname or "", parts.port or 80)
    document = None
    with gevent.Timeout(timeout, False):  # type: ignore[arg-type]
        try:
            connection = http.client.HTTPConnection(*server)
            with contextlib.closing(gevent.socket.create_connection(server)) as sock:
                connection.sock = sock
                connection.request("GET", parts.path, headers={"Connection": "close"})
                with connection.getresponse() as response:
                    document = msgspec.json.decode(response.read(), type=StatusDocument)
        except (OSError, http.client.HTTPException, msgspec.DecodeError):
            pass
    return document


class ServerStatus:
    """What a server tells of itself.

    Attributes:
        look: Brings the disks at this moment. Never touches a device.
    """

    def __init__(self, look: Look, *, simulate: bool) -> None:
        """Tell what a look brings; the time the server has been up counts from here."""
        self.look = look
        self._simulate = simulate
        self._started = time.monotonic()
        self._version = version()

    def document(self, seen: Seen) -> StatusDocument:
        """The body of `/status` when a look has brought this."""
        return StatusDocument(
            version=self._version,
            uptime=round(time.monotonic() - self._started, 3),
            simulate=self._simulate,
            disks=[describe(disk) for disk in seen.disks],
            workers=seen.workers,
            mirrors=[describe_mirror(mirror) for mirror in seen.mirrors],
        )


class StatusResource:
    """`/status`: everything there is to know, as JSON."""

    def __init__(self, status: ServerStatus) -> None:
        """Tell this."""
        self._status = status

    def on_get(self, _request: falcon.Request, response: falcon.Response) -> None:
        """Send the document."""
        response.content_type = falcon.MEDIA_JSON
        response.cache_control = ["no-store"]
        response.data = msgspec.json.encode(self._status.document(self._status.look()))

    on_head = on_get


class _Collector(Collector):
    """The metrics of one look."""

    def __init__(self, look: Look) -> None:
        self._look = look

    def collect(self) -> Iterator[Metric]:
        seen = self._look()
        yield from DiskCollector(lambda: seen.disks).collect()
        yield from MirrorCollector(lambda: seen.mirrors).collect()


class MetricsResource:
    """`/metrics`: OpenMetrics."""

    def __init__(self, look: Look) -> None:
        """Measure what a look brings, and this process."""
        self._registry = CollectorRegistry()
        self._registry.register(_Collector(look))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def on_get(self, _request: falcon.Request, response: falcon.Response) -> None:
        """Send the metrics."""
        response.content_type = CONTENT_TYPE_LATEST
        response.data = generate_latest(self._registry)  # type: ignore[no-untyped-call]

    on_head = on_get


class HealthResource:
    """`/healthz`: the process lives and its hub turns."""

    def on_get(self, _request: falcon.Request, response: falcon.Response) -> None:
        """Say so."""
        response.content_type = falcon.MEDIA_TEXT
        response.text = "ok\n"

    on_head = on_get


class ReadyResource:
    """`/readyz`: at least one disk takes requests."""

    def __init__(self, look: Look) -> None:
        """Judge by what a look brings."""
        self._look = look

    def on_get(self, _request: falcon.Request, response: falcon.Response) -> None:
        """200 when one does, else 503. The disk for simulated stalls counts only where there is no other."""
        disks = self._look().disks
        real = [disk for disk in disks if disk.root is not None]
        ready = any(disk.load.accepting for disk in real or disks)
        response.status = falcon.HTTP_200 if ready else falcon.HTTP_503
        response.content_type = falcon.MEDIA_TEXT
        response.text = "ready\n" if ready else "no disk takes requests\n"

    on_head = on_get
