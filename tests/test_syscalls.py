"""The extension: one visit to the disk, and the plain functions."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from diskread._syscalls import CloseMode, Job, Step, pread, pread_holding_gil, stall, stall_holding_gil

from .conftest import LARGE, SMALL, descriptors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
quick = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

NO_SUCH_DESCRIPTOR = 1_000_000
MORE_THAN_ANY_MEMORY = 2**50  # bytes; more than the address space of a process


def visit(root: Path | str, path: str | bytes, **options: Any) -> Job:
    """Make a visit on this very thread."""
    job = Job(root=os.fsencode(root), path=os.fsencode(path), **options)
    job.run()
    return job


def take_both(job: Job) -> None:
    """Close what a Job left to its caller."""
    for descriptor in (job.take_descriptor(), job.take_root()):
        if descriptor >= 0:
            os.close(descriptor)


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


@pytest.fixture
def descriptor(root: Path) -> Iterator[int]:
    """The small file, open."""
    opened = os.open(root / "small", os.O_RDONLY)
    yield opened
    if is_open(opened):
        os.close(opened)


@pytest.fixture
def stdin_survives() -> Iterator[None]:
    """Check that nothing closed descriptor 0, and open it again if something did: other tests need it."""
    copy = os.dup(0)
    yield
    closed = not is_open(0)
    if closed:
        os.dup2(copy, 0)
    os.close(copy)
    assert not closed, "descriptor 0, which is nobody's business here, was closed"


# -- a whole visit ----------------------------------------------------------------------------------------------------


def test_a_visit_opens_stats_reads_and_closes(root: Path) -> None:
    before = time.monotonic_ns()
    job = Job(root=os.fsencode(root), path=b"small", size=10_000)
    assert (job.finished, job.abandoned) == (False, False)
    assert (job.started_ns, job.finished_ns, job.stat, job.take_data()) == (0, 0, None, b"")
    job.run()
    assert (job.finished, job.abandoned) == (True, False)
    assert (job.error, job.step, job.close_error) == (0, Step.STEP_NONE, 0)
    found = (root / "small").stat()
    assert job.stat == (found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev)
    assert job.count == len(SMALL)
    assert before <= job.started_ns <= job.finished_ns <= time.monotonic_ns()
    assert job.take_descriptor() == -1
    assert job.take_data() == SMALL
    assert job.take_data() == b"", "data is handed over once"


@quick
@given(
    offset=st.integers(0, len(LARGE) + 10),
    size=st.integers(0, len(LARGE) + 10),
)
@example(offset=0, size=len(LARGE))
@example(offset=len(LARGE) - 1, size=1)
@example(offset=len(LARGE), size=1)
@example(offset=len(LARGE) - 1, size=2)
@example(offset=2**63 - 1, size=0)
@example(offset=0, size=0)
def test_any_range_is_what_the_file_has_there(root: Path, offset: int, size: int) -> None:
    wanted = LARGE[offset : offset + size]
    job = visit(root, "large", offset=offset, size=size)
    assert (job.error, job.count, job.take_data()) == (0, len(wanted), wanted)
    opened = os.open(root / "large", os.O_RDONLY)
    try:
        assert pread(opened, size, offset) == wanted
        assert pread_holding_gil(opened, size, offset) == wanted
    finally:
        os.close(opened)


def test_far_behind_the_end_there_is_nothing(root: Path) -> None:
    job = visit(root, "small", offset=2**62, size=4096)
    assert job.take_data() == b""
    assert job.error in (0, errno.EINVAL), "some file systems refuse offsets that they could never store"


def test_a_job_without_anything_to_do_does_nothing() -> None:
    job = Job()
    job.run()
    assert (job.error, job.finished, job.stat, job.take_data()) == (0, True, None, b"")
    assert (job.take_descriptor(), job.take_root()) == (-1, -1)


def test_a_job_runs_once(root: Path) -> None:
    job = visit(root, "small")
    with pytest.raises(RuntimeError, match="once"):
        job.run()


def test_only_one_of_many_threads_runs_a_job(root: Path) -> None:
    job = Job(root=os.fsencode(root), path=b"small", size=100, stall_ns=50_000_000)
    start, outcomes = threading.Barrier(8), []

    def contend() -> None:
        start.wait()
        try:
            job.run()
            outcomes.append("ran")
        except RuntimeError:
            outcomes.append("refused")

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["ran"] + ["refused"] * 7
    assert job.take_data() == SMALL[:100]


def test_parameters_are_keywords_and_the_class_is_final() -> None:
    with pytest.raises(TypeError):
        Job(b"/", -1)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        type("Child", (Job,), {})


# -- refusals before the visit ----------------------------------------------------------------------------------------


BAD_NUMBERS = [-1, -(2**70), 2**63, 2**64, 2**100, 1.5, 0.0, float("nan"), float("inf"), "1", b"1", None, [], object()]


@pytest.mark.usefixtures("stdin_survives")
@pytest.mark.parametrize("name", ["offset", "size", "stall_ns"])
@pytest.mark.parametrize("value", BAD_NUMBERS, ids=repr)
def test_a_job_refuses_bad_numbers(descriptor: int, name: str, value: Any) -> None:
    # __dealloc__ runs for a Job that was refused, too, and finds all zeros: it must not close descriptor 0.
    with pytest.raises((ValueError, TypeError)):
        Job(descriptor=descriptor, borrowed=True, **{name: value})


@pytest.mark.parametrize("function", [pread, pread_holding_gil])
@pytest.mark.parametrize("value", BAD_NUMBERS, ids=repr)
def test_pread_refuses_bad_numbers(descriptor: int, function: Callable[[int, Any, Any], bytes], value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        function(descriptor, value, 0)
    with pytest.raises((ValueError, TypeError)):
        function(descriptor, 1, value)


@pytest.mark.parametrize("function", [stall, stall_holding_gil])
@pytest.mark.parametrize("value", [-1, -0.001, 1e10, 2**64, float("nan"), float("inf"), "1", None])
def test_stall_refuses_bad_numbers(function: Callable[[Any], None], value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        function(value)


@pytest.mark.usefixtures("stdin_survives")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"path": b"a"}, "root"),
        ({"path": b"a\0b", "root": b"/"}, "NUL"),
        ({"root": b"/\0"}, "NUL"),
        ({"path": b"a", "root": b"/", "descriptor": 5}, "not both"),
        ({"size": 1}, "path or a descriptor"),
        ({"descriptor": 0, "borrowed": True, "close_mode": 3}, "close_mode"),
        ({"descriptor": 0, "borrowed": True, "offset": 2**63 - 1, "size": 1}, "size"),
    ],
    ids=str,
)
def test_a_job_refuses_what_makes_no_sense(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Job(**options)


@pytest.mark.usefixtures("stdin_survives")
@pytest.mark.parametrize("options", [{"path": "text"}, {"root": "text"}, {"close_mode": "x"}, {"descriptor": None}])
def test_a_job_refuses_wrong_types(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        Job(**options)


def test_a_stall_of_no_time_returns_at_once() -> None:
    stall(0)
    stall_holding_gil(0)


# -- errors are values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "step", "error"),
    [
        (b"missing", Step.STEP_OPEN, errno.ENOENT),
        (b"missing/deeper", Step.STEP_OPEN, errno.ENOENT),
        (b"small/deeper", Step.STEP_OPEN, errno.ENOTDIR),
        (b"", Step.STEP_OPEN, errno.ENOENT),
        (b"directory", Step.STEP_TYPE, errno.EISDIR),
        (b".", Step.STEP_TYPE, errno.EISDIR),
        (b"n" * 300, Step.STEP_OPEN, errno.ENAMETOOLONG),
        (b"p/" * 2500, Step.STEP_OPEN, errno.ENAMETOOLONG),
        (b"..", Step.STEP_OPEN, errno.EXDEV),
        (b"../root/small", Step.STEP_OPEN, errno.EXDEV),
        (b"directory/../../root/small", Step.STEP_OPEN, errno.EXDEV),
        (b"/etc/passwd", Step.STEP_OPEN, errno.EXDEV),
    ],
)
def test_an_unusable_path_is_an_errno(root: Path, path: bytes, step: Step, error: int) -> None:
    job = visit(root, path, size=10)
    assert (job.step, job.error) == (step, error)
    assert job.finished
    assert (job.count, job.take_data(), job.take_descriptor()) == (0, b"", -1)


@pytest.mark.parametrize(("name", "error"), [("missing", errno.ENOENT), ("small", errno.ENOTDIR)])
def test_a_root_that_is_none_is_an_errno(root: Path, name: str, error: int) -> None:
    job = visit(root / name, "small", size=10)
    assert (job.step, job.error, job.take_root()) == (Step.STEP_ROOT, error, -1)


def test_descriptors_that_are_not_open() -> None:
    job = Job(descriptor=NO_SUCH_DESCRIPTOR, size=10)
    job.run()
    assert (job.step, job.error, job.close_error) == (Step.STEP_READ, errno.EBADF, errno.EBADF)
    job = Job(root_fd=NO_SUCH_DESCRIPTOR, path=b"small", size=10)
    job.run()
    assert (job.step, job.error) == (Step.STEP_OPEN, errno.EBADF)
    for function in (pread, pread_holding_gil):
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            function(NO_SUCH_DESCRIPTOR, 10, 0)
        assert caught.value.errno == errno.EBADF


def test_a_directory_and_a_pipe_cannot_be_read_by_descriptor(root: Path) -> None:
    opened = os.open(root, os.O_RDONLY)
    job = Job(descriptor=opened, size=10)
    job.run()
    assert (job.step, job.error) == (Step.STEP_READ, errno.EISDIR)
    assert not is_open(opened)
    reader, writer = os.pipe()
    os.close(writer)
    job = Job(descriptor=reader, size=10)
    job.run()
    assert (job.step, job.error) == (Step.STEP_READ, errno.ESPIPE)
    assert not is_open(reader)


def test_without_descriptors_left_the_errno_says_so(root: Path, descriptor: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        job = visit(root, "small", size=10)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (job.step, job.error) == (Step.STEP_ROOT, errno.EMFILE)


@pytest.mark.parametrize("size", [MORE_THAN_ANY_MEMORY, 2**62, 2**63 - 100, 2**63 - 1])
@pytest.mark.parametrize("borrowed", [True, False])
def test_no_memory_is_an_errno(descriptor: int, size: int, borrowed: bool) -> None:
    # Above PY_SSIZE_T_MAX - 33 PyBytes_FromStringAndSize raises OverflowError instead of MemoryError.
    job = Job(descriptor=descriptor, size=size, borrowed=borrowed)
    job.run()
    assert (job.step, job.error, job.finished) == (Step.STEP_MEMORY, errno.ENOMEM, True)
    assert (job.count, job.take_data()) == (0, b"")
    assert is_open(descriptor) == borrowed


@pytest.mark.parametrize("size", [MORE_THAN_ANY_MEMORY, 2**62, 2**63 - 100, 2**63 - 1])
@pytest.mark.parametrize("function", [pread, pread_holding_gil])
def test_no_memory_for_pread(descriptor: int, size: int, function: Callable[[int, int, int], bytes]) -> None:
    with pytest.raises((MemoryError, ValueError)):
        function(descriptor, size, 0)


# -- what is not a regular file, and what is not inside the root ------------------------------------------------------


def test_a_fifo_is_refused_and_not_waited_for(root: Path) -> None:
    os.mkfifo(root / "fifo")
    job = visit(root, "fifo", size=10)
    assert (job.step, job.error) == (Step.STEP_TYPE, errno.EINVAL)
    assert job.finished_ns - job.started_ns < 10e9


def test_a_fifo_with_a_writer_keeps_its_data(root: Path) -> None:
    os.mkfifo(root / "fifo")
    reader = os.open(root / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(root / "fifo", os.O_WRONLY)
    os.write(writer, b"not for you")
    job = visit(root, "fifo", size=10)
    assert (job.step, job.error, job.take_data()) == (Step.STEP_TYPE, errno.EINVAL, b"")
    assert os.read(reader, 100) == b"not for you"
    os.close(reader)
    os.close(writer)


def test_a_socket_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        job = visit(root, "socket", size=10)
    assert (job.step, job.error) == (Step.STEP_OPEN, errno.ENXIO)


@needs_root
def test_a_device_node_is_refused(root: Path) -> None:
    try:
        os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("device nodes cannot be made here")
    job = visit(root, "null", size=10)
    assert (job.step, job.error) in [(Step.STEP_TYPE, errno.EINVAL), (Step.STEP_OPEN, errno.EACCES)]  # mount -o nodev


@pytest.mark.parametrize("target", ["small", "directory/../small", "./small", "other"])
def test_symbolic_links_inside_the_root_are_followed(root: Path, target: str) -> None:
    (root / "other").symlink_to("small")
    (root / "link").symlink_to(target)
    assert visit(root, "link", size=10).take_data() == SMALL[:10]


def test_a_link_in_the_middle_and_dots_that_stay_inside(root: Path) -> None:
    (root / "directory" / "up").symlink_to("..")
    assert visit(root, "directory/up/small", size=10).take_data() == SMALL[:10]
    assert visit(root, "directory/../small", size=10).take_data() == SMALL[:10]


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("../secret", errno.EXDEV),
        ("{root}/small", errno.EXDEV),
        ("/etc/passwd", errno.EXDEV),
        ("/proc/self/root/etc/passwd", errno.EXDEV),
        ("directory/../../secret", errno.EXDEV),
        ("link", errno.ELOOP),
        ("missing", errno.ENOENT),
    ],
)
def test_symbolic_links_do_not_lead_out(root: Path, target: str, error: int) -> None:
    (root.parent / "secret").write_bytes(b"secret")
    (root / "link").symlink_to(target.format(root=root))
    job = visit(root, "link", size=10)
    assert (job.step, job.error, job.take_data()) == (Step.STEP_OPEN, error, b"")


@pytest.mark.parametrize("path", ["self/root/etc/passwd", "self/cwd/pyproject.toml", "self/exe", "self/fd/0"])
def test_magic_links_are_refused(path: str) -> None:
    job = visit("/proc", path, size=10)
    assert (job.step, job.error) == (Step.STEP_OPEN, errno.ELOOP)


@needs_root
@pytest.mark.parametrize("how", [["-t", "tmpfs", "none"], ["--bind", "{root}/directory"]], ids=["tmpfs", "bind"])
def test_a_nested_mount_is_refused(root: Path, how: list[str]) -> None:
    (root / "nested").mkdir()
    options = [each.format(root=root) for each in how]
    mounted = subprocess.run(["mount", *options, str(root / "nested")], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount here: {mounted.stderr.decode()}")
    try:
        (root / "nested" / "file").write_bytes(b"another device")
        job = visit(root, "nested/file", size=10)
        assert (job.step, job.error) == (Step.STEP_OPEN, errno.EXDEV)
        assert visit(root / "nested", "file", size=10).take_data() == b"another de"
    finally:
        subprocess.run(["umount", str(root / "nested")], check=True)
    assert visit(root, "directory/inner", size=10).take_data() == b"inner"


def test_names_are_bytes(root: Path) -> None:
    name = b"\xff\xfe not utf-8 \n"
    Path(os.fsdecode(os.fsencode(root) + b"/" + name)).write_bytes(b"found")
    assert visit(root, name, size=10).take_data() == b"found"


def test_the_root_may_be_a_symbolic_link_or_a_descriptor(root: Path) -> None:
    (root.parent / "link").symlink_to(root)
    assert visit(root.parent / "link", "small", size=10).take_data() == SMALL[:10]
    opened = os.open(root, os.O_PATH | os.O_DIRECTORY)
    job = Job(root=b"/nowhere", root_fd=opened, path=b"small", size=10)
    job.run()
    assert (job.take_data(), job.take_root()) == (SMALL[:10], -1)
    assert is_open(opened)
    os.close(opened)


def test_the_file_may_disappear_under_an_open_root(root: Path) -> None:
    job = visit(root, "small", size=10)
    opened = job.take_root()
    assert job.take_root() == -1, "handed over once"
    root.rename(root.parent / "moved")
    again = Job(root_fd=opened, path=b"small", size=10)
    again.run()
    assert again.take_data() == SMALL[:10]
    os.close(opened)


# -- who closes what --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "offset", "size", "stays_open"),
    [
        (CloseMode.CLOSE_ALWAYS, 0, 10, False),
        (CloseMode.CLOSE_ALWAYS, 0, 2000, False),
        (CloseMode.CLOSE_AT_EOF, 0, 1023, True),
        (CloseMode.CLOSE_AT_EOF, 0, 1024, False),
        (CloseMode.CLOSE_AT_EOF, 0, 1025, False),
        (CloseMode.CLOSE_AT_EOF, 1000, 24, False),
        (CloseMode.CLOSE_AT_EOF, 1000, 23, True),
        (CloseMode.CLOSE_AT_EOF, 5000, 10, False),
        (CloseMode.CLOSE_AT_EOF, 0, 0, True),
        (CloseMode.CLOSE_NEVER, 0, 10, True),
        (CloseMode.CLOSE_NEVER, 0, 2000, True),
        (CloseMode.CLOSE_NEVER, 0, 0, True),
    ],
)
def test_close_modes(root: Path, mode: CloseMode, offset: int, size: int, stays_open: bool) -> None:
    job = visit(root, "small", offset=offset, size=size, close_mode=mode)
    assert job.take_data() == SMALL[offset : offset + size]
    opened = job.take_descriptor()
    assert (opened >= 0) == stays_open
    assert job.take_descriptor() == -1, "handed over once"
    if stays_open:
        assert os.path.sameopenfile(opened, opened)
        assert os.fstat(opened).st_size == len(SMALL)
        assert not os.get_inheritable(opened)
        os.close(opened)


@pytest.mark.parametrize("mode", list(CloseMode))
@pytest.mark.parametrize("path", [b"directory", b"missing"])
def test_a_failed_visit_closes_in_every_mode(root: Path, mode: CloseMode, path: bytes) -> None:
    job = visit(root, path, size=10, close_mode=mode)
    assert job.error
    assert job.take_descriptor() == -1
    assert str(root / "directory") not in descriptors().values()


def test_a_given_descriptor_is_closed(descriptor: int) -> None:
    job = Job(descriptor=descriptor, size=10)
    job.run()
    assert job.take_data() == SMALL[:10]
    assert not is_open(descriptor)
    assert job.take_descriptor() == -1


def test_a_given_descriptor_stays_open_on_request(descriptor: int) -> None:
    job = Job(descriptor=descriptor, size=10, close_mode=CloseMode.CLOSE_NEVER)
    job.run()
    assert is_open(descriptor)
    assert job.take_descriptor() == descriptor


@pytest.mark.parametrize("mode", list(CloseMode))
@pytest.mark.parametrize("abandoned", [False, True])
@pytest.mark.parametrize("size", [0, 10, MORE_THAN_ANY_MEMORY])
def test_a_borrowed_descriptor_is_never_closed(descriptor: int, mode: CloseMode, abandoned: bool, size: int) -> None:
    job = Job(descriptor=descriptor, borrowed=True, size=size, close_mode=mode)
    assert job.take_descriptor() == -1
    if abandoned:
        job.abandon()
    job.run()
    assert job.take_descriptor() == -1
    assert is_open(descriptor)


def test_a_descriptor_may_be_taken_back_before_the_visit(descriptor: int) -> None:
    job = Job(descriptor=descriptor, size=10)
    assert job.take_descriptor() == descriptor
    job.abandon()
    job.run()
    assert is_open(descriptor)


def test_a_job_that_never_ran_closes_nothing(descriptor: int) -> None:
    job = Job(descriptor=descriptor, size=10)
    del job
    assert is_open(descriptor)


def test_a_root_that_nobody_took_is_closed_with_its_job(root: Path) -> None:
    job = visit(root, "small")
    assert str(root) in descriptors().values()
    del job
    assert str(root) not in descriptors().values()


# -- jobs that nobody waits for ---------------------------------------------------------------------------------------


def test_abandoned_before_the_visit_nothing_is_opened(root: Path) -> None:
    job = Job(root=os.fsencode(root / "missing"), path=b"small", size=10)
    job.abandon()
    assert job.abandoned
    job.run()
    assert (job.step, job.error, job.stat) == (Step.STEP_ABANDONED, 0, None)
    assert (job.take_descriptor(), job.take_root(), job.take_data()) == (-1, -1, b"")


def test_abandoned_before_the_visit_it_does_not_stall_either() -> None:
    job = Job(stall_ns=3_000_000_000)
    job.abandon()
    job.run()
    assert (job.step, job.finished) == (Step.STEP_ABANDONED, True)
    assert job.finished_ns - job.started_ns < 2_000_000_000


@pytest.mark.parametrize("mode", list(CloseMode))
def test_abandoned_during_the_stall_it_stops_before_the_next_step(root: Path, mode: CloseMode) -> None:
    opened = os.open(root / "small", os.O_RDONLY)
    jobs = [
        Job(root=os.fsencode(root), path=b"small", size=10, stall_ns=300_000_000, close_mode=mode),
        Job(descriptor=opened, size=10, stall_ns=300_000_000, close_mode=mode),
    ]
    threads = [threading.Thread(target=job.run) for job in jobs]
    for thread in threads:
        thread.start()
    while not all(job.started_ns for job in jobs):
        time.sleep(0.001)
    for job in jobs:
        job.abandon()
    for job, thread in zip(jobs, threads, strict=True):
        thread.join()
        assert (job.step, job.finished, job.count) == (Step.STEP_ABANDONED, True, 0)
        assert job.take_descriptor() == -1
    assert str(root / "small") not in descriptors().values()


def test_the_descriptor_of_a_running_job_is_its_own(descriptor: int) -> None:
    job = Job(descriptor=descriptor, size=10, stall_ns=300_000_000)
    thread = threading.Thread(target=job.run)
    thread.start()
    while not job.started_ns:
        time.sleep(0.001)
    with pytest.raises(RuntimeError, match="running"):
        job.take_descriptor()
    assert job.take_data() == b""
    assert not job.finished
    thread.join()
    assert job.take_data() == SMALL[:10]


@settings(quick, max_examples=1000)
@given(
    path=st.sampled_from([b"small", b"large", b"empty", b"missing", b"directory", b"../small", b"directory/inner"]),
    offset=st.integers(0, 2000),
    size=st.sampled_from([0, 1, 1023, 1024, 1025, 100_000, MORE_THAN_ANY_MEMORY]),
    mode=st.sampled_from(list(CloseMode)),
    source=st.sampled_from(["root", "root_fd", "descriptor", "borrowed"]),
    fate=st.sampled_from(["run", "abandoned before", "abandoned after", "never run", "taken before"]),
)
def test_no_job_leaks_a_descriptor(
    root: Path, path: bytes, offset: int, size: int, mode: CloseMode, source: str, fate: str
) -> None:
    before = descriptors()
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {"offset": offset, "size": size, "close_mode": mode}
        if source == "root":
            options |= {"root": os.fsencode(root), "path": path}
        elif source == "root_fd":
            options |= {"root_fd": os.open(root, os.O_PATH), "path": path}
            stack.callback(os.close, options["root_fd"])
        else:
            options |= {"descriptor": os.open(root / "small", os.O_RDONLY), "borrowed": source == "borrowed"}
            if source == "borrowed":
                stack.callback(os.close, options["descriptor"])
        job = Job(**options)
        if fate == "taken before":
            take_both(job)
        if fate == "abandoned before":
            job.abandon()
        if fate != "never run":
            job.run()
        if fate == "abandoned after":
            job.abandon()
        take_both(job)
        del job
    assert descriptors() == before


# -- signals ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def signals() -> Iterator[list[int]]:
    """The SIGUSR1 and SIGALRM that Python's handler has seen."""
    seen: list[int] = []
    previous = {each: signal.signal(each, lambda number, _: seen.append(number)) for each in (10, signal.SIGALRM)}
    yield seen
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in previous.items():
        signal.signal(number, handler)


