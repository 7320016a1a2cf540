"""Ctrl-C while a program still imports its modules: it ends at once, without a traceback.

Python turns Ctrl-C into a KeyboardInterrupt, which no program can handle before it has imported
what handles it. Until then nothing is open or half-written, so the system may end the process.
"""

import signal
import threading

_is_set = False


def end_at_once() -> None:
    """From here on Ctrl-C ends the process, as it ends a program that does not handle it.

    Where it is ignored (nohup), or handled by somebody else, it stays so.
    """
    global _is_set
    is_main = threading.current_thread() is threading.main_thread()  # which alone may set handlers
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _is_set = True


def handle_again() -> None:
    """Undo `end_at_once`: Ctrl-C is a KeyboardInterrupt."""
    global _is_set
    if _is_set:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _is_set = False
