"""A Swift cluster on loopback: memcached, account, container, object and proxy server; devices are directories.

    with Cluster(directory, Settings(workers=1), {"d1": faultfs.root}) as cluster:
        cluster.request("PUT", "/v1/a/c")
        cluster.request("PUT", "/v1/a/c/o", body=b"hello")

It needs no root, and nothing outside of `directory`. All devices belong to one object server, each is a zone of its
own, and the proxy reads from them in their order: d1 is asked first for every object that it holds.
`ObjectServer` is the small form: an object server alone, without rings.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from configparser import RawConfigParser
from dataclasses import dataclass, field
from http.client import HTTPConnection
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.faults.injectors import wait_until

from .processes import Ports, Server, StartError, stop_all

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from typing_extensions import Self

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent.parent / "src"

REPLICATED, ERASURE_CODED = 0, 1
"""The storage policies: three replicas; two fragments of data and one of parity."""

POLICIES = {REPLICATED: "replicated", ERASURE_CODED: "erasure-coded"}
RINGS = {"account": "account", "container": "container", REPLICATED: "object", ERASURE_CODED: "object-1"}
PART_POWER = 5
HASH_SUFFIX = "diskread"
ACCOUNT = "/v1/AUTH_test"


@dataclass(frozen=True)
class Settings:
    """What is different from one cluster to the next.

    Attributes:
        diskread: Whether the object server reads by `diskread.swift`; if not, it is Swift as it comes.
        devices: How many there are: d1, d2, ...
        workers: Processes of the object server.
        servers_per_port: Processes per device, each device having a port of its own; 0: one port for all devices.
        concurrent_gets: Whether the proxy asks the next replica when the first does not answer in time.
        concurrency_timeout: When that is, in seconds.
        node_timeout: For how long the proxy waits for an object server, in seconds.
        object_server: More settings of the object server.
        proxy: More settings of the proxy.
        policy: More settings of each storage policy.
    """

    diskread: bool = False
    devices: int = 4
    workers: int = 1
    servers_per_port: int = 0
    concurrent_gets: bool = False
    concurrency_timeout: float = 0.5
    node_timeout: float = 4.0
    object_server: Mapping[str, str] = field(default_factory=dict)
    proxy: Mapping[str, str] = field(default_factory=dict)
    policy: Mapping[str, str] = field(default_factory=dict)

    def names(self) -> list[str]:
        """The devices."""
        return [f"d{number}" for number in range(1, self.devices + 1)]


@dataclass(frozen=True)
class Response:
    """What a server has answered.

    Attributes:
        status: Of HTTP.
        headers: Their names in lower case.
        body: All of it.
        seconds: From the request to the last byte.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float


def missing(*, memcached: bool = True) -> str | None:
    """What a cluster (or an object server alone: without memcached) lacks here; None if nothing."""
    try:
        version("swift")
    except PackageNotFoundError:
        return "needs OpenStack Swift: pip install swift"
    if memcached and shutil.which("memcached") is None:
        return "needs memcached: apt-get install memcached"
    return None


def missing_diskread() -> str | None:
    """Why Swift cannot load diskread here; None if it can."""
    found = [each for each in entry_points(group="swift.diskfile") if each.value.startswith("diskread.")]
    return None if found else "needs diskread's entry points for Swift: pip install -e ."


def ask(
    port: int,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float = 60.0,
) -> Response:
    """One request, on a connection of its own.

    Raises:
        OSError: no connection, or nothing came for `timeout` seconds.
        http.client.HTTPException: what came was no answer, or only a part of one (IncompleteRead).
    """
    begin = time.monotonic()
    with contextlib.closing(HTTPConnection("127.0.0.1", port, timeout=timeout)) as connection:
        if body is None and method in ("PUT", "POST"):
            body = b""
        connection.request(method, path, body, dict(headers or {}))
        answer = connection.getresponse()
        content = answer.read()
    found = {name.lower(): value for name, value in answer.getheaders()}
    return Response(answer.status, found, content, time.monotonic() - begin)


