"""Conditional requests: which version of a file a client has or wants (RFC 9110, section 13). Pure."""

from __future__ import annotations

import re
from datetime import timezone
from email.utils import formatdate, parsedate_to_datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .disk import FileStat

_CONDITIONS = frozenset(
    ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH", "HTTP_IF_MODIFIED_SINCE", "HTTP_IF_UNMODIFIED_SINCE", "HTTP_IF_RANGE")
)
_ENTITY_TAG = re.compile(r'([Ww]/)?("[^"]*")')
_EARLIEST, _LATEST = -62_135_596_800, 253_402_300_799  # the first second of year 1 and the last of 9999


class Version(NamedTuple):
    """A version of a file.

    Attributes:
        etag: Its strong entity tag, quoted.
        modified: When it was modified, seconds since 1970.
    """

    etag: str
    modified: int


def version_of(stat: FileStat) -> Version:
    """The version that a file has."""
    return Version(etag(stat), stat.mtime_ns // 1_000_000_000)


def etag(stat: FileStat) -> str:
    """The header ETag of a file."""
    return f'"{stat.inode:x}-{stat.size:x}-{stat.mtime_ns:x}"'


def last_modified(stat: FileStat) -> str:
    """The header Last-Modified of a file."""
    return _http_date(stat.mtime_ns // 1_000_000_000)


def are_there(environ: Mapping[str, Any]) -> bool:
    """Whether a WSGI environment has any condition."""
    return not _CONDITIONS.isdisjoint(environ)


def precondition_failed(environ: Mapping[str, Any], version: Version) -> bool:
    """Whether the client wants another version only (If-Match, If-Unmodified-Since)."""
    etags = _header(environ, "HTTP_IF_MATCH")
    if etags:
        return not _matches(etags, version.etag, strong=True)
    limit = _date(_header(environ, "HTTP_IF_UNMODIFIED_SINCE"))
    return limit is not None and version.modified > limit


def not_modified(environ: Mapping[str, Any], version: Version) -> bool:
    """Whether the client has this version (If-None-Match, If-Modified-Since)."""
    etags = _header(environ, "HTTP_IF_NONE_MATCH")
    if etags:
        return _matches(etags, version.etag, strong=False)
    limit = _date(_header(environ, "HTTP_IF_MODIFIED_SINCE"))
    return limit is not None and version.modified <= limit


def may_have_range(environ: Mapping[str, Any], version: Version) -> bool:
    """Whether a range may be sent: If-Range names the version that the client has a part of."""
    value = _header(environ, "HTTP_IF_RANGE")
    if not value:
        return True
    if value.startswith(('"', "W/")):
        return value == version.etag
    return _date(value) == version.modified


def _header(environ: Mapping[str, Any], key: str) -> str:
    value: str = environ.get(key, "")
    return value.strip()


def _matches(etags: str, etag: str, *, strong: bool) -> bool:
    if etags == "*":
        return True
    return any(each == etag and not (strong and weak) for weak, each in _ENTITY_TAG.findall(etags))


def _date(value: str) -> int | None:
    """Seconds since 1970; None for what is no date, which is ignored (RFC 9110, 13.1.3).

    All three forms are read (RFC 9110, 5.6.7), whatever the locale of the process.
    """
    try:
        date = parsedate_to_datetime(value)
        return int((date if date.tzinfo else date.replace(tzinfo=timezone.utc)).timestamp())
    except (ValueError, OverflowError):
        return None


@lru_cache(maxsize=1024)
def _http_date(seconds: int) -> str:
    # A file can have times that no date can express.
    return formatdate(min(max(seconds, _EARLIEST), _LATEST), usegmt=True)
