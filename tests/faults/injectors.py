"""Disks that really hang: three ways to make one, and to put everything back afterwards.

    with FaultFS() as disk:
        (disk.backing / "a").write_bytes(b"hello")
        disk.hang(path="a")
        ...  # whoever reads disk.root / "a" now waits in the kernel
        disk.wait_held(1)
        disk.release()

`FaultFS` is the one to start with: every operation can hang and it knows exactly which requests it holds.
`Throttled` and `Dying` are an ext4 on a block device, with all that the kernel does there: page cache,
read-ahead, threads in uninterruptible sleep; or, to be written to, an empty ext4 or XFS. None of them touches a disk of
the machine. Each needs root and says in `why_not()` what else is missing.

Every stall ends by itself after `max_stall` seconds, because some of those who wait cannot be killed. What
sees to it runs outside of this process (in the daemon, or as a child): a thread would be stopped by the very
reads that some tests are about, those that hang while they hold the GIL.
"""

# "range" is what the argument is called on the wire of faultfs, and what it is.
# ruff: noqa: A002

from __future__ import annotations

import contextlib
import ctypes
import errno as errnos
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

FAULTFS = Path(__file__).with_name("faultfs.py")

MNT_FORCE, MNT_DETACH = 1, 2  # sys/mount.h
CONTROL_SECONDS = 5.0  # for the daemon to answer a command
CLEANUP_SECONDS = 5.0  # for those who were stuck to close their files, so that nothing is busy any more
STUCK_BYTES_PER_SECOND = 1  # 0 would mean no limit

_libc = ctypes.CDLL(None, use_errno=True)
_InjectorT = TypeVar("_InjectorT", bound="_Injector")


class SetupError(RuntimeError):
    """An injector could not be set up on this machine."""


class ControlError(RuntimeError):
    """The faultfs daemon has ended, is stopped, or refused a command."""


def wait_until(
    condition: Callable[[], object],
    what: str,
    timeout: float = 10.0,
    sleep: Callable[[float], object] = time.sleep,
) -> None:
    """Return as soon as the condition holds.

    Args:
        condition: asked every few milliseconds.
        what: what is waited for, for the error message.
        timeout: how long to wait at most, in seconds.
        sleep: how to wait; gevent.sleep where greenlets have to run meanwhile.

    Raises:
        TimeoutError: the condition did not hold in time.
    """
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout} s for {what}")
        sleep(0.002)


def thread_state(thread: int) -> str:
    """The state of a thread (by native id) or process, a letter of proc_pid_stat(5); "" if gone."""
    try:
        stat = Path(f"/proc/{thread}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return stat.rpartition(") ")[2][0]


def stuck_threads() -> list[int]:
    """Native ids of the threads of this process in uninterruptible sleep (state D)."""
    return [thread for thread in map(int, os.listdir("/proc/self/task")) if thread_state(thread) == "D"]


def drop_cached(path: Path) -> None:
    """Take the file's pages out of the page cache, so that the next read needs the disk again."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)  # dirty pages would stay
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _run(*command: str | Path) -> str:
    """Run the command and return what it says.

    Raises:
        SetupError: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        complaint = " ".join(done.stderr.split())
        raise SetupError(f"{' '.join(map(str, command))}: {complaint}")
    return done.stdout.strip()


def _mount_points() -> set[str]:
    # See proc_pid_mounts(5): a space in a name is written \040.
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return {line.split()[1].replace("\\040", " ") for line in lines}


