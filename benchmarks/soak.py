"""An endurance run: disks that hang and recover at random under open-loop load, and a judgement at its end.

Nothing may be lost, wrong, late or leaked, and nobody but the callers of a hung disk may notice. Exit status 1 and the
reasons otherwise.
"""

from __future__ import annotations

import contextlib
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

if not __package__:  # run as a script: its own directory is on the path, the one above is not
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.load import LOST, WRONG, Answer, Load, Plan
from benchmarks.machine import Machine, describe
from tests.faults.injectors import FaultFS, SetupError
from tests.server.raw_client import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from server.status import DiskDocument

DEADLINE = 2.0
THREADS = 8
IDLE = 2.0
"""Limits of the disks, in seconds and threads: short, so that every state is passed through many times."""

SLACK = 2.0
"""Seconds by which an answer may be later than the deadline: the machine may have other things to do."""

SETTLE = 20.0
"""Seconds in which everything has to be as before, once the last disk has recovered."""

GROWTH = 10 << 20
"""Bytes by which the resident memory may grow between the first seconds and the end."""

WARM_UP = 5.0
LOOK_EVERY = 0.1


class Disk(Protocol):
    """A disk that can hang."""

    name: str
    root: Path
    content: Path

    def hang(self, seconds: float) -> None:
        """Hang, for so long at most."""

    def lift(self) -> None:
        """Hang no longer."""


class FaultDisk:
    """A FUSE file system. Hangs at a random operation, for everybody."""

    def __init__(self, name: str, noise: random.Random, stack: contextlib.ExitStack) -> None:
        self.name = name
        self._fault = stack.enter_context(FaultFS("--direct-io", max_stall=60))
        self._noise = noise
        self.root, self.content = self._fault.root, self._fault.backing
        write_files(self.content, noise)

    def hang(self, seconds: float) -> None:
        del seconds  # lift() comes in time
        self._fault.hang(self._noise.choice(["read", "read", "open"]))

    def lift(self) -> None:
        self._fault.release()


class StalledDisk:
    """A directory whose slots are all taken by simulated stalls: for machines without FUSE."""

    def __init__(self, name: str, noise: random.Random, stack: contextlib.ExitStack) -> None:
        self.name = name
        self.root = self.content = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.server: ServerProcess | None = None
        self._clients: list[threading.Thread] = []
        write_files(self.root, noise)

    def hang(self, seconds: float) -> None:
        assert self.server is not None
        request = f"0,{seconds * 1000:.0f},{self.name}/f0\n".encode()
        self._clients = [threading.Thread(target=self.server.line, args=(request,)) for _ in range(THREADS)]
        for client in self._clients:
            client.start()

    def lift(self) -> None:
        for client in self._clients:
            client.join()


class Hang(msgspec.Struct, frozen=True):
    """What happened to a disk.

    Attributes:
        disk: Which one.
        begin: When it hung.
        lifted: When it hung no longer.
        back: When the server was first seen to have it back.
        offline: Whether the server was seen to have it offline meanwhile.
    """

    disk: str
    begin: float
    lifted: float
    back: float
    offline: bool


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The result. Times are in seconds from the begin of the load, sizes in bytes."""

    machine: Machine
    seed: int
    seconds: float
    rate: float
    injector: str
    hangs: list[Hang]
    requests: int
    statuses: dict[str, int]
    slowest: float
    memory_begin: int
    memory_end: int
    descriptors: tuple[int, int]
    threads: tuple[int, int]
    most_threads: int
    failures: list[str]


class Watch:
    """Follows the disks of the server: when one that has hung is back."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._hung: dict[str, float] = {}
        self._lifted: dict[str, float] = {}
        self._offline: set[str] = set()
        self.hangs: list[Hang] = []
        self.most_threads = 0

    def hung(self, disk: str) -> None:
        self._hung[disk] = time.monotonic()

    def lifted(self, disk: str) -> None:
        self._lifted[disk] = time.monotonic()

    def busy(self, disk: str) -> bool:
        """Whether a disk hangs, or has not recovered."""
        return disk in self._hung

    def look(self) -> None:
        self.most_threads = max(self.most_threads, self._server.threads())
        documents = self._server.status().disks
        now = time.monotonic()
        for document in documents:
            name = document.name
            if name in self._hung and document.state == "offline":
                self._offline.add(name)
            if name in self._lifted and healthy(document):
                begin, lifted = self._hung.pop(name), self._lifted.pop(name)
                self.hangs.append(Hang(name, begin, lifted, now, name in self._offline))
                self._offline.discard(name)

    @property
    def all_back(self) -> bool:
        return not self._hung


