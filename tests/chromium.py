"""Chromium without a window, driven over the DevTools protocol by two pipes: no package needed."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from contextlib import contextmanager, suppress

# Its descriptors 3 and 4 are the pipes, whatever numbers these have here.
_START = """
import fcntl, os, sys
for there, here in zip((3, 4), [fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]]):
    os.dup2(here, there)
os.execv(sys.argv[3], sys.argv[3:])
"""
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find_chromium():
    """The path of a Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One browser with one page.

    Commands go in and messages come out as JSON, each ended by a NUL, on the descriptors 3 and 4
    of the browser's process.
    """

    def __init__(self, write, read):
        self._write, self._read, self._rest, self._number = write, read, b"", 0
        self.events = deque()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """The result of a command; events that come before it are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if getattr(self, "_session", None):
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def _message(self):
        while b"\0" not in self._rest:
            part = os.read(self._read, 2**20)
            if not part:
                raise RuntimeError("the browser has ended")
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def evaluate(self, expression):
        """The value of a JavaScript expression in the page."""
        got = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in got:
            raise RuntimeError(f"{expression}: {got['exceptionDetails']}")
        return got["result"].get("value")

    def open(self, path, width, height=900, scheme="light", script=True):
        """Show a file in a window of this size, and wait until it is laid out."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())
        if script:  # two frames: styles and images are done
            frames = "new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))"
            self.evaluate(f"{frames}.then(() => true)")

    def complaints(self):
        """Errors and warnings of the console since the page was opened."""
        said = []
        for event in self.events:
            params = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                said.append(str(params["exceptionDetails"]))
            if event["method"] == "Runtime.consoleAPICalled" and params["type"] != "log":
                said.append(str(params["args"]))
            if event["method"] == "Log.entryAdded":
                said.append(params["entry"]["text"])
        return said

    def requests(self):
        """Addresses that were asked for since the page was opened."""
        sent = (e for e in self.events if e["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]


@contextmanager
def browser(path, profile, timeout=50):
    """A running Browser; its process ends with the block.

    Args:
        path: of Chromium.
        profile: a directory of its own.
    """
    command_read, command_write = os.pipe()
    answer_read, answer_write = os.pipe()
    options = ["--headless=new", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run"]
    options += ["--disable-dev-shm-usage", "--disable-extensions", "--mute-audio"]
    options += ["--disable-background-networking", "--disable-component-update"]
    options += ["--hide-scrollbars", f"--user-data-dir={profile}", "about:blank"]
    if os.geteuid() == 0:
        options.insert(0, "--no-sandbox")

    process = subprocess.Popen(
        [sys.executable, "-c", _START, str(command_read), str(answer_write), path, *options],
        pass_fds=(command_read, answer_write),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(command_read)
    os.close(answer_write)
    try:
        yield Browser(command_write, answer_read)
    finally:
        with suppress(OSError):
            os.write(command_write, b'{"id":0,"method":"Browser.close"}\0')
        end = time.monotonic() + 5
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(command_write)
        os.close(answer_read)
