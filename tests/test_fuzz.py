"""Any bytes at all where a client may put them: the line protocol, and paths."""

from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from diskread import Disk, DiskError, Limits
from server.line import LONGEST_LINE, answer
from server.simulate import LONGEST_STALL, Simulation

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from server.simulate import Request

thorough = settings(
    max_examples=500,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

REPLY = re.compile(rb"([+-]?[0-9]+),([0-9]+),([^,\n]*)\n\Z")
BAD_INPUT = b"2,0,\n"

INSIDE = {b"a": b"content of a", b"directory/b": b"content of b", b"\xff\xfe": b"content of a name that is no text"}
SECRET = b"what no client may ever see"

line_ends = st.sampled_from([b"", b"\n", b"\r\n"])
near_lines = st.lists(
    st.sampled_from([b",", b",", b"0", b"-1", b"+7", b" ", b"\t", b"\r", b"\0", b"9" * 18, b"9" * 19, b"1e3", b"a/b"]),
    max_size=10,
).map(b"".join)
lines = st.builds(
    lambda text, end: text.replace(b"\n", b"") + end,  # the listener cuts at the first line end
    st.binary(max_size=60) | near_lines | st.binary(min_size=LONGEST_LINE - 3, max_size=LONGEST_LINE + 3),
    line_ends,
)


class _AtOnce:
    """Carries out every request in no time, and says that it took a moment longer than it should have, as all do."""

    def perform(self, request: Request, _since: float) -> float:
        return request.stall + 0.0001


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A small tree with all kinds of ways out of it, and the secret next to it."""
    root = tmp_path / "root"
    (root / "directory").mkdir(parents=True)
    for path, content in INSIDE.items():
        (root / os.fsdecode(path)).write_bytes(content)
    (tmp_path / "secret").write_bytes(SECRET)
    (root / "link").symlink_to("directory/b")
    (root / "up").symlink_to("..")
    (root / "out").symlink_to("../secret")
    (root / "absolute").symlink_to(tmp_path / "secret")
    (root / "directory" / "far").symlink_to("../../secret")
    (root / "process").symlink_to("/proc/self/root")
    (root / "circle").symlink_to("circle")
    with Disk("d1", root, Limits(threads=2)) as disk:
        yield disk


# -- lines ------------------------------------------------------------------------------------------------------------


@thorough
@given(line=lines)
@example(line=b"")
@example(line=b"\n")
@example(line=b"0,0,\n")
@example(line=b"0,0,a" + b"b" * LONGEST_LINE)
def test_any_line_gets_one_well_formed_reply(disk: Disk, line: bytes) -> None:
    for simulation in (cast("Simulation", _AtOnce()), Simulation({"d1": disk}, stalls=False)):
        reply = answer(line, simulation, time.monotonic())
        found = REPLY.match(reply)
        assert found, reply
        event("bad input" if reply == BAD_INPUT else "carried out")
        if reply != BAD_INPUT:
            path = line.removesuffix(b"\n").removesuffix(b"\r").split(b",")[2]
            assert found[3] == path


@thorough
@given(
    status=st.integers(-(10**17), 10**17),
    milliseconds=st.integers(-5, LONGEST_STALL + 5),
    blanks=st.tuples(*[st.sampled_from([b"", b" ", b"\t "])] * 4),
    path=st.binary(max_size=40).map(lambda path: re.sub(rb"[,\n]", b"", path)),
    end=line_ends,
)
def test_a_request_is_echoed(
    status: int, milliseconds: int, blanks: tuple[bytes, ...], path: bytes, end: bytes
) -> None:
    fields = (blanks[0] + b"%d" % status + blanks[1], blanks[2] + b"%d" % milliseconds + blanks[3], path)
    reply = answer(b",".join(fields) + end, cast("Simulation", _AtOnce()), time.monotonic())
    echo = (path + end).removesuffix(b"\n").removesuffix(b"\r")
    if 0 <= milliseconds <= LONGEST_STALL and echo:
        assert reply == b"%d,%d,%b\n" % (status, milliseconds, echo)
    else:
        assert reply == BAD_INPUT


# -- paths ------------------------------------------------------------------------------------------------------------

inside_names = [b"a", b"b", b"directory", b"link", b"\xff\xfe", b"up", b"root", b"."]
other_names = [b"out", b"absolute", b"far", b"process", b"circle", b"secret", b"", b"..", b"...", b"a\0", b"x" * 256]
names = st.sampled_from(inside_names) | st.sampled_from(other_names)
paths = st.builds(
    lambda parts, first: first + b"/".join(parts),
    st.lists(names, max_size=3) | st.lists(names | st.binary(max_size=4), max_size=8),
    st.sampled_from([b"", b"directory/", b"up/root/", b"/", b"./", b"../"]),
)


@thorough
@given(path=paths | st.binary(max_size=40), offset=st.integers(0, 30), size=st.none() | st.integers(0, 100))
@example(path=b"up/secret", offset=0, size=None)
@example(path=b"out", offset=0, size=None)
@example(path=b"absolute", offset=0, size=None)
@example(path=b"directory/far", offset=0, size=None)
@example(path=b"directory/../../secret", offset=0, size=None)
@example(path=b"a/../" * 2000 + b"a", offset=0, size=None)
def test_any_path_is_refused_or_a_file_of_the_disk(disk: Disk, path: bytes, offset: int, size: int | None) -> None:
    try:
        data = disk.read(path, offset, size)
    except DiskError as error:
        event(type(error).__name__)
    else:
        event("read")
        stop = None if size is None else offset + size
        assert data in {content[offset:stop] for content in INSIDE.values()}


@thorough
@given(path=paths.map(lambda path: re.sub(rb"[,\n]", b"", path)))
def test_a_path_in_the_line_protocol_is_echoed_whatever_becomes_of_it(disk: Disk, path: bytes) -> None:
    reply = answer(b"0,0,d1/%b\n" % path, Simulation({"d1": disk}, stalls=False), time.monotonic())
    found = REPLY.match(reply)
    assert found, reply
    assert found[3] == b"d1/" + path.removesuffix(b"\r")
