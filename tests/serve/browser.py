"""A real browser without a window, and what tests do with it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--no-proxy-server",
    "--hide-scrollbars",
)


@contextmanager
def launched(profile: Path) -> Iterator[Chrome]:
    """A browser with a new profile; skips the test, and says why, where there is none."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("there is no chromium with its chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    os.environ.setdefault("SE_OFFLINE", "true")
    chrome = Chrome(options=options, service=Service(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


class Page:
    """The page in a browser."""

    def __init__(self, browser: Chrome, url: str) -> None:
        self.browser, self.url = browser, url

    def open(self, *, width: int = 1280, height: int = 900, dark: bool = False, fresh: bool = True) -> None:
        """Load it, in a window of that size, as if for the first time."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self.browser.get(f"{self.url}/")
        if fresh:
            self.run("sessionStorage.clear()")
            self.browser.get(f"{self.url}/")
        self.browser.get_log("browser")

    def wait_ready(self) -> None:
        """Until it knows the models."""
        until(lambda: self.find("paint").is_enabled() and self.value("steps"))

    def find(self, id: str) -> WebElement:
        return self.browser.find_element(By.ID, id)

    def all(self, css: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, css)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def value(self, id: str) -> str:
        return str(self.find(id).get_property("value"))

    def text(self, id: str) -> str:
        return self.find(id).text

    def shown(self, id: str) -> bool:
        return self.find(id).is_displayed()

    def click(self, id: str) -> None:
        element = self.find(id)
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def write(self, id: str, text: str) -> None:
        """In place of what was there."""
        self.find(id).send_keys(Keys.CONTROL + "a" + Keys.NULL, text or Keys.DELETE)
        self._changed(id)

    def _changed(self, id: str) -> None:
        self.run("arguments[0].dispatchEvent(new Event('change', {bubbles: true}))", self.find(id))

    def choose(self, id: str, value: str) -> None:
        """An entry of a list."""
        self.run("arguments[0].value = arguments[1]", self.find(id), value)
        self._changed(id)
        assert self.value(id) == value

    def paint(self, prompt: str) -> None:
        """Ask for a picture."""
        self.write("prompt", prompt)
        self.click("paint")

    def painted(self) -> None:
        """Wait for the picture."""
        until(
            lambda: (
                self.shown("picture") and self.run("return arguments[0].naturalWidth", self.find("picture"))
            )
        )

    @property
    def focused(self) -> str:
        return str(self.run("return document.activeElement.id"))

    def complaints(self) -> list[str]:
        """What the console says but for answers that are errors."""
        lines = (str(each["message"]) for each in self.browser.get_log("browser") if each["level"] != "INFO")
        return [line for line in lines if "Failed to load resource" not in line]


def until(true: Callable[[], object], seconds: float = 15) -> None:
    """Wait for something that the page does."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
