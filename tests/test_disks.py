"""A set of disks by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from diskread import Disk, Disks, Limits, Mirror

from .conftest import SMALL, until

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def test_disks_are_a_mapping_in_the_order_given(root: Path) -> None:
    first, second = Disk("b", root), Disk("a", None)
    disks = Disks([first, second])
    assert list(disks) == ["b", "a"]
    assert len(disks) == 2
    assert disks["b"] is first
    assert disks.get("c") is None
    assert "a" in disks
    assert dict(disks) == {"b": first, "a": second}
    with pytest.raises(KeyError):
        disks["c"]


def test_no_disks_at_all() -> None:
    with Disks([]) as disks:
        assert list(disks) == []
        assert disks.status == []


def test_two_disks_of_one_name_are_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="two disks are called a"):
        Disks([Disk("a", root), Disk("b", root), Disk("a", None)])


def test_the_status_is_that_of_each_disk(root: Path) -> None:
    with Disks([Disk("a", root, Limits(threads=3)), Disk("b", None)]) as disks:
        assert disks["a"].read("small") == SMALL
        assert [each.name for each in disks.status] == ["a", "b"]
        assert [each.counts.reads for each in disks.status] == [1, 0]
        assert disks.status[0].limits.threads == 3


def test_leaving_closes_all(root: Path) -> None:
    with Disks([Disk("a", root), Disk("b", root)]) as disks:
        for disk in disks.values():
            assert disk.read("small") == SMALL
    for disk in disks.values():
        with pytest.raises(RuntimeError, match="closed"):
            disk.read("small")
    until(lambda: not any(each.load.threads for each in disks.status))
    disks.close()


def test_mirrors_are_of_these_disks_and_have_names_of_their_own(root: Path) -> None:
    one, two, other = Disk("a", root), Disk("b", root), Disk("c", root)
    disks = Disks([one, two], [Mirror("m", [one, two])])
    assert list(disks) == ["a", "b"]
    assert list(disks.mirrors) == [each.name for each in disks.mirror_status] == ["m"]
    with pytest.raises(ValueError, match="not among"):
        Disks([one, two], [Mirror("m", [one, other])])
    for name in ("a", "m"):
        with pytest.raises(ValueError, match="a name of its own"):
            Disks([one, two], [Mirror("m", [one, two]), Mirror(name, [one, two])])
