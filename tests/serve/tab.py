"""A tab of a real headless Chromium with the studio in it, driven as a person would: keys, clicks, looking."""

from __future__ import annotations

import io
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

T = TypeVar("T")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Each picture's looks and each bar's steps, as they come and go faster than a test can look.
WATCH = """
window.seen = {steps: {}, looks: new Set(), texts: new Set()};
new MutationObserver(() => document.querySelectorAll("#stage figure").forEach((figure, place) => {
  const bar = figure.querySelector("progress"), image = figure.querySelector("img");
  if (bar) (seen.steps[place] ??= new Set()).add(bar.value);
  if (image) seen.looks.add(`${place} ${image.src}`);
  if (!image && figure.textContent) seen.texts.add(figure.textContent);
})).observe(document.getElementById("stage"), {subtree: true, childList: true, attributes: true, characterData: true});
"""


def programs() -> tuple[str, str] | None:
    """The paths of a Chromium and its driver, None where one is missing."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


@contextmanager
def chromium(folder: Path, browser: str, driver: str) -> Iterator[webdriver.Chrome]:
    """A Chromium that knows no other host than this machine and keeps everything below the folder."""
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--no-first-run",
        f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):  # fmt: skip
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(folder / "saved")})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    running = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield running
    finally:
        running.quit()


class Tab:
    """The studio, freshly opened by somebody who was never there."""

    def __init__(self, driver: webdriver.Chrome, address: str, saved: Path) -> None:
        self.driver, self.address, self._saved = driver, address, saved
        driver.get("about:blank")
        origin = "/".join(address.split("/")[:3])
        self.tell("Storage.clearDataForOrigin", origin=origin, storageTypes="all")
        self.look(1280, 900)
        for kind in ("browser", "performance"):
            driver.get_log(kind)
        self.open()

    def tell(self, command: str, **arguments: Any) -> dict[str, Any]:
        """A command of Chromium's own protocol."""
        answer: dict[str, Any] = self.driver.execute_cdp_cmd(command, arguments)
        return answer

    def look(self, width_px: int, height_px: int, dark: bool = False, touch: bool = False) -> None:
        """From a screen of that size and taste."""
        self.tell(
            "Emulation.setDeviceMetricsOverride", width=width_px, height=height_px, deviceScaleFactor=1, mobile=touch
        )
        self.tell("Emulation.setTouchEmulationEnabled", enabled=touch)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tell("Emulation.setEmulatedMedia", features=[scheme])

    def open(self) -> None:
        """Opens the page, or loads it anew; it knows its models afterwards, or asks for a key."""
        self.driver.get(self.address + "/")
        self.until(
            lambda: self.value("model") or self.find("#key-form").is_displayed() or self.status(), "it never started"
        )
        self.run(WATCH)

    def run(self, script: str, *arguments: Any) -> Any:
        """What the script returns; it may await."""
        return self.driver.execute_script(f"return (async () => {{ {script} }})()", *arguments)

    def until(self, condition: Callable[[], T], otherwise: str, timeout_s: float = 60.0) -> T:
        """What the condition is once it is true."""
        end = time.monotonic() + timeout_s
        while not (found := condition()):
            assert time.monotonic() < end, f"{otherwise}; the page says {self.status()!r}"
            time.sleep(0.02)
        return found

    def find(self, css: str) -> WebElement:
        """The first such element."""
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def all(self, css: str) -> list[WebElement]:
        """Every such element."""
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def value(self, field: str) -> str:
        """Of a field of the form."""
        return str(self.run("return document.getElementById(arguments[0]).value", field))

    def set(self, **fields: object) -> None:
        """Types into fields, or chooses from them."""
        for field, value in fields.items():
            element = self.find(f"#{field}")
            if element.tag_name == "select":
                element.find_element(By.CSS_SELECTOR, f"option[value='{value}']").click()
            else:
                element.clear()
                element.send_keys(str(value))

    def choose_mode(self, mode: str) -> None:
        """one, pair or blind."""
        self.find(f"[name=mode][value={mode}]").click()

    def press(self, *keys: str) -> None:
        """Keys, where the focus is."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def status(self) -> str:
        """The sentence above the pictures."""
        return str(self.run("return document.querySelector('.told')?.innerText.trim() ?? ''"))

    def begin(self) -> None:
        """Starts a drawing by the keyboard."""
        self.find("#prompt").send_keys(Keys.CONTROL, Keys.ENTER)

    def draw(self, **fields: object) -> None:
        """A whole drawing, with these settings."""
        self.set(**fields)
        self.begin()
        self.until(lambda: re.search(r"pictures? in [\d.]", self.status()), "the drawing never ended")

    def seen(self) -> tuple[dict[str, list[int]], list[str], list[str]]:
        """(place -> steps its bar showed, looks of pictures, texts in empty places) since the page was opened."""
        return tuple(  # type: ignore[return-value]
            self.run(
                "return [Object.fromEntries(Object.entries(seen.steps).map(([k, v]) => [k, [...v]])), [...seen.looks], [...seen.texts]]"
            )
        )

    def captions(self) -> list[str]:
        """Below the pictures."""
        return [caption.text for caption in self.all("#stage figcaption")]

    def save(self, place: int = 0) -> tuple[str, Image.Image]:
        """(name, picture) of the file that a click on Save writes."""
        link = self.all("#stage figcaption a")[place]
        file = self._saved / str(link.get_attribute("download"))
        file.unlink(missing_ok=True)
        link.click()
        self.until(file.exists, f"{file.name} was never saved")
        picture = Image.open(io.BytesIO(file.read_bytes()))
        picture.load()
        return file.name, picture

    def requested(self) -> list[str]:
        """The addresses that were asked for since this was last called."""
        logged = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [one["params"]["request"]["url"] for one in logged if one["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """What Chromium's console holds since this was last called."""
        return [entry["message"] for entry in self.driver.get_log("browser")]
