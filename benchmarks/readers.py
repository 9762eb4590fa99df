"""Ways to read a cached file, each family in a process of its own: hotpath.py starts them and tells them what to do.

eventlet, asyncio and trio do not mix with gevent in one process. Whatever a family needs is imported only there. A
process says on its standard output what it can do, then answers each line on its standard input; all in JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import sys
import time
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    Read = Callable[[int], Any]
    Make = Callable[[Path, int], Read]

DESCRIPTORS: dict[Path, int] = {}


def descriptor(path: Path) -> int:
    """An open descriptor of a file, the same for all who ask."""
    if path not in DESCRIPTORS:
        DESCRIPTORS[path] = os.open(path, os.O_RDONLY)
    return DESCRIPTORS[path]


def make_pread(path: Path, size: int) -> Read:
    pread, opened = os.pread, descriptor(path)
    return lambda offset: pread(opened, size, offset)


def open_pread_close(path: Path, size: int, offset: int) -> bytes:
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(opened, size, offset)
    finally:
        os.close(opened)


def make_open_pread_close(path: Path, size: int) -> Read:
    return lambda offset: open_pread_close(path, size, offset)


class Family:
    """What one process can do.

    Attributes:
        readers: Functions that make a reader of a file, by name.
        versions: Of the packages that take part.
        missing: What cannot take part, and why.
    """

    def __init__(self) -> None:
        self.readers: dict[str, Make] = {}
        self.versions: dict[str, str] = {}
        self.missing: dict[str, str] = {}

    def load(self, module: str, *readers: str) -> Any:
        """Import a module; None when it is not installed, and these readers are missing then."""
        package = module.partition(".")[0]
        try:
            found = importlib.import_module(module)
        except ImportError:
            self.missing.update(dict.fromkeys(readers, f"{package} is not installed"))
            return None
        self.versions[package] = version(package)
        return found

    def run(self, reads: list[Read], offsets: list[int], count: int) -> None:
        """Have every one of `reads` done `count` times, all of them at the same time."""
        raise NotImplementedError

    def measure(self, name: str, path: Path, size: int, span: int, concurrency: int, count: int) -> dict[str, float]:
        """Read a range of a file again and again.

        Returns:
            Seconds per read: by the clock, and of the CPU in all threads of the process.
        """
        reads = [self.readers[name](path, size) for _ in range(concurrency)]
        offsets = list(range(0, span, size))
        each = max(1, count // concurrency)
        cpu, wall = time.process_time(), time.perf_counter()
        self.run(reads, offsets, each)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {"wall_s": wall / (each * concurrency), "cpu_s": cpu / (each * concurrency)}


def one_after_another(read: Read, offsets: list[int], count: int) -> None:
    for offset in islice(cycle(offsets), count):
        read(offset)


class GeventFamily(Family):
    """Plain calls, ours, and what gevent has."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        import gevent
        from gevent.fileobject import FileObjectThread

        from diskread import Disk, Limits

        self._gevent = gevent
        self.versions["gevent"] = version("gevent")
        self.readers = {"os.pread": make_pread, "os.open, pread, close": make_open_pread_close}
        options = inspect.signature(Limits).parameters
        ways: dict[str, dict[str, str]] = {
            "inline": {"inline": "auto"},
            "native engine": {"inline": "off", "engine": "native"},
            "threadpool engine": {"inline": "off", "engine": "threadpool"},
        }
        for way, wanted in ways.items():
            lacking = next(
                (name for name in wanted if name not in options and wanted[name] in {"auto", "native"}), None
            )
            if lacking is not None:
                names = (f"Disk.read, {way}", f"DiskFile.read, {way}")
                self.missing.update(dict.fromkeys(names, f"this diskread has no Limits.{lacking}"))
                continue
            values: Any = {name: value for name, value in wanted.items() if name in options}
            self._add(way, Disk("a", directory, Limits(**values)))
        apply = gevent.get_hub().threadpool.apply

        def make_apply(path: Path, size: int) -> Read:
            opened = descriptor(path)
            return lambda offset: apply(os.pread, (opened, size, offset))

        def make_apply_by_path(path: Path, size: int) -> Read:
            return lambda offset: apply(open_pread_close, (path, size, offset))

        def make_file_object(path: Path, size: int) -> Read:
            file: Any = FileObjectThread(path.open("rb", buffering=0), "rb", bufsize=0)  # type: ignore[call-overload]

            def read(offset: int) -> bytes:
                file.seek(offset)
                content: bytes = file.read(size)
                return content

            return read

        self.readers["gevent.threadpool.apply, open file"] = make_apply
        self.readers["gevent.threadpool.apply, by path"] = make_apply_by_path
        self.readers["gevent FileObjectThread, open file"] = make_file_object

    def _add(self, way: str, disk: Any) -> None:
        def make_by_path(path: Path, size: int) -> Read:
            name, read = path.name, disk.read
            return lambda offset: read(name, offset, size)

        def make_by_file(path: Path, size: int) -> Read:
            file = disk.open(path.name, size=0)
            self._opened.append(file)
            read = file.read
            return lambda offset: read(offset, size)

        self.readers[f"Disk.read, {way}"] = make_by_path
        self.readers[f"DiskFile.read, {way}"] = make_by_file

    _opened: list[Any] = []  # noqa: RUF012 - the process has one family

    def run(self, reads: list[Read], offsets: list[int], count: int) -> None:
        if len(reads) == 1:
            one_after_another(reads[0], offsets, count)
        else:
            self._gevent.joinall([self._gevent.spawn(one_after_another, read, offsets, count) for read in reads])

    def measure(self, name: str, path: Path, size: int, span: int, concurrency: int, count: int) -> dict[str, float]:
        try:
            return super().measure(name, path, size, span, concurrency, count)
        finally:
            while self._opened:
                self._opened.pop().close()


