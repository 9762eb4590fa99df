"""The promises of `diskread.Mirror`, on file systems that really hang: the answer comes although a disk does not."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gevent
import pytest

from diskread import CHUNK, Disk, DiskBusy, DiskFileChanged, DiskFileNotFound, DiskTimeout, Limits, Mirror, State
from tests.conftest import until
from tests.server.raw_client import ServerProcess

from .injectors import drop_cached, stuck_threads
from .witnesses import SLACK, Callers, nothing_in_flight

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from diskread.limits import EngineName

    from .injectors import Dying, FaultFS, Throttled

MakeFaultFS = Callable[..., "FaultFS"]
MakePair = Callable[..., dict[str, "FaultFS"]]
MakeMirror = Callable[..., Mirror]

CONTENT = os.urandom(8 * CHUNK + 17)
MTIME_NS = 1_700_000_000_123_456_789
HEDGE_AFTER = 0.05
DEADLINE = 20.0


def put(directory: Path, content: bytes = CONTENT, mtime_ns: int = MTIME_NS) -> None:
    (directory / "x").write_bytes(content)
    os.utime(directory / "x", ns=(mtime_ns, mtime_ns))


@pytest.fixture
def make_pair(make_faultfs: MakeFaultFS) -> MakePair:
    """Two file systems with the same file, by the names of their disks."""

    def make(*options: str) -> dict[str, FaultFS]:
        pair = {name: make_faultfs(*options) for name in "ab"}
        for faultfs in pair.values():
            put(faultfs.backing)
        return pair

    return make


@pytest.fixture
def mirror_of(nothing_left_behind: None, engine: EngineName) -> Iterator[MakeMirror]:
    """Make mirrors of disks on the given directories; at the end nothing is stuck any more, and all is closed."""
    made: list[Mirror] = []

    def make(roots: dict[str, Path], *, hedge_share: float = 1.0, **limits: Any) -> Mirror:
        chosen = Limits(**{"threads": 4, "deadline": DEADLINE, "idle": 0.2, "engine": engine, **limits})
        disks = [Disk(name, root, chosen) for name, root in roots.items()]
        made.append(Mirror("m", disks, hedge_after=HEDGE_AFTER, hedge_share=hedge_share))
        return made[-1]

    yield make
    for mirror in made:
        mirror.close()
        for disk in mirror.disks:
            until(lambda disk=disk: nothing_in_flight(disk), f"the slots of {disk.name}")  # type: ignore[misc]


def roots(pair: dict[str, FaultFS]) -> dict[str, Path]:
    return {name: faultfs.root for name, faultfs in pair.items()}


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("lookup", ["--entry-timeout=0"]),
        ("open", []),
        ("getattr", ["--attr-timeout=0"]),
        ("read", []),
        ("read", ["--direct-io"]),
    ],
)
def test_a_hang_before_the_first_byte(op: str, options: list[str], make_pair: MakePair, mirror_of: MakeMirror) -> None:
    pair = make_pair(*options)
    mirror = mirror_of(roots(pair))
    pair["a"].hang(op)
    began = time.monotonic()
    for _ in range(4):
        assert mirror.read("x", 0, 4096) == CONTENT[:4096]
        with mirror.open("x") as file:
            assert file.read(CHUNK, 100) == CONTENT[CHUNK : CHUNK + 100]
            assert file.disk == "b"
    assert time.monotonic() - began < DEADLINE / 2, "waited for the disk that hangs"
    counts = mirror.status.counts
    assert counts.hedges_won >= 1
    assert counts.answers.keys() == {"b"}
    pair["a"].wait_held(1, sleep=gevent.sleep)
    pair["a"].release()


def test_a_hang_before_the_first_byte_without_a_hedge_left(make_pair: MakePair, mirror_of: MakeMirror) -> None:
    pair = make_pair()
    mirror = mirror_of(roots(pair), hedge_share=0, deadline=1.0)
    mirror.disks[1].stat("x")  # now the other one is the one that is asked first
    pair["a"].hang()
    until(lambda: (mirror.read("x"), pair["a"].held())[1], "a read of the disk that hangs")
    counts = mirror.status.counts
    assert counts.hedges == 0
    assert counts.failovers["a"] == counts.hedges_refused == 1
    pair["a"].release()


@pytest.mark.parametrize("hedge_share", [1.0, 0.0])
def test_a_hang_in_the_middle_of_a_stream(hedge_share: float, make_pair: MakePair, mirror_of: MakeMirror) -> None:
    pair = make_pair("--direct-io")
    deadline = 2.0
    mirror = mirror_of(roots(pair), hedge_share=hedge_share, deadline=deadline)
    for start in (0, CHUNK + 5):
        with mirror.open("x", offset=start) as file:
            first = pair[file.disk]
            first.hang(range=(4 * CHUNK, 4 * CHUNK + 1))
            began = time.monotonic()
            body = b"".join(file.chunks(start))
            assert time.monotonic() - began < deadline + SLACK
            assert hashlib.sha256(body).digest() == hashlib.sha256(CONTENT[start:]).digest()
            assert pair[file.disk] is not first
        first.wait_held(1, sleep=gevent.sleep)
        first.release()
        until(lambda: all(nothing_in_flight(disk) for disk in mirror.disks))
    if not hedge_share:
        assert mirror.status.counts.hedges == 0


def test_an_error_in_the_middle_of_a_stream(make_pair: MakePair, mirror_of: MakeMirror) -> None:
    pair = make_pair("--direct-io")
    mirror = mirror_of(roots(pair), hedge_share=0)
    with mirror.open("x") as file:
        first = file.disk
        pair[first].fail(range=(4 * CHUNK, 4 * CHUNK + 1))
        assert b"".join(file.chunks()) == CONTENT
        assert file.disk != first
    assert mirror.status.counts.failovers == {first: 1}


def test_both_disks_hang(make_pair: MakePair, mirror_of: MakeMirror) -> None:
    pair = make_pair()
    mirror = mirror_of(roots(pair), deadline=0.5)
    for faultfs in pair.values():
        faultfs.hang()
    began = time.monotonic()
    with pytest.raises(DiskTimeout, match="mirror m"):
        mirror.read("x")
    assert 0.5 <= time.monotonic() - began < 0.5 + SLACK
    assert [disk.status.load.in_flight for disk in mirror.disks] == [1, 1]
    for faultfs in pair.values():
        faultfs.release()
    until(lambda: all(nothing_in_flight(disk) for disk in mirror.disks))
    assert mirror.read("x") == CONTENT


def test_both_hang_in_the_middle_and_one_comes_back(make_pair: MakePair, mirror_of: MakeMirror) -> None:
    pair = make_pair("--direct-io")
    mirror = mirror_of(roots(pair))
    for faultfs in pair.values():
        faultfs.hang(range=(4 * CHUNK, 4 * CHUNK + 1))
    with mirror.open("x") as file:
        first = file.disk
        reading = gevent.spawn(lambda: b"".join(file.chunks()))
        for faultfs in pair.values():
            faultfs.wait_held(1, sleep=gevent.sleep)
        pair[first].release()
        assert reading.get(timeout=DEADLINE) == CONTENT
        assert file.disk == first
        pair["b" if first == "a" else "a"].release()


@pytest.mark.parametrize("death", ["EIO", "killed", "hangs"])
def test_one_slow_and_one_dead(death: str, make_pair: MakePair, mirror_of: MakeMirror) -> None:
    pair = make_pair("--direct-io")
    mirror = mirror_of(roots(pair))
    assert mirror.read("x", 0, 10) == CONTENT[:10]
    pair["a"].delay(4 * HEDGE_AFTER)
    if death == "EIO":
        pair["b"].fail("*")
    elif death == "killed":
        pair["b"].kill()
    else:
        pair["b"].hang()
    for offset in range(6):
        assert mirror.read("x", offset, 100) == CONTENT[offset : offset + 100]
    if death == "hangs":
        pair["b"].release()


@pytest.mark.parametrize("comes_back", [False, True])
def test_the_other_disk_has_another_version(comes_back: bool, make_pair: MakePair, mirror_of: MakeMirror) -> None:
    pair = make_pair("--direct-io", "--attr-timeout=0")
    mirror = mirror_of(roots(pair), deadline=60.0 if comes_back else 1.0)
    with mirror.open("x") as file:
        first, second = file.disk, "b" if file.disk == "a" else "a"
        put(pair[second].backing, CONTENT[::-1], MTIME_NS + 1)
        pair[first].hang(range=(4 * CHUNK, 4 * CHUNK + 1))
        got: list[bytes] = []
        reading = gevent.spawn(lambda: got.extend(file.chunks()))
        pair[first].wait_held(1, sleep=gevent.sleep)
        if comes_back:
            until(lambda: mirror.status.counts.hedges, "the other disk to be asked")
            pair[first].release()
            reading.get(timeout=30)
            assert b"".join(got) == CONTENT
            assert file.disk == first
        else:
            with pytest.raises(DiskFileChanged, match="another version"):
                reading.get(timeout=30)
            assert CONTENT.startswith(b"".join(got)), "bytes of the other version"
            pair[first].release()


def test_all_busy(make_pair: MakePair, mirror_of: MakeMirror) -> None:
    pair = make_pair()
    mirror = mirror_of(roots(pair), threads=1, queue=0)
    for faultfs in pair.values():
        faultfs.hang()
    waiting = [gevent.spawn(disk.read, "x") for disk in mirror.disks]
    for faultfs in pair.values():
        faultfs.wait_held(1, sleep=gevent.sleep)
    began = time.monotonic()
    for _ in range(20):
        with pytest.raises(DiskBusy, match="all 1 slots are taken"):
            mirror.read("x")
    assert time.monotonic() - began < SLACK
    for faultfs in pair.values():
        faultfs.release()
    assert [each.get() for each in waiting] == [CONTENT] * 2
    assert mirror.read("x") == CONTENT


def test_no_such_file_does_not_wait_for_the_disk_that_hangs(make_pair: MakePair, mirror_of: MakeMirror) -> None:
    pair = make_pair("--entry-timeout=0")
    mirror = mirror_of(roots(pair), hedge_share=0)
    pair["a"].hang("lookup")
    stuck = gevent.spawn(mirror.disks[0].stat, "x")
    pair["a"].wait_held(1, sleep=gevent.sleep)
    gevent.sleep(2 * HEDGE_AFTER)  # late by now
    began = time.monotonic()
    with pytest.raises(DiskFileNotFound):
        mirror.read("none")
    assert time.monotonic() - began < DEADLINE / 2
    pair["a"].release()
    stuck.get()


def test_no_request_fails_while_one_of_two_hangs_and_hedges_keep_to_their_share(
    make_pair: MakePair, mirror_of: MakeMirror
) -> None:
    pair = make_pair("--direct-io")
    share = 0.05
    mirror = mirror_of(roots(pair), hedge_share=share, threads=8, deadline=6.0, offline_after=1.0, idle_probe=2.0)

    def ask() -> None:
        assert mirror.read("x", 4096, 4096) == CONTENT[4096:8192]

    callers = Callers(4, ask, again=True)
    until(lambda: len(callers.outcomes) > 100, "some reads before")
    pair["a"].hang()
    sick = mirror.disks[0]
    until(lambda: sick.status.load.state is State.OFFLINE, "the verdict")
    before = len(callers.outcomes)
    until(lambda: len(callers.outcomes) > before + 100, "reads beside the disk that is offline")
    pair["a"].release()
    until(lambda: sick.status.load.state is State.ONLINE, "the disk to be back")
    answered = mirror.status.counts.answers["a"]
    until(lambda: mirror.status.counts.answers["a"] > answered, "the disk to be used again", 60)
    assert {outcome.what for outcome in callers.end()} == {"ok"}
    counts = mirror.status.counts
    assert counts.hedges <= 1 + share * counts.reads


def test_a_real_disk_that_dies_in_the_middle_of_a_stream(dying: Dying, mirror_of: MakeMirror, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dying.root, copy, ignore=shutil.ignore_patterns("lost+found"))  # keeps the times
    mirror = mirror_of({"a": dying.root, "b": copy}, hedge_share=1)
    expected = (copy / "f3").read_bytes()
    for _ in range(200):  # whose turn it is
        file = mirror.open("f3")
        if file.disk == "a":
            break
        file.close()
    drop_cached(dying.root / "f3")
    with file:
        dying.hang()
        assert b"".join(file.chunks()) == expected
        assert file.disk == "b"
        until(stuck_threads, "a thread in state D")
        dying.release()


def test_a_real_disk_that_stalls_before_the_first_byte(
    throttled: Throttled, mirror_of: MakeMirror, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(throttled.root, copy, ignore=shutil.ignore_patterns("lost+found"))
    mirror = mirror_of({"a": throttled.root, "b": copy})
    expected = (copy / "f5").read_bytes()
    drop_cached(throttled.root / "f5")
    throttled.enter_process()
    throttled.stall()
    for number in range(8):
        assert mirror.read("f5", number * 10_000, 10_000) == expected[number * 10_000 : (number + 1) * 10_000]
    throttled.lift()


def test_a_download_that_hangs_midway_comes_whole_from_a_server(make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair("--direct-io")
    config = tmp_path / "diskread.toml"
    lines = ["[limits]", "deadline = 4.0"]
    lines += [f'[disk.{name}]\nroot = "{faultfs.root}"' for name, faultfs in pair.items()]
    config.write_text("\n".join([*lines, "[mirror.m]", 'disks = ["a", "b"]', "hedge_after = 0.1"]))
    server = ServerProcess(tmp_path, "--config", str(config))
    try:
        for disk in pair:
            server.wait_for_first_answer(disk)
        for faultfs in pair.values():  # whichever is asked first
            faultfs.delay(0.1, range=(6 * CHUNK, 6 * CHUNK + 1))
        with server.connect() as connection:
            connection.send(b"GET /v1/m/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            status, headers, length = connection.head()
            assert (status, length) == (200, len(CONTENT))
            pair[headers["Diskread-Disk"]].hang()
            assert connection.rest() == CONTENT
        for _ in range(10):
            response = server.http("/v1/m/x")
            assert (response.status, response.body) == (200, CONTENT)
        for faultfs in pair.values():
            faultfs.release()
        until(lambda: not any(disk.in_flight for disk in server.status().disks), "the stuck reads to end")
        assert server.stop() == 0
        assert "Traceback" not in server.said()
    finally:
        server.kill()
