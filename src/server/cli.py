"""The command line `diskread`: one module per command in `server.commands`."""

from __future__ import annotations

import click

from .commands.check import check
from .commands.completion import completion
from .commands.demo import demo
from .commands.disk import disk
from .commands.probe import probe
from .commands.request import request
from .commands.serve import serve
from .commands.status import status
from .commands.token import token
from .status import version


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version(), prog_name="diskread")
def main() -> None:
    """Serve files from disks of which any may hang at any time, without hanging itself.

    \b
    diskread demo                     see it in 30 seconds, nothing to set up
    diskread serve --disk a=/srv/a    serve a directory on 127.0.0.1:7000
    diskread check /srv/a             what can be read there without a thread, and if not, why
    diskread probe 127.0.0.1:7000     does one slow read hold up the others? Of any server.
    diskread status --watch           the disks of a running server, live
    diskread disk offline a ...       take a disk of a running server offline by hand
    diskread token NAME --allow a     a token for clients of one disk
    """


for _command in (serve, demo, check, probe, request, status, disk, token, completion):
    main.add_command(_command)
