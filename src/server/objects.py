"""Files over HTTP: `GET|HEAD /v1/NAME/PATH` with ranges and conditional requests (RFC 9110, sections 13 and 14).

NAME is that of a disk or of a mirror.
"""

from __future__ import annotations

import mimetypes
import re
from datetime import datetime, timezone
from email.utils import formatdate
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import falcon

from diskread import FIRST_CHUNK, Disk, DiskFile, Mirror, MirrorFile, MirrorStat

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence

    from diskread import FileStat

_TYPES = mimetypes.MimeTypes()  # the built-in table: the one of the system is on a disk, too


ANSWERED_BY = "Diskread-Disk"
"""Header of what a mirror has sent: the name of the disk that answered."""

_RANGE = re.compile(r"(?=-?[0-9])([0-9]{0,100})-([0-9]{0,100})")
_CONDITIONS = frozenset(
    ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH", "HTTP_IF_MODIFIED_SINCE", "HTTP_IF_UNMODIFIED_SINCE", "HTTP_IF_RANGE")
)
_LARGEST_OFFSET = 2**62  # beyond the largest file there is; keeps offset plus size within 64 bits


def description(path: bytes, stat: FileStat) -> tuple[tuple[str, str], ...]:
    """The headers that describe a file, whatever becomes of the request."""
    headers = (
        ("ETag", f'"{_version(stat)}"'),
        ("Last-Modified", _http_date(_seconds(stat))),
        ("Accept-Ranges", "bytes"),
        ("X-Content-Type-Options", "nosniff"),
        ("Content-Type", _content_type(path.rpartition(b"/")[2])),
    )
    return (*headers, (ANSWERED_BY, stat.disk)) if isinstance(stat, MirrorStat) else headers


def _version(stat: FileStat) -> str:
    return f"{stat.inode:x}-{stat.size:x}-{stat.mtime_ns:x}"


def _seconds(stat: FileStat) -> int:
    return stat.mtime_ns // 1_000_000_000


class Span(NamedTuple):
    """The bytes of a file that were asked for: from `start` up to, not including, `stop`."""

    start: int
    stop: int


class ObjectResource:
    """The files of all disks and mirrors."""

    def __init__(self, disks: Mapping[str, Disk | Mirror]) -> None:
        """Serve these disks and mirrors, by name."""
        self._disks = disks

    def on_get(self, request: falcon.Request, response: falcon.Response, **_: str) -> None:
        """Send a file, or a range of it."""
        env = request.env
        wanted = _wanted_range(request)
        # A client that asks whether its copy is fresh will most likely not want the content.
        conditional = "HTTP_IF_NONE_MATCH" in env or "HTTP_IF_MODIFIED_SINCE" in env
        offset, size = (0, 0) if conditional else _first_piece(wanted)
        disk, path = self._find(request)
        file = disk.open(path, offset=offset, size=size)
        try:
            span = self._describe(request, response, path, file.stat, wanted)
            # What fails now is still an error with a status of its own.
            if span is None or _send_at_once(response, file, span):
                self._name_disk(response, file)
                file.close()
                return
            body = Body(file)
            body.begin(span)
            self._name_disk(response, file)
        except BaseException:
            file.close()
            raise
        response.content_length = span.stop - span.start
        response.stream = body

    @staticmethod
    def _name_disk(response: falcon.Response, file: DiskFile | MirrorFile) -> None:
        """Say which disk of a mirror has sent the first bytes: another one perhaps than that which opened the file."""
        if isinstance(file, MirrorFile):
            response.set_header(ANSWERED_BY, file.disk)

    def on_head(self, request: falcon.Request, response: falcon.Response, **_: str) -> None:
        """Describe a file. A range does not count: it is defined for GET only."""
        disk, path = self._find(request)
        stat = disk.stat(path)
        span = self._describe(request, response, path, stat, None)
        if span is not None:
            response.content_length = stat.size

    def _find(self, request: falcon.Request) -> tuple[Disk | Mirror, bytes]:
        # Paths are bytes: PATH_INFO is the decoded path, each byte as one character (PEP 3333).
        _, _, disk_name, path = request.env["PATH_INFO"].encode("latin-1").split(b"/", 3)
        disk = self._disks.get(disk_name.decode("latin-1"))
        if disk is None or (isinstance(disk, Disk) and disk.root is None):
            raise falcon.HTTPNotFound(
                title="No such disk", description="There is no disk of that name here; /status lists those there are."
            )
        return disk, path

    @staticmethod
    def _describe(
        request: falcon.Request, response: falcon.Response, path: bytes, stat: FileStat, wanted: tuple[int, int] | None
    ) -> Span | None:
        """Set status and headers; return what is to be sent, None for nothing."""
        response.set_headers(description(path, stat))
        if not _CONDITIONS.isdisjoint(request.env):
            etag, modified = falcon.ETag(_version(stat)), datetime.fromtimestamp(_seconds(stat), timezone.utc)
            if _precondition_failed(request, etag, modified):
                raise falcon.HTTPPreconditionFailed(description="The file is another one than the request wants.")
            if _not_modified(request, etag, modified):
                response.status = falcon.HTTP_304
                response.content_type = None
                return None
            if not _same_version(request, etag, modified):
                wanted = None
        if wanted is None:
            return Span(0, stat.size)
        span = _resolve(wanted, stat.size)
        if span is None:
            raise falcon.HTTPRangeNotSatisfiable(stat.size)
        response.status = falcon.HTTP_206
        response.content_range = (span.start, span.stop - 1, stat.size)
        return span


