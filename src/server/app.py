"""The WSGI application: an ordinary one, for gevent's pywsgi or any other server whose workers are gevent's."""

from __future__ import annotations

import logging
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import falcon

from diskread import (
    DiskBusy,
    DiskError,
    DiskFileForbidden,
    DiskFileNotFound,
    DiskFileNotRegular,
    DiskOffline,
    DiskPathInvalid,
    DiskTimeout,
)

from . import config
from .objects import ObjectResource
from .simulate import SIMULATED, BadInput, Failed, Simulation, Status, parse
from .status import HealthResource, MetricsResource, PageResource, ReadyResource, StatusResource

if TYPE_CHECKING:
    from diskread import Disks

RETRY_AFTER = 1
"""Seconds after which a client that a busy disk refused may try again: a slot may be free by then."""

CONFIG_VARIABLE = "DISKREAD_CONFIG"

_log = logging.getLogger("diskread.server")


def create_app(disks: Disks | None = None, *, stalls: bool | None = None) -> falcon.App[Any, Any]:
    """Make the WSGI application.

    Args:
        disks: What to serve. None: what the file that the environment variable DISKREAD_CONFIG names says; without
            one, simulated stalls only.
        stalls: Whether clients may simulate stalls (`disks` needs one called `simulated` then). None: when there is
            such a disk.

    Returns:
        A Falcon application.

    Raises:
        ConfigError: The file that DISKREAD_CONFIG names is wrong.
    """
    if disks is None:
        path = os.environ.get(CONFIG_VARIABLE)
        disks = config.make_disks(config.load(Path(path)) if path else config.ServerConfig())
    if stalls is None:
        stalls = SIMULATED in disks
    app = falcon.App()
    app.set_error_serializer(_serialize_error)
    app.add_error_handler(DiskError, _disk_error)
    app.add_error_handler(Exception, _internal_error)
    app.add_route("/v1/{disk}/{path:path}", ObjectResource({**disks, **disks.mirrors}))
    app.add_route("/status", StatusResource(disks, simulate=stalls))
    app.add_route("/metrics", MetricsResource(disks))
    app.add_route("/healthz", HealthResource())
    app.add_route("/readyz", ReadyResource(disks))
    app.add_route("/", PageResource())
    app.add_sink(_SimulationSink(Simulation(disks, stalls=stalls)), r"/[^/,]*,")
    return app


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


def _disk_error(_request: falcon.Request, _response: falcon.Response, error: DiskError, _params: object) -> None:
    """Say in HTTP what a disk said."""
    text = str(error)
    if isinstance(error, (DiskBusy, DiskOffline)):
        offline = isinstance(error, DiskOffline)
        raise falcon.HTTPServiceUnavailable(
            title="The disk is offline" if offline else "The disk is busy",
            description=text,
            retry_after=_retry_after(error),
        ) from error
    if isinstance(error, DiskTimeout):
        raise falcon.HTTPGatewayTimeout(title="The disk missed the deadline", description=text) from error
    if isinstance(error, DiskPathInvalid):
        raise falcon.HTTPBadRequest(title="Not a path", description=text) from error
    if isinstance(error, (DiskFileNotFound, DiskFileNotRegular)):
        raise falcon.HTTPNotFound(title="No such file", description=text) from error
    if isinstance(error, DiskFileForbidden):
        raise falcon.HTTPForbidden(title="The file may not be read", description=text) from error
    _log.error("%s", text)
    raise falcon.HTTPInternalServerError(title="The disk failed", description=text) from error


def _retry_after(error: DiskBusy | DiskOffline) -> int | None:
    """Whole seconds; None when nobody knows, as with a disk that somebody has taken offline."""
    if isinstance(error, DiskBusy):
        return RETRY_AFTER
    return None if error.retry_after is None else max(1, math.ceil(error.retry_after))


def _internal_error(request: falcon.Request, _response: falcon.Response, error: Exception, _params: object) -> None:
    """A bug of ours: tell the log everything, the client nothing."""
    if isinstance(error, (falcon.HTTPError, falcon.HTTPStatus)):
        raise error
    _log.error("%s %s failed", request.method, request.path, exc_info=error)
    raise falcon.HTTPInternalServerError from error