def healthy(disk: DiskDocument) -> bool:
    return disk.state == "online" and not disk.stuck and not disk.waiting


def write_files(directory: Path, noise: random.Random) -> None:
    for number in range(8):
        (directory / f"f{number}").write_bytes(noise.randbytes(64 * 1024 + number))


def schedule(names: Sequence[str], seconds: float, noise: random.Random) -> list[tuple[float, str, float]]:
    """When which disk hangs, and for how long: each one again and again, often several at a time."""
    found = []
    for name in names:
        begin = noise.uniform(WARM_UP, WARM_UP + 10)
        while begin < seconds - 5:
            length = min(noise.choice([0.3, 3.0, 12.0]) * noise.uniform(0.5, 1.5), seconds - begin)
            found.append((begin, name, length))
            begin += length + noise.uniform(5, 15)
    return sorted(found)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    ends = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > ends:
            return False
        time.sleep(LOOK_EVERY)
    return True


@contextlib.contextmanager
def serving(disks: Sequence[Disk], directory: Path) -> Iterator[ServerProcess]:
    config = directory / "diskread.toml"
    lines = [f"[limits]\nthreads = {THREADS}\ndeadline = {DEADLINE}\nidle = {IDLE}\noffline_after = 2.5\n"]
    lines += ["probe_interval = 0.5\nprobe_interval_max = 2.0\nidle_probe = 5.0\n"]
    lines += [f'[disk.{disk.name}]\nroot = "{disk.root}"\n' for disk in disks]
    config.write_text("".join(lines))
    server = ServerProcess(directory, "--config", str(config), "--simulate")
    try:
        yield server
    finally:
        server.kill()


def run(seconds: float, rate: float, seed: int, count: int, console: Console) -> Report:
    """Do it; with no failures in the report all is well."""
    noise = random.Random(seed)
    fuse = FaultFS.why_not() is None
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make = FaultDisk if fuse else StalledDisk
        disks: list[FaultDisk | StalledDisk] = [make(f"d{number}", noise, stack) for number in range(count)]
        server = stack.enter_context(serving(disks, directory))
        for disk in disks:
            if isinstance(disk, StalledDisk):
                disk.server = server
        for disk in disks:
            server.http(f"/v1/{disk.name}/f0")  # from its first read on, a disk keeps its root directory open
        before = resources_at_rest(server)
        begin = time.monotonic() + 1.5
        load = Load(
            Plan(
                port=server.port,
                begin=begin,
                seconds=seconds,
                rate=rate,
                timeout=DEADLINE + SLACK + 10,
                seed=seed,
                content={disk.name: str(disk.content) for disk in disks},
                output=str(directory / "answers"),
            )
        )
        stack.callback(load.kill)
        watch = Watch(server)
        memory = torment(server, {disk.name: disk for disk in disks}, watch, begin, seconds, noise, console)
        failures = []
        if server.process.poll() is not None:
            failures.append(f"the server has ended with status {server.process.returncode}")
        answers = load.answers()
        if not wait_until(lambda: look(watch), SETTLE):
            failures.append(f"not all disks are back after {SETTLE:g} s")
        after = resources_at_rest(server)
        grown = server.memory() - memory
        if after[0] > before[0] or after[1] > before[1]:
            failures.append(f"(descriptors, threads) were {before} before and are {after} now")
        if grown > GROWTH:
            failures.append(f"the resident memory has grown by {grown} bytes")
        most = count * THREADS + 8  # the server has threads of its own
        if watch.most_threads > most:
            failures.append(f"there were {watch.most_threads} threads, {most} at most are allowed")
        failures += judge(answers, watch.hangs, int(seconds * rate) * count)
        end = server.memory()
        if server.stop() != 0:
            failures.append("the server did not end in peace")
        return Report(
            machine=describe(),
            seed=seed,
            seconds=seconds,
            rate=rate,
            injector="FaultFS" if fuse else "simulated stalls",
            hangs=[
                Hang(hang.disk, hang.begin - begin, hang.lifted - begin, hang.back - begin, hang.offline)
                for hang in watch.hangs
            ],
            requests=len(answers),
            statuses={str(status): number for status, number in Counter(each.status for each in answers).items()},
            slowest=max((each.end - each.due for each in answers), default=0.0),
            memory_begin=memory,
            memory_end=end,
            descriptors=(before[0], after[0]),
            threads=(before[1], after[1]),
            most_threads=watch.most_threads,
            failures=failures,
        )


