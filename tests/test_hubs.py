"""What a disk promises, on every event loop that it can live in, and to plain threads: the same tests for all."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import pytest

from diskread import Disk, DiskBusy, DiskError, DiskOffline, DiskTimeout, Limits, Mirror, State, hubs
from diskread.hubs import NAMES, HubName

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from diskread import threads
    from diskread.hubs import Spawned

    from .conftest import RunScript

    AnyDisk = Disk | threads.Disk

Result = TypeVar("Result")

LONG = 20.0
"""Seconds: longer than any test waits."""

TINY: dict[str, Any] = {"threads": 2, "queue": 1, "deadline": LONG, "inline": "off", "idle": 0.2}


class Pipe:
    """A blocking call that returns when a test says so: a read of an empty pipe."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()

    def wait(self) -> bytes:
        return os.read(self._reader, 1)

    def release(self, times: int = 1) -> None:
        os.write(self._writer, b"x" * times)

    def close(self) -> None:
        os.close(self._reader)
        os.close(self._writer)


class World:
    """One event loop, and what a test does in it."""

    def __init__(self, name: HubName, engine: Literal["threadpool", "native"]) -> None:
        self.name = name
        self._engine: Literal["threadpool", "native"] = engine
        self._disks: list[Disk] = []
        self.pipe = Pipe()

    def disk(self, name: str = "d1", root: Path | None = None, **limits: Any) -> Disk:
        disk = Disk(name, root, Limits(**{**TINY, "engine": self._engine, **limits}), hub=self.name)
        self._disks.append(disk)
        return disk

    def spawn(self, function: Callable[..., Result], *args: Any) -> Spawned[Result | DiskError]:
        def attempt() -> Result | DiskError:
            try:
                return function(*args)
            except DiskError as error:
                return error

        return hubs.current(self.name).spawn(attempt)

    def sleep(self, seconds: float) -> None:
        hub = hubs.current(self.name)
        waiter = hub.waiter()
        hub.timer(seconds, waiter.switch, True, ref=True)
        waiter.get()

    def until(self, condition: Callable[[], bool]) -> None:
        ends = time.monotonic() + LONG
        while not condition():
            assert time.monotonic() < ends, "it never came"
            self.sleep(0.01)

    def close(self) -> None:
        """Let everything go, in the loop; every test ends with nothing under way."""
        for disk in self._disks:
            self.until(lambda disk=disk: disk.status.load.in_flight == 0)  # type: ignore[misc]
            disk.close()
        for disk in self._disks:
            self.until(lambda disk=disk: disk.status.load.threads == 0)  # type: ignore[misc]
        self.pipe.close()

    def run(self, test: Callable[[World], None]) -> None:
        """Run a test in a greenlet of the loop."""

        def whole() -> None:
            try:
                test(self)
            finally:
                self.pipe.release(10)  # whatever is still stuck in it
                self.close()

        if self.name == "asyncio":
            from diskread.hubs.asyncio import run

            asyncio.run(run(whole))
        elif self.name == "eventlet":
            import eventlet

            eventlet.spawn(whole).wait()
        else:
            import gevent

            gevent.spawn(whole).get()


