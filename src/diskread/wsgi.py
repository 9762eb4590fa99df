"""Files over HTTP, from any WSGI application under gevent: ranges, conditional requests, errors as a status.

`send_file` is what applications call:

    def application(environ, start_response):
        try:
            return send_file(environ, start_response, disk, "films/cat.mp4")
        except DiskError as error:
            status = status_of(error)
            start_response(f"{status.value} {status.phrase}", [("Content-Type", "text/plain; charset=utf-8")])
            return [str(error).encode()]
"""

from __future__ import annotations

import math
import mimetypes
import os
from functools import lru_cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple

from . import conditions, ranges
from .disk import FIRST_CHUNK
from .errors import (
    DiskBusy,
    DiskFileForbidden,
    DiskFileNotFound,
    DiskFileNotRegular,
    DiskOffline,
    DiskPathInvalid,
    DiskTimeout,
)
from .mirror import MirrorStat

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    from .disk import Disk, DiskFile, FileStat, Path
    from .errors import DiskError
    from .mirror import Mirror, MirrorFile
    from .ranges import Span, Wanted

    Environment = dict[str, Any]
    Header = tuple[str, str]
    StartResponse = Callable[[str, list[Header]], object]

RETRY_AFTER = 1
"""Seconds after which a client that a busy disk refused may try again: a slot may be free by then."""

SENT_BY = "Diskread-Disk"
"""Header of what a mirror has sent: the name of the disk that answered."""

_TYPES = mimetypes.MimeTypes()  # the built-in table: the one of the system is on a disk, too

_STATUS: tuple[tuple[tuple[type[DiskError], ...], HTTPStatus], ...] = (
    ((DiskBusy, DiskOffline), HTTPStatus.SERVICE_UNAVAILABLE),
    ((DiskTimeout,), HTTPStatus.GATEWAY_TIMEOUT),
    ((DiskPathInvalid,), HTTPStatus.BAD_REQUEST),
    ((DiskFileNotFound, DiskFileNotRegular), HTTPStatus.NOT_FOUND),
    ((DiskFileForbidden,), HTTPStatus.FORBIDDEN),
)


def send_file(
    environ: Environment,
    start_response: StartResponse,
    disk: Disk | Mirror,
    path: Path,
    *,
    deadline: float | None = None,
    content_type: str | None = None,
    headers: Iterable[Header] = (),
) -> Body:
    """Answer a request with a file, or what the request wants of it; a WSGI application's last line.

    Knows GET and HEAD, a range, If-Match, If-None-Match, If-Modified-Since, If-Unmodified-Since and If-Range; answers
    200, 206 or 304, and where the request is to blame 400 (a range that is none), 405, 412 or 416 with a line of text.
    A file of up to 64 KiB takes one visit to the disk; a larger one is streamed, its next chunk read while this one
    is sent. Blocks the calling greenlet, never the hub.

    Args:
        environ: The WSGI environment of the request.
        start_response: Called once, with status and headers; not when an error is raised.
        disk: The disk, or a mirror: the response has a header `Diskread-Disk` then, with the name of the disk that
            sent the first bytes.
        path: The file, relative to the root of the disk. It cannot lead out of the disk, but to every file on it. Of
            PATH_INFO, take the bytes (`.encode("latin-1")`, PEP 3333); frameworks decode it for you.
        deadline: Seconds for each visit to the disk: to open the file, and for each chunk of 256 KiB; None: that of
            the disk's limits.
        content_type: The header Content-Type; None: by the end of the file's name, without a charset.
        headers: More headers for 200, 206 and 304, such as Cache-Control or Content-Disposition.

    Returns:
        The content, as WSGI has it: the server iterates over it, then calls its `close`, which closes the file.

    Raises:
        DiskError: As `Disk` says, while nothing has been sent: `status_of` makes a status of it. What fails later is
            raised to the server that iterates, which breaks the connection off: no client takes half a file for a
            whole one.
        ValueError: A deadline that is none.
    """
    try:
        wanted = _wanted(environ)
        response = respond(environ, disk, path, wanted, deadline=deadline, content_type=content_type, headers=headers)
    except Refusal as refusal:
        response = _text(environ, refusal)
    start_response(f"{response.status.value} {response.status.phrase}", response.headers)
    return response.body


