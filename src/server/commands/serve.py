"""`diskread serve`."""

from __future__ import annotations

import contextlib
import faulthandler
import ipaddress
import logging
import os
import resource
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import gevent
import msgspec
from gevent.event import Event

from .. import access, access_log, admin
from .. import config as configuration
from ..app import create_app
from ..events import Events
from ..first_answers import wait_for_first_answers
from ..listener import Server, tls_context
from ..logs import configure
from ..service_manager import ServiceManager
from ..state_log import StateLog
from ..status import ServerStatus, look_at, version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diskread import Disks

_DEFAULT = configuration.ServerConfig()
_LIMITS = configuration.limits_of(configuration.LimitsConfig(), [])


class _DiskOption(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic in click 8.5 only
    """NAME=DIR. The directory is not looked at: its disk may be dead, and that must not hold up the start."""

    name = "NAME=DIR"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        name, equals, root = str(value).partition("=")
        if not equals or not name or not root:
            self.fail(f"{value!r} is not NAME=DIR, such as photos=/srv/photos", param, ctx)
        return name, root


@click.command("serve", short_help="Serve the files of one or more disks.")
@click.option(
    "--config",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="TOML file; options given here win over what it says.",
)
@click.option(
    "--disk",
    "disks",
    type=_DiskOption(),
    multiple=True,
    help="Serve DIR, on a device of its own, as /v1/NAME/. Repeat for each disk.",
)
@click.option("--host", help=f"Address to listen on.  [default: {_DEFAULT.host}]")
@click.option(
    "--port", type=click.IntRange(0, 65535), help=f"TCP port; 0 lets the kernel choose.  [default: {_DEFAULT.port}]"
)
@click.option(
    "--threads", type=int, help=f"Slots of each disk: reads inside the kernel at a time.  [default: {_LIMITS.threads}]"
)
@click.option(
    "--queue",
    type=int,
    help=f"Reads of each disk that may wait for a slot; more get 503 at once.  [default: {_LIMITS.queue}]",
)
@click.option(
    "--deadline",
    type=float,
    metavar="SECONDS",
    help=f"Time for a read, waiting included; then 504.  [default: {_LIMITS.deadline:g}]",
)
@click.option(
    "--engine",
    type=click.Choice(["threadpool", "native"]),
    help="What reads: gevent's threadpool, or native threads that never wait for the GIL, at a fraction of its CPU "
    f"time.  [default: {_LIMITS.engine}]",
)
@click.option(
    "--offline-after",
    type=float,
    metavar="SECONDS",
    help="Take a disk offline when it makes no progress for so long: its clients get 503 at once, until it answers a "
    f"probe.  [default: {_LIMITS.offline_after:g}]",
)
@click.option(
    "--admin-socket",
    metavar="PATH",
    help="Make a Unix socket, for this user only, through which 'diskread disk' takes disks offline and back.  "
    "[default: none]",
)
@click.option(
    "--simulate/--no-simulate",
    default=None,
    help="Let clients simulate stalls (RC,MS,PATH). Whoever can stall a slot can deny service. "
    "[default: only without disks]",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="Serve with so many processes, kept by gunicorn: one that dies is replaced, SIGHUP reads the configuration "
    "again. Slots and queues are divided among them.  [default: one process, without gunicorn]",
)
@click.option("--access-log", metavar="FILE", help="Write a line per request; - is standard output.")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    help="How lines of standard error and of the access log look: text, or a JSON object each.  "
    f"[default: {_DEFAULT.log_format}]",
)
@click.option(
    "--connections",
    type=click.IntRange(1),
    help=f"Connections at a time; more wait in the backlog.  [default: {_DEFAULT.connections}]",
)
@click.option(
    "--connections-per-client",
    type=click.IntRange(0),
    metavar="N",
    help="Connections of one address at a time; more get 503. Of each worker.  [default: no limit]",
)
@click.option("--tokens", metavar="FILE", help="Serve only who shows a token of this file: 'diskread token --help'.")
@click.option("--tls-certificate", metavar="FILE", help="Serve with TLS: certificate and those below its root, PEM.")
@click.option("--tls-key", metavar="FILE", help="The certificate's private key, PEM.")
@click.option(
    "--idle-timeout",
    type=float,
    metavar="SECONDS",
    help=f"Hang up on a client that sends or takes nothing.  [default: {_DEFAULT.idle_timeout:g}]",
)
@click.option(
    "--request-timeout",
    type=float,
    metavar="SECONDS",
    help=f"Time for a client to send line and headers.  [default: {_DEFAULT.request_timeout:g}]",
)
@click.option(
    "--drain-timeout",
    type=float,
    metavar="SECONDS",
    help=f"Time for requests under way after SIGTERM.  [default: {_DEFAULT.drain_timeout:g}]",
)
def serve(path: Path | None, disks: tuple[tuple[str, str], ...], workers: int | None, **options: Any) -> None:
    """Serve the files of one or more disks over HTTP and over the line protocol, on one port.

    A hung disk costs its own clients a 504 after the deadline or a 503 at once; nobody else notices. One that makes
    no progress at all, or whose directory is not there, is offline until it answers a probe: the log says when and why,
    `diskread status` shows it. A disk that is dead at the start does not delay the start.

    Request line and headers of a client may have 64 KiB, a line of the line protocol 4 KiB. Without any disk only
    simulated stalls are served, as the original experiment does.

    \b
    Examples:
      diskread serve --disk a=/srv/a --disk b=/srv/b
      curl http://127.0.0.1:7000/v1/a/some/file
      diskread serve --simulate &  echo 0,100,some_file | nc -N 127.0.0.1 7000

    \b
    The same in a file for --config:
      port = 7000
      admin_socket = "/run/diskread/admin.sock"
      [limits]
      deadline = 5.0
      offline_after = 10.0
      [disk.a]
      root = "/srv/a"
      threads = 16
      [disk.b]
      root = "/srv/b"
      [mirror.m]
      disks = ["a", "b"]

    SIGTERM and SIGINT free the port at once and let requests finish (drain); a second signal does not wait.
    systemd is told with Type=notify when the server listens, and with WatchdogSec= that its hub turns.
    Exit status: 0 after a drain, 1 when the server could not start, 2 for wrong options.
    """
    names = [name for name, _ in disks]
    for name in names:
        if names.count(name) > 1:
            raise click.UsageError(f"two disks are called {name}; give each a name of its own")
    try:
        if workers is None:
            run(_merge(path, dict(disks), options))
        else:
            run_workers(partial(_merge, path, dict(disks), options), workers)
    except configuration.ConfigError as error:
        raise click.UsageError(str(error)) from error


