"""What every program shares: errors of one line, exit codes, and the three standard streams.

Streams are opened where closed, and UTF-8, with errors of their own.

A program whose standard error is closed has None as sys.stderr, and `print(..., file=None)`
writes to standard output. The next file that it opens gets the free descriptor, and whatever
writes to standard error then writes into that file.
"""

import argparse
import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from npllama.early_interrupt import handle_again
from npllama.errors import InputError, NpllamaError, exhausted

WRONG_INPUT, INTERRUPTED = 2, 130


class OutputError(InputError):
    """Standard output cannot be written."""


class ReaderLeftError(OutputError):
    """Who read standard output has closed it, as `head` does once it has its lines."""


def exit_code(
    program: str,
    work: Callable[[], int | None],
    interrupted: Callable[[], str | None] = lambda: "interrupted",
    out_of_memory: str = "use a smaller model",
) -> int:
    """Do the work; the exit code: that of the work (None is 0), 2 after an error, 130 after
    Ctrl-C (or that of another signal), the last two with one line on stderr that says why.

    What the package logs is written to stderr from then on.

    Args:
        program: how the line begins.
        interrupted: what the line says after a signal; None for no line.
        out_of_memory: what to do then.
    """
    tell_what_is_logged(program)
    try:
        handle_again()
        return work() or 0
    except NpllamaError as error:
        tell(f"{program}: error: {error}")
    except (MemoryError, RuntimeError) as error:
        if (memory := exhausted(error)) is None:
            raise
        tell(f"{program}: error: out of {memory}: {out_of_memory}")
    except OSError as error:
        tell(f"{program}: error: {reason(error)}")
    except KeyboardInterrupt as error:
        if (line := interrupted()) is not None:
            tell(f"{program}: {line}")
        return getattr(error, "exit_code", INTERRUPTED)
    return WRONG_INPUT


def open_streams() -> None:
    """Make the standard streams usable; every program's first call.

    A closed descriptor among 0, 1 and 2 is opened on the null device, so that no other file gets
    its number. sys.stdin and sys.stdout stay None where they were closed, for the program to
    refuse. Text is UTF-8 whatever the locale; on standard output, names of files go out as the
    bytes they are.
    """
    with contextlib.suppress(OSError):  # no null device, as in a bare chroot
        while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest number that is free
            os.set_inheritable(fd, True)
        os.close(fd)
    if sys.stderr is None:
        try:
            sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (never closed)
        except OSError:
            sys.stderr = io.StringIO()
    for stream, errors in ((sys.stdout, "surrogateescape"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)


def started_as(word: str, alone: str) -> str:
    """How a program's help names it: "npllama WORD" where that started it, else `alone`."""
    started = Path(sys.argv[0]).stem  # of __main__.py where it was python -m npllama
    return f"npllama {word}" if started in ("npllama", "__main__") else alone


def utf8(argument: str) -> str:
    """A command line's argument as UTF-8, whatever the locale made of its bytes.

    Raises:
        argparse.ArgumentTypeError: it is not UTF-8.
    """
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError("the text is not UTF-8") from None


def check_output() -> None:
    """Raise InputError where standard output is closed, before work that nobody could read."""
    if sys.stdout is None:
        raise InputError("standard output is closed: there is nowhere to write the text")


def write(text: str) -> None:
    """Write `text` to standard output at once.

    Raises:
        ReaderLeftError: the other end of a pipe is closed.
        InputError: standard output is closed.
        OutputError: it cannot be written, as on a full disk.
    """
    check_output()
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _drop_stdout()
        kind = ReaderLeftError if isinstance(error, BrokenPipeError) else OutputError
        raise kind(f"standard output cannot be written: {error.strerror or error}") from None


# Control characters but for tab and newline
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd")


def show(text: str) -> None:
    """Write `text` to standard output at once; on a terminal without its control characters,
    which a terminal would obey and a file keeps.

    Raises:
        ReaderLeftError, OutputError: as `write`.
    """
    if text:
        write(text.translate(_CONTROLS) if sys.stdout.isatty() else text)


def tell(line: str) -> None:
    """Write a line to standard error; a line that cannot be written is lost."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)


class _Told(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tell(f"{self.name}: {record.getMessage()}")


def tell_what_is_logged(program: str) -> None:
    """Write what the package logs to standard error, a line each. A program that uses it as a
    library decides for itself, and by default shows warnings alone."""
    log = logging.getLogger("npllama")
    handler = next((h for h in log.handlers if isinstance(h, _Told)), None)
    if handler is None:
        handler = _Told()
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    handler.name = program


def reason(error: OSError) -> str:
    """What an error of the system says: the file if it names one, and what is wrong."""
    said = error.strerror or str(error) or type(error).__name__
    name = error.filename
    return f"{os.fsdecode(name)}: {said}" if isinstance(name, str | bytes) else said


def _drop_stdout() -> None:
    """Send what is still buffered nowhere, or Python would fail again at exit."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
