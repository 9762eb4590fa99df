"""The configuration: a TOML file, the command line's options over it, and what both may say."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from diskread import Disk, Disks, Limits, Mirror

from .logs import LogFormat  # noqa: TC001 - msgspec reads the annotations of a Struct at run time
from .simulate import SIMULATED, SIMULATED_LIMITS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Made = TypeVar("Made")

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\Z")
_RESERVED = ("v1", SIMULATED)

LONGEST_SOCKET_PATH = 107
"""Bytes of the path of a Unix socket: `sun_path` of unix(7) without the NUL at its end."""


class ConfigError(Exception):
    """The configuration is wrong; the message names the file, the line and the key."""


class LimitsConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`[limits]`: limits of every disk that does not say otherwise. See `diskread.Limits`."""

    threads: int | None = None
    queue: int | None = None
    deadline: float | None = None
    idle: float | None = None
    offline_after: float | None = None
    idle_probe: float | None = None
    probe_interval: float | None = None
    probe_interval_max: float | None = None
    slow: float | None = None
    inline: Literal["auto", "off"] | None = None
    engine: Literal["threadpool", "native"] | None = None


class DiskConfig(LimitsConfig, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[disk.NAME]`: a directory on a device of its own, and its limits.

    Attributes:
        root: The directory. One disk is one device: a mount below it is refused.
    """

    root: str


class MirrorConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`[mirror.NAME]`: disks with the same content. See `diskread.Mirror`.

    Attributes:
        disks: Names of two or more disks.
        hedge_after: Seconds after which a disk that has not answered gets company from another one; "p95" is the 95th
            percentile of its own recent reads; inf means never.
        hedge_share: Hedges per read at most, between 0 and 1.
        checksum_suffix: ".sha256" or the like: a body goes on from another disk if the checksum files beside the two
            copies say the same, whatever their times; None: if size and time of modification are the same.
    """

    disks: list[str]
    hedge_after: float | Literal["p95"] = "p95"
    hedge_share: float = 0.05
    checksum_suffix: str | None = None


class ServerConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The top of the file.

    Attributes:
        host: Address to listen on.
        port: TCP port; 0 lets the kernel choose.
        simulate: Whether clients may simulate stalls; None means: when there is no disk.
        access_log: Where to write a line per request: a file name, "-" for standard output; None for nowhere.
        log_format: How lines of the access log and of standard error look: "text", or "json", an object each.
        admin_socket: Path of the Unix socket for `diskread disk`; None for no such socket.
        connections: Connections served at a time; more wait in the backlog.
        connections_per_client: Connections of one address at a time; more get 503. 0 for no such limit.
        tokens: The file of tokens that requests need; None when they need none.
        tls_certificate: File of the server's certificate and those between it and the root, PEM; None for no TLS.
        tls_key: File of its private key, PEM.
        idle_timeout: Seconds without a byte after which a client is hung up on.
        request_timeout: Seconds that a client may take to send its request line and headers.
        drain_timeout: Seconds that requests under way get to finish after SIGTERM.
        limits: Limits of every disk that does not say otherwise.
        disk: The disks by name.
        mirror: The mirrors by name.
    """

    host: str = "127.0.0.1"
    port: int = 7000
    simulate: bool | None = None
    access_log: str | None = None
    log_format: LogFormat = "text"
    admin_socket: str | None = None
    connections: int = 10_000
    connections_per_client: int = 0
    tokens: str | None = None
    tls_certificate: str | None = None
    tls_key: str | None = None
    idle_timeout: float = 60.0
    request_timeout: float = 30.0
    drain_timeout: float = 30.0
    limits: LimitsConfig = LimitsConfig()
    disk: dict[str, DiskConfig] = {}
    mirror: dict[str, MirrorConfig] = {}

    @property
    def stalls(self) -> bool:
        """Whether clients may simulate stalls."""
        return not self.disk if self.simulate is None else self.simulate


def load(path: Path) -> ServerConfig:
    """Read a configuration file. Reads from the disk that the file is on: for the start, not for later.

    Args:
        path: A TOML file.

    Raises:
        ConfigError: The file cannot be read, is not TOML, has an unknown key, or a value that cannot be.
    """
    return read(path, lambda tables: check(_convert(tables)))


def read(path: Path, make: Callable[[dict[str, Any]], Made]) -> Made:
    """Read a TOML file and make something of its tables. Blocks.

    Args:
        path: The file.
        make: Makes it, or raises `Wrong`.

    Raises:
        ConfigError: The file cannot be read, is not TOML, or `make` says what is wrong with it.
    """
    try:
        text = path.read_text("utf-8")
        tables = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    try:
        return make(tables)
    except Wrong as wrong:
        line = _line_of(text, wrong.keys)
        raise ConfigError(f"{path}:{line}: {'.'.join(wrong.keys) or 'the file'}: {wrong.reason}") from wrong


def check(config: ServerConfig) -> ServerConfig:
    """Return a configuration as it is, when every value in it can be.

    Raises:
        ConfigError: A value cannot be; the message names its key.
    """
    if not 0 <= config.port <= 65535:
        raise Wrong(["port"], f"must be between 0 and 65535, not {config.port}")
    if not 1 <= config.connections <= 1_000_000:
        raise Wrong(["connections"], f"must be between 1 and 1000000, not {config.connections}")
    if config.connections_per_client < 0:
        raise Wrong(["connections_per_client"], f"must be 0 or more, not {config.connections_per_client}")
    for key in ("idle_timeout", "request_timeout", "drain_timeout"):
        if not getattr(config, key) > 0:
            raise Wrong([key], f"must be a positive number of seconds, not {getattr(config, key)}")
    if config.admin_socket is not None:
        _check_socket_path(config.admin_socket)
    limits_of(config.limits, ["limits"])
    for name, disk in config.disk.items():
        _check_name("disk", name)
        if not disk.root or "\0" in disk.root:
            raise Wrong(["disk", name, "root"], "must be a directory")
        limits_of(disk, ["disk", name], config.limits)
    for name, mirror in config.mirror.items():
        _check_name("mirror", name)
        _check_mirror(config, name, mirror)
    _check_access(config)
    return config


def _check_access(config: ServerConfig) -> None:
    for key in ("tokens", "tls_certificate", "tls_key"):
        if getattr(config, key) == "" or "\0" in (getattr(config, key) or ""):
            raise Wrong([key], "must be a file")
    for key, other in (("tls_certificate", "tls_key"), ("tls_key", "tls_certificate")):
        if getattr(config, key) is not None and getattr(config, other) is None:
            raise Wrong([key], f"needs {other} as well")
    for kind, names in (("disk", config.disk), ("mirror", config.mirror)):
        if config.tokens is not None and "status" in names:
            raise Wrong([kind, "status"], "tokens use that name for the operator's views; choose another")


def _check_name(kind: str, name: str) -> None:
    if not NAME.match(name):
        raise Wrong(
            [kind, name],
            f"the name of a {kind} is made of letters, digits, '.', '_' and '-', and does not begin with '.' or '-'",
        )
    if name in _RESERVED:
        raise Wrong([kind, name], f"a {kind} cannot be called {name}: the protocols use that name")


def _check_mirror(config: ServerConfig, name: str, mirror: MirrorConfig) -> None:
    keys = ["mirror", name]
    if name in config.disk:
        raise Wrong(keys, f"there is a disk called {name}; a mirror needs a name of its own")
    for disk in mirror.disks:
        if disk not in config.disk:
            known = ", ".join(config.disk) or "none"
            raise Wrong([*keys, "disks"], f"there is no disk called {disk}; there are: {known}")
    if len(set(mirror.disks)) < max(2, len(mirror.disks)):
        raise Wrong([*keys, "disks"], "a mirror needs two or more disks, each of them once")
    if mirror.hedge_after != "p95" and not mirror.hedge_after > 0:
        raise Wrong([*keys, "hedge_after"], f'must be a positive number of seconds or "p95", not {mirror.hedge_after}')
    if not 0 <= mirror.hedge_share <= 1:
        raise Wrong([*keys, "hedge_share"], f"must be between 0 and 1, not {mirror.hedge_share}")
    suffix = mirror.checksum_suffix
    if suffix is not None and (not suffix or set(suffix) & {"/", "\0"}):
        raise Wrong([*keys, "checksum_suffix"], f'must be the end of a file name, like ".sha256", not {suffix!r}')


def limits_of(config: LimitsConfig, keys: list[str], default: LimitsConfig | None = None) -> Limits:
    """The limits that a table says, over those of another, over the library's own.

    Where no table says `idle_probe`, it is the library's own or three times `offline_after`, whichever is more, so that
    whoever wants a disk to have more time need not know of it.

    Raises:
        ConfigError: A value is out of its range.
    """
    values: dict[str, Any] = {}
    for table in (default, config):
        for field in LimitsConfig.__struct_fields__ if table is not None else ():
            if getattr(table, field) is not None:
                values[field] = getattr(table, field)
    idle_probe = max(Limits.idle_probe, 3 * values.get("offline_after", Limits.offline_after))
    try:
        return Limits(**{"idle_probe": idle_probe, **values})
    except (ValueError, TypeError) as error:
        field = str(error).partition(" ")[0]  # messages of Limits begin with the name of the field
        raise Wrong([*keys, field] if field in values else keys, str(error)) from error


def make_disks(config: ServerConfig, workers: int = 1) -> Disks:
    """The disks and mirrors of a configuration, and the disk for simulated stalls where these are on.

    Touches no device.

    Args:
        config: The configuration, checked.
        workers: Processes that serve these disks: slots and queues are divided among them, with a slot for each at the
            least.
    """
    disks = [
        Disk(name, disk.root, _share(limits_of(disk, ["disk", name], config.limits), workers))
        for name, disk in config.disk.items()
    ]
    if config.stalls:
        limits = SIMULATED_LIMITS
        if config.limits.engine is not None:
            limits = dataclasses.replace(limits, engine=config.limits.engine)
        disks.append(Disk(SIMULATED, None, _share(limits, workers)))
    by_name = {disk.name: disk for disk in disks}
    mirrors = [
        Mirror(
            name,
            [by_name[disk] for disk in mirror.disks],
            hedge_after=mirror.hedge_after,
            hedge_share=mirror.hedge_share,
            checksum_suffix=mirror.checksum_suffix,
        )
        for name, mirror in config.mirror.items()
    ]
    return Disks(disks, mirrors)


def _share(limits: Limits, workers: int) -> Limits:
    return dataclasses.replace(limits, threads=max(1, limits.threads // workers), queue=limits.queue // workers)


def _check_socket_path(path: str) -> None:
    if not path or "\0" in path:
        raise Wrong(["admin_socket"], "must be a path")
    if len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
        raise Wrong(["admin_socket"], f"must have at most {LONGEST_SOCKET_PATH} bytes: unix(7)")


class Wrong(ConfigError):
    """A key whose place in the file is still to be found."""

    def __init__(self, keys: list[str], reason: str) -> None:
        """Name the key, from the top of the file on, and say what is wrong with it."""
        super().__init__(f"{'.'.join(keys)}: {reason}")
        self.keys = keys
        self.reason = reason


def _convert(tables: dict[str, Any]) -> ServerConfig:
    """Check types and names. Table by table, because msgspec does not tell under which name an error is."""
    converted = {
        key: convert_named(tables, key, kind) for key, kind in (("disk", DiskConfig), ("mirror", MirrorConfig))
    }
    config = convert_table(tables, ServerConfig, [])
    replaced: ServerConfig = msgspec.structs.replace(config, **converted)
    return replaced


def convert_named(tables: dict[str, Any], key: str, kind: type[Any]) -> dict[str, Any]:
    """Take the tables `[key.NAME]` out of a file's, by name.

    Raises:
        ConfigError: One of them is wrong.
    """
    named = tables.pop(key, {})
    if not isinstance(named, dict):
        raise Wrong([key], f"each {key} is a table of its own: [{key}.NAME]")
    return {name: convert_table(table, kind, [key, name]) for name, table in named.items()}


def convert_table(table: Any, kind: type[Any], keys: list[str]) -> Any:
    """Check types and names of a table.

    Raises:
        ConfigError: One of them is wrong.
    """
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$")
        below = [key for key in place.rstrip("`").split(".") if key]
        unknown = re.match(r"Object contains unknown field `(.*)`", reason)
        missing = re.match(r"Object missing required field `(.*)`", reason)
        if unknown:
            known = ", ".join(_struct_at(kind, below).__struct_fields__)
            raise Wrong([*keys, *below, unknown[1]], f"there is no such key; there are: {known}") from error
        if missing:
            raise Wrong([*keys, *below], f"the key {missing[1]} is missing") from error
        raise Wrong([*keys, *below], reason[:1].lower() + reason[1:]) from error


def _struct_at(kind: type[Any], keys: list[str]) -> Any:
    return LimitsConfig if kind is ServerConfig and keys == ["limits"] else kind


def _line_of(text: str, keys: list[str]) -> int:
    """The line of a key in a TOML text; that of the longest part of it that is there. tomllib does not tell.

    Good for tables and keys as people write them; a key within a multi-line string could be taken for one.
    """
    best, best_line, table = 0, 1, []
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[+([^\]]+)\]+", line)
        assignment = re.match(r"\s*([^=#\[]+?)\s*=", line)
        if header:
            table = _split_key(header[1])
            found = table
        elif assignment:
            found = table + _split_key(assignment[1])
        else:
            continue
        common = 0
        while common < min(len(found), len(keys)) and found[common] == keys[common]:
            common += 1
        if common == len(found) and common > best:
            best, best_line = common, number
    return best_line


def _split_key(text: str) -> list[str]:
    return [part.strip().strip("\"'") for part in text.split(".")]