def look(watch: Watch) -> bool:
    watch.look()
    return watch.all_back


def resources_at_rest(server: ServerProcess) -> tuple[int, int]:
    """Descriptors and threads of the server, once the idle threads have left."""
    wait_until(lambda: all(not disk.in_flight and not disk.threads for disk in server.status().disks), IDLE + 10)
    return server.descriptors() - (server.sockets() - 1), server.threads()


def torment(
    server: ServerProcess,
    disks: dict[str, FaultDisk | StalledDisk],
    watch: Watch,
    begin: float,
    seconds: float,
    noise: random.Random,
    console: Console,
) -> int:
    """Hang and lift until the load ends; returns the resident memory after the warm-up."""
    hangs = schedule(list(disks), seconds, noise)
    lifts: list[tuple[float, str]] = []
    memory = 0
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("soaking", total=seconds)
        while (now := time.monotonic() - begin) < seconds and server.process.poll() is None:
            progress.update(task, completed=max(0.0, now))
            if not memory and now > WARM_UP:
                memory = server.memory()
            while hangs and hangs[0][0] <= now:
                _, name, length = hangs.pop(0)
                if not watch.busy(name):  # else it has not recovered yet from the last time
                    watch.hung(name)
                    disks[name].hang(length)
                    lifts.append((now + length, name))
            for due, name in [each for each in lifts if each[0] <= now]:
                lifts.remove((due, name))
                disks[name].lift()
                watch.lifted(name)
            watch.look()
            time.sleep(LOOK_EVERY)
    for _, name in lifts:
        disks[name].lift()
        watch.lifted(name)
    return memory


def judge(answers: Sequence[Answer], hangs: Sequence[Hang], wanted: int) -> list[str]:
    """What was wrong with the answers."""
    failures = []
    counts = Counter(each.status for each in answers)
    allowed = {206, 503, 504}
    if len(answers) != wanted:
        failures.append(f"{wanted} requests were due, {len(answers)} were made")
    if counts[LOST]:
        failures.append(f"{counts[LOST]} requests had no answer, or half of one")
    if counts[WRONG]:
        failures.append(f"{counts[WRONG]} answers had other bytes than the file")
    if others := {status: number for status, number in counts.items() if status not in {*allowed, LOST, WRONG}}:
        failures.append(f"there were answers with a status that is neither 206 nor 503 nor 504: {others}")
    late = [each.end - each.due for each in answers if each.end - each.due > DEADLINE + SLACK]
    if late:
        failures.append(f"{len(late)} answers came after {DEADLINE + SLACK:g} s, the last after {max(late):.1f} s")
    noticed = Counter(
        each.disk
        for each in answers
        if each.status != 206
        and not any(hang.disk == each.disk and each.due <= hang.back and each.end >= hang.begin for hang in hangs)
    )
    if noticed:
        failures.append(f"requests to healthy disks that failed, by disk: {dict(noticed)}")
    if not counts[206]:
        failures.append("no request succeeded: nothing was measured")
    return failures


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--seconds", type=click.FloatRange(20), default=600.0, help="How long.")
@click.option("--rate", type=click.FloatRange(1), default=25.0, help="Requests per second and disk.")
@click.option("--disks", type=click.IntRange(2, 16), default=4, help="Disks.")
@click.option("--seed", type=int, default=None, help="Repeat the hangs of the run that printed it.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the report there, as JSON.")
def main(seconds: float, rate: float, disks: int, seed: int | None, output: Path | None) -> None:
    """Serve disks that hang and recover at random, and see whether anything is lost, wrong, late or leaked.

    With root and /dev/fuse the disks really hang; without, simulated stalls take their slots.
    """
    seed = random.randrange(1 << 32) if seed is None else seed
    console = Console(stderr=True)
    console.print(f"seed {seed}")
    try:
        report = run(seconds, rate, seed, disks, console)
    except SetupError as error:
        raise click.ClickException(str(error)) from error
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    offline = sum(each.offline for each in report.hangs)
    click.echo(
        f"{report.requests} requests, by status {report.statuses}; {len(report.hangs)} hangs ({report.injector}), "
        f"{offline} seen offline; slowest answer {report.slowest:.2f} s; at most {report.most_threads} threads; "
        f"memory {(report.memory_end - report.memory_begin) / 2**20:+.1f} MiB"
    )
    for failure in report.failures:
        click.echo(f"FAILED: {failure}", err=True)
    sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
