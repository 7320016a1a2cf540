"""Ctrl-C, a closed terminal and a polite kill end a program alike: cleaned up, with one line."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # not every system has all three
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """One of the three signals, with the exit code that shells expect of it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


@contextmanager
def interruptible() -> Iterator[None]:
    """Each of the signals raises Interrupted within the block.

    A signal that is ignored already (nohup) stays ignored.
    """

    def interrupt(number: int, _frame: object) -> NoReturn:
        raise Interrupted(number)

    with _handled_by(interrupt):
        yield


class Pending:
    """Whether one of the signals has come.

    Attributes:
        number: of the signal; None before.
    """

    number: int | None = None

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.number is not None:
            raise Interrupted(self.number)


@contextmanager
def deferred(came: Callable[[], object]) -> Iterator[Pending]:
    """The first of the signals waits until the block checks for it; a second one raises
    Interrupted at once.

    Args:
        came: called when the first one comes.
    """
    pending = Pending()

    def note(number: int, _frame: object) -> None:
        pending.check()
        pending.number = number
        with suppress(RuntimeError):  # it came in the middle of another line of standard error
            came()

    with _handled_by(note):
        yield pending


@contextmanager
def uninterrupted() -> Iterator[None]:
    """None of the signals is heard within the block, which should be a short one."""
    with _handled_by(signal.SIG_IGN):
        yield


@contextmanager
def _handled_by(handler: Callable[[int, Any], Any] | signal.Handlers) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
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
