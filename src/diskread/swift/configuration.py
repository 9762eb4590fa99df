"""The settings of diskread in the configuration of a server: diskread_threads, diskread_deadline, ..."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ..limits import Limits

if TYPE_CHECKING:
    from collections.abc import Mapping

PREFIX = "diskread_"

DEADLINE = 5.0
"""Seconds. The proxy waits 10 for an object server (node_timeout); it has to have the time to ask another one."""

HASH_DEADLINE = 60.0
"""Seconds. What replicators and reconstructors wait for an answer (http_timeout)."""

READ_SIZE = 1 << 20

METADATA_CACHE = 500
"""Objects per device; each takes one to two kilobytes."""


@dataclass(frozen=True)
class Settings:
    """The settings of one server.

    Args:
        limits: Those of each of its devices.
        hash_deadline: Seconds that hashing the suffixes of a partition may take (REPLICATE).
        read_size: Bytes that a worker reads at a time from a file that is not in the page cache.
        metadata_cache: Objects of a device that are remembered at most; 0: none.
    """

    limits: Limits
    hash_deadline: float = HASH_DEADLINE
    read_size: int = READ_SIZE
    metadata_cache: int = METADATA_CACHE


def read_settings(conf: Mapping[str, str]) -> Settings:
    """Take diskread's settings from a server's configuration.

    Args:
        conf: All of the configuration; keys that do not begin with "diskread_" are for others.

    Raises:
        ValueError: A key that there is none of, or a value that cannot be; it says which.
    """
    given = {key[len(PREFIX) :]: value for key, value in conf.items() if key.startswith(PREFIX)}
    kinds = {field.name: type(getattr(Limits(), field.name)) for field in fields(Limits)}
    own = {"hash_deadline": float, "read_size": int, "metadata_cache": int}
    unknown = sorted(set(given) - set(kinds) - set(own))
    if unknown:
        known = ", ".join(sorted(PREFIX + name for name in {**kinds, **own}))
        raise ValueError(f"there is no setting {', '.join(PREFIX + name for name in unknown)}; there are {known}")
    values = {name: _converted(name, text, {**kinds, **own}[name]) for name, text in given.items()}
    others = {name: values.pop(name) for name in own if name in values}
    values.setdefault("deadline", DEADLINE)
    try:
        settings = Settings(Limits(**values), **others)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{PREFIX}{error}") from None
    if not settings.hash_deadline > 0:
        raise ValueError(f"{PREFIX}hash_deadline must be a positive number of seconds, not {settings.hash_deadline}")
    if not 4096 <= settings.read_size <= 1 << 26:
        raise ValueError(f"{PREFIX}read_size must be between 4096 and {1 << 26} bytes, not {settings.read_size}")
    if not 0 <= settings.metadata_cache <= 10**6:
        raise ValueError(f"{PREFIX}metadata_cache must be between 0 and {10**6} objects, not {settings.metadata_cache}")
    return settings


def _converted(name: str, text: str, kind: type) -> Any:
    try:
        value = kind(text)
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        raise ValueError(f"{PREFIX}{name} must be {expected}, not {text!r}") from None
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{PREFIX}{name} must be a number, not {text!r}")
    return value
