"""The headers of a request, read quickly when nothing about them is odd; and the date for those of a response."""

from __future__ import annotations

import re
import time
from email.utils import formatdate
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from email.errors import MessageDefect

_FIELD = rb"[!#$%&'*+.^`|~0-9A-Za-z-]+:[\t\x20-\x7e]*\r\n"  # a name without "_", which pywsgi drops
_PLAIN = re.compile(rb"(?:" + _FIELD + rb"){0,99}\r\n")  # http.client reads no more than 99 headers either

END = b"\r\n\r\n"
"""What ends the head of a request; bare line feeds are allowed, too, but nobody sends them."""


class Headers:
    """What pywsgi's handler and ours ask of `email.message.Message`, for headers of which nothing is odd.

    Parsing them with the email package takes longer than everything else that a small response needs.

    Attributes:
        status: "", which says that they could be read.
        defects: None.
    """

    status = ""
    defects: Sequence[MessageDefect] = ()

    def __init__(self, head: str) -> None:
        """Take the lines that `plain` has found, without the empty one at their end."""
        self._fields: list[tuple[str, str]] = []
        self._first: dict[str, str] = {}
        for line in head.splitlines():
            name, _, value = line.partition(":")
            name, value = name.lower(), value.lstrip(" \t")
            self._fields.append((name, value))
            self._first.setdefault(name, value)

    @property
    def headers(self) -> list[str]:
        """All of them as lines."""
        return [f"{name}: {value}\r\n" for name, value in self._fields]

    @property
    def typeheader(self) -> str | None:
        """The type of the request's body."""
        return self._first.get("content-type")

    def get(self, name: str, default: Any = None) -> Any:
        """The value of the first header of this name."""
        return self._first.get(name.lower(), default)

    getheader = get

    def get_all(self, name: str, default: Any = None) -> Any:
        """The values of all headers of this name."""
        return [value for each, value in self._fields if each == name.lower()] or default

    def get_payload(self) -> str:
        """What follows the headers without an empty line: nothing."""
        return ""

    def environ(self) -> Iterator[tuple[str, str]]:
        """The headers as keys and values of a WSGI environment (PEP 3333)."""
        for name, value in self._fields:
            if name not in {"content-type", "content-length"}:
                yield f"HTTP_{name.replace('-', '_').upper()}", value.strip()

    def __delitem__(self, name: str) -> None:
        """Remove all headers of this name."""
        self._fields = [field for field in self._fields if field[0] != name.lower()]
        self._first.pop(name.lower(), None)


def plain(data: bytes) -> tuple[Headers, int] | None:
    """Read headers.

    Args:
        data: What came after the request line; more may follow.

    Returns:
        The headers, and the bytes that they and the empty line after them take; None when they are not all there, or
        need somebody who knows every trick: folded lines, bare line feeds, bytes that are not ASCII.
    """
    found = _PLAIN.match(data)
    return None if found is None else (Headers(data[: found.end() - 2].decode("ascii")), found.end())


def date() -> bytes:
    """Now, as the header Date has it. Formatted once in a second."""
    return _date(int(time.time()))


@lru_cache(maxsize=1)
def _date(seconds: int) -> bytes:
    return formatdate(seconds, usegmt=True).encode("ascii")
