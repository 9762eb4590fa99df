"""`/`: the page that shows the disks, live. One file, with nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

import falcon

_INLINE = re.compile(rb"<(style|script)>(.*?)</\1>", re.DOTALL)


def content_security_policy(page: bytes) -> str:
    """A policy that lets a page run its own style and script, talk to its own server, and do nothing else.

    Both are named by their hash (CSP level 3, 2.3.1). `require-trusted-types-for` has the browser refuse to take text
    for HTML: what the page shows, names of files above all, is nobody's to trust.
    """
    hashes: dict[bytes, list[str]] = {b"style": [], b"script": []}
    for kind, content in _INLINE.findall(page):
        hashes[kind].append(f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode('ascii')}'")
    return (
        f"default-src 'none'; style-src {' '.join(hashes[b'style'])}; script-src {' '.join(hashes[b'script'])}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


class PageResource:
    """`/`: the page."""

    def __init__(self) -> None:
        """Load the page once, so that serving it needs no disk."""
        self._page = resources.files("server").joinpath("static/index.html").read_bytes()
        self._policy = content_security_policy(self._page)

    def on_get(self, _request: falcon.Request, response: falcon.Response) -> None:
        """Send the page."""
        response.content_type = falcon.MEDIA_HTML
        response.cache_control = ["no-cache"]
        response.set_header("Content-Security-Policy", self._policy)
        response.set_header("X-Content-Type-Options", "nosniff")
        response.set_header("Referrer-Policy", "no-referrer")
        response.data = self._page

    on_head = on_get
