"""Ctrl-C that stops an answer, and not the program."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupts:
    """A context in which Ctrl-C raises KeyboardInterrupt only inside `heard` blocks.

    The first Ctrl-C ends a block. Later ones, and those between two blocks, are ignored, because
    they would end the program while it cleans up. If the program was started with Ctrl-C ignored
    (nohup), nothing changes.
    """

    def __init__(self) -> None:
        self._is_heard = False
        self._before: object = None

    def __enter__(self) -> "Interrupts":
        # only the main thread may set handlers
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    @contextmanager
    def heard(self) -> Iterator[None]:
        """A block that the first Ctrl-C ends by a KeyboardInterrupt."""
        self._is_heard = True
        try:
            yield
        finally:
            self._is_heard = False

    def _interrupt(self, _number: int, _frame: object) -> None:
        if self._is_heard:
            self._is_heard = False
            raise KeyboardInterrupt
