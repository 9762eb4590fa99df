"""An ext4 of one's own, where the file system at hand is not the one to measure."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def ext4(mebibytes: int, directory: Path | None = None) -> Iterator[Path]:
    """Make and mount an empty ext4 in an image on a loop device. Needs root.

    Args:
        mebibytes: Size of the image, which is sparse.
        directory: Where the image is put.

    Yields:
        Where it is mounted.

    Raises:
        RuntimeError: It cannot be made; the message says why.
    """
    with tempfile.TemporaryDirectory(dir=directory) as place, contextlib.ExitStack() as stack:
        image, root = Path(place) / "image", Path(place) / "root"
        root.mkdir()
        with image.open("wb") as file:
            file.truncate(mebibytes << 20)
        _run("mkfs.ext4", "-q", "-F", "-m", "0", str(image))
        _run("mount", "-o", "loop,noatime", str(image), str(root))
        stack.callback(_run, "umount", str(root))
        yield root


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr.strip() or done.returncode}")