def test_signals_do_not_shorten_a_visit(root: Path, signals: list[int]) -> None:
    job = Job(root=os.fsencode(root), path=b"large", size=len(LARGE), stall_ns=400_000_000)
    leave = threading.Event()

    def work() -> None:
        job.run()
        leave.wait()  # a thread that may be gone must not be sent signals: pthread_kill(3)

    thread = threading.Thread(target=work)
    thread.start()
    sent = 0
    assert thread.ident is not None
    while not job.finished:
        signal.pthread_kill(thread.ident, signal.SIGUSR1)
        sent += 1
        time.sleep(0.002)
    leave.set()
    thread.join()
    assert signals
    assert sent > 3
    assert (job.error, job.step) == (0, Step.STEP_NONE)
    assert job.finished_ns - job.started_ns >= 400_000_000
    assert job.take_data() == LARGE


@pytest.mark.parametrize("function", [stall, stall_holding_gil])
def test_signals_do_not_shorten_a_stall_and_are_handled_during_it(
    function: Callable[[float], None], signals: list[int]
) -> None:
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    started = time.monotonic()
    function(0.4)
    elapsed = time.monotonic() - started
    assert elapsed >= 0.4
    assert len(signals) >= 2


@pytest.mark.parametrize("function", [stall, stall_holding_gil])
def test_a_stall_of_the_main_thread_can_be_interrupted(function: Callable[[float], None], signals: list[int]) -> None:
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        function(60)
    assert time.monotonic() - started < 30