class Attempt:
    """A function that runs in a native thread of its own."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._result: Any = None
        self._thread = threading.Thread(target=self._run, args=(function,), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[..., Any]) -> None:
        self._result = function()

    def get(self) -> Any:
        self._thread.join(LONG)
        assert not self._thread.is_alive(), "it never came"
        return self._result


class Threads(World):
    """No event loop: native threads, and the disks of `diskread.threads`."""

    def disk(self, name: str = "d1", root: Path | None = None, **limits: Any) -> Any:
        from diskread import threads

        disk = threads.Disk(name, root, Limits(**{**TINY, "engine": self._engine, **limits}))
        self._disks.append(disk)  # type: ignore[arg-type]
        return disk

    def spawn(self, function: Callable[..., Any], *args: Any) -> Any:
        def attempt() -> Any:
            try:
                return function(*args)
            except DiskError as error:
                return error

        return Attempt(attempt)

    def sleep(self, seconds: float) -> None:
        from diskread import threads

        threads.Disk("any", None).status  # noqa: B018 - starts the loop, whose thread and descriptors stay
        time.sleep(seconds)

    def run(self, test: Callable[[World], None]) -> None:
        try:
            test(self)
        finally:
            self.pipe.release(10)  # whatever is still stuck in it
            self.close()


@pytest.fixture(params=[*NAMES, "threads"])
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    if found == "threads" and request.node.get_closest_marker("of_loops"):
        pytest.skip("of loops alone")
    if found == "eventlet":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it calls itself deprecated
            pytest.importorskip("eventlet")
    return found


@pytest.fixture(params=["threadpool", "native"])
def world(request: pytest.FixtureRequest, name: str) -> World:
    return new_world(name, request.param)


def new_world(name: str, engine: Literal["threadpool", "native"]) -> World:
    return Threads(name, engine) if name == "threads" else World(name, engine)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def nothing_stays(name: str) -> Iterator[None]:
    """No descriptor and no thread is left behind."""
    hubs_own = new_world(name, "threadpool")
    hubs_own.run(lambda world: world.sleep(0))  # the loop opens its own descriptors now
    before = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    yield
    ends = time.monotonic() + LONG
    while (now := (len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")))) > before:
        assert time.monotonic() < ends, f"descriptors and threads: {before} before, {now} after"
        time.sleep(0.01)


def test_what_a_call_returns_or_raises_comes_through(world: World) -> None:
    def test(world: World) -> None:
        disk = world.disk()
        assert disk.run(divmod, 7, 2) == (3, 1)
        with pytest.raises(FileNotFoundError):
            disk.run(os.listdir, "/nowhere/at/all")
        assert disk.status.counts.reads == 1

    world.run(test)


def test_reads_and_streams(world: World, tmp_path: Path) -> None:
    content = os.urandom(700_001)
    (tmp_path / "a").write_bytes(content)

    def test(world: World) -> None:
        for inline in ("off", "auto"):
            disk = world.disk(root=tmp_path, inline=inline)
            assert disk.stat("a").size == len(content)
            for _ in range(2):
                assert disk.read("a") == content
                assert disk.read("a", 5, 70) == content[5:75]
                with disk.open("a") as file:
                    assert b"".join(file.chunks(3)) == content[3:]
                    assert file.read(600_000) == content[600_000:]
            with pytest.raises(DiskError, match="No such file"):
                disk.read("b")

    world.run(test)


def test_a_stuck_call_ends_at_its_deadline_and_holds_nobody_up(world: World) -> None:
    def test(world: World) -> None:
        stuck, well = world.disk("stuck"), world.disk("well")
        ticks = 0
        asked = time.monotonic()
        attempt = world.spawn(lambda: stuck.run(world.pipe.wait, deadline=0.5))
        while stuck.status.counts.timeouts == 0:
            assert well.run(abs, -ticks) == ticks
            world.sleep(0.01)
            ticks += 1
        took = time.monotonic() - asked
        error = attempt.get()
        assert isinstance(error, DiskTimeout)
        assert (error.started, 0.5 <= took < LONG / 3) == (True, True)
        assert ticks >= 5
        # Its slot is its own until the system call returns, and free then.
        assert stuck.status.load.in_flight == 1
        world.pipe.release()
        world.until(lambda: stuck.status.load.in_flight == 0)

    world.run(test)


def test_stuck_calls_use_up_no_more_than_their_slots(world: World) -> None:
    def test(world: World) -> None:
        disk = world.disk()
        stuck = [world.spawn(disk.run, world.pipe.wait) for _ in range(2)]
        world.until(lambda: disk.status.load.in_flight == 2)
        waits = world.spawn(disk.run, abs, -1)
        world.until(lambda: disk.status.load.waiting == 1)
        with pytest.raises(DiskBusy):
            disk.run(abs, -2)
        with pytest.raises(DiskBusy):  # also one that would have to wait in line
            disk.run(abs, -3, deadline=0.05)
        assert disk.status.load.threads <= 4  # a native engine's threads for reads and for calls; see `NativeEngine`
        world.pipe.release(2)
        assert [each.get() for each in stuck] == [b"x", b"x"]
        assert waits.get() == 1

    world.run(test)


@pytest.mark.of_loops
def test_who_is_killed_leaves_at_once_and_the_slot_comes_back(world: World) -> None:
    def test(world: World) -> None:
        disk = world.disk()
        attempt = world.spawn(disk.run, world.pipe.wait)
        world.until(lambda: disk.status.load.in_flight == 1)
        attempt.kill()
        world.until(lambda: disk.status.counts.abandoned == 1)
        assert disk.status.load.in_flight == 1
        world.pipe.release()
        world.until(lambda: disk.status.load.in_flight == 0)
        assert disk.run(abs, -1) == 1

    world.run(test)


@pytest.mark.of_loops
def test_who_waits_in_line_and_is_killed_never_starts(world: World) -> None:
    def test(world: World) -> None:
        disk = world.disk()
        started: list[int] = []
        stuck = [world.spawn(disk.run, world.pipe.wait) for _ in range(2)]
        world.until(lambda: disk.status.load.in_flight == 2)
        attempt = world.spawn(disk.run, started.append, 1)
        world.until(lambda: disk.status.load.waiting == 1)
        attempt.kill()
        world.until(lambda: disk.status.load.waiting == 0)
        world.pipe.release(2)
        assert [each.get() for each in stuck] == [b"x", b"x"]
        assert started == []

    world.run(test)


def test_a_disk_without_progress_goes_offline_and_comes_back(world: World, tmp_path: Path) -> None:
    def test(world: World) -> None:
        disk = world.disk(root=tmp_path, offline_after=0.3, idle_probe=60)
        changes: list[State] = []
        disk.on_change = lambda state, _reason: changes.append(state)
        attempts = [world.spawn(lambda: disk.run(world.pipe.wait, deadline=0.5)) for _ in range(2)]
        world.until(lambda: disk.status.load.state is State.OFFLINE)
        asked = time.monotonic()
        with pytest.raises(DiskOffline):
            disk.run(abs, -1)
        assert time.monotonic() - asked < 0.25 * LONG
        assert all(isinstance(each.get(), DiskError) for each in attempts)
        world.pipe.release(2)
        world.until(lambda: disk.status.load.accepting)
        assert disk.run(abs, -1) == 1  # one may try, and shows that it is well again
        world.until(lambda: changes[-1:] == [State.ONLINE])
        assert State.OFFLINE in changes

    world.run(test)


def test_many_at_once(world: World) -> None:
    def test(world: World) -> None:
        disk = world.disk(threads=4, queue=1000)
        attempts = [world.spawn(disk.run, pow, 2, each) for each in range(200)]
        assert [each.get() for each in attempts] == [2**each for each in range(200)]
        times = [world.spawn(disk.stall, 0.001) for _ in range(100)]
        assert not [each for each in (each.get() for each in times) if isinstance(each, DiskError)]

    world.run(test)


@pytest.mark.of_loops
def test_a_mirror_goes_on_without_the_disk_that_hangs(world: World, tmp_path: Path) -> None:
    for each in ("d1", "d2"):
        (tmp_path / each).mkdir()
        (tmp_path / each / "a").write_bytes(b"the same" * 100_000)
        os.utime(tmp_path / each / "a", (1, 1))

    def test(world: World) -> None:
        disks = [world.disk(each, tmp_path / each, threads=1) for each in ("d1", "d2")]
        mirror = Mirror("m", disks, hedge_after=0.05, hedge_share=1)
        stuck = world.spawn(disks[0].run, world.pipe.wait)
        world.until(lambda: disks[0].status.load.in_flight == 1)
        for _ in range(3):  # each takes its turn at being asked first
            assert mirror.read("a", 0, 8) == b"the same"
            with mirror.open("a") as file:
                assert b"".join(file.chunks()) == b"the same" * 100_000
        world.pipe.release()
        assert stuck.get() == b"x"

    world.run(test)


@pytest.mark.of_loops
def test_it_belongs_to_one_thread(world: World) -> None:
    def test(world: World) -> None:
        disk, errors = world.disk(), []
        disk.run(abs, -1)

        def elsewhere() -> None:
            try:
                disk.run(abs, -1)
            except RuntimeError as error:
                errors.append(str(error))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert len(errors) == 1
        assert "belongs to" in errors[0]

    world.run(test)


@pytest.mark.of_loops
def test_the_loop_itself_must_not_wait(world: World) -> None:
    def test(world: World) -> None:
        disk, errors = world.disk(), []

        def in_the_loop() -> None:
            try:
                disk.run(abs, -1)
            except RuntimeError as error:
                errors.append(str(error))

        hubs.current(world.name).soon(in_the_loop)
        world.until(lambda: bool(errors))
        assert "must not wait" in errors[0]

    world.run(test)


def test_idle_threads_leave(world: World) -> None:
    def test(world: World) -> None:
        disk = world.disk()
        for each in [world.spawn(disk.stall, 0.05), world.spawn(disk.run, time.sleep, 0.05)]:
            each.get()
        assert disk.status.load.threads >= 1
        world.until(lambda: disk.status.load.threads == 0)
        assert disk.run(abs, -1) == 1

    world.run(test)


def test_a_file_that_nobody_closes_is_closed(world: World, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 200_000)

    def test(world: World) -> None:
        disk = world.disk(root=tmp_path)
        disk.read("a")
        before = len(os.listdir("/proc/self/fd"))
        with pytest.warns(ResourceWarning, match="unclosed"):
            disk.open("a")
        world.until(lambda: len(os.listdir("/proc/self/fd")) <= before)

    world.run(test)


def test_an_unknown_hub_is_refused() -> None:
    with pytest.raises(ValueError, match="hub must be one of 'gevent', 'eventlet', 'asyncio', not 'twisted'"):
        Disk("d1", None, hub="twisted")  # type: ignore[arg-type]


PATCHED = {
    "gevent": "import gevent.monkey; gevent.monkey.patch_all(); import gevent; from gevent import spawn, sleep\n",
    "eventlet": (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import eventlet; eventlet.monkey_patch(); from eventlet import spawn, sleep\n"
        "eventlet.hubs.use_hub('poll')  # after a fork, eventlet's epoll would be that of both processes\n"
    ),
}


@pytest.mark.of_loops
@pytest.mark.parametrize("engine", ["threadpool", "native"])
def test_programs_that_are_patched_or_forked(name: str, engine: str, run_script: RunScript) -> None:
    """The patches put their own in place of threads and thread numbers; a fork leaves all threads behind."""
    if name == "asyncio":
        pytest.skip("nobody patches for asyncio")
    found = run_script(
        PATCHED[name] + "import os, time, diskread\n"
        f"limits = diskread.Limits(threads=2, engine={engine!r}, inline='off')\n"
        f"disk = diskread.Disk('d1', '/', limits, hub={name!r})\n"
        "reader, writer = os.pipe()\n"
        "from diskread._syscalls import stall\n"
        "stuck = spawn(disk.run, stall, 0.5)\n"
        "ticks = 0\n"
        "while disk.status.counts.reads == 0:\n"
        "    sleep(0.01); ticks += 1\n"
        "print(ticks > 3, len(disk.read('etc/passwd', 0, 4)))\n"
        "child = os.fork()\n"
        "print(disk.run(abs, -5), len(disk.read('etc/passwd', 0, 4)), flush=True)\n"
        "if not child: os._exit(0)\n"
        "print(os.waitpid(child, 0)[1])\n",
    )
    assert (found.returncode, found.stderr) == (0, "")
    lines = found.stdout.splitlines()
    assert (lines[0], sorted(lines[1:])) == ("True 4", ["0", "5 4", "5 4"])


def test_the_library_imports_no_loop(run_script: RunScript) -> None:
    found = run_script(
        "import sys, diskread\ndiskread.Disk('d1', '/nowhere').status\n"
        "print([name for name in ('gevent', 'eventlet', 'asyncio', 'greenlet') if name in sys.modules])\n"
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "[]\n", "")
