"""What a result was measured on: the machine and the versions. No host name, no path, nothing that identifies it."""

from __future__ import annotations

import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import gevent
import msgspec

from diskread import _syscalls


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The machine and the versions behind a result.

    Attributes:
        processor: Model of the CPU.
        cores: CPUs that this process may run on.
        memory_bytes: Physical memory.
        virtual: Whether a hypervisor is underneath; None when the kernel does not say.
        kernel: Name and release of the kernel.
        python: Implementation and version.
        gil: Whether this interpreter has a GIL (free-threaded builds of Python 3.13 and later may not).
        switch_interval_s: Seconds after which a thread that waits for the GIL asks for it (`sys.getswitchinterval`).
        gevent: Version.
        loop: Event loop of the hub and the backend that it uses.
        greenlet: Version.
        cython: Version that compiled the extension.
        diskread: Version.
    """

    processor: str
    cores: int
    memory_bytes: int
    virtual: bool | None
    kernel: str
    python: str
    gil: bool
    switch_interval_s: float
    gevent: str
    loop: str
    greenlet: str
    cython: str
    diskread: str

    def lines(self) -> list[tuple[str, str]]:
        """The description as pairs of a title and a text, for people."""
        hypervisor = {True: ", virtual machine", False: "", None: ""}[self.virtual]
        return [
            ("CPU", f"{self.processor}, {self.cores} cores{hypervisor}"),
            ("Memory", f"{self.memory_bytes / 2**30:.1f} GiB"),
            ("Kernel", self.kernel),
            ("Python", f"{self.python}{'' if self.gil else ' without GIL'}"),
            ("GIL switch interval", f"{self.switch_interval_s * 1000:g} ms"),
            ("gevent", f"{self.gevent}, {self.loop}; greenlet {self.greenlet}"),
            ("Cython", self.cython),
            ("diskread", self.diskread),
        ]


def describe() -> Machine:
    """Describe this machine and this process. Reads /proc; what is not there is "unknown"."""
    return Machine(
        processor=_cpuinfo("model name") or platform.machine() or "unknown",
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        virtual=_virtual(),
        kernel=f"{platform.system()} {platform.release()}",
        python=f"{platform.python_implementation()} {platform.python_version()}",
        gil=has_gil(),
        switch_interval_s=sys.getswitchinterval(),
        gevent=_version("gevent"),
        loop=_loop(),
        greenlet=_version("greenlet"),
        cython=_cython(),
        diskread=_version("diskread"),
    )


def load_average() -> tuple[float, float, float]:
    """Processes that ran or waited to run, averaged over 1, 5 and 15 minutes."""
    return os.getloadavg()


class CpuClock:
    """CPU time from now on: that of this process, and that of everybody else."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._busy = _busy_cpu_seconds()
        self._own = time.process_time()

    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._begin

    def others_share(self) -> float | None:
        """Share (0 to 1) of the machine's CPU time since the start that went to other processes, or was stolen.

        None where /proc/stat is missing.
        """
        busy = _busy_cpu_seconds()
        if busy is None or self._busy is None:
            return None
        others = (busy - self._busy) - (time.process_time() - self._own)
        return max(0.0, others / (self.elapsed_s() * (os.cpu_count() or 1)))


def file_system(path: Path) -> str:
    """Type of the file system that holds a path ("ext4"); "unknown" when it cannot be told.

    Args:
        path: An existing file or directory.
    """
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    # Fields of proc_pid_mountinfo(5): the third is the device, the first after a lone "-" the type.
    for line in _read("/proc/self/mountinfo").splitlines():
        fields = line.split(" ")
        if fields[2] == wanted:
            return fields[fields.index("-") + 1]
    return "unknown"


def device_bytes_read() -> int | None:
    """Bytes that this process has made the storage layer fetch: `read_bytes` of proc_pid_io(5).

    Reads from the page cache are not in it. None where the kernel does not count (CONFIG_TASK_IO_ACCOUNTING).
    """
    for line in _read("/proc/self/io").splitlines():
        name, _, value = line.partition(": ")
        if name == "read_bytes":
            return int(value)
    return None


def has_gil() -> bool:
    """Whether this interpreter runs with a GIL."""
    enabled = getattr(sys, "_is_gil_enabled", None)  # Python 3.13 and later
    return True if enabled is None else bool(enabled())


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _busy_cpu_seconds() -> float | None:
    # The first line of proc_stat(5): user nice system idle iowait irq softirq steal, then guest, which user contains.
    fields = _read("/proc/stat").partition("\n")[0].split()[1:9]
    if len(fields) < 8:
        return None
    ticks = [int(each) for each in fields]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _cpuinfo(name: str) -> str | None:
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _virtual() -> bool | None:
    flags = _cpuinfo("flags")  # x86; other architectures do not say
    return None if flags is None else "hypervisor" in flags.split()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _loop() -> str:
    loop = gevent.get_hub().loop
    library = type(loop).__module__.split(".")[1]  # gevent.libev.corecext, gevent.libuv.loop
    module = sys.modules[type(loop).__module__]
    release = getattr(module, "get_version", None)
    name = str(release()) if release is not None else library
    backend = getattr(loop, "backend", None)
    return f"{name}, {backend}" if isinstance(backend, str) else name


def _cython() -> str:
    # Cython keeps the types that its modules share in a module named after its version ("_cython_3_3_1").
    name = type(_syscalls.pread).__module__
    return name.removeprefix("_cython_").replace("_", ".") if name.startswith("_cython_") else "unknown"
