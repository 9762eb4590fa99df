"""Files over HTTP: content, names, conditional requests and ranges as RFC 9110 has them, and what is no file."""

from __future__ import annotations

import json
import os
from email.utils import formatdate, parsedate_to_datetime
from typing import TYPE_CHECKING

import falcon
import pytest
from falcon import testing
from hypothesis import assume, given
from hypothesis import strategies as st

from diskread import FIRST_CHUNK
from server import objects
from tests.server.conftest import LARGE, NAMES, SMALL
from tests.server.raw_client import ServerProcess, holding, http_request, until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.server.conftest import StartServer
    from tests.server.raw_client import Response

MEGABYTE = 1024 * 1024


# --- Ranges, as functions ---


def meant(value: str, size: int) -> str | tuple[int, int]:
    """What a Range header means for a file: its first and last byte plus one, "whole", "none" or "bad"."""
    request = testing.create_req(headers={"Range": value})
    try:
        wanted = objects._wanted_range(request)
    except falcon.HTTPInvalidHeader:
        return "bad"
    if wanted is None:
        return "whole"
    offset, length = objects._first_piece(wanted)
    assert 0 <= offset < 2**63 - length
    assert 0 <= length <= FIRST_CHUNK
    span = objects._resolve(wanted, size)
    return "none" if span is None else (span.start, span.stop)


@given(st.integers(0, 2**64), st.integers(0, 2**64), st.integers(0, 2**62))
def test_a_range_is_what_is_left_of_it_within_the_file(first: int, last: int, size: int) -> None:
    assume(first <= last)
    expected = (first, min(last + 1, size)) if first < size else "none"
    assert meant(f"bytes={first}-{last}", size) == expected
    expected = (first, size) if first < size else "none"
    assert meant(f"bytes={first}-", size) == expected


@given(st.integers(1, 2**64), st.integers(0, 2**62))
def test_a_suffix_is_at_most_the_whole_file(length: int, size: int) -> None:
    assert meant(f"bytes=-{length}", size) == ((max(0, size - length), size) if size else "none")


@given(st.text(st.characters(min_codepoint=32, max_codepoint=255)) | st.from_regex(r"[bB]ytes ?= ?[-0-9 _+,x]*"))
def test_whatever_a_range_header_says_it_means_bytes_of_the_file_or_nothing(value: str) -> None:
    span = meant(value, 1000)
    if not isinstance(span, str):
        assert 0 <= span[0] < span[1] <= 1000


@pytest.mark.parametrize("value", ["bytesx=0-1", "bytes2=0-1", "items=0-1", "bytes-ish=0-1", "none"])
def test_a_unit_that_is_not_known_is_ignored(value: str) -> None:
    assert meant(value, 1000) == "whole"


@pytest.mark.parametrize("value", ["bytes=0_0-0_1", "bytes=+0-1", "bytes=1-+2", "bytes=\xb2-5"])
def test_a_position_is_made_of_digits_alone(value: str) -> None:
    assert meant(value, 1000) in ("bad", "whole")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (b"page.html", "text/html"),
        (b"a/b.PNG", "image/png"),
        (b"archive.tar.gz", "application/octet-stream"),
        (b"no extension", "application/octet-stream"),
        (b"\xff\xfe.txt", "text/plain"),
        (b".html", "application/octet-stream"),
        (b"data:text/html,picture.png", "image/png"),
        (b"x://[/picture.png", "image/png"),
    ],
)
def test_the_type_comes_from_the_end_of_the_name(path: bytes, kind: str) -> None:
    assert objects._content_type(path) == kind


# --- Whole files ---


@pytest.mark.parametrize(("name", "content"), [("small", SMALL), ("large", LARGE), ("empty", b"")])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_sends_a_file(server: ServerProcess, tree: Path, name: str, content: bytes, version: str) -> None:
    response = server.http(f"/v1/d1/{name}", version=version)
    assert (response.status, response.body) == (200, content)
    assert response.headers["Content-Type"] == "application/octet-stream"
    assert response.headers["Content-Length"] == str(len(content))
    assert response.headers["Accept-Ranges"] == "bytes"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["ETag"].startswith('"')
    modified = parsedate_to_datetime(response.headers["Last-Modified"])
    assert modified.timestamp() == int((tree / name).stat().st_mtime)


