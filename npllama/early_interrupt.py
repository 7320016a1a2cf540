"""Ctrl-C while a program is still importing its modules: the process ends without a traceback.

Python turns Ctrl-C into a KeyboardInterrupt. A program cannot handle it before its imports are
done. Until then no file is open or half-written, so the system may end the process.
"""

import signal
import threading

_is_set = False


def end_at_once() -> None:
    """Make Ctrl-C end the process, as it does for a program that does not handle the signal.

    If the signal is ignored (nohup) or already has another handler, nothing changes.
    """
    global _is_set
    is_main = threading.current_thread() is threading.main_thread()  # others cannot set handlers
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _is_set = True


def handle_again() -> None:
    """Undo `end_at_once`: Ctrl-C raises KeyboardInterrupt again."""
    global _is_set
    if _is_set:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _is_set = False
