"""The configuration file: what it may say, and that whatever is wrong is named with its key and line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diskread import Limits
from server.config import ConfigError, DiskConfig, LimitsConfig, ServerConfig, check, load, make_disks
from server.simulate import SIMULATED

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        file = tmp_path / "diskread.toml"
        file.write_text(text, "utf-8")
        return file

    return write


def test_an_empty_file_is_the_defaults(write: Callable[[str], Path]) -> None:
    config = load(write(""))
    assert config == ServerConfig()
    assert config.stalls
    assert (config.host, config.port) == ("127.0.0.1", 7000)


def test_takes_everything_there_is(write: Callable[[str], Path]) -> None:
    text = """
        host = "::1"
        port = 0
        simulate = true
        access_log = "-"
        connections = 10
        idle_timeout = 1
        request_timeout = 2.5
        drain_timeout = 3
        [limits]
        threads = 4
        queue = 5
        deadline = 6
        idle = 7.5
        [disk.a]
        root = "/srv/a"
        [disk."b.1"]
        root = "/srv/b"
        threads = 1
        queue = 0
        deadline = inf
    """
    assert load(write(text)) == ServerConfig(
        host="::1",
        port=0,
        simulate=True,
        access_log="-",
        connections=10,
        idle_timeout=1,
        request_timeout=2.5,
        drain_timeout=3,
        limits=LimitsConfig(threads=4, queue=5, deadline=6, idle=7.5),
        disk={
            "a": DiskConfig(root="/srv/a"),
            "b.1": DiskConfig(root="/srv/b", threads=1, queue=0, deadline=float("inf")),
        },
    )


@pytest.mark.parametrize(("text", "stalls"), [("", True), ("simulate = false", False)])
@pytest.mark.parametrize("disk", [False, True])
def test_stalls_are_on_without_disks_only(write: Callable[[str], Path], text: str, stalls: bool, disk: bool) -> None:
    config = load(write(text + ("\n[disk.a]\nroot = '/srv/a'\n" if disk else "")))
    assert config.stalls is (stalls and not disk)
    assert [*make_disks(config)] == ["a"] * disk + [SIMULATED] * (stalls and not disk)


def test_a_disk_goes_by_its_own_limits_then_by_those_of_all(write: Callable[[str], Path]) -> None:
    disks = make_disks(
        load(
            write(
                """
                simulate = true
                [limits]
                threads = 4
                deadline = 6
                [disk.a]
                root = "/nowhere/a"
                [disk.b]
                root = "/nowhere/b"
                threads = 1
                """
            )
        )
    )
    assert disks["a"].limits == Limits(threads=4, deadline=6)
    assert disks["b"].limits == Limits(threads=1, deadline=6)
    assert disks[SIMULATED].limits.threads == 1024


def test_simulated_stalls_run_on_the_engine_of_all_disks(write: Callable[[str], Path]) -> None:
    text = """
        simulate = true
        [limits]
        engine = "native"
        [disk.a]
        root = "/srv/a"
        [disk.b]
        root = "/srv/b"
        engine = "threadpool"
    """
    disks = make_disks(load(write(text)))
    assert {disk.name: disk.limits.engine for disk in disks.values()} == {
        "a": "native",
        "b": "threadpool",
        SIMULATED: "native",
    }
    assert make_disks(ServerConfig())[SIMULATED].limits.engine == "threadpool"


TWO = "[disk.a]\nroot = '/a'\n[disk.b]\nroot = '/b'\n"


def test_mirrors_are_made_of_the_disks(write: Callable[[str], Path]) -> None:
    text = TWO + "[mirror.m]\ndisks = ['b', 'a']\n[mirror.n]\ndisks = ['a', 'b']\nhedge_after = 1\nhedge_share = 0.5"
    disks = make_disks(load(write(text)))
    assert list(disks) == ["a", "b"]
    m, n = disks.mirrors.values()
    assert m.disks == (disks["b"], disks["a"])
    assert (m.status.hedge_after, m.status.hedge_share) == ("p95", 0.05)
    assert (n.status.hedge_after, n.status.hedge_share) == (1.0, 0.5)


@pytest.mark.parametrize(
    ("text", "line", "key", "why"),
    [
        ("\nprot = 7000", 2, "prot", "no such key; there are: host, port,"),
        ("port = 7000\nthreads = 5", 2, "threads", "no such key"),
        ("[limits]\n\nthread = 5", 3, "limits.thread", "no such key; there are: threads, queue, deadline, idle"),
        ("[disk.a]\nroot = '/a'\nport = 5", 3, "disk.a.port", "no such key; there are: threads,"),
        ("[disk.a]\nroot = '/a'\n[disk.a.more]\nx = 1", 3, "disk.a.more", "no such key"),
        ("[disks.a]\nroot = '/a'", 1, "disks", "no such key"),
        ("port = '7000'", 1, "port", "expected `int`, got `str`"),
        ("port = true", 1, "port", "expected `int`, got `bool`"),
        ("port = 70.5", 1, "port", "expected `int`, got `float`"),
        ("port = 2020-01-01", 1, "port", "expected `int`"),
        ("host = 5", 1, "host", "expected `str`"),
        ("simulate = 'yes'", 1, "simulate", "expected `bool | null`"),
        ("access_log = 1", 1, "access_log", "expected `str | null`"),
        ("limits = 5", 1, "limits", "expected `object`"),
        ("disk = 5", 1, "disk", "[disk.NAME]"),
        ("disk = []", 1, "disk", "[disk.NAME]"),
        ("[disk]\na = 5", 2, "disk.a", "expected `object`"),
        ("[[disk.a]]\nroot = '/a'", 1, "disk.a", "expected `object`"),
        ("[limits]\nthreads = 'x'", 2, "limits.threads", "expected `int | null`"),
        ("[disk.a]\nroot = 5", 2, "disk.a.root", "expected `str`"),
        ("[disk.b]\nroot = '/b'\n[disk.a]\nthreads = 5", 3, "disk.a", "root is missing"),
        ("port = -1", 1, "port", "between 0 and 65535, not -1"),
        ("port = 65536", 1, "port", "between 0 and 65535"),
        ("connections = 0", 1, "connections", "not 0"),
        ("# a comment\nidle_timeout = 0", 2, "idle_timeout", "positive"),
        ("request_timeout = -1.0", 1, "request_timeout", "positive"),
        ("drain_timeout = nan", 1, "drain_timeout", "positive"),
        ("[limits]\nthreads = 0", 2, "limits.threads", "between 1 and"),
        ("[limits]\nqueue = -1", 2, "limits.queue", "between 0 and"),
        ("[limits]\ndeadline = 0", 2, "limits.deadline", "positive"),
        ("[limits]\nidle = inf", 2, "limits.idle", "not inf"),
        ("[disk.a]\nroot = '/a'\n[disk.b]\nroot = '/b'\ndeadline = nan", 5, "disk.b.deadline", "positive"),
        ("[disk.a]\nroot = ''", 2, "disk.a.root", "must be a directory"),
        ('[disk.a]\nroot = "/a\\u0000b"', 2, "disk.a.root", "must be a directory"),
        ("[disk.v1]\nroot = '/a'", 1, "disk.v1", "cannot be called v1"),
        ("[disk.simulated]\nroot = '/a'", 1, "disk.simulated", "cannot be called simulated"),
        ("\n[disk.'a,b']\nroot = '/a'", 2, "disk.a,b", "the name of a disk is made of"),
        ("[disk.'a/b']\nroot = '/a'", 1, "disk.a/b", "the name of a disk is made of"),
        ("[disk.'..']\nroot = '/a'", 1, "disk...", "the name of a disk is made of"),
        ("[disk.'.a']\nroot = '/a'", 1, "disk..a", "the name of a disk is made of"),
        ("[disk.-a]\nroot = '/a'", 1, "disk.-a", "the name of a disk is made of"),
        ("[disk.'']\nroot = '/a'", 1, "disk.", "the name of a disk is made of"),
        ("[disk.'é']\nroot = '/a'", 1, "disk.é", "the name of a disk is made of"),
        ('[disk."a\\n"]\nroot = "/a"', 1, "disk.a\n", "the name of a disk is made of"),
        (TWO + "[mirror.m]\nhedge_after = 1", 5, "mirror.m", "the key disks is missing"),
        (TWO + "[mirror.m]\ndisks = ['a', 'c']", 6, "mirror.m.disks", "no disk called c; there are: a, b"),
        (TWO + "[mirror.m]\ndisks = ['a', 'a']", 6, "mirror.m.disks", "two or more disks, each of them once"),
        (TWO + "[mirror.m]\ndisks = ['a']", 6, "mirror.m.disks", "two or more"),
        (TWO + "[mirror.a]\ndisks = ['a', 'b']", 5, "mirror.a", "there is a disk called a"),
        (TWO + "[mirror.v1]\ndisks = ['a', 'b']", 5, "mirror.v1", "a mirror cannot be called v1"),
        (TWO + "[mirror.'a/b']\ndisks = ['a', 'b']", 5, "mirror.a/b", "the name of a mirror is made of"),
        (TWO + "[mirror.m]\ndisks = ['a', 'b']\nhedge_after = 0", 7, "mirror.m.hedge_after", "positive"),
        (TWO + "[mirror.m]\ndisks = ['a', 'b']\nhedge_after = nan", 7, "mirror.m.hedge_after", "positive"),
        (TWO + "[mirror.m]\ndisks = ['a', 'b']\nhedge_after = 'p99'", 7, "mirror.m.hedge_after", "p99"),
        (TWO + "[mirror.m]\ndisks = ['a', 'b']\nhedge_share = 1.5", 7, "mirror.m.hedge_share", "between 0 and 1"),
        (TWO + "[mirror.m]\ndisks = ['a', 'b']\nchecksum_suffix = '/'", 7, "mirror.m.checksum_suffix", ".sha256"),
        (TWO + "[mirror.m]\ndisks = ['a', 'b']\nshare = 1", 7, "mirror.m.share", "no such key; there are: disks,"),
        ("mirror = 5", 1, "mirror", "[mirror.NAME]"),
        ("disk = {a = {root = '/a', threads = 0}}", 1, "disk.a.threads", "between 1 and"),
        ("disk.a.root = '/a'\ndisk.a.threads = 0", 2, "disk.a.threads", "between 1 and"),
    ],
)
def test_says_what_is_wrong_and_where(write: Callable[[str], Path], text: str, line: int, key: str, why: str) -> None:
    file = write(text)
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert str(caught.value).startswith(f"{file}:{line}: {key}: "), caught.value
    assert why in str(caught.value)


def test_a_file_that_is_no_toml_is_said_so_with_its_place(write: Callable[[str], Path]) -> None:
    file = write("port = 7000\nport = = 5\n")
    with pytest.raises(ConfigError, match=r"not TOML: .*line 2"):
        load(file)


def test_a_file_that_cannot_be_read_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read"):
        load(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "latin").write_bytes(b"host = '\xff'")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "latin")


def test_a_disk_that_is_not_there_does_not_hold_up_the_start(write: Callable[[str], Path]) -> None:
    disks = make_disks(load(write("[disk.a]\nroot = '/nowhere/at/all'")))
    assert disks["a"].root == "/nowhere/at/all"


@pytest.mark.parametrize("config", [ServerConfig(port=-1), ServerConfig(disk={"v1": DiskConfig(root="/a")})])
def test_options_are_checked_like_a_file(config: ServerConfig) -> None:
    with pytest.raises(ConfigError, match=r"port|v1"):
        check(config)


# --- Whatever the file says, it is a configuration or an error that names the file ---

VALUES = (
    st.sampled_from(["inf", "-inf", "nan", "1979-05-27T07:32:00Z", "07:32:00", "[]", "{}", "[1, 'x']"])
    | (st.integers(-5, 70_000) | st.integers(-(2**63), 2**63 - 1) | st.booleans()).map(json.dumps)
    | st.floats(allow_nan=False, allow_infinity=False, min_value=-1e9, max_value=1e9).map(lambda each: f"{each:.3f}")
    | st.sampled_from(["", "/srv", "x", "é", "a,b", "a.b"]).map(json.dumps)
)
KEYS = st.sampled_from(
    [*ServerConfig.__struct_fields__, *DiskConfig.__struct_fields__, "v1", '"a.b"', "'$.x`'", '"x y"', "limits.threads"]
)
TABLES = st.sampled_from(["", "[limits]", "[disk.a]", "[disk.'a,b']", "[disk]", "[host]", "[[disk]]", "[disk.a.b]"])
LINES = st.tuples(TABLES, st.dictionaries(KEYS, VALUES, max_size=4)).map(
    lambda each: "\n".join([each[0], *(f"{key} = {value}" for key, value in each[1].items())])
)


@given(st.lists(LINES, max_size=3).map("\n".join) | st.text(max_size=50))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_is_a_configuration_or_an_error_with_its_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "any.toml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    outcome: ServerConfig | str
    try:
        outcome = load(file)
    except ConfigError as error:
        outcome = str(error)
    if isinstance(outcome, str):
        assert outcome.startswith(f"{file}:")
    else:
        assert len(make_disks(outcome)) == len(outcome.disk) + outcome.stalls