# -- the GIL ----------------------------------------------------------------------------------------------------------


class Metronome(threading.Thread):
    """Runs Python code all the time, and notes the longest time for which it could not."""

    def __init__(self) -> None:
        super().__init__()
        self.longest = 0.0
        self.ticks = 0
        self.leaving = False

    def run(self) -> None:
        last = time.monotonic()
        while not self.leaving:
            now = time.monotonic()
            self.longest = max(self.longest, now - last)
            self.ticks += 1
            last = now

    def stood_still(self, call: Callable[[], object]) -> float:
        """The part of the time of a call for which the metronome stood still, 0 to 1 and a bit."""
        self.longest = 0.0
        started = time.monotonic()
        call()
        elapsed = time.monotonic() - started
        ticks = self.ticks
        while self.ticks < ticks + 10:  # so that the gap that this call made is counted
            time.sleep(0.001)
        return self.longest / elapsed


@pytest.fixture
def metronome() -> Iterator[Metronome]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(interval / 10)  # so that what happens before and after a call does not count
    thread = Metronome()
    thread.start()
    yield thread
    thread.leaving = True
    thread.join()
    sys.setswitchinterval(interval)


@pytest.fixture
def sparse(root: Path) -> Iterator[int]:
    """A file whose reading takes some 50 ms: much longer than the interpreter takes to switch threads."""
    with (root / "sparse").open("wb") as file:
        file.truncate(128 * 2**20)
    opened = os.open(root / "sparse", os.O_RDONLY)
    yield opened
    os.close(opened)


