"""The experiment over HTTP, second generation, as its load generators ask: answered without the whole of HTTP.

A request that is not exactly like that, one that fails, a server that writes an access log or drains: all of these go
the ordinary way, through pywsgi and the application, and get the same answers there.
"""

from __future__ import annotations

import re

from .head import date
from .simulate import Request

_REQUEST = re.compile(
    rb"GET /(-?[0-9]{1,9}),([0-9]{1,6}),([A-Za-z0-9._/-]{1,1024}) HTTP/1\.1\r\n"
    rb"(?:(?i:Host|User-Agent|Accept|Accept-Encoding|Accept-Language): [\x20-\x7e]{0,1024}\r\n){0,5}\r\n"
)


def find(data: bytes) -> tuple[Request, int] | None:
    """Find such a request at the beginning of what a client has sent.

    Returns:
        The request and its length in bytes; None when it is not one, or not all there.
    """
    found = _REQUEST.match(data)
    if found is None:
        return None
    return Request(found[1], int(found[2]) / 1000, found[3]), found.end()


def response(request: Request, total: float, *, close: bool) -> bytes:
    """The response to a request that was carried out.

    Args:
        request: Which one.
        total: Seconds that it took.
        close: Whether it is the last one on its connection.
    """
    body = b"%d,%b" % (int(total * 1000), request.path)
    return (
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nContent-Type: text/plain; charset=utf-8\r\nDate: %b\r\n%b\r\n%b"
        % (len(body), date(), b"Connection: close\r\n" if close else b"", body)
    )
