"""A headless Chromium, driven over the HTTP interface of chromedriver without a package.

The paths are those of WebDriver, https://www.w3.org/TR/webdriver2/.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROME = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
DRIVER = shutil.which("chromedriver")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


def check_browser() -> None:
    """Skip without Chromium and its driver; in continuous integration, fail."""
    if CHROME and DRIVER:
        return
    missing = "chromium and chromedriver are not installed"
    if os.environ.get("CI"):
        pytest.fail(f"{missing}, and CI is set")
    pytest.skip(missing)


class Browser:
    """One window. `do` runs JavaScript in it and returns its result as plain values."""

    def __init__(self, address: str) -> None:
        self._address = address
        options = {
            "binary": CHROME,
            "args": [
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--disable-dev-shm-usage",
                "--force-device-scale-factor=1",
                "--use-fake-device-for-media-stream",  # a webcam with a moving test pattern
                "--use-fake-ui-for-media-stream",
            ],
        }
        capabilities = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        created = self._call("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self._session = f"/session/{created['sessionId']}"

    def close(self) -> None:
        self._call("DELETE", self._session)

    def open(self, page: Path | str) -> None:
        """Open a file or an address."""
        url = page if isinstance(page, str) else page.resolve().as_uri()
        self._call("POST", f"{self._session}/url", {"url": url})

    def size(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the viewport in CSS pixels and the color scheme that the system prefers."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        motion = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme, motion])

    def do(self, script: str, *arguments: Any) -> Any:
        content = {"script": script, "args": list(arguments)}
        return self._call("POST", f"{self._session}/execute/sync", content)

    def wait(self, script: str, *arguments: Any) -> Any:
        """Like `do`, for scripts that call `arguments[arguments.length - 1]` when they finish."""
        content = {"script": script, "args": list(arguments)}
        return self._call("POST", f"{self._session}/execute/async", content)

    def click(self, selector: str) -> None:
        """Click in the middle of the element, which must be visible."""
        for attempt in range(3):
            try:
                self._call("POST", f"{self._element(selector)}/click", {})
                return
            except RuntimeError as error:
                # The page has just drawn the element again.
                if "stale element" not in str(error) or attempt == 2:
                    raise

    def upload(self, selector: str, path: Path) -> None:
        """Choose a file in an input of type file."""
        self._call("POST", f"{self._element(selector)}/value", {"text": str(path.resolve())})

    def drag(self, selector: str, *points: tuple[float, float]) -> None:
        """Press the mouse on an element and move it; points are shares of its width and height."""
        left, top, width, height = self.do(
            "const e = document.querySelector(arguments[0]);"
            "e.scrollIntoView({block: 'center'});"
            "const b = e.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]",
            selector,
        )
        moves = [
            {
                "type": "pointerMove",
                "duration": 20,
                "x": round(left + x * width),
                "y": round(top + y * height),
            }
            for x, y in points
        ]
        down, up = {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}
        pointer = {"type": "pointer", "id": "mouse", "actions": [moves[0], down, *moves[1:], up]}
        self._call("POST", f"{self._session}/actions", {"actions": [pointer]})

    def until(self, script: str, *arguments: Any, seconds: float = 60) -> Any:
        """Run `do` until it returns something true, and return that."""
        end = time.monotonic() + seconds
        while not (result := self.do(script, *arguments)):
            assert time.monotonic() < end, f"never true: {script}; console: {self.console()}"
            time.sleep(0.02)
        return result

    def _element(self, selector: str) -> str:
        query = {"using": "css selector", "value": selector}
        element = self._call("POST", f"{self._session}/element", query)[ELEMENT]
        return f"{self._session}/element/{element}"

    def press(self, *keys: str) -> None:
        """Press keys one after the other, where the focus is."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        content = {"actions": [{"type": "key", "id": "keys", "actions": actions}]}
        self._call("POST", f"{self._session}/actions", content)

    def console(self) -> list[str]:
        """Return the console messages since the last call."""
        return [entry["message"] for entry in self._log("browser")]

    def requested(self) -> list[str]:
        """Return the addresses requested since the last call, without data URIs."""
        events = [json.loads(entry["message"])["message"] for entry in self._log("performance")]
        addresses = [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return [address for address in addresses if not address.startswith("data:")]

    def screenshot(self, path: Path, *, full_page: bool = False) -> None:
        options: dict[str, Any] = {"format": "png", "captureBeyondViewport": full_page}
        if full_page:
            box = self.devtools("Page.getLayoutMetrics")["cssContentSize"]
            options["clip"] = {**box, "scale": 1}
        path.write_bytes(
            base64.b64decode(self.devtools("Page.captureScreenshot", **options)["data"])
        )

    def devtools(self, command: str, **parameters: Any) -> Any:
        content = {"cmd": command, "params": parameters}
        return self._call("POST", f"{self._session}/goog/cdp/execute", content)

    def _log(self, kind: str) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = self._call(
            "POST", f"{self._session}/se/log", {"type": kind}
        )
        return entries

    def _call(self, method: str, path: str, content: Any = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self._address + path, data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()[:2000]) from None


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Start a browser with a fresh profile; it and its driver end with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        driver = subprocess.Popen(
            [str(DRIVER), f"--port={port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": home},
        )
        try:
            for _ in range(200):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.1)
            window = Browser(f"http://127.0.0.1:{port}")
            try:
                yield window
            finally:
                window.close()
        finally:
            driver.terminate()
            driver.wait(timeout=20)
