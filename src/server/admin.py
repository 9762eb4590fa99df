"""What operators may do to a running server: JSON over HTTP on a Unix socket of its own, never on the public port.

    GET /disks                    the same document as /status
    PUT /disks/NAME/offline       {"reason": "to be replaced"}
    PUT /disks/NAME/online

Who may open the socket may do all of it, so its file is for the server's user (and root) alone. `diskread disk` is the
client.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket as native_socket
import stat
import sys
from typing import TYPE_CHECKING, Any, Protocol

import falcon
import msgspec
from gevent import socket
from gevent.pywsgi import WSGIServer

from .status import Seen, ServerStatus, StatusResource, describe

if TYPE_CHECKING:
    from types import TracebackType

    from diskread import Disk, Disks

MODE = 0o600
"""Of the socket's file. connect(2) needs permission to write."""

LONGEST_BODY = 16 * 1024
LONGEST_REASON = 500

_log = logging.getLogger("diskread.server")


class AdminSocketError(Exception):
    """The socket cannot be made; the message says why, and what to do about it."""


class OfflineRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `PUT /disks/NAME/offline`."""

    reason: str


class Others(Protocol):
    """The other worker processes of this server."""

    def look(self) -> Seen:
        """The status of the disks, as all of them together have it."""

    def set_offline(self, name: str, reason: str) -> None:
        """Have them take a disk offline, too, and those that will be started later."""

    def set_online(self, name: str) -> None:
        """Have them put it online."""


class Nobody:
    """There is but this process."""

    def __init__(self, disks: Disks) -> None:
        """Look at these disks."""
        self._disks = disks

    def look(self) -> Seen:
        """See `Others`."""
        return Seen(self._disks.status, self._disks.mirror_status)

    def set_offline(self, name: str, reason: str) -> None:
        """See `Others`."""

    def set_online(self, name: str) -> None:
        """See `Others`."""


def create_app(disks: Disks, *, simulate: bool, others: Others | None = None) -> falcon.App[Any, Any]:
    """Make the administrative application.

    Args:
        disks: What it may take offline and back.
        simulate: Whether clients of the public port may simulate stalls, for the document.
        others: Who is told as well; None for nobody.
    """
    others = Nobody(disks) if others is None else others
    app = falcon.App()
    app.add_route("/disks", StatusResource(ServerStatus(others.look, simulate=simulate)))
    app.add_route("/disks/{name}/offline", _OfflineResource(disks, others))
    app.add_route("/disks/{name}/online", _OnlineResource(disks, others))
    return app


class _OfflineResource:
    def __init__(self, disks: Disks, others: Others) -> None:
        self._disks = disks
        self._others = others

    def on_put(self, request: falcon.Request, response: falcon.Response, name: str) -> None:
        disk = _find(self._disks, name)
        reason = _reason(request)
        _log.info("disk %s: an operator takes it offline", name)
        disk.set_offline(reason)
        self._others.set_offline(name, reason)
        _send(disk, response)


class _OnlineResource:
    def __init__(self, disks: Disks, others: Others) -> None:
        self._disks = disks
        self._others = others

    def on_put(self, _request: falcon.Request, response: falcon.Response, name: str) -> None:
        disk = _find(self._disks, name)
        _log.info("disk %s: an operator puts it online", name)
        disk.set_online()
        self._others.set_online(name)
        _send(disk, response)


def _find(disks: Disks, name: str) -> Disk:
    if name not in disks:
        raise falcon.HTTPNotFound(
            title="No such disk", description=f"there is no disk called {name}; there are: {', '.join(disks)}"
        )
    return disks[name]


def _reason(request: falcon.Request) -> str:
    body = request.bounded_stream.read(LONGEST_BODY)
    try:
        reason = msgspec.json.decode(body, type=OfflineRequest).reason.strip()
    except msgspec.DecodeError as error:
        raise falcon.HTTPBadRequest(description=f'the body must be like {{"reason": "..."}}: {error}') from error
    # It goes into the log and into errors: one line that cannot be taken for two.
    if not reason or len(reason) > LONGEST_REASON or not reason.isprintable():
        raise falcon.HTTPBadRequest(
            description=f"the reason must be one line of 1 to {LONGEST_REASON} printable characters"
        )
    return reason


def _send(disk: Disk, response: falcon.Response) -> None:
    response.content_type = falcon.MEDIA_JSON
    response.data = msgspec.json.encode(describe(disk.status))


def serve(listening: socket.socket, app: falcon.App[Any, Any]) -> WSGIServer:
    """A server of such an application on a Unix socket, still to be started."""
    return WSGIServer(listening, app, log=None, error_log=sys.stderr)  # type: ignore[arg-type]


class AdminServer:
    """The administrative application on a Unix socket."""

    def __init__(self, path: str, app: falcon.App[Any, Any]) -> None:
        """Make the socket and begin to accept. The file that a server which is no more has left behind is replaced.

        Call it when the public port is bound: of two servers with one configuration, the second never gets here.

        Args:
            path: Where; at most 107 bytes. Its directory should not be on a disk that may hang.
            app: From `create_app`.

        Raises:
            AdminSocketError: A server is there already, or the file cannot be made.
        """
        self._path = path
        _remove_stale(path)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # bind(2) gives the file the mode of the socket: nobody else can connect at any moment.
            os.fchmod(listening.fileno(), MODE)
            listening.bind(path)
            made = os.lstat(path)
            listening.listen()
        except OSError as error:
            listening.close()
            raise AdminSocketError(f"cannot make the administrative socket {path}: {_words(error)}") from error
        self._file = made.st_dev, made.st_ino
        self._server = serve(listening, app)
        self._server.start()

    def close(self) -> None:
        """Stop accepting and remove the file, unless it is another server's by now. Never waits for clients."""
        self._server.close()
        with contextlib.suppress(OSError):
            found = os.lstat(self._path)
            if (found.st_dev, found.st_ino) == self._file:
                os.unlink(self._path)

    def __enter__(self) -> AdminServer:
        """Return the server itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()


def _remove_stale(path: str) -> None:
    """Remove the socket that a server which is no more has left behind."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise AdminSocketError(f"{path} exists and is no socket; choose another path for the administrative socket")
        with native_socket.socket(native_socket.AF_UNIX) as asking:
            asking.settimeout(1.0)
            asking.connect(path)
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        pass  # nobody listens: its server is no more
    except BlockingIOError:
        raise AdminSocketError(_taken(path)) from None  # somebody listens, and is busy
    except OSError as error:
        raise AdminSocketError(f"cannot tell who has the administrative socket {path}: {_words(error)}") from error
    else:
        raise AdminSocketError(_taken(path))
    try:
        os.unlink(path)
    except OSError as error:
        raise AdminSocketError(
            f"cannot replace the administrative socket {path}, which an ended server has left behind: {_words(error)}"
        ) from error


def _taken(path: str) -> str:
    return (
        f"another server has the administrative socket {path}; stop it, or choose another path "
        "(--admin-socket, admin_socket in the file)"
    )


def _words(error: OSError) -> str:
    hint = "; make its directory first" if error.errno == errno.ENOENT else ""
    return f"{error.strerror or error}{hint}"
