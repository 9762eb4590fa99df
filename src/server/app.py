"""The WSGI application: an ordinary one, for gevent's pywsgi or any other server whose workers are gevent's."""

from __future__ import annotations

import logging
import os
import time
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import falcon

from diskread import DiskError, DiskOffline
from diskread.wsgi import retry_after, status_of

from . import access, config
from .events import Events, EventsResource
from .objects import ObjectResource
from .page import PageResource
from .simulate import SIMULATED, BadInput, Failed, Simulation, Status, parse
from .status import HealthResource, MetricsResource, ReadyResource, ServerStatus, StatusResource, look_at

if TYPE_CHECKING:
    from diskread import Disks

    from .status import Look

CONFIG_VARIABLE = "DISKREAD_CONFIG"

_TITLES = {
    HTTPStatus.BAD_REQUEST: "Not a path",
    HTTPStatus.FORBIDDEN: "The file may not be read",
    HTTPStatus.NOT_FOUND: "No such file",
    HTTPStatus.INTERNAL_SERVER_ERROR: "The disk failed",
    HTTPStatus.SERVICE_UNAVAILABLE: "The disk is busy",
    HTTPStatus.GATEWAY_TIMEOUT: "The disk missed the deadline",
}

_log = logging.getLogger("diskread.server")


def create_app(
    disks: Disks | None = None,
    *,
    stalls: bool | None = None,
    look: Look | None = None,
    events: Events | None = None,
    guard: access.Access | None = None,
) -> falcon.App[Any, Any]:
    """Make the WSGI application.

    Args:
        disks: What to serve. None: what the file that the environment variable DISKREAD_CONFIG names says; without
            one, simulated stalls only.
        stalls: Whether clients may simulate stalls (`disks` needs one called `simulated` then). None: when there is
            such a disk.
        look: Brings the status of the disks, where this process is not the only one. None: that of `disks`.
        events: What `/events` tells, of the same disks; whoever gives them here can start them before the first client
            comes, and end them. None: they start with the first client.
        guard: Asks for tokens. None: what the file that DISKREAD_CONFIG names says, where `disks` is None, too.

    Returns:
        A Falcon application.

    Raises:
        ConfigError: The file that DISKREAD_CONFIG names is wrong.
    """
    if disks is None:
        path = os.environ.get(CONFIG_VARIABLE)
        settings = config.load(Path(path)) if path else config.ServerConfig()
        disks = config.make_disks(settings)
        guard = access.opened(settings, disks)
    if stalls is None:
        stalls = SIMULATED in disks
    if look is None:
        look = look_at(disks)
    status = ServerStatus(look, simulate=stalls)
    app = falcon.App(middleware=[] if guard is None else [guard])
    app.set_error_serializer(_serialize_error)
    app.add_error_handler(DiskError, _disk_error)
    app.add_error_handler(Exception, _internal_error)
    app.add_route("/v1/{disk}/{path:path}", ObjectResource({**disks, **disks.mirrors}))
    app.add_route("/status", StatusResource(status))
    app.add_route("/events", EventsResource(events if events is not None else Events(status)))
    app.add_route("/metrics", MetricsResource(look))
    app.add_route("/healthz", HealthResource())
    app.add_route("/readyz", ReadyResource(look))
    app.add_route("/", PageResource())
    app.add_sink(_SimulationSink(Simulation(disks, stalls=stalls)), r"/[^/,]*,")
    return app


def __getattr__(name: str) -> Any:
    """`server.app:application`, made when somebody asks for it: an import should not look for a configuration."""
    if name == "application":
        return create_app()
    raise AttributeError(name)


class _SimulationSink:
    """`GET /RC,MS,PATH`: the experiment's second generation."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation

    def __call__(self, req: falcon.Request, resp: falcon.Response, **_: Any) -> None:
        if req.method != "GET":
            raise falcon.HTTPMethodNotAllowed(["GET"])
        # A request waits from the moment at which its first byte was there, where the server knows it.
        since = req.env.get("diskread.received", time.monotonic())
        failed = req.env.get("diskread.failed")
        try:
            if failed is not None:  # the listener has tried it already
                raise failed
            wanted = parse(req.env["PATH_INFO"].encode("latin-1").removeprefix(b"/"))
            total = self._simulation.perform(wanted, since)
        except BadInput as error:
            raise falcon.HTTPBadRequest(title="Bad input", description=str(error)) from error
        except Failed as failed:
            if isinstance(failed.__cause__, DiskError) and failed.status is not Status.QUEUE_TIMEOUT:
                raise failed.__cause__ from None
            if failed.status is Status.NO_FILE:
                raise falcon.HTTPNotFound(description=str(failed)) from failed
            raise falcon.HTTPError(falcon.HTTP_408, title="Timed out in the queue", description=str(failed)) from failed
        resp.content_type = falcon.MEDIA_TEXT
        resp.data = b"%d,%b" % (int(total * 1000), wanted.path)


def _serialize_error(_request: falcon.Request, response: falcon.Response, error: falcon.HTTPError) -> None:
    """JSON, whatever the client would rather have: it is better than no word at all."""
    response.content_type = falcon.MEDIA_JSON
    response.data = error.to_json()


def _disk_error(request: falcon.Request, _response: falcon.Response, error: DiskError, _params: object) -> None:
    """Say in HTTP what a disk said."""
    text, status, seconds = str(error), status_of(error), retry_after(error)
    if status is HTTPStatus.INTERNAL_SERVER_ERROR:
        _log.error("%s", text, extra=_request_id(request))
    raise falcon.HTTPError(
        status,
        title="The disk is offline" if isinstance(error, DiskOffline) else _TITLES[status],
        description=text,
        headers=None if seconds is None else {"Retry-After": str(seconds)},
    ) from error


def _internal_error(request: falcon.Request, _response: falcon.Response, error: Exception, _params: object) -> None:
    """A bug of ours: tell the log everything, the client nothing."""
    if isinstance(error, (falcon.HTTPError, falcon.HTTPStatus)):
        raise error
    _log.error("%s %s failed", request.method, request.path, exc_info=error, extra=_request_id(request))
    raise falcon.HTTPInternalServerError from error


def _request_id(request: falcon.Request) -> dict[str, Any]:
    """What the log says of a request besides what went wrong: its id, where the server has given it one."""
    return {"request_id": request.env.get("diskread.request_id")}
