"""Disks and their files: what callers use. Every read, open, stat and close runs on the disk's own slots."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from operator import index
from typing import TYPE_CHECKING, Any, TypeVar

from . import hubs
from ._cached import CachedFile, CachedReader, open_path, read_path, read_whole, unlinked
from ._syscalls import CloseMode, Job, Step
from .calls import Call, OpeningCall
from .descriptor import Descriptor
from .errors import (
    DiskBusy,
    DiskFileChanged,
    DiskOffline,
    DiskPathInvalid,
    DiskTimeout,
    from_errno,
    printable,
    root_lost,
)
from .inline import LIMIT, Capability, Inline, InlineStatus, capability
from .latency import Latency  # noqa: TC001 - whoever decodes a DiskStatus looks up the types of its fields
from .limits import Limits, check_deadline
from .probe import OUT_OF_RESOURCES, RootLost, probe
from .raw_io import RawDiskFile
from .workers import Load, Workers

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from types import TracebackType

    from .hubs import HubName, Spawned
    from .workers import OnChange

    Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]

Result = TypeVar("Result")

FIRST_CHUNK = 64 * 1024
"""Bytes that are read in the same visit that opens a file: enough for most small files, cheap when not needed."""

CHUNK = 256 * 1024
"""Bytes of one chunk of a stream: large enough to make the hop to a thread cheap, small enough to hold two."""

READ_AHEAD = 4 * CHUNK
"""Bytes that the device is told to bring while a stream is being read, as long as it is quick."""

CLOCK = time.monotonic

LARGEST = 2**63 - 1
"""The largest offset of a file: off_t has 64 bits."""


@dataclass(frozen=True)
class FileStat:
    """What is known of an open file.

    Attributes:
        size: Bytes.
        mtime_ns: Time of the last modification, nanoseconds since 1970.
        inode: Inode number.
        device: Device number (`st_dev`).
    """

    size: int
    mtime_ns: int
    inode: int
    device: int


@dataclass(frozen=True)
class StallTimes:
    """How long a simulated stall really took.

    Attributes:
        queue: Seconds between the call and the start of the stall in its thread.
        disk: Seconds of the stall itself and of the read after it.
    """

    queue: float
    disk: float


@dataclass
class Counts:
    """What a disk has done since the process started.

    Attributes:
        reads: Visits to the disk that brought what they were asked for.
        bytes: Bytes that were handed to callers.
        errors: Visits that failed, by the name of their errno.
        timeouts: Reads that missed their deadline.
        rejections: Reads that were refused at once, because the disk was busy or offline.
        abandoned: Reads whose caller went away before the end (killed, or its own timeout).
    """

    reads: int = 0
    bytes: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    timeouts: int = 0
    rejections: int = 0
    abandoned: int = 0


@dataclass(frozen=True)
class DiskStatus:
    """A disk at one moment.

    Attributes:
        name: Its name.
        root: Its root directory, None for a disk without files.
        limits: Its limits.
        load: What it is doing now.
        counts: What it has done so far.
        queue_time: How long operations waited for a slot.
        disk_time: How long they were at the disk.
        inline: What is read on the hub's own thread, and what was.
    """

    name: str
    root: str | None
    limits: Limits
    load: Load
    counts: Counts
    queue_time: Latency
    disk_time: Latency
    inline: InlineStatus


class _FirstVisit:
    """The visit that opens the root; asks in the same hop what may be read inline on it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.root = -1
        self.capability: Capability | None = None
        self.abandon, self.take_descriptor = job.abandon, job.take_descriptor

    def run(self) -> None:
        self.job.run()
        self.root = self.job.take_root()
        if self.root >= 0:
            with contextlib.suppress(OSError):  # not known then: the next probe asks again
                self.capability = capability(self.root)

    def take_root(self) -> int:
        root, self.root = self.root, -1
        return root

    @property
    def seconds(self) -> float:
        return self.job.seconds

    @property
    def progress(self) -> float:
        return self.job.progress

    @property
    def size(self) -> int:
        return self.job.size

    @property
    def count(self) -> int:
        return self.job.count

    def __del__(self) -> None:
        if self.root >= 0:
            os.close(self.root)  # nobody has taken it; an O_PATH descriptor, whose close does not reach the device


