"""Handles Ctrl-C, SIGTERM and SIGHUP alike: the program cleans up, and writes one line."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # not every system has all three
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """One of the three signals. Its exit code is the one that shells expect for the signal."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted in the block when one of the signals arrives.

    A signal that was ignored before (nohup) stays ignored.
    """

    def interrupt(number: int, _frame: object) -> NoReturn:
        raise Interrupted(number)

    with _handled_by(interrupt):
        yield


class Pending:
    """Records whether one of the signals has arrived.

    Attributes:
        number: number of the signal; None if none has arrived.
    """

    number: int | None = None

    def check(self) -> None:
        """Raise Interrupted if a signal has arrived."""
        if self.number is not None:
            raise Interrupted(self.number)


@contextmanager
def deferred(came: Callable[[], object]) -> Iterator[Pending]:
    """Record the first signal instead of raising, so that the block can check for it. A second
    signal raises Interrupted at once.

    Args:
        came: called when the first signal arrives.
    """
    pending = Pending()

    def note(number: int, _frame: object) -> None:
        pending.check()
        pending.number = number
        with suppress(RuntimeError):  # the signal interrupted a write to standard error
            came()

    with _handled_by(note):
        yield pending


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore the signals in the block, which should be short."""
    with _handled_by(signal.SIG_IGN):
        yield


@contextmanager
def _handled_by(handler: Callable[[int, Any], Any] | signal.Handlers) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # others cannot set handlers
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    ours = [number for number, was in before.items() if was not in (signal.SIG_IGN, None)]
    try:
        for number in ours:
            signal.signal(number, handler)
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])
