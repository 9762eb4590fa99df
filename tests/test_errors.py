"""Errors: which errno becomes which class, and what they say."""

from __future__ import annotations

import copy
import errno
import pickle

import pytest

from diskread import (
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
from diskread._syscalls import Step
from diskread.errors import from_errno, root_lost

CLASSES = [
    DiskError,
    DiskBusy,
    DiskOffline,
    DiskFileNotFound,
    DiskFileForbidden,
    DiskFileNotRegular,
    DiskPathInvalid,
    DiskFileChanged,
    DiskIOError,
]


@pytest.mark.parametrize(
    ("step", "code", "expected"),
    [
        (Step.STEP_OPEN, errno.ENOENT, DiskFileNotFound),
        (Step.STEP_OPEN, errno.ENOTDIR, DiskFileNotFound),
        (Step.STEP_OPEN, errno.EACCES, DiskFileForbidden),
        (Step.STEP_OPEN, errno.EPERM, DiskFileForbidden),
        (Step.STEP_OPEN, errno.EXDEV, DiskFileForbidden),
        (Step.STEP_OPEN, errno.ELOOP, DiskFileForbidden),
        (Step.STEP_OPEN, errno.ENAMETOOLONG, DiskPathInvalid),
        (Step.STEP_OPEN, errno.EINVAL, DiskPathInvalid),
        (Step.STEP_OPEN, errno.ENXIO, DiskFileNotRegular),
        (Step.STEP_OPEN, errno.ENOSYS, DiskIOError),
        (Step.STEP_OPEN, errno.EIO, DiskIOError),
        (Step.STEP_OPEN, errno.EMFILE, DiskBusy),
        (Step.STEP_TYPE, errno.EISDIR, DiskFileNotRegular),
        (Step.STEP_TYPE, errno.EINVAL, DiskFileNotRegular),
        (Step.STEP_ROOT, errno.ENOENT, DiskOffline),
        (Step.STEP_ROOT, errno.ENOTDIR, DiskOffline),
        (Step.STEP_ROOT, errno.EIO, DiskOffline),
        (Step.STEP_STAT, errno.EIO, DiskIOError),
        (Step.STEP_READ, errno.EIO, DiskIOError),
        (Step.STEP_READ, errno.ENOENT, DiskIOError),
        (Step.STEP_READ, errno.EINVAL, DiskIOError),
        (Step.STEP_MEMORY, errno.ENOMEM, DiskIOError),
        (Step.STEP_STALL, errno.EINVAL, DiskIOError),
    ],
)
def test_every_errno_has_its_class(step: Step, code: int, expected: type[DiskError]) -> None:
    error = from_errno("d1", b"some/file", code, step)
    assert type(error) is expected
    assert error.errno == code
    assert (error.disk, error.path) == ("d1", b"some/file")
    assert str(error) == f"d1/some/file: {error.reason}"
    assert error.reason == error.strerror


@pytest.mark.parametrize("step", list(Step))
def test_no_errno_is_without_a_class(step: Step) -> None:
    for code in (*errno.errorcode, 0, 9999):
        error = from_errno("d1", None, code, step)
        assert isinstance(error, DiskError)
        assert error.errno == code
        assert str(error).startswith("d1: ")


@pytest.mark.parametrize(
    ("code", "says"),
    [(errno.EXDEV, "nested mount"), (errno.ELOOP, "circles"), (errno.ENOSYS, "Linux 5.6"), (errno.EIO, "open failed")],
)
def test_an_error_says_what_to_do(code: int, says: str) -> None:
    assert says in str(from_errno("d1", b"f", code, Step.STEP_OPEN))


@pytest.mark.parametrize(
    ("specific", "general"),
    [
        (DiskFileNotFound, FileNotFoundError),
        (DiskFileForbidden, PermissionError),
        (DiskTimeout, TimeoutError),
        (DiskPathInvalid, ValueError),
        (DiskTimeout, DiskError),
        *[(each, DiskError) for each in CLASSES],
        *[(each, OSError) for each in CLASSES],
    ],
)
def test_ordinary_except_clauses_work(specific: type[DiskError], general: type[Exception]) -> None:
    assert issubclass(specific, general)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_has_an_errno_of_its_own(kind: type[DiskError]) -> None:
    assert kind("d1", None, "reason").errno == kind.default_errno
    assert kind("d1", None, "reason", errno.EROFS).errno == errno.EROFS


def test_a_timeout_knows_whether_it_had_a_slot() -> None:
    error = DiskTimeout("d1", b"f", "reason", started=False)
    assert error.started is False
    assert error.errno == errno.ETIMEDOUT
    with pytest.raises(TypeError):
        DiskTimeout("d1", b"f", "reason")  # type: ignore[call-arg]


def test_an_offline_disk_says_when_to_come_back() -> None:
    assert DiskOffline("d1", b"f", "reason").retry_after is None
    error = DiskOffline("d1", b"f", "reason", retry_after=1.5)
    assert (error.retry_after, error.errno) == (1.5, errno.ENODEV)
    assert pickle.loads(pickle.dumps(error)).retry_after == 1.5


@pytest.mark.parametrize(
    ("code", "says"),
    [(errno.ENOENT, "cannot be opened: No such file"), (errno.ESTALE, "another device"), (errno.EIO, "Input/output")],
)
def test_a_lost_root_is_told_in_words(code: int, says: str) -> None:
    assert says in root_lost(code)
    assert says in str(from_errno("d1", b"f", code, Step.STEP_ROOT))


@pytest.mark.parametrize("step", list(Step))
@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE])
def test_a_process_without_descriptors_has_no_offline_disk(step: Step, code: int) -> None:
    assert type(from_errno("d1", b"f", code, step)) is DiskBusy


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        (b"plain/file.txt", "plain/file.txt"),
        ("größe/ファイル".encode(), "größe/ファイル"),
        (b"line\nbreak", "line\\nbreak"),
        (b"\x1b[31mred", "\\x1b[31mred"),
        (b"\xff\xfe", "\\udcff\\udcfe"),
        ("\u202etxt.exe".encode(), "\\u202etxt.exe"),
        (b"tab\tquote'\"", "tab\\tquote'\""),
        (b"\x00", "\\x00"),
        (b"", ""),
    ],
)
def test_no_path_can_forge_a_line_of_a_log(path: bytes, shown: str) -> None:
    text = str(DiskError("d1", path, "reason"))
    assert text == f"d1/{shown}: reason"
    assert text.isprintable()
    text.encode()


@pytest.mark.parametrize(
    "error",
    [*[kind("d1", b"\xff", "reason", 5) for kind in CLASSES], DiskTimeout("d1", None, "reason", started=True)],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_errors_can_be_copied_and_sent_to_another_process(error: DiskError, duplicate: object) -> None:
    # OSError.__reduce__ alone would rebuild them with (errno, reason), which their constructors do not take.
    assert callable(duplicate)
    again = duplicate(error)
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.__dict__ == error.__dict__
    assert (again.errno, again.strerror, again.args) == (error.errno, error.strerror, error.args)
