"""Files over HTTP: how many requests per second does one process serve, and how late are the late ones?

README.md says how to read the result. (Not called http.py: that would hide the standard library's from its neighbours.)
"""

from __future__ import annotations

import contextlib
import http.client
import inspect
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if not __package__:  # run as a script: its own directory is on the path, the one above is not
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import file_system
from benchmarks.report import (
    RESULTS,
    Environment,
    Run,
    Table,
    Verdict,
    document,
    say,
    spread,
    three_digits,
    verdict_table,
    with_range,
    write,
)
from diskread import Limits

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROOT = Path(__file__).resolve().parent.parent
SERVERS = ROOT / "benchmarks" / "servers"
PACKAGES = ("nginx-light", "golang-go", "wrk", "fio")
OURS, BARE = "diskread", "bare pywsgi, constant"

# Asks for one file after another, and ends when as many were answered as there are: what comes then would be cached.
# A connection asks when it has its last answer, so the others, LESS of them, are what is still on its way.
SCRIPT = """
local ffi = require("ffi")
ffi.cdef[[
typedef struct { long seconds; long micros; } moment;
int gettimeofday(moment *now, void *zone);
]]
local function now()
   local it = ffi.new("moment")
   ffi.C.gettimeofday(it, nil)
   return tonumber(it.seconds) + tonumber(it.micros) / 1e6
end
local count, began = 0, 0
function request()
   if count == 0 then began = now() end
   if count == FILES + LESS then
      io.write(string.format("All files: %.6f\\n", now() - began))
      wrk.thread:stop()
   end
   count = count + 1
   return wrk.format("GET", string.format("%s%d", wrk.path, (count - 1) % FILES))
end
"""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured.

    Attributes:
        files: Number of files by their size in bytes: each is asked for once per round of cold reads.
        rounds: How often everything is measured, all servers in turn.
        seconds: Length of a measurement.
        connections: Kept connections of the load generator, each with one request at a time.
    """

    files: dict[int, int]
    rounds: int = 3
    seconds: int = 1
    connections: int = 16


FULL = Settings(files={4096: 16_384, 65_536: 4096, 16 << 20: 32})
QUICK = Settings(files={4096: 4096, 65_536: 1024, 16 << 20: 6}, rounds=1)


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement.

    Attributes:
        requests: Requests that were answered with a status below 400.
        failed: Requests that were not.
        requests_per_s: By the clock of the load generator.
        p50_s, p99_s: Latencies, in seconds; None when the load generator does not say. Closed-loop: a server that
            stalls is not asked meanwhile.
        cpu_s: CPU seconds of the server's processes per request.
    """

    requests: int
    failed: int
    requests_per_s: float
    p50_s: float | None
    p99_s: float | None
    cpu_s: float


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One server and one kind of request.

    Attributes:
        server: Its name.
        bytes: Size of the files.
        hot: One file again and again, cached; otherwise each file once, evicted before.
        samples: One per round.
    """

    server: str
    bytes: int
    hot: bool
    samples: list[Sample]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one run of the benchmark found.

    Attributes:
        format: Version of this structure.
        environment: Where it was measured.
        file_system: Type of the file system.
        settings: How much was measured.
        generator: Program that makes the load.
        verdicts: The promises.
        cells: The measurements.
    """

    format: int
    environment: Environment
    file_system: str
    settings: Settings
    generator: str
    verdicts: list[Verdict]
    cells: list[Cell]


# --- Servers ----------------------------------------------------------------------------------------------------------


