"""Disk reads that cannot hang a gevent program: slots per disk, deadlines, honest errors."""

try:
    from . import _syscalls as _syscalls
except ImportError as error:
    raise ImportError(
        f"the compiled part of diskread cannot be loaded ({error}). In a source tree, build it with "
        "'pip install -e .' (this needs a C compiler and the Python headers), or run from another folder to use the "
        "installed package."
    ) from error

from .descriptor import Descriptor
from .disk import CHUNK, FIRST_CHUNK, Counts, Disk, DiskFile, DiskStatus, FileStat, StallTimes
from .disks import Disks
from .errors import (
    DiskBusy,
    DiskError,
    DiskFileChanged,
    DiskFileForbidden,
    DiskFileNotFound,
    DiskFileNotRegular,
    DiskIOError,
    DiskOffline,
    DiskPathInvalid,
    DiskTimeout,
)
from .health import State
from .hedging import MirrorCounts
from .limits import Limits
from .mirror import Mirror, MirrorFile, MirrorStat, MirrorStatus
from .workers import Load

__all__ = [
    "CHUNK",
    "FIRST_CHUNK",
    "Counts",
    "Descriptor",
    "Disk",
    "DiskBusy",
    "DiskError",
    "DiskFile",
    "DiskFileChanged",
    "DiskFileForbidden",
    "DiskFileNotFound",
    "DiskFileNotRegular",
    "DiskIOError",
    "DiskOffline",
    "DiskPathInvalid",
    "DiskStatus",
    "DiskTimeout",
    "Disks",
    "FileStat",
    "Limits",
    "Load",
    "Mirror",
    "MirrorCounts",
    "MirrorFile",
    "MirrorStat",
    "MirrorStatus",
    "StallTimes",
    "State",
]
