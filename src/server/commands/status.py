"""`diskread status`."""

from __future__ import annotations

import http.client
import ssl
import sys
import time
import urllib.error
import urllib.request
from functools import partial
from typing import TYPE_CHECKING

import click
import msgspec
from rich.console import Console
from rich.live import Live

from ..status import StatusDocument
from ..table import tables
from .failure import CannotRun
from .token_option import token_option

if TYPE_CHECKING:
    from collections.abc import Callable


@click.command("status", short_help="Show the disks of a running server.")
@click.argument("url", default="http://127.0.0.1:7000")
@click.option("--watch", is_flag=True, help="Keep showing it, until Ctrl-C.")
@click.option(
    "--interval",
    type=click.FloatRange(0.1),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="How often, with --watch.",
)
@token_option
@click.option("--ca", metavar="FILE", help="Trust the certificates of this file, PEM, with https.")
@click.option("--json", "as_json", is_flag=True, help="Print the server's own document.")
def status(url: str, watch: bool, interval: float, token: str | None, ca: str | None, as_json: bool) -> None:
    """Show the disks and mirrors of a running server: state, slots, what is stuck, what went wrong so far.

    URL is the address of the server, http://127.0.0.1:7000 when not given.

    \b
    Examples:
      diskread status
      diskread status http://127.0.0.1:7000 --watch
      diskread status --json | jq '.disks[] | select(.stuck > 0).name'

    Exit status: 0 when every disk takes requests, 1 when one refuses them, 2 when the server does not answer.
    """
    if watch and as_json:
        raise click.UsageError("--watch and --json exclude each other")
    address = (url if "://" in url else f"http://{url}").rstrip("/") + "/status"
    fetch = partial(_fetch, address, token, _trust(ca))
    body = fetch()
    if as_json:
        click.echo(body)
    document = _decode(address, body)
    if not as_json:
        title = f"{address}, diskread {document.version}"
        if watch:
            document = _watch(address, title, document, interval, fetch)
        else:
            Console().print(tables(document, title))
    sys.exit(0 if all(disk.accepting for disk in document.disks) else 1)


def _watch(
    address: str, title: str, document: StatusDocument, interval: float, fetch: Callable[[], bytes]
) -> StatusDocument:
    with Live(tables(document, title), auto_refresh=False) as live:
        try:
            while True:
                time.sleep(interval)
                document = _decode(address, fetch())
                live.update(tables(document, title), refresh=True)
        except KeyboardInterrupt:
            return document


def _trust(ca: str | None) -> ssl.SSLContext | None:
    try:
        return None if ca is None else ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise CannotRun(f"{ca} holds no certificates: {error}") from error


def _fetch(address: str, token: str | None, trust: ssl.SSLContext | None) -> bytes:
    if not address.startswith(("http://", "https://")):
        raise click.UsageError(f"{address} is not an http address")
    try:
        request = urllib.request.Request(address)  # noqa: S310 - checked above
        if token is not None:
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        with urllib.request.urlopen(request, timeout=10, context=trust) as response:  # noqa: S310
            body: bytes = response.read()
            return body
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (http.client.UNAUTHORIZED, http.client.FORBIDDEN):
            raise CannotRun(f'{address} wants a token that allows "status": set DISKREAD_TOKEN') from error
        raise CannotRun(f"{address} answers {error.code}: is it a diskread server?") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise CannotRun(f"{address} does not answer ({reason}); 'diskread serve' starts a server") from error


def _decode(address: str, body: bytes) -> StatusDocument:
    try:
        return msgspec.json.decode(body, type=StatusDocument)
    except msgspec.DecodeError as error:
        raise CannotRun(f"{address} is not the status of a diskread server: {error}") from error
