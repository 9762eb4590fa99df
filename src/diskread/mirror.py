"""Mirrors: several disks with the same content behind one name. The answer comes although a disk does not."""

from __future__ import annotations

import math
import os
from collections import deque
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Generic, TypeVar

from . import hubs
from .disk import CHUNK, CLOCK, FIRST_CHUNK, READ_AHEAD, Disk, DiskFile, FileStat, _check_range
from .errors import (
    DiskBusy,
    DiskError,
    DiskFileChanged,
    DiskFileForbidden,
    DiskFileNotFound,
    DiskFileNotRegular,
    DiskIOError,
    DiskOffline,
    DiskTimeout,
    printable,
)
from .hedging import HedgeAfter, MirrorCounts, Plan, Policy, View
from .limits import check_deadline
from .raw_io import RawDiskFile

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping
    from types import TracebackType

    from .disk import Path
    from .hubs import HubName, Spawned, Waiter

Answer = TypeVar("Answer")

FAILURES = (DiskOffline, DiskBusy, DiskIOError, DiskTimeout, DiskFileChanged)
"""After these another disk is asked. What a path names (no regular file, forbidden, invalid) is the same everywhere."""

SHORTEST_ATTEMPT = 0.001
"""Seconds: a deadline must not be 0, and the plan's own is what counts."""

LONGEST_CHECKSUM = 4096
"""Bytes of a checksum file that are read. 128 hexadecimal digits are SHA-512; the name of the file may follow."""

ENOUGH = 20
"""Recent reads of a disk that a 95th percentile needs to mean anything."""


@dataclass(frozen=True)
class MirrorStat(FileStat):
    """What is known of a file of a mirror. Inode and device are 0: every disk has its own.

    Attributes:
        disk: Name of the disk that answered.
    """

    disk: str


@dataclass(frozen=True)
class _Version:
    """What has to be the same on two disks before one goes on where the other has stopped."""

    size: int
    mtime_ns: int
    checksum: str | None

    def same_as(self, other: _Version) -> bool:
        if self.checksum is None or other.checksum is None:
            return (self.size, self.mtime_ns) == (other.size, other.mtime_ns)
        return (self.size, self.checksum) == (other.size, other.checksum)

    def __str__(self) -> str:
        told = "" if self.checksum is None else f", checksum {printable(self.checksum.encode()[:64])}"
        return f"{self.size} bytes, modified at {self.mtime_ns} ns{told}"


@dataclass(frozen=True)
class MirrorStatus:
    """A mirror at one moment.

    Attributes:
        name: Its name.
        disks: The names of its disks.
        hedge_after: Seconds, or "p95".
        hedge_share: Hedges per read at most.
        accepting: Whether one of its disks takes reads.
        counts: What it has done so far.
    """

    name: str
    disks: tuple[str, ...]
    hedge_after: HedgeAfter
    hedge_share: float
    accepting: bool
    counts: MirrorCounts


