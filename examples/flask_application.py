"""Files in a Flask application. Its server has to be gevent's: this one, or gunicorn with gevent workers.

python examples/flask_application.py /srv/photos 8000
curl -r 0-99 http://127.0.0.1:8000/photos/2026/cat.jpg
"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

from flask import Flask, Response, request
from gevent.pywsgi import WSGIServer

from diskread import Disk, DiskError, Limits
from diskread.wsgi import retry_after, send_file, status_of

if TYPE_CHECKING:
    from flask.typing import ResponseReturnValue


def create_app(disk: Disk) -> Flask:
    """Make an application that serves this disk."""
    app = Flask(__name__)

    @app.get("/photos/<path:name>")
    def photo(name: str) -> ResponseReturnValue:
        return Response.from_app(partial(send_file, disk=disk, path=name), request.environ)

    @app.errorhandler(DiskError)
    def disk_failed(error: DiskError) -> Response:
        response = Response(f"{error}\n", status_of(error), mimetype="text/plain")
        response.retry_after = retry_after(error)
        return response

    return app


def main() -> None:
    """Serve the directory and the port that the command line names."""
    disk = Disk("photos", sys.argv[1], Limits(deadline=5.0))
    server = WSGIServer(("127.0.0.1", int(sys.argv[2])), create_app(disk))
    server.start()
    print(f"http://127.0.0.1:{server.server_port}/photos/", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
