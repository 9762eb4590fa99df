"""The injectors do what they say, shown with plain system calls in native threads."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pytest

from . import injectors
from .conftest import set_up
from .injectors import (
    ControlError,
    Dying,
    FaultFS,
    SetupError,
    Throttled,
    drop_cached,
    stuck_threads,
    thread_state,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

PAGE = 4096
MEBIBYTE = 1 << 20


class Call(threading.Thread, Generic[T]):
    """A call in a native thread of its own."""

    def __init__(self, function: Callable[..., T], *args: Any) -> None:
        super().__init__(daemon=True)
        self._call: Callable[[], T] = lambda: function(*args)
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._returned = self._call()
        except BaseException as error:
            self._error = error

    def result(self) -> T:
        self.join(20)
        assert not self.is_alive(), "the call did not return"
        if self._error is not None:
            raise self._error
        return self._returned

    def wait_stuck(self) -> None:
        """Wait until the thread is in uninterruptible sleep."""
        wait_until(lambda: self.native_id in stuck_threads(), "the thread to be stuck")
        assert self.is_alive()


def read_at(path: Path, offset: int = 0, size: int = PAGE) -> bytes:
    """One pread of exactly these bytes (no read-ahead), from a descriptor of its own."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return os.pread(fd, size, offset)
    finally:
        os.close(fd)