class Mirror:
    """Several disks with the same files. A read is answered by one that can, by the others if that one cannot.

    The disks take turns; the healthier, quicker and less loaded are asked first. The next disk is asked at once when
    one is offline, busy or answers with an I/O error; when it has used up its part of the deadline (half of it, of two
    disks); and after `hedge_after` already, as long as such hedges are no more than `hedge_share` of the reads. The
    first good answer counts; reads that are not needed any more are abandoned, under the rules of `Disk`: they keep
    their slots until the system call returns.

    "No such file" is believed when all disks that are well say so: a file may have come to one disk before the others,
    or a disk may have been exchanged for an empty one, and the price, to open a file that is not there on another
    healthy disk, is small. A disk that is not well is not waited for.

    What is in the page cache of any of the disks is read at once, as `Disk` does.

    Methods that read block the calling greenlet, never the hub. They take one `deadline` in seconds for everything
    (None: the shortest of the disks' own), and raise what `Disk` says: the error of the disk that failed last, with
    what the others said in its reason. A greenlet that is killed leaves at once.
    """

    def __init__(
        self,
        name: str,
        disks: Iterable[Disk],
        *,
        hedge_after: HedgeAfter = "p95",
        hedge_share: float = 0.05,
        checksum_suffix: str | None = None,
    ) -> None:
        """Describe a mirror. Touches no device.

        Args:
            name: Name, for status and metrics.
            disks: Its disks, in any order. They can be used by themselves as well.
            hedge_after: Seconds without an answer after which the next disk is asked, too; "p95" means the 95th
                percentile of what the disk's own reads took lately (50 ms while too little is known, 2 ms at least).
                `math.inf` never does.
            hedge_share: Hedges per read at most, from 0 to 1, whatever the rate of reads; fail-overs do not count.
            checksum_suffix: ".sha256" or the like: beside each file there is one of that name with this at its end,
                whose first word is the checksum of the file. Where both disks have it, a stream goes on from the other
                disk if size and checksum are the same, whatever the modification times; otherwise these count. The
                checksum of what was read is not computed. Who replaces a file has to remove its checksum file before,
                and write the new one after it. It costs two more visits for each file that is larger than the first
                piece, where the checksum file is not in the page cache.

        Raises:
            ValueError: An empty name, no disk, the same disk (or name of a disk) twice, a disk without files, disks
                of different hubs, a number out of its range, or a suffix that is empty or contains "/" or NUL.
        """
        if not name:
            raise ValueError("a mirror needs a name")
        listed = list(disks)
        self._disks = {disk.name: disk for disk in listed}
        if not listed or len(self._disks) < len(listed):
            raise ValueError(f"mirror {name} needs disks of different names")
        if any(disk.root is None for disk in listed):
            raise ValueError(f"mirror {name} has a disk without files")
        if checksum_suffix is not None and (not checksum_suffix or set(checksum_suffix) & {"/", "\0"}):
            raise ValueError(f"mirror {name} needs a suffix like .sha256 for checksum files, not {checksum_suffix!r}")
        if len({disk.hub for disk in listed}) > 1:
            raise ValueError(f"mirror {name} needs disks of one hub")
        self._name = name
        self._hub: HubName = listed[0].hub
        self._checksum_suffix = None if checksum_suffix is None else os.fsencode(checksum_suffix)
        self._hedge_share = hedge_share
        self._policy = Policy(self._disks, self._look, hedge_after, hedge_share)
        self._deadline = min(disk.limits.deadline for disk in listed)

    @property
    def name(self) -> str:
        """The name of the mirror."""
        return self._name

    @property
    def disks(self) -> tuple[Disk, ...]:
        """Its disks."""
        return tuple(self._disks.values())

    @property
    def status(self) -> MirrorStatus:
        """The mirror at this moment. Never touches a device."""
        return MirrorStatus(
            name=self._name,
            disks=tuple(self._disks),
            hedge_after=self._policy.hedge_after,
            hedge_share=self._hedge_share,
            accepting=any(self._look(name).accepting for name in self._disks),
            counts=self._policy.counts.copy(),
        )

    def read(self, path: Path, offset: int = 0, size: int | None = None, *, deadline: float | None = None) -> bytes:
        """Read a range of a file, all of it from one disk.

        Args:
            path: The file, relative to the root.
            offset: First byte.
            size: Bytes to read at most; None reads to the end of the file.
            deadline: Seconds for all of it.

        Returns:
            The bytes; fewer than `size` only where the file ends.

        Raises:
            DiskError: As the class says.
        """
        ends = self._ends(deadline)
        for name in self._policy.in_turn():
            found = self._disks[name]._read_at_once(path, offset, size)
            if found is not None:
                self._answered_at_once(name)
                return found
        _, data = self._ask(lambda disk, left: disk.read(path, offset, size, deadline=left), ends)
        return data

    def read_cached(self, path: Path, largest: int = FIRST_CHUNK) -> tuple[MirrorStat, bytes] | None:
        """Read a whole file if it is small and in the page cache: as `Disk.read_cached`, from any of the disks."""
        for name in self._policy.in_turn():
            found = self._disks[name].read_cached(path, largest)
            if found is not None:
                self._answered_at_once(name)
                return _stat(found[0], name), found[1]
        return None

    def open(
        self, path: Path, *, offset: int = 0, size: int = FIRST_CHUNK, deadline: float | None = None
    ) -> MirrorFile:
        """Open a file and read its first piece in the same visit.

        Args:
            path: The file, relative to the root.
            offset: Where the first piece starts: the first byte that will be asked for.
            size: Bytes of the first piece, 0 for none.
            deadline: Seconds for it.

        Returns:
            The open file, to be closed by its `close` or a `with` block.

        Raises:
            DiskError: As the class says.
        """
        name, (file, version) = self._ask(
            lambda disk, left: self._open_on(disk, path, offset, size, left), self._ends(deadline), discard=_discard
        )
        return MirrorFile(self, os.fsencode(path), name, file, version)

    def stat(self, path: Path, *, deadline: float | None = None) -> MirrorStat:
        """Size and modification time of a regular file, and which disk said so.

        Args:
            path: The file, relative to the root.
            deadline: Seconds for it.

        Raises:
            DiskError: As the class says.
        """
        name, stat = self._ask(lambda disk, left: disk.stat(path, deadline=left), self._ends(deadline))
        return _stat(stat, name)

    def watch(self) -> None:
        """Begin to watch all disks now: see `Disk.watch`. Never blocks."""
        for disk in self._disks.values():
            disk.watch()

    def close(self) -> None:
        """Close all disks: see `Disk.close`. Never blocks."""
        for disk in self._disks.values():
            disk.close()

    def __enter__(self) -> Mirror:
        """Return the mirror itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all disks."""
        self.close()

    def __repr__(self) -> str:
        """Name and disks."""
        return f"<Mirror {self._name} of {', '.join(self._disks)}>"

    def _ends(self, deadline: float | None) -> float:
        return CLOCK() + (self._deadline if deadline is None else check_deadline(deadline))

    def _open_on(self, disk: Disk, path: Path, offset: int, size: int, left: float) -> tuple[DiskFile, _Version]:
        """Open a file on one disk, and find out which version of it that is."""
        ends, suffix = CLOCK() + left, self._checksum_suffix
        file = disk.open(path, offset=offset, size=size, deadline=left)
        checksum = None
        if suffix is not None and file._descriptor >= 0:  # else all of it is in memory: nothing can go on elsewhere
            try:
                checksum = _checksum(disk, os.fsencode(path) + suffix, max(SHORTEST_ATTEMPT, ends - CLOCK()))
                now = disk.stat(path, deadline=max(SHORTEST_ATTEMPT, ends - CLOCK()))
            except BaseException:
                file.close()
                raise
            if now != file.stat:  # it was replaced after it was opened: the checksum may be that of the other one
                checksum = None
        return file, _Version(file.stat.size, file.stat.mtime_ns, checksum)

    def _look(self, name: str) -> View:
        workers, now = self._disks[name]._workers, CLOCK()
        recent = workers.recent_disk_time
        return View(*workers.glance(), recent.usual(now), recent.percentile(95, now, least=ENOUGH))

    def _answered_at_once(self, name: str) -> None:
        counts = self._policy.counts
        counts.reads += 1
        counts.answers[name] += 1

    def _ask(
        self,
        question: Callable[[Disk, float], Answer],
        ends: float,
        *,
        first: str | None = None,
        discard: Callable[[Answer], None] | None = None,
    ) -> tuple[str, Answer]:
        plan = Plan(self._policy, CLOCK(), ends, first)
        return _Race(self._name, self._hub, self._disks, plan, question, ends, discard).run()


