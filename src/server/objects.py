"""Files over HTTP: `GET|HEAD /v1/NAME/PATH`, NAME being that of a disk or of a mirror.

What is sent is up to `diskread.wsgi`; here it meets Falcon.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

import falcon

from diskread import Disk, ranges, wsgi

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diskread import Mirror

_first_piece, _resolve, _content_type = ranges.first_piece, ranges.resolve, wsgi.type_of


class ObjectResource:
    """The files of all disks."""

    def __init__(self, disks: Mapping[str, Disk | Mirror]) -> None:
        """Serve these disks, by name."""
        self._disks = disks

    def on_get(self, request: falcon.Request, response: falcon.Response, **_: str) -> None:
        """Send a file, or a range of it."""
        self._respond(request, response, _wanted_range(request))

    def on_head(self, request: falcon.Request, response: falcon.Response, **_: str) -> None:
        """Describe a file. A range does not count: it is defined for GET only."""
        self._respond(request, response, None)

    def _respond(self, request: falcon.Request, response: falcon.Response, wanted: ranges.Wanted | None) -> None:
        disk, path = self._find(request)
        try:
            status, headers, body = wsgi.respond(request.env, disk, path, wanted)
        except wsgi.Refusal as refusal:
            raise falcon.HTTPError(refusal.status, description=str(refusal), headers=refusal.headers) from refusal
        if status is not HTTPStatus.OK:
            response.status = status
        response.set_headers(headers)
        if body.whole is None:
            response.stream = body
        else:
            response.data = body.whole

    def _find(self, request: falcon.Request) -> tuple[Disk | Mirror, bytes]:
        # Paths are bytes: PATH_INFO is the decoded path, each byte as one character (PEP 3333).
        _, _, disk_name, path = request.env["PATH_INFO"].encode("latin-1").split(b"/", 3)
        disk = self._disks.get(disk_name.decode("latin-1"))
        if disk is None or (isinstance(disk, Disk) and disk.root is None):
            raise falcon.HTTPNotFound(
                title="No such disk", description="There is no disk of that name here; /status lists those there are."
            )
        return disk, path


def _wanted_range(request: falcon.Request) -> ranges.Wanted | None:
    try:
        return ranges.parse(request.env.get("HTTP_RANGE"))
    except ValueError as error:
        raise falcon.HTTPInvalidHeader(str(error), "Range") from None
