"""A program at a terminal of its own, typed at by a test."""

import codecs
import os
import pty
import select
import subprocess
import sys
import time

_SECONDS = 60  # until a test gives up waiting

# the terminal becomes the one whose Ctrl-C the program gets
_START = (
    "import fcntl, runpy, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


class Terminal:
    """`python -m module args` with a terminal as its three streams.

    Attributes:
        shown: all that it has shown.
    """

    def __init__(self, module, *args, **environment):
        self._end, end = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, module, *args],
            stdin=end,
            stdout=end,
            stderr=end,
            start_new_session=True,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "80"} | environment,
        )
        os.close(end)
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.shown = ""
        self._read = 0

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self._process.kill()
        self._process.wait()
        os.close(self._end)

    def type(self, text):
        os.write(self._end, text.encode())

    def wait_for(self, text, more=0):
        """What it shows until `text` and so many further characters."""
        deadline = time.monotonic() + _SECONDS
        while (at := self.shown.find(text, self._read)) < 0 or len(self.shown) < at + more:
            assert time.monotonic() < deadline, f"{text!r} is not in {self.shown[self._read :]!r}"
            assert self._receive(), f"it ended after {self.shown[self._read :]!r}"
        part = self.shown[self._read : at + len(text) + more]
        self._read += len(part)
        return part

    def interrupt_until(self, text):
        """Type Ctrl-C and wait for `text`; again where nothing happens, since readline misses one
        that comes just before it waits for a key."""
        while self.shown.find(text, self._read) < 0:
            self.type("\x03")
            while self._receive(seconds=1) and self.shown.find(text, self._read) < 0:
                pass
        return self.wait_for(text)

    def exit_code(self):
        """Its exit code, once it has ended by itself."""
        while self._receive():
            pass
        return self._process.wait(_SECONDS)

    def _receive(self, seconds=_SECONDS):
        if not select.select([self._end], [], [], seconds)[0]:
            return False
        try:
            content = os.read(self._end, 65536)
        except OSError:  # the program has ended
            return False
        self.shown += self._decode(content)
        return bool(content)
