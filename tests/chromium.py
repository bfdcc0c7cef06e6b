"""Chromium without a window, driven over its debugging pipe: real keys and pointer, errors, pictures."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
PATIENCE = 60.0
# the browser reads from descriptor 3 and writes to 4; both ends are moved out of the way first
_START = (
    "import fcntl, os, sys; high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 20) for fd in sys.argv[1:3]]; "
    "[os.dup2(fd, to) for fd, to in zip(high, (3, 4))]; os.execv(sys.argv[3], sys.argv[3:])"
)
_KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39}
_KEYS |= {"ArrowDown": 40}


class Browser:
    """One page. `complaints` are uncaught errors, console errors and refusals by a policy, since it was opened."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from, self._rest, self._count = to_browser, from_browser, b"", 0
        self._session: str | None = None
        self.complaints: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda found: found.get("id") == self._count)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _until(self, is_it: Any) -> dict[str, Any]:
        while True:
            message = self._next()
            self._note(message)
            if is_it(message):
                return message

    def _next(self) -> dict[str, Any]:
        parts = [self._rest]
        while b"\0" not in parts[-1]:
            assert select.select([self._from], [], [], PATIENCE)[0], "no message from the browser"
            found = os.read(self._from, 1 << 20)
            assert found, "the browser has ended"
            parts.append(found)
        whole, _, self._rest = b"".join(parts).partition(b"\0")
        return json.loads(whole)

    def _note(self, message: dict[str, Any]) -> None:
        method, params = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"])[:400])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(params["args"])[:400])

    def open(self, path: Path, fragment: str = "") -> None:
        """Load a file's page, and wait until it is loaded."""
        self.ask("Page.navigate", url="about:blank")
        self.complaints = []
        self.ask("Page.navigate", url=path.as_uri() + fragment)
        give_up = time.monotonic() + PATIENCE
        while self.run("location.protocol + document.readyState") != "file:complete":
            assert time.monotonic() < give_up, "the page does not load"
            time.sleep(0.02)

    def show(self, page: bytes, folder: Path, fragment: str = "") -> None:
        """Write a page into a folder and open it."""
        (folder / "page.html").write_bytes(page)
        self.open(folder / "page.html", fragment)

    def run(self, expression: str) -> Any:
        """Return the value of a JavaScript expression; promises are awaited."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, *keys: str, shift: bool = False) -> None:
        """Press and release keys, one after another."""
        for key in keys:
            text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
            code = _KEYS.get(key, ord(key[0].upper()))
            said = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
            self.ask("Input.dispatchKeyEvent", type="keyDown", **said, **text)
            self.ask("Input.dispatchKeyEvent", type="keyUp", **said)

    def point(self, x: float, y: float, *, click: bool = False) -> None:
        """Move the pointer to a place of the window; `click`: click there."""
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def point_at(self, selector: str, *, click: bool = False) -> None:
        """Scroll an element into view and move the pointer to its middle; `click`: click there."""
        found = json.dumps(selector)
        box = self.run(
            f"(() => {{ const e = document.querySelector({found}); e.scrollIntoView({{block: 'center'}});"
            "const r = e.getClientRects()[0]; return [r.left + r.width / 2, r.top + r.height / 2]; })()"
        )
        self.point(*box, click=click)

    def size(self, width: int, height: int, *, scale: float = 1) -> None:
        """Set the window's size in CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self.ask("Emulation.setDeviceMetricsOverride", **size)

    def prefer(self, scheme: str, media: str = "") -> None:
        """Set the colour scheme (light or dark) and the medium (screen or print)."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.ask("Emulation.setEmulatedMedia", features=features, media=media)

    def picture(self, *, whole: bool = False) -> bytes:
        """Return the window, or the whole page, as PNG."""
        answer = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(answer["data"])

    def without_scripts(self, is_off: bool) -> None:
        """Switch the scripts of pages off or on, from the next page on."""
        self.ask("Emulation.setScriptExecutionDisabled", value=is_off)


def assert_foreign_content_is_blocked(browser: Browser, page: bytes, folder: Path) -> None:
    """Add a script, a style and a handler that the page's policy does not know; the browser must refuse and report."""
    foreign = b"<script>document.title = 'owned'</script><p style='color: red' onclick='x()'>x</p></body>"
    browser.show(page.replace(b"</body>", foreign), folder)
    assert browser.run("document.title") != "owned"
    assert any("Content Security Policy" in complaint for complaint in browser.complaints)


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Start a browser, and end it with the block."""
    (reads, to_browser), (from_browser, writes) = os.pipe(), os.pipe()
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", _START, str(reads), str(writes), str(CHROMIUM)),
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
            *("--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run", "about:blank"),
        ],
        pass_fds=(reads, writes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(reads)
    os.close(writes)
    try:
        browser = Browser(to_browser, from_browser)
        browser.size(1280, 800)
        yield browser
    finally:
        os.close(to_browser)
        os.close(from_browser)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