@pytest.mark.parametrize("name", ["small", "large", "empty"])
def test_head_tells_what_get_would_send(server: ServerProcess, name: str) -> None:
    get, head = (server.http(f"/v1/d1/{name}", method=method) for method in ("GET", "HEAD"))
    assert head.body == b""
    for header in get.headers:
        if header not in ("Date", "X-Request-Id"):
            assert head.headers[header] == get.headers[header], header
    assert set(map(str.lower, head.headers)) == set(map(str.lower, get.headers))


def test_names_the_type(server: ServerProcess) -> None:
    assert server.http("/v1/d1/page.html").headers["Content-Type"] == "text/html"
    assert server.http("/v1/d1/archive.tar.gz").headers["Content-Type"] == "application/octet-stream"


@pytest.mark.parametrize(("name", "target"), NAMES.items(), ids=[repr(name) for name in NAMES])
def test_finds_a_file_whatever_its_name(server: ServerProcess, name: bytes, target: str) -> None:
    response = server.http(f"/v1/d1/{target}")
    assert (response.status, response.body) == (200, b"named " + name)


@pytest.mark.parametrize("name", ["é", "à", "Å", "✓ü".replace("ü", "à")])
def test_takes_bytes_that_a_client_did_not_escape(start_server: StartServer, tmp_path: Path, name: str) -> None:
    # curl sends what it was given; some of these letters have bytes that are white space in ISO 8859-1.
    (tmp_path / name).write_text("right")
    (tmp_path / "Ã").write_text("wrong")
    server = start_server("--disk", f"d1={tmp_path}")
    response = server.http(f"/v1/d1/{name}".encode())
    assert (response.status, response.body) == (200, b"right")


def test_a_query_is_no_part_of_the_name(server: ServerProcess) -> None:
    assert server.http("/v1/d1/small?version=1,2").body == SMALL


def test_follows_links_inside_the_disk(server: ServerProcess) -> None:
    assert server.http("/v1/d1/link").body == b"inner"


@pytest.mark.parametrize("mtime", [13_569_465_600, 0, -2_000_000_000])
def test_a_file_may_be_of_any_time(start_server: StartServer, tmp_path: Path, mtime: int) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    os.utime(file, (mtime, mtime))
    if file.stat().st_mtime != mtime:
        pytest.skip("the file system keeps no such time")
    server = start_server("--disk", f"d1={tmp_path}")
    response = server.http("/v1/d1/file")
    assert response.status == 200
    assert response.headers["Last-Modified"] == formatdate(mtime, usegmt=True)


def test_streams_a_large_file_within_bounded_memory(start_server: StartServer, tree: Path) -> None:
    server = start_server("--disk", f"d1={tree}")
    server.http("/v1/d1/small")
    before = server.memory("VmHWM")
    with server.connect() as connection:
        connection.send(http_request("/v1/d1/sparse"))
        status, _, length = connection.head()
        assert (status, length) == (200, 100 * MEGABYTE)
        left = length
        while left and (piece := connection.reader.read(min(left, MEGABYTE))):
            left -= len(piece)
        assert left == 0
    assert server.memory("VmHWM") - before < 30 * MEGABYTE


def test_a_file_that_shrinks_while_it_is_sent_breaks_off(start_server: StartServer, tmp_path: Path) -> None:
    file = tmp_path / "file"
    with file.open("wb") as opened:
        opened.truncate(50 * MEGABYTE)
    server = start_server("--disk", f"d1={tmp_path}")
    with server.connect(receive_buffer=16384) as connection:
        connection.send(http_request("/v1/d1/file", close=False))
        _, _, length = connection.head()
        os.truncate(file, MEGABYTE)
        assert len(connection.rest()) < length == 50 * MEGABYTE
    assert "/v1/d1/file broke off" in server.said()
    assert "Traceback" not in server.said()
    assert server.http("/v1/d1/file").status == 200


def test_closes_files_that_nobody_waits_for(server: ServerProcess, tree: Path) -> None:
    for _ in range(20):
        with server.connect(receive_buffer=16384) as connection:
            connection.send(http_request("/v1/d1/sparse"))
            connection.head()
    until(lambda: server.open_files(tree / "sparse") == 0, "the server to close its files")


# --- What is no file ---


def problem(response: Response, status: int) -> str:
    """Check that an error is one that a program and a person can read."""
    assert response.status == status, response
    assert response.headers["Content-Type"] == "application/json"
    document = json.loads(response.body)
    assert document["title"]
    return str(document.get("description", ""))