def status_of(error: DiskError) -> HTTPStatus:
    """The HTTP status that says what a disk said.

    Args:
        error: What `send_file`, or any other call of a `Disk`, has raised.

    Returns:
        503 for a disk that is busy or offline, 504 for a deadline that was missed, 400 for what is no path, 404 for
        what is no file, 403 for what may not be read, else 500. It is an integer as well.
    """
    for kinds, status in _STATUS:
        if isinstance(error, kinds):
            return status
    return HTTPStatus.INTERNAL_SERVER_ERROR


def retry_after(error: DiskError) -> int | None:
    """Seconds after which it may be worth asking again, for the header Retry-After.

    Args:
        error: What a `Disk` has raised.

    Returns:
        Whole seconds; None when nobody knows, as with a disk that somebody has taken offline, or a file that is not
        there.
    """
    if isinstance(error, DiskBusy):
        return RETRY_AFTER
    seconds = error.retry_after if isinstance(error, DiskOffline) else None
    return None if seconds is None else max(1, math.ceil(seconds))


class Refusal(Exception):
    """A request that cannot be granted, whatever the disk says. Its text is for the client.

    Attributes:
        status: 400, 405, 412 or 416.
        headers: What that status asks for.
    """

    def __init__(self, status: HTTPStatus, reason: str, *headers: Header) -> None:
        """Refuse, and say why."""
        super().__init__(reason)
        self.status = status
        self.headers = headers


class Response(NamedTuple):
    """Status, headers and content of a response."""

    status: HTTPStatus
    headers: list[Header]
    body: Body


class Body:
    """The content of a response, for a WSGI server: iterate over it, then `close` it (PEP 3333).

    Attributes:
        whole: All of it, where it is in memory and no file has to be closed; else None.
    """

    def __init__(self, data: bytes = b"") -> None:
        """Have this content; `stream` makes one of a file."""
        self.whole: bytes | None = data
        self._first = data
        self._rest: Generator[bytes, None, None] | None = None
        self._file: DiskFile | MirrorFile | None = None

    @classmethod
    def stream(cls, file: DiskFile | MirrorFile, span: Span, deadline: float | None) -> Body:
        """Take over an open file, and get the first chunk: what fails now can still have a status of its own."""
        chunks = file.chunks(*span, deadline=deadline)
        body = cls(next(chunks, b""))
        body.whole, body._rest, body._file = None, chunks, file
        return body

    def __iter__(self) -> Iterator[bytes]:
        """The chunks. An error in the middle passes through; the server closes the connection then."""
        if self._first:
            yield self._first
        if self._rest is not None:
            yield from self._rest

    def close(self) -> None:
        """Close the file. Never blocks."""
        if self._rest is not None:
            self._rest.close()
        if self._file is not None:
            self._file.close()


def respond(
    environ: Environment,
    disk: Disk | Mirror,
    path: Path,
    wanted: Wanted | None,
    *,
    deadline: float | None = None,
    content_type: str | None = None,
    headers: Iterable[Header] = (),
) -> Response:
    """Make the response that `send_file` sends, for applications with a way of their own to send and to refuse.

    Args:
        environ: The WSGI environment; its method is GET, or HEAD for which the body stays empty.
        disk: The disk.
        path: The file.
        wanted: The range, as `ranges.parse` has read it. It does not count for HEAD.
        deadline: As with `send_file`.
        content_type: As with `send_file`.
        headers: As with `send_file`.

    Returns:
        The response: 200, 206 or 304. Its body has to be closed.

    Raises:
        Refusal: A precondition failed, or the range is outside of the file.
        DiskError: As with `send_file`.
    """
    if environ["REQUEST_METHOD"] == "HEAD":
        stat: FileStat = disk.stat(path, deadline=deadline)
        status, span = _decide(environ, stat, None)
        body = Body()
    else:
        # A client that asks whether its copy is fresh will most likely not want the content.
        conditional = "HTTP_IF_NONE_MATCH" in environ or "HTTP_IF_MODIFIED_SINCE" in environ
        offset, size = (0, 0) if conditional else ranges.first_piece(wanted)
        file = disk.open(path, offset=offset, size=size, deadline=deadline)
        try:
            stat = file.stat
            status, span = _decide(environ, stat, wanted)
            body = Body() if span is None else _content(file, span, deadline)
            stat = file.stat  # of a mirror, another disk may have sent the content than the one that opened the file
        except BaseException:
            file.close()
            raise
        if body.whole is not None:
            file.close()
    described = description(os.fsencode(path), stat, content_type)
    if span is None:
        sent = list(described[:-1])  # not the type, of which the client has been told
    else:
        sent = [*described, ("Content-Length", str(span.stop - span.start))]
        if status is HTTPStatus.PARTIAL_CONTENT:
            sent.append(("Content-Range", f"bytes {span.start}-{span.stop - 1}/{stat.size}"))
    sent.extend(sent_by(stat))
    sent.extend(headers)
    return Response(status, sent, body)