class MirrorFile:
    """An open file of a mirror. Made by `Mirror.open`; close it with `close` or a `with` block.

    It is read from the disk that opened it as long as that answers, then from another one on which size and
    modification time (to the nanosecond), or checksum file, are the same. Where they are not, the bytes of two versions
    would be mixed:
    `DiskFileChanged` is raised instead, if the first disk does not answer after all.
    """

    def __init__(self, mirror: Mirror, path: bytes, disk: str, file: DiskFile, version: _Version) -> None:
        """For `Mirror.open` only.

        Args:
            mirror: Its mirror.
            path: Its path.
            disk: Name of the disk that opened it.
            file: What that disk opened; taken over.
            version: Which version of it that is.
        """
        self._mirror = mirror
        self._path = path
        self._disk = disk
        # One for each disk that it was read from; what was opened once is kept until the end.
        self._files = {disk: file}
        self._size, self._version = file.stat.size, version
        self._streaming = False
        self._closed = False

    @property
    def disk(self) -> str:
        """Name of the disk that answered last."""
        return self._disk

    @property
    def stat(self) -> MirrorStat:
        """Size and modification time when the file was opened, and which disk answered last. Touches no device."""
        return MirrorStat(self._size, self._version.mtime_ns, 0, 0, self._disk)

    def read(self, offset: int = 0, size: int | None = None, *, deadline: float | None = None) -> bytes:
        """Read a range.

        Args:
            offset: First byte.
            size: Bytes at most; None reads to the end that the file had when it was opened.
            deadline: Seconds for it; None: the shortest of the disks' own.

        Returns:
            The bytes; fewer than `size` only where the file ended when it was opened.

        Raises:
            DiskFileChanged: It has become shorter meanwhile, and no other disk has it as it was.
            DiskError: As `Mirror` says.
            ValueError: A negative number, or the file was closed.
        """
        self._check_open()
        ends, offset = self._mirror._ends(deadline), index(offset)
        left = max(0, self._size - offset)
        size = left if size is None else index(size)
        _check_range(offset, size)
        return self._read(offset, min(size, left), ends)

    def chunks(
        self, start: int = 0, stop: int | None = None, *, deadline: float | None = None
    ) -> Generator[bytes, None, None]:
        """Stream a range. While the caller works on one chunk, the next one is being read.

        Args:
            start: First byte.
            stop: The byte after the last; None or anything beyond the end means the end that the file had when it was
                opened.
            deadline: Seconds for each chunk, whichever disks it takes.

        Yields:
            Chunks of at most 256 KiB, in order, all of the same version of the file.

        Raises:
            DiskFileChanged: As `read` says.
            DiskError: As `Mirror` says.
            ValueError: A negative start, or the file was closed.
        """
        self._check_open()
        if index(start) < 0:
            raise ValueError(f"start must not be negative, not {start}")
        if deadline is not None:
            check_deadline(deadline)
        self._streaming = True
        return self._chunks(start, self._size if stop is None else min(index(stop), self._size), deadline)

    def as_io(self, *, deadline: float | None = None) -> RawDiskFile:
        """The file as a raw binary stream: see `DiskFile.as_io`.

        Args:
            deadline: Seconds for each read, and for each 256 KiB of one that is larger; None: the shortest of the
                disks' own.

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
        """Close the file on all disks, as soon as nothing reads from it any more. Never blocks."""
        self._closed = True
        while self._files:
            self._files.popitem()[1].close()

    def __enter__(self) -> MirrorFile:
        """Return the file itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()

    def __repr__(self) -> str:
        """Mirror and path."""
        return f"<MirrorFile {self._mirror.name}/{printable(self._path)} on {self._disk}>"

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"{self!r} was closed")

    def _chunks(self, start: int, stop: int, deadline: float | None) -> Generator[bytes, None, None]:
        ahead: Spawned[bytes | Exception] | None = None
        following: bytes | None = None
        try:
            while start < stop:
                if ahead is not None:
                    chunk, ahead = ahead.get(), None
                else:
                    chunk = self._attempt(start, min(CHUNK, stop - start), deadline) if following is None else following
                if isinstance(chunk, Exception):
                    raise chunk
                start += len(chunk)
                if start < stop:
                    size = min(CHUNK, stop - start)
                    following = self._at_once(start, size)
                    if following is None:
                        ahead = hubs.current(self._mirror._hub).spawn(self._attempt, start, size, deadline)
                yield chunk
        finally:
            if ahead is not None:
                ahead.kill()

    def _attempt(self, offset: int, size: int, deadline: float | None) -> bytes | Exception:
        """Read; an error is a result, because loops report what is raised in a greenlet even when it is awaited."""
        try:
            self._check_open()
            piece = self._first_piece(offset, size)
            return piece or self._read(offset, size, self._mirror._ends(deadline))
        except Exception as error:  # noqa: BLE001 - raised again by whoever takes the chunk
            return error

    def _read(self, offset: int, size: int, ends: float) -> bytes:
        found = self._at_once(offset, size) if size else b""
        if found is not None:
            return found
        self._disk, data = self._mirror._ask(
            lambda disk, left: self._read_on(disk, offset, size, left), ends, first=self._disk
        )
        return data

    def _first_piece(self, offset: int, size: int) -> bytes:
        """What the visit that opened the file has brought of a range from its beginning on."""
        file = self._files[self._disk]
        begin = offset - file._first_offset
        return file._first[begin : begin + size] if begin >= 0 else b""

    def _at_once(self, offset: int, size: int) -> bytes | None:
        """A range, when it takes no visit to the disk."""
        file = self._files.get(self._disk)
        if file is None:
            return None
        found = file._from_first(offset, size) or file._cached_chunk(offset, size)
        return found if isinstance(found, bytes) and len(found) == size else None

    def _read_on(self, disk: Disk, offset: int, size: int, left: float) -> bytes:
        file, ends = self._files.get(disk.name), CLOCK() + left
        if file is None:
            file = self._open_on(disk, offset, size, left)
            left = max(SHORTEST_ATTEMPT, ends - CLOCK())
        file._read_ahead = READ_AHEAD if self._streaming else 0
        data = file.read(offset, size, deadline=left)
        if len(data) < size:
            raise DiskFileChanged(
                disk.name, self._path, f"the file ends at byte {offset + len(data)} now, not at {self._size}"
            )
        return data

    def _open_on(self, disk: Disk, offset: int, size: int, left: float) -> DiskFile:
        """The same version of the file on another disk."""
        try:
            file, version = self._mirror._open_on(disk, self._path, offset, size, left)
        except (DiskFileNotFound, DiskFileForbidden, DiskFileNotRegular) as error:
            raise DiskFileChanged(disk.name, self._path, f"not the file that was opened: {error.reason}") from error
        if not version.same_as(self._version):
            file.close()
            reason = f"another version than the one that was opened: {version}; not {self._version}"
            raise DiskFileChanged(disk.name, self._path, reason)
        if self._closed or disk.name in self._files:  # meanwhile, by others that use this file
            file.close()
            self._check_open()
        return self._files.setdefault(disk.name, file)


