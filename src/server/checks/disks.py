"""What there is to know of each disk before it is served. What could hang is done on the disk's own slots."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import gevent

from diskread import Disk, DiskError, DiskTimeout, Limits
from diskread._cached import file_system
from diskread.inline import KNOWN, OTHERS, ST_NOATIME, read_ahead
from diskread.probe import Findings, probe

from . import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskread import Disks

_ROOT_IS_MISSING = {
    errno.ENOENT: "mount it (findmnt, /etc/fstab), or correct root in the configuration",
    errno.ENOTDIR: "root has to be a directory: correct it in the configuration",
    errno.EACCES: "let the user of the server through every directory on the way: namei -l ROOT",
}

_BROKEN = "see what the device says: dmesg, smartctl -a; the server starts without it and serves the others"


@dataclass(frozen=True)
class _Seen:
    """What was seen of a root that answers."""

    probed: Findings
    kind: int
    keeps_access_times: bool
    searchable: bool
    owned: bool
    """Whether the file that was read is this user's, as O_NOATIME wants it."""
    read_ahead: int


def look_at(disks: Disks, deadline: float) -> list[Finding]:
    """Look at all disks at the same time. Blocks the greenlet for as long as the slowest one takes, or the deadline.

    Args:
        disks: Those that have a root; they are not touched themselves.
        deadline: Seconds that each has to answer.
    """
    roots = {disk.name: os.fsencode(disk.root) for disk in disks.values() if disk.root is not None}
    looks = {name: gevent.spawn(_look, name, root, deadline) for name, root in roots.items()}
    gevent.joinall(list(looks.values()))
    found, devices = [], {_device_of_system(): "the root file system"}
    for name, look in looks.items():
        seen = look.get()
        subject = f"disk {name}"
        if isinstance(seen, Finding):
            found.append(seen)
            continue
        device = seen.probed.device
        found += _describe(subject, os.fsdecode(roots[name]), seen, disks[name].limits)
        if device in devices:
            step = "is it mounted? A disk is a device of its own: when one hangs, so does all that is on it"
            found.append(Finding(subject, "warning", f"it is on the same device as {devices[device]}", step))
        devices.setdefault(device, subject)
    return found


def _device_of_system() -> int:
    return os.stat("/").st_dev


def _look(name: str, root: bytes, deadline: float) -> _Seen | Finding:
    subject, where = f"disk {name}", os.fsdecode(root)
    with Disk(name, None, Limits(deadline=deadline, threads=1)) as disk:
        try:
            return disk.run(_see, root)
        except DiskTimeout:
            return Finding(subject, "error", f"{where} has not answered within {deadline:g} s", _BROKEN)
        except (DiskError, OSError) as error:
            step = _ROOT_IS_MISSING.get(error.errno or 0, _BROKEN)
            return Finding(subject, "error", f"{where}: {error.strerror or error}", step)


def _see(root: bytes) -> _Seen:
    """Blocks the native thread for as long as the disk takes."""
    probed = probe(root, None, None)
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        kind, flags = file_system(directory)
        owned = True
        if probed.sample is not None:
            owner = os.stat(probed.sample, dir_fd=directory, follow_symlinks=False).st_uid
            owned = os.geteuid() in (0, owner)
    finally:
        os.close(directory)
    searchable = os.access(root, os.X_OK, effective_ids=True)
    return _Seen(probed, kind, not flags & ST_NOATIME, searchable, owned, read_ahead(probed.device))


def _describe(subject: str, root: str, seen: _Seen, limits: Limits) -> Iterator[Finding]:
    if not seen.searchable:
        step = f"let the user of the server search it: chmod o+x {root}, or a group or ACL of its own"
        yield Finding(subject, "error", f"{root} answers, but none of its files may be opened: no permission", step)
        return
    device = f"{os.major(seen.probed.device)}:{os.minor(seen.probed.device)}"
    kind = KNOWN.get(seen.kind) or OTHERS.get(seen.kind) or f"type {seen.kind:#x}"
    yield Finding(
        subject, "ok", f"{root} answers: {kind}, device {device}, the kernel reads {seen.read_ahead // 1024} KiB ahead"
    )
    if seen.probed.sample is None:
        step = f"if it is not meant to be empty: is it mounted, and may the user of the server read it? ls -l {root}"
        yield Finding(subject, "warning", "no file was found that this user may read", step)
    elif not seen.probed.direct:
        step = "nothing can be done about the file system; a hang may be found out by its first client only"
        yield Finding(subject, "warning", "probes cannot read past the page cache (no O_DIRECT)", step)
    yield _inline(subject, seen, limits)


def _inline(subject: str, seen: _Seen, limits: Limits) -> Finding:
    reason = seen.probed.capability.reason
    if limits.inline == "off":
        return Finding(subject, "ok", 'each read takes a thread: inline = "off"')
    if reason is not None:
        return Finding(subject, "warning", f"each read takes a thread: {reason}", advice(reason))
    if seen.keeps_access_times and not seen.owned:
        step = "mount it with noatime, or run the server as the owner of the files"
        text = "each read of another user's files takes a thread: access times would have to be updated"
        return Finding(subject, "warning", text, step)
    return Finding(subject, "ok", "what is cached is read without a thread")


def advice(reason: str) -> str:
    """What to do about the reason for which nothing can be read inline."""
    if "file system" in reason:
        return "nothing is wrong: each read takes a thread there; ext4 and xfs do without for cached data"
    if "reads ahead" in reason:
        return "a smaller read-ahead will do: echo 128 > /sys/block/DEVICE/queue/read_ahead_kb"
    return f"this is Linux {os.uname().release}: 6.5 or newer is needed, and a container may filter system calls"
