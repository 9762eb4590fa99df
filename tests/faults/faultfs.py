#!/usr/bin/env python3
"""A pass-through FUSE file system that hangs, delays or fails requests when it is told to.

It shows BACKING at MOUNTPOINT, speaks the protocol of /dev/fuse itself (linux/fuse.h, version 7.31) and needs
nothing but the standard library and root. It must be a process of its own: a program that reads from a file
system that it serves itself waits for itself. It dies with the thread that started it (PR_SET_PDEATHSIG), and
the kernel then answers everybody who is stuck with ENOTCONN.

The control socket takes one JSON object per line and answers each with one line. "ok" says whether it was
obeyed; if not, "error" says why.

  {"cmd": "add", "action": ACTION, "op": OP, ...}
      Add a rule; the first rule that matches a request applies.
      action   "hang"            hold the request until it is released, then serve it
               "delay"           hold it for "seconds", then serve it
               "fail"            answer at once with "errno" (5, EIO, if not given)
               "hang-then-fail"  hold it until it is released, or for "seconds", then answer with "errno"
      op       open, lookup, getattr, read, flush, release, readdir, ... (the names of linux/fuse.h) or "*"
      path     glob for the path below the mount point ("sub/file", "" is the root); "*" also matches "/"
      range    [start, end] in bytes, end excluded: only reads (or writes) that overlap it
      count    how many requests the rule applies to before it is used up
  {"cmd": "clear"}
      Forget the rules; what is held stays held.
  {"cmd": "release", "path": GLOB, "count": N, "errno": N}
      Answer what is held, oldest first; path, count and errno may be left out.
  {"cmd": "status"}
      "held": the requests that are held; "counters": how many were seen of each operation.

Which requests the kernel sends is its own affair: it caches attributes and names (--attr-timeout,
--entry-timeout) and data, so a second stat of a file sends no getattr, and a cached page no read. Read-ahead
widens buffered reads. Nobody waits for a release: close(2) waits for the flush only.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import enum
import errno
import fnmatch
import json
import math
import os
import selectors
import signal
import socket
import struct
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_libc = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG = 1  # linux/prctl.h
MS_NOSUID, MS_NODEV, MNT_DETACH = 2, 4, 2  # sys/mount.h

ROOT_NODE = 1  # FUSE_ROOT_ID
PROTOCOL_MAJOR, PROTOCOL_MINOR = 7, 31

# struct fuse_... of linux/fuse.h. "x" stands for padding and for fields that are of no use here.
IN_HEADER = struct.Struct("<IIQQ8xI4x")  # fuse_in_header: len, opcode, unique, nodeid, pid
OUT_HEADER = struct.Struct("<IiQ")  # fuse_out_header: len, error, unique
INIT_IN = struct.Struct("<IIII")  # fuse_init_in: major, minor, max_readahead, flags
# fuse_init_out: major, minor, max_readahead, flags, max_background, congestion_threshold, max_write,
# time_gran, max_pages
INIT_OUT = struct.Struct("<IIIIHHIIH34x")
# fuse_attr: ino, size, blocks, atime, mtime, ctime, their nanoseconds, mode, nlink, uid, gid, rdev, blksize
ATTR = struct.Struct("<6Q9I4x")
ATTR_OUT = struct.Struct("<QI4x")  # fuse_attr_out, without attr: attr_valid, attr_valid_nsec
# fuse_entry_out, without attr: nodeid, generation, entry_valid, attr_valid, entry_valid_nsec, attr_valid_nsec
ENTRY_OUT = struct.Struct("<4Q2I")
# fuse_setattr_in: valid, size, atime, mtime, atimensec, mtimensec, mode, uid, gid
SETATTR_IN = struct.Struct("<I12xQ8xQQ8xII4xI4xII4x")
OPEN_IN = struct.Struct("<I4x")  # fuse_open_in: flags
OPEN_OUT = struct.Struct("<QI4x")  # fuse_open_out: fh, open_flags
CREATE_IN = struct.Struct("<III4x")  # fuse_create_in: flags, mode, umask
MKDIR_IN = struct.Struct("<II")  # fuse_mkdir_in: mode, umask
RENAME_IN = struct.Struct("<Q")  # fuse_rename_in: newdir
RENAME2_IN = struct.Struct("<QI4x")  # fuse_rename2_in: newdir, flags
HANDLE_IN = struct.Struct("<Q")  # fuse_release_in, fuse_fsync_in: fh
READ_IN = struct.Struct("<QQI20x")  # fuse_read_in, fuse_write_in: fh, offset, size
SETXATTR_IN = struct.Struct("<II")  # fuse_setxattr_in without FUSE_SETXATTR_EXT: size, flags
GETXATTR_IN = struct.Struct("<I4x")  # fuse_getxattr_in: size; 0 asks for the size only
GETXATTR_OUT = struct.Struct("<I4x")  # fuse_getxattr_out: size
WRITE_OUT = struct.Struct("<I4x")  # fuse_write_out: size
# fuse_kstatfs: blocks, bfree, bavail, files, ffree, bsize, namelen, frsize
STATFS_OUT = struct.Struct("<5Q3I28x")
DIRENT = struct.Struct("<QQII")  # fuse_dirent: ino, off, namelen, type; the name follows, padded to 8 bytes

# The requests take at most this many bytes of data, in either direction.
MAX_PAGES = 256
MAX_DATA = MAX_PAGES * 4096

UNKNOWN_INO = 0xFFFFFFFF  # what libfuse puts into a directory entry whose inode it does not know
NANOSECONDS = 1_000_000_000


class InitFlag(enum.IntFlag):
    """FUSE_ASYNC_READ ... of linux/fuse.h: what both sides are able to do."""

    ASYNC_READ = 1 << 0
    BIG_WRITES = 1 << 5
    ASYNC_DIO = 1 << 15
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22


class OpenFlag(enum.IntFlag):
    """FOPEN_... of linux/fuse.h."""

    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1


class AttrChange(enum.IntFlag):
    """FATTR_... of linux/fuse.h: which attributes a setattr sets."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8


