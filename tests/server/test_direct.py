"""The experiment over HTTP: what is answered directly is what the application would have answered."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.direct import Direct
from server.simulate import Request, parse

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .conftest import StartServer

PLAIN = b"GET /200,0,some_file HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Asked(dict[bytes, Any]):
    """Stands in for disks and simulation: what was asked of them."""

    def __init__(self) -> None:
        self.asked: list[Request] = []

    def perform(self, request: Request, _since: float) -> float:
        self.asked.append(request)
        return request.stall


def find(data: bytes) -> tuple[Request, int] | None:
    asked = Asked()
    found = Direct(asked, asked).answer(data, lambda: False)  # type: ignore[arg-type]
    if found is None:
        assert not asked.asked, "carried out and not answered"
        return None
    return asked.asked[0], found[1]


def test_finds_a_request_and_where_it_ends() -> None:
    assert find(PLAIN) == (Request(b"200", 0.0, b"some_file"), len(PLAIN))
    assert find(PLAIN + b"GET /") == (Request(b"200", 0.0, b"some_file"), len(PLAIN))
    assert find(b"GET /-1,1500,a/b.c HTTP/1.1\r\n\r\n") == (Request(b"-1", 1.5, b"a/b.c"), 31)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        PLAIN[:-1],
        b"HEAD" + PLAIN[3:],
        b"get" + PLAIN[3:],
        PLAIN.replace(b"1.1", b"1.0"),
        PLAIN.replace(b"some_file", b"some%20file"),
        PLAIN.replace(b"some_file", b"some_file?x"),
        PLAIN.replace(b"some_file", b""),
        PLAIN.replace(b"some_file", b"a,b"),
        PLAIN.replace(b",0,", b",0.5,"),
        PLAIN.replace(b",0,", b",-1,"),
        PLAIN.replace(b",0,", b",1000000,"),
        PLAIN.replace(b"Host: localhost", b"Connection: close"),
        PLAIN.replace(b"Host: localhost", b"Content-Length: 0"),
        PLAIN.replace(b"Host: localhost", b"Range: bytes=0-1"),
        PLAIN.replace(b"Host: localhost", b"Host: a\r\nTransfer-Encoding: chunked"),
        PLAIN.replace(b"Host: localhost", b"Host: a\r\n b"),
        PLAIN.replace(b"Host: localhost", b"Host: \xff"),
        PLAIN.replace(b"\r\n", b"\n"),
        PLAIN.replace(b"200,0,some_file", b"v1/none/some_file"),
        b"0,0,some_file\n",
    ],
)
def test_leaves_everything_else_to_others(data: bytes) -> None:
    assert find(data) is None


@given(text=st.from_regex(rb"-?[0-9]{1,9},[0-9]{1,6},[A-Za-z0-9._/-]{1,30}", fullmatch=True))
def test_understands_a_request_as_the_parser_does(text: bytes) -> None:
    found = find(b"GET /" + text + b" HTTP/1.1\r\n\r\n")
    assert found is not None
    assert found[0] == parse(text)


@given(data=st.binary(max_size=80) | st.binary(max_size=20).map(lambda each: PLAIN[:30] + each + PLAIN[30:]))
def test_nothing_makes_it_fail(data: bytes) -> None:
    found = find(data)
    assert found is None or found[1] <= len(data)


def without_date(raw: bytes) -> tuple[bytes, list[bytes], bytes]:
    """Status, headers and body, with nothing in them that depends on the time."""
    raw = re.sub(rb"\r\n\r\n\d+,some_file$", b"\r\n\r\n0,some_file", raw)
    head, _, body = raw.partition(b"\r\n\r\n")
    status, *fields = head.split(b"\r\n")
    names = [re.sub(rb"^[^:]+", lambda found: found[0].lower(), each) for each in fields]
    return status, sorted(each for each in names if not each.startswith((b"date:", b"content-length:"))), body


def odd(request: bytes) -> bytes:
    """The same request with a header that makes it go to the application."""
    return request.replace(b"Host:", b"X-Odd: 1\r\nHost:")


def ask(start_server: StartServer, *requests: bytes, options: Sequence[str] = ("--simulate",)) -> list[bytes]:
    server, answers = start_server(*options), []
    for request in requests:
        with server.connect() as connection:
            connection.send(request)
            connection.half_close()
            answers.append(connection.rest())
    return answers


def test_answers_as_the_application_does(start_server: StartServer) -> None:
    directly, by_application = ask(start_server, PLAIN, odd(PLAIN))
    assert find(odd(PLAIN)) is None
    assert without_date(directly) == without_date(by_application)
    assert b"\r\nDate: " in directly


@pytest.mark.parametrize("name", [b"small", b"page.html", b"empty", b"./small", b"directory//inner", b"archive.tar.gz"])
def test_a_file_is_answered_as_the_application_does(start_server: StartServer, tree: Path, name: bytes) -> None:
    server = start_server("--disk", f"d1={tree}")
    server.wait_for_first_answer("d1")
    inline = server.disk("d1").inline
    assert inline is not None
    if not inline.on:
        pytest.skip(str(inline.reason))
    request = PLAIN.replace(b"200,0,some_file", b"v1/d1/" + name)
    for _ in range(50):  # some machines take cached pages back without need
        answers = []
        for each in (odd(request), request):  # the first one reads it, so that it is cached
            with server.connect() as connection:
                connection.send(each)
                connection.half_close()
                answers.append(connection.rest())
        if b"\r\nETag: " in answers[1]:  # the application writes it in small letters
            break
    else:
        pytest.fail("never answered directly")
    assert without_date(answers[0]) == without_date(answers[1])
    assert answers[0].startswith(b"HTTP/1.1 200 OK\r\n")


def test_what_cannot_be_had_at_once_is_left_to_the_application(start_server: StartServer, tree: Path) -> None:
    server = start_server("--disk", f"d1={tree}")
    with server.connect() as connection:
        for path, status in ((b"none", 404), (b"large", 200), (b"directory", 404), (b"../outside", 403)):
            connection.send(PLAIN.replace(b"200,0,some_file", b"v1/d1/" + path))
            assert connection.response().status == status, path


def test_requests_in_one_packet_are_answered_in_turn(start_server: StartServer) -> None:
    last = PLAIN.replace(b"some_file", b"last").replace(b"Host: localhost", b"Connection: close")
    (answers,) = ask(start_server, PLAIN + PLAIN.replace(b"some_file", b"second") + last + PLAIN)
    assert re.findall(rb"\r\n\d+,(some_file|second|last)", answers) == [b"some_file", b"second", b"last"]


def test_a_request_that_fails_is_answered_by_the_application_and_carried_out_once(start_server: StartServer) -> None:
    server = start_server("--simulate", "--disk", "d1=/nowhere/at/all")
    before = server.disk("d1").rejections
    with server.connect() as connection:
        connection.send(PLAIN.replace(b"some_file", b"d1/file"))
        response = connection.response()
        assert (response.status, response.headers["Content-Type"]) == (503, "application/json")
        assert b"offline" in response.body
        connection.send(PLAIN)
        assert connection.response().body.endswith(b",some_file")
    assert server.disk("d1").rejections == before + 1