def timestamp() -> str:
    """The time of now as Swift's servers tell it to each other (X-Timestamp)."""
    return f"{time.time():016.5f}"


class _Servers:
    """What both forms share: a directory with configuration, devices and logs, and servers that are stopped in the end.

    Attributes:
        directory: Has it all: swift.conf, rings, NAME.conf, NAME.log, srv/DEVICE.
        settings: Those given.
        servers: By name, those that run.
    """

    def __init__(self, directory: Path, settings: Settings, roots: Mapping[str, Path] | None = None) -> None:
        """Prepare it; `__enter__` starts the servers.

        Args:
            directory: An empty directory, on a file system with extended attributes.
            settings: What is different from the defaults.
            roots: Directories elsewhere to use as devices, by name; all others are below `directory`.
        """
        self.directory = directory
        self.settings = settings
        self.servers: dict[str, Server] = {}
        self._roots = dict(roots or {})
        self._undo = contextlib.ExitStack()
        self._ports = Ports()

    def __enter__(self) -> Self:
        try:
            self._undo.callback(self._ports.close)
            self._undo.callback(self._stop)
            self._start()
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop all servers; see `Server.stop` for what is raised when one is stuck."""
        self._undo.close()

    def _start(self) -> None:
        raise NotImplementedError

    def _stop(self) -> None:
        stop_all(list(reversed(self.servers.values())))

    @property
    def object_server(self) -> Server:
        """The object server."""
        return self.servers["object"]

    def device(self, name: str) -> Path:
        """The directory of a device, as the object server sees it."""
        return self.directory / "srv" / name

    def _make_devices(self) -> None:
        for name in self.settings.names():
            self.device(name).parent.mkdir(exist_ok=True)
            if name in self._roots:
                self.device(name).symlink_to(self._roots[name])
            else:
                self.device(name).mkdir()

    def _write(self, name: str, sections: Mapping[str, Mapping[str, object]]) -> Path:
        config = RawConfigParser(default_section="no default section: DEFAULT is written as any other")
        config.read_dict(sections)
        path = self.directory / f"{name}.conf"
        with path.open("w") as file:
            config.write(file)
        return path

    def _write_swift_conf(self, policies: Mapping[str, Mapping[str, object]]) -> None:
        hashes = {"swift_hash_path_suffix": HASH_SUFFIX}
        self._write("swift", {"swift-hash": hashes, **policies})

    def _replication(self) -> dict[str, object]:
        policy = {"name": POLICIES[REPLICATED], "policy_type": "replication", "default": "yes"}
        return {**policy, **self._plugged("replication.fs")}

    def _plugged(self, entry_point: str) -> dict[str, object]:
        ours = {"diskfile_module": f"egg:diskread#{entry_point}"} if self.settings.diskread else {}
        return {**ours, **self.settings.policy}

    def _common(self, port: int) -> dict[str, object]:
        cache = self.directory / "cache"
        cache.mkdir(exist_ok=True)
        return {
            "bind_ip": "127.0.0.1",
            "bind_port": port,
            "user": getpass.getuser(),
            "swift_dir": self.directory,
            "recon_cache_path": cache,
            "mount_check": "false",
            "fallocate_reserve": 0,
            "workers": 1,
        }

    def _write_storage(self, name: str, port: int, devices: str, more: Mapping[str, object]) -> Path:
        return self._write(
            f"{name}-server",
            {
                "DEFAULT": {**self._common(port), "devices": self.directory / devices, **more},
                "pipeline:main": {"pipeline": f"healthcheck recon {name}-server"},
                "filter:healthcheck": {"use": "egg:swift#healthcheck"},
                "filter:recon": {"use": "egg:swift#recon"},
                f"app:{name}-server": {"use": f"egg:swift#{name}"},
            },
        )

    def _write_object_server(self, port: int) -> Path:
        settings = self.settings
        spread: dict[str, object] = {"workers": settings.workers}
        if settings.servers_per_port:
            spread = {"servers_per_port": settings.servers_per_port}
        return self._write_storage("object", port, "srv", {**spread, **settings.object_server})

    def _launch(self, name: str, module: str, config: Path) -> None:
        path = os.pathsep.join(filter(None, (str(SOURCES), os.environ.get("PYTHONPATH"))))
        command: list[str | Path] = [sys.executable, HERE / "launch.py", self.directory, module, config, "--verbose"]
        self.servers[name] = Server(name, command, self.directory / f"{name}.log", {"PYTHONPATH": path})


class ObjectServer(_Servers):
    """An object server alone: no rings, no proxy, no databases. It answers PUT and GET of /DEVICE/0/ACCOUNT/C/O.

    Attributes:
        port: Its port.
    """

    port: int

    def _start(self) -> None:
        self._make_devices()
        self._write_swift_conf({f"storage-policy:{REPLICATED}": self._replication()})
        self.port = self._ports.take()
        self._launch("object", "swift.obj.server", self._write_object_server(self.port))
        self.object_server.wait_answering([self.port], 1 + self.settings.workers)

    def request(
        self,
        method: str,
        device: str,
        name: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> Response:
        """Ask for the object of a name on a device; see `ask` for what is raised."""
        given = {"X-Timestamp": timestamp(), "Content-Type": "application/octet-stream", **(headers or {})}
        return ask(self.port, method, f"/{device}/0/a/c/{name}", body, given, timeout)


class Cluster(_Servers):
    """A whole cluster.

    Attributes:
        port: That of the proxy.
    """

    port: int

    def _start(self) -> None:
        self._make_devices()
        (self.directory / "databases" / "db").mkdir(parents=True)
        erasure_coding = {
            "name": POLICIES[ERASURE_CODED],
            "policy_type": "erasure_coding",
            "ec_type": "liberasurecode_rs_vand",
            "ec_num_data_fragments": 2,
            "ec_num_parity_fragments": 1,
            **self._plugged("erasure_coding.fs"),
        }
        self._write_swift_conf(
            {f"storage-policy:{REPLICATED}": self._replication(), f"storage-policy:{ERASURE_CODED}": erasure_coding}
        )
        ports = {name: self._ports.take() for name in ("account", "container", "object", "proxy")}
        self.port = ports["proxy"]
        self.object_ports = dict.fromkeys(self.settings.names(), ports["object"])
        if self.settings.servers_per_port:
            self.object_ports = {name: self._ports.take() for name in self.settings.names()}
        self._build_rings(ports)
        cache_port = self._start_memcached()
        for name in ("account", "container"):
            self._launch(name, f"swift.{name}.server", self._write_storage(name, ports[name], "databases", {}))
        self._launch("object", "swift.obj.server", self._write_object_server(ports["object"]))
        self._launch("proxy", "swift.proxy.server", self._write_proxy(self.port, cache_port))
        for name in ("account", "container", "proxy"):
            self.servers[name].wait_answering([ports[name]], 2)
        self.object_server.wait_answering(list(self.object_ports.values()), 1 + self._object_processes())
        for policy, name in POLICIES.items():
            path = f"{ACCOUNT}/{self.container(policy)}"
            made = self.request("PUT", path, headers={"X-Storage-Policy": name})
            if made.status not in (201, 202):
                raise StartError(f"PUT {path}: {made.status} {made.body!r}; {self.servers['proxy'].log_tail()}")

    def _object_processes(self) -> int:
        per_port = self.settings.servers_per_port
        return per_port * self.settings.devices if per_port else self.settings.workers

    def _build_rings(self, ports: Mapping[str, int]) -> None:
        devices = [{"device": name, "port": port} for name, port in self.object_ports.items()]
        rings: dict[str, Any] = {
            name: {"part_power": PART_POWER, "replicas": 1, "devices": [{"device": "db", "port": ports[name]}]}
            for name in ("account", "container")
        }
        for policy in POLICIES:
            rings[RINGS[policy]] = {"part_power": PART_POWER, "replicas": 3, "devices": devices}
        done = subprocess.run(
            [sys.executable, HERE / "rings.py", self.directory],
            input=json.dumps(rings),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            raise StartError(f"the rings could not be built: {done.stderr}")
        self._partitions: dict[str, list[list[str]]] = json.loads(done.stdout)

    def _start_memcached(self) -> int:
        # Any port, and it says which one it has got (MEMCACHED_PORT_FILENAME).
        said = self.directory / "memcached.port"
        command = ["memcached", *f"-u {getpass.getuser()} -l 127.0.0.1 -p -1 -U 0 -m 16 -t 1".split()]
        log = self.directory / "memcached.log"
        server = Server("memcached", command, log, {"MEMCACHED_PORT_FILENAME": str(said)})
        self.servers["memcached"] = server
        wait_until(lambda: said.exists() or server.process.poll() is not None, "memcached to start")
        if not said.exists():
            raise StartError(f"memcached has ended: {server.log_tail()}")
        # It looks like this: "TCP INET: 40123"
        return int(next(line for line in said.read_text().splitlines() if line.startswith("TCP")).split()[-1])

    def _write_proxy(self, port: int, cache_port: int) -> Path:
        settings = self.settings
        affinity = ", ".join(f"r1z{number}={number}" for number in range(1, settings.devices + 1))
        return self._write(
            "proxy-server",
            {
                "DEFAULT": self._common(port),
                "pipeline:main": {"pipeline": "catch_errors gatekeeper healthcheck cache proxy-server"},
                "filter:catch_errors": {"use": "egg:swift#catch_errors"},
                "filter:gatekeeper": {"use": "egg:swift#gatekeeper"},
                "filter:healthcheck": {"use": "egg:swift#healthcheck"},
                "filter:cache": {"use": "egg:swift#memcache", "memcache_servers": f"127.0.0.1:{cache_port}"},
                "app:proxy-server": {
                    "use": "egg:swift#proxy",
                    "account_autocreate": "true",
                    "node_timeout": settings.node_timeout,
                    "sorting_method": "affinity",
                    "read_affinity": affinity,
                    "concurrent_gets": str(settings.concurrent_gets).lower(),
                    "concurrency_timeout": settings.concurrency_timeout,
                    **settings.proxy,
                },
            },
        )

    def container(self, policy: int) -> str:
        """The name of the container that there is for a storage policy."""
        return f"c{policy}"

    def path(self, name: str, policy: int = REPLICATED) -> str:
        """The path of an object at the proxy."""
        return f"{ACCOUNT}/{self.container(policy)}/{name}"

    def devices_of(self, name: str, policy: int = REPLICATED) -> list[str]:
        """The devices that hold an object, in the order in which the ring has them."""
        return self._partitions[RINGS[policy]][self._partition(name, policy)]

    def object_path(self, device: str, name: str, policy: int = REPLICATED) -> str:
        """The path of an object at the object server."""
        return f"/{device}/{self._partition(name, policy)}{self.path(name, policy).removeprefix('/v1')}"

    def _partition(self, name: str, policy: int) -> int:
        # As swift.common.utils.hash_path and Ring.get_part do it.
        hashed = f"{self.path(name, policy).removeprefix('/v1')}{HASH_SUFFIX}".encode()
        return int.from_bytes(hashlib.md5(hashed, usedforsecurity=False).digest()[:4], "big") >> (32 - PART_POWER)

    def names_on(self, device: str, count: int, policy: int = REPLICATED, *, held: bool = True) -> list[str]:
        """Names of objects that a device holds (or does not)."""
        names: list[str] = []
        number = 0
        while len(names) < count:
            if (device in self.devices_of(name := f"o{number}", policy)) == held:
                names.append(name)
            number += 1
        return names

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> Response:
        """Ask the proxy; see `ask` for what is raised."""
        return ask(self.port, method, path, body, headers, timeout)
