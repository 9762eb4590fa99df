"""Files sent from a disk that really hangs: the application hears of it in time, the server in the middle of a body."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from diskread import CHUNK, DiskTimeout
from diskread.wsgi import send_file, status_of
from tests.conftest import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskread import Disk

    from .injectors import FaultFS
    from .witnesses import Beside

CONTENT = random.Random(13).randbytes(4 * CHUNK)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_file_that_cannot_be_opened(
    method: str, make_faultfs: Callable[..., FaultFS], make_sick: Callable[..., Disk], beside: Beside
) -> None:
    faultfs = make_faultfs("--direct-io")
    (faultfs.backing / "file").write_bytes(CONTENT)
    disk = make_sick(faultfs.root)
    faultfs.hang("open")
    started: list[str] = []
    with pytest.raises(DiskTimeout) as caught:
        send_file({"REQUEST_METHOD": method}, lambda status, _: started.append(status), disk, "file")
    assert status_of(caught.value) == 504
    assert not started
    faultfs.release()


def test_a_body_that_hangs_in_the_middle(
    make_faultfs: Callable[..., FaultFS], make_sick: Callable[..., Disk], beside: Beside
) -> None:
    faultfs = make_faultfs("--direct-io")
    (faultfs.backing / "file").write_bytes(CONTENT)
    disk = make_sick(faultfs.root)
    faultfs.hang(range=(2 * CHUNK, 2 * CHUNK + 1))
    started: list[str] = []
    body = send_file({"REQUEST_METHOD": "GET"}, lambda status, _: started.append(status), disk, "file")
    got: list[bytes] = []
    with pytest.raises(DiskTimeout):
        got.extend(body)  # keeps what came before the error
    assert started == ["200 OK"]
    sent = b"".join(got)
    assert 0 < len(sent) <= 2 * CHUNK
    assert sent == CONTENT[: len(sent)]
    body.close()
    faultfs.release()
    until(lambda: not disk.status.load.in_flight, "the read that was stuck")
