"""What there is to know of each disk before it is served. Everything that could hang has a deadline."""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import gevent

from diskread import DiskTimeout
from diskread._cached import file_system
from diskread.inline import KNOWN, OTHERS
from diskread.probe import probe

from . import Finding
from .bounded import within

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from diskread import Disks, Limits
    from diskread.probe import Findings

_BROKEN = "see what the device says: dmesg, smartctl -a; the server starts without it and serves the others"


@dataclass(frozen=True)
class Seen:
    """What was seen of a root that answers.

    Attributes:
        probed: What a probe found out.
        device: The block device, as `device_name` calls it.
        kind: The type of the file system, as statfs(2) has it.
        searchable: Whether files in it may be opened.
        owned: Whether the file that was read is this user's, as O_NOATIME wants it: open(2).
    """

    probed: Findings
    device: str
    kind: int
    searchable: bool
    owned: bool


def look(disks: Disks, deadline: float) -> dict[str, Seen | Finding]:
    """Look at all disks at the same time. Blocks the greenlet for as long as the slowest one takes, or the deadline.

    Args:
        disks: Those that have a root are looked at; their own slots are not used.
        deadline: Seconds that each has to answer.

    Returns:
        By the name of the disk: what was seen, or what went wrong.
    """
    roots = {disk.name: disk.root for disk in disks.values() if disk.root is not None}
    looks = {name: gevent.spawn(_look, name, root, deadline) for name, root in roots.items()}
    return {name: each.get() for name, each in looks.items()}


def describe(disks: Disks, seen: Mapping[str, Seen | Finding]) -> Iterator[Finding]:
    """Say of each disk what was seen, and which of them would hang together.

    Args:
        disks: The disks.
        seen: What `look` has returned of them.
    """
    if not seen:
        step = "name a disk: [disk.NAME] with root = a directory on a device of its own"
        yield Finding("disks", "warning", "the configuration names none: there are simulated stalls only", step)
    on_device = {device_name(os.stat("/").st_dev): "the root file system"}
    for name, each in seen.items():
        if isinstance(each, Finding):
            yield each
            continue
        subject = f"disk {name}"
        yield from _describe(subject, disks[name].root or "", each, disks[name].limits)
        other = on_device.setdefault(each.device, subject)
        if other != subject:
            step = "is it mounted? A disk should be a device of its own: what is on one device hangs together"
            yield Finding(subject, "warning", f"it is on the same device as {other}: {each.device}", step)


def mirrors(disks: Disks, seen: Mapping[str, Seen | Finding]) -> Iterator[Finding]:
    """Say of each mirror whether one of its disks can stand in for another.

    Args:
        disks: The disks and mirrors.
        seen: What `look` has returned of the disks.
    """
    for mirror in disks.mirrors.values():
        subject = f"mirror {mirror.name}"
        looks = {disk.name: seen[disk.name] for disk in mirror.disks}
        answering = {name: each for name, each in looks.items() if isinstance(each, Seen) and each.searchable}
        devices = {each.device for each in answering.values()}
        lacking = ", ".join(name for name in looks if name not in answering)
        if not answering:
            yield Finding(subject, "error", f"none of its disks can be read: {lacking}", "see what is said of each")
        elif lacking:
            text = f"it has to do without {lacking}"
            yield Finding(subject, "warning", text, "see what is said of it: the mirror works as long as one disk does")
        elif len(devices) < len(answering):
            text = f"{', '.join(answering)} are not each on a device of their own: what is on one device hangs together"
            yield Finding(subject, "warning", text, "are all of them mounted? Put each copy on another device")
        else:
            yield Finding(subject, "ok", f"{', '.join(answering)} answer, each on a device of its own")


