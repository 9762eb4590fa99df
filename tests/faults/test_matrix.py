"""The matrix: every kind of hang in every situation, and what is promised of each.

A row says *where* the disk hangs, *how*, in how much of it (*scope*), in which *state* its readers wait (of
proc_pid_stat(5); "-" where nobody waits), on which injector, and how many *slots* are asked for. There is one table for
each situation: under load, idle, at the start, in the middle of a stream, during the drain of a server. The tables are
no full product, but each value of each column is there, with whatever it is most likely to quarrel with.

What is promised follows from the row alone, and each test asserts all of it:

* what the callers got, and when; once the disk is OFFLINE, everybody hears so at once;
* a healthy disk beside it, in the same hub, notices nothing (`beside`);
* the verdict: OFFLINE after `offline_after` without progress, and never for what is slow, for errors, or for one stuck
  request while others complete;
* after the lift everything is back, although nobody asks;
* no slot, thread or descriptor stays behind (`nothing_left_behind`, by way of `make_sick`).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import time
from typing import TYPE_CHECKING, NamedTuple

import gevent
import pytest

from diskread import CHUNK, Disk, DiskIOError, DiskTimeout
from diskread.health import State
from tests.conftest import until
from tests.server.raw_client import ServerProcess, http_request
from tests.server.raw_client import until as until_without_gevent

from .conftest import set_up
from .injectors import Dying, FaultFS, Throttled, stuck_threads, thread_state
from .witnesses import SLACK, Callers, Outcome, Verdicts, nothing_in_flight, refused_at_once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from .witnesses import Beside

    MakeSick = Callable[..., Disk]
    MakeScene = Callable[["Fault"], "Scene"]

DEADLINE = 0.3
OFFLINE_AFTER = 0.5
IDLE_PROBE = 0.8
SECONDS = 1.2
"""How long a hang "for seconds" lasts: longer than it takes to be OFFLINE."""

PATIENT = 30.0
"""A deadline that only counts when something is broken."""

SIZE = 4 * CHUNK
HALF = SIZE // 2
PAGE = 4096
X = random.Random(1).randbytes(SIZE)
Y = random.Random(2).randbytes(SIZE)


class Fault(NamedTuple):
    """One row."""

    where: str
    how: str
    scope: str
    state: str
    disk: str = "faultfs"
    slots: str = "one"

    def __str__(self) -> str:
        return ", ".join(self)

    @property
    def holds(self) -> bool:
        """Whether whoever asks has to wait."""
        return self.how in ("for ever", "for seconds", "EIO after seconds")

    @property
    def ends_by_itself(self) -> bool:
        return self.how in ("for seconds", "EIO after seconds")

    @property
    def stops_all_progress(self) -> bool:
        return self.holds and self.scope == "whole disk"


class Scene:
    """A disk that can have the fault of a row, and the means to ask it."""

    def __init__(self, fault: Fault, stack: contextlib.ExitStack, directory: Path, make_sick: MakeSick) -> None:
        self.fault = fault
        self._pages = itertools.cycle(random.sample(range(HALF // PAGE), HALF // PAGE))
        self.injector = self._make_injector(stack, directory)
        # 64 kB/s: what is read at a time takes parts of a second, and so does what reads in between.
        limits = {"offline_after": 2.0, "idle_probe": 2.2} if fault.how == "slow" else {}
        self.disk = make_sick(self.injector.root, **limits)
        stack.callback(self.end)

    def _make_injector(self, stack: contextlib.ExitStack, directory: Path) -> FaultFS | Dying | Throttled:
        if self.fault.disk == "faultfs":
            options = {"lookup": ["--entry-timeout=0"], "getattr": ["--attr-timeout=0"]}.get(self.fault.where, [])
            if self.fault.where == "read":
                # In the page cache, an open without --keep-cache waits for the pages of the file that are being read.
                options = ["--keep-cache"] if self.fault.state == "D" else ["--direct-io"]
            faultfs = stack.enter_context(set_up(FaultFS, *options))
            content = faultfs.backing
        else:
            content = directory / "content"
            content.mkdir()
            (content / "cold").mkdir()
            (content / "cold" / "x").write_bytes(X)
        (content / "x").write_bytes(X)
        (content / "y").write_bytes(Y)
        if self.fault.disk == "faultfs":
            return faultfs
        if self.fault.disk == "dying":
            return stack.enter_context(set_up(Dying, content))
        throttled = stack.enter_context(set_up(Throttled, content))
        throttled.enter_process()
        return throttled

    # -- asking -------------------------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Use the disk as long as it is well: `y` is what a probe reads later."""
        if self.fault.where != "lookup" or self.fault.disk != "dying":
            assert self.disk.read("x", 0, PAGE, deadline=PATIENT) == X[:PAGE]
        assert self.disk.read("y", 0, PAGE, deadline=PATIENT) == Y[:PAGE]
        until(lambda: nothing_in_flight(self.disk))
        assert self.disk.status.load.state is State.ONLINE

    def ask(self, deadline: float | None = None) -> None:
        """Read what the fault is about.

        Each time another page: the page cache is of no help, and of two readers of one page only the first one's
        request reaches the file system, the other waits for the page.
        """
        path = "cold/x" if self.fault.where == "lookup" and self.fault.disk == "dying" else "x"
        offset = HALF + next(self._pages) * PAGE
        assert self.disk.read(path, offset, PAGE, deadline=deadline) == X[offset : offset + PAGE]

    def ask_elsewhere(self) -> None:
        """Read what the fault is not about."""
        offset = random.randrange(HALF // 2 // PAGE) * PAGE
        path, content = ("x", X) if self.fault.scope == "range" else ("y", Y)
        assert self.disk.read(path, offset, PAGE, deadline=PATIENT) == content[offset : offset + PAGE]

    # -- the fault ----------------------------------------------------------------------------------------------------

    def strike(self, span: tuple[int, int] = (HALF, SIZE)) -> None:
        """From now on the disk has the fault."""
        fault, injector = self.fault, self.injector
        if isinstance(injector, Throttled):
            injector.slow(64 * 1024)
        elif isinstance(injector, Dying):
            if fault.how == "EIO":
                injector.fail()
            else:
                assert (fault.how, fault.scope) == ("for ever", "whole disk")
                injector.stop()
        else:
            op = {"close": "flush", "anything": "*"}.get(fault.where, fault.where)
            path = "*" if fault.scope == "whole disk" else "x"
            count = 1 if fault.scope == "one request" else None
            where = span if fault.scope == "range" else None
            if fault.how == "for ever":
                injector.hang(op, path=path, count=count, range=where)
            elif fault.how == "for seconds":
                injector.delay(SECONDS, op, path=path, count=count, range=where)
            elif fault.how == "EIO after seconds":
                injector.hang_then_fail(op, seconds=SECONDS, path=path, count=count, range=where)
            else:
                assert fault.how == "EIO"
                injector.fail(op, path=path, count=count, range=where)

    def wait_held(self, callers: int) -> None:
        """Wait until so many are stuck, in the state that the row says."""
        if isinstance(self.injector, FaultFS):
            self.injector.wait_held(callers, sleep=gevent.sleep)

            def waiting() -> list[str]:
                held = self.injector.held()  # type: ignore[union-attr]
                return [thread_state(each.thread) for each in held]

            until(lambda: waiting().count(self.fault.state) >= callers, f"{callers} in state {self.fault.state}")
        else:
            assert self.fault.state == "D"
            until(lambda: len(stuck_threads()) >= callers, f"{callers} in state D")

    def no_more(self) -> None:
        """What begins now goes well; what is held stays held."""
        assert isinstance(self.injector, FaultFS)
        self.injector.clear()

    def lift(self) -> None:
        """The disk is well again."""
        if isinstance(self.injector, Throttled):
            self.injector.lift()
        else:
            if isinstance(self.injector, Dying):
                self.injector.resume()
            self.injector.release()

    def end(self) -> None:
        """Lift, and let the disk go before the injector does: an open root would keep it mounted."""
        self.lift()
        until(lambda: not self.disk.status.load.in_flight, "the slots of the sick disk")
        self.disk.close()

    # -- what is promised of all --------------------------------------------------------------------------------------

    def goes_offline(self, verdicts: Verdicts, after: float) -> None:
        """OFFLINE after so many seconds, for lack of progress; then everybody hears so at once."""
        at = verdicts.wait_for(State.OFFLINE)
        assert OFFLINE_AFTER <= at < after + SLACK
        assert verdicts.reasons == {f"no operation has completed for {OFFLINE_AFTER} s"}
        refused_at_once(self.disk, self.ask)

    def comes_back_unasked(self) -> None:
        """Without any request, the disk is no longer OFFLINE; one that is let through makes it ONLINE."""
        counts = self.disk.status.counts
        until(lambda: self.disk.status.load.state in (State.HALF_OPEN, State.ONLINE), "the disk to come back")
        until(lambda: nothing_in_flight(self.disk), "the slots to be free")
        after = self.disk.status.counts
        assert (after.reads, after.rejections) == (counts.reads, counts.rejections), "nobody was to ask"
        self.ask(PATIENT)
        self.ask_elsewhere()
        until(lambda: self.disk.status.load.state is State.ONLINE, "the disk to be online")
        until(lambda: nothing_in_flight(self.disk), "the slots to be free")


@pytest.fixture
def make_scene(make_sick: MakeSick, tmp_path: Path) -> Iterator[MakeScene]:
    """Make the disk of a row; its fault is lifted after the test in any case."""
    with contextlib.ExitStack() as stack:
        yield lambda fault: Scene(fault, stack, tmp_path, make_sick)


def row(fault: Fault) -> str:
    return str(fault)


def of_one_kind(outcomes: list[Outcome], what: str, least: float, most: float) -> None:
    assert {outcome.what for outcome in outcomes} == {what}
    assert least <= min(outcome.seconds for outcome in outcomes)
    assert max(outcome.seconds for outcome in outcomes) < most + SLACK


UNDER_LOAD = [
    #     where      how                  scope          state  disk         slots
    Fault("read", "for ever", "one request", "S", "faultfs", "one"),
    Fault("read", "for ever", "range", "S", "faultfs", "one"),
    Fault("read", "for ever", "range", "D", "faultfs", "one"),
    Fault("read", "for ever", "whole disk", "S", "faultfs", "one"),
    Fault("read", "for ever", "whole disk", "D", "faultfs", "all"),
    Fault("read", "for ever", "whole disk", "D", "dying", "all"),
    Fault("open", "for ever", "one request", "S", "faultfs", "one"),
    Fault("open", "for ever", "whole disk", "S", "faultfs", "all"),
    Fault("lookup", "for ever", "whole disk", "S", "faultfs", "one"),
    Fault("lookup", "for ever", "whole disk", "D", "dying", "one"),
    Fault("getattr", "for ever", "whole disk", "S", "faultfs", "all"),
    Fault("close", "for ever", "one request", "S", "faultfs", "one"),
    Fault("close", "for ever", "whole disk", "S", "faultfs", "all"),
    Fault("read", "for seconds", "whole disk", "D", "faultfs", "all"),
    Fault("open", "for seconds", "one request", "S", "faultfs", "one"),
    Fault("read", "EIO after seconds", "whole disk", "S", "faultfs", "all"),
    Fault("getattr", "EIO after seconds", "whole disk", "S", "faultfs", "one"),
]


@pytest.mark.parametrize("fault", UNDER_LOAD, ids=row)
def test_a_hang_under_load(fault: Fault, make_scene: MakeScene, beside: Beside) -> None:
    scene = make_scene(fault)
    disk = scene.disk
    callers = disk.limits.threads if fault.slots == "all" else 1
    scene.warm_up()
    verdicts = Verdicts(disk)
    scene.strike()
    # The callers of a hang that ends wait for it; the others keep their deadline.
    deadline = PATIENT if fault.ends_by_itself else DEADLINE
    asking = Callers(callers, lambda: scene.ask(deadline))
    others = None if fault.stops_all_progress else Callers(1, scene.ask_elsewhere, again=True)
    scene.wait_held(callers)
    if fault.stops_all_progress:
        scene.goes_offline(verdicts, OFFLINE_AFTER)
    if fault.ends_by_itself:
        scene.no_more()
        what = "ok" if fault.how == "for seconds" else "DiskIOError"
        of_one_kind(asking.end(), what, SECONDS, SECONDS)
    else:
        of_one_kind(asking.end(), "DiskTimeout", DEADLINE, DEADLINE)
        assert disk.status.load.stuck == callers
    if others is not None:
        gevent.sleep(1.2 * OFFLINE_AFTER)
        others.end()
        assert others.what == {"ok"}
        assert State.OFFLINE not in verdicts.seen, "others did complete"
    if not fault.ends_by_itself:
        scene.lift()
    scene.comes_back_unasked()
    verdicts.end()


ERRORS = [
    Fault("read", "EIO", "one request", "-"),
    Fault("read", "EIO", "range", "-"),
    Fault("read", "EIO", "whole disk", "-", "dying", "all"),
    Fault("open", "EIO", "whole disk", "-"),
    Fault("lookup", "EIO", "whole disk", "-", "faultfs", "all"),
    Fault("getattr", "EIO", "whole disk", "-"),
]


@pytest.mark.parametrize("fault", ERRORS, ids=row)
def test_errors_under_load_are_told_and_are_no_hang(fault: Fault, make_scene: MakeScene, beside: Beside) -> None:
    scene = make_scene(fault)
    scene.warm_up()
    verdicts = Verdicts(scene.disk)
    scene.strike()
    callers = scene.disk.limits.threads if fault.slots == "all" else 1
    asking = Callers(callers, lambda: scene.ask(PATIENT), again=True)
    gevent.sleep(1.6 * OFFLINE_AFTER)
    outcomes = asking.end()
    if fault.scope == "one request":
        assert [each.what for each in outcomes].count("DiskIOError") == 1
        assert {each.what for each in outcomes} == {"DiskIOError", "ok"}
    else:
        of_one_kind(outcomes, "DiskIOError", 0, 0)
    errors = scene.disk.status.counts.errors
    assert set(errors) == {"EIO"}
    assert errors["EIO"] >= [each.what for each in outcomes].count("DiskIOError")
    scene.lift()
    scene.comes_back_unasked()
    verdicts.end()
    assert set(verdicts.seen) == {State.ONLINE}


def test_a_close_that_fails_is_no_failed_read(make_scene: MakeScene, beside: Beside) -> None:
    scene = make_scene(Fault("close", "EIO", "whole disk", "-"))
    scene.warm_up()
    verdicts = Verdicts(scene.disk)
    scene.strike()
    of_one_kind(Callers(4, lambda: scene.ask(PATIENT)).end(), "ok", 0, 0)
    scene.lift()
    scene.comes_back_unasked()
    verdicts.end()
    assert set(verdicts.seen) == {State.ONLINE}


# Slow under load is a test of its own: test_health.py.
SLOW = Fault("read", "slow", "whole disk", "D", "throttled")

IDLE = [
    Fault("read", "for ever", "whole disk", "S"),
    Fault("open", "for ever", "whole disk", "S"),
    Fault("getattr", "for ever", "whole disk", "S"),
    Fault("close", "for ever", "whole disk", "S"),
    Fault("read", "for ever", "whole disk", "D", "dying"),
    Fault("read", "EIO after seconds", "whole disk", "S"),
]


@pytest.mark.parametrize("fault", IDLE, ids=row)
def test_a_hang_is_found_on_an_idle_disk(fault: Fault, make_scene: MakeScene, beside: Beside) -> None:
    scene = make_scene(fault)
    scene.warm_up()
    verdicts = Verdicts(scene.disk)
    scene.strike()
    scene.wait_held(1)  # the probe: nobody else is there
    scene.goes_offline(verdicts, IDLE_PROBE)
    assert scene.disk.status.load.in_flight == 1
    assert scene.disk.status.counts.timeouts == 0
    if fault.ends_by_itself:
        scene.no_more()
    else:
        scene.lift()
    scene.comes_back_unasked()
    verdicts.end()


@pytest.mark.parametrize(
    "fault", [Fault("read", "EIO", "whole disk", "-"), Fault("read", "EIO", "whole disk", "-", "dying")], ids=row
)
def test_errors_of_an_idle_disk_are_counted_and_are_no_hang(
    fault: Fault, make_scene: MakeScene, beside: Beside
) -> None:
    scene = make_scene(fault)
    scene.warm_up()
    verdicts = Verdicts(scene.disk)
    scene.strike()
    until(lambda: scene.disk.status.counts.errors["EIO"] >= 3, "three probes")
    with pytest.raises(DiskIOError):
        scene.ask(PATIENT)
    scene.lift()
    scene.comes_back_unasked()
    verdicts.end()
    assert set(verdicts.seen) == {State.ONLINE}


def test_slow_and_idle_is_not_offline(make_scene: MakeScene, beside: Beside) -> None:
    scene = make_scene(SLOW)
    scene.warm_up()
    verdicts = Verdicts(scene.disk)
    scene.strike()
    until(lambda: scene.disk.status.load.probes >= 2 and nothing_in_flight(scene.disk), "two probes")
    scene.lift()
    scene.comes_back_unasked()
    verdicts.end()
    assert set(verdicts.seen) == {State.ONLINE}


AT_START = [
    Fault("anything", "for ever", "whole disk", "S"),
    Fault("read", "for ever", "whole disk", "S"),
    Fault("lookup", "for ever", "whole disk", "S"),
    Fault("read", "for ever", "whole disk", "D", "dying"),
    Fault("anything", "for seconds", "whole disk", "S"),
    Fault("anything", "EIO after seconds", "whole disk", "S"),
    Fault("read", "EIO", "whole disk", "-"),
    SLOW,
]


@pytest.mark.parametrize("fault", AT_START, ids=row)
def test_a_disk_that_is_sick_from_the_start(fault: Fault, make_scene: MakeScene, beside: Beside) -> None:
    scene = make_scene(fault)
    disk = scene.disk
    scene.strike()
    began = time.monotonic()
    disk.watch()
    assert time.monotonic() - began < 1, "the start had to wait for the disk"
    verdicts = Verdicts(disk)
    assert disk.status.load.state is State.OFFLINE
    assert disk.status.load.reason == "it has not answered yet"
    if fault.holds:
        scene.wait_held(1)
        refused_at_once(disk, scene.ask)
        gevent.sleep(OFFLINE_AFTER)
        assert disk.status.load.in_flight == 1
        if fault.ends_by_itself:
            scene.no_more()
        else:
            scene.lift()
    until(lambda: disk.status.load.state is not State.OFFLINE, "the first answer")
    assert time.monotonic() - began >= (SECONDS if fault.ends_by_itself else 0)
    if fault.how == "EIO":
        with pytest.raises(DiskIOError):
            scene.ask(PATIENT)
    if not fault.holds:
        scene.lift()
    scene.comes_back_unasked()
    verdicts.end()
    assert set(verdicts.seen) <= {State.OFFLINE, State.ONLINE}, "a disk that was never bad needs no trial"


MID_STREAM = [
    Fault("read", "for ever", "range", "S"),
    Fault("read", "for ever", "range", "D"),
    Fault("read", "for ever", "whole disk", "S"),
    Fault("read", "for ever", "whole disk", "D", "dying"),
    Fault("read", "for seconds", "range", "S"),
    Fault("read", "EIO", "range", "-"),
    Fault("read", "EIO after seconds", "range", "S"),
]


@pytest.mark.parametrize("fault", MID_STREAM, ids=row)
def test_a_stream_that_meets_a_fault(fault: Fault, make_scene: MakeScene, beside: Beside) -> None:
    scene = make_scene(fault)
    disk = scene.disk
    got: list[bytes] = []
    with disk.open("x", deadline=PATIENT) as file:
        scene.warm_up()  # from now on a probe reads `y`
        verdicts = Verdicts(disk)
        chunks = file.chunks(deadline=PATIENT if fault.ends_by_itself else DEADLINE)
        began = time.monotonic()
        got.append(next(chunks))  # the next one is being read already, and its time counts from now
        scene.strike(span=(SIZE - PAGE, SIZE))
        if fault.how == "for seconds":
            got.extend(chunks)
        else:
            error = DiskTimeout if fault.how == "for ever" else DiskIOError
            with pytest.raises(error):
                got.extend(chunks)  # keeps what came before the error
            assert time.monotonic() - began >= {"for ever": DEADLINE, "EIO": 0}.get(fault.how, SECONDS)
        assert time.monotonic() - began < SECONDS + SLACK
        body = b"".join(got)
        assert body == X[: len(body)]
        assert len(body) == SIZE if fault.how == "for seconds" else 0 < len(body) < SIZE
        if fault.how == "for ever":
            scene.wait_held(1)
        if fault.stops_all_progress:
            scene.goes_offline(verdicts, OFFLINE_AFTER)
        else:
            gevent.sleep(OFFLINE_AFTER)  # one stuck request; the probes that are sent meanwhile do complete
            assert State.OFFLINE not in verdicts.seen
        scene.lift()
        scene.comes_back_unasked()
        # The file stayed open: who wants to can go on where it stopped.
        assert file.read(len(body), SIZE, deadline=PATIENT) == X[len(body) :]
        verdicts.end()


# During the drain of a server. Its disks have the default `offline_after`, which is longer than these tests.

DRAIN = [
    Fault("read", "for ever", "whole disk", "D", "dying", "all"),
    Fault("read", "for ever", "whole disk", "S", "faultfs", "one"),
    Fault("open", "for ever", "whole disk", "S", "faultfs", "all"),
    Fault("close", "for ever", "whole disk", "S", "faultfs", "one"),
    Fault("read", "for seconds", "whole disk", "D", "faultfs", "one"),
    Fault("read", "EIO after seconds", "whole disk", "S", "faultfs", "one"),
]
SERVER_THREADS = 2


@pytest.mark.parametrize("fault", DRAIN, ids=row)
def test_a_hang_during_the_drain(fault: Fault, make_scene: MakeScene, tmp_path: Path) -> None:
    scene = make_scene(fault)
    (tmp_path / "well").mkdir()
    (tmp_path / "well" / "file").write_bytes(b"well")
    (tmp_path / "second").mkdir()
    options = ["--disk", f"sick={scene.injector.root}", "--disk", f"well={tmp_path / 'well'}"]
    deadline = PATIENT if fault.ends_by_itself else 1.0
    limits = ["--threads", str(SERVER_THREADS), "--deadline", str(deadline), "--drain-timeout", "20"]
    with contextlib.ExitStack() as stack:
        server = ServerProcess(tmp_path, *options, *limits)
        stack.callback(server.kill)
        stack.callback(scene.lift)  # a process with a thread in state D does not go away
        assert server.http("/v1/sick/y").body == Y
        assert server.http("/v1/well/file").body == b"well"
        scene.strike()
        callers = SERVER_THREADS if fault.slots == "all" else 1
        clients = [stack.enter_context(server.connect()) for _ in range(callers)]
        for client in clients:
            client.send(http_request("/v1/sick/x"))
        until_without_gevent(lambda: server.disk("sick").in_flight >= callers, "the requests to be stuck")
        tasks = [int(task) for task in os.listdir(f"/proc/{server.process.pid}/task")]
        if fault.state == "D":
            until_without_gevent(lambda: [thread_state(task) for task in tasks].count("D") >= callers, "state D")
        assert server.http("/v1/well/file").body == b"well"
        server.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        # A new server has the port at once, whatever the old one still waits for.
        until_without_gevent(lambda: "the port is free again" in server.said(), "the port")
        second = ServerProcess(tmp_path / "second", "--disk", f"well={tmp_path / 'well'}", port=server.port)
        stack.callback(second.kill)
        assert second.http("/v1/well/file").body == b"well"
        assert time.monotonic() - began < 1 + 2 * SLACK  # most of it is the start of an interpreter
        if fault.ends_by_itself:
            scene.no_more()
        # Who was under way still gets an answer: the file or the error when the disk ends it, else at the deadline.
        # A close that hangs is no matter of theirs.
        expected = 200 if fault.where == "close" else {"for seconds": 200, "EIO after seconds": 500}.get(fault.how, 504)
        for client in clients:
            response = client.response()
            assert response.status == expected
            assert expected != 200 or response.body == X
        # A thread that cannot be killed keeps the process until the disk answers, but nobody has to wait for that.
        scene.lift()
        assert server.wait() == 0
        assert time.monotonic() - began < SECONDS + 3 * SLACK
        assert "Traceback" not in server.said()