def description(path: bytes, stat: FileStat, kind: str | None = None) -> tuple[Header, ...]:
    """The headers that describe a file, whatever becomes of the request; the last one is its type.

    Args:
        path: The file; its type comes from the end of its name.
        stat: What is known of it.
        kind: Its type, where that is known otherwise.
    """
    return (
        ("ETag", conditions.etag(stat)),
        ("Last-Modified", conditions.last_modified(stat)),
        ("Accept-Ranges", "bytes"),
        ("X-Content-Type-Options", "nosniff"),
        ("Content-Type", type_of(path.rpartition(b"/")[2]) if kind is None else kind),
    )


def sent_by(stat: FileStat) -> tuple[Header, ...]:
    """The header that says which disk of a mirror has answered; none for a disk."""
    return ((SENT_BY, stat.disk),) if isinstance(stat, MirrorStat) else ()


@lru_cache(maxsize=1024)
def type_of(name: bytes) -> str:
    """The media type of a file by the end of its name; application/octet-stream for what is unknown or compressed."""
    # "./": guess_type takes a URL, and a name may look like one.
    kind, encoding = _TYPES.guess_type("./" + name.decode("latin-1"))
    return kind if kind is not None and encoding is None else "application/octet-stream"


def _decide(environ: Environment, stat: FileStat, wanted: Wanted | None) -> tuple[HTTPStatus, Span | None]:
    """The status, and what is to be sent of a file; None for nothing."""
    if conditions.are_there(environ):
        version = conditions.version_of(stat)
        if conditions.precondition_failed(environ, version):
            raise Refusal(HTTPStatus.PRECONDITION_FAILED, "The file is another one than the request wants.")
        if conditions.not_modified(environ, version):
            return HTTPStatus.NOT_MODIFIED, None
        if not conditions.may_have_range(environ, version):
            wanted = None
    if wanted is None:
        return HTTPStatus.OK, ranges.Span(0, stat.size)
    span = ranges.resolve(wanted, stat.size)
    if span is None:
        raise Refusal(
            HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
            f"The file has {stat.size} bytes, none of which is in the range.",
            ("Content-Range", f"bytes */{stat.size}"),
        )
    return HTTPStatus.PARTIAL_CONTENT, span


def _content(file: DiskFile | MirrorFile, span: Span, deadline: float | None) -> Body:
    """A small content in one piece: most often the visit that opened the file has brought it."""
    size = span.stop - span.start
    if size <= FIRST_CHUNK:
        data = file.read(span.start, size, deadline=deadline)
        if len(data) == size:
            return Body(data)
        # It is not all there any more; the stream will say so.
    return Body.stream(file, span, deadline)


def _wanted(environ: Environment) -> Wanted | None:
    method = environ["REQUEST_METHOD"]
    if method == "HEAD":
        return None
    if method != "GET":
        raise Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "Files are read with GET or HEAD.", ("Allow", "GET, HEAD"))
    try:
        return ranges.parse(environ.get("HTTP_RANGE"))
    except ValueError as error:
        raise Refusal(HTTPStatus.BAD_REQUEST, f"The header Range is no range: {error}") from None


def _text(environ: Environment, refusal: Refusal) -> Response:
    text = f"{refusal}\n".encode()
    headers = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(text))), *refusal.headers]
    return Response(refusal.status, headers, Body(b"" if environ["REQUEST_METHOD"] == "HEAD" else text))
