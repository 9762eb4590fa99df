"""Files for any WSGI application: what is sent, refused and left behind, looked at by the validator of wsgiref."""

from __future__ import annotations

import math
import os
from datetime import datetime, timezone
from email.utils import format_datetime, formatdate
from typing import TYPE_CHECKING, Any, NamedTuple
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import gevent
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diskread import (
    CHUNK,
    FIRST_CHUNK,
    Disk,
    DiskBusy,
    DiskError,
    DiskFileChanged,
    DiskFileForbidden,
    DiskFileNotFound,
    DiskFileNotRegular,
    DiskIOError,
    DiskOffline,
    DiskPathInvalid,
    DiskTimeout,
    FileStat,
    conditions,
)
from diskread.wsgi import Body, retry_after, send_file, status_of

from .conftest import LARGE, SMALL, MakeDisk, descriptors, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

thorough = settings(
    deadline=None, database=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

CONTENT = {"small": SMALL, "large": LARGE, "empty": b""}
MODIFIED = 1_700_000_000


class Answer(NamedTuple):
    """What a client would get."""

    status: int
    headers: dict[str, str]
    body: bytes


def ask(disk: Disk, path: str | bytes, asked: dict[str, str] | None = None, method: str = "GET", **more: Any) -> Answer:
    """Ask for a file through the validator of PEP 3333."""
    environ: dict[str, Any] = {"REQUEST_METHOD": method, "QUERY_STRING": ""}
    setup_testing_defaults(environ)
    environ |= {f"HTTP_{name.upper().replace('-', '_')}": value for name, value in (asked or {}).items()}
    started: list[Any] = []

    def start_response(
        status: str, headers: list[tuple[str, str]], _exc_info: object = None
    ) -> Callable[[bytes], object]:
        started.extend((status, headers))
        return lambda _: None

    body = validator(lambda environ, start: send_file(environ, start, disk, path, **more))(environ, start_response)
    try:
        content = b"".join(body)
    finally:
        body.close()  # type: ignore[attr-defined]
    status, fields = int(started[0][:3]), dict(started[1])
    assert len(fields) == len(started[1]), "a header was sent twice"
    if method == "HEAD" or status == 304:
        assert content == b""
    else:
        assert fields["Content-Length"] == str(len(content))
    assert ("Content-Type" in fields) == (status != 304)
    return Answer(status, fields, content)


@pytest.fixture
def disk(make_disk: MakeDisk, root: Path) -> Disk:
    for name in CONTENT:
        os.utime(root / name, (MODIFIED, MODIFIED))
    return make_disk()


def open_files(root: Path) -> list[str]:
    return [target for target in descriptors().values() if target.startswith(f"{root}/")]


# --- What is sent ---


@pytest.mark.parametrize("name", CONTENT)
def test_sends_a_file(disk: Disk, root: Path, name: str) -> None:
    got = ask(disk, name)
    assert (got.status, got.body) == (200, CONTENT[name])
    assert got.headers["Last-Modified"] == formatdate(MODIFIED, usegmt=True)
    assert got.headers["Content-Type"] == "application/octet-stream"
    assert got.headers["Accept-Ranges"] == "bytes"
    head = ask(disk, name, method="HEAD")
    assert (head.status, head.headers) == (200, got.headers)
    assert ask(disk, name, {"Range": "bytes=0-1"}, method="HEAD").headers == got.headers
    until(lambda: not open_files(root), "all files to be closed")


ranges = st.one_of(
    st.tuples(st.integers(0, len(LARGE) + 10), st.none() | st.integers(0, 2 * CHUNK)),
    st.tuples(st.none(), st.integers(0, len(LARGE) + 10)),
)


@thorough
@given(name=st.sampled_from(list(CONTENT)), wanted=ranges)
def test_sends_what_a_range_means(disk: Disk, name: str, wanted: tuple[int | None, int | None]) -> None:
    (first, length), content = wanted, CONTENT[name]
    if first is None:
        assert length is not None
        value, expected = f"bytes=-{length}", content[-length:] if length else b""
    elif length is None:
        value, expected = f"bytes={first}-", content[first:]
    else:
        value, expected = f"bytes={first}-{first + length}", content[first : first + length + 1]
    got = ask(disk, name, {"Range": value})
    if expected:
        start = len(content) - len(expected) if first is None else first
        assert (got.status, got.body) == (206, expected)
        assert got.headers["Content-Range"] == f"bytes {start}-{start + len(expected) - 1}/{len(content)}"
    else:
        assert (got.status, got.headers["Content-Range"]) == (416, f"bytes */{len(content)}")


def test_the_caller_knows_the_type_and_more_headers(disk: Disk) -> None:
    more: dict[str, Any] = {
        "content_type": "text/plain; charset=utf-8",
        "headers": [("Cache-Control", "no-store"), ("Content-Disposition", "attachment")],
    }
    for method in ("GET", "HEAD"):
        got = ask(disk, "small", method=method, **more)
        assert got.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert got.headers["Cache-Control"] == "no-store"
    fresh = ask(disk, "small", {"If-None-Match": "*"}, **more)
    assert (fresh.status, fresh.headers["Cache-Control"]) == (304, "no-store")
    refused = ask(disk, "small", {"Range": "bytes=9999-"}, **more)
    assert refused.status == 416
    assert "Content-Disposition" not in refused.headers


@pytest.mark.parametrize("path", ["directory/inner", b"directory/inner"])
def test_a_path_is_text_or_bytes(disk: Disk, path: str | bytes) -> None:
    assert ask(disk, path).body == b"inner"


# --- Conditions ---


BEFORE, AT, AFTER = (formatdate(MODIFIED + each, usegmt=True) for each in (-1, 0, 1))


@pytest.mark.parametrize(
    ("header", "value", "status"),
    [
        ("If-None-Match", "ETAG", 304),
        ("If-None-Match", "W/ETAG", 304),
        ("If-None-Match", '"x", W/ETAG ,"y"', 304),
        ("If-None-Match", "*", 304),
        ("If-None-Match", '"x"', 200),
        ("If-None-Match", "", 200),
        ("If-Modified-Since", BEFORE, 200),
        ("If-Modified-Since", AT, 304),
        ("If-Modified-Since", AFTER, 304),
        ("If-Modified-Since", "yesterday", 200),
        ("If-Match", "ETAG", 200),
        ("If-Match", '"x",ETAG', 200),
        ("If-Match", "*", 200),
        ("If-Match", "W/ETAG", 412),
        ("If-Match", '"x"', 412),
        ("If-Unmodified-Since", BEFORE, 412),
        ("If-Unmodified-Since", AT, 200),
        ("If-Unmodified-Since", "", 200),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("name", ["small", "large"])
def test_a_condition(disk: Disk, root: Path, header: str, value: str, status: int, method: str, name: str) -> None:
    etag = ask(disk, name).headers["ETag"]
    got = ask(disk, name, {header: value.replace("ETAG", etag)}, method)
    assert got.status == status
    if status in (200, 304):
        assert got.headers["ETag"] == etag
    until(lambda: not open_files(root), "all files to be closed")


@pytest.mark.parametrize(
    ("value", "status"),
    [("ETAG", 206), (AT, 206), ("W/ETAG", 200), ('"x"', 200), (AFTER, 200), (BEFORE, 200), ("", 206)],
)
def test_if_range(disk: Disk, value: str, status: int) -> None:
    etag = ask(disk, "small").headers["ETag"]
    got = ask(disk, "small", {"Range": "bytes=1-2", "If-Range": value.replace("ETAG", etag)})
    assert (got.status, got.body) == (status, SMALL[1:3] if status == 206 else SMALL)


@given(st.datetimes(datetime(1970, 1, 1), datetime(2068, 12, 31)))
def test_a_date_is_read_in_all_three_forms(date: datetime) -> None:
    date = date.replace(microsecond=0, tzinfo=timezone.utc)
    days = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
    modern = format_datetime(date, usegmt=True)
    _, day, month, year, clock, _ = modern.split()
    old = f"{days[date.weekday()]}, {day}-{month}-{year[2:]} {clock} GMT"
    asctime = f"{modern[:3]} {month} {date.day:2} {clock} {year}"
    for form in (modern, old, asctime):
        assert conditions._date(form) == date.timestamp(), form


@given(
    st.text(st.characters(max_codepoint=255)) | st.from_regex(r"Mon, [0-9]{1,30} Jan [0-9]{1,9} 1:2:3 [+-][0-9]{1,20}")
)
def test_what_is_no_date_is_none(value: str) -> None:
    assert isinstance(conditions._date(value), (int, type(None)))


@pytest.mark.parametrize("mtime_ns", [-(2**90), -1, 0, 2**63, 2**90])
def test_a_file_may_be_of_any_time(mtime_ns: int) -> None:
    assert conditions.last_modified(FileStat(1, mtime_ns, 1, 1)).endswith(" GMT")


# --- What is refused ---


@pytest.mark.parametrize("value", ["bytes=abc", "bytes=", "bytes=-", "bytes=2-1", "bytes=0_0-1"])
def test_a_range_that_is_none_is_400(disk: Disk, value: str) -> None:
    got = ask(disk, "small", {"Range": value})
    assert got.status == 400
    assert b"Range" in got.body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_files_are_read_only(disk: Disk, method: str) -> None:
    got = ask(disk, "small", method=method)
    assert (got.status, got.headers["Allow"]) == (405, "GET, HEAD")


class NotStarted(Exception):
    """start_response was called where an error had to leave it to the application."""


def fails(disk: Disk, path: Any, method: str = "GET", **more: Any) -> None:
    def start_response(*_: object) -> None:
        raise NotStarted

    send_file({"REQUEST_METHOD": method}, start_response, disk, path, **more)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("path", "kind", "status"),
    [
        ("missing", DiskFileNotFound, 404),
        ("directory", DiskFileNotRegular, 404),
        ("../small", DiskFileForbidden, 403),
        ("/small", DiskPathInvalid, 400),
        ("sm\0all", DiskPathInvalid, 400),
        ("\ud83d", DiskPathInvalid, 400),
    ],
)
def test_an_error_of_the_disk_is_for_the_application(
    disk: Disk, path: str, kind: type[DiskError], status: int, method: str
) -> None:
    with pytest.raises(kind) as caught:
        fails(disk, path, method)
    assert status_of(caught.value) == status


def test_a_deadline_that_passes(make_disk: MakeDisk) -> None:
    disk = make_disk(threads=1)
    holder = gevent.spawn(disk.stall, 0.5)
    until(lambda: disk.status.load.in_flight == 1, "the stall to begin")
    for method in ("GET", "HEAD"):
        with pytest.raises(DiskTimeout) as caught:
            fails(disk, "small", method, deadline=0.02)
        assert status_of(caught.value) == 504
    holder.get(timeout=30)
    with pytest.raises(ValueError, match="deadline"):
        fails(disk, "small", deadline=0)
    assert ask(disk, "large", deadline=30).body == LARGE


ERRORS: list[tuple[DiskError, int, int | None]] = [
    (DiskBusy("d", None, ""), 503, 1),
    (DiskOffline("d", None, "", retry_after=0.2), 503, 1),
    (DiskOffline("d", None, "", retry_after=1.01), 503, 2),
    (DiskOffline("d", None, "by hand"), 503, None),
    (DiskTimeout("d", b"x", "", started=True), 504, None),
    (DiskPathInvalid("d", b"x", ""), 400, None),
    (DiskFileNotFound("d", b"x", ""), 404, None),
    (DiskFileNotRegular("d", b"x", ""), 404, None),
    (DiskFileForbidden("d", b"x", ""), 403, None),
    (DiskFileChanged("d", b"x", ""), 500, None),
    (DiskIOError("d", b"x", ""), 500, None),
    (DiskError("d", b"x", ""), 500, None),
]


@pytest.mark.parametrize(("error", "status", "seconds"), ERRORS, ids=lambda each: type(each).__name__)
def test_every_error_has_a_status(error: DiskError, status: int, seconds: int | None) -> None:
    assert status_of(error) == status
    assert retry_after(error) == seconds


def test_no_kind_of_error_was_forgotten() -> None:
    assert {type(error) for error, _, _ in ERRORS} == {DiskError, *DiskError.__subclasses__()}


# --- What is left behind ---


def test_a_body_that_was_never_sent_closes_its_file(disk: Disk, root: Path) -> None:
    for sent in (0, 1, math.inf):
        body = send_file({"REQUEST_METHOD": "GET"}, lambda *_: None, disk, "large")
        assert isinstance(body, Body)
        assert open_files(root)
        for number, _ in enumerate(body, start=1):
            if number >= sent:
                break
        body.close()
        body.close()
        until(lambda: not open_files(root), "the file to be closed")


def test_a_file_that_shrinks_while_it_is_sent_breaks_off(disk: Disk, root: Path) -> None:
    body = send_file({"REQUEST_METHOD": "GET"}, lambda *_: None, disk, "large")
    os.truncate(root / "large", FIRST_CHUNK)
    with pytest.raises(DiskFileChanged):
        list(body)
    body.close()
    until(lambda: not open_files(root), "the file to be closed")
