"""A headless Chromium, driven over its own debugging protocol."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import websocket

EXECUTABLE = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """A browser of its own, of which the tab that was opened last is driven.

    Args:
        folder: for its profile.
        width, height: of the window, in pixels.
    """

    def __init__(self, folder: Path, width: int = 1600, height: int = 1000) -> None:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
        options += ["--disable-background-networking", "--disable-dev-shm-usage", "--remote-debugging-port=0"]
        options += ["--remote-allow-origins=*", f"--user-data-dir={folder}", f"--window-size={width},{height}"]
        self.process = subprocess.Popen(
            [EXECUTABLE, *options, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        port_file = folder / "DevToolsActivePort"
        self._wait(lambda: port_file.exists() and port_file.read_text().count("\n"), "Chromium did not start")
        port, path = port_file.read_text().split("\n")[:2]
        self._socket = websocket.create_connection(f"ws://127.0.0.1:{port}{path}", timeout=120)
        self._count, self._session = 0, None
        self._size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}

    def open(self, url: str) -> None:
        """Go to an address, in a new tab: an old one might ask whether to leave."""
        self._session = None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._call("Emulation.setDeviceMetricsOverride", **self._size)
        self._call("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; promises are waited for."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:1000])
        return answer["result"].get("value")

    def until(self, script: str, seconds: float = 60) -> Any:
        """Wait until an expression is true, and return it."""
        return self._wait(lambda: self.run(script), f"never true: {script}", seconds)

    def type(self, text: str) -> None:
        """As from a keyboard, into what has the focus."""
        self._call("Input.insertText", text=text)

    def double_click(self, x: float, y: float) -> None:
        """The left button, twice."""
        for count in (1, 2):
            for kind in ("mousePressed", "mouseReleased"):
                self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=count)

    def screenshot(self, path: Path) -> None:
        """The window as PNG."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """End the browser."""
        self._socket.close()
        self.process.terminate()
        self.process.wait(20)

    def _call(self, method: str, **parameters: Any) -> Any:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv())
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    @staticmethod
    def _wait(condition: Any, message: str, seconds: float = 60) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            value = condition()
            if value:
                return value
            time.sleep(0.2)
        raise TimeoutError(message)