class Body:
    """The body of a response: closes its file also when it was never sent (PEP 3333 has servers call `close`)."""

    def __init__(self, file: DiskFile | MirrorFile) -> None:
        """Take over an open file."""
        self.file = file
        self._chunks: Generator[bytes, None, None] | None = None
        self._first = b""

    def begin(self, span: Span) -> None:
        """Get the first chunk.

        Raises:
            DiskError: As `DiskFile.chunks` says.
        """
        self._chunks = self.file.chunks(*span)
        self._first = next(self._chunks, b"")

    def __iter__(self) -> Iterator[bytes]:
        """The chunks. An error in the middle passes through; the server closes the connection then."""
        if self._chunks is not None:
            yield self._first
            yield from self._chunks

    def close(self) -> None:
        """Close the file. Never blocks."""
        if self._chunks is not None:
            self._chunks.close()
        self.file.close()


def _send_at_once(response: falcon.Response, file: DiskFile | MirrorFile, span: Span) -> bool:
    """Give a small content to the response in one piece: most often the visit that opened the file has brought it.

    Returns:
        Whether it was done; False when it is large, or not there any more (the stream will say so).
    """
    size = span.stop - span.start
    if size > FIRST_CHUNK:
        return False
    data = file.read(span.start, size)
    if len(data) < size:
        return False
    response.data = data
    return True


def _wanted_range(request: falcon.Request) -> tuple[int, int] | None:
    """First and last byte as `falcon.Request.range` gives them; None for the whole file.

    A server ignores units that it does not know, and may ignore several ranges at once (RFC 9110, 14.2): the whole
    file is a correct answer to both.
    """
    value = request.env.get("HTTP_RANGE")
    if value is None:
        return None
    unit, _, ranges = value.partition("=")
    if unit.strip().lower() != "bytes" or "," in value:
        return None
    found = _RANGE.fullmatch(ranges.strip())
    if found is None:
        raise falcon.HTTPInvalidHeader("It must be FIRST-LAST, FIRST- or -LENGTH.", "Range")
    first, last = found[1], found[2]
    if not first:
        return (-int(last), -1) if int(last) else (_LARGEST_OFFSET, -1)  # the last 0 bytes: no byte at all
    if last and int(last) < int(first):
        raise falcon.HTTPInvalidHeader("Its last byte is before its first.", "Range")
    return int(first), int(last or -1)


def _first_piece(wanted: tuple[int, int] | None) -> tuple[int, int]:
    """Offset and size of what is worth reading in the visit that opens the file, when its size is not known yet."""
    if wanted is None:
        return 0, FIRST_CHUNK
    first, last = wanted
    if not 0 <= first < _LARGEST_OFFSET:
        return 0, 0
    return first, FIRST_CHUNK if last < 0 else min(FIRST_CHUNK, last - first + 1)


def _resolve(wanted: tuple[int, int], size: int) -> Span | None:
    """The bytes of a file of `size` bytes that a range means; None when there are none."""
    first, last = wanted
    start = max(0, size + first) if first < 0 else first
    stop = size if last < 0 else min(size, last + 1)
    return Span(start, stop) if start < stop else None


def _precondition_failed(request: falcon.Request, etag: falcon.ETag, modified: datetime) -> bool:
    if request.if_match is not None:
        return not _matches(request.if_match, etag, strong=True)
    limit = _date(request, "If-Unmodified-Since")
    return limit is not None and modified > limit


def _not_modified(request: falcon.Request, etag: falcon.ETag, modified: datetime) -> bool:
    if request.if_none_match is not None:
        return _matches(request.if_none_match, etag, strong=False)
    limit = _date(request, "If-Modified-Since")
    return limit is not None and modified <= limit


def _same_version(request: falcon.Request, etag: falcon.ETag, modified: datetime) -> bool:
    """Whether a range may be sent: If-Range names the version that the client has a part of."""
    value = request.get_header("If-Range")
    if value is None:
        return True
    if value.startswith(('"', "W/")):
        return value == etag.dumps()
    return _date(request, "If-Range") == modified


def _matches(etags: Sequence[falcon.ETag | str], etag: falcon.ETag, *, strong: bool) -> bool:
    for each in etags:
        if each == "*" or (each == etag and not (strong and isinstance(each, falcon.ETag) and each.is_weak)):
            return True
    return False


def _date(request: falcon.Request, header: str) -> datetime | None:
    try:
        return request.get_header_as_datetime(header, obs_date=True)
    except falcon.HTTPInvalidHeader:
        return None  # a date that is none is ignored (RFC 9110, 13.1.3)


@lru_cache(maxsize=1024)
def _http_date(seconds: int) -> str:
    return formatdate(seconds, usegmt=True)


@lru_cache(maxsize=1024)
def _content_type(name: bytes) -> str:
    # "./": guess_type takes a URL, and a name may look like one.
    kind, encoding = _TYPES.guess_type("./" + name.decode("latin-1"))
    return kind if kind is not None and encoding is None else "application/octet-stream"
