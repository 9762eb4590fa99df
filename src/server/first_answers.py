"""At the start, disks get a moment to answer their first probes before anybody is served."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gevent

if TYPE_CHECKING:
    from diskread import Disks

FIRST_ANSWERS = 0.5
"""Seconds that they get. One that does not answer is served as offline."""


def wait_for_first_answers(disks: Disks) -> None:
    """Until every disk has answered its first probe, in whatever way, but no longer than they get."""
    with gevent.Timeout(FIRST_ANSWERS, False):  # type: ignore[arg-type]
        while any(disk.load.in_flight for disk in disks.status):
            gevent.sleep(0.002)
