"""What every tool's command line has in common: errors of one line, and exit codes."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from npllama.errors import InputError, NpllamaError

WRONG_INPUT, INTERRUPTED = 2, 130


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line that begin with the tool's name."""

    def __init__(self, tool: str, description: str, **settings: object) -> None:
        super().__init__(prog=f"python tools/{tool}.py", description=description, **settings)
        self.tool = tool

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_INPUT, f"{self.tool}: error: {message} (--help lists all options)\n")


def say(text: str) -> None:
    """A line on standard output.

    Raises:
        InputError: it cannot be written, as a closed pipe or a full disk.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more
        raise InputError(f"standard output cannot be written: {error.strerror}") from None


def exit_code(
    tool: str, work: Callable[[], None], interrupted: Callable[[], str] = lambda: "interrupted"
) -> int:
    """Do the work; the exit code: 0, 2 after input that cannot be served, 130 after Ctrl-C, the
    last two with one line on stderr that says why."""
    try:
        work()
    except NpllamaError as error:
        print(f"{tool}: error: {error}", file=sys.stderr)
        return WRONG_INPUT
    except MemoryError as error:
        reason = f" ({error})" if str(error) else ""
        print(f"{tool}: error: out of memory{reason}: use a smaller model", file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print(f"{tool}: {interrupted()}", file=sys.stderr)
        return INTERRUPTED
    return 0
