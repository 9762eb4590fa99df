"""Who may read what: the files of tokens and of TLS, and what is open beyond this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diskread import DiskTimeout

from .. import access
from ..config import ConfigError
from ..listener import tls_context
from . import Finding
from .bounded import within

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..config import ServerConfig


def files(config: ServerConfig, deadline: float) -> Iterator[Finding]:
    """Whether the files of tokens and of TLS can be used. Blocks the greenlet, until the deadline at most.

    Args:
        config: The configuration.
        deadline: Seconds that each file system has to answer.
    """
    if config.tokens is not None:
        step = "'diskread token NAME --allow ...' prints what belongs into it"
        yield _file("tokens", f"{config.tokens} can be used", step, deadline, access.load, Path(config.tokens))
    if config.tls_certificate is not None and config.tls_key is not None:
        text = f"{config.tls_certificate} can be used"
        step = (
            "both files in PEM, readable for the user of the server; the certificate first, then those below its root"
        )
        yield _file("TLS", text, step, deadline, tls_context, config.tls_certificate, config.tls_key)


def _file(
    subject: str, text: str, step: str, deadline: float, load: Callable[..., object], *arguments: object
) -> Finding:
    try:
        within(deadline, load, *arguments)
    except DiskTimeout:
        return Finding(subject, "error", f"its file system has not answered within {deadline:g} s", step)
    except ConfigError as error:
        return Finding(subject, "error", str(error), step)
    return Finding(subject, "ok", text)