@pytest.mark.parametrize(
    "target",
    [
        "/v1/d1/missing",
        "/v1/d1/small/",
        "/v1/d1/small/x",
        "/v1/d1/directory",
        "/v1/d1/directory/",
        "/v1/d1/.",
        "/v1/d1/fifo",
        "/v1/d1/small%20",
        "/v1/d2/small",
        "/v1/D1/small",
        "/v1/simulated/small",
        "/v1/%64%32/small",
        "/v1//small",
        "/v1/d1",
        "/v1/",
        "/v1",
        "/v2/d1/small",
        "//v1/d1/small",
        "/favicon.ico",
    ],
)
def test_what_is_not_there_is_404(server: ServerProcess, target: str) -> None:
    problem(server.http(target), 404)
    assert server.http(target, method="HEAD").status == 404


def test_says_what_there_is_when_the_disk_is_unknown(server: ServerProcess) -> None:
    assert "/status" in problem(server.http("/v1/d2/small"), 404)


@pytest.mark.parametrize(
    "target",
    [
        "/v1/d1/../small",
        "/v1/d1/../../../../../../etc/passwd",
        "/v1/d1/%2e%2e/small",
        "/v1/d1/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/v1/d1/directory/../../small",
        "/v1/d1/way%20out",
        "/v1/d1/circle",
    ],
)
def test_what_leads_out_of_the_disk_is_403(server: ServerProcess, target: str) -> None:
    problem(server.http(target), 403)


def test_dots_that_stay_inside_are_harmless(server: ServerProcess) -> None:
    assert server.http("/v1/d1/directory/../small").body == SMALL
    assert server.http("/v1/d1/./directory//inner").body == b"inner"


@pytest.mark.parametrize(
    "target",
    [
        "/v1/d1//etc/passwd",
        "/v1/d1/%2fetc%2fpasswd",
        "/v1/d1/",
        "/v1/d1/sm%00all",
        "/v1/d1/small%00",
        f"/v1/d1/{'x' * 300}",
    ],
)
def test_what_cannot_be_a_path_is_400(server: ServerProcess, target: str) -> None:
    problem(server.http(target), 400)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_files_are_read_only(server: ServerProcess, method: str) -> None:
    response = server.http("/v1/d1/small", method=method)
    problem(response, 405)
    assert {"GET", "HEAD"} <= {each.strip() for each in response.headers["Allow"].split(",")}


def test_a_root_that_is_not_there_is_503(server: ServerProcess) -> None:
    response = server.http("/v1/lost/small")
    assert "root directory" in problem(response, 503)
    assert 1 <= int(response.headers["Retry-After"]) <= 30, "the time of the next probe"


def test_a_disk_that_hangs_is_504_then_503_and_comes_back(start_server: StartServer, tree: Path) -> None:
    server = start_server("--simulate", "--disk", f"d1={tree}", "--threads", "1", "--queue", "9", "--deadline", "0.5")
    server.wait_for_first_answer("d1")
    with holding(server, b"0,2500,d1\n"):
        until(lambda: server.disk("d1").in_flight == 1, "the stall to begin")
        assert "d1/small" in problem(server.http("/v1/d1/small"), 504)
        until(lambda: server.disk("d1").stuck == 1, "the stall to miss its deadline")
        response = server.http("/v1/d1/small")
        assert "deadline" in problem(response, 503)
        assert response.headers["Retry-After"] == "1"
        until(lambda: server.http("/v1/d1/small").status == 200, "the disk to come back")


def test_errors_have_their_text_whatever_the_client_would_rather_have(server: ServerProcess) -> None:
    for accept in ("image/avif,image/webp", "text/html", "application/xml", "garbage"):
        problem(server.http("/v1/d1/missing", {"Accept": accept}), 404)


# --- Conditional requests (RFC 9110, 13) ---


@pytest.fixture(scope="module")
def version(server: ServerProcess) -> tuple[str, str, str, str]:
    """ETag and Last-Modified of the small file, and the times a minute before and after."""
    headers = server.http("/v1/d1/small").headers
    modified = parsedate_to_datetime(headers["Last-Modified"]).timestamp()
    return (
        headers["ETag"],
        headers["Last-Modified"],
        formatdate(modified - 60, usegmt=True),
        formatdate(modified + 60, usegmt=True),
    )


Version = tuple[str, str, str, str]


