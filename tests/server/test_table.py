"""The disks as a table for a terminal."""

from __future__ import annotations

import io

import msgspec
from rich.console import Console

from server.status import DiskDocument, StatusDocument
from server.table import disks_table

WELL = DiskDocument(
    name="well",
    root="/srv/well",
    state="online",
    accepting=True,
    slots=8,
    queue=64,
    deadline=10.0,
    threads=3,
    in_flight=2,
    stuck=0,
    waiting=5,
    oldest=1.26,
    reads=1234,
    bytes=99,
    errors={"EIO": 2, "ENOENT": 3},
    timeouts=6,
    rejections=7,
    abandoned=8,
)


def drawn(*disks: DiskDocument, width: int = 120, color: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=color, color_system="standard" if color else None)
    console.print(disks_table(StatusDocument("1.0", 5.0, False, list(disks)), "http://[::1]:7000/status"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_shows_what_there_is_to_know() -> None:
    lines = drawn(WELL).splitlines()
    assert lines[0].strip() == "http://[::1]:7000/status"
    (row,) = (line.split() for line in lines if "well" in line)
    assert row == ["well", "online", "2/8", "0", "5", "1.3", "s", "1234", "5", "6", "7"]


def test_says_of_a_disk_that_takes_nothing_that_it_refuses() -> None:
    hung = msgspec.structs.replace(WELL, name="hung", state="suspect", accepting=False)
    slow = msgspec.structs.replace(WELL, name="slow", state="suspect")
    text = drawn(WELL, hung, slow)
    states = {line.split()[0]: line.split()[1] for line in text.splitlines() if "/8" in line}
    assert states == {"well": "online", "hung": "refusing", "slow": "suspect"}
    assert "\x1b[1;31mrefusing" in drawn(hung, color=True)


def test_shows_a_state_that_it_does_not_know() -> None:
    assert "resting" in drawn(msgspec.structs.replace(WELL, state="resting"))


def test_draws_no_disks() -> None:
    assert "disk" in drawn()


def test_fits_a_small_terminal() -> None:
    text = drawn(WELL, msgspec.structs.replace(WELL, name="hung", accepting=False), width=80)
    assert all(len(line) <= 80 for line in text.splitlines())
    # What says which disk it is, and how it is, must not be what is left out.
    for word in ("well", "hung", "online", "refusing", "2/8"):
        assert word in text, text
