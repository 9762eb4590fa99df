"""How a command says that it could not do its work at all, as opposed to a result that is bad news."""

from __future__ import annotations

import click


class CannotRun(click.ClickException):
    """The command could not run; exit status 2."""

    exit_code = 2
