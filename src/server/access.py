"""Who may ask for what: bearer tokens, a file of their hashes, and a Falcon middleware that asks for them.

What is not certainly allowed ends here, before any router or disk sees it.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import threading
from base64 import b64decode
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import falcon
import msgspec

from . import config
from .simulate import SIMULATED, BadInput, parse

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

VIEWS = "status"
"""What `allow` says for the operator's views. No disk can be called so where there are tokens."""

INTERVAL = 1.0
"""Seconds between two looks at the file."""

_VIEW_PATHS = {b"/", b"/status", b"/metrics", b"/events"}
_PUBLIC_PATHS = {b"/healthz", b"/readyz"}
_DIGEST = re.compile(r"[0-9A-Fa-f]{64}")
_CHALLENGES = ['Bearer realm="diskread"', 'Basic realm="diskread"']

_log = logging.getLogger("diskread.server")


class TokenConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`[token.NAME]` in the file of tokens."""

    sha256: str
    allow: list[str]


class Prefix(NamedTuple):
    """What one entry of `allow` says: a disk, and the segments with which paths on it have to begin."""

    disk: bytes
    segments: tuple[bytes, ...]

    def matches(self, disk: bytes, path: bytes) -> bool:
        """Whether a path on a disk is certainly below this one. Whole segments count: `a/b` is not below `a/bc`.

        The kernel resolves `..` in a path, so that `a/../b` is `b`: below a prefix only plain paths are.
        """
        if disk != self.disk:
            return False
        segments = tuple(path.split(b"/"))
        plain = not {b"", b".", b".."} & set(segments)
        return not self.segments or (plain and segments[: len(self.segments)] == self.segments)


class Token(NamedTuple):
    """A token, as the server knows it."""

    name: str
    digest: bytes
    allow: tuple[Prefix, ...]

    def allows(self, disk: bytes, path: bytes = b"") -> bool:
        """Whether it is good for a path on a disk or mirror, or for `status` or `simulated`."""
        return any(prefix.matches(disk, path) for prefix in self.allow)


def prefix(text: str) -> Prefix:
    """Understand an entry of `allow`: `DISK`, `DISK/PATH/`, `status`, `simulated`.

    Raises:
        ValueError: It is none.
    """
    disk, *segments = text.removesuffix("/").split("/")
    if not config.NAME.match(disk):
        raise ValueError(f"{text!r} does not begin with the name of a disk or mirror, or 'status'")
    if {"", ".", ".."} & set(segments) or "\0" in text:
        raise ValueError(f"{text!r} has an empty segment, '.' or '..'")
    if disk == VIEWS and segments:
        raise ValueError(f"{text!r}: 'status' stands for all of the operator's views and has no path")
    return Prefix(disk.encode(), tuple(each.encode() for each in segments))


def digest(token: bytes) -> bytes:
    """What is kept of a token. Its entropy makes a slow hash needless: nobody can guess 256 bits."""
    return hashlib.sha256(token).digest()


def find(tokens: Sequence[Token], secret: bytes) -> Token | None:
    """The token that a client has shown. All are compared, each in constant time: it takes as long for each of them."""
    shown, found = digest(secret), None
    for token in tokens:
        if hmac.compare_digest(token.digest, shown):
            found = token
    return found


def load(path: Path) -> tuple[Token, ...]:
    """Read a file of tokens. Blocks: it belongs on the system disk, and on no hub.

    Raises:
        ConfigError: It cannot be read, or is wrong; the message names the file, the line and the key.
    """
    return config.read(path, _tokens)


def _tokens(tables: dict[str, Any]) -> tuple[Token, ...]:
    named = config.convert_named(tables, "token", TokenConfig)
    if tables:
        raise config.Wrong([next(iter(tables))], "there is no such key; tokens are tables [token.NAME]")
    return tuple(_token(name, each) for name, each in named.items())


def _token(name: str, table: TokenConfig) -> Token:
    keys = ["token", name]
    if not _DIGEST.fullmatch(table.sha256):
        raise config.Wrong([*keys, "sha256"], "must have 64 hexadecimal digits; 'diskread token' makes them")
    if not table.allow:
        raise config.Wrong([*keys, "allow"], "allows nothing; remove the token instead")
    try:
        return Token(name, bytes.fromhex(table.sha256), tuple(map(prefix, table.allow)))
    except ValueError as error:
        raise config.Wrong([*keys, "allow"], str(error)) from error


class TokenFile:
    """A file of tokens, read again when it changes, by a thread of its own: should its disk hang, nothing else does.

    Attributes:
        tokens: What it said when it was last right.
    """

    def __init__(self, path: Path) -> None:
        """Read it now; blocks.

        Raises:
            ConfigError: As `load`.
        """
        self._path = path
        self._seen = self._look()
        self.tokens = load(path)
        self._closed = threading.Event()

    def watch(self, interval: float = INTERVAL) -> None:
        """Begin to look at it, each `interval` seconds."""
        threading.Thread(target=self._watch, args=(interval,), name="diskread tokens", daemon=True).start()

    def close(self) -> None:
        """Look no more. Does not wait for a look under way."""
        self._closed.set()

    def _watch(self, interval: float) -> None:
        while not self._closed.wait(interval):
            seen = self._look()
            if seen != self._seen:
                self._seen = seen
                try:
                    self.tokens = load(self._path)
                except config.ConfigError as error:
                    _log.error("the tokens stay what they were: %s", error)
                else:
                    _log.info("%s: %d tokens", self._path, len(self.tokens))

    def _look(self) -> tuple[int, ...] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


class Access:
    """Falcon middleware: lets a request pass that its token allows, or that needs none."""

    def __init__(self, file: TokenFile, disks: Collection[str]) -> None:
        """Ask for the tokens in a file.

        Args:
            file: Holds them.
            disks: Names of the disks, which a simulated request may name as well.
        """
        self._file = file
        self._disks = {name.encode() for name in disks} - {SIMULATED.encode()}

    def process_request(self, request: falcon.Request, _response: falcon.Response) -> None:
        """Judge a request, before it has been routed.

        Raises:
            HTTPUnauthorized: It has no token, or one that is not ours.
            HTTPForbidden: The token does not allow it; nothing has been looked up.
            HTTPNotFound: There is nothing of that path, whatever the token.
        """
        path = request.env["PATH_INFO"].encode("latin-1")
        if path in _PUBLIC_PATHS:
            return
        token = self._token_of(request)
        wanted = self._wanted(path)
        if not wanted:
            raise falcon.HTTPNotFound  # routers are lenient, with `//status` for one; this is not
        if not all(token.allows(*each) for each in wanted):
            raise falcon.HTTPForbidden(title="Not allowed", description="The token does not allow this.")

    def _token_of(self, request: falcon.Request) -> Token:
        secret = _secret(request.env.get("HTTP_AUTHORIZATION", ""))
        token = None if secret is None else find(self._file.tokens, secret)
        if token is None:
            raise falcon.HTTPUnauthorized(
                title="No token" if secret is None else "Wrong token",
                description="This server wants a token: Authorization: Bearer TOKEN",
                challenges=_CHALLENGES,
            )
        return token

    def _wanted(self, path: bytes) -> list[tuple[bytes, bytes]]:
        """What a token has to allow for a path, all of it; nothing for a path that leads nowhere."""
        if path in _VIEW_PATHS:
            return [(VIEWS.encode(), b"")]
        first, *rest = path.removeprefix(b"/").split(b"/", 2)
        if first == b"v1":
            return [(rest[0], rest[1])] if len(rest) == 2 else []
        if b"," not in first:
            return []
        wanted = [(SIMULATED.encode(), b"")]
        try:
            disk, _, file = parse(path.removeprefix(b"/")).path.partition(b"/")
        except BadInput:
            return wanted
        return [*wanted, (disk, file)] if disk in self._disks else wanted


def _secret(header: str) -> bytes | None:
    """The token in a header: as it is, or, because browsers ask their users for nothing else, as Basic's password."""
    scheme, _, value = header.partition(" ")
    secret = value.strip().encode("latin-1")
    if scheme.lower() == "basic":
        try:
            secret = b64decode(secret, validate=True).partition(b":")[2]
        except ValueError:
            return None
    elif scheme.lower() != "bearer":
        return None
    return secret or None


def opened(settings: config.ServerConfig, disks: Collection[str]) -> Access | None:
    """The middleware that a configuration wants, its file being watched; None for none.

    Raises:
        ConfigError: The file of tokens is wrong.
    """
    if settings.tokens is None:
        return None
    file = TokenFile(Path(settings.tokens))
    file.watch()
    return Access(file, disks)