def _merge(path: Path | None, disks: dict[str, str], options: dict[str, Any]) -> configuration.ServerConfig:
    """The file's configuration with the options over it."""
    config = configuration.load(path) if path is not None else _DEFAULT
    given = {key: value for key, value in options.items() if value is not None}
    limits = {key: given.pop(key) for key in configuration.LimitsConfig.__struct_fields__ if key in given}
    merged = dict(config.disk)
    for name, root in disks.items():
        old = merged.get(name)
        new = configuration.DiskConfig(root=root)
        merged[name] = new if old is None else msgspec.structs.replace(old, root=root)
    config = msgspec.structs.replace(
        config, **given, disk=merged, limits=msgspec.structs.replace(config.limits, **limits)
    )
    configuration.check(config)
    # Read now: what is wrong with them should not come to light in each worker.
    if config.tokens is not None:
        access.load(Path(config.tokens))
    if config.tls_certificate is not None and config.tls_key is not None:
        tls_context(config.tls_certificate, config.tls_key)
    return config


def run(config: configuration.ServerConfig) -> None:
    """Serve until a signal comes, drain, and leave the process."""
    configure(config.log_format)
    _raise_descriptor_limit()
    manager = ServiceManager()
    if manager.watchdog:
        faulthandler.enable()  # its SIGABRT leaves in the log where the hub stood
    disks = configuration.make_disks(config)
    with access_log.opened(config.access_log, config.log_format) as log:
        events = Events(ServerStatus(look_at(disks), simulate=config.stalls))
        app = create_app(disks, events=events, guard=access.opened(config, disks))
        tls = None
        if config.tls_certificate is not None and config.tls_key is not None:
            tls = tls_context(config.tls_certificate, config.tls_key)
        server = Server(config, app, disks, log, tls=tls)
        stop = Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            gevent.signal_handler(number, _stop_or_leave, stop)
        try:
            server.init_socket()  # who connects from now on waits in the backlog
        except OSError as error:
            raise click.ClickException(_why_not_listening(config, error)) from error
        with _admin_server(config, disks):
            disks.watch()
            wait_for_first_answers(disks)
            events.start()
            server.start()
            _announce(config, server, disks)
            StateLog(disks)
            manager.ready()
            stop.wait()
            manager.stopping()
        logging.info("the port is free again; requests under way get %g s to finish", config.drain_timeout)
        events.close()  # who listens would do so until the end
        finished = server.drain(config.drain_timeout)
    logging.info("stopped" if finished else "stopped; some requests were cut off")
    if not finished or any(disk.load.in_flight for disk in disks.status):
        # A thread that is stuck in the kernel must not be waited for by anything on the way out.
        sys.stdout.flush()
        os._exit(0)
    manager.close()
    disks.close()


