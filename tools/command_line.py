"""What every tool's command line has in common: errors of one line, and exit codes."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from npllama.console import reason, tell, write
from npllama.errors import NpllamaError

WRONG_INPUT, INTERRUPTED = 2, 130


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line that begin with the tool's name."""

    def __init__(self, tool: str, description: str, **settings: object) -> None:
        super().__init__(prog=f"python tools/{tool}.py", description=description, **settings)
        self.tool = tool

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_INPUT, f"{self.tool}: error: {message} (--help lists all options)\n")


def named_path(text: str) -> Path:
    """An argument that names a file or directory.

    Raises:
        argparse.ArgumentTypeError: it is empty, which Path takes for the current directory.
    """
    if not text:
        raise argparse.ArgumentTypeError("it is empty: expected the name of a file or directory")
    return Path(text)


def say(text: str) -> None:
    """A line on standard output.

    Raises:
        InputError: it cannot be written: closed, a pipe without a reader, or a full disk.
    """
    write(text + "\n")


def exit_code(
    tool: str, work: Callable[[], None], interrupted: Callable[[], str] = lambda: "interrupted"
) -> int:
    """Do the work; the exit code: 0, 2 after an error, 130 after Ctrl-C (or that of another
    signal), the last two with one line on stderr that says why."""
    try:
        work()
    except NpllamaError as error:
        tell(f"{tool}: error: {error}")
        return WRONG_INPUT
    except MemoryError as error:
        why = f" ({error})" if str(error) else ""
        tell(f"{tool}: error: out of memory{why}: use a smaller model")
        return WRONG_INPUT
    except KeyboardInterrupt as error:
        tell(f"{tool}: {interrupted()}")
        return getattr(error, "exit_code", INTERRUPTED)
    except OSError as error:
        tell(f"{tool}: error: {reason(error)}")
        return WRONG_INPUT
    return 0
