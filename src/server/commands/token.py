"""`diskread token`."""

from __future__ import annotations

import json
import secrets

import click

from .. import access
from ..config import NAME


@click.command("token", short_help="Make a token for clients of a server.")
@click.argument("name")
@click.option(
    "--allow",
    multiple=True,
    required=True,
    metavar="WHAT",
    help="DISK, or DISK/PATH/ for what is below it, of a disk or mirror; status for /, /status, /metrics and /events; "
    "simulated for /RC,MS,PATH. Repeat for more.",
)
def token(name: str, allow: tuple[str, ...]) -> None:
    """Make a token called NAME: it is printed this once; the server's file of tokens gets its hash.

    The token goes to standard output, the table for the file that `serve --tokens` names to standard error. A running
    server reads the file again within a second or so.

    \b
    Examples:
      diskread token backup --allow a --allow b/public/
      diskread token prometheus --allow status 2>> tokens.toml > prometheus.token

    Exit status: 0 made, 2 for wrong arguments.
    """
    if not NAME.match(name):
        raise click.BadParameter("letters, digits, '.', '_' and '-' make a name", param_hint="NAME")
    try:
        for each in allow:
            access.prefix(each)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--allow") from error
    secret = secrets.token_urlsafe(32)
    key = json.dumps(name) if "." in name else name
    allowed = ", ".join(json.dumps(each, ensure_ascii=False) for each in allow)
    click.echo(secret)
    table = f'[token.{key}]\nsha256 = "{access.digest(secret.encode()).hex()}"\nallow = [{allowed}]'
    click.echo(f"\n# For the file of tokens; the token itself is not in it.\n{table}", err=True)
