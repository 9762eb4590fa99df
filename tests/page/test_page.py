"""The page as an operator sees it: disks hang, many disks, a server that dies, a phone."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests.page.conftest import PHONE, resize
from tests.server.raw_client import ServerProcess, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from selenium.webdriver import Chrome

    from tests.faults.injectors import FaultFS
    from tests.server.conftest import StartServer

QUICK = ["--threads", "2", "--queue", "2", "--deadline", "0.5", "--offline-after", "1"]
HOSTILE = "<img src=x onerror=document.title=1>"


def text(browser: Chrome, selector: str) -> str:
    """What an element shows."""
    found: str = browser.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)
    return found


def card(browser: Chrome, name: str) -> dict[str, Any] | None:
    """What the card of a disk shows, and where it stands; None when there is none."""
    found: dict[str, Any] | None = browser.execute_script(
        """
        const cards = [...document.querySelectorAll("#disks > li")];
        const place = cards.findIndex(each => each.querySelector("h2").textContent === arguments[0]);
        if (place < 0) return null;
        const one = cards[place], text = selector => one.querySelector(selector).textContent;
        const all = selector => [...one.querySelectorAll(selector)];
        const facts = Object.fromEntries(all("[data-fact]").map(each => [each.dataset.fact, each.textContent]));
        const bars = all("[data-state]").filter(each => each.getAttribute("d")).map(each => each.dataset.state);
        return { place, state: text(".state"), why: text(".why"), facts, bars,
          oldest: one.querySelector(".oldest").getAttribute("d"), device: one.querySelector(".p99").getAttribute("d"),
          timeline: one.querySelector(".chart").getAttribute("aria-valuetext") };
        """,
        name,
    )
    return found


def state(browser: Chrome, name: str) -> str:
    """The state that the card of a disk shows, without its sign."""
    shown = card(browser, name)
    return shown["state"].partition(" ")[2] if shown else ""


def names(browser: Chrome) -> list[str]:
    """The disks that are shown, in order."""
    shown: list[str] = browser.execute_script(
        "return [...document.querySelectorAll('#disks h2')].map(each => each.textContent)"
    )
    return shown


def fits(browser: Chrome) -> bool:
    """Whether nothing is wider than the screen."""
    wide: int = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    return wide <= 0


def make_disks(directory: Path, count: int) -> list[str]:
    """Options for that many healthy disks, called disk1 and so on, each with a file `x`."""
    options = []
    for number in range(1, count + 1):
        root = directory / f"disk{number}"
        root.mkdir()
        (root / "x").write_bytes(b"well")
        options += ["--disk", f"disk{number}={root}"]
    return options


def test_a_disk_hangs_and_its_card_tells(
    browser: Chrome, start_server: StartServer, faultfs: FaultFS, tmp_path: Path, screenshot: Callable[[str], bytes]
) -> None:
    for name in ("x", HOSTILE):
        (faultfs.backing / name).write_bytes(b"sick" * 1000)
    server = start_server(*make_disks(tmp_path, 3), "--disk", f"sick={faultfs.root}", *QUICK)
    browser.get(server.url)
    until(lambda: state(browser, "sick") == "online", "the card")
    assert text(browser, "#summary") == "All 4 disks are online."
    for _ in range(20):
        for disk in ("disk1", "disk2", "sick"):
            assert server.http(f"/v1/{disk}/x").status == 200
    until(lambda: (card(browser, "sick") or {})["facts"]["device"].endswith("s"), "the latency")
    faultfs.hang()
    assert server.http(f"/v1/sick/{HOSTILE.replace(' ', '%20')}").status == 504
    until(lambda: state(browser, "sick") == "offline", "the card to turn")
    until(lambda: (card(browser, "sick") or {})["oldest"], "the line of what is stuck")
    shown = card(browser, "sick")
    assert shown is not None
    assert shown["place"] == 0, "what is sick comes first"
    assert "no operation has completed for 1 s" in shown["why"]
    assert " · since " in shown["why"]
    assert shown["facts"]["stuck"] in ("1", "2"), "one read, perhaps a probe"
    assert shown["facts"]["in_flight"] in ("1 of 2", "2 of 2")
    assert {"online", "offline"} <= set(shown["bars"])
    assert "offline" in shown["timeline"]
    assert text(browser, "#summary") == "1 of 4 not well: sick offline."
    assert browser.title == "(1) diskread"
    slow = text(browser, "#slow")
    assert HOSTILE in slow, "a name is text, whatever is in it"
    assert "stuck" in slow
    assert state(browser, "disk1") == "online"
    # Who comes later sees what happened before.
    browser.refresh()
    until(lambda: state(browser, "sick") == "offline", "the card after a reload")
    assert {"online", "offline"} <= set((card(browser, "sick") or {})["bars"])
    assert HOSTILE in text(browser, "#slow")
    assert len(screenshot("hang")) > 10_000
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    dark = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert dark == "rgb(17, 20, 23)"
    screenshot("hang-dark")
    faultfs.release()
    until(lambda: state(browser, "sick") == "online", "the card to turn back")
    until(lambda: text(browser, "#summary") == "All 4 disks are online.", "the summary")
    assert "back" in text(browser, "#slow")


def test_64_disks(
    browser: Chrome, tmp_path: Path, start_server: StartServer, screenshot: Callable[[str], bytes]
) -> None:
    server = start_server(*make_disks(tmp_path, 63), "--disk", f"gone={tmp_path}/nowhere", "--threads", "1")
    browser.get(server.url)
    until(lambda: len(names(browser)) == 64, "all cards")
    assert names(browser)[:3] == ["gone", "disk1", "disk2"], "what is sick first, then by number"
    assert state(browser, "gone") == "offline"
    screenshot("64-disks")
    find = browser.find_element("id", "find")
    find.send_keys("disk6")
    assert names(browser) == ["disk6", "disk60", "disk61", "disk62", "disk63"]
    assert text(browser, "#shown") == "5 of 64 shown"
    find.clear()
    browser.find_element("id", "only-sick").click()
    assert names(browser) == ["gone"]
    browser.find_element("id", "only-sick").click()
    browser.execute_script(
        "const order = document.getElementById('order'); order.value = 'name'; order.dispatchEvent(new Event('input'))"
    )
    assert names(browser)[0] == "disk1"
    assert names(browser)[-1] == "gone"
    resize(browser, PHONE)
    assert fits(browser)


def test_the_server_dies_and_is_back(
    browser: Chrome, tmp_path: Path, start_server: StartServer, screenshot: Callable[[str], bytes]
) -> None:
    options = make_disks(tmp_path, 1)
    server = start_server(*options)
    browser.get(server.url)
    until(lambda: state(browser, "disk1") == "online", "the card")
    assert text(browser, "#broken") == ""
    server.kill()
    until(lambda: "does not answer" in text(browser, "#broken"), "the page to say so")
    assert state(browser, "disk1") == "online", "what is known stays to be seen"
    screenshot("broken")
    start_server(*options, port=server.port)
    until(lambda: not text(browser, "#broken"), "the page to find it again")
    until(lambda: "up 0" not in text(browser, "#server"), "news")


def test_a_server_that_hangs_is_told_from_one_that_is_well(
    browser: Chrome, tmp_path: Path, start_server: StartServer
) -> None:
    server = start_server(*make_disks(tmp_path, 1))
    browser.get(server.url)
    until(lambda: state(browser, "disk1") == "online", "the card")
    server.process.send_signal(signal.SIGSTOP)
    try:
        until(lambda: "it hangs" in text(browser, "#broken"), "the page to say so")
    finally:
        server.process.send_signal(signal.SIGCONT)
    until(lambda: not text(browser, "#broken"), "the page to find it again")


def test_without_disks(browser: Chrome, start_server: StartServer, screenshot: Callable[[str], bytes]) -> None:
    server = start_server("--no-simulate")
    browser.get(server.url)
    until(lambda: text(browser, "#summary") == "No disks.", "the page")
    assert "diskread serve --disk" in text(browser, "#empty")
    assert names(browser) == []
    screenshot("empty")


def test_a_phone_has_nothing_to_scroll_sideways(
    browser: Chrome, start_server: StartServer, faultfs: FaultFS, tmp_path: Path, screenshot: Callable[[str], bytes]
) -> None:
    long = "directory/" + "with-a-very-long-name-and-no-place-to-break" * 4
    (faultfs.backing / "directory").mkdir()
    (faultfs.backing / long).write_bytes(b"sick")
    disk = "a-disk-with-a-name-that-is-long-and-has-no-spaces-anywhere"
    server = start_server(*make_disks(tmp_path, 2), "--disk", f"{disk}={faultfs.root}", *QUICK)
    faultfs.hang()
    assert server.http(f"/v1/{disk}/{long}").status == 504
    resize(browser, PHONE)
    browser.get(server.url)
    until(lambda: state(browser, disk) == "offline", "the card")
    assert "with-a-very-long-name" in text(browser, "#slow")
    assert fits(browser)
    screenshot("phone")
    faultfs.release()


def test_with_the_keyboard_alone(browser: Chrome, tmp_path: Path, start_server: StartServer) -> None:
    from selenium.webdriver.common.keys import Keys

    server = start_server(*make_disks(tmp_path, 2))
    browser.get(server.url)
    until(lambda: len(names(browser)) == 2, "the cards")

    def focused() -> str:
        found: str = browser.execute_script(
            "const one = document.activeElement; return one.id || one.getAttribute('aria-label') || one.textContent"
        )
        return found

    seen = []
    for _ in range(6):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        seen.append(focused())
        outline = browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", f"the focus on {seen[-1]} is not to be seen"
    lines = [f"Time-line of disk{number}, seconds before now" for number in (1, 2)]
    assert seen == ["Skip to the slow reads", "find", "order", "only-sick", *lines]
    line = browser.switch_to.active_element
    line.send_keys(Keys.ARROW_LEFT)
    assert line.get_attribute("aria-valuenow") == "-1"
    line.send_keys(Keys.HOME)
    assert line.get_attribute("aria-valuenow") == "-299"
    assert "not known" in (line.get_attribute("aria-valuetext") or "")
    line.send_keys(Keys.END)
    assert "online" in (line.get_attribute("aria-valuetext") or "")
    assert text(browser, "#disks > li:nth-child(2) .readout")


def test_what_is_read_aloud(browser: Chrome, tmp_path: Path, start_server: StartServer) -> None:
    server = start_server(*make_disks(tmp_path, 2))
    browser.get(server.url)
    until(lambda: len(names(browser)) == 2, "the cards")
    live = browser.execute_script(
        "return [...document.querySelectorAll('[aria-live], [role=status], [role=alert], [role=log]')].map(e => e.id)"
    )
    assert live == ["summary", "broken"], "numbers that change each second are not read aloud"
    browser.execute_script(
        """
        window.changes = 0;
        new MutationObserver(list => { window.changes += list.length; })
          .observe(document.getElementById("summary"), { childList: true, characterData: true, subtree: true });
        """
    )
    before = text(browser, "#server")
    until(lambda: text(browser, "#server") != before, "a second to pass")
    assert browser.execute_script("return window.changes") == 0
    unnamed = browser.execute_script(
        "return [...document.querySelectorAll('article, [role=slider], [role=search], section, ul#disks')]"
        ".filter(e => !e.getAttribute('aria-label'))"
        ".filter(e => !document.getElementById(e.getAttribute('aria-labelledby'))).length"
    )
    assert unnamed == 0


@pytest.mark.parametrize(
    "attack", ["document.body.innerHTML = '<b>x</b>'", "document.createElement('script').text = '1'"]
)
def test_the_policy_forbids_text_as_html(
    chromium: Chrome, tmp_path: Path, start_server: StartServer, attack: str
) -> None:
    server: ServerProcess = start_server(*make_disks(tmp_path, 1))
    chromium.get(server.url)
    outcome = chromium.execute_script(f"try {{ {attack}; return 'done' }} catch (error) {{ return error.name }}")
    assert outcome == "TypeError"
    chromium.get("about:blank")
