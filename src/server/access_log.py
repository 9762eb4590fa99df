"""Where the line per request goes."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

import click

from .logs import AccessLog

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .logs import LogFormat


@contextlib.contextmanager
def opened(name: str | None, log_format: LogFormat) -> Iterator[AccessLog | None]:
    """The access log, open.

    Args:
        name: A file; "-" for standard output; None for nowhere.
        log_format: Of its lines.

    Raises:
        click.ClickException: It cannot be written.
    """
    if name is None:
        yield None
    elif name == "-":
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        yield AccessLog(sys.stdout, log_format)
    else:
        try:
            log = open(name, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - closed below
        except OSError as error:
            raise click.ClickException(f"cannot write the access log {name}: {error.strerror}") from error
        try:
            yield AccessLog(log, log_format)
        finally:
            with contextlib.suppress(OSError):  # what could not be written before cannot be now
                log.close()
