"""The line protocol: one line `RC,MS,PATH` in, one line `RC,TOTAL_MS,PATH` out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .simulate import BadInput, Failed, Status, parse

if TYPE_CHECKING:
    from .simulate import Simulation

LONGEST_LINE = 4096
"""Bytes of the longest request, line end included."""


def answer(line: bytes, simulation: Simulation | None, since: float) -> bytes:
    """Carry out one request. Blocks the greenlet, never the hub.

    Args:
        line: What the client sent, up to and including the line end, if it sent one.
        simulation: Carries it out. None: nobody may ask, because a line has no place for a token.
        since: Time on `time.monotonic` at which the connection was accepted: a request waits from then on.

    Returns:
        The reply, line end included.
    """
    if len(line) > LONGEST_LINE:
        return _reply(Status.BAD_INPUT, 0.0, b"")
    try:
        request = parse(line.removesuffix(b"\n").removesuffix(b"\r"))
        if simulation is None:
            raise Failed(Status.NO_FILE, 0.0, "this server wants a token")
        total = simulation.perform(request, since)
    except BadInput:
        return _reply(Status.BAD_INPUT, 0.0, b"")
    except Failed as failed:
        return _reply(failed.status, failed.total, request.path)
    return b"%b,%d,%b\n" % (request.status, int(total * 1000), request.path)


def _reply(status: Status, total: float, path: bytes) -> bytes:
    return b"%d,%d,%b\n" % (status, int(total * 1000), path)
