"""What the server makes when it starts: the port, the access log, the administrative socket."""

from __future__ import annotations

import errno
import http.client
import os
import socket
import stat
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from diskread import DiskTimeout

from ..status import StatusDocument
from . import Finding
from .bounded import within
from .disks import Seen, device_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ..config import ServerConfig

ANSWER_WITHIN = 2.0
"""Seconds that whoever has the address gets to say whether it is a diskread server."""


def address(config: ServerConfig, deadline: float) -> Finding:
    """Whether the server could listen. Blocks the greenlet for as long as the DNS takes, where the host is a name.

    Args:
        config: The configuration.
        deadline: Seconds that it may take.
    """
    subject = f"{config.host} port {config.port}"
    try:
        within(deadline, _listen, config.host, config.port)
    except DiskTimeout:
        step = "write an IP address, or see to the name service: resolvectl query"
        return Finding(subject, "error", f"the name was not found within {deadline:g} s", step)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return _taken(subject, config, deadline)
        text = f"cannot be listened on: {error.strerror or error}"
        if error.errno == errno.EACCES:
            step = "a port from 1024 on, or AmbientCapabilities=CAP_NET_BIND_SERVICE in the unit"
        else:
            step = "an address of this machine (ip address), or 0.0.0.0 for all of them"
        return Finding(subject, "error", text, step)
    return Finding(subject, "ok", "free, and may be listened on")


def _listen(host: str, port: int) -> None:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, where = found[0]
    socket.create_server(where, family=family).close()


def _taken(subject: str, config: ServerConfig, deadline: float) -> Finding:
    try:
        ours = within(deadline, _is_diskread, config.host, config.port)
    except DiskTimeout:
        ours = False
    if ours:
        step = "nothing, if it is the one of this configuration; else choose another port"
        return Finding(subject, "warning", "a diskread server listens there already", step)
    step = f"choose another port, or find out who has it: ss -ltnp 'sport = :{config.port}'"
    return Finding(subject, "error", "another program listens there", step)


def _is_diskread(host: str, port: int) -> bool:
    try:
        with closing(http.client.HTTPConnection(host, port, timeout=ANSWER_WITHIN)) as connection:
            connection.request("GET", "/status")
            response = connection.getresponse()
            if 'realm="diskread"' in response.getheader("WWW-Authenticate", ""):
                return True
            msgspec.json.decode(response.read(), type=StatusDocument)
    except (OSError, http.client.HTTPException, msgspec.DecodeError, UnicodeDecodeError):
        return False
    return True


@dataclass(frozen=True)
class _Place:
    """A file that is to be made.

    Attributes:
        directory: Where.
        device: On which device; None when the directory is not there.
        problem: Why it cannot be; None when it can.
    """

    directory: str
    device: str | None
    problem: str | None


def files(config: ServerConfig, seen: Mapping[str, Seen | Finding], deadline: float) -> Iterator[Finding]:
    """Whether access log and administrative socket can be made, and whether a disk that hangs takes them with it.

    Args:
        config: The configuration.
        seen: What was seen of the disks, by their names.
        deadline: Seconds that each file system has to answer.
    """
    if config.access_log not in (None, "-"):
        step = "a directory that is there and that the user of the server may write in, or - for standard output"
        yield _file("access log", config.access_log or "", _log, step, seen, deadline)
    if config.admin_socket is not None:
        step = "make the directory for the user of the server: RuntimeDirectory= in the unit does when it starts"
        yield _file("administrative socket", config.admin_socket, _socket, step, seen, deadline)


def _file(
    subject: str,
    path: str,
    look: Callable[[str], _Place],
    step: str,
    seen: Mapping[str, Seen | Finding],
    deadline: float,
) -> Finding:
    path = os.path.abspath(path)
    elsewhere = "put it on a device that is no disk of this server's: when that hangs, so does the whole server"
    try:
        place = within(deadline, look, path)
    except DiskTimeout:
        return Finding(subject, "error", f"{path}: its file system has not answered within {deadline:g} s", elsewhere)
    except OSError as error:
        return Finding(subject, "error", f"{path}: {error.strerror or error}", step)
    if place.problem is not None:
        # Directories of a unit are there only while its service is.
        later = place.device is None and place.directory.startswith("/run/")
        return Finding(subject, "warning" if later else "error", f"{path}: {place.problem}", step)
    beside = [f"disk {name}" for name, disk in seen.items() if isinstance(disk, Seen) and disk.device == place.device]
    if beside:
        return Finding(subject, "warning", f"{path} is on the same device as {', '.join(beside)}", elsewhere)
    return Finding(subject, "ok", f"{path} can be made")


def _log(path: str) -> _Place:
    if os.path.isdir(path):
        return _Place(path, None, "it is a directory")
    place = _place(path)
    if os.path.exists(path) and place.device is not None:
        problem = None if os.access(path, os.W_OK, effective_ids=True) else "no permission to write it"
        return _Place(place.directory, device_name(os.stat(path).st_dev), problem)
    return place


def _socket(path: str) -> _Place:
    place = _place(path)
    if place.problem is None and os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
        return _Place(place.directory, place.device, "it exists and is no socket: choose another path")
    return place


def _place(path: str) -> _Place:
    """Blocks the native thread for as long as the file system takes."""
    directory = os.path.dirname(path)
    try:
        device = device_name(os.stat(directory).st_dev)
    except OSError as error:
        return _Place(directory, None, f"{directory}: {error.strerror}")
    allowed = os.access(directory, os.W_OK | os.X_OK, effective_ids=True)
    return _Place(directory, device, None if allowed else f"no permission to write in {directory}")
