"""Ranges of bytes as HTTP clients ask for them (RFC 9110, section 14). Pure."""

from __future__ import annotations

import re
from typing import NamedTuple

from .disk import FIRST_CHUNK

_RANGE = re.compile(r"(?=-?[0-9])([0-9]{0,100})-([0-9]{0,100})")
_LARGEST_OFFSET = 2**62  # beyond the largest file there is; keeps offset plus size within 64 bits


class Wanted(NamedTuple):
    """A range before the size of the file is known.

    Attributes:
        first: The first byte; counted from the end if negative.
        last: The last byte, -1 for that of the file.
    """

    first: int
    last: int


class Span(NamedTuple):
    """The bytes of a file that are to be sent: from `start` up to, not including, `stop`."""

    start: int
    stop: int


def parse(value: str | None) -> Wanted | None:
    """Read the header Range.

    A server ignores units that it does not know, and may ignore several ranges at once (RFC 9110, 14.2): the whole
    file is a correct answer to both.

    Args:
        value: What the header says; None for no header.

    Returns:
        The range; None for the whole file.

    Raises:
        ValueError: It is no range; says what one is.
    """
    if value is None:
        return None
    unit, _, ranges = value.partition("=")
    if unit.strip().lower() != "bytes" or "," in value:
        return None
    found = _RANGE.fullmatch(ranges.strip())
    if found is None:
        raise ValueError("It must be FIRST-LAST, FIRST- or -LENGTH.")
    first, last = found[1], found[2]
    if not first:  # the last 0 bytes: no byte at all
        return Wanted(-int(last) if int(last) else _LARGEST_OFFSET, -1)
    if last and int(last) < int(first):
        raise ValueError("Its last byte is before its first.")
    return Wanted(int(first), int(last or -1))


def first_piece(wanted: tuple[int, int] | None) -> tuple[int, int]:
    """Offset and size of what is worth reading in the visit that opens the file, when its size is not known yet."""
    if wanted is None:
        return 0, FIRST_CHUNK
    first, last = wanted
    if not 0 <= first < _LARGEST_OFFSET:
        return 0, 0
    return first, FIRST_CHUNK if last < 0 else min(FIRST_CHUNK, last - first + 1)


def resolve(wanted: tuple[int, int], size: int) -> Span | None:
    """The bytes of a file of `size` bytes that a range means; None when there are none."""
    first, last = wanted
    start = max(0, size + first) if first < 0 else first
    stop = size if last < 0 else min(size, last + 1)
    return Span(start, stop) if start < stop else None