def small(server: ServerProcess, *headers: tuple[str, str]) -> int:
    """Ask for the small file; the status, after a look at whether the rest of the answer fits it."""
    response = server.http("/v1/d1/small", headers)
    head = server.http("/v1/d1/small", headers, method="HEAD")
    assert head.status == (200 if response.status == 206 else response.status)
    if response.status == 200:
        assert response.body == SMALL
    elif response.status == 304:
        assert response.headers["ETag"]
        assert response.headers["Content-Type"] is None
        assert response.headers["Content-Length"] in (None, "1024")
    elif response.status == 412:
        problem(response, 412)
    return response.status


def test_if_none_match(server: ServerProcess, version: Version) -> None:
    etag = version[0]
    for fresh in (etag, f"W/{etag}", "*", f'"other", {etag}', f'"o,ther",W/{etag} , "x"'):
        assert small(server, ("If-None-Match", fresh)) == 304
    for stale in ('"other"', 'W/"other"', '"a", "b"', etag.strip('"') + "x"):
        assert small(server, ("If-None-Match", stale)) == 200


def test_if_modified_since(server: ServerProcess, version: Version) -> None:
    _, modified, before, after = version
    assert small(server, ("If-Modified-Since", modified)) == 304
    assert small(server, ("If-Modified-Since", after)) == 304
    assert small(server, ("If-Modified-Since", before)) == 200
    for no_date in ("yesterday", "", "0", "Sun, 99 Nov 2094 08:49:37 GMT"):
        assert small(server, ("If-Modified-Since", no_date)) == 200


def test_takes_the_old_forms_of_a_date(server: ServerProcess, version: Version) -> None:
    # "A recipient that parses a timestamp value in an HTTP field MUST accept all three": RFC 9110, 5.6.7
    date = parsedate_to_datetime(version[3])
    for form in ("%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y"):
        assert small(server, ("If-Modified-Since", date.strftime(form))) == 304


def test_if_none_match_goes_before_if_modified_since(server: ServerProcess, version: Version) -> None:
    etag, _, before, after = version
    assert small(server, ("If-None-Match", '"other"'), ("If-Modified-Since", after)) == 200
    assert small(server, ("If-None-Match", etag), ("If-Modified-Since", before)) == 304


def test_if_match(server: ServerProcess, version: Version) -> None:
    etag = version[0]
    for same in (etag, "*", f'"other", {etag}'):
        assert small(server, ("If-Match", same)) == 200
    for other in ('"other"', f"W/{etag}", f'"other", W/{etag}'):
        assert small(server, ("If-Match", other)) == 412


def test_if_unmodified_since(server: ServerProcess, version: Version) -> None:
    etag, modified, before, after = version
    assert small(server, ("If-Unmodified-Since", modified)) == 200
    assert small(server, ("If-Unmodified-Since", after)) == 200
    assert small(server, ("If-Unmodified-Since", before)) == 412
    assert small(server, ("If-Unmodified-Since", "yesterday")) == 200
    assert small(server, ("If-Match", etag), ("If-Unmodified-Since", before)) == 200


def test_preconditions_do_not_count_for_what_is_not_there(server: ServerProcess) -> None:
    assert server.http("/v1/d1/missing", {"If-Match": '"x"'}).status == 404
    assert server.http("/v1/d1/missing", {"If-None-Match": "*"}).status == 404


def test_an_etag_is_of_one_version_only(start_server: StartServer, tmp_path: Path) -> None:
    file = tmp_path / "file"
    server = start_server("--disk", f"d1={tmp_path}")
    etags: set[str | None] = set()
    for content in (b"1", b"2", b"22"):
        file.write_bytes(content)
        os.utime(file, ns=(0, 1_000_000_000 + len(etags)))
        etags.add(server.http("/v1/d1/file").headers["ETag"])
    assert len(etags) == 3


# --- Ranges (RFC 9110, 14) ---


@pytest.mark.parametrize(
    ("value", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-99", 0, 100),
        ("bytes=1023-1023", 1023, 1024),
        ("bytes=1000-", 1000, 1024),
        ("bytes=1000-99999999999999999999999", 1000, 1024),
        ("bytes=0-", 0, 1024),
        ("bytes=-1", 1023, 1024),
        ("bytes=-1024", 0, 1024),
        ("bytes=-99999999999999999999999", 0, 1024),
        ("Bytes=5-6", 5, 7),
    ],
)
def test_sends_a_range(server: ServerProcess, value: str, start: int, stop: int) -> None:
    response = server.http("/v1/d1/small", {"Range": value})
    assert (response.status, response.body) == (206, SMALL[start:stop])
    assert response.headers["Content-Range"] == f"bytes {start}-{stop - 1}/1024"
    assert response.headers["ETag"]


