"""A headless Chromium, asked through its own debugging pipe: no driver, no port, no package."""

import base64
import fcntl
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
)

_KEY_CODES = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}


def find_browser() -> str | None:
    """Returns the first of ``NAMES`` that is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a running browser."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._writes, self._reads = os.fdopen(to_browser, "wb", 0), os.fdopen(from_browser, "rb")
        self._last_id, self._session = 0, ""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._call("Page.enable")

    def open(self, place: Path | str, width: int) -> None:
        """Shows a file or an address. width: of the window, in CSS pixels."""
        wide = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **wide)
        self._call("Page.navigate", url=place if isinstance(place, str) else place.as_uri())
        while self._read().get("method") != "Page.loadEventFired":
            pass

    def prefer(self, scheme: str) -> None:
        """Sets the reader's colour scheme: ``light`` or ``dark``."""
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def evaluate(self, expression: str) -> Any:
        """Returns a JavaScript expression's value; of a promise, what it brings."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, condition: str) -> None:
        """Waits for a JavaScript condition, at most ten seconds."""
        waits = "new Promise(go => setTimeout(go, 20))"
        looks = f"for (const end = Date.now() + 1e4; Date.now() < end; await {waits}) if ({condition}) return true;"
        assert self.evaluate(f"(async () => {{ {looks} return false; }})()"), condition

    def type(self, text: str) -> None:
        """Types a text where the focus is."""
        self._call("Input.insertText", text=text)

    def press(self, key: str, text: str = "") -> None:
        """Presses and lets go a key, such as ``Enter``. text: what it types."""
        named = {"key": key, "code": key, "windowsVirtualKeyCode": _KEY_CODES[key], "text": text}
        self._call("Input.dispatchKeyEvent", type="keyDown", **named)
        self._call("Input.dispatchKeyEvent", type="keyUp", **named)

    def point(self, x: float, y: float) -> None:
        """Moves the pointer, in CSS pixels of the window."""
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def focusable(self) -> list[tuple[str, str]]:
        """Returns role and accessible name of everything that can have the focus."""
        nodes = self._call("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if any(one["name"] == "focusable" and one["value"]["value"] for one in node.get("properties", []))
        ]

    def screenshot(self) -> bytes:
        """Returns the whole page as a PNG."""
        return base64.b64decode(self._call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def _call(self, method: str, **params: object) -> dict[str, Any]:
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        self._writes.write(json.dumps(message).encode() + b"\0")
        while (found := self._read()).get("id") != self._last_id:
            pass
        assert "result" in found, found
        result: dict[str, Any] = found["result"]
        return result

    def _read(self) -> dict[str, Any]:
        data = bytearray()
        while (byte := self._reads.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser ended")
            data += byte
        found: dict[str, Any] = json.loads(data)
        return found


@contextmanager
def running_browser(program: str, profile: Path) -> Iterator[Browser]:
    """Starts a browser, and ends it. profile: an empty folder. Errors: RuntimeError where it does not start."""
    its_in, ours_out = _pipe()
    ours_in, its_out = _pipe()
    command = [program, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
    quiet = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1, 2)]
    # It reads from descriptor 3 and writes to 4.
    pipes = [(os.POSIX_SPAWN_DUP2, its_in, 3), (os.POSIX_SPAWN_DUP2, its_out, 4)]
    pid = os.posix_spawn(program, command, os.environ, file_actions=[*quiet, *pipes])
    os.close(its_in)
    os.close(its_out)
    try:
        yield Browser(ours_out, ours_in)
    finally:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)


def _pipe() -> tuple[int, int]:
    """Opens a pipe whose ends are above 9: none is one of a program's own descriptors."""
    low = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in low)
    for end in low:
        os.close(end)
    return high[0], high[1]
