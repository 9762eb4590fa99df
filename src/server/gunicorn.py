"""Several worker processes on one port, kept by gunicorn.

`diskread serve --workers N` is the one way to have them, gunicorn itself the other:

    DISKREAD_CONFIG=diskread.toml gunicorn server.app:application -k server.gunicorn.Worker -w 2 -b 127.0.0.1:7000

Gunicorn binds the port and replaces workers that die. SIGHUP reads the configuration again and replaces all workers,
SIGUSR2 starts a new program beside the old one; both let requests under way finish.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gevent
import gevent.hub
from gevent import socket
from gunicorn.app.base import BaseApplication
from gunicorn.workers.base import Worker as BaseWorker

from . import access, access_log, admin, config, logs
from .app import CONFIG_VARIABLE, create_app
from .events import Events
from .first_answers import wait_for_first_answers
from .listener import BACKLOG, Server, tls_context
from .processes import Processes, directory_of
from .state_log import StateLog
from .status import ServerStatus

if TYPE_CHECKING:
    from collections.abc import Callable

    from gevent.pywsgi import WSGIServer

HEARTBEAT = 1.0
"""Seconds between two signs of life for gunicorn's master, which kills a worker whose hub stands still (`timeout`)."""

_log = logging.getLogger("diskread.server")


class Worker(BaseWorker):
    """One process of the server: all protocols on the sockets that gunicorn has bound."""

    def init_process(self) -> None:
        """Begin in the new process: with a hub of its own. Nothing is monkey-patched."""
        gevent.hub.reinit()
        super().init_process()

    def load_wsgi(self) -> None:
        """Make disks and servers. What goes wrong here ends gunicorn, instead of being tried again and again."""
        settings = getattr(self.app, "config", None) or _from_environment()
        logs.configure(settings.log_format, several=True)
        self._disks = config.make_disks(settings, self.cfg.workers)
        self._open = contextlib.ExitStack()
        log = self._open.enter_context(access_log.opened(settings.access_log, settings.log_format))
        others = self._open.enter_context(Processes(directory_of(self.ppid), self._disks))
        self._events = Events(ServerStatus(others.look, simulate=settings.stalls))
        guard = access.opened(settings, self._disks)
        app = create_app(self._disks, stalls=settings.stalls, look=others.look, events=self._events, guard=guard)
        private = admin.create_app(self._disks, simulate=settings.stalls, others=others)
        # Ours, or, under gunicorn itself, its own --certfile and --keyfile.
        tls = tls_context(self.cfg.certfile, self.cfg.keyfile) if self.cfg.certfile else None
        self._public: list[Server] = []
        self._private: list[WSGIServer] = []
        sockets: list[Any] = self.sockets  # gunicorn's, around real ones
        for each in sockets:
            listener = socket.socket(each.FAMILY, socket.SOCK_STREAM, fileno=each.sock.detach())
            listener.setblocking(False)
            if each.FAMILY == socket.AF_UNIX:
                self._private.append(admin.serve(listener, private))
            else:
                self._public.append(Server(settings, app, self._disks, log, listener, tls))
                if self.cfg.workers > 1:
                    self._public[-1].max_accept = 1  # leave some to the others

    def run(self) -> None:
        """Serve until gunicorn says stop; then drain."""
        with self._open:
            self._disks.watch()
            wait_for_first_answers(self._disks)
            for server in (*self._public, *self._private):
                server.start()
            StateLog(self._disks)
            self._events.start()
            while self.alive and self.ppid == os.getppid():
                self.notify()
                gevent.sleep(HEARTBEAT)
            finished = self._drain()
        if not finished or any(disk.load.in_flight for disk in self._disks.status):
            os._exit(0)  # a thread that is stuck in the kernel must not be waited for by anything on the way out
        self._disks.close()

    def _drain(self) -> bool:
        self._events.close()
        for server in self._private:
            server.close()
        draining = [gevent.spawn(server.drain, float(self.cfg.graceful_timeout)) for server in self._public]
        while not all(each.dead for each in draining):
            self.notify()
            gevent.joinall(draining, timeout=HEARTBEAT)
        return all(each.value for each in draining)


class Application(BaseApplication):
    """What `diskread serve --workers` runs: gunicorn, told by our configuration instead of its own."""

    def __init__(self, load: Callable[[], config.ServerConfig], workers: int) -> None:
        """Load the configuration.

        Args:
            load: Loads it: file and options.
            workers: Processes.

        Raises:
            ConfigError: The configuration is wrong.
        """
        self._load = load
        self._workers = workers
        self.config = load()
        super().__init__()

    def load_config(self) -> None:
        """Tell gunicorn."""
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        bind = [f"{host}:{self.config.port}"]
        if self.config.admin_socket is not None:
            bind.append(f"unix:{self.config.admin_socket}")
        for name, value in {
            "bind": bind,
            "workers": self._workers,
            "worker_class": "server.gunicorn.Worker",
            "backlog": BACKLOG,
            "graceful_timeout": max(1, round(self.config.drain_timeout)),
            "certfile": self.config.tls_certificate,
            "keyfile": self.config.tls_key,
            "umask": 0o177,  # of the administrative socket
            "proc_name": "diskread",
            "control_socket_disable": True,
        }.items():
            if name in self.cfg.settings:  # control_socket_disable: from gunicorn 25 on
                self.cfg.set(name, value)

    def run(self) -> None:
        """Serve until a signal comes."""
        # Gunicorn starts this again at SIGUSR2; in sys.argv `python -m server` would be a file of the package.
        sys.argv = sys.orig_argv[1:]
        super().run()

    def reload(self) -> None:
        """SIGHUP: read the configuration again. A wrong one changes nothing."""
        try:
            self.config = self._load()
        except config.ConfigError as error:
            print(f"the configuration stays what it was: {error}", file=sys.stderr, flush=True)
            return
        super().reload()

    def load(self) -> Any:
        """Gunicorn asks for a WSGI application; workers make theirs."""


def _from_environment() -> config.ServerConfig:
    path = os.environ.get(CONFIG_VARIABLE)
    return config.load(Path(path)) if path else config.ServerConfig()
