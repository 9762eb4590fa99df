"""What the machine and the user allow: system calls, descriptors, threads, the address, places of log and socket."""

from __future__ import annotations

import errno
import os
import platform
import pwd
import resource
import socket
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
            "checked as root, who may read everything",
            "check as the user of the server: sudo -u diskread diskread check --config FILE",
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
    step = f"LimitNOFILE={all_of_them} in the unit (ulimit -Hn for this shell), or connections = "
    if hard < least:
        text = f"{hard} are too few for {config.connections} connections: some clients would be refused"
        yield Finding("descriptors", "error", text, f"{step}{max(1, (hard - slots - SPARE_DESCRIPTORS) // 2)}")
    else:
        text = f"{hard} are enough for {config.connections} connections, but not for a file on each of them"
        yield Finding("descriptors", "warning", text, f"{step}{(hard - slots - SPARE_DESCRIPTORS) // 2}")


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
        if controllers not in ("", "pids"):
            continue
        top = mounted / controllers
        directory = top / path.lstrip("/")
        for each in (directory, *directory.parents):
            if top not in (each, *each.parents):
                break
            try:
                limit, current = ((each / name).read_text("ascii").strip() for name in ("pids.max", "pids.current"))
            except OSError:
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


def address(config: ServerConfig) -> Iterator[Finding]:
    """Whether the server could listen. Blocks for as long as the DNS takes, where the host is a name."""
    subject = f"{config.host} port {config.port}"
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, where = found[0]
        socket.create_server(where, family=family).close()
    except OSError as error:
        text = f"cannot be listened on: {error.strerror or error}"
        if error.errno == errno.EADDRINUSE:
            step = f"find out who it is: ss -ltnp 'sport = :{config.port}'"
            yield Finding(subject, "warning", "somebody listens there: this server, if it is running", step)
        elif error.errno == errno.EACCES:
            step = "a port from 1024 on, or AmbientCapabilities=CAP_NET_BIND_SERVICE in the unit"
            yield Finding(subject, "error", text, step)
        else:
            yield Finding(subject, "error", text, "an address of this machine: ip address; 0.0.0.0 is all of them")
        return
    yield Finding(subject, "ok", "free")


def places(config: ServerConfig) -> Iterator[Finding]:
    """Whether access log and administrative socket can be made. Blocks for as long as their file systems take."""
    if config.access_log not in (None, "-"):
        log = os.path.abspath(config.access_log or "")
        exists = os.path.exists(log)
        if os.access(log if exists else os.path.dirname(log), os.W_OK, effective_ids=True):
            yield Finding("access log", "ok", f"{log} can be written")
        else:
            step = "a directory that is there and that the user of the server may write in, or - for standard output"
            yield Finding("access log", "error", f"{log} cannot be written", step)
    if config.admin_socket is not None:
        directory = os.path.dirname(os.path.abspath(config.admin_socket))
        if os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
            yield Finding("administrative socket", "ok", f"{config.admin_socket} can be made")
        else:
            step = "make the directory for the user of the server; RuntimeDirectory= in the unit does, when it starts"
            # Under systemd it is there only while the service is.
            verdict = "warning" if directory.startswith("/run/") and not os.path.exists(directory) else "error"
            text = f"no socket can be made in {directory}"
            yield Finding("administrative socket", verdict, text, step)  # type: ignore[arg-type]