class _Race(Generic[Answer]):
    """One question on its way to the disks of a mirror, each asked in a greenlet of its own."""

    def __init__(
        self,
        mirror: str,
        hub: HubName,
        disks: Mapping[str, Disk],
        plan: Plan,
        question: Callable[[Disk, float], Answer],
        ends: float,
        discard: Callable[[Answer], None] | None,
    ) -> None:
        self._mirror = mirror
        self._disks = disks
        self._plan = plan
        self._question = question
        self._ends = ends
        self._discard = discard
        self._over = False
        self._hub = hubs.current(hub)
        self._replies: deque[tuple[str, Answer | None, Exception | None]] = deque()
        self._waiter: Waiter | None = None
        self._attempts: list[Spawned[None]] = []
        self._errors: list[DiskError] = []

    def run(self) -> tuple[str, Answer]:
        """The name of the disk that answered, and its answer.

        Raises:
            DiskError: None did.
        """
        if not self._hub.may_wait():
            raise RuntimeError(f"{self._mirror}: the hub itself must not wait for a disk; spawn a greenlet")
        plan = self._plan
        try:
            while True:
                while (name := plan.next(CLOCK())) is not None:
                    self._attempts.append(self._hub.spawn(self._attempt, name))
                now = CLOCK()
                if plan.over(now) and not self._replies:
                    raise self._error()
                self._wait(plan.due - now)
                if not self._replies:
                    continue
                name, answer, error = self._replies.popleft()
                if error is None:
                    plan.answered(name)
                    return name, answer  # type: ignore[return-value]  # None only beside an error
                self._failed(name, error)
        finally:
            self._end()

    def _wait(self, seconds: float) -> None:
        """Until there is a reply, but not longer than some seconds. Blocks the greenlet."""
        if self._replies or seconds <= 0:
            return
        self._waiter = waiter = self._hub.waiter()
        timer = None if seconds == math.inf else self._hub.timer(seconds, waiter.switch, False, ref=True)
        try:
            waiter.get()
        finally:
            self._waiter = None
            if timer is not None:
                timer.stop()

    def _failed(self, name: str, error: Exception) -> None:
        if isinstance(error, DiskFileNotFound):
            self._plan.not_found(name, CLOCK())
        elif isinstance(error, FAILURES):
            self._plan.failed(name)
        else:
            raise error
        self._errors.append(error)

    def _attempt(self, name: str) -> None:
        answer, error = None, None
        try:
            answer = self._question(self._disks[name], max(SHORTEST_ATTEMPT, self._ends - CLOCK()))
        except Exception as failure:  # noqa: BLE001 - the greenlet that waits raises it
            error = failure
        if not self._over:
            self._replies.append((name, answer, error))
            if self._waiter is not None:
                waiter, self._waiter = self._waiter, None
                self._hub.soon(waiter.switch, True)
        elif answer is not None and self._discard is not None:
            self._discard(answer)

    def _error(self) -> DiskError:
        """Of several errors the one that tells the caller most, with what the other disks said."""
        errors = self._errors
        kind = DiskFileNotFound if self._plan.missing else DiskFileChanged
        chosen = next((each for each in errors if isinstance(each, kind)), errors[-1])
        others = "; ".join(str(each) for each in errors if each is not chosen)
        if others:
            chosen.reason += f" (mirror {self._mirror}: {others})"
        return chosen

    def _end(self) -> None:
        """Abandon who has not answered yet, and throw away what nobody takes any more. Never blocks."""
        self._over = True
        for attempt in self._attempts:
            attempt.kill()
        while self._replies:
            _, answer, _ = self._replies.popleft()
            if answer is not None and self._discard is not None:
                self._discard(answer)
        self._errors = []


def _checksum(disk: Disk, path: bytes, deadline: float) -> str | None:
    try:
        words = disk.read(path, 0, LONGEST_CHECKSUM, deadline=deadline).split(maxsplit=1)
    except (DiskFileNotFound, DiskFileForbidden, DiskFileNotRegular):
        return None
    return words[0].decode("utf-8", "replace").lower() if words else None


def _discard(opened: tuple[DiskFile, _Version]) -> None:
    opened[0].close()


def _stat(stat: FileStat, disk: str) -> MirrorStat:
    return MirrorStat(stat.size, stat.mtime_ns, 0, 0, disk)
