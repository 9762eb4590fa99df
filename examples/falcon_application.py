"""Files in a Falcon application. Its server has to be gevent's: this one, or gunicorn with gevent workers.

python examples/falcon_application.py /srv/photos 8000
curl -r 0-99 http://127.0.0.1:8000/photos/2026/cat.jpg
"""

from __future__ import annotations

import sys
from typing import Any

import falcon
from gevent.pywsgi import WSGIServer

from diskread import Disk, DiskError, Limits
from diskread.wsgi import retry_after, send_file, status_of


class Photos:
    """The files of a disk."""

    def __init__(self, disk: Disk) -> None:
        """Serve this disk."""
        self._disk = disk

    def on_get(self, req: falcon.Request, resp: falcon.Response, name: str) -> None:
        """Send a file, or describe it."""

        def start_response(status: str, headers: list[tuple[str, str]]) -> None:
            resp.status = status
            resp.set_headers(headers)

        resp.stream = send_file(req.env, start_response, self._disk, name)

    on_head = on_get


def disk_failed(_req: falcon.Request, _resp: falcon.Response, error: DiskError, _params: dict[str, Any]) -> None:
    """Say in HTTP what the disk said."""
    seconds = retry_after(error)
    headers = None if seconds is None else {"Retry-After": str(seconds)}
    raise falcon.HTTPError(status_of(error), description=str(error), headers=headers) from error


def create_app(disk: Disk) -> falcon.App[Any, Any]:
    """Make an application that serves this disk."""
    app = falcon.App()
    app.add_route("/photos/{name:path}", Photos(disk))
    app.add_error_handler(DiskError, disk_failed)
    return app


def main() -> None:
    """Serve the directory and the port that the command line names."""
    disk = Disk("photos", sys.argv[1], Limits(deadline=5.0))
    app = create_app(disk)
    server = WSGIServer(("127.0.0.1", int(sys.argv[2])), app)  # type: ignore[arg-type]  # two types for start_response
    server.start()
    print(f"http://127.0.0.1:{server.server_port}/photos/", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
