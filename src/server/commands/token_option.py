"""The option with which clients of a server that wants tokens give theirs."""

from __future__ import annotations

import click

token_option = click.option(
    "--token",
    envvar="DISKREAD_TOKEN",
    metavar="TOKEN",
    help="Show the server this token, in HTTP. Others see it in the list of processes: better set DISKREAD_TOKEN.",
)
