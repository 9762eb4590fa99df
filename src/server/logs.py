"""The log on standard error and the access log: as text, or as a JSON object on each line; and the ids of requests."""

from __future__ import annotations

import logging
import re
import secrets
import sys
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Literal, TextIO

import gevent
import msgspec

from diskread.errors import printable

if TYPE_CHECKING:
    from types import TracebackType

LogFormat = Literal["text", "json"]

REQUEST_ID = "X-Request-Id"
"""The header in which clients and proxies say the id of a request, and in which they are told it."""

_SANE = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")  # nothing that could end a field or a line of any log

_FIELDS = ("disk", "state", "request_id")
"""What a log record may have besides its message, as `extra`."""

_log = logging.getLogger("diskread.server")


def request_id(wanted: str | None = None) -> str:
    """The id of a request: what its client wants, if that is fit for a log; else a new one of 16 hexadecimal digits."""
    return wanted if wanted is not None and _SANE.fullmatch(wanted) else secrets.token_hex(8)


def configure(log_format: LogFormat, *, several: bool = False) -> None:
    """Write what this process logs, from INFO on, to standard error.

    Args:
        log_format: Of its lines.
        several: Whether other processes of the same server write there as well: lines say which one it was.
    """
    handler = logging.StreamHandler(sys.stderr)
    process = "[%(process)d] " if several else ""
    handler.setFormatter(_Text(f"%(asctime)s %(levelname)s {process}%(message)s") if log_format == "text" else _Json())
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    if log_format == "json":  # what fails in a greenlet, gevent would print over many lines
        gevent.get_hub().print_exception = _log_exception  # type: ignore[method-assign, assignment, unused-ignore]


class AccessLog:
    """A line for each request. Written on the hub's thread: not for a disk that may hang."""

    def __init__(self, stream: TextIO, log_format: LogFormat) -> None:
        """Write to this stream."""
        self._stream = stream
        self._entry = _json_entry if log_format == "json" else _text_entry

    def write(self, client: str, request: str, status: str, length: int, seconds: float, request_id: str) -> None:
        """Write the line of a request that was answered.

        Args:
            client: Its address.
            request: Its first line. What is not printable is escaped here.
            status: Of HTTP, or the first field of a reply of the line protocol: a number.
            length: Bytes of the response, head included.
            seconds: From its first byte to the end of the response; on the line protocol, from the connection on.
            request_id: Its id.

        Raises:
            OSError: The line cannot be written.
        """
        text = printable(request.encode("utf-8", "backslashreplace"))
        self._stream.write(self._entry(client, text, status, length, seconds, request_id) + "\n")


def _text_entry(client: str, request: str, status: str, length: int, seconds: float, request_id: str) -> str:
    now = datetime.now().replace(microsecond=0)
    return f'{client} - - [{now}] "{request}" {status} {length or "-"} {seconds:.6f} {request_id}'


def _json_entry(client: str, request: str, status: str, length: int, seconds: float, request_id: str) -> str:
    return _object(
        {
            "time": _iso(time.time()),
            "logger": "diskread.access",
            "client": client,
            "request": request,
            "status": int(status),
            "bytes": length,
            "seconds": round(seconds, 6),
            "request_id": request_id,
        }
    )


class _Text(logging.Formatter):
    """A line of text; the request that it is about is at its end."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name in logging
        found = getattr(record, "request_id", None)
        line = super().formatMessage(record)
        return line if found is None else f"{line} [request {found}]"


class _Json(logging.Formatter):
    """One JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": _iso(record.created),
            "level": record.levelname,
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
            **{name: getattr(record, name) for name in _FIELDS if getattr(record, name, None) is not None},
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return _object(entry)


def _object(entry: dict[str, Any]) -> str:
    # Names of files may have lone surrogates, which UTF-8 cannot have.
    sane = {
        name: value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
        for name, value in entry.items()
    }
    return msgspec.json.encode(sane).decode()


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")


def _log_exception(
    context: object, kind: type[BaseException], value: BaseException, traceback: TracebackType | None
) -> None:
    """In place of the method of gevent's hub."""
    where = "" if context is None else f" in {type(context).__name__}"
    _log.error("%s%s", kind.__name__, where, exc_info=(kind, value, traceback))
