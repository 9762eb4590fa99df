"""Any blocking call as a task for the workers of a disk."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

CLOCK = time.monotonic


class Call:
    """Any blocking call, dressed as a task: the outcome is kept as a value, whatever it is."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._abandoned = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.seconds = self.progress = 0.0
        self.size = self.count = 0

    def run(self) -> None:
        if self._abandoned:
            return
        started = CLOCK()
        try:
            self.result = self._function()
        except BaseException as error:  # noqa: BLE001 - it is raised again where the caller waits
            self.error = error
        self.seconds = CLOCK() - started

    def abandon(self) -> None:
        self._abandoned = True

    def take_descriptor(self) -> int:
        return -1


class OpeningCall(Call):
    """A call that returns an open descriptor: somebody has to close it, whether its caller is still there or not."""

    def take_descriptor(self) -> int:
        descriptor, self.result = self.result, None
        return -1 if descriptor is None else int(descriptor)
