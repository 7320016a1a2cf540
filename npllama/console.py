"""What all programs share: one-line errors, exit codes, and safe standard streams.

If standard error is closed, Python sets sys.stderr to None, and `print(..., file=None)` writes to
standard output. Moreover, the next file that the program opens gets the free descriptor 2, and C
code that writes to standard error then writes into that file. `open_streams` prevents both.
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
    """The reader of standard output has closed it, as `head` does once it has enough lines."""


def exit_code(
    program: str,
    work: Callable[[], int | None],
    interrupted: Callable[[], str | None] = lambda: "interrupted",
    out_of_memory: str = "use a smaller model",
) -> int:
    """Run `work` and return the program's exit code.

    The code is what `work` returns (None is 0), 2 after an error, and 130 after Ctrl-C (another
    signal may set another code). Errors and signals write one line to stderr. From this call on,
    the package's log messages go to stderr too.

    Args:
        program: the start of the line.
        interrupted: returns the rest of the line after a signal; None writes no line.
        out_of_memory: advice for the line if memory runs out.
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
    """Make the standard streams usable. Every program calls this first.

    A closed descriptor among 0, 1 and 2 is opened on the null device, so that no other file gets
    its number. If sys.stdin or sys.stdout was closed, it stays None, and the program decides
    whether to refuse. Text is UTF-8 in any locale. Standard output writes file names as their
    original bytes.
    """
    with contextlib.suppress(OSError):  # some chroots have no null device
        while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:  # open returns the lowest free number
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
    """The program's name in its help: "npllama WORD" if started that way, else `alone`."""
    started = Path(sys.argv[0]).stem  # "__main__" for python -m npllama
    return f"npllama {word}" if started in ("npllama", "__main__") else alone


def utf8(argument: str) -> str:
    """A command-line argument decoded as UTF-8, whatever the locale is.

    Raises:
        argparse.ArgumentTypeError: the argument is not valid UTF-8.
    """
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError("the text is not UTF-8: pass it in UTF-8") from None


def check_output() -> None:
    """Raise InputError if standard output is closed, before any work is done for it."""
    if sys.stdout is None:
        raise InputError("standard output is closed: expected an open file, pipe or terminal")


def write(text: str) -> None:
    """Write `text` to standard output and flush it.

    Raises:
        ReaderLeftError: the reader has closed its end of the pipe.
        InputError: standard output is closed.
        OutputError: it cannot be written, for example on a full disk.
    """
    check_output()
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _drop_stdout()
        kind = ReaderLeftError if isinstance(error, BrokenPipeError) else OutputError
        raise kind(f"standard output cannot be written: {error.strerror or error}") from None


# Control characters except tab and newline
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd")


def show(text: str) -> None:
    """Write `text` to standard output and flush it. On a terminal, U+FFFD replaces control
    characters, which the terminal would obey.

    Raises:
        ReaderLeftError, OutputError: as `write`.
    """
    if text:
        write(text.translate(_CONTROLS) if sys.stdout.isatty() else text)


def tell(line: str) -> None:
    """Write a line to standard error. On a terminal, U+FFFD replaces control characters, as in
    `show`. A failure to write is ignored."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            line = line.translate(_CONTROLS) if sys.stderr.isatty() else line
            print(line, file=sys.stderr, flush=True)


class _Told(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tell(f"{self.name}: {record.getMessage()}")


def tell_what_is_logged(program: str) -> None:
    """Write the package's log messages to standard error, one line per message. When npllama is
    used as a library, the application configures logging instead."""
    log = logging.getLogger("npllama")
    handler = next((h for h in log.handlers if isinstance(h, _Told)), None)
    if handler is None:
        handler = _Told()
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    handler.name = program


def reason(error: OSError) -> str:
    """The text of an OSError: the file it names, if any, and the reason."""
    said = error.strerror or str(error) or type(error).__name__
    name = error.filename
    return f"{os.fsdecode(name)}: {said}" if isinstance(name, str | bytes) else said


def _drop_stdout() -> None:
    """Redirect buffered output to the null device, so that the flush at exit cannot fail."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
