"""Reads messages and commands from a terminal, or line by line from a pipe."""

import contextlib
import glob
import os
import re
import select
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

from npllama.console import reason
from npllama.errors import InputError
from npllama.input_history import History

SIGN, SIGN_INSIDE = ">>> ", "... "
QUOTES = '"""'
"""The marks at the beginning and the end of a message of several lines."""


@dataclass(frozen=True)
class Entry:
    """A message or a command.

    Attributes:
        text: the message, or the command without its "/".
        is_command: whether it is a command.
    """

    text: str
    is_command: bool = False


class Source(Protocol):
    """A source of input units. A unit is a line, or several lines that were pasted at once."""

    is_typed: bool

    def read(self, sign: str) -> str | None:
        """The next unit, without a line end at its end; None at the end of input.

        Args:
            sign: the prompt at a terminal.
        """

    def where(self) -> str:
        """The beginning of an error message about the latest unit."""

    def remember(self, entry: str) -> None:
        """Add an entry to the history."""


def read_entry(source: Source) -> Entry | None:
    """The next message or command; None at the end of input.

    A line that begins with "/" is a command. A line that begins with "//" is a message that begins
    with "/". Several lines that were pasted at once are one message. A message, or the argument of
    a command, that begins with QUOTES goes on to the next QUOTES.

    Raises:
        InputError: the input ends inside a message, or is not UTF-8.
    """
    while (unit := source.read(SIGN)) is not None:
        command, quotes, _ = unit.partition(QUOTES)
        if quotes and re.fullmatch(r"(/\w+ +)?", command):
            text = _quoted(source, unit.removeprefix(command))
            if text is None:
                return None
            source.remember(f"{command}{QUOTES}{text}{QUOTES}")
            entry = Entry(f"{command[1:]}{text}", is_command=bool(command))
        else:
            if unit.strip():
                source.remember(unit)
            entry = _entry(unit)
        if entry.text.strip() or entry.is_command:
            return entry
    return None


def _entry(unit: str) -> Entry:
    if not unit.startswith("/") or "\n" in unit:
        return Entry(unit)
    if unit.startswith("//"):
        return Entry(unit[1:])
    return Entry(unit[1:], is_command=True)


def _quoted(source: Source, unit: str) -> str | None:
    """The message that begins with a unit in quotes; None if typed input ends before its end."""
    where = source.where()
    units = [unit.removeprefix(QUOTES)]
    while not units[-1].rstrip().endswith(QUOTES):
        unit = source.read(SIGN_INSIDE)
        if unit is None:
            if source.is_typed:
                return None
            raise InputError(
                f"{where}the input ends inside a message: expected {QUOTES} at its end"
            )
        units.append(unit)
    units[-1] = units[-1].rstrip().removesuffix(QUOTES)
    return "\n".join(units).strip("\n")


class PipedInput:
    """The lines of standard input, each as soon as it arrives."""

    is_typed = False

    def __init__(self) -> None:
        if sys.stdin is None:
            raise InputError("standard input is closed: expected messages, one per line")
        self._line = 0

    def read(self, sign: str) -> str | None:
        try:
            content = sys.stdin.buffer.readline()
        except OSError as error:
            raise InputError(f"standard input cannot be read: {reason(error)}") from None
        if not content:
            return None
        self._line += 1
        try:
            text = content.decode("utf-8-sig" if self._line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self.where()}it is not UTF-8 (byte {error.start} of the line): convert the "
                "input to UTF-8"
            ) from None
        return text.removesuffix("\n").removesuffix("\r")

    def where(self) -> str:
        return f"standard input, line {self._line}: "

    def remember(self, entry: str) -> None:
        pass


class TypedInput:
    """Input from a terminal, with line editing and a history if Python has readline.

    Args:
        history: the entries that the arrow keys show.
        words: lines that Tab completes, word by word.
    """

    is_typed = True

    def __init__(self, history: History, words: Iterable[str] = ()) -> None:
        self._history = history
        self._words = sorted(words)
        self._shows_prompt = sys.stdout.isatty()
        self._readline = _readline() if self._shows_prompt else None
        if self._readline is not None:
            self._prepare(self._readline)
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")

    def read(self, sign: str) -> str | None:
        unit = self._line(sign)
        while unit is not None and not self._keeps_a_paste_together() and _more_is_there():
            more = self._line("")
            if more is None:
                break
            unit = f"{unit}\n{more}"
        if unit is None:
            return None
        try:
            unit.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(
                "the line is not UTF-8: set the terminal's encoding to UTF-8"
            ) from None
        return unit.removesuffix("\n")  # a paste may end with a line end

    def _line(self, sign: str) -> str | None:
        if self._shows_prompt:
            with contextlib.suppress(EOFError):
                return input(sign)
            return None
        with contextlib.suppress(OSError):  # standard output is not a terminal
            sys.stderr.write(sign if sys.stderr.isatty() else "")
            sys.stderr.flush()
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None

    def where(self) -> str:
        return ""

    def remember(self, entry: str) -> None:
        if self._history.add(entry) and self._readline is not None:
            with contextlib.suppress(UnicodeError):  # the locale cannot encode it
                self._readline.add_history(entry)

    def _prepare(self, readline: ModuleType) -> None:
        readline.set_auto_history(False)
        readline.set_completer(self._completion)
        readline.set_completer_delims(" ")
        if _is_libedit(readline):
            readline.parse_and_bind("bind ^I rl_complete")
        else:
            readline.parse_and_bind("tab: complete")
            if self._keeps_a_paste_together():
                readline.parse_and_bind("set enable-bracketed-paste on")
        readline.clear_history()
        for entry in self._history.entries:
            with contextlib.suppress(UnicodeError):
                readline.add_history(entry)

    def _completion(self, text: str, state: int) -> str | None:
        """The completion number `state` of the word `text`, for readline."""
        line = self._readline.get_line_buffer()
        if line.startswith(("/save ", "/load ")):
            names = glob.glob(f"{glob.escape(os.path.expanduser(text))}*")
            found = sorted(f"{name}/" if os.path.isdir(name) else name for name in names)
        else:
            begun = line.removesuffix(text)  # the words before `text`
            rests = [w.removeprefix(begun) for w in self._words if line and w.startswith(line)]
            found = [rest for rest in rests if " " not in rest]
        return found[state] if state < len(found) else None

    def _keeps_a_paste_together(self) -> bool:
        """Whether the terminal's bracketed paste delivers pasted lines as one unit."""
        readline = self._readline
        is_dumb = os.environ.get("TERM", "dumb") == "dumb"
        return readline is not None and not is_dumb and not _is_libedit(readline)


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:  # Windows, or a Python without readline
        return None
    return readline


def _is_libedit(readline: ModuleType) -> bool:
    return "libedit" in (readline.__doc__ or "")


def _more_is_there() -> bool:
    """Whether another line is already waiting, as in a paste; nobody types so fast."""
    try:
        return bool(select.select([sys.stdin], [], [], 0)[0])
    except (OSError, ValueError):  # Windows, where select needs sockets
        return False