def run_workers(load: Callable[[], configuration.ServerConfig], workers: int) -> None:
    """Serve with several processes, until a signal comes.

    Args:
        load: Loads the configuration: now, and again at each SIGHUP.
        workers: How many.

    Raises:
        ConfigError: The configuration is wrong.
    """
    from ..gunicorn import Application  # it costs a fifth of a second that one process alone need not spend

    _raise_descriptor_limit()
    application = Application(load, workers)
    for warning in _exposed(application.config):
        click.echo(f"warning: {warning}", err=True)
    application.run()


def _stop_or_leave(stop: Event) -> None:
    if stop.is_set():
        os._exit(1)
    stop.set()


@contextlib.contextmanager
def _admin_server(config: configuration.ServerConfig, disks: Disks) -> Iterator[None]:
    if config.admin_socket is None:
        yield
        return
    app = admin.create_app(disks, simulate=config.stalls)
    try:
        server = admin.AdminServer(config.admin_socket, app)
    except admin.AdminSocketError as error:
        raise click.ClickException(str(error)) from error
    with server:
        yield


def _announce(config: configuration.ServerConfig, server: Server, disks: Disks) -> None:
    host = f"[{config.host}]" if ":" in config.host else config.host
    scheme = "http" if config.tls_certificate is None else "https"
    logging.info("diskread %s listens on %s://%s:%d/", version(), scheme, host, server.server_port)
    for disk in disks.values():
        if disk.root is not None:
            logging.info("disk %s: %s, %d slots", disk.name, disk.root, disk.limits.threads)
    for mirror in disks.mirrors.values():
        logging.info("mirror %s: %s", mirror.name, ", ".join(disk.name for disk in mirror.disks))
    if config.admin_socket is not None:
        logging.info("administrative socket at %s: 'diskread disk --help'", config.admin_socket)
    if config.stalls:
        logging.info("clients may simulate stalls: RC,MS,PATH")
        if not _is_loopback(config.host):
            logging.warning("%s is no loopback address: any client there can use up all slots", config.host)
    for warning in _exposed(config):
        logging.warning("%s", warning)


def _exposed(config: configuration.ServerConfig) -> Iterator[str]:
    """What a server lacks that others than this machine can reach, and what to do about it."""
    if _is_loopback(config.host):
        return
    if config.tokens is None:
        yield (
            f"anybody who reaches {config.host} may read all files: name a file of tokens with --tokens; "
            "'diskread token' makes one"
        )
    if config.tls_certificate is None:
        yield (
            f"what goes over {config.host} can be read on the way: give --tls-certificate and --tls-key, or put a "
            "proxy with TLS in front of a loopback address"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _why_not_listening(config: configuration.ServerConfig, error: OSError) -> str:
    text = f"cannot listen on {config.host} port {config.port}: {error.strerror or error}"
    if error.errno == 98:
        text += f"; choose another with --port, or find out who has it: ss -ltnp 'sport = :{config.port}'"
    return text


def _raise_descriptor_limit() -> None:
    """Each connection takes a descriptor, each file that is being sent another: ask for all that we may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
