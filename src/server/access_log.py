"""Where the line per request goes."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, TextIO

import click

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def opened(name: str | None) -> Iterator[TextIO | None]:
    """The access log, open.

    Args:
        name: A file; "-" for standard output; None for nowhere.

    Raises:
        click.ClickException: It cannot be written.
    """
    if name is None:
        yield None
    elif name == "-":
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        yield sys.stdout
    else:
        try:
            log = open(name, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - closed below
        except OSError as error:
            raise click.ClickException(f"cannot write the access log {name}: {error.strerror}") from error
        try:
            yield log
        finally:
            with contextlib.suppress(OSError):  # what could not be written before cannot be now
                log.close()
