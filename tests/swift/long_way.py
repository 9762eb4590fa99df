"""diskread's managers without what spares them calls of Python's functions, for tests that put others in their place.

Swift's tests exchange `os.listdir`, `open` and the like, and count the reads of a file by Swift's own sizes. Managers
that do in C, and in larger pieces, what Swift does in Python come to something else then.
"""

from __future__ import annotations

from diskread.swift import files, managers
from diskread.swift.managers import (
    DiskFile,
    DiskFileManager,
    DiskFileReader,
    DiskFileWriter,
    ECDiskFile,
    ECDiskFileManager,
    ECDiskFileReader,
    ECDiskFileWriter,
)

__all__ = [
    "DiskFile",
    "DiskFileManager",
    "DiskFileReader",
    "DiskFileWriter",
    "ECDiskFile",
    "ECDiskFileManager",
    "ECDiskFileReader",
    "ECDiskFileWriter",
]

vars(files)["open_object"] = lambda *_: None
files.FileMixin._first = 0
managers.CHUNK_SIZE = 1 << 16
