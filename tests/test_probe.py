"""The probe: asks the device, whatever is below the root, and knows when the root is not the root any more."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from diskread import probe as probe_module
from diskread.probe import BLOCK, DEEPEST, MOST_ENTRIES, RootLost, probe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")


@pytest.fixture
def tmp(tmp_path: Path) -> bytes:
    directory = tmp_path / "disk"
    directory.mkdir()
    return os.fsencode(directory)


def put(root: bytes, path: bytes, content: bytes = b"x" * 10_000) -> bytes:
    """Make a file, down to the device."""
    full = os.path.join(root, path)
    os.makedirs(os.path.dirname(full), exist_ok=True)
    with open(full, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return path


def device_of(path: bytes) -> int:
    return os.stat(path).st_dev


def bytes_from_devices() -> int:
    """Bytes that this thread has had fetched from block devices, which cached reads do not count towards: proc(5)."""
    with open("/proc/thread-self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes:"))


@pytest.fixture
def no_direct(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A file system without O_DIRECT."""
    refused: list[int] = []
    real = os.open

    def without(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            refused.append(flags)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", without)
    return refused


def on_a_block_device(path: bytes) -> bool:
    return os.path.exists(f"/sys/dev/block/{os.major(device_of(path))}:{os.minor(device_of(path))}")


# -- asking the device -------------------------------------------------------------------------------------------------


def test_it_finds_a_file_and_reads_it(tmp: bytes) -> None:
    put(tmp, b"file")
    findings = probe(tmp, None, None)
    assert (findings.device, findings.sample) == (device_of(tmp), b"file")
    assert probe(tmp, findings.device, findings.sample) == findings


def test_it_asks_the_device_although_the_page_cache_knows(tmp: bytes) -> None:
    if not on_a_block_device(tmp):
        pytest.skip("the directory for temporary files is not on a block device")
    put(tmp, b"file")
    with open(os.path.join(tmp, b"file"), "rb") as file:
        file.read()
        before = bytes_from_devices()
        file.seek(0)
        file.read()
    assert bytes_from_devices() == before, "it is in the page cache"
    findings = probe(tmp, None, b"file")
    assert findings.direct
    assert bytes_from_devices() - before >= BLOCK


def test_it_asks_the_device_without_o_direct_too(tmp: bytes, no_direct: list[int]) -> None:
    if not on_a_block_device(tmp):
        pytest.skip("the directory for temporary files is not on a block device")
    put(tmp, b"file", b"x" * BLOCK)
    with open(os.path.join(tmp, b"file"), "rb") as file:
        file.read()
    before = bytes_from_devices()
    findings = probe(tmp, None, b"file")
    assert no_direct
    assert not findings.direct
    assert bytes_from_devices() - before >= BLOCK


def test_it_reads_at_different_places(tmp: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp, b"file", b"x" * (64 * BLOCK + 100))
    offsets = set()
    real = os.preadv

    def note(descriptor: int, buffers: list[Any], offset: int) -> int:
        offsets.add(offset)
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", note)
    for _ in range(40):
        probe(tmp, None, b"file")
    assert len(offsets) > 5
    assert all(offset % BLOCK == 0 and 0 <= offset < 64 * BLOCK for offset in offsets)


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_a_file_of_any_size_will_do(tmp: bytes, size: int) -> None:
    put(tmp, b"file", b"x" * size)
    assert probe(tmp, None, b"file").sample == b"file"


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no /dev/shm")
def test_a_file_system_in_memory() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        root = os.fsencode(directory)
        put(root, b"file")
        assert probe(root, None, None).sample == b"file"  # tmpfs has O_DIRECT since Linux 6.6 only


@as_root
def test_an_overlay(tmp_path: Path, mounts: Callable[..., None]) -> None:
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    (tmp_path / "lower" / "file").write_bytes(b"x" * 10_000)
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    mounts("-t", "overlay", "-o", options, "overlay", tmp_path / "merged")
    root = os.fsencode(tmp_path / "merged")
    findings = probe(root, None, None)
    assert (findings.device, findings.sample) == (device_of(root), b"file")


def test_an_error_of_the_device_passes_through(tmp: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp, b"file")

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    for sample in (b"file", None):
        with pytest.raises(OSError, match="Input/output error") as caught:
            probe(tmp, None, sample)
        assert not isinstance(caught.value, RootLost)


# -- finding a file ----------------------------------------------------------------------------------------------------


def test_no_files_at_all(tmp: bytes) -> None:
    findings = probe(tmp, None, None)
    assert (findings.sample, findings.direct) == (None, False)


@pytest.mark.parametrize("replacement", ["nothing", "directory", "symlink", "fifo", "socket", "empty", "no directory"])
def test_a_sample_that_is_no_file_any_more_is_replaced(tmp: bytes, replacement: str) -> None:
    put(tmp, b"other")
    path = os.path.join(tmp, b"gone")
    if replacement == "directory":
        os.mkdir(path)
    elif replacement == "symlink":
        os.symlink(b"other", path)
    elif replacement == "fifo":
        os.mkfifo(path)
    elif replacement == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path)
    elif replacement == "empty":
        put(tmp, b"gone", b"")
    elif replacement == "no directory":
        assert probe(tmp, None, b"other/gone").sample == b"other"
    assert probe(tmp, None, b"gone").sample == b"other"


def test_what_is_no_file_is_neither_followed_nor_waited_for(tmp: bytes, tmp_path: Path) -> None:
    outside = put(os.fsencode(tmp_path), b"outside/file")
    os.mkfifo(os.path.join(tmp, b"fifo"))
    os.symlink(os.path.join(os.fsencode(tmp_path), outside), os.path.join(tmp, b"file-link"))
    os.symlink(os.path.join(os.fsencode(tmp_path), b"outside"), os.path.join(tmp, b"directory-link"))
    os.symlink(b".", os.path.join(tmp, b"loop"))
    put(tmp, b"empty", b"")
    assert probe(tmp, None, None).sample is None
    put(tmp, b"directory/file")
    assert probe(tmp, None, None).sample == b"directory/file"