def device_name(number: int) -> str:
    """The name of a block device, that of the whole one for a partition; the number where there is none (tmpfs, NFS).

    Asks sysfs alone. What a device mapper or RAID device is made of is not looked into.

    Args:
        number: A device number (`st_dev`).
    """
    device = f"{os.major(number)}:{os.minor(number)}"
    path = os.path.realpath(f"/sys/dev/block/{device}")
    if not os.path.exists(path):
        return device
    return os.path.basename(os.path.dirname(path) if os.path.exists(f"{path}/partition") else path)


def advice(reason: str) -> str:
    """What to do about the reason for which nothing can be read inline."""
    if "file system" in reason:
        return "nothing is wrong: each read takes a thread there; ext4 and xfs do without for cached data"
    if "reads ahead" in reason:
        return "a smaller read-ahead will do: echo 128 > /sys/block/DEVICE/queue/read_ahead_kb"
    return f"this is Linux {os.uname().release}: 6.5 or newer is needed, and a container may filter system calls"


def _look(name: str, root: str, deadline: float) -> Seen | Finding:
    subject = f"disk {name}"
    try:
        return within(deadline, _see, os.fsencode(root))
    except DiskTimeout:
        return Finding(subject, "error", f"{root} has not answered within {deadline:g} s", _BROKEN)
    except OSError as error:
        return Finding(subject, "error", f"{root}: {error.strerror or error}", _step(error.errno, root))


def _step(error: int | None, root: str) -> str:
    steps = {
        errno.ENOENT: "mount it (findmnt, /etc/fstab), or correct root in the configuration",
        errno.ENOTDIR: "root has to be a directory: correct it in the configuration",
        errno.EACCES: f"let the user of the server through every directory on the way: namei -l {root}",
    }
    return steps.get(error or 0, _BROKEN)


def _see(root: bytes) -> Seen:
    """Blocks the native thread for as long as the disk takes."""
    probed = probe(root, None, None)
    owned = True
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        kind, _ = file_system(directory)
        if probed.sample is not None:
            with contextlib.suppress(FileNotFoundError):  # it has been removed since
                owner = os.stat(probed.sample, dir_fd=directory, follow_symlinks=False).st_uid
                owned = os.geteuid() in (0, owner)
    finally:
        os.close(directory)
    searchable = os.access(root, os.X_OK, effective_ids=True)
    return Seen(probed, device_name(probed.device), kind, searchable, owned)


def _describe(subject: str, root: str, seen: Seen, limits: Limits) -> Iterator[Finding]:
    if not seen.searchable:
        step = f"let the user of the server search it: chmod o+x {root}, or a group or ACL of its own"
        yield Finding(subject, "error", f"{root} answers, but none of its files may be opened: no permission", step)
        return
    kind = KNOWN.get(seen.kind) or OTHERS.get(seen.kind) or f"file system of type {seen.kind:#x}"
    yield Finding(subject, "ok", f"{root} answers: {kind} on device {seen.device}")
    if seen.probed.sample is None:
        step = f"if it is not meant to be empty: is it mounted, and may the user of the server read it? ls -l {root}"
        yield Finding(subject, "warning", "no file was found that this user may read", step)
    elif not seen.probed.direct:
        step = "nothing can be done on this file system; a hang may be found out by its first client only"
        yield Finding(subject, "warning", "probes cannot read past the page cache (no O_DIRECT)", step)
    yield _inline(subject, seen, limits)


def _inline(subject: str, seen: Seen, limits: Limits) -> Finding:
    capability = seen.probed.capability
    if limits.inline == "off":
        return Finding(subject, "ok", 'each read takes a thread: inline = "off"')
    if capability.reason is not None:
        return Finding(subject, "warning", f"each read takes a thread: {capability.reason}", advice(capability.reason))
    if capability.flags & os.O_NOATIME and not seen.owned:
        step = "mount it with noatime, or run the server as the owner of the files"
        text = "each read of another user's files takes a thread: their access times would have to be updated"
        return Finding(subject, "warning", text, step)
    return Finding(
        subject,
        "ok",
        f"what is cached is read without a thread; the kernel reads {capability.window // 1024} KiB ahead",
    )
