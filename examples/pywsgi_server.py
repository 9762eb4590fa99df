"""Serves a directory with gevent's own WSGI server, without any framework.

python examples/pywsgi_server.py /srv/photos 8000
curl -r 0-99 http://127.0.0.1:8000/2026/cat.jpg
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from gevent.pywsgi import WSGIServer

from diskread import Disk, DiskError, Limits
from diskread.wsgi import retry_after, send_file, status_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Application:
    """A WSGI application: a file for each path."""

    def __init__(self, disk: Disk) -> None:
        """Serve this disk."""
        self._disk = disk

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
        """Answer a request."""
        path = environ["PATH_INFO"].encode("latin-1").removeprefix(b"/")  # the bytes of the path: PEP 3333
        try:
            return send_file(environ, start_response, self._disk, path)
        except DiskError as error:
            status, seconds = status_of(error), retry_after(error)
            headers = [("Content-Type", "text/plain; charset=utf-8")]
            if seconds is not None:
                headers.append(("Retry-After", str(seconds)))
            start_response(f"{status.value} {status.phrase}", headers)
            return [f"{error}\n".encode()]


def main() -> None:
    """Serve the directory and the port that the command line names."""
    disk = Disk("photos", sys.argv[1], Limits(deadline=5.0))
    server = WSGIServer(("127.0.0.1", int(sys.argv[2])), Application(disk))
    server.start()
    print(f"http://127.0.0.1:{server.server_port}/", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