class Server:
    """A server in processes of its own.

    Attributes:
        name: Its name.
        sizes: Sizes of the files that it serves.
    """

    def __init__(self, name: str, command: Sequence[str], port: int, prefix: str, sizes: Sequence[int]) -> None:
        self.name, self.sizes = name, list(sizes)
        self.port, self._prefix = port, prefix
        # A session of its own: all its processes can be found and counted.
        self._child = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd=ROOT,
        )

    def path(self, size: int, number: int | None = None) -> str:
        """The path of a file; without a number, what all of this size begin with."""
        return f"{self._prefix}/{size}/{'' if number is None else number}"

    def wait(self, directory: Path) -> None:
        """Wait until it serves, and see that it serves what it should."""
        ends = time.monotonic() + 20
        while True:
            if self._child.poll() is not None:
                raise click.ClickException(f"{self.name} has ended with status {self._child.returncode}")
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1):
                    break
            except OSError:
                if time.monotonic() > ends:
                    raise click.ClickException(f"{self.name} does not answer on port {self.port}") from None
                time.sleep(0.02)
        for size in self.sizes:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
            with contextlib.closing(connection):
                connection.request("GET", self.path(size, 1))
                answer = connection.getresponse()
                body = answer.read()
            wanted = bytes(4096) if self.name == BARE else (directory / str(size) / "1").read_bytes()
            if answer.status != 200 or body != wanted:
                raise click.ClickException(f"{self.name} serves {size} bytes wrongly: status {answer.status}")

    def cpu_s(self) -> float:
        """CPU seconds of all its processes so far."""
        ticks = 0
        for each in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                # proc_pid_stat(5): what follows the name begins with field 3; 6 is the session, 14 and 15 the times.
                fields = each.read_text().rpartition(")")[2].split()
                if int(fields[3]) == self._child.pid:
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGTERM)
        try:
            self._child.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def our_limits() -> dict[str, dict[str, str]]:
    """Limits of our server by the name of the variant; what this diskread does not have is left out."""
    wanted = {
        OURS: {},
        f"{OURS}, native engine": {"engine": "native"},
        f"{OURS}, inline off": {"inline": "off"},
    }
    options = inspect.signature(Limits).parameters
    return {name: limits for name, limits in wanted.items() if all(each in options for each in limits)}