def test_the_gil_is_released_in_the_system_calls(metronome: Metronome, sparse: int) -> None:
    size = os.fstat(sparse).st_size
    calls: dict[str, Callable[[], object]] = {
        "stall": lambda: stall(0.2),
        "Job with a stall": lambda: Job(stall_ns=200_000_000).run(),
        "Job with a read": lambda: Job(descriptor=sparse, borrowed=True, size=size).run(),
        "pread": lambda: pread(sparse, size, 0),
    }
    for name, call in calls.items():
        # The best of some: other programs may keep the metronome waiting, too.
        assert any(metronome.stood_still(call) < 0.6 for _ in range(10)), name


def test_the_gil_is_held_where_the_name_says_so(metronome: Metronome, sparse: int) -> None:
    size = os.fstat(sparse).st_size
    for name, call in {
        "stall_holding_gil": lambda: stall_holding_gil(0.2),
        "pread_holding_gil": lambda: pread_holding_gil(sparse, size, 0),
    }.items():
        still = sorted(metronome.stood_still(call) for _ in range(5))
        assert still[2] > 0.6, (name, still)


# -- read-ahead --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read_ahead", [0, 1, 4096, 1 << 20, 2**63 - 1])
@pytest.mark.parametrize("quick", [False, True])
def test_read_ahead_makes_no_difference_to_what_is_read(tmp_path: Path, read_ahead: int, quick: bool) -> None:
    content = os.urandom(3 * 1024 * 1024 + 5)
    (tmp_path / "file").write_bytes(content)
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    os.fsync(descriptor)
    for offset, size in ((0, len(content)), (1, 700_000), (len(content) - 10, 4096), (2**62, 10)):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        job = Job(descriptor=descriptor, borrowed=True, offset=offset, size=size, read_ahead=read_ahead, quick=quick)
        job.run()
        assert (job.error, job.take_data()) == (0, content[offset : offset + size])
    os.close(descriptor)


@pytest.mark.parametrize("read_ahead", [-1, 2**63])
def test_read_ahead_out_of_range(read_ahead: int) -> None:
    with pytest.raises(ValueError, match="read_ahead must be"):
        Job(descriptor=0, borrowed=True, size=1, read_ahead=read_ahead)