class EventletFamily(Family):
    """eventlet's thread pool."""

    def __init__(self, _: Path) -> None:
        super().__init__()
        self._eventlet = self.load("eventlet", "eventlet.tpool, open file", "eventlet.tpool, by path")
        if self._eventlet is None:
            return
        tpool: Any = importlib.import_module("eventlet.tpool")

        def make_execute(path: Path, size: int) -> Read:
            opened = descriptor(path)
            return lambda offset: tpool.execute(os.pread, opened, size, offset)

        def make_by_path(path: Path, size: int) -> Read:
            return lambda offset: tpool.execute(open_pread_close, path, size, offset)

        self.readers = {"eventlet.tpool, open file": make_execute, "eventlet.tpool, by path": make_by_path}

    def run(self, reads: list[Read], offsets: list[int], count: int) -> None:
        if len(reads) == 1:
            one_after_another(reads[0], offsets, count)
        else:
            for green in [self._eventlet.spawn(one_after_another, read, offsets, count) for read in reads]:
                green.wait()


async def one_after_another_async(read: Read, offsets: list[int], count: int) -> None:
    for offset in islice(cycle(offsets), count):
        await read(offset)


class AsyncioFamily(Family):
    """asyncio, aiofiles, aiofile and anyio. Those that have no pread seek first, as their users do."""

    def __init__(self, _: Path) -> None:
        super().__init__()
        import asyncio

        self._loop = asyncio.new_event_loop()
        self._asyncio = asyncio

        def make_to_thread(path: Path, size: int) -> Read:
            opened = descriptor(path)
            return lambda offset: asyncio.to_thread(os.pread, opened, size, offset)

        self.readers["asyncio.to_thread, open file"] = make_to_thread
        aiofiles = self.load("aiofiles", "aiofiles, open file")
        if aiofiles is not None:
            self.readers["aiofiles, open file"] = self._make_seeking(lambda path: aiofiles.open(path, "rb"))
        aiofile = self.load("aiofile", "aiofile, open file")
        if aiofile is not None:

            def make_aiofile(path: Path, size: int) -> Read:
                async def opened() -> Any:
                    file = aiofile.AIOFile(str(path), "rb")  # takes the loop that runs
                    await file.open()
                    return file

                file = self._finish(opened())
                self._opened.append(file)
                return lambda offset: file.read(size, offset)

            self.readers["aiofile, open file"] = make_aiofile
        anyio = self.load("anyio", "anyio to_thread, open file", "anyio.open_file, open file")
        if anyio is not None:
            run_sync: Any = importlib.import_module("anyio.to_thread").run_sync

            def make_anyio(path: Path, size: int) -> Read:
                opened = descriptor(path)
                return lambda offset: run_sync(os.pread, opened, size, offset)

            self.readers["anyio to_thread, open file"] = make_anyio
            self.readers["anyio.open_file, open file"] = self._make_seeking(lambda path: anyio.open_file(path, "rb"))
        self._opened: list[Any] = []

    def _finish(self, what: Awaitable[Any]) -> Any:
        async def wait() -> Any:
            return await what

        return self._loop.run_until_complete(wait())

    def _make_seeking(self, open_file: Callable[[Path], Awaitable[Any]]) -> Make:
        def make(path: Path, size: int) -> Read:
            file = self._finish(open_file(path))
            self._opened.append(file)

            async def read(offset: int) -> bytes:
                await file.seek(offset)
                content: bytes = await file.read(size)
                return content

            return read

        return make

    def run(self, reads: list[Read], offsets: list[int], count: int) -> None:
        async def all_at_once() -> None:
            await self._asyncio.gather(*(one_after_another_async(read, offsets, count) for read in reads))

        self._loop.run_until_complete(all_at_once())

    def measure(self, name: str, path: Path, size: int, span: int, concurrency: int, count: int) -> dict[str, float]:
        try:
            return super().measure(name, path, size, span, concurrency, count)
        finally:
            while self._opened:
                file = self._opened.pop()
                closing = file.aclose() if hasattr(file, "aclose") else file.close()
                if closing is not None:
                    self._finish(closing)


class TrioFamily(Family):
    """trio's threads."""

    def __init__(self, _: Path) -> None:
        super().__init__()
        self._trio = trio = self.load("trio", "trio to_thread, open file")
        if trio is None:
            return

        def make_to_thread(path: Path, size: int) -> Read:
            opened = descriptor(path)
            return lambda offset: trio.to_thread.run_sync(os.pread, opened, size, offset)

        self.readers["trio to_thread, open file"] = make_to_thread

    def run(self, reads: list[Read], offsets: list[int], count: int) -> None:
        async def all_at_once() -> None:
            async with self._trio.open_nursery() as nursery:
                for read in reads:
                    nursery.start_soon(one_after_another_async, read, offsets, count)

        self._trio.run(all_at_once)


FAMILIES = {"gevent": GeventFamily, "eventlet": EventletFamily, "asyncio": AsyncioFamily, "trio": TrioFamily}


def requests() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)


def main(name: str, directory: Path) -> None:
    """Answer until the standard input ends."""
    family = FAMILIES[name](directory)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not end up between the answers
    with contextlib.closing(answers):
        about = {"readers": list(family.readers), "versions": family.versions, "missing": family.missing}
        answers.write(json.dumps(about) + "\n")
        for request in requests():
            request["path"] = directory / request["path"]
            answers.write(json.dumps(family.measure(**request)) + "\n")
    os._exit(0)  # some of them wait for their threads


if __name__ == "__main__":
    if not __package__:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main(sys.argv[1], Path(sys.argv[2]))
