"""The page as text: what it may do, and what it needs. What it shows is tested in tests/page, in a browser."""

from __future__ import annotations

import base64
import hashlib
import re
from typing import TYPE_CHECKING

import msgspec

from server.page import content_security_policy
from server.timeline import Point
from tests.server.raw_client import until

if TYPE_CHECKING:
    from tests.server.raw_client import ServerProcess


def test_it_needs_nothing_from_elsewhere(server: ServerProcess) -> None:
    response = server.http("/")
    assert response.headers["Content-Type"].startswith("text/html")
    page = response.body.decode()
    assert not re.search(r"""(?:https?:)?//(?!\s)\w|@import|url\(""", page)
    references = re.findall(r"""(?:href|src|fetch\()\s*=?\s*["']([^"']*)""", page)
    references = [each for each in references if not each.startswith(("#", "data:"))]
    assert set(references) == {"/status", "/metrics", "/healthz"}
    for reference in references:
        assert server.http(reference).status == 200
    assert re.findall(r"""new EventSource\("([^"]*)"\)""", page) == ["/events"]
    anchors = re.findall(r'href="#([^"]*)"', page)
    assert anchors
    assert all(f'id="{each}"' in page for each in anchors)


def test_it_shows_what_the_server_tells(server: ServerProcess) -> None:
    page = server.http("/").body.decode()
    until(lambda: server.disk("d1").inline, "the disk")
    disk = msgspec.json.decode(server.http("/status").body)["disks"][0]
    used = set(re.findall(r"\bdisk\.(\w+)", page))
    assert {"name", "state", "reason", "since", "in_flight", "slots", "stuck", "waiting", "oldest", "errors"} <= used
    for key in used:
        assert key in disk, f"the page shows {key}, which /status does not have"
    fields = re.search(r"const \[(.*)\] = values;", page)
    assert fields
    short = [each.replace("_p", "").replace("disk", "device") for each in Point.__struct_fields__]
    assert fields[1].split(", ") == short, "points are arrays: both sides have to have the same order"


def test_its_policy_names_its_own_style_and_script(server: ServerProcess) -> None:
    response = server.http("/")
    policy = dict(part.strip().split(" ", 1) for part in response.headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'"
    for tag in (b"style", b"script"):
        (content,) = re.findall(b"<%b>(.*?)</%b>" % (tag, tag), response.body, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
        assert policy[f"{tag.decode()}-src"] == f"'sha256-{digest}'"
    assert "unsafe" not in response.headers["Content-Security-Policy"]
    page = response.body.decode()
    assert not re.search(r"""\s(?:style|on[a-z]+)=["']""", page), "the policy forbids these"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", page)


def test_another_page_has_another_policy() -> None:
    one, other = (content_security_policy(b"<style>a</style><script>%b</script>" % each) for each in (b"1", b"2"))
    assert one != other
    assert one.replace(hash_of(b"1"), hash_of(b"2")) == other


def hash_of(content: bytes) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode()