def put(disk: FaultFS, name: str, size: int = PAGE) -> Path:
    """Make a file, and return the path that goes through the file system."""
    (disk.backing / name).write_bytes(name.encode() * (size // len(name)))
    return disk.root / name


# FaultFS


def test_one_held_read_holds_up_nobody_else(faultfs: FaultFS) -> None:
    stuck, healthy = put(faultfs, "stuck"), put(faultfs, "healthy")
    faultfs.hang(path="stuck")
    call = Call(read_at, stuck)
    (held,) = faultfs.wait_held(1)
    assert (held.op, held.path, held.thread) == ("read", "stuck", call.native_id)
    assert held.offset == 0
    assert held.size is not None
    assert held.size > 0
    call.wait_stuck()
    assert Call(read_at, healthy).result().startswith(b"healthy")
    assert call.is_alive()
    assert faultfs.release() == 1
    assert call.result().startswith(b"stuck")
    assert faultfs.held() == []


def test_a_range_selects_the_reads_that_overlap_it(make_faultfs: Callable[..., FaultFS]) -> None:
    disk = make_faultfs("--direct-io")
    file = put(disk, "f", 8 * PAGE)
    disk.hang(range=(2 * PAGE, 3 * PAGE))
    assert len(read_at(file, 0, 2 * PAGE)) == 2 * PAGE
    assert len(read_at(file, 3 * PAGE, PAGE)) == PAGE
    calls = [Call(read_at, file, 3 * PAGE - 1, 2), Call(read_at, file, 0, 8 * PAGE)]
    held = disk.wait_held(2)
    assert {(h.offset, h.size) for h in held} == {(3 * PAGE - 1, 2), (0, 8 * PAGE)}
    disk.release()
    assert [len(call.result()) for call in calls] == [2, 8 * PAGE]


def test_a_count_is_used_up(make_faultfs: Callable[..., FaultFS]) -> None:
    disk = make_faultfs("--direct-io")
    file = put(disk, "f")
    disk.hang(count=2)
    calls = [Call(read_at, file), Call(read_at, file)]
    disk.wait_held(2)
    assert read_at(file)
    assert len(disk.held()) == 2
    disk.release()
    assert all(call.result() for call in calls)


@pytest.mark.parametrize(
    ("op", "path"),
    [("lookup", "new"), ("getattr", "f"), ("open", "f"), ("flush", "f"), ("opendir", ""), ("statfs", "")],
)
def test_operations_other_than_reads_hang(make_faultfs: Callable[..., FaultFS], op: str, path: str) -> None:
    disk = make_faultfs("--attr-timeout=0")
    file = put(disk, "f")
    put(disk, "new")
    fd = os.open(file, os.O_RDONLY)
    operations: dict[str, Callable[[], object]] = {
        "lookup": lambda: os.stat(disk.root / "new").st_size,
        "getattr": lambda: os.fstat(fd).st_size,
        "open": lambda: os.close(os.open(file, os.O_RDONLY)),
        "flush": lambda: os.close(os.dup(fd)),
        "opendir": lambda: sorted(os.listdir(disk.root)),
        "statfs": lambda: os.statvfs(disk.root).f_bsize,
    }
    expected = operations[op]()
    if op == "lookup":  # its answer is cached now
        put(disk, "newer")
        path, operations["lookup"] = "newer", lambda: os.stat(disk.root / "newer").st_size
    disk.hang(op, path=path)
    call = Call(operations[op])
    (held,) = disk.wait_held(1)
    assert (held.op, held.path, held.thread) == (op, path, call.native_id)
    assert call.is_alive()
    disk.release()
    assert call.result() == expected or op == "lookup"
    os.close(fd)


@pytest.mark.parametrize("options", [[], ["--direct-io"]], ids=["buffered", "direct_io"])
def test_fail(make_faultfs: Callable[..., FaultFS], options: list[str]) -> None:
    disk = make_faultfs(*options)
    file = put(disk, "f")
    disk.fail(path="f")
    with pytest.raises(OSError, match="Input/output error"):
        read_at(file)
    disk.clear()
    assert read_at(file)
    disk.fail("open", errno=errno.EMFILE, count=1)
    with pytest.raises(OSError, match="Too many open files"):
        read_at(file)
    assert read_at(file)


def test_a_buffered_read_that_failed_once_is_tried_again_by_the_kernel(faultfs: FaultFS) -> None:
    file = put(faultfs, "f")
    faultfs.fail(count=1)
    assert read_at(file)
    assert faultfs.counters()["read"] == 2


def test_hang_then_fail(make_faultfs: Callable[..., FaultFS]) -> None:
    disk = make_faultfs("--direct-io")
    file = put(disk, "f")
    disk.hang_then_fail()
    call = Call(read_at, file)
    disk.wait_held(1)
    disk.release()
    with pytest.raises(OSError, match="Input/output error"):
        call.result()
    disk.hang_then_fail("open", errno=errno.EACCES, seconds=0.01)
    with pytest.raises(PermissionError):
        read_at(file)


def test_hang_then_fail_of_a_buffered_read(faultfs: FaultFS) -> None:
    file = put(faultfs, "f")
    faultfs.hang_then_fail(count=1)
    faultfs.fail()
    call = Call(read_at, file)
    faultfs.wait_held(1)
    call.wait_stuck()
    faultfs.answer()
    with pytest.raises(OSError, match="Input/output error"):
        call.result()


def test_release_with_an_error(make_faultfs: Callable[..., FaultFS]) -> None:
    disk = make_faultfs("--direct-io")
    file = put(disk, "f")
    disk.hang()
    call = Call(read_at, file)
    disk.wait_held(1)
    disk.release(errno=errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        call.result()


def test_delay(faultfs: FaultFS) -> None:
    file = put(faultfs, "f")
    faultfs.delay(0.2, path="f", count=1)
    start = time.monotonic()
    assert read_at(file)
    assert time.monotonic() - start >= 0.2


def test_answering_one_of_many(make_faultfs: Callable[..., FaultFS]) -> None:
    disk = make_faultfs("--direct-io")
    files = [put(disk, name) for name in ("a", "b", "c")]
    disk.hang()
    calls = [Call(read_at, file) for file in files]
    disk.wait_held(3)
    assert disk.answer(path="b") == 1
    assert calls[1].result()
    assert {held.path for held in disk.held()} == {"a", "c"}
    later = Call(read_at, files[1])
    disk.wait_held(3)  # the rule is still there
    assert disk.answer(count=2) == 2
    wait_until(lambda: not (calls[0].is_alive() or calls[2].is_alive()), "the oldest two to return")
    assert [held.path for held in disk.held()] == ["b"]
    disk.clear()
    assert read_at(files[0])
    assert later.is_alive()
    assert disk.release() == 1
    assert later.result()


@pytest.mark.parametrize("options", [[], ["--direct-io"]], ids=["buffered", "direct_io"])
def test_those_who_are_stuck_get_enotconn_when_the_daemon_dies(
    make_faultfs: Callable[..., FaultFS], options: list[str]
) -> None:
    disk = make_faultfs(*options)
    file = put(disk, "f")
    disk.hang()
    call = Call(read_at, file)
    disk.wait_held(1)
    disk.kill()
    with pytest.raises(OSError, match="Transport endpoint is not connected"):
        call.result()
    with pytest.raises(OSError, match="Transport endpoint is not connected"):
        read_at(file)
    with pytest.raises(ControlError, match="has ended"):
        disk.held()


@pytest.mark.parametrize("options", [[], ["--direct-io"]], ids=["buffered", "direct_io"])
def test_fifty_reads_are_held_at_once(make_faultfs: Callable[..., FaultFS], options: list[str]) -> None:
    disk = make_faultfs(*options)
    # Reads of more than a page: those of one page are not subject to the limit of the kernel (max_background).
    size = 16 * PAGE
    files = [put(disk, f"f{k}", 10 * size) for k in range(50)]
    healthy = put(disk, "healthy", 10 * size)
    disk.hang(path="f*")
    calls = [Call(read_at, file, 0, size) for file in files]
    held = disk.wait_held(50)
    assert {request.path for request in held} == {file.name for file in files}
    assert len(Call(read_at, healthy, 0, size).result()) == size
    assert disk.release() == 50
    assert [len(call.result()) for call in calls] == [size] * 50


def test_keep_cache_needs_dontneed_to_read_again(make_faultfs: Callable[..., FaultFS]) -> None:
    disk = make_faultfs("--keep-cache")
    file = put(disk, "f")

    def reads() -> int:
        return disk.counters().get("read", 0)

    expected = read_at(file)
    first = reads()
    disk.hang()
    assert read_at(file) == expected  # from the page cache: a read that reached the disk would hang
    assert reads() == first
    drop_cached(file)
    call = Call(read_at, file)
    disk.wait_held(1)
    disk.release()
    assert call.result() == expected


def test_without_keep_cache_an_open_empties_the_cache(faultfs: FaultFS) -> None:
    file = put(faultfs, "f")
    read_at(file)
    before = faultfs.counters()["read"]
    read_at(file)
    assert faultfs.counters()["read"] > before


def test_whoever_waits_may_do_other_things_meanwhile(faultfs: FaultFS) -> None:
    file = put(faultfs, "f")
    faultfs.hang()
    calls: list[Call[bytes]] = []

    def sleep(_seconds: float) -> None:
        if not calls:
            calls.append(Call(read_at, file))

    assert len(faultfs.wait_held(1, sleep=sleep)) == 1
    faultfs.release()
    assert calls[0].result()


def test_names_and_attributes_are_cached(faultfs: FaultFS) -> None:
    file = put(faultfs, "f")
    os.stat(file)
    faultfs.hang("lookup")
    faultfs.hang("getattr")
    assert os.stat(file).st_size


def test_files_are_written_through(faultfs: FaultFS) -> None:
    (faultfs.root / "d").mkdir()
    (faultfs.root / "d" / "a").write_bytes(b"hello")
    os.rename(faultfs.root / "d", faultfs.root / "e")
    os.truncate(faultfs.root / "e" / "a", 2)
    os.utime(faultfs.root / "e" / "a", (1, 2))
    os.chmod(faultfs.root / "e" / "a", 0o600)
    real = faultfs.backing / "e" / "a"
    assert real.read_bytes() == b"he"
    assert (real.stat().st_mode & 0o777, real.stat().st_mtime) == (0o600, 2)
    assert os.listdir(faultfs.root / "e") == ["a"]
    (faultfs.root / "e" / "a").unlink()
    (faultfs.root / "e").rmdir()
    assert os.listdir(faultfs.backing) == []


def test_extended_attributes_are_passed_through(faultfs: FaultFS) -> None:
    file, real = put(faultfs, "f"), faultfs.backing / "f"
    os.setxattr(file, "user.a", b"one")
    os.setxattr(file, "user.b", bytes(3000))
    assert os.getxattr(real, "user.a") == b"one"
    assert os.getxattr(file, "user.b") == bytes(3000)
    assert {"user.a", "user.b"} <= set(os.listxattr(file))
    os.removexattr(file, "user.a")
    for gone in (lambda: os.getxattr(file, "user.a"), lambda: os.setxattr(file, "user.b", b"", os.XATTR_CREATE)):
        with pytest.raises(OSError, match=r"No data available|File exists"):
            gone()


def test_a_hung_getxattr_is_held(faultfs: FaultFS) -> None:
    file = put(faultfs, "f")
    os.setxattr(file, "user.a", b"one")
    faultfs.hang("getxattr")
    with ThreadPoolExecutor() as pool:
        value = pool.submit(os.getxattr, file, "user.a")
        assert faultfs.wait_held(1)[0].op == "getxattr"
        faultfs.release()
        assert value.result(10) == b"one"


def test_many_names_are_listed(faultfs: FaultFS) -> None:
    names = {f"a-rather-long-name-{k}" for k in range(500)}
    for name in names:
        (faultfs.backing / name).touch()
    assert set(os.listdir(faultfs.root)) == names


def test_commands_without_meaning_are_refused(faultfs: FaultFS) -> None:
    with pytest.raises(ControlError, match="unknown op 'raed'"):
        faultfs.hang("raed")
    with pytest.raises(ControlError, match="a range selects reads"):
        faultfs.hang("open", range=(0, 1))
    with pytest.raises(ControlError, match="--max-stall"):
        faultfs.delay(61)
    assert read_at(put(faultfs, "f"))


def test_an_unknown_option_is_explained() -> None:
    set_up(FaultFS).close()
    with pytest.raises(SetupError, match="unrecognized arguments: --foo"):
        FaultFS("--foo")


def test_only_the_main_thread_may_start_a_daemon() -> None:
    set_up(FaultFS).close()
    with pytest.raises(SetupError, match="main thread"):
        Call(FaultFS).result()


# Throttled


def read_throttled(disk: Throttled, name: str, size: int = PAGE) -> bytes:
    disk.enter_thread()
    return read_at(disk.root / name, size=size)


def test_throttled_stalls_those_who_entered(throttled: Throttled) -> None:
    cached = read_at(throttled.root / "f0")
    throttled.stall()
    call = Call(read_throttled, throttled, "f1")
    call.wait_stuck()
    assert len(read_at(throttled.root / "f2")) == PAGE  # this thread has not entered
    assert Call(read_throttled, throttled, "f0").result() == cached
    assert call.is_alive()
    throttled.lift()
    assert len(call.result()) == PAGE


def test_throttled_stalls_again_after_it_was_lifted(throttled: Throttled) -> None:
    expected = read_at(throttled.root / "f0")
    for _ in range(3):
        drop_cached(throttled.root / "f0")
        throttled.stall()
        call = Call(read_throttled, throttled, "f0")
        call.wait_stuck()
        throttled.lift()
        assert call.result() == expected


def test_throttled_slows_down(throttled: Throttled) -> None:
    throttled.slow(MEBIBYTE)
    start = time.monotonic()
    assert len(Call(read_throttled, throttled, "f0", MEBIBYTE // 2).result()) == MEBIBYTE // 2
    assert time.monotonic() - start > 0.25  # 0.5 s but for the accounting of the kernel, by slices of 0.1 s
    with pytest.raises(ValueError, match="lift"):
        throttled.slow(0)


def test_throttled_stalls_a_process(throttled: Throttled) -> None:
    list(throttled.root.iterdir())
    command = "import sys; sys.stdin.readline(); print(len(open(sys.argv[1], 'rb').read(4096)))"
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", command, str(throttled.root / "f3")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as reader:
        throttled.enter_process(reader.pid)
        throttled.stall()
        assert reader.stdin is not None
        reader.stdin.write("go\n")
        reader.stdin.flush()
        wait_until(lambda: thread_state(reader.pid) == "D", "the process to be stuck")
        throttled.lift()
        assert reader.communicate()[0] == "4096\n"


# Dying


def test_dying_stops_and_resumes(dying: Dying) -> None:
    cached = read_at(dying.root / "f0")
    dying.stop()
    call = Call(read_at, dying.root / "f1")
    call.wait_stuck()
    assert Call(read_at, dying.root / "f0").result() == cached
    assert call.is_alive()
    dying.resume()
    assert len(call.result()) == PAGE


def test_dying_holds_exactly_one_read(dying: Dying) -> None:
    fd = os.open(dying.root / "f1", os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    dying.hang(count=1)
    call = Call(os.pread, fd, PAGE, 0)
    (held,) = dying.wait_held(1)
    assert (held.op, held.size) == ("read", PAGE)
    call.wait_stuck()
    assert len(Call(os.pread, fd, PAGE, 64 * PAGE).result()) == PAGE
    assert call.is_alive()
    assert dying.release() == 1
    assert len(call.result()) == PAGE
    os.close(fd)


def test_dying_fails_a_range_of_the_device(dying: Dying) -> None:
    assert read_at(dying.root / "f1")
    drop_cached(dying.root / "f1")
    dying.hang()
    call = Call(read_at, dying.root / "f1")
    (held,) = dying.wait_held(1)
    assert held.offset is not None
    dying.release()
    expected = call.result()
    dying.fail(range=(held.offset, held.offset + PAGE))
    drop_cached(dying.root / "f1")
    with pytest.raises(OSError, match="Input/output error"):
        read_at(dying.root / "f1")
    assert read_at(dying.root / "f1", offset=64 * PAGE)
    dying.release()
    assert read_at(dying.root / "f1") == expected


def test_dying_dead_for_good(dying: Dying) -> None:
    dying.hang()
    call = Call(read_at, dying.root / "f1")
    dying.wait_held(1)
    dying.faultfs.kill()
    with pytest.raises(OSError, match="Input/output error"):
        call.result()


def test_dying_says_that_it_is_stopped(dying: Dying, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(injectors, "CONTROL_SECONDS", 0.05)
    dying.stop()
    with pytest.raises(ControlError, match="stopped"):
        dying.held()
    dying.resume()
    monkeypatch.undo()
    assert dying.held() == []


# What is left behind

INJECTORS = [FaultFS, Throttled, Dying]


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory in which the injectors make theirs; a short name, since paths of sockets are short."""
    with tempfile.TemporaryDirectory(prefix="scratch-") as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield Path(directory)


def children() -> set[int]:
    """The processes that this one has started and not waited for."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if int(stat.read_text().rpartition(") ")[2].split()[1]) == os.getpid():
                found.add(int(stat.parent.name))
    return found


def leftovers(scratch: Path) -> list[str]:
    """Mounts, loop devices, cgroups, processes and files that an injector has left."""
    loops = subprocess.run(["losetup", "-a"], capture_output=True, text=True, check=True).stdout.splitlines()
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    return [
        *(line for line in mounts + loops if str(scratch) in line),
        *map(str, Path("/sys/fs/cgroup").glob(f"**/throttled-{os.getpid()}-*")),
        *(f"process {pid}" for pid in children()),
        *os.listdir(scratch),
    ]


def stall(disk: FaultFS | Throttled | Dying) -> Call[bytes]:
    """Have a thread that is stuck in a read from the disk."""
    if isinstance(disk, Throttled):
        disk.stall()
        call = Call(read_throttled, disk, "f1")
    elif isinstance(disk, Dying):
        disk.stop()
        call = Call(read_at, disk.root / "f1")
    else:
        file = put(disk, "f")
        disk.hang()
        call = Call(read_at, file)
    call.wait_stuck()
    return call


@pytest.mark.parametrize("injector", INJECTORS)
def test_close_frees_those_who_are_stuck_and_leaves_nothing(injector: type[Any], scratch: Path) -> None:
    before = children()
    disk = set_up(injector)
    assert leftovers(scratch)
    call = stall(disk)
    disk.close()
    call.join(20)
    assert not call.is_alive()
    disk.close()
    assert leftovers(scratch) == []
    assert children() <= before


@pytest.mark.parametrize("injector", [FaultFS, Dying])
def test_close_leaves_nothing_after_the_daemon_died(injector: type[Any], scratch: Path) -> None:
    with set_up(injector) as disk:
        disk.process.kill()
    assert leftovers(scratch) == []


@pytest.mark.parametrize("injector", [Throttled, Dying])
@pytest.mark.parametrize("step", ["mkfs.ext4", "losetup", "mount"])
def test_a_set_up_that_fails_half_way_leaves_nothing(
    injector: type[Any], step: str, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up(injector).close()
    run = injectors._run

    def fail(*command: str | Path) -> str:
        if command[0] == step:
            raise SetupError(f"{step} fails")
        return run(*command)

    monkeypatch.setattr(injectors, "_run", fail)
    with pytest.raises(SetupError, match=f"{step} fails"):
        injector()
    monkeypatch.setattr(injectors, "_run", run)
    assert leftovers(scratch) == []


HOLDS_THE_GIL = """
import ctypes, os, sys
from tests.faults.injectors import *
with {injector}(max_stall=0.5) as disk:
    if isinstance(disk, FaultFS):
        (disk.backing / "f1").write_bytes(bytes(4096))
    fd = os.open(disk.root / "f1", os.O_RDONLY)
    if isinstance(disk, Throttled):
        disk.enter_thread()
        disk.stall()
    elif isinstance(disk, Dying):
        disk.stop()
    else:
        disk.hang()
    buffer = ctypes.create_string_buffer(4096)
    print(ctypes.PyDLL(None).pread(fd, buffer, 4096, 0))
    os.close(fd)
"""


@pytest.mark.parametrize("injector", INJECTORS)
def test_a_stall_ends_by_itself_even_for_a_read_that_holds_the_gil(injector: type[Any]) -> None:
    set_up(injector).close()
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HOLDS_THE_GIL.format(injector=injector.__name__)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("4096\n", "")
    assert time.monotonic() - start >= 0.5


KILLED_WHILE_STUCK = """
import os
from tests.faults.injectors import *
disk = FaultFS()
(disk.backing / "f").write_bytes(bytes(4096))
disk.hang()
print(disk.process.pid, disk.root, flush=True)
(disk.root / "f").read_bytes()
"""


def test_the_daemon_dies_with_the_test_run(scratch: Path) -> None:
    set_up(FaultFS).close()
    with subprocess.Popen(
        [sys.executable, "-c", KILLED_WHILE_STUCK],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stdout is not None
        daemon, _, root = run.stdout.readline().rstrip().partition(" ")
        wait_until(lambda: thread_state(run.pid) == "D", "the read to be stuck")
        run.kill()
        assert run.wait(20) == -signal.SIGKILL
        try:
            wait_until(lambda: thread_state(int(daemon)) in ("", "Z"), "the daemon to die")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(daemon), signal.SIGKILL)
            subprocess.run(["umount", "-l", root], check=True)


# Where an injector cannot be used


@pytest.mark.parametrize("injector", INJECTORS)
def test_without_root_the_reason_is_given(injector: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "needs root" in injector.why_not()
    with pytest.raises(SetupError, match="needs root"):
        injector()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.skip.Exception, match="needs root"):
        set_up(injector)


@pytest.mark.parametrize("injector", INJECTORS)
def test_in_ci_a_failure_is_not_a_skip(injector: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    set_up(injector).close()

    def fail(_self: object) -> None:
        raise SetupError("broken")

    monkeypatch.setattr(injector, "_set_up", fail)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="broken"):
        set_up(injector)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(SetupError, match="broken"):
        set_up(injector)


def test_in_ci_a_missing_program_is_not_a_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    set_up(Throttled).close()
    monkeypatch.setenv("PATH", "/nowhere")
    assert "needs mkfs.ext4" in (Throttled.why_not() or "")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(SetupError, match="install e2fsprogs"):
        set_up(Throttled)