class Disk:
    """One directory tree on one device, with slots of its own.

    However long the device hangs, a call on this disk ends at its deadline, blocks no greenlet but its own, and uses
    up no more than `limits.threads` native threads. Calls on other disks are not affected.

    A disk belongs to the native thread that uses it first, because its hub waits for it. After fork(2) the child
    gets slots of its own.

    All methods that read take a `deadline` in seconds from now, waiting for a slot included (None: that of the
    limits), block the calling greenlet but never the hub, and raise:

    * `DiskBusy` at once when no slot is free and the queue is full, or all slots are stuck;
    * `DiskOffline` at once when the disk makes no progress, its root is not there, or `set_offline` was called;
    * `DiskTimeout` when the deadline passes;
    * `DiskFileNotFound`, `DiskFileForbidden`, `DiskFileNotRegular`, `DiskPathInvalid` for what the path names;
    * `DiskIOError` for what the device answers;
    * `ValueError` for a negative or overflowing number;
    * `RuntimeError` after `close`, in the hub itself, or in another native thread.

    A greenlet that is killed or runs into a timeout of its own leaves at once; the system call that it waited for
    ends when the kernel lets it, its slot is free then, and what it opened is closed.
    """

    def __init__(self, name: str, root: Path | None, limits: Limits | None = None, *, hub: HubName = "gevent") -> None:
        """Describe a disk. Touches neither the device nor any thread: a dead disk does not delay its constructor.

        Args:
            name: Name, for errors, status and metrics.
            root: The directory that all paths are relative to. It is opened on first use. None makes a disk without
                files, on which only `stall` and `run` work.
            limits: How much it may use up; `Limits()` when None.
            hub: Whose greenlets call it: "gevent", "eventlet", or "asyncio", which is what `diskread.aio.Disk` gives.

        Raises:
            ValueError: An empty name, a root with a NUL byte, or an unknown hub.
        """
        hubs.check_name(hub)
        if not name:
            raise ValueError("a disk needs a name")
        self._root = None if root is None else os.path.abspath(os.fsencode(root))
        if self._root is not None and b"\0" in self._root:
            raise ValueError(f"the root directory of disk {name} contains a NUL byte")
        self._name = name
        self._hub: HubName = hub
        self._limits = Limits() if limits is None else limits
        self._workers = Workers(name, self._limits, CLOCK, None if self._root is None else self._make_probe, hub)
        self._root_fd = -1
        self._root_device: int | None = None
        self._mounting = 0  # counts `set_online`: what was asked before says nothing about the disk of afterwards
        self._sample: bytes | None = None
        self._old_roots: list[int] = []
        self._users_of_root = 0
        self._closed = False
        self._counts = Counts()
        self._inline = Inline(self._limits.inline == "auto" and self._root is not None)

    @property
    def name(self) -> str:
        """The name of the disk."""
        return self._name

    @property
    def hub(self) -> HubName:
        """Whose greenlets call it."""
        return self._hub

    @property
    def limits(self) -> Limits:
        """The limits of the disk."""
        return self._limits

    @property
    def root(self) -> str | None:
        """The root directory, None for a disk without files."""
        return None if self._root is None else os.fsdecode(self._root)

    @property
    def on_change(self) -> OnChange | None:
        """Called with the state and the reason whenever one of them has changed; None (the default) calls nobody.

        It is called in the hub, soon after the change, and must not block. That a disk is SUSPECT is noticed with the
        next thing that happens on it; everything else at once.
        """
        return self._workers.on_change

    @on_change.setter
    def on_change(self, function: OnChange | None) -> None:
        self._workers.on_change = function

    def read(self, path: Path, offset: int = 0, size: int | None = None, *, deadline: float | None = None) -> bytes:
        """Read a range of a file: at once, if it is in the page cache; else in one visit to the disk.

        The visit is open, fstat, pread and close in one thread hop. What is in the page cache is read on the hub's own
        thread where that cannot block (`DiskStatus.inline` says so), also when the disk is offline for lack of
        progress; now and then such a read lets other greenlets have their turn.

        Args:
            path: The file, relative to the root. It may go through symbolic links that stay inside the root.
            offset: First byte.
            size: Bytes to read at most; None reads to the end of the file, for which a file larger than 64 KiB needs
                a second visit.
            deadline: Seconds for all of it.

        Returns:
            The bytes; fewer than `size` only where the file ends.

        Raises:
            DiskError: As the class says.
        """
        inline = self._inline
        if inline.on and self._root_fd >= 0 and not self._closed:
            try:
                found = read_path(
                    self._root_fd,
                    path,
                    offset,
                    size,
                    LIMIT,
                    inline.window,
                    inline.flags,
                    inline.tally,
                )
            except (OverflowError, TypeError):
                found = 0  # the slow way says what is wrong
            if type(found) is bytes:
                if deadline is not None:
                    check_deadline(deadline)
                if inline.tally.due:
                    self._give_way()
                return found
            if isinstance(found, CachedFile):
                return self._read_rest(found, path, offset, size, self._ends(deadline))
            if isinstance(found, int):
                inline.failed(found)
        ends = self._ends(deadline)
        if size is not None:
            return self._take(self._visit_path(path, ends, offset=offset, size=size))
        job = self._visit_path(path, ends, offset=offset, size=FIRST_CHUNK, close_mode=CloseMode.CLOSE_AT_EOF)
        first = self._take(job)
        descriptor = job.take_descriptor()
        if descriptor < 0:
            return first
        assert job.stat is not None
        offset += len(first)
        rest = Job(descriptor=descriptor, offset=offset, size=max(0, job.stat[0] - offset))
        self._run(rest, ends, self._checked_path(path))
        self._check(rest, self._checked_path(path))
        return first + self._take(rest)

    def _read_at_once(self, path: Path, offset: int, size: int | None) -> bytes | None:
        """A range of a file, if all of it is in the page cache. For mirrors: who gets None asks `read` of some disk."""
        inline = self._inline
        if not inline.on or self._root_fd < 0 or self._closed:
            return None
        try:
            found = read_path(self._root_fd, path, offset, size, LIMIT, inline.window, inline.flags, inline.tally)
        except (OverflowError, TypeError):
            return None
        if not isinstance(found, bytes):
            return None
        if inline.tally.due:
            self._give_way()
        return found

    def read_cached(self, path: Path, largest: int = FIRST_CHUNK) -> tuple[FileStat, bytes] | None:
        """Read a whole file if that takes no worker: it is in the page cache, and small. Never blocks the hub.

        For servers that have a cheaper way for what can be had at once; everything else is for `open`. Now and then it
        lets other greenlets have their turn, as `read` does.

        Args:
            path: The file, relative to the root.
            largest: Bytes that the file may have.

        Returns:
            What is known of the file, and all of its bytes; None when it is larger, not cached, not there, or when
            nothing can be read inline on this disk.

        Raises:
            TypeError: A path that is none.
        """
        inline = self._inline
        if not inline.on or self._root_fd < 0 or self._closed:
            return None
        found = read_whole(self._root_fd, os.fsencode(path), inline.flags, largest, inline.window, inline.tally)
        if found is None:
            return None
        if inline.tally.due:
            self._give_way()
        return FileStat(*found.stat), found.prefix

    def open(self, path: Path, *, offset: int = 0, size: int = FIRST_CHUNK, deadline: float | None = None) -> DiskFile:
        """Open a file and read its first piece in the same visit.

        Args:
            path: The file, relative to the root.
            offset: Where the first piece starts: the first byte that will be asked for.
            size: Bytes of the first piece, 0 for none. With `offset` 0, a file that ends within it is closed by the
                same visit: all of it is in memory then.
            deadline: Seconds for the visit.

        Returns:
            The open file, to be closed by its `close` or a `with` block.

        Raises:
            DiskError: As the class says.
        """
        return self._open(path, self._ends(deadline), offset, size, 0.0)

    def stat(self, path: Path, *, deadline: float | None = None) -> FileStat:
        """Size and modification time of a regular file: open, fstat and close in one visit.

        Args:
            path: The file, relative to the root.
            deadline: Seconds for the visit.

        Raises:
            DiskError: As the class says.
        """
        ends = self._ends(deadline)
        found = self._open_cached(path, 0, 0)
        if found is not None:
            self._inline.opened()
            return FileStat(*found.stat)
        job = self._visit_path(path, ends)
        assert job.stat is not None
        self._counts.reads += 1
        return FileStat(*job.stat)

    def run(self, function: Callable[..., Result], *args: Any, deadline: float | None = None, **kwargs: Any) -> Result:
        """Run any other blocking call (os.listdir, os.fsync, a write) on the disk's slots, with the same promises.

        The function runs in a native thread: it must not use gevent or eventlet, and it should release the GIL while it
        blocks, as the functions of `os` do. When its caller gives up it goes on to its end; the result is lost then, so
        it should not open what has to be closed: that is for `run_open`.

        Args:
            function: What to call with the other arguments.
            deadline: Seconds for all of it.

        Returns:
            What the function returns.

        Raises:
            DiskBusy: As the class says.
            DiskTimeout: As the class says.
            Exception: Whatever the function raises.
        """
        result: Result = self._call(Call(lambda: function(*args, **kwargs)), self._ends(deadline))
        return result

    def run_open(
        self, function: Callable[..., int], *args: Any, deadline: float | None = None, **kwargs: Any
    ) -> Descriptor:
        """Run a blocking call that opens a file (or anything else that close(2) closes) on the disk's slots.

        When its caller has given up meanwhile, what it has opened is closed in a worker.

        Args:
            function: What to call with the other arguments, in a native thread: see `run`. It returns the number of an
                open descriptor, which nobody else closes.
            deadline: Seconds for all of it.

        Returns:
            The descriptor, to be closed by its `close` or a `with` block.

        Raises:
            DiskBusy: As the class says.
            DiskTimeout: As the class says.
            Exception: Whatever the function raises.
        """
        call = OpeningCall(lambda: function(*args, **kwargs))
        self._call(call, self._ends(deadline))
        return Descriptor(self, call.take_descriptor())

    def stall(
        self,
        seconds: float,
        path: Path | None = None,
        *,
        longest_wait: float = math.inf,
        deadline: float | None = None,
    ) -> StallTimes:
        """Occupy a slot for a time, as a hanging disk would, then read a file (to be thrown away) for real.

        For experiments: whoever can call this can use up all slots. No time and no file take no slot while the disk is
        well: like a read of the page cache.

        Args:
            seconds: How long the system call hangs (nanosleep).
            path: File to read afterwards, from its beginning to its end; None for none.
            longest_wait: Seconds to wait for a slot at most.
            deadline: Seconds for all of it, the simulated stall included.

        Returns:
            How long the stall had to wait and how long it took.

        Raises:
            DiskError: As the class says.
        """
        called = CLOCK()
        ends = self._ends(deadline)
        if path is None:
            job = Job(stall_ns=_nanoseconds(seconds))
            if not seconds and ends > called and self._workers.well:
                self._counts.reads += 1
                return StallTimes(0.0, 0.0)
            self._run(job, ends, None, longest_wait=longest_wait)
            self._check(job, None)
            self._counts.reads += 1
            return StallTimes(job.started_ns / 1e9 - called, (job.finished_ns - job.started_ns) / 1e9)
        with self._open(path, ends, 0, FIRST_CHUNK, seconds, longest_wait) as opened:
            for _ in opened._chunks(0, opened.stat.size, lambda: ends):
                pass
            queue = opened.started - called
            return StallTimes(queue, CLOCK() - called - queue)

    @property
    def status(self) -> DiskStatus:
        """The disk at this moment. Never touches the device."""
        counts = replace(self._counts, errors=Counter(self._counts.errors))
        workers = self._workers
        times = workers.queue_time.copy(), workers.disk_time.copy()
        inline = self._inline.status
        counts.reads += inline.hits
        counts.bytes += inline.bytes
        return DiskStatus(self._name, self.root, self._limits, workers.load, counts, *times, inline)

    def watch(self) -> None:
        """Begin to watch the disk now, not on first use: it is OFFLINE until it has answered a first probe.

        Never blocks: a disk that is dead when a server starts does not delay the start.
        """
        if self._root is not None:
            self._workers.watch()

    def set_offline(self, reason: str) -> None:
        """Take the disk OFFLINE by hand, e.g. to replace it. Wins over every verdict until `set_online`.

        Reads fail at once with `DiskOffline`; there are no probes; the root directory is let go, so that it can be
        unmounted once nothing is under way. Never blocks.

        Args:
            reason: What callers and operators are told.
        """
        self._workers.set_offline(f"by hand: {reason}")
        self._let_root_go()

    def set_online(self) -> None:
        """End `set_offline`, or any other verdict: one request may try, and if it completes the disk is ONLINE.

        Whatever device is at the root by then is the disk from now on. Never blocks.
        """
        self._root_device = None
        self._mounting += 1
        self._inline.forget()
        self._let_root_go()
        self._workers.set_online()

    def close(self) -> None:
        """Let threads and descriptors go; what is stuck goes when the kernel lets it. Never blocks."""
        if not self._closed:
            self._closed = True
            self._workers.close()
            self._close_unused_root()

    def __enter__(self) -> Disk:
        """Return the disk itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the disk."""
        self.close()

    def __del__(self) -> None:
        """Give the root's descriptor back when the last user forgot to close the disk."""
        if getattr(self, "_root_fd", -1) >= 0:
            os.close(self._root_fd)

    def __repr__(self) -> str:
        """Name and root."""
        return f"<Disk {self._name} at {None if self._root is None else printable(self._root)}>"

    # -- how a visit goes --------------------------------------------------------------------------------------------

    def _ends(self, deadline: float | None) -> float:
        return CLOCK() + (self._limits.deadline if deadline is None else check_deadline(deadline))

    def _open(
        self, path: Path, ends: float, offset: int, size: int, stall: float, longest_wait: float = math.inf
    ) -> DiskFile:
        if not stall:
            found = self._open_cached(path, offset, size)
            if found is not None:
                return self._cached_file(found, path, offset, size, ends)
        job = self._visit_path(
            path,
            ends,
            offset=offset,
            size=size,
            stall_ns=_nanoseconds(stall),
            close_mode=CloseMode.CLOSE_AT_EOF if offset == 0 and size > 0 else CloseMode.CLOSE_NEVER,
            longest_wait=longest_wait,
        )
        assert job.stat is not None
        first = self._take(job)
        return DiskFile(
            self,
            self._checked_path(path),
            FileStat(*job.stat),
            job.take_descriptor(),
            offset,
            first,
            job.started_ns / 1e9,
        )

    # -- what the page cache has -------------------------------------------------------------------------------------

    def _open_cached(self, path: Path, offset: int, size: int) -> CachedFile | None:
        inline = self._inline
        if not inline.on or self._root_fd < 0 or self._closed:
            return None
        try:
            found = open_path(self._root_fd, path, inline.flags, offset, size, LIMIT, inline.window, inline.tally)
        except (OverflowError, TypeError):
            return None  # the slow way says what is wrong
        if isinstance(found, CachedFile):
            return found
        inline.failed(found)
        return None

    def _cached_file(self, found: CachedFile, path: Path, offset: int, size: int, ends: float) -> DiskFile:
        """A file that was opened on the hub, and the first piece of it, wherever that is."""
        stat, name, prefix = FileStat(*found.stat), os.fsencode(path), found.prefix
        file = DiskFile(self, name, stat, found.take_descriptor(), offset, prefix, CLOCK(), noatime=True)
        wanted = min(size, stat.size - offset)
        try:
            if len(prefix) < wanted:
                tried = (prefix, found.error) if found.error else prefix
                file._keep_first(offset, file._read(offset, wanted, ends, tried))
            elif self._inline.tally.due:
                self._give_way()
        except BaseException:
            file.close()
            raise
        return file

    def _read_rest(self, found: CachedFile, path: Path, offset: int, size: int | None, ends: float) -> bytes:
        """The rest of a range, of which the beginning was in the page cache: of the very same file."""
        stat, name = FileStat(*found.stat), os.fsencode(path)
        stop = stat.size if size is None else min(stat.size, offset + size)
        prefix = found.prefix
        with DiskFile(self, name, stat, found.take_descriptor(), 0, b"", CLOCK()) as file:
            if not prefix and stop - offset > LIMIT:
                return file._read(offset, stop - offset, ends)
            return prefix + file._read_in_worker(offset + len(prefix), stop - offset - len(prefix), ends)

    def _visit_path(
        self,
        path: Path,
        ends: float,
        *,
        offset: int = 0,
        size: int = 0,
        stall_ns: int = 0,
        close_mode: int = CloseMode.CLOSE_ALWAYS,
        longest_wait: float = math.inf,
    ) -> Job:
        """Open a file under the root in a visit, and see to it that the root stays open for the next."""
        name = self._checked_path(path)
        assert self._root is not None
        job = Job(
            root=self._root,
            root_fd=self._root_fd,
            root_device=self._root_device,
            path=name,
            offset=offset,
            size=size,
            stall_ns=stall_ns,
            close_mode=close_mode,
        )
        self._users_of_root += 1
        mounting = self._mounting
        first = _FirstVisit(job) if self._root_fd < 0 and self._inline.open_question else None
        self._run(first or job, ends, name, longest_wait=longest_wait, on_completed=self._root_unused)
        if self._root_fd < 0 and mounting == self._mounting and not self._closed and job.step != Step.STEP_ROOT:
            self._root_fd = (first or job).take_root()
            if self._root_fd >= 0:
                self._root_device = job.root_device
                if first is not None and first.capability is not None:
                    self._inline.learn(first.capability)
        self._check(job, name)
        self._sample = name
        return job

    def _make_probe(self) -> tuple[Call, Callable[[], None]]:
        """What asks the device whether it answers, and what becomes of the answer."""
        assert self._root is not None
        call = Call(partial(probe, self._root, self._root_device, self._sample))
        return call, partial(self._probed, call, self._mounting)

    def _probed(self, call: Call, mounting: int) -> None:
        if mounting != self._mounting:
            return
        if isinstance(call.error, RootLost):
            self._lose_root(root_lost(call.error.errno or 0))
        elif isinstance(call.error, OSError) and call.error.errno not in OUT_OF_RESOURCES:
            # The disk has answered, with an error. That is for its readers to hear, and no reason to refuse them.
            self._counts.errors[_errno_name(call.error.errno or 0)] += 1
            self._workers.root_found()
        elif call.error is None:
            self._root_device, self._sample = call.result.device, call.result.sample
            self._inline.learn(call.result.capability)
            self._workers.root_found()

    def _lose_root(self, reason: str) -> None:
        if not self._closed:
            self._let_root_go()
            self._workers.root_lost(reason)

    def _let_root_go(self) -> None:
        """Close the root as soon as nothing uses it; the next visit opens it anew."""
        if self._users_of_root and self._root_fd >= 0:
            self._old_roots.append(self._root_fd)
            self._root_fd = -1
        self._close_unused_root()

    def _root_unused(self) -> None:
        self._users_of_root -= 1
        while self._old_roots and not self._users_of_root:
            os.close(self._old_roots.pop())
        if self._closed:
            self._close_unused_root()

    def _close_unused_root(self) -> None:
        # A job that has not started yet knows the root by its number, which must not be given to another file
        # meanwhile. Closing an O_PATH descriptor does not reach the device (open(2)), so it cannot hang.
        if not self._users_of_root and self._root_fd >= 0:
            descriptor, self._root_fd = self._root_fd, -1
            os.close(descriptor)

    def _checked_path(self, path: Path) -> bytes:
        try:
            name = os.fsencode(path)
        except UnicodeEncodeError as error:
            raise DiskPathInvalid(
                self._name, repr(path).encode("ascii", "replace"), "it is no text: " + str(error)
            ) from None
        if self._root is None:
            raise DiskPathInvalid(self._name, name, "this disk has no files")
        if not name:
            raise DiskPathInvalid(self._name, name, "the path is empty")
        if name.startswith(b"/"):
            raise DiskPathInvalid(self._name, name, "the path is absolute; give it relative to the root of the disk")
        if b"\0" in name:
            raise DiskPathInvalid(self._name, name, "the path contains a NUL byte")
        return name

    def _give_way(self) -> None:
        """Let others have their turn: what is read at once never waits, and so never stops by itself."""
        self._inline.tally.turn()
        hubs.current(self._hub).give_way()

    def _run(
        self,
        task: Job | Call | _FirstVisit,
        ends: float,
        path: bytes | None,
        *,
        longest_wait: float = math.inf,
        on_completed: Callable[[], None] | None = None,
    ) -> None:
        try:
            self._workers.run(task, ends, path=path, longest_wait=longest_wait, on_completed=on_completed)
        except DiskTimeout:
            self._counts.timeouts += 1
            raise
        except (DiskBusy, DiskOffline):
            self._counts.rejections += 1
            raise
        except (RuntimeError, ValueError):
            raise
        except BaseException:
            self._counts.abandoned += 1
            raise

    def _call(
        self,
        call: Call,
        ends: float,
        path: bytes | None = None,
        on_completed: Callable[[], None] | None = None,
    ) -> Any:
        """Run a call, and return or raise what came of it. `path` says what it is about, in errors and the log."""
        self._run(call, ends, path, on_completed=on_completed)
        if call.error is not None:
            raise call.error
        self._counts.reads += 1
        return call.result

    def _check(self, job: Job, path: bytes | None) -> None:
        if job.error:
            error = from_errno(self._name, path, job.error, job.step)
            self._counts.errors[_errno_name(job.error)] += 1
            if isinstance(error, DiskOffline):
                self._lose_root(error.reason)
            raise error

    def _take(self, job: Job) -> bytes:
        data = job.take_data()
        self._counts.reads += 1
        self._counts.bytes += len(data)
        return data


