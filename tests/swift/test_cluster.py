"""A device of a Swift cluster hangs in every operation: what the cluster's clients get."""

from __future__ import annotations

import hashlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.faults.injectors import wait_until

from .cluster import ERASURE_CODED, POLICIES, REPLICATED, ask, timestamp
from .conftest import LATE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.faults.injectors import FaultFS

    from .cluster import Cluster, Response

pytestmark = pytest.mark.timeout(180)

CLIENT_SECONDS = LATE + 1
SIZE = 300_000


def content(name: str, size: int = SIZE) -> bytes:
    return random.Random(name).randbytes(size)


def put(cluster: Cluster, names: Sequence[str], policy: int = REPLICATED, size: int = SIZE) -> None:
    """Make objects while all is well."""
    for name in names:
        answer = cluster.request("PUT", cluster.path(name, policy), content(name, size))
        if answer.status != 201:  # no AssertionError: it is not what a test is about
            raise RuntimeError(f"PUT {name}: {answer}")


def get(cluster: Cluster, name: str, policy: int = REPLICATED) -> Response:
    return cluster.request("GET", cluster.path(name, policy), timeout=CLIENT_SECONDS)


def hang(sick: FaultFS) -> None:
    """Let everything that is asked of the device hang."""
    sick.hang("*")


@pytest.mark.parametrize("policy", POLICIES)
def test_reads_fail_over_within_the_deadline(cluster: Cluster, sick: FaultFS, policy: int) -> None:
    """Erasure-coded, a fragment that does not come is made from the others."""
    names = cluster.names_on("d1", 3, policy)
    put(cluster, names, policy)
    hang(sick)
    answers = [get(cluster, name, policy) for name in names]
    assert sick.held(), "the proxy has not asked the device that hangs"
    assert [each.status for each in answers] == [200] * len(names)
    assert [each.body for each in answers] == [content(name) for name in names]
    assert max(each.seconds for each in answers) < LATE


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("PUT", 201), ("POST", 202), ("DELETE", 204)])
def test_every_verb_succeeds_on_the_other_devices(cluster: Cluster, sick: FaultFS, method: str, status: int) -> None:
    names = cluster.names_on("d1", 2)
    put(cluster, names)
    hang(sick)
    for name in names:
        body = content(name + " again") if method == "PUT" else None
        answer = cluster.request(
            method, cluster.path(name), body, {"X-Object-Meta-Color": "green"}, timeout=CLIENT_SECONDS
        )
        assert answer.status == status
        assert answer.seconds < LATE
    assert sick.held(), "nobody has asked the device that hangs"
    after = get(cluster, names[0])
    if method == "DELETE":
        assert after.status == 404
    else:
        assert after.body == content(names[0] + " again" if method == "PUT" else names[0])
        assert after.headers.get("x-object-meta-color") == (None if method == "HEAD" else "green")


@pytest.mark.parametrize("policy", POLICIES)
def test_writes_of_new_objects(cluster: Cluster, sick: FaultFS, policy: int) -> None:
    """The fourth device takes what the hung one does not."""
    hang(sick)
    name = cluster.names_on("d1", 1, policy)[0]
    path = cluster.path(name, policy)
    assert cluster.request("PUT", path, content(name), timeout=CLIENT_SECONDS).status == 201
    assert get(cluster, name, policy).body == content(name)


def test_a_hang_in_mid_stream_is_resumed_from_another_replica(cluster: Cluster, sick: FaultFS) -> None:
    name, size = cluster.names_on("d1", 1)[0], 8 << 20
    put(cluster, [name], size=size)
    sick.hang("read", path="*.data", range=(5 << 20, size))
    answer = get(cluster, name)
    held = [each for each in sick.held() if each.op == "read"]
    assert held, "the device that hangs has not been read up to where it does"
    assert answer.status == 200
    assert hashlib.md5(answer.body).hexdigest() == answer.headers["etag"]
    assert answer.body == content(name, size)


def test_healthy_devices_are_not_touched(cluster: Cluster, sick: FaultFS) -> None:
    others = cluster.names_on("d1", 6, held=False)
    hung = cluster.names_on("d1", 2)
    put(cluster, [*others, *hung])
    hang(sick)
    with ThreadPoolExecutor(10) as pool:
        # More of them than there are slots.
        stuck = [pool.submit(get, cluster, hung[number % 2]) for number in range(10)]
        sick.wait_held(1)
        for name in others:
            answer = get(cluster, name)
            assert (answer.status, answer.body) == (200, content(name))
            assert answer.seconds < LATE
            written = cluster.request("PUT", cluster.path(name), content(name), timeout=CLIENT_SECONDS)
            assert written.status == 201
            assert written.seconds < LATE
        assert [each.result().status for each in stuck] == [200] * len(stuck)


def test_the_device_comes_back(cluster: Cluster, sick: FaultFS) -> None:
    """The object server is asked directly, before and after the breaker has opened."""
    name = cluster.names_on("d1", 1)[0]
    put(cluster, [name])
    hang(sick)
    port, path = cluster.object_ports["d1"], cluster.object_path("d1", name)
    headers = {"X-Backend-Storage-Policy-Index": str(REPLICATED)}
    assert ask(port, "GET", path, headers=headers, timeout=CLIENT_SECONDS).status == 503
    wait_until(lambda: ask(port, "GET", path, headers=headers).status == 507, "the breaker to open", 60)
    assert ask(port, "PUT", path, b"", {**headers, "X-Timestamp": timestamp(), "Content-Type": "a/b"}).status == 507
    sick.release()
    wait_until(lambda: ask(port, "GET", path, headers=headers).status == 200, "the device to come back", 60)
    assert ask(port, "GET", path, headers=headers).body == content(name)
    written = {**headers, "X-Timestamp": timestamp(), "Content-Type": "text/plain"}
    assert ask(port, "PUT", path, b"new", written).status == 201


def test_the_server_answers_while_a_device_hangs(cluster: Cluster, sick: FaultFS) -> None:
    name = cluster.names_on("d1", 1, ERASURE_CODED)[0]
    put(cluster, [name], ERASURE_CODED)
    hang(sick)
    reader = threading.Thread(target=get, args=(cluster, name, ERASURE_CODED))
    reader.start()
    try:
        sick.wait_held(1)
        answer = ask(cluster.object_ports["d1"], "GET", "/healthcheck", timeout=LATE)
        assert answer.status == 200
    finally:
        sick.release()
        reader.join()
