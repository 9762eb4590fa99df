"""Checks the zip archives of several disks at once; a disk that hangs keeps nobody but its own greenlet waiting.

python examples/gevent_application.py /srv/a /srv/b
"""

from __future__ import annotations

import io
import os
import sys
import zipfile

import gevent

from diskread import CHUNK, Disk, DiskError, Limits


def check(disk: Disk, name: str) -> str:
    """Read an archive from one end to the other."""
    try:
        with io.BufferedReader(disk.open(name).as_io(), CHUNK) as stream, zipfile.ZipFile(stream) as archive:
            damaged = archive.testzip()
    except DiskError as error:
        return f"not checked: {error}"
    except zipfile.BadZipFile as error:
        # While it looks for the archive's directory, zipfile takes any OSError for a defect of the archive.
        if isinstance(error.__context__, DiskError):
            return f"not checked: {error.__context__}"
        return f"damaged: {error}"
    return "sound" if damaged is None else f"damaged: {damaged}"


def check_all(disk: Disk) -> None:
    """Check the archives in the root of a disk."""
    try:
        names = disk.run(os.listdir, disk.root)  # any blocking call gets the same protection
    except OSError as error:
        print(f"{disk.name}: not checked: {error}", flush=True)
        return
    for name in sorted(names):
        if name.endswith(".zip"):
            print(f"{disk.name}/{name}: {check(disk, name)}", flush=True)


def main() -> None:
    """Give each directory that the command line names a disk and a greenlet of its own."""
    disks = [Disk(root, root, Limits(threads=4, deadline=5.0)) for root in sys.argv[1:]]
    gevent.joinall([gevent.spawn(check_all, disk) for disk in disks], raise_error=True)


if __name__ == "__main__":
    main()
