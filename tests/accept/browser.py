"""A headless Chromium, driven over its DevTools protocol: no driver and no package beside `websockets`."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import connect

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars")


def executable() -> str | None:
    """Return where Chromium is, None where it is not installed."""
    return next((found for name in _NAMES if (found := shutil.which(name))), None)


class Tab:
    """One page of the browser."""

    def __init__(self, address: str) -> None:
        self._socket = connect(address, max_size=None, ping_interval=None)  # nobody reads while a server starts
        self._number = 0
        self.problems: list[str] = []
        """Uncaught errors, and what the policy of the page refused."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == self._number:
                assert "error" not in message, (method, message["error"])
                result: dict[str, Any] = message["result"]
                return result
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        if message.get("method") == "Runtime.exceptionThrown":
            details = message["params"]["exceptionDetails"]
            self.problems.append(str(details.get("exception", {}).get("description", details["text"])))
        entry = message.get("params", {}).get("entry", {})
        if message.get("method") == "Log.entryAdded" and entry["level"] == "error" and entry["source"] == "security":
            self.problems.append(entry["text"])

    def run(self, script: str) -> Any:
        """Evaluate a script, which may be a promise, and return its value."""
        found = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def open(self, url: str) -> None:
        """Load an address."""
        self.send("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def until(self, script: str, timeout_s: float = 60.0) -> Any:
        """Wait until a script yields something true, and return it."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found = self.run(script)
            if found:
                return found
            time.sleep(0.05)
        raise AssertionError(f"not within {timeout_s} s: {script}; the page: {self.run('document.body.innerText')[:2000]}")

    def click(self, selector: str) -> None:
        """Click an element with the mouse."""
        self.until(f"!!document.querySelector({json.dumps(selector)})")
        script = f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});"
        at = self.run(f"{script} const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; }})()")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], button="left", clickCount=1)

    def type(self, selector: str, text: str) -> None:
        """Put a text into a field, as a person does."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.run(f"document.querySelector({json.dumps(selector)}).select?.()")
        self.send("Input.insertText", text=text)

    def choose(self, selector: str, value: str) -> None:
        """Choose in a list, or tick a box."""
        script = "e.value = v; e.dispatchEvent(new Event('change', {bubbles: true}));"
        self.run(f"((e, v) => {{ {script} }})(document.querySelector({json.dumps(selector)}), {json.dumps(value)})")

    def text(self, selector: str = "main") -> str:
        """Return the text of an element as it is seen."""
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Write what is seen as PNG; `whole`: the page to its end."""
        found = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def browser(width: int = 1280, height: int = 900) -> Iterator[Callable[[], Tab]]:
    """Start Chromium; yields what opens a new tab."""
    found = executable()
    assert found is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ("--remote-debugging-port=0", f"--user-data-dir={profile}", f"--window-size={width},{height}")
        process = subprocess.Popen([found, *_FLAGS, *options, "about:blank"], stderr=subprocess.DEVNULL)
        try:
            port = _port(Path(profile) / "DevToolsActivePort")

            def new_tab() -> Tab:
                made = httpx.put(f"http://127.0.0.1:{port}/json/new?about:blank", trust_env=False).json()
                return Tab(made["webSocketDebuggerUrl"])

            yield new_tab
        finally:
            process.terminate()
            process.wait(20)


def _port(path: Path) -> int:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if path.exists() and (lines := path.read_text().splitlines()):
            return int(lines[0])
        time.sleep(0.05)
    raise AssertionError("Chromium did not start")