class Opcode(enum.IntEnum):
    """Enum fuse_opcode of linux/fuse.h: what is served; the kernel gets ENOSYS for all others."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BATCH_FORGET = 42
    RENAME2 = 45


# FORGET and BATCH_FORGET have no answer. INTERRUPT (somebody who waits got a signal) may be ignored, and is:
# a dying disk does not listen to signals.
UNANSWERED = {Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT}
HOUSEKEEPING = {Opcode.INIT, *UNANSWERED}
FAULTABLE = {opcode.name.lower() for opcode in Opcode if opcode not in HOUSEKEEPING}

# The requests about a name in the directory `node`, and the size of what precedes the name in the body.
NAMED_BY_PARENT = {
    Opcode.LOOKUP: 0,
    Opcode.MKDIR: MKDIR_IN.size,
    Opcode.UNLINK: 0,
    Opcode.RMDIR: 0,
    Opcode.RENAME: RENAME_IN.size,
    Opcode.RENAME2: RENAME2_IN.size,
    Opcode.CREATE: CREATE_IN.size,
}


@dataclass(frozen=True)
class Request:
    """What the kernel asks for."""

    opcode: Opcode
    unique: int
    node: int
    thread: int
    body: bytes

    @property
    def op(self) -> str:
        """The name of the operation, as rules and counters use it."""
        return self.opcode.name.lower()

    def names(self) -> list[str]:
        """The file names that follow the fixed part of the body, each ended by a zero byte."""
        fixed = NAMED_BY_PARENT.get(self.opcode, len(self.body))
        return [os.fsdecode(name) for name in self.body[fixed:].split(b"\0")[:-1]]

    def extent(self) -> tuple[int, int] | None:
        """Offset and size in bytes of a read or a write; None for all others."""
        if self.opcode not in (Opcode.READ, Opcode.WRITE):
            return None
        _, offset, size = READ_IN.unpack_from(self.body)
        return offset, size


class BadCommandError(ValueError):
    """The control socket was told something that makes no sense."""


@dataclass
class Rule:
    """Which requests are treated how."""

    op: str
    path: str
    span: tuple[int, int] | None
    count: int | None
    hold_seconds: float
    errno: int | None
    expires: float = math.inf

    @classmethod
    def from_message(cls, message: dict[str, Any], max_stall: float, now: float) -> Rule:
        """Build the rule that an "add" command describes.

        Args:
            message: the command.
            max_stall: longest time in seconds for which a request is held and a hang stays in force.
            now: time.monotonic().

        Raises:
            BadCommandError: a field is missing or has no meaning.
        """
        for name, kind in (("path", str), ("count", int), ("errno", int)):
            if not isinstance(message.get(name, kind()), kind):
                raise BadCommandError(f"{name} must be of type {kind.__name__}, not {message[name]!r}")
        action, op = message.get("action"), message.get("op", "read")
        if op != "*" and op not in FAULTABLE:
            raise BadCommandError(f"unknown op {op!r}: one of {', '.join(sorted(FAULTABLE))} or *")
        span = message.get("range")
        if span is not None and op not in ("read", "write"):
            raise BadCommandError(f"a range selects reads or writes, not {op}")
        rule = cls(op, message.get("path", "*"), span and (span[0], span[1]), message.get("count"), 0.0, None)
        seconds = message.get("seconds")
        if seconds is not None and not 0 <= seconds <= max_stall:
            raise BadCommandError(f"seconds must be 0 to {max_stall} (--max-stall), not {seconds}")
        if action == "delay":
            if seconds is None:
                raise BadCommandError("delay needs seconds")
            rule.hold_seconds = seconds
        elif action in ("hang", "hang-then-fail"):
            rule.hold_seconds = max_stall if seconds is None else seconds
            rule.expires = now + max_stall
        elif action != "fail":
            raise BadCommandError(f"unknown action {action!r}: hang, delay, fail or hang-then-fail")
        if action in ("fail", "hang-then-fail"):
            rule.errno = message.get("errno", errno.EIO)
        return rule

    def matches(self, request: Request, path: str, now: float) -> bool:
        """Whether the rule applies to this request for that path."""
        return (
            self.op in ("*", request.op)
            and self.count != 0
            and now < self.expires
            and fnmatch.fnmatchcase(path, self.path)
            and self._overlaps(request.extent())
        )

    def _overlaps(self, extent: tuple[int, int] | None) -> bool:
        if self.span is None or extent is None:
            return True
        offset, size = extent
        return offset < self.span[1] and self.span[0] < offset + size


@dataclass(frozen=True)
class HeldRequest:
    """A request that waits for its answer."""

    request: Request
    path: str
    errno: int | None
    since: float
    due: float

    def describe(self, now: float) -> dict[str, Any]:
        """The request as the "status" command lists it."""
        offset, size = self.request.extent() or (None, None)
        return {
            "op": self.request.op,
            "path": self.path,
            "thread": self.request.thread,
            "seconds": now - self.since,
            "offset": offset,
            "size": size,
        }


@dataclass
class Faults:
    """The rules and what they made the file system hold; knows neither the device nor the files."""

    max_stall: float
    rules: list[Rule] = field(default_factory=list)
    held: dict[int, HeldRequest] = field(default_factory=dict)

    def rule_for(self, request: Request, path: str) -> Rule | None:
        """The first rule that applies to the request; counts it as used."""
        if request.opcode in HOUSEKEEPING:
            return None
        now = time.monotonic()
        rule = next((rule for rule in self.rules if rule.matches(request, path, now)), None)
        if rule is not None and rule.count is not None:
            rule.count -= 1
        return rule

    def hold(self, request: Request, path: str, rule: Rule) -> None:
        """Keep the request until it is taken out again."""
        now = time.monotonic()
        self.held[request.unique] = HeldRequest(request, path, rule.errno, now, now + rule.hold_seconds)

    def take(self, path: str, count: int | None) -> Iterator[HeldRequest]:
        """Take out the oldest `count` (None: all) requests whose path matches the glob."""
        matching = [held for held in self.held.values() if fnmatch.fnmatchcase(held.path, path)]
        for held in matching[:count]:
            yield self.held.pop(held.request.unique)

    def take_due(self) -> Iterator[HeldRequest]:
        """Take out the requests that have been held for long enough."""
        now = time.monotonic()
        for held in [held for held in self.held.values() if held.due <= now]:
            yield self.held.pop(held.request.unique)

    def seconds_to_next_due(self) -> float | None:
        """How long nothing falls due; None when nothing is held."""
        if not self.held:
            return None
        return max(0.0, min(held.due for held in self.held.values()) - time.monotonic())


class PassThrough:
    """Serves requests from the backing directory; handlers return the body of the answer or raise OSError."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Serve `options.backing` with the cache settings of the other options."""
        self._backing = os.path.realpath(options.backing)
        self._attr_timeout: float = options.attr_timeout
        self._entry_timeout: float = options.entry_timeout
        self._open_flags = OpenFlag.DIRECT_IO * options.direct_io | OpenFlag.KEEP_CACHE * options.keep_cache
        # A node is a path, and is never forgotten: a test's file system is small and short-lived.
        self._paths = {ROOT_NODE: ""}
        self._nodes = {"": ROOT_NODE}
        self._last_node = ROOT_NODE
        self._listings: dict[int, list[str]] = {}
        self._last_listing = 0

    def serve(self, request: Request) -> bytes:
        """Do what the request asks for.

        Raises:
            OSError: whatever the backing directory says; ENOSYS for an operation without a handler.
        """
        handler = self._HANDLERS.get(request.opcode)
        if handler is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        return handler(self, request)

    def path(self, request: Request) -> str:
        """The path below the mount point that the request is about; the root is ""."""
        path = self._paths[request.node]
        return os.path.join(path, request.names()[0]) if request.opcode in NAMED_BY_PARENT else path

    def _real(self, path: str) -> str:
        return os.path.join(self._backing, path)

    def _real_path(self, request: Request) -> str:
        return self._real(self.path(request))

    def _attributes(self, path: str, node: int) -> bytes:
        st = os.lstat(self._real(path))
        seconds, nanoseconds = zip(
            *(divmod(t, NANOSECONDS) for t in (st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns)), strict=True
        )
        owner = (st.st_mode, st.st_nlink, st.st_uid, st.st_gid)
        return ATTR.pack(node, st.st_size, st.st_blocks, *seconds, *nanoseconds, *owner, 0, 4096)

    def _entry(self, path: str) -> bytes:
        node = self._nodes.get(path)
        if node is None:
            os.lstat(self._real(path))
            self._last_node = node = self._last_node + 1
            self._nodes[path], self._paths[node] = node, path
        entry_s, entry_ns = _timeout(self._entry_timeout)
        attr_s, attr_ns = _timeout(self._attr_timeout)
        return ENTRY_OUT.pack(node, 0, entry_s, attr_s, entry_ns, attr_ns) + self._attributes(path, node)

    def _lookup(self, request: Request) -> bytes:
        return self._entry(self.path(request))

    def _getattr(self, request: Request) -> bytes:
        valid = ATTR_OUT.pack(*_timeout(self._attr_timeout))
        return valid + self._attributes(self.path(request), request.node)

    def _setattr(self, request: Request) -> bytes:
        path = self._real_path(request)
        change, size, atime, mtime, atime_ns, mtime_ns, mode, uid, gid = SETATTR_IN.unpack_from(request.body)
        if change & AttrChange.MODE:
            os.chmod(path, mode & 0o7777)
        if change & (AttrChange.UID | AttrChange.GID):
            os.chown(path, uid if change & AttrChange.UID else -1, gid if change & AttrChange.GID else -1)
        if change & AttrChange.SIZE:
            os.truncate(path, size)
        if change & (AttrChange.ATIME | AttrChange.MTIME):
            st = os.lstat(path)
            new_atime, new_mtime = atime * NANOSECONDS + atime_ns, mtime * NANOSECONDS + mtime_ns
            if change & (AttrChange.ATIME_NOW | AttrChange.MTIME_NOW):
                new_atime = new_mtime = time.time_ns()
            times = (
                new_atime if change & AttrChange.ATIME else st.st_atime_ns,
                new_mtime if change & AttrChange.MTIME else st.st_mtime_ns,
            )
            os.utime(path, ns=times)
        return self._getattr(request)

    def _readlink(self, request: Request) -> bytes:
        return os.fsencode(os.readlink(self._real_path(request)))

    def _mkdir(self, request: Request) -> bytes:
        mode, umask = MKDIR_IN.unpack_from(request.body)
        os.mkdir(self._real_path(request), mode & ~umask)
        return self._entry(self.path(request))

    def _unlink(self, request: Request) -> bytes:
        os.unlink(self._real_path(request))
        self._nodes.pop(self.path(request), None)
        return b""

    def _rmdir(self, request: Request) -> bytes:
        os.rmdir(self._real_path(request))
        self._nodes.pop(self.path(request), None)
        return b""

    def _rename(self, request: Request) -> bytes:
        new_parent = RENAME_IN.unpack_from(request.body)[0]
        if request.opcode is Opcode.RENAME2 and RENAME2_IN.unpack_from(request.body)[1]:
            raise OSError(errno.EINVAL, "RENAME_NOREPLACE and RENAME_EXCHANGE are not supported")
        old, new = self.path(request), os.path.join(self._paths[new_parent], request.names()[1])
        os.rename(self._real(old), self._real(new))
        for path in [path for path in self._nodes if path == old or path.startswith(old + "/")]:
            node = self._nodes.pop(path)
            moved = new + path[len(old) :]
            self._nodes[moved], self._paths[node] = node, moved
        return b""

    def _opened(self, path: str, flags: int, mode: int = 0) -> bytes:
        # The kernel has resolved links and permissions and appends by itself.
        kept = os.O_ACCMODE | os.O_TRUNC | os.O_CREAT | os.O_EXCL
        fd = os.open(self._real(path), flags & kept | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        return OPEN_OUT.pack(fd, self._open_flags)

    def _open(self, request: Request) -> bytes:
        return self._opened(self.path(request), OPEN_IN.unpack_from(request.body)[0])

    def _create(self, request: Request) -> bytes:
        flags, mode, umask = CREATE_IN.unpack_from(request.body)
        opened = self._opened(self.path(request), flags | os.O_CREAT, mode & ~umask)
        return self._entry(self.path(request)) + opened

    def _read(self, request: Request) -> bytes:
        fd, offset, size = READ_IN.unpack_from(request.body)
        return os.pread(fd, size, offset)

    def _write(self, request: Request) -> bytes:
        fd, offset, size = READ_IN.unpack_from(request.body)
        return WRITE_OUT.pack(os.pwrite(fd, request.body[READ_IN.size : READ_IN.size + size], offset))

    def _fsync(self, request: Request) -> bytes:
        os.fsync(HANDLE_IN.unpack_from(request.body)[0])
        return b""

    def _release(self, request: Request) -> bytes:
        os.close(HANDLE_IN.unpack_from(request.body)[0])
        return b""

    def _setxattr(self, request: Request) -> bytes:
        size, flags = SETXATTR_IN.unpack_from(request.body)
        name, _, value = request.body[SETXATTR_IN.size :].partition(b"\0")
        os.setxattr(self._real_path(request), name, value[:size], flags)
        return b""

    def _getxattr(self, request: Request) -> bytes:
        name = request.body[GETXATTR_IN.size :].rstrip(b"\0")
        return _fitted(request, os.getxattr(self._real_path(request), name))

    def _listxattr(self, request: Request) -> bytes:
        names = os.listxattr(self._real_path(request))
        return _fitted(request, b"".join(os.fsencode(name) + b"\0" for name in names))

    def _removexattr(self, request: Request) -> bytes:
        os.removexattr(self._real_path(request), request.body.rstrip(b"\0"))
        return b""

    def _opendir(self, request: Request) -> bytes:
        self._last_listing += 1
        self._listings[self._last_listing] = [".", "..", *sorted(os.listdir(self._real_path(request)))]
        return OPEN_OUT.pack(self._last_listing, 0)

    def _readdir(self, request: Request) -> bytes:
        handle, position, size = READ_IN.unpack_from(request.body)
        entries = b""
        for index, name in enumerate(self._listings[handle][position:], position + 1):
            encoded = os.fsencode(name)
            entry = DIRENT.pack(UNKNOWN_INO, index, len(encoded), 0) + encoded
            entry += bytes(-len(entry) % 8)
            if len(entries) + len(entry) > size:
                break
            entries += entry
        return entries

    def _releasedir(self, request: Request) -> bytes:
        del self._listings[HANDLE_IN.unpack_from(request.body)[0]]
        return b""

    def _statfs(self, request: Request) -> bytes:
        v = os.statvfs(self._backing)
        return STATFS_OUT.pack(
            v.f_blocks, v.f_bfree, v.f_bavail, v.f_files, v.f_ffree, v.f_bsize, v.f_namemax, v.f_frsize
        )

    def _nothing(self, request: Request) -> bytes:
        return b""

    _HANDLERS: ClassVar[dict[Opcode, Callable[[PassThrough, Request], bytes]]] = {
        Opcode.LOOKUP: _lookup,
        Opcode.GETATTR: _getattr,
        Opcode.SETATTR: _setattr,
        Opcode.READLINK: _readlink,
        Opcode.MKDIR: _mkdir,
        Opcode.UNLINK: _unlink,
        Opcode.RMDIR: _rmdir,
        Opcode.RENAME: _rename,
        Opcode.RENAME2: _rename,
        Opcode.OPEN: _open,
        Opcode.CREATE: _create,
        Opcode.READ: _read,
        Opcode.WRITE: _write,
        Opcode.SETXATTR: _setxattr,
        Opcode.GETXATTR: _getxattr,
        Opcode.LISTXATTR: _listxattr,
        Opcode.REMOVEXATTR: _removexattr,
        Opcode.FLUSH: _nothing,
        Opcode.FSYNC: _fsync,
        Opcode.RELEASE: _release,
        Opcode.OPENDIR: _opendir,
        Opcode.READDIR: _readdir,
        Opcode.RELEASEDIR: _releasedir,
        Opcode.FSYNCDIR: _nothing,
        Opcode.STATFS: _statfs,
        Opcode.ACCESS: _nothing,
    }


def _fitted(request: Request, value: bytes) -> bytes:
    """The answer to a request for extended attributes: the value, or its size where that was asked for."""
    size = GETXATTR_IN.unpack_from(request.body)[0]
    if size == 0:
        return GETXATTR_OUT.pack(len(value))
    if len(value) > size:
        raise OSError(errno.ERANGE, os.strerror(errno.ERANGE))
    return value


def _timeout(seconds: float) -> tuple[int, int]:
    whole = int(seconds)
    return whole, int((seconds - whole) * NANOSECONDS)


class FuseDevice:
    """A FUSE file system as its server sees it: a descriptor that requests and answers go through."""

    def __init__(self, mountpoint: str) -> None:
        """Mount an empty FUSE file system.

        Raises:
            OSError: no /dev/fuse, or not allowed to use it or to mount.
        """
        self._mountpoint = os.fsencode(mountpoint)
        self.fd = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        data = f"fd={self.fd},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()}"
        data += ",allow_other,default_permissions"
        flags = MS_NOSUID | MS_NODEV
        if _libc.mount(b"faultfs", self._mountpoint, b"fuse.faultfs", flags, data.encode()):
            number = ctypes.get_errno()
            os.close(self.fd)
            raise OSError(number, f"cannot mount FUSE: {os.strerror(number)}", mountpoint)
        self._buffer = bytearray(MAX_DATA + 65536)

    def receive(self) -> Request | None:
        """The next request; None when there is none, or when it was one that is not served.

        Raises:
            OSError: ENODEV or ECONNABORTED when the file system is no longer mounted.
        """
        try:
            length = os.readv(self.fd, [self._buffer])
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno == errno.ENOENT:  # the request was taken back while it was being read
                return None
            raise
        _, code, unique, node, thread = IN_HEADER.unpack_from(self._buffer)
        try:
            opcode = Opcode(code)
        except ValueError:
            self.answer(unique, error=errno.ENOSYS)
            return None
        return Request(opcode, unique, node, thread, bytes(self._buffer[IN_HEADER.size : length]))

    def answer(self, unique: int, data: bytes = b"", error: int = 0) -> None:
        """Answer the request with data, or with an error number."""
        header = OUT_HEADER.pack(OUT_HEADER.size + len(data), -error, unique)
        try:
            os.writev(self.fd, [header, data])
        except OSError as failure:
            # ENOENT: nobody waits for the answer any more. ENODEV: the file system was unmounted.
            if failure.errno not in (errno.ENOENT, errno.ENODEV):
                raise

    def close(self) -> None:
        """Unmount. Whoever still waits for an answer gets ENOTCONN."""
        _libc.umount2(self._mountpoint, MNT_DETACH)
        os.close(self.fd)


class Server:
    """One thread that serves the device and the control socket."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Mount the file system and listen on the control socket."""
        self._options = options
        self._files = PassThrough(options)
        self._faults = Faults(options.max_stall)
        self._counters: Counter[str] = Counter()
        self._unfinished: dict[socket.socket, bytes] = {}
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(options.control_socket)
        self._listener.listen()
        try:
            self._device = FuseDevice(options.mountpoint)
        except OSError:
            os.unlink(options.control_socket)
            raise
        self._selector.register(self._device.fd, selectors.EVENT_READ, self._serve_device)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def run(self) -> None:
        """Serve until the file system is unmounted."""
        try:
            while True:
                for key, _ in self._selector.select(self._faults.seconds_to_next_due()):
                    key.data(key.fileobj)
                for held in self._faults.take_due():
                    self._finish(held.request, held.errno)
        except OSError as error:
            if error.errno not in (errno.ENODEV, errno.ECONNABORTED):
                raise
        finally:
            os.unlink(self._options.control_socket)
            self._device.close()

    def _serve_device(self, _fd: int) -> None:
        request = self._device.receive()
        if request is None:
            return
        self._counters[request.op] += 1
        if request.opcode is Opcode.INIT:
            self._device.answer(request.unique, self._negotiate(request))
        elif request.opcode not in UNANSWERED:
            self._treat(request)

    def _treat(self, request: Request) -> None:
        path = self._files.path(request)
        rule = self._faults.rule_for(request, path)
        if rule is None:
            self._finish(request, None)
        elif rule.hold_seconds:
            self._faults.hold(request, path, rule)
        else:
            self._finish(request, rule.errno)

    def _finish(self, request: Request, error: int | None) -> None:
        # A release that is told to fail happens all the same: the kernel will not ask again.
        try:
            data = b"" if error and request.opcode is not Opcode.RELEASE else self._files.serve(request)
        except OSError as failure:
            error, data = failure.errno or errno.EIO, b""
        self._device.answer(request.unique, b"" if error else data, error or 0)

    def _negotiate(self, request: Request) -> bytes:
        _, minor, max_readahead, offered = INIT_IN.unpack_from(request.body)
        wanted = InitFlag.ASYNC_READ | InitFlag.BIG_WRITES | InitFlag.ASYNC_DIO
        wanted |= InitFlag.PARALLEL_DIROPS | InitFlag.MAX_PAGES
        # By default the kernel sends 12 buffered reads at a time: the 13th stuck one would block all files.
        background = self._options.max_background
        congestion = background * 3 // 4
        return INIT_OUT.pack(
            PROTOCOL_MAJOR,
            min(minor, PROTOCOL_MINOR),
            max_readahead,
            wanted & offered,
            background,
            congestion,
            MAX_DATA,
            1,
            MAX_PAGES,
        )

    def _accept(self, _listener: socket.socket) -> None:
        connection, _ = self._listener.accept()
        self._unfinished[connection] = b""
        self._selector.register(connection, selectors.EVENT_READ, self._serve_control)

    def _serve_control(self, connection: socket.socket) -> None:
        try:
            received = connection.recv(65536)
            *lines, self._unfinished[connection] = (self._unfinished[connection] + received).split(b"\n")
            for line in lines:
                connection.sendall(json.dumps(self._obey(line)).encode() + b"\n")
        except ConnectionError:
            received = b""
        if not received:
            self._selector.unregister(connection)
            del self._unfinished[connection]
            connection.close()

    def _obey(self, line: bytes) -> dict[str, Any]:
        try:
            message = json.loads(line)
            command = self._COMMANDS.get(message.get("cmd"))
            if command is None:
                raise BadCommandError(f"unknown cmd {message.get('cmd')!r}: {', '.join(self._COMMANDS)}")
            return {"ok": True, **command(self, message)}
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            return {"ok": False, "error": str(error)}

    def _add(self, message: dict[str, Any]) -> dict[str, Any]:
        self._faults.rules.append(Rule.from_message(message, self._faults.max_stall, time.monotonic()))
        return {}

    def _clear(self, message: dict[str, Any]) -> dict[str, Any]:
        self._faults.rules.clear()
        return {}

    def _release(self, message: dict[str, Any]) -> dict[str, Any]:
        released = list(self._faults.take(message.get("path", "*"), message.get("count")))
        for held in released:
            self._finish(held.request, message.get("errno", held.errno))
        return {"released": len(released)}

    def _status(self, message: dict[str, Any]) -> dict[str, Any]:
        now = time.monotonic()
        return {
            "held": [held.describe(now) for held in self._faults.held.values()],
            "counters": dict(self._counters),
        }

    _COMMANDS: ClassVar[dict[str, Callable[[Server, dict[str, Any]], dict[str, Any]]]] = {
        "add": _add,
        "clear": _clear,
        "release": _release,
        "status": _status,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("backing", metavar="BACKING", help="directory whose files are shown")
    add("mountpoint", metavar="MOUNTPOINT", help="empty directory where they are shown")
    add("control_socket", metavar="CONTROL_SOCKET", help="path of the Unix socket to make")
    add("--direct-io", action="store_true", help="no page cache: every read reaches this program")
    add("--keep-cache", action="store_true", help="keep cached pages when a file is opened again")
    add("--attr-timeout", type=float, default=60.0, metavar="SECONDS", help="cache attributes (default: 60)")
    add("--entry-timeout", type=float, default=60.0, metavar="SECONDS", help="cache names (default: 60)")
    add("--max-background", type=int, default=1000, metavar="N", help="buffered reads at once (1000)")
    add(
        "--max-stall",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="release a held request, and forget a rule that hangs, after this long (default: 60)",
    )
    return parser


def _exit(_signal: int, _frame: object) -> NoReturn:
    sys.exit(0)


def main() -> None:
    """Serve until unmounted or told to end; print "ready" once the file system can be used."""
    options = _parser().parse_args()
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGTERM, _exit)
    try:
        server = Server(options)
    except OSError as error:
        sys.exit(f"faultfs: {error}")
    print("ready", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.run()


if __name__ == "__main__":
    main()
