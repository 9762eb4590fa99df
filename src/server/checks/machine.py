"""What the machine allows: system calls, descriptors, threads."""

from __future__ import annotations

import os
import platform
import pwd
import resource
from pathlib import Path
from typing import TYPE_CHECKING

from diskread import Disk, DiskError, Limits
from diskread._cached import kernel_lacks

from . import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskread import Disks

    from ..config import ServerConfig

SPARE_DESCRIPTORS = 64
"""For standard streams, event loop, listening sockets, the disks' roots, logs."""

SPARE_THREADS = 16
"""For the main thread, gevent's own pool (10, for the DNS), and a spare."""


def user() -> Iterator[Finding]:
    """As whom all of this is looked at. Blocks for as long as the user database takes."""
    number = os.geteuid()
    try:
        name = pwd.getpwuid(number).pw_name
    except KeyError:
        name = str(number)
    if number == 0:
        yield Finding(
            "user",
            "warning",
            "checked as root, who may read everything and has no limit of threads",
            "if the server runs as another user, check as that one: sudo -u USER diskread check --config FILE",
        )
    else:
        yield Finding("user", "ok", f"checked as {name}; what another user may do can differ")


def kernel() -> Iterator[Finding]:
    """Whether the kernel, and a seccomp filter, let the system calls through."""
    release = platform.release()
    with Disk("kernel", "/proc", Limits(inline="off")) as disk:
        try:
            disk.stat("version")
        except DiskError as error:
            step = "Linux 5.6 or newer is needed; a container's seccomp profile has to let openat2 through"
            yield Finding("kernel", "error", f"Linux {release}: openat2(2) cannot be used: {error}", step)
            return
    directory = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        lack = kernel_lacks(directory)
    finally:
        os.close(directory)
    if lack is None:
        yield Finding("kernel", "ok", f"Linux {release} has openat2, cachestat and preadv2(RWF_NOWAIT)")
        return
    call, code = lack
    text = f"Linux {release}: {call} says {os.strerror(code)}, so each read takes a thread"
    if _version(release) < (6, 5):
        yield Finding("kernel", "warning", text, "Linux 6.5 or newer reads what is cached without a thread")
    else:
        step = "this kernel has it: let it through in the seccomp filter of the container or of the unit"
        yield Finding("kernel", "warning", text, step)


def _version(release: str) -> tuple[int, int]:
    major, _, rest = release.partition(".")
    minor = rest.partition(".")[0].partition("-")[0]
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else (0, 0)


def descriptors(config: ServerConfig, disks: Disks) -> Iterator[Finding]:
    """Whether there are enough for the connections, and for a file on each of them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # the server raises its soft limit to that
    slots = sum(disk.limits.threads for disk in disks.values())
    least = config.connections + slots + SPARE_DESCRIPTORS
    all_of_them = least + config.connections
    if hard == resource.RLIM_INFINITY or hard >= all_of_them:
        yield Finding("descriptors", "ok", f"{_limit(hard)} for {config.connections} connections and a file on each")
        return
    step = f"LimitNOFILE={all_of_them} in the unit (ulimit -Hn {all_of_them} for a shell)"
    fitting = (hard - slots - SPARE_DESCRIPTORS) // 2
    if fitting > 0:
        step += f", or connections = {fitting}"
    if hard < least:
        text = f"{hard} are too few for {config.connections} connections: some clients would be refused"
        yield Finding("descriptors", "error", text, step)
    else:
        text = f"{hard} are enough for {config.connections} connections, but not for a file on each of them"
        yield Finding("descriptors", "warning", text, step)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def threads(disks: Disks) -> Iterator[Finding]:
    """Whether all slots can have a thread at a time, when every disk hangs."""
    needed = SPARE_THREADS
    for disk in disks.values():
        # Other calls than reads use gevent's pool beside the native engine.
        needed += disk.limits.threads * (2 if disk.limits.engine == "native" else 1)
    too_few = False
    for left, where, step in (*_left_in_cgroup(), *_left_to_user()):
        if left < needed:
            too_few = True
            text = f"all slots together may need {needed}; {where} leaves {left}"
            yield Finding("threads", "error", text, f"{step}, or fewer threads in [limits]")
    if not too_few:
        yield Finding("threads", "ok", f"{needed} for all slots together can be had")


def _left_in_cgroup() -> Iterator[tuple[int, str, str]]:
    for left, limit in pids_left(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")):
        step = "TasksMax= in the unit, --pids-limit of the container (the limit of this shell need not be the server's)"
        yield left, f"the cgroup's limit of {limit} processes and threads (pids.max)", step


def pids_left(of_process: Path, mounted: Path) -> Iterator[tuple[int, int]]:
    """How many more processes and threads each cgroup of a process may have: cgroups(7), version 1 and 2.

    Args:
        of_process: What /proc/PID/cgroup is.
        mounted: Where cgroups are mounted.

    Yields:
        What is left, and the limit, for each cgroup on the way up that has one.
    """
    try:
        lines = of_process.read_text("utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "pids" not in controllers.split(","):
            continue
        top = mounted / controllers
        directory = top / path.lstrip("/")
        for each in (directory, *directory.parents):
            if top not in (each, *each.parents):
                break
            try:
                limit, current = ((each / name).read_text("ascii").strip() for name in ("pids.max", "pids.current"))
            except OSError:  # the uppermost has no limit; those above a container's are out of sight
                continue
            if limit != "max":
                yield max(0, int(limit) - int(current)), int(limit)


def _left_to_user() -> Iterator[tuple[int, str, str]]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    number = os.getuid()
    if soft == resource.RLIM_INFINITY or number == 0:  # the limit does not hold for root: getrlimit(2)
        return
    used = 0
    for process in os.scandir("/proc"):
        if process.name.isdecimal():
            try:
                used += len(os.listdir(f"{process.path}/task")) if os.stat(process.path).st_uid == number else 0
            except OSError:  # it has ended
                continue
    yield max(0, soft - used), f"the user's limit of {soft} (ulimit -u)", "LimitNPROC= in the unit, or limits.conf(5)"
