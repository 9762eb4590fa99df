"""The experiment over HTTP: what is answered directly is what the application would have answered."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server import direct
from server.simulate import Request, parse

if TYPE_CHECKING:
    from .conftest import StartServer

PLAIN = b"GET /200,0,some_file HTTP/1.1\r\nHost: localhost\r\n\r\n"


def test_finds_a_request_and_where_it_ends() -> None:
    assert direct.find(PLAIN) == (Request(b"200", 0.0, b"some_file"), len(PLAIN))
    assert direct.find(PLAIN + b"GET /") == (Request(b"200", 0.0, b"some_file"), len(PLAIN))
    assert direct.find(b"GET /-1,1500,a/b.c HTTP/1.1\r\n\r\n") == (Request(b"-1", 1.5, b"a/b.c"), 31)


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
        PLAIN.replace(b"Host: localhost", b"Host: a\r\nTransfer-Encoding: chunked"),
        PLAIN.replace(b"Host: localhost", b"Host: a\r\n b"),
        PLAIN.replace(b"Host: localhost", b"Host: \xff"),
        PLAIN.replace(b"\r\n", b"\n"),
        b"0,0,some_file\n",
    ],
)
def test_leaves_everything_else_to_others(data: bytes) -> None:
    assert direct.find(data) is None


@given(text=st.from_regex(rb"-?[0-9]{1,9},[0-9]{1,6},[A-Za-z0-9._/-]{1,30}", fullmatch=True))
def test_understands_a_request_as_the_parser_does(text: bytes) -> None:
    found = direct.find(b"GET /" + text + b" HTTP/1.1\r\n\r\n")
    assert found is not None
    assert found[0] == parse(text)


@given(data=st.binary(max_size=80) | st.binary(max_size=20).map(lambda each: PLAIN[:30] + each + PLAIN[30:]))
def test_nothing_makes_it_fail(data: bytes) -> None:
    found = direct.find(data)
    assert found is None or found[1] <= len(data)


def without_date(raw: bytes) -> tuple[bytes, list[bytes], bytes]:
    head, _, body = raw.partition(b"\r\n\r\n")
    status, *fields = head.split(b"\r\n")
    names = [re.sub(rb"^[^:]+", lambda found: found[0].lower(), each) for each in fields]
    return status, sorted(each for each in names if not each.startswith(b"date:")), body


def ask(start_server: StartServer, *requests: bytes) -> list[bytes]:
    server, answers = start_server("--simulate"), []
    for request in requests:
        with server.connect() as connection:
            connection.send(request)
            connection.half_close()
            answers.append(connection.rest())
    return answers


def test_answers_as_the_application_does(start_server: StartServer) -> None:
    directly, by_application = ask(start_server, PLAIN, PLAIN.replace(b"Host:", b"X-Odd: 1\r\nHost:"))
    assert direct.find(PLAIN.replace(b"Host:", b"X-Odd: 1\r\nHost:")) is None
    assert without_date(directly) == without_date(by_application)
    assert b"\r\nDate: " in directly


def test_requests_in_one_packet_are_answered_in_turn(start_server: StartServer) -> None:
    odd = PLAIN.replace(b"some_file", b"last").replace(b"Host: localhost", b"Connection: close")
    (answers,) = ask(start_server, PLAIN + PLAIN.replace(b"some_file", b"second") + odd + PLAIN)
    assert re.findall(rb"0,(some_file|second|last)", answers) == [b"some_file", b"second", b"last"]


def test_a_request_that_fails_is_answered_by_the_application_and_carried_out_once(start_server: StartServer) -> None:
    server = start_server("--simulate", "--disk", "d1=/nowhere/at/all")
    before = server.disk("d1").rejections
    with server.connect() as connection:
        connection.send(PLAIN.replace(b"some_file", b"d1/file"))
        response = connection.response()
        assert (response.status, response.headers["Content-Type"]) == (503, "application/json")
        assert b"offline" in response.body
        connection.send(PLAIN)
        assert connection.response().body == b"0,some_file"
    assert server.disk("d1").rejections == before + 1
