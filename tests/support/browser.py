"""A headless Chromium over its own pipe: no driver, no port, no package."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--mute-audio",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--autoplay-policy=no-user-gesture-required",
    "--remote-debugging-pipe",
)
DEADLINE = 90.0  # seconds for one answer of a browser on a busy machine


def chromium() -> str | None:
    """The command of an installed Chromium; None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Tab:
    """A page that is open, with what it logged and what it asked for."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back = to, back
        self._numbers = itertools.count(1)
        self._read = b""
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + DEADLINE
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._back], [], [], max(0, until - time.monotonic()))
            assert ready, "the browser does not answer"
            part = os.read(self._back, 1 << 16)
            assert part, "the browser went away"
            self._read += part
        message, _, self._read = self._read.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def open(self, page: Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        if self._session is None:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        self.wait("document.readyState === 'complete'")

    def evaluate(self, source: str) -> Any:
        """What an expression of JavaScript gives in the page."""
        result = self.call(
            "Runtime.evaluate", expression=source, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, source: str, seconds: float = 60.0) -> None:
        """Waits until an expression is true."""
        until = time.monotonic() + seconds
        while not self.evaluate(source):
            assert time.monotonic() < until, f"never true: {source}"
            time.sleep(0.05)

    def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code)

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, violations of the page's policy included."""
        self.evaluate("1")
        found = []
        for event in self.events:
            method, data = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(str(data["exceptionDetails"]))
            if method == "Runtime.consoleAPICalled" and data["type"] in ("error", "warning"):
                found.append(str(data["args"]))
            if method == "Log.entryAdded" and data["entry"]["level"] in ("error", "warning"):
                found.append(data["entry"]["text"])
        return found

    def requests(self) -> set[str]:
        """The schemes of all addresses that the page asked for."""
        asked = [x for x in self.events if x.get("method") == "Network.requestWillBeSent"]
        return {x["params"]["request"]["url"].partition(":")[0] for x in asked}

    def screenshot(self, file: Path) -> None:
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browser(profile: Path) -> Iterator[Tab]:
    command = chromium()
    assert command is not None
    read_there, to = os.pipe()
    back, write_there = os.pipe()

    def at_three_and_four() -> None:
        # Both may already be 3 or 4: move them out of the way first.
        high = os.dup2(read_there, 100), os.dup2(write_there, 101)
        os.dup2(high[0], 3)
        os.dup2(high[1], 4)

    process = subprocess.Popen(
        [command, *FLAGS, f"--user-data-dir={profile}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        close_fds=False,
        preexec_fn=at_three_and_four,
    )
    os.close(read_there)
    os.close(write_there)
    tab = Tab(to, back)
    try:
        yield tab
        tab._session = None
        tab.call("Browser.close")
        process.wait(20)
    finally:
        process.kill()
        process.wait()
        os.close(to)
        os.close(back)
