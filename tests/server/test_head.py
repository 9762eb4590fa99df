"""Plain headers read quickly mean what pywsgi makes of them by way of the email package."""

from __future__ import annotations

import io
import string
from typing import Any

import pytest
from gevent.pywsgi import WSGIHandler
from hypothesis import example, given
from hypothesis import strategies as st

from server import head

NAMES = st.sampled_from(
    ["Host", "Range", "Content-Length", "Content-Type", "Connection", "Cookie", "Upgrade", "X-A", "x-a", "From"]
) | st.text("!#$%&'*+.^`|~-" + string.digits + string.ascii_letters, min_size=1, max_size=5)
VALUES = st.text(string.printable[:95] + "\t", max_size=12)
FIELDS = st.lists(st.tuples(NAMES, VALUES), max_size=12)
ASKED = ("host", "RANGE", "Content-Length", "content-type", "Connection", "transfer-encoding", "x-A")


def text(fields: list[tuple[str, str]]) -> bytes:
    return "".join(f"{name}:{value}\r\n" for name, value in fields).encode("ascii") + b"\r\n"


def by_email(data: bytes) -> Any:
    return WSGIHandler.MessageClass(None, io.BytesIO(data), 0)  # type: ignore[arg-type, call-arg]


def environ(headers: Any) -> list[tuple[str, str]]:
    handler: Any = WSGIHandler.__new__(WSGIHandler)
    handler.headers = headers
    return list(handler._headers())


@given(FIELDS, st.binary(max_size=20))
@example([("Host", " a \t"), ("host", "b:c")], b"GET / HTTP/1.1\r\n")
@example([("Cookie", "a"), ("Cookie", " b")], b"")
def test_means_the_same(fields: list[tuple[str, str]], rest: bytes) -> None:
    data = text(fields)
    found = head.plain(data + rest)
    assert found is not None
    quick, length = found
    assert length == len(data)
    slow = by_email(data)
    for name in ASKED:
        assert quick.get(name) == slow.get(name)
        assert quick.get(name, "none") == slow.get(name, "none")
        assert quick.get_all(name) == slow.get_all(name)
    assert quick.typeheader == slow.typeheader
    assert quick.getheader("content-length") == slow.getheader("content-length")
    assert (quick.status, list(quick.defects), quick.get_payload()) == (slow.status, slow.defects, slow.get_payload())
    assert list(quick.environ()) == environ(quick) == environ(slow)
    either: Any
    for either in (quick, slow):
        del either["Cookie"]
    assert quick.get("cookie") is None
    assert environ(quick) == environ(slow)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"Host: a\r\n",
        b"Host: a\n\n",
        b"Host: a\r\n folded\r\n\r\n",
        b" folded: at once\r\n\r\n",
        b"Host : a\r\n\r\n",
        b"Host\r\n\r\n",
        b": nameless\r\n\r\n",
        b"X_Y: dropped by pywsgi\r\n\r\n",
        b"X: \xc3\xbc\r\n\r\n",
        b"X: a\x00b\r\n\r\n",
        b"X: a\rb\r\n\r\n",
        b"X: a\x0bb\r\n\r\n",
        b"A: 1\r\n" * 100 + b"\r\n",
    ],
)
def test_leaves_what_is_odd_to_others(data: bytes) -> None:
    assert head.plain(data) is None


def test_as_many_as_others_take() -> None:
    data = b"A: 1\r\n" * 99 + b"\r\n"
    assert head.plain(data) is not None
    assert len(by_email(data)) == 99