@pytest.mark.parametrize(("levels", "found"), [(0, True), (1, True), (DEEPEST - 1, True), (DEEPEST, False)])
def test_files_are_found_some_levels_deep(tmp: bytes, levels: int, found: bool) -> None:
    path = put(tmp, b"d/" * levels + b"file")
    assert probe(tmp, None, None).sample == (path if found else None)


def test_a_disk_with_very_many_directories_has_a_file_within_reach(tmp: bytes) -> None:
    for each in range(MOST_ENTRIES * 2):
        put(tmp, b"objects/%d/abc/file" % each, b"x")
    sample = probe(tmp, None, None).sample
    assert sample is not None
    assert sample.startswith(b"objects/")


def test_a_search_comes_to_an_end(tmp: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in range(MOST_ENTRIES * 2):
        put(tmp, b"%d/empty" % each, b"")
    looked_at = []
    real = os.stat

    def note(*args: Any, **kwargs: Any) -> os.stat_result:
        looked_at.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(os, "stat", note)
    assert probe(tmp, None, None).sample is None
    assert 0 < len(looked_at) <= MOST_ENTRIES


def test_names_that_are_no_text(tmp: bytes) -> None:
    path = put(tmp, b"\xff\xfe/\xe4\n")
    assert probe(tmp, None, None).sample == path
    assert probe(tmp, None, path).sample == path


UNPRIVILEGED = """
import os, sys
from diskread.probe import probe
os.setgid(65534); os.setuid(65534)
print(probe(os.fsencode(sys.argv[1]), None, None).sample)
"""


@pytest.fixture
def public() -> Iterator[bytes]:
    """A root that others can reach: tmp_path is closed to them."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield os.fsencode(directory)


def sample_of_nobody(root: bytes) -> str:
    """What a probe finds that runs without privileges."""
    command = [sys.executable, "-c", UNPRIVILEGED, os.fsdecode(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr == ""
    return done.stdout.strip()


@as_root
def test_what_may_not_be_read_is_passed_over(public: bytes) -> None:
    for each in range(20):
        put(public, b"lost+found-%d/file" % each)
        os.chmod(os.path.join(public, b"lost+found-%d" % each), 0o700)
        put(public, b"secret-%d" % each)
        os.chmod(os.path.join(public, b"secret-%d" % each), 0o600)
    assert sample_of_nobody(public) == "None"
    put(public, b"open/file")
    assert sample_of_nobody(public) == "b'open/file'"


@as_root
def test_a_root_that_may_be_searched_but_not_listed_is_not_lost(public: bytes) -> None:
    put(public, b"file")
    os.chmod(public, 0o711)
    assert sample_of_nobody(public) == "None"


# -- the root ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "code"), [("missing", errno.ENOENT), ("file", errno.ENOTDIR), ("fifo", errno.ENOTDIR)]
)
def test_a_root_that_is_no_directory_is_lost(tmp: bytes, kind: str, code: int) -> None:
    root = os.path.join(tmp, b"root")
    if kind == "file":
        put(tmp, b"root")
    elif kind == "fifo":
        os.mkfifo(root)
    with pytest.raises(RootLost) as caught:
        probe(root, None, None)
    assert caught.value.errno == code


def test_a_root_may_be_a_symbolic_link(tmp: bytes) -> None:
    put(tmp, b"file")
    os.symlink(tmp, tmp + b"-link")
    assert probe(tmp + b"-link", device_of(tmp), None).sample == b"file"


def test_a_root_on_another_device_is_lost(tmp: bytes) -> None:
    put(tmp, b"file")
    with pytest.raises(RootLost, match="unmounted") as caught:
        probe(tmp, device_of(tmp) + 1, b"file")
    assert caught.value.errno == errno.ESTALE


@pytest.mark.parametrize("code", probe_module.OUT_OF_RESOURCES)
def test_a_process_without_descriptors_has_not_lost_the_root(
    tmp: bytes, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*_args: object, **_more: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        probe(tmp, None, None)
    assert not isinstance(caught.value, RootLost)


@pytest.fixture
def mounts() -> Iterator[Callable[..., None]]:
    """Mount what is asked for; skip where that is not allowed; unmount it after the test."""
    points: list[Path] = []

    def mount(*arguments: object) -> None:
        done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mount: {done.stderr.strip()}")
        points.append(Path(str(arguments[-1])))

    yield mount
    for point in reversed(points):
        if os.path.ismount(point):
            subprocess.run(["umount", str(point)], check=True)


@as_root
def test_an_empty_mount_point_is_no_empty_disk(tmp: bytes, mounts: Callable[..., None]) -> None:
    point = Path(os.fsdecode(tmp))
    mounts("-t", "tmpfs", "none", point)
    put(tmp, b"file")
    findings = probe(tmp, None, None)
    assert findings.sample == b"file"
    subprocess.run(["umount", str(point)], check=True)
    for sample in (findings.sample, None):
        with pytest.raises(RootLost, match="unmounted"):
            probe(tmp, findings.device, sample)


@as_root
def test_other_devices_below_the_root_are_not_asked(tmp: bytes, mounts: Callable[..., None]) -> None:
    nested = Path(os.fsdecode(tmp)) / "nested"
    nested.mkdir()
    mounts("-t", "tmpfs", "none", nested)
    put(tmp, b"nested/file")
    assert probe(tmp, None, None).sample is None
