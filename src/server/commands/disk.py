"""`diskread disk`: what an operator may do to the disks of a running server, through its administrative socket."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import sys
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click
import msgspec
from rich.console import Console

from .. import config as configuration
from ..admin import OfflineRequest
from ..status import DiskDocument, StatusDocument
from ..table import disks_table
from .failure import CannotRun

if TYPE_CHECKING:
    from collections.abc import Callable

VARIABLE = "DISKREAD_ADMIN_SOCKET"

TIMEOUT = 10.0
"""Seconds that the server gets to answer."""

_OPTIONS = (
    click.option(
        "--socket",
        "path",
        metavar="PATH",
        help=f"The server's administrative socket.  [default: what FILE says, else the environment's {VARIABLE}]",
    ),
    click.option(
        "--config",
        "file",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="The server's configuration file, which has the path as admin_socket.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print what the server says as JSON."),
)


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    return reduce(lambda decorated, option: option(decorated), reversed(_OPTIONS), command)


@click.group("disk", short_help="Take disks of a running server offline and back.")
def disk() -> None:
    """Take disks of a running server offline by hand, and back.

    It asks the server through its administrative socket, which only the server's own user and root may open:
    `diskread serve --admin-socket PATH` makes one.

    \b
    Examples:
      export DISKREAD_ADMIN_SOCKET=/run/diskread/admin.sock
      diskread disk offline a --reason "to be replaced"
      diskread disk online a
      diskread disk list

    Exit status: 0 done; 1 the server refuses (or, of list: a disk does); 2 the server could not be asked.
    """


@disk.command("offline", short_help="Take a disk offline until it is put online again.")
@click.argument("name")
@click.option("--reason", required=True, metavar="TEXT", help="Why: clients, the log and `diskread status` tell it.")
@_with_options
def offline(name: str, reason: str, path: str | None, file: Path | None, as_json: bool) -> None:
    """Take the disk NAME offline, until `diskread disk online NAME` or the end of the server.

    Its clients get 503 with the reason at once. Reads that are under way may end; after that the server holds nothing
    open on the disk, so that it can be unmounted and replaced. No probe brings it back.

    Exit status: 0 done, 1 the server refuses (there is no such disk), 2 the server could not be asked.
    """
    body = msgspec.json.encode(OfflineRequest(reason))
    answer = _ask(_socket(path, file), "PUT", _target(name, "offline"), body)
    document = _decode(answer, DiskDocument)
    if as_json:
        click.echo(answer)
    else:
        click.echo(f"{document.name} is {document.state}: {document.reason}")
        if document.in_flight:
            click.echo(f"{document.in_flight} operations on it are still under way: `diskread disk list` counts them.")


@disk.command("online", short_help="Put a disk online again.")
@click.argument("name")
@_with_options
def online(name: str, path: str | None, file: Path | None, as_json: bool) -> None:
    """Put the disk NAME online again, whoever or whatever has taken it offline.

    It is half-open at first: one request at a time may try, and the first that completes makes it online. The device
    that is mounted at its directory now is the disk from now on.

    Exit status: 0 done, 1 the server refuses (there is no such disk), 2 the server could not be asked.
    """
    answer = _ask(_socket(path, file), "PUT", _target(name, "online"))
    document = _decode(answer, DiskDocument)
    if as_json:
        click.echo(answer)
    else:
        trial = ": one request at a time may try" if document.state == "half-open" else ""
        click.echo(f"{document.name} is {document.state}{trial}")


@disk.command("list", short_help="Show the disks.")
@_with_options
def list_disks(path: str | None, file: Path | None, as_json: bool) -> None:
    """Show the disks, as `diskread status` does.

    Exit status: 0 when every disk takes requests, 1 when one refuses them, 2 when the server could not be asked.
    """
    at = _socket(path, file)
    answer = _ask(at, "GET", "/disks")
    document = _decode(answer, StatusDocument)
    if as_json:
        click.echo(answer)
    else:
        Console().print(disks_table(document, f"{at}, diskread {document.version}"))
    sys.exit(0 if all(each.accepting for each in document.disks) else 1)


def _socket(path: str | None, file: Path | None) -> str:
    """Where to ask."""
    if path is None and file is not None:
        try:
            path = configuration.load(file).admin_socket
        except configuration.ConfigError as error:
            raise CannotRun(str(error)) from error
        if path is None:
            raise CannotRun(f"{file} names no admin_socket: its server cannot be asked")
    path = path or os.environ.get(VARIABLE)
    if not path:
        raise click.UsageError(
            f"which server? Give its administrative socket with --socket PATH or in {VARIABLE}, or its --config FILE; "
            "'diskread serve --admin-socket PATH' makes one"
        )
    return path


def _target(name: str, verb: str) -> str:
    if "/" in name:  # it would be another path
        raise _Refused(f"there is no disk called {name}; 'diskread disk list' shows those there are")
    return f"/disks/{quote(name, safe='')}/{verb}"


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(self._path)


class _Refused(click.ClickException):
    """The server says no; exit status 1."""


def _ask(path: str, method: str, target: str, body: bytes | None = None) -> bytes:
    """Ask the server; its answer when it is a good one."""
    try:
        with contextlib.closing(_UnixConnection(path)) as connection:
            connection.request(method, target, body)
            response = connection.getresponse()
            status, answer = response.status, response.read()
    except FileNotFoundError as error:
        raise CannotRun(
            f"there is no socket {path}: is the server running, with --admin-socket or admin_socket in its file?"
        ) from error
    except ConnectionRefusedError as error:
        raise CannotRun(f"no server listens at {path}: the one that made it has ended") from error
    except PermissionError as error:
        raise CannotRun(
            f"no permission to open {path}: only the server's own user and root may; try it with sudo"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise CannotRun(f"the server at {path} does not answer: {error or type(error).__name__}") from error
    if status == http.client.OK:
        return answer
    try:
        description = msgspec.json.decode(answer, type=dict[str, Any])["description"]
    except (msgspec.DecodeError, KeyError):
        raise CannotRun(f"{path} answers {status}: is it the administrative socket of a diskread server?") from None
    raise _Refused(str(description))


def _decode(answer: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(answer, type=kind)
    except msgspec.DecodeError as error:
        raise CannotRun(f"the answer is not one of a diskread server: {error}") from error
