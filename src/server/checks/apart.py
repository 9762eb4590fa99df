"""A process of its own for what may get stuck: a process with a thread in state D cannot end, and holds its pipes."""

from __future__ import annotations

import os
import traceback
from multiprocessing import Pipe
from typing import TYPE_CHECKING, TypeVar

import click
import gevent.os

if TYPE_CHECKING:
    from collections.abc import Callable

Result = TypeVar("Result")


def apart(function: Callable[[], Result]) -> Result:
    """Call a function in a child process, and wait for what it returns, but not for the child's end.

    Blocks the native thread until the function has returned, which has to see to its own deadlines. Threads that are
    stuck then are left to the child, whom the kernel lets go when the device answers. It has no standard streams, so
    that whoever reads this process's output sees its end.

    Args:
        function: What to call; the result has to be one that can be pickled.

    Raises:
        click.ClickException: The function has raised one; it has the same message and status.
        RuntimeError: It has raised anything else, or the child has gone.
    """
    receiving, sending = Pipe(duplex=False)
    if gevent.os.fork() == 0:
        try:
            _detach()
            sending.send(_outcome(function))
        finally:
            os._exit(0)
    sending.close()
    with receiving:
        try:
            result, error = receiving.recv()
        except EOFError:
            raise RuntimeError("the process that looked has gone without an answer") from None
    if error is not None:
        raise error
    value: Result = result
    return value


def _detach() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)


def _outcome(function: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return function(), None
    except click.ClickException as error:
        return None, error
    except BaseException:  # noqa: BLE001 - it is raised again where somebody sees it
        return None, RuntimeError(traceback.format_exc())