@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, 65_536), (65_535, 65_537), (65_536, 700_001), (262_143, 262_145), (1, 700_000), (699_999, 700_001)],
)
def test_sends_a_range_of_a_large_file(server: ServerProcess, start: int, stop: int) -> None:
    response = server.http("/v1/d1/large", {"Range": f"bytes={start}-{stop - 1}"})
    assert (response.status, response.body) == (206, LARGE[start:stop])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("small", "bytes=1024-"),
        ("small", "bytes=1024-2000"),
        ("small", "bytes=99999999999999999999999-"),
        ("small", "bytes=99999999999999999999998-99999999999999999999999"),
        ("small", "bytes=-0"),
        ("empty", "bytes=0-"),
        ("empty", "bytes=0-0"),
    ],
)
def test_a_range_beyond_the_file_is_416(server: ServerProcess, name: str, value: str) -> None:
    response = server.http(f"/v1/d1/{name}", {"Range": value})
    problem(response, 416)
    assert response.headers["Content-Range"] == f"bytes */{1024 if name == 'small' else 0}"


@pytest.mark.parametrize(
    "value", ["bytes=abc", "bytes=", "bytes=-", "bytes=2-1", "bytes=1", "bytes=--1", "bytes=0-1-2"]
)
def test_a_range_that_is_none_is_rejected(server: ServerProcess, value: str) -> None:
    assert "Range" in problem(server.http("/v1/d1/small", {"Range": value}), 400)


@pytest.mark.parametrize("value", ["bytes=0-0,5-9", "bytes=0-0, -1", "items=0-5", "bytesx=0-5", ""])
def test_a_range_that_is_not_supported_is_ignored(server: ServerProcess, value: str) -> None:
    response = server.http("/v1/d1/small", {"Range": value})
    assert (response.status, response.body) == (200, SMALL)
    assert response.headers["Content-Range"] is None


def test_if_range(server: ServerProcess, version: Version) -> None:
    etag, modified, before, after = version
    for same in (etag, modified):
        response = server.http("/v1/d1/small", {"Range": "bytes=1-2", "If-Range": same})
        assert (response.status, response.body) == (206, SMALL[1:3])
    for other in (f"W/{etag}", '"other"', before, after, "yesterday"):
        response = server.http("/v1/d1/small", {"Range": "bytes=1-2", "If-Range": other})
        assert (response.status, response.body) == (200, SMALL)
    assert server.http("/v1/d1/small", {"Range": "bytes=9999-", "If-Range": '"other"'}).status == 200


def test_preconditions_go_before_ranges(server: ServerProcess, version: Version) -> None:
    etag = version[0]
    assert server.http("/v1/d1/small", {"Range": "bytes=9999-", "If-None-Match": etag}).status == 304
    assert server.http("/v1/d1/small", {"Range": "bytes=9999-", "If-Match": '"x"'}).status == 412
    response = server.http("/v1/d1/small", {"Range": "bytes=5-6", "If-None-Match": '"x"'})
    assert (response.status, response.body) == (206, SMALL[5:7])


# --- Several requests on one connection ---


def test_a_connection_serves_many_requests(server: ServerProcess) -> None:
    with server.connect() as connection:
        for name, content in (("small", SMALL), ("large", LARGE), ("empty", b""), ("small", SMALL)) * 3:
            connection.send(http_request(f"/v1/d1/{name}", close=False))
            response = connection.response()
            assert (response.status, response.body) == (200, content)
            connection.send(http_request(f"/v1/d1/{name}", method="HEAD", close=False))
            assert connection.response("HEAD").status == 200
            connection.send(http_request("/v1/d1/missing", close=False))
            assert connection.response().status == 404
            connection.send(http_request(f"/v1/d1/{name}", {"If-None-Match": "*"}, close=False))
            assert connection.response().status == 304


def test_requests_may_be_sent_all_at_once(server: ServerProcess) -> None:
    names = [("small", SMALL), ("large", LARGE), ("missing", None), ("empty", b""), ("page.html", b"<p>page</p>")] * 5
    with server.connect() as connection:
        connection.send(b"".join(http_request(f"/v1/d1/{name}", close=False) for name, _ in names))
        for _, content in names:
            response = connection.response()
            assert response.status == (404 if content is None else 200)
            assert content is None or response.body == content
        connection.half_close()
        assert connection.rest() == b""
