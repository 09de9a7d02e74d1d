"""A headless Chromium, driven through its DevTools protocol over a pipe: no port, no driver, no dependency.

Messages are JSON texts ended by a NUL byte, in on descriptor 3 and out on descriptor 4 of the browser
(`--remote-debugging-pipe`).
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import selectors
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # continuous integration runs as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
    "--remote-debugging-pipe",
)
_PATIENCE = 60.0


class Browser:
    """`send` waits for a command's answer; events that come meanwhile are kept in `events`."""

    def __init__(self, program: str) -> None:
        self.home = tempfile.mkdtemp(prefix="planc-chromium-")
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # the descriptors may themselves be 3 or 4: move them out of the way first
        high = [os.dup2(fd, number) for fd, number in ((theirs_in, 103), (theirs_out, 104))]
        actions = [(os.POSIX_SPAWN_DUP2, high[0], 3), (os.POSIX_SPAWN_DUP2, high[1], 4)]
        quiet = os.open(os.devnull, os.O_WRONLY)
        actions.append((os.POSIX_SPAWN_DUP2, quiet, 2))
        self.process = os.posix_spawn(
            program,
            [program, *_FLAGS, f"--user-data-dir={self.home}", "about:blank"],
            os.environ,
            file_actions=actions,
            setpgroup=0,
        )
        for fd in (theirs_in, theirs_out, *high, quiet):
            os.close(fd)
        self._numbers = itertools.count(1)
        self._rest = b""
        self._reader = selectors.DefaultSelector()
        self._reader.register(self._in, selectors.EVENT_READ)
        self.events: list[dict[str, Any]] = []

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of one command. Raises RuntimeError with the browser's words when it refuses."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + _PATIENCE
        while True:
            found = self._receive(until)
            if found.get("id") == number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']['message']}")
                return dict(found["result"])
            self.events.append(found)

    def wait(self, method: str, session: str) -> None:
        """Until an event of this name has come."""
        until = time.monotonic() + _PATIENCE
        while not any(e.get("method") == method and e.get("sessionId") == session for e in self.events):
            self.events.append(self._receive(until))

    def _receive(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not self._reader.select(max(until - time.monotonic(), 0.0)):
                raise TimeoutError("the browser does not answer")
            piece = os.read(self._in, 1 << 20)
            if not piece:
                raise RuntimeError("the browser has ended")
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))

    def close(self) -> None:
        os.close(self._out)
        os.close(self._in)
        with suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGTERM)
        os.waitpid(self.process, 0)
        shutil.rmtree(self.home, ignore_errors=True)


class Page:
    """One open page: what it requested, what went wrong, and its content through scripts."""

    def __init__(self, browser: Browser, file: Path, width: int, dark: bool = False) -> None:
        self.browser = browser
        browser.events.clear()
        target = browser.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._do(f"{domain}.enable")
        self._do(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = "dark" if dark else "light"
        self._do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._do("Page.navigate", url=file.as_uri())
        browser.wait("Page.loadEventFired", self.session)

    def _do(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.send(method, self.session, **params)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, as JSON."""
        found = self._do("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    @property
    def requests(self) -> list[str]:
        events = self._events("Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in events]

    @property
    def complaints(self) -> list[str]:
        """Errors, warnings and messages of the console."""
        said = [event["params"]["entry"]["text"] for event in self._events("Log.entryAdded")]
        said += [str(event["params"]["args"]) for event in self._events("Runtime.consoleAPICalled")]
        return said + [str(event["params"]) for event in self._events("Runtime.exceptionThrown")]

    def _events(self, method: str) -> list[dict[str, Any]]:
        self.run("0")  # an answer comes after all events before it
        mine = [e for e in self.browser.events if e.get("sessionId") == self.session]
        return [event for event in mine if event.get("method") == method]

    def screenshot(self, file: Path) -> None:
        """The whole page as a PNG."""
        found = self._do("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def browser(program: str) -> Iterator[Browser]:
    found = Browser(program)
    try:
        yield found
    finally:
        found.close()