class DiskFile:
    """An open file of a disk. Made by `Disk.open`; close it with `close` or a `with` block.

    Its methods block the calling greenlet, never the hub, and raise what `Disk` says. A call that misses its deadline
    leaves the file open: the next one may succeed.
    """

    def __init__(
        self,
        disk: Disk,
        path: bytes,
        stat: FileStat,
        descriptor: int,
        offset: int,
        first: bytes,
        started: float,
        *,
        noatime: bool = False,
    ) -> None:
        """For `Disk.open` only.

        Args:
            disk: Its disk.
            path: Its path, for errors.
            stat: What is known of it.
            descriptor: Taken over; -1 when all of it is in `first`.
            offset: Where `first` begins.
            first: The first piece.
            started: When the visit that opened it began.
            noatime: Whether it was opened so that reads leave the access time alone.
        """
        self._disk = disk
        self._path = path
        self._stat = stat
        self.started = started
        self._first_offset = offset
        self._first = first
        self._descriptor = descriptor
        self._in_flight = 0
        self._read_ahead = 0
        self._quick = False
        self._closed = False
        self._inline = disk._inline
        self._tally = disk._inline.tally
        self._reader = self._new_reader(noatime)
        self._may_close_inline = self._reader is not None

    def _new_reader(self, noatime: bool) -> CachedReader | None:
        """What reads inline, if anything may. Reads must leave the access time alone: updates wait for the journal."""
        inline = self._inline
        if not inline.on or self._descriptor < 0:
            return None
        if inline.flags and not noatime:
            try:
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, inline.flags)
            except OSError as error:  # EPERM: somebody else's file
                inline.failed(error.errno or 0)
                return None
        return CachedReader(self._descriptor, self._stat.size, LIMIT, inline.window, inline.tally)

    def _keep_first(self, offset: int, data: bytes) -> None:
        """Keep a piece of the file for whoever asks for it again; all of it makes the descriptor superfluous."""
        self._first_offset, self._first = offset, data

    @property
    def stat(self) -> FileStat:
        """Size and modification time when the file was opened. Does not touch the device."""
        return self._stat

    def read(self, offset: int = 0, size: int | None = None, *, deadline: float | None = None) -> bytes:
        """Read a range.

        Args:
            offset: First byte.
            size: Bytes at most; None reads to the end that the file had when it was opened.
            deadline: Seconds for it; None: that of the disk's limits.

        Returns:
            The bytes; fewer than `size` only where the file ends.

        Raises:
            DiskError: As `Disk` says.
            ValueError: A negative number, or the file was closed.
        """
        found, reader = None, self._reader
        if reader is not None and deadline is None:
            try:
                found = reader.read(offset, size)
                if type(found) is bytes:
                    return found
            except (OverflowError, TypeError):
                pass  # the slow way says what is wrong
        ends = self._disk._ends(deadline)
        offset = index(offset)
        return self._read(offset, max(0, self._stat.size - offset) if size is None else index(size), ends, found)

    def chunks(
        self, start: int = 0, stop: int | None = None, *, deadline: float | None = None
    ) -> Generator[bytes, None, None]:
        """Stream a range. While the caller works on one chunk, the next one is being read.

        Args:
            start: First byte.
            stop: The byte after the last; None or anything beyond the end means the end that the file had when it was
                opened.
            deadline: Seconds for each chunk (not for the whole: the caller may be slow, the disk may not).

        Yields:
            Chunks of at most 256 KiB, in order.

        Raises:
            DiskFileChanged: The file has become shorter than `stop` meanwhile.
            DiskError: As `Disk` says.
            ValueError: A negative start, or the file was closed.
        """
        self._check_open()
        if index(start) < 0:
            raise ValueError(f"start must not be negative, not {start}")
        if deadline is not None:
            check_deadline(deadline)
        stop = self._stat.size if stop is None else min(index(stop), self._stat.size)
        return self._chunks(start, stop, lambda: self._disk._ends(deadline))

    def as_io(self, *, deadline: float | None = None) -> RawDiskFile:
        """The file as a raw binary stream, for code that reads files: shutil, zipfile, tarfile, csv.

            with io.BufferedReader(disk.open("films.zip").as_io(), CHUNK) as stream, zipfile.ZipFile(stream) as films:
                films.read("cat.mp4")

        Every read of the stream is a `read` of this file: it blocks the calling greenlet, never the hub, and raises
        the same errors. What is not cached costs a visit to the disk each time, so read in large pieces: give
        `io.BufferedReader` a buffer of 256 KiB instead of its 8 KiB where a file is read from one end to the other,
        `shutil.copyfileobj` its third argument. A BufferedReader is for one greenlet at a time (RuntimeError for a
        second one).

        Some readers take every OSError for a defect of the file: `zipfile.ZipFile`, while it looks for the archive's
        directory, raises BadZipFile, whose `__context__` is the DiskError then. Look before calling a file broken.

        Args:
            deadline: Seconds for each read, and for each 256 KiB of one that is larger; None: that of the disk's
                limits.

        Returns:
            The stream, at position 0. Closing it closes this file.

        Raises:
            ValueError: The file was closed, or the deadline is none.
        """
        self._check_open()
        if deadline is not None:
            check_deadline(deadline)
        return RawDiskFile(self, deadline)

    def close(self) -> None:
        """Close the file in a worker as soon as nothing reads from it any more. Never blocks."""
        if not self._closed:
            self._closed = True
            self._reader = None
            self._close_unused()

    def __enter__(self) -> DiskFile:
        """Return the file itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:
        """Close the file when its last user forgot to."""
        if not getattr(self, "_closed", True) and self._descriptor >= 0:
            self._closed = True
            descriptor, self._descriptor = self._descriptor, -1
            self._disk._workers.close_descriptor_of_finalizer(descriptor)
            _warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)  # last: it may be an error

    def __repr__(self) -> str:
        """Disk and path."""
        return f"<DiskFile {self._disk.name}/{printable(self._path)}>"

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"{self!r} was closed")

    # -- how a read goes ---------------------------------------------------------------------------------------------

    def _read(self, offset: int, size: int, ends: float, tried: bytes | tuple[bytes, int] | None = None) -> bytes:
        """Read; `tried` is what came of the first piece, when that was tried inline already."""
        self._check_open()
        _check_range(offset, size)
        in_memory = self._from_first(offset, size)
        if in_memory is not None:
            return in_memory
        if self._reader is not None and size:
            return self._read_what_is_cached(self._reader, offset, size, ends, tried)
        return self._read_in_worker(offset, size, ends)

    def _read_what_is_cached(
        self, reader: CachedReader, offset: int, size: int, ends: float, tried: bytes | tuple[bytes, int] | None
    ) -> bytes:
        """Read on the hub as far as the page cache goes, the rest in a worker."""
        pieces: list[bytes] = []
        while True:
            wanted = min(size, LIMIT)
            found, tried = reader.read(offset, wanted) if tried is None else tried, None
            data, error = _data_and_error(found)
            pieces.append(data)
            offset, size = offset + len(data), size - len(data)
            if self._tally.due:
                self._disk._give_way()
                self._check_open()
            if error or len(data) < wanted or not size:
                break
        if error:
            pieces.append(self._read_in_worker(offset, size, ends))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _read_in_worker(self, offset: int, size: int, ends: float) -> bytes:
        job = Job(
            descriptor=self._descriptor,
            borrowed=True,
            offset=offset,
            size=size,
            close_mode=CloseMode.CLOSE_NEVER,
            read_ahead=self._read_ahead,
            quick=self._quick,
        )
        self._in_flight += 1
        self._disk._run(job, ends, self._path, on_completed=self._returned)
        self._quick = job.quick
        self._disk._check(job, self._path)
        return self._disk._take(job)

    def _from_first(self, offset: int, size: int) -> bytes | None:
        """The range, when the visit that opened the file has brought all of it, else None."""
        start = offset - self._first_offset
        if self._descriptor < 0 or (start >= 0 and start + size <= len(self._first)):
            return self._first if (start, size) == (0, len(self._first)) else self._first[start : start + size]
        return None

    def _chunks(self, start: int, stop: int, ends: Callable[[], float]) -> Generator[bytes, None, None]:
        if start >= stop:
            return
        self._read_ahead = READ_AHEAD
        begin = start - self._first_offset
        if 0 <= begin < len(self._first):
            chunk: bytes | Exception = self._first[begin : begin + stop - start] if begin else self._first
        else:
            chunk = self._attempt(start, min(CHUNK, stop - start), ends())
        ahead: Spawned[bytes | Exception] | None = None
        following: bytes | tuple[bytes, int] | None = None
        try:
            while start < stop:
                if isinstance(chunk, Exception):
                    raise chunk
                if not chunk:
                    raise DiskFileChanged(
                        self._disk.name,
                        self._path,
                        f"the file ends at byte {start} now, it was to be read up to {stop}",
                    )
                chunk = chunk[: stop - start]
                start += len(chunk)
                if start < stop:
                    size = min(CHUNK, stop - start)
                    following = self._cached_chunk(start, size)
                    if not isinstance(following, bytes):
                        ahead = hubs.current(self._disk._hub).spawn(self._attempt, start, size, ends(), following)
                yield chunk
                if ahead is not None:
                    chunk, ahead = ahead.get(), None
                elif isinstance(following, bytes):
                    chunk = following
        finally:
            if ahead is not None:
                ahead.kill()

    def _cached_chunk(self, offset: int, size: int) -> bytes | tuple[bytes, int] | None:
        """The next chunk, if no greenlet is needed to wait for it; else what was tried."""
        if self._reader is None:
            return None
        data, error = _data_and_error(self._reader.read(offset, size))
        if self._tally.due:
            self._disk._give_way()
        return (data, error) if error else data

    def _attempt(
        self, offset: int, size: int, ends: float, tried: bytes | tuple[bytes, int] | None = None
    ) -> bytes | Exception:
        """Read; an error is a result, because loops report what is raised in a greenlet even when it is awaited."""
        try:
            return self._read(offset, size, ends, tried)
        except Exception as error:  # noqa: BLE001 - raised again by whoever takes the chunk
            return error

    def _returned(self) -> None:
        self._in_flight -= 1
        if self._closed:
            self._close_unused()

    def _close_unused(self) -> None:
        # A job that has not started yet knows the file by its number, which must not be given to another one.
        if not self._in_flight:
            descriptor, self._descriptor = self._descriptor, -1
            # Without the root, the last close might be that of a file system which was unmounted meanwhile.
            if self._may_close_inline and descriptor >= 0 and self._disk._root_fd >= 0 and not unlinked(descriptor):
                os.close(descriptor)  # which never waits for the device where reads may be inline
            else:
                self._disk._workers.close_descriptor(descriptor)


def _data_and_error(found: bytes | tuple[bytes, int] | None) -> tuple[bytes, int]:
    """What `CachedReader.read` has returned, and the errno of what ended it before the end of the range, or 0."""
    if found is None:
        return b"", errno.EAGAIN
    return (found, 0) if isinstance(found, bytes) else found


def _check_range(offset: int, size: int) -> None:
    if not 0 <= offset <= LARGEST or not 0 <= size <= LARGEST - offset:
        raise ValueError(f"offset and size must be between 0 and {LARGEST} bytes, not {offset} and {size}")


def _nanoseconds(seconds: float) -> int:
    if not 0 <= seconds <= 1e9:  # also refuses NaN
        raise ValueError(f"a stall must last between 0 and a billion seconds, not {seconds}")
    return int(seconds * 1e9)


def _errno_name(code: int) -> str:
    return errno.errorcode.get(code, str(code))
