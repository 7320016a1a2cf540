"""Signals in a chat: Ctrl-C stops an answer and not the program.

SIGTERM and SIGHUP end the program after it has saved its work.
"""

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


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """A block that the first SIGTERM or SIGHUP (a closed terminal) ends by SystemExit.

    The block can thus save its work. Later signals are ignored, because a closed terminal may send
    two. A signal that was ignored before (nohup) stays ignored.
    """
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    is_main = threading.current_thread() is threading.main_thread()
    ours = [number for number in numbers if is_main and before[number] == signal.SIG_DFL]

    def end(number: int, _frame: object) -> None:
        for each in ours:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    try:
        for number in ours:
            signal.signal(number, end)
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])
