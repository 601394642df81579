"""A headless Chromium, driven over chromedriver's own HTTP (WebDriver): no package is needed.

https://www.w3.org/TR/webdriver2/ says what the paths below mean.
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
    """Skip where there is no Chromium with its driver; fail there in continuous integration."""
    if CHROME and DRIVER:
        return
    missing = "there is no chromium with chromedriver"
    if os.environ.get("CI"):
        pytest.fail(f"{missing}, and CI is set")
    pytest.skip(missing)


class Browser:
    """One window. `do` runs JavaScript in it; what it returns comes back as plain values."""

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
            ],
        }
        capabilities = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self._session = f"/session/{made['sessionId']}"

    def close(self) -> None:
        self._call("DELETE", self._session)

    def open(self, page: Path) -> None:
        self._call("POST", f"{self._session}/url", {"url": page.resolve().as_uri()})

    def size(self, width: int, height: int, *, dark: bool = False) -> None:
        """The viewport in CSS pixels, and what the reader's system prefers."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme, still])

    def do(self, script: str, *arguments: Any) -> Any:
        content = {"script": script, "args": list(arguments)}
        return self._call("POST", f"{self._session}/execute/sync", content)

    def wait(self, script: str, *arguments: Any) -> Any:
        """As `do`, for scripts that call `arguments[arguments.length - 1]` when they are done."""
        content = {"script": script, "args": list(arguments)}
        return self._call("POST", f"{self._session}/execute/async", content)

    def click(self, selector: str) -> None:
        """A real click in the middle of the element, which must be in reach."""
        found = {"using": "css selector", "value": selector}
        element = self._call("POST", f"{self._session}/element", found)[ELEMENT]
        self._call("POST", f"{self._session}/element/{element}/click", {})

    def press(self, *keys: str) -> None:
        """Keys pressed one after the other where the focus is."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        content = {"actions": [{"type": "key", "id": "keys", "actions": actions}]}
        self._call("POST", f"{self._session}/actions", content)

    def console(self) -> list[str]:
        """What the console has said since the last time."""
        return [entry["message"] for entry in self._log("browser")]

    def requested(self) -> list[str]:
        """The addresses of everything that was asked for since the last time, but data URIs."""
        events = [json.loads(entry["message"])["message"] for entry in self._log("performance")]
        asked = [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return [address for address in asked if not address.startswith("data:")]

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        options: dict[str, Any] = {"format": "png", "captureBeyondViewport": whole}
        if whole:
            box = self.devtools("Page.getLayoutMetrics")["cssContentSize"]
            options["clip"] = {**box, "scale": 1}
        path.write_bytes(
            base64.b64decode(self.devtools("Page.captureScreenshot", **options)["data"])
        )

    def devtools(self, command: str, **parameters: Any) -> Any:
        content = {"cmd": command, "params": parameters}
        return self._call("POST", f"{self._session}/goog/cdp/execute", content)

    def _log(self, kind: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._call("POST", f"{self._session}/se/log", {"type": kind})
        return found

    def _call(self, method: str, path: str, content: Any = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self._address + path, data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()[:2000]) from None


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser with a profile of its own; it and its driver end with the block."""
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