def _umount(path: Path, flags: int) -> bool:
    """Unmount by umount2(2), which unlike umount(8) does not look at the hung file system first.

    Returns:
        False if it is busy, True if it is gone.

    Raises:
        OSError: any other failure.
    """
    if _libc.umount2(os.fsencode(path), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number == errnos.EBUSY:
        return False
    if number == errnos.EINVAL:  # not a mount point any more
        return True
    raise OSError(number, os.strerror(number), str(path))


def _remove_tree(path: Path) -> None:
    inside = [mounted for mounted in _mount_points() if Path(mounted).is_relative_to(path)]
    if inside:
        raise OSError(errnos.EBUSY, f"still mounted, files left in place: {inside}", str(path))
    shutil.rmtree(path)


class _Watchdog:
    """Lifts a stall when nobody else has done so in time."""

    def __init__(self, seconds: float, lift: str, *args: str) -> None:
        """Run `lift`, a line of shell whose $1, $2... are `args`, in a process of its own in `seconds`."""
        command = ["sh", "-c", f"sleep {seconds}; {lift}", "watchdog", *args]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def cancel(self) -> None:
        """The stall was lifted: end."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class _Injector:
    """What the injectors share: a directory, and a set-up that is undone step by step in reverse order."""

    def __init__(self, name: str, max_stall: float) -> None:
        self._max_stall = max_stall
        self._undo = contextlib.ExitStack()
        try:
            reason = self.why_not()
            if reason is not None:
                raise SetupError(reason)
            self._directory = Path(tempfile.mkdtemp(prefix=f"{name}-"))
            self._undo.callback(_remove_tree, self._directory)
            self._set_up()
        except BaseException:
            self._undo.close()
            raise

    @staticmethod
    def machine_lacks() -> str | None:
        """What this machine lacks and no package brings (root, a device, a kernel feature), or None."""
        raise NotImplementedError

    @staticmethod
    def why_not() -> str | None:
        """Why this injector cannot be used here; None if it can."""
        raise NotImplementedError

    def _set_up(self) -> None:
        """Make the disk, telling `_undo` of each step."""
        raise NotImplementedError

    def __enter__(self: _InjectorT) -> _InjectorT:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lift the stall and remove everything; who is still stuck gets an answer or an error. Idempotent."""
        self._undo.close()


def _no_root() -> str | None:
    return None if os.geteuid() == 0 else "needs root (to mount): run it under sudo"


def _no_access(device: str) -> str | None:
    if not os.path.exists(device):
        return f"needs {device}, which this machine does not have"
    return None if os.access(device, os.R_OK | os.W_OK) else f"needs {device}, which may not be opened here"


def _no_fuse() -> str | None:
    return _no_access("/dev/fuse")


def _no_loop_device() -> str | None:
    return _no_access("/dev/loop-control")


def _no_blkio() -> str | None:
    if _blkio_cgroup() is None:
        return "needs the blkio throttle of cgroup v1, which is not mounted or not writable here"
    return None


def _no_program(*names: str) -> str | None:
    packages = {"mkfs.ext4": "e2fsprogs", "mkfs.xfs": "xfsprogs"}
    missing = [name for name in names if shutil.which(name) is None]
    install = sorted({packages.get(name, "util-linux") for name in missing})
    return f"needs {', '.join(missing)}: install {' and '.join(install)}" if missing else None


def _no_mkfs(kind: str) -> str | None:
    return _no_program(f"mkfs.{kind}", "losetup", "mount")


@dataclass(frozen=True)
class HeldRequest:
    """A request that faultfs holds.

    Attributes:
        op: "read", "open", "lookup", "getattr", "flush"...
        path: the file, below the root.
        thread: native id of the thread that waits (of a kernel thread for Dying).
        seconds: for how long it has been held.
        offset: of a read, in bytes; None for all other operations.
        size: of a read, in bytes; None for all other operations.
    """

    op: str
    path: str
    thread: int
    seconds: float
    offset: int | None
    size: int | None


class FaultFS(_Injector):
    """A directory on a FUSE file system that hangs, delays or fails what it is told to.

    Put files into `backing`, read them below `root`. Rules select requests by operation (`op`, or "*"), by a
    glob for the path below the root (`path`), for reads by an overlapping byte range (`range`: start and end,
    end excluded), and for a number of times (`count`); the first that matches applies.

    A buffered read reaches the file system only when the page cache does not have the data, and is widened by
    read-ahead. When it fails, the kernel tries again page by page: a rule with a count of 1 goes unnoticed.
    Of getattr and lookup, the kernel keeps the answer for 60 s. Use "--direct-io", "--attr-timeout=0" or
    "--entry-timeout=0" where each request has to arrive, once.

    Attributes:
        backing: the directory that holds the files.
        root: the directory where the file system is mounted.
        process: the daemon that serves it.
    """

    backing: Path
    root: Path
    process: subprocess.Popen[bytes]

    def __init__(self, *options: str, max_stall: float = 60.0) -> None:
        """Mount the file system; only the main thread may do so, since the daemon dies with the thread.

        Args:
            options: of faultfs.py: "--direct-io", "--keep-cache", "--attr-timeout=0"...
            max_stall: longest time in seconds for which a request is held and a rule that hangs is in force.

        Raises:
            SetupError: it cannot be set up; the message says why.
        """
        self._options = options
        super().__init__("faultfs", max_stall)

    @staticmethod
    def machine_lacks() -> str | None:
        return _no_root() or _no_fuse()

    @staticmethod
    def why_not() -> str | None:
        return FaultFS.machine_lacks()

    def _set_up(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise SetupError("start it from the main thread: the daemon dies with the thread that started it")
        self.backing, self.root = self._directory / "backing", self._directory / "root"
        self.backing.mkdir()
        self.root.mkdir()
        self._socket = self._directory / "control"
        self._log = self._directory / "log"
        self._undo.callback(self._unmount)
        self._start_daemon()
        self._undo.callback(self._lift)

    def _start_daemon(self) -> None:
        command = [sys.executable, "-I", "-S", *map(str, (FAULTFS, self.backing, self.root, self._socket))]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, f"--max-stall={self._max_stall}", *self._options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self._undo.callback(self.kill)
        stdout = self.process.stdout
        assert stdout is not None
        with stdout:
            started, _, _ = select.select([stdout], [], [], 30)
            if not started or not stdout.readline():
                raise SetupError(f"the faultfs daemon did not start: {self._complaint()}")

    def _complaint(self) -> str:
        return self._log.read_text().strip() or "it says nothing"

    def _unmount(self) -> None:
        if not _umount(self.root, MNT_FORCE):
            _umount(self.root, MNT_DETACH)

    def _lift(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            # What cannot be released is freed by the death of the daemon.
            with contextlib.suppress(ControlError):
                self.release()

    def kill(self) -> None:
        """Kill the daemon: whoever is stuck, and everybody from now on, gets ENOTCONN. Idempotent."""
        self.process.kill()
        self.process.wait()

    def hang(
        self,
        op: str = "read",
        *,
        path: str = "*",
        count: int | None = None,
        range: tuple[int, int] | None = None,
    ) -> None:
        """Hold the selected requests from now on, until they are released.

        Raises:
            ControlError: the daemon did not obey. So do all other methods.
        """
        self._add("hang", op, path, count, range)

    def delay(
        self,
        seconds: float,
        op: str = "read",
        *,
        path: str = "*",
        count: int | None = None,
        range: tuple[int, int] | None = None,
    ) -> None:
        """Hold each of the selected requests for so many seconds (at most `max_stall`), then serve it."""
        self._add("delay", op, path, count, range, seconds=seconds)

    def fail(
        self,
        op: str = "read",
        *,
        errno: int = errnos.EIO,
        path: str = "*",
        count: int | None = None,
        range: tuple[int, int] | None = None,
    ) -> None:
        """Answer the selected requests at once with an error number."""
        self._add("fail", op, path, count, range, errno=errno)

    def hang_then_fail(
        self,
        op: str = "read",
        *,
        errno: int = errnos.EIO,
        seconds: float | None = None,
        path: str = "*",
        count: int | None = None,
        range: tuple[int, int] | None = None,
    ) -> None:
        """Hold the selected requests until released, or for so many seconds, then fail them."""
        self._add("hang-then-fail", op, path, count, range, errno=errno, seconds=seconds)

    def release(self, errno: int | None = None) -> int:
        """Forget all rules and answer everything held, with an error number if one is given.

        Returns:
            How many requests were held.
        """
        self.clear()
        return self.answer(errno=errno)

    def answer(self, *, path: str = "*", count: int | None = None, errno: int | None = None) -> int:
        """Answer the oldest `count` held requests (default: all) for matching paths; the rules stay in force.

        Returns:
            How many requests were answered.
        """
        arguments = {"path": path, "count": count, "errno": errno}
        released: int = self._command("release", arguments)["released"]
        return released

    def clear(self) -> None:
        """Forget all rules; what is held stays held."""
        self._command("clear")

    def held(self) -> list[HeldRequest]:
        """The requests that are held now, oldest first."""
        return [HeldRequest(**request) for request in self._command("status")["held"]]

    def wait_held(
        self, n: int, timeout: float = 10.0, sleep: Callable[[float], object] = time.sleep
    ) -> list[HeldRequest]:
        """Return the held requests as soon as there are at least n of them.

        Args:
            n: how many.
            timeout: how long to wait at most, in seconds.
            sleep: how to wait; gevent.sleep where greenlets have to run meanwhile.

        Raises:
            TimeoutError: there were fewer for so long.
        """
        held: list[HeldRequest] = []

        def enough() -> bool:
            held[:] = self.held()
            return len(held) >= n

        wait_until(enough, f"{n} held requests", timeout, sleep)
        return held

    def counters(self) -> dict[str, int]:
        """How many requests of each operation the kernel has sent since the mount, held or not."""
        counters: dict[str, int] = self._command("status")["counters"]
        return counters

    def _add(
        self,
        action: str,
        op: str,
        path: str,
        count: int | None,
        range: tuple[int, int] | None,
        **arguments: float | None,
    ) -> None:
        selection = {"op": op, "path": path, "count": count, "range": range}
        self._command("add", {"action": action, **selection, **arguments})

    def _command(self, command: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
        given = {name: value for name, value in (arguments or {}).items() if value is not None}
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(CONTROL_SECONDS)
                connection.connect(str(self._socket))
                connection.sendall(json.dumps({"cmd": command, **given}).encode() + b"\n")
                with connection.makefile() as answers:
                    answer: dict[str, Any] = json.loads(answers.readline() or "{}")
        except TimeoutError:
            pid = self.process.pid
            raise ControlError(f"the faultfs daemon (pid {pid}) does not answer: is it stopped?") from None
        except OSError as error:
            raise ControlError(f"the faultfs daemon has ended ({error})") from error
        if not answer.get("ok"):
            raise ControlError(answer.get("error") or f"the faultfs daemon has ended: {self._complaint()}")
        return answer


def _default_content(directory: Path) -> None:
    """Eight files of 1 MiB, f0 to f7, whose content differs everywhere."""
    noise = random.Random(0)
    for k in range(8):
        (directory / f"f{k}").write_bytes(noise.randbytes(1 << 20))


def _make_ext4_image(image: Path, content: Path | None) -> None:
    """Make a file system that holds what is in the directory `content`, or the default content."""
    with contextlib.ExitStack() as stack:
        if content is None:
            content = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=image.parent)))
            _default_content(content)
        used = sum(path.lstat().st_blocks * 512 for path in content.rglob("*"))
        with image.open("wb") as file:
            file.truncate(used + used // 8 + (16 << 20))
        # The files stay sparse, and whoever copies pages of zeroes keeps their holes: so extents can be many.
        _run("mkfs.ext4", "-q", "-F", "-m", "0", "-d", content, image)


def _make_empty_image(image: Path, kind: str) -> None:
    with image.open("wb") as file:
        file.truncate(320 << 20)  # mkfs.xfs makes no smaller one than 300 MiB
    _run(f"mkfs.{kind}", "-q", *("-F",) * (kind == "ext4"), image)


Kind = Literal["ext4", "xfs"]


class _LoopDisk(_Injector):
    """A file system on a loop device: a read-only ext4 with content, or an empty one to be written to.

    Attributes:
        root: the directory where it is mounted.
        device: the loop device, "/dev/loop0".
    """

    root: Path
    device: str

    def __init__(self, name: str, content: Path | None, empty: Kind | None, max_stall: float) -> None:
        self._content = content
        self._empty = empty
        self._watchdog: _Watchdog | None = None
        if empty is not None and (reason := _no_mkfs(empty)) is not None:
            raise SetupError(reason)
        super().__init__(name, max_stall)

    def _make_image(self, image: Path) -> None:
        if self._empty is None:
            _make_ext4_image(image, self._content)
        else:
            _make_empty_image(image, self._empty)

    def _attach(self, image: Path, *losetup_options: str) -> None:
        self.root = self._directory / "root"
        self.root.mkdir()
        read_only = [] if self._empty else ["--read-only"]
        self.device = _run("losetup", "--find", "--show", *read_only, *losetup_options, image)
        self._undo.callback(self._detach)
        self._mount()
        self._undo.callback(self._unmount)

    def _mount(self) -> None:
        kind, options = (self._empty, "noatime") if self._empty else ("ext4", "ro,noload,noatime")
        _run("mount", "-t", kind, "-o", options, self.device, self.root)

    def remount(self) -> None:
        """Unmount it and mount it again: nothing of it is cached any more, neither data nor metadata.

        Raises:
            TimeoutError: somebody uses it.
        """
        wait_until(lambda: _umount(self.root, 0), "the files to be closed", CLEANUP_SECONDS)
        self._mount()

    def _unmount(self) -> None:
        try:
            wait_until(lambda: _umount(self.root, 0), "the files to be closed", CLEANUP_SECONDS)
        except TimeoutError:
            _umount(self.root, MNT_DETACH)

    def _detach(self) -> None:
        # Takes effect with the last close of a file, should some still be open.
        _run("losetup", "--detach", self.device)

    def _guard(self, lift: str, *args: str) -> None:
        self._cancel_watchdog()
        self._watchdog = _Watchdog(self._max_stall, lift, *args)

    def _cancel_watchdog(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None


def _blkio_cgroup() -> Path | None:
    """The directory of this process's blkio cgroup (cgroup v1), if it has one in which it can make others."""
    controllers = (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines())
    own = next((path for _, names, path in controllers if "blkio" in names.split(",")), None)
    mounts = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    mounted = next((m[1] for m in mounts if m[2] == "cgroup" and "blkio" in m[3].split(",")), None)
    if own is None or mounted is None:
        return None
    # In a container, the path may be the host's and the mount its own part only.
    cgroup = Path(mounted + own)
    cgroup = cgroup if cgroup.is_dir() else Path(mounted)
    usable = (cgroup / "blkio.throttle.io_service_bytes").exists() and os.access(cgroup, os.W_OK)
    return cgroup if usable else None


class Throttled(_LoopDisk):
    """An ext4 file system whose block device is slow or stuck for the threads that enter its throttle.

    The reader waits in the block layer in state D, and so does who brings to the disk what he has written (fsync).
    Reads from the page cache are not affected, nor is anything else on the machine.

    Attributes:
        root: the directory where it is mounted, read-only unless it was `empty`.
        device: the loop device.
    """

    def __init__(self, content: Path | None = None, *, empty: Kind | None = None, max_stall: float = 60.0) -> None:
        """Make and mount the disk.

        Args:
            content: the directory whose files the disk gets; eight files of 1 MiB, f0 to f7, by default.
            empty: an empty file system of that kind instead, to be written to.
            max_stall: how long a throttle lasts at most, in seconds.

        Raises:
            SetupError: it cannot be set up; the message says why.
        """
        super().__init__("throttled", content, empty, max_stall)

    @staticmethod
    def machine_lacks() -> str | None:
        return _no_root() or _no_loop_device() or _no_blkio()

    @staticmethod
    def why_not() -> str | None:
        return Throttled.machine_lacks() or _no_mkfs("ext4")

    def _set_up(self) -> None:
        image = self._directory / "disk.img"
        self._make_image(image)
        parent = _blkio_cgroup()
        assert parent is not None
        self._parent_cgroup = parent
        self.cgroup = Path(tempfile.mkdtemp(prefix=f"throttled-{os.getpid()}-", dir=parent))
        self._undo.callback(self._remove_cgroup)
        self._attach(image)
        self._device_number = Path("/sys/block", Path(self.device).name, "dev").read_text().strip()
        self._throttles = [self.cgroup / f"blkio.throttle.{way}_bps_device" for way in ("read", "write")]
        self._undo.callback(self.lift)

    def _remove_cgroup(self) -> None:
        wait_until(self._try_to_remove_cgroup, f"the threads to leave {self.cgroup}", CLEANUP_SECONDS)

    def _try_to_remove_cgroup(self) -> bool:
        for thread in (self.cgroup / "tasks").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                (self._parent_cgroup / "tasks").write_text(thread)
        try:
            self.cgroup.rmdir()
        except OSError as error:
            if error.errno != errnos.EBUSY:
                raise
            return False
        return True

    def enter_process(self, pid: int = 0) -> None:
        """Put a process (0: this one), with all its threads and what it starts later, under the throttle."""
        (self.cgroup / "cgroup.procs").write_text(str(pid))

    def enter_thread(self) -> None:
        """Put the calling thread, and the threads and processes that it starts later, under the throttle."""
        (self.cgroup / "tasks").write_text("0")

    def slow(self, bytes_per_second: int) -> None:
        """Let those under the throttle read, and write, so many bytes per second (together), at least 1."""
        if bytes_per_second < 1:
            raise ValueError(f"bytes_per_second must be at least 1, not {bytes_per_second}; see lift()")
        lift = 'echo "$1" > "$2"; echo "$1" > "$3"'
        self._guard(lift, f"{self._device_number} 0", *map(str, self._throttles))
        self._set(bytes_per_second)

    def stall(self) -> None:
        """Make those under the throttle wait for everything that is not in the page cache."""
        self.slow(STUCK_BYTES_PER_SECOND)

    def lift(self) -> None:
        """End the throttle: whoever waits goes on at once. Idempotent."""
        self._set(0)
        self._cancel_watchdog()

    def _set(self, bytes_per_second: int) -> None:
        for throttle in self._throttles:
            throttle.write_text(f"{self._device_number} {bytes_per_second}")


class Dying(_LoopDisk):
    """An ext4 file system on a disk that stops answering: a loop device whose image lies on a `FaultFS`.

    All of it is real: page cache, read-ahead, metadata, the device's queue. The reader waits in state D; with
    O_DIRECT not even SIGKILL ends that. Data and metadata that are cached are served all the same.

    Attributes:
        root: the directory where the file system is mounted, read-only unless it was `empty`.
        device: the loop device.
        faultfs: the file system that holds the image, for faults that are not offered here.
    """

    IMAGE = "disk.img"

    faultfs: FaultFS

    def __init__(self, content: Path | None = None, *, empty: Kind | None = None, max_stall: float = 60.0) -> None:
        """Make and mount the disk; only the main thread may do so, since the daemon dies with the thread.

        Args:
            content: the directory whose files the disk gets; eight files of 1 MiB, f0 to f7, by default.
            empty: an empty file system of that kind instead, to be written to.
            max_stall: how long the disk hangs at most, in seconds.

        Raises:
            SetupError: it cannot be set up; the message says why.
        """
        super().__init__("dying", content, empty, max_stall)

    @staticmethod
    def machine_lacks() -> str | None:
        return FaultFS.machine_lacks() or _no_loop_device()

    @staticmethod
    def why_not() -> str | None:
        return Dying.machine_lacks() or _no_mkfs("ext4")

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The faultfs daemon under the disk."""
        return self.faultfs.process

    def _set_up(self) -> None:
        self.faultfs = self._undo.enter_context(FaultFS("--direct-io", max_stall=self._max_stall))
        self._make_image(self.faultfs.backing / self.IMAGE)
        self._attach(self.faultfs.root / self.IMAGE, "--direct-io=on")
        # The disk has to be dead, not hung, when it is unmounted.
        self._undo.callback(self.faultfs.kill)
        self._undo.callback(self._lift)

    def _lift(self) -> None:
        self.resume()
        with contextlib.suppress(ControlError):
            self.release()

    def hang(self, *, count: int | None = None, range: tuple[int, int] | None = None) -> None:
        """Hold the disk's reads (only `count`, or only in a byte range of the device) until released."""
        self.faultfs.hang(path=self.IMAGE, count=count, range=range)

    def hang_all(self) -> None:
        """Hold whatever the disk is asked for, writes among it, until released."""
        self.faultfs.hang("*", path=self.IMAGE)

    def fail(
        self,
        *,
        errno: int = errnos.EIO,
        count: int | None = None,
        range: tuple[int, int] | None = None,
    ) -> None:
        """Fail the disk's reads (only `count`, or only in a byte range of the device); readers get EIO."""
        self.faultfs.fail(path=self.IMAGE, errno=errno, count=count, range=range)

    def release(self, errno: int | None = None) -> int:
        """Forget all rules and answer everything held, with an error number if one is given.

        Returns:
            How many reads were held.
        """
        return self.faultfs.release(errno)

    def held(self) -> list[HeldRequest]:
        """The reads of the device that are held now, oldest first."""
        return self.faultfs.held()

    def wait_held(
        self, n: int, timeout: float = 10.0, sleep: Callable[[float], object] = time.sleep
    ) -> list[HeldRequest]:
        """Return the held reads of the device as soon as there are at least n of them.

        Args:
            n: how many.
            timeout: how long to wait at most, in seconds.
            sleep: how to wait; gevent.sleep where greenlets have to run meanwhile.

        Raises:
            TimeoutError: there were fewer for so long.
        """
        return self.faultfs.wait_held(n, timeout, sleep)

    def stop(self) -> None:
        """Stop the disk as a whole (SIGSTOP): nothing is answered, nor can `faultfs` be told anything."""
        self._guard('kill -CONT "$1"', str(self.process.pid))
        self.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: thread_state(self.process.pid) in ("T", "Z"), "the daemon to stop")

    def resume(self) -> None:
        """Let the stopped disk go on (SIGCONT). Idempotent."""
        self.process.send_signal(signal.SIGCONT)
        self._cancel_watchdog()
