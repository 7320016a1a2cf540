"""Progress on a terminal: one line with the time left, for work longer than `SILENCE`."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from npllama.progress import Work, on_progress

SILENCE = 2.0
"""Seconds of work before the first line."""
INTERVAL = 0.2
"""Seconds between updates of the line."""


class ProgressLine:
    """A listener for `on_progress`. It rewrites one terminal line and erases it at the end."""

    def __init__(self, program: str, stream: TextIO, clock: Callable[[], float]) -> None:
        self.program, self.stream, self.clock = program, stream, clock
        self._work: Work | None = None
        self._width = 0

    def __call__(self, work: Work) -> None:
        now = self.clock()
        if work is not self._work:
            self._work, self._began, self._due = work, now, now + SILENCE
        if work.is_over:
            self._erase()
        elif now >= self._due:
            self._due = now + INTERVAL
            self._draw(work, now - self._began)

    def _draw(self, work: Work, seconds: float) -> None:
        line = f"{self.program}: {work.what}"
        if work.done:
            from tqdm import tqdm  # here, because most runs draw nothing

            left = seconds * (work.total - work.done) / work.done
            line += f", {work.done / work.total:.0%}, {tqdm.format_interval(left)} left"
        self._write(f"\r{line.ljust(self._width)}")
        self._width = max(self._width, len(line))

    def _erase(self) -> None:
        if self._width:
            self._write(f"\r{' ' * self._width}\r")
        self._width = 0

    def _write(self, text: str) -> None:
        with suppress(OSError):  # the work should continue even if the terminal is gone
            self.stream.write(text)
            self.stream.flush()


@contextmanager
def progress_shown(
    program: str, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[None]:
    """Show the progress of long work on `stream` (default: standard error) if it is a terminal.

    Args:
        program: the start of the line.
    """
    stream = stream or sys.stderr
    if stream is None or not stream.isatty():
        yield
        return
    with on_progress(ProgressLine(program, stream, clock)):
        yield
