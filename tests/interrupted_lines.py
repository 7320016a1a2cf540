"""Ctrl-C at any line of a module."""

import sys
from collections.abc import Callable, Collection
from pathlib import Path


def interrupted_at_line(at: int, run: Callable[[], object], modules: Collection[str]) -> bool:
    """Run, with a KeyboardInterrupt at the at-th line of modules of the library; whether there
    are so many."""
    n_lines = 0

    def trace_lines(frame, event, arg):
        nonlocal n_lines
        n_lines += event == "line"
        if event == "line" and n_lines == at:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace_lines

    def trace_calls(frame, event, arg):
        path = Path(frame.f_code.co_filename)
        return trace_lines if path.parent.name == "npllama" and path.name in modules else None

    before = sys.gettrace()
    sys.settrace(trace_calls)
    try:
        run()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return n_lines >= at
