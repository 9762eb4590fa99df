"""Fixtures: headless Chromium. Tests skip where it is not installed, with the reason."""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.conftest import faultfs, make_faultfs  # noqa: F401 - fixtures
from tests.server.conftest import start_server  # noqa: F401 - a fixture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from selenium.webdriver import Chrome

PHONE = (360, 740)
DESK = (1280, 900)


def _missing() -> str | None:
    if importlib.util.find_spec("selenium") is None:
        return "selenium is not installed: pip install --group page"
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            return f"{program} is not installed: apt-get install chromium chromium-driver"
    return None


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """A browser for all tests of the page."""
    reason = _missing()
    if reason is not None:
        pytest.skip(reason)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # it does not work as root
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def browser(chromium: Chrome) -> Iterator[Chrome]:
    """The browser, as a desk has it; after the test its console has to be free of what the page did wrong."""
    resize(chromium, DESK)
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    chromium.get_log("browser")
    yield chromium
    said = [line["message"] for line in chromium.get_log("browser")]
    chromium.get("about:blank")
    # That a server is gone is no fault of the page; everything else, above all what its policy forbids, is.
    assert [line for line in said if "net::ERR" not in line and "status of 503" not in line] == []


def resize(browser: Chrome, size: tuple[int, int]) -> None:
    """Have the page see a screen of that size in CSS pixels: a window cannot be as narrow as a phone."""
    metrics: dict[str, Any] = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


@pytest.fixture
def screenshot(browser: Chrome, tmp_path: Path) -> Callable[[str], bytes]:
    """Store what the browser shows as NAME.png in the test's directory, or in that which PAGE_SCREENSHOTS names."""
    directory = os.environ.get("PAGE_SCREENSHOTS", str(tmp_path))

    def take(name: str) -> bytes:
        path = os.path.join(directory, f"{name}.png")
        assert browser.save_screenshot(path)
        with open(path, "rb") as file:
            return file.read()

    return take
