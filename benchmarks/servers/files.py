"""A plain WSGI file server, as one writes it for gunicorn's gevent workers: it reads on the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(os.environ.get("FILES_ROOT", "."))
CHUNK = 64 * 1024


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
    # It serves the benchmark's own requests only: nothing here keeps a path within the root.
    with (ROOT / environ["PATH_INFO"].lstrip("/")).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start_response("200 OK", [("Content-Type", "application/octet-stream"), ("Content-Length", str(size))])
        while chunk := file.read(CHUNK):
            yield chunk