def start_servers(
    files: Path, place: Path, sizes: Sequence[int], run: Run, stack: contextlib.ExitStack
) -> list[Server]:
    """Start whatever is installed; note what is not."""
    found: list[Server] = []

    def start(name: str, command: Sequence[str], port: int, prefix: str = "", only: Sequence[int] = sizes) -> None:
        server = Server(name, command, port, prefix, only)
        stack.callback(server.close)
        server.wait(files)
        found.append(server)

    port = free_port()
    start(BARE, [sys.executable, str(SERVERS / "constant.py"), str(port)], port, only=[4096])
    variants = our_limits()
    for name, limits in variants.items():
        port = free_port()
        config = place / f"{port}.toml"
        lines = [f'{option} = "{value}"' for option, value in limits.items()]
        config.write_text("\n".join([f"port = {port}", "[limits]", *lines, "[disk.d]", f'root = "{files}"', ""]))
        start(name, [sys.executable, "-m", "server", "serve", "--config", str(config)], port, "/v1/d")
    for name, option in ((f"{OURS}, native engine", "engine"), (f"{OURS}, inline off", "inline")):
        if name not in variants:
            run.missing[name] = f"this diskread has no Limits.{option}"
    if find_spec("gunicorn") is None:
        run.missing["gunicorn"] = "not installed (pip install --group bench)"
    else:
        run.versions["gunicorn"] = version("gunicorn")
        port = free_port()
        command = [sys.executable, "-m", "gunicorn", "-k", "gevent", "-w", "1", "-b", f"127.0.0.1:{port}"]
        command += ["--keep-alive", "75", "-e", f"FILES_ROOT={files}", "benchmarks.servers.files:application"]
        start("gunicorn, gevent, plain file server", command, port)
    if shutil.which("nginx") is None:
        run.missing["nginx"] = "not installed (--install)"
    else:
        run.versions["nginx"] = output_of("nginx", "-v").rpartition("/")[2]
        port = free_port()
        config = place / "nginx.conf"
        user = "user root;" if os.geteuid() == 0 else ""  # others may not look into the directory
        template = (SERVERS / "nginx.conf").read_text()
        config.write_text(template.format(user=user, place=place, port=port, root=files))
        start("nginx, aio threads", ["nginx", "-c", str(config)], port)
    if shutil.which("go") is None:
        run.missing["Go net/http"] = "not installed (--install)"
    else:
        binary = place / "files"
        environment = {**os.environ, "GO111MODULE": "off", "GOCACHE": str(place / "go")}
        built = subprocess.run(
            ["go", "build", "-o", str(binary), str(SERVERS / "files.go")],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if built.returncode:
            run.missing["Go net/http"] = f"does not build: {built.stderr.strip()[:200]}"
        else:
            run.versions["Go"] = output_of("go", "version").split()[2].removeprefix("go")
            port = free_port()
            # One thread that runs Go, as the others have one that runs Python; system calls get further ones.
            start("Go net/http, GOMAXPROCS=1", ["env", "GOMAXPROCS=1", str(binary), str(port), str(files)], port)
    return found


def output_of(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip().partition("\n")[0]


# --- Load -------------------------------------------------------------------------------------------------------------


Load: TypeAlias = "tuple[int, int, float, float | None, float | None]"
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}


def wrk(server: Server, size: int, hot: bool, settings: Settings, place: Path) -> Load:
    """Requests, failed ones, requests per second, p50 and p99 in seconds."""
    script = place / f"{size}.lua"
    files = settings.files[size]
    script.write_text(SCRIPT.replace("FILES", str(files)).replace("LESS", str(settings.connections - 1)))
    url = f"http://127.0.0.1:{server.port}{server.path(size, 0 if hot else None)}"
    command = ["wrk", "-t1", f"-c{settings.connections}", f"-d{settings.seconds}s", "--timeout", "20s", "--latency"]
    done = subprocess.run(
        [*command, *([] if hot else ["-s", str(script)]), url], capture_output=True, text=True, check=True
    )
    text = done.stdout

    def percentile(which: str) -> float | None:
        matched = re.search(rf"^ +{which}% +([\d.]+)(us|ms|s|m)$", text, re.MULTILINE)
        return None if matched is None else float(matched[1]) * UNITS[matched[2]]

    def number(pattern: str) -> float:
        matched = re.search(pattern, text)
        return float(matched[1]) if matched else 0.0

    failed = number(r"Non-2xx or 3xx responses: (\d+)")
    errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    failed += sum(int(each) for each in errors.groups()) if errors else 0
    total, rate = number(r"(\d+) requests in"), number(r"Requests/sec: +([\d.]+)")
    used_up = number(r"All files: ([\d.]+)")
    return int(total), int(failed), files / used_up if used_up else rate, percentile("50"), percentile("99")


def ab(server: Server, size: int, _hot: bool, settings: Settings, _place: Path) -> Load:
    """The same with ApacheBench, which asks for one file only and counts whole milliseconds."""
    url = f"http://127.0.0.1:{server.port}{server.path(size, 0)}"
    seconds = str(settings.seconds)
    command = ["ab", "-q", "-k", "-c", str(settings.connections), "-t", seconds, "-n", "10000000", url]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def number(pattern: str) -> float:
        matched = re.search(pattern, text, re.MULTILINE)
        return float(matched[1]) if matched else 0.0

    failed = number(r"^Failed requests: +(\d+)") + number(r"^Non-2xx responses: +(\d+)")
    rate = number(r"^Requests per second: +([\d.]+)")
    p50, p99 = number(r"^ +50% +(\d+)") / 1000, number(r"^ +99% +(\d+)") / 1000
    return int(number(r"^Complete requests: +(\d+)")), int(failed), rate, p50, p99


def evict(directory: Path) -> None:
    """Throw the content of files out of the page cache; their names and inodes stay."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def test_files(directory: Path | None, files: Mapping[int, int]) -> Iterator[tuple[Path, Path]]:
    """The directory with the files, by size and number, and one for everything else."""
    with tempfile.TemporaryDirectory(dir=directory) as place, tempfile.TemporaryDirectory() as scratch:
        root = Path(place)
        for size, count in files.items():
            (root / str(size)).mkdir()
            noise = os.urandom(size)
            for number in range(count):
                (root / str(size) / str(number)).write_bytes(number.to_bytes(8, "big") + noise[8:])
        os.sync()  # dirty pages cannot be evicted
        yield root, Path(scratch)


# --- A run ------------------------------------------------------------------------------------------------------------


def run(settings: Settings, directory: Path | None, console: Console) -> Report:
    """Measure everything, with progress on the console."""
    about = Run()
    generator = next((each for each in ("wrk", "ab") if shutil.which(each)), None)
    if generator is None:
        raise click.ClickException("neither wrk nor ab is installed: apt-get install wrk, or --install")
    load = wrk if generator == "wrk" else ab
    about.versions[generator] = output_of(generator, "-v" if generator == "wrk" else "-V").split(" [")[0][:60]
    if generator == "ab":
        about.missing["cold reads"] = "ab asks for one file only; install wrk"
    console.print("Making the files ...")
    with test_files(directory, settings.files) as (files, place), contextlib.ExitStack() as stack:
        servers = start_servers(files, place, list(settings.files), about, stack)
        say(console, about.missing)
        kinds = [(size, hot) for hot in (True, False) for size in settings.files if hot or generator == "wrk"]
        keys = [(size, hot, server) for size, hot in kinds for server in servers if size in server.sizes]
        keys = [(size, hot, server) for size, hot, server in keys if hot or server.name != BARE]
        samples: dict[tuple[int, bool, str], list[Sample]] = {(size, hot, each.name): [] for size, hot, each in keys}
        progress = Progress(
            BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"), console=console
        )
        with progress:
            task = progress.add_task("", total=len(keys) * settings.rounds)
            for number in range(settings.rounds):
                for size, hot, server in keys if number % 2 else reversed(keys):
                    state = "hot" if hot else "cold"
                    progress.update(task, description=f"round {number + 1}: {server.name}, {size // 1024} KiB {state}")
                    if hot:
                        (files / str(size) / "0").read_bytes()
                    else:
                        evict(files / str(size))
                    cpu = server.cpu_s()
                    requests, failed, rate, p50, p99 = load(server, size, hot, settings, place)
                    cpu = server.cpu_s() - cpu
                    if not requests:
                        raise click.ClickException(f"{server.name} has answered no request in {settings.seconds} s")
                    samples[size, hot, server.name].append(
                        Sample(
                            requests=requests - failed,
                            failed=failed,
                            requests_per_s=rate * (requests - failed) / requests,
                            p50_s=p50,
                            p99_s=p99,
                            cpu_s=cpu / requests,
                        )
                    )
                    progress.update(task, advance=1)
        kind = file_system(files)
    cells = [Cell(server=name, bytes=size, hot=hot, samples=all_) for (size, hot, name), all_ in samples.items()]
    return Report(
        format=1,
        environment=about.environment(),
        file_system=kind,
        settings=settings,
        generator=generator,
        verdicts=judge(cells),
        cells=cells,
    )


def judge(cells: Sequence[Cell]) -> list[Verdict]:
    """The promise about small hot files."""
    rates = {
        each.server: [sample.requests_per_s for sample in each.samples]
        for each in cells
        if each.hot and each.bytes == 4096
    }
    return [
        Verdict(
            promise=f"{name}: requests/s of a hot 4 KiB file, to bare pywsgi returning a constant",
            ratio=spread([ours / bare for ours, bare in zip(rates[name], rates[BARE], strict=True)]),
            bound=0.85,
            at_most=False,
        )
        for name in our_limits()
        if "off" not in name
    ]


def tables(report: Report) -> list[Table]:
    """The result for people."""
    found = [verdict_table(report.verdicts)]
    for hot in (True, False):
        for size in report.settings.files:
            cells = [each for each in report.cells if (each.hot, each.bytes) == (hot, size)]
            if not cells:
                continue
            title = f"{size // 1024:,} KiB, {'hot' if hot else 'cold'}"
            ours = next(each for each in cells if each.server == OURS)
            header = ("server", "requests/s", "x diskread", "MB/s", "p50 ms", "p99 ms", "CPU us/request", "failed")
            table = Table(title, header)
            for each in sorted(cells, key=lambda cell: -spread([s.requests_per_s for s in cell.samples]).median):
                rate = spread([sample.requests_per_s for sample in each.samples])
                ratio = spread(
                    [
                        sample.requests_per_s / our.requests_per_s
                        for sample, our in zip(each.samples, ours.samples, strict=True)
                    ]
                )

                def median(name: str, factor: float, each: Cell = each) -> str:
                    values = [getattr(sample, name) for sample in each.samples]
                    known = [value for value in values if value is not None]
                    return three_digits(spread(known).median * factor) if known else "-"

                table.rows.append(
                    [
                        each.server,
                        with_range(rate, three_digits),
                        with_range(ratio, three_digits),
                        three_digits(rate.median * size / 1e6),
                        median("p50_s", 1000),
                        median("p99_s", 1000),
                        median("cpu_s", 1e6),
                        str(sum(sample.failed for sample in each.samples)),
                    ]
                )
            found.append(table)
    return found


def install(console: Console) -> None:
    """Install the programs of others, from Debian."""
    if os.geteuid() != 0:
        raise click.ClickException(
            f"--install needs root; or install them yourself: apt-get install {' '.join(PACKAGES)}"
        )
    console.print(f"Installing {', '.join(PACKAGES)} ...")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-qq", "--no-install-recommends", *PACKAGES]):
        if subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False).returncode:
            raise click.ClickException(f"{' '.join(command)} failed; what it said is above")


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--quick", is_flag=True, help="A look in half a minute; too short for figures that one would quote.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    help="Directory for http_files.json and http_files.md.  [default: results/ beside this file]",
)
@click.option(
    "--directory",
    type=click.Path(exists=True, file_okay=False, writable=True, path_type=Path),
    help="Where the files are put (700 MB): choose the disk to measure, not a tmpfs.  [default: temporary directory]",
)
@click.option("--install", "installs", is_flag=True, help=f"First install {', '.join(PACKAGES)} from Debian (root).")
@click.option("--rounds", type=click.IntRange(1, 100), help="How often everything is measured.  [default: 3]")
@click.option("--seconds", type=click.IntRange(1, 60), help="Length of a measurement.  [default: 1]")
@click.option("--connections", type=click.IntRange(1, 512), help="Kept connections.  [default: 16]")
def main(
    quick: bool,
    output: Path,
    directory: Path | None,
    installs: bool,
    rounds: int | None,
    seconds: int | None,
    connections: int | None,
) -> None:
    """How many files per second does one process serve over HTTP, and how late are the late ones?

    GET of files of 4 KiB, 64 KiB and 16 MiB, hot (one file, cached) and cold (each file once, evicted before), from our
    server and, on the same files in the same run, from nginx with aio threads, gunicorn with a plain gevent file
    server, and Go's net/http; besides, a bare pywsgi application that returns a constant of 4 KiB. One worker each; the
    load comes from wrk (or ab, hot only) on this machine. Takes under 3 minutes; best on a machine that does nothing
    else.

    \b
    Examples:
      python benchmarks/http_files.py
      sudo python benchmarks/http_files.py --install
      python benchmarks/http_files.py --quick --directory /srv/disk1 --output /tmp/http
    """
    errors = Console(stderr=True)
    if installs:
        install(errors)
    given = {"rounds": rounds, "seconds": seconds, "connections": connections}
    settings = QUICK if quick else FULL
    settings = msgspec.structs.replace(settings, **{name: value for name, value in given.items() if value is not None})
    report = run(settings, directory, errors)
    found = tables(report)
    intro = (
        f"Medians of {settings.rounds} rounds of {settings.seconds} s [lowest-highest], {settings.connections} "
        f"connections; load by {report.generator}; file system: {report.file_system}."
    )
    text = document("Files over HTTP: results", "http_files", intro, report.environment, found, plot=False)
    write(output, "http_files", report, text, found)


if __name__ == "__main__":
    main()
