"""The lines that were typed at a prompt, saved in a file for the next session."""

import io
import os
import stat
from contextlib import suppress
from pathlib import Path

from npllama.errors import InputError
from npllama.escapes import unescape

MOST_ENTRIES = 1000
_MOST_BYTES = 16 * 2**20  # npllama writes no larger file


def history_file() -> Path | None:
    """The path of the history of chat: npllama/chat_history in $XDG_STATE_HOME, whose default is
    ~/.local/state. None if there is no home directory."""
    state = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(state):  # the specification says to ignore a relative one
        home = os.path.expanduser("~")
        if not os.path.isabs(home) or home == os.sep:  # "/" where HOME is empty
            return None
        state = os.path.join(home, ".local", "state")
    return Path(state, "npllama", "chat_history")


class History:
    """Entries in a file that only its owner can read, one per line.

    A line end in an entry is written as "\\n", and a backslash as two. A file that cannot be read
    or written is no error: the history is then empty, or is not saved.

    Args:
        path: the file, which is created if it does not exist; None for no file.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.entries: list[str] = []
        if path is not None:
            with suppress(OSError):
                self._read(path)

    def add(self, entry: str) -> bool:
        """Append an entry; False if it repeats the last one."""
        if self.entries[-1:] == [entry]:
            return False
        self.entries.append(entry)
        if self.path is not None:
            with suppress(OSError):
                self._append(self.path, [entry])
        return True

    def _read(self, path: Path) -> None:
        with _opened(path, 0) as file:
            if os.fstat(file.fileno()).st_size > _MOST_BYTES:
                self.path = None
                return
            lines = file.read().decode("utf-8", "replace").split("\n")
        self.entries = [_entry(line) for line in lines if line][-MOST_ENTRIES:]
        if len(lines) > 2 * MOST_ENTRIES:
            self._shorten(path)

    def _shorten(self, path: Path) -> None:
        """Replace the file by one with only the latest entries."""
        new = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            self._append(new, self.entries)
            os.replace(new, path)
        except BaseException:
            with suppress(OSError):
                new.unlink()
            raise

    def _append(self, path: Path, entries: list[str]) -> None:
        content = "".join(f"{_line(entry)}\n" for entry in entries)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _opened(path, os.O_CREAT) as file:
            file.write(content.encode("utf-8", "replace"))


def _opened(path: Path, more_flags: int) -> io.FileIO:
    """A file open for reading and appending, which only its owner can read.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    no_wait = getattr(os, "O_NONBLOCK", 0)  # opening a pipe would wait for its other end
    flags = os.O_RDWR | os.O_APPEND | no_wait | more_flags
    file = os.fdopen(os.open(path, flags, 0o600), "a+b", buffering=0)
    try:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is not a regular file")
        if stat.S_IMODE(status.st_mode) != 0o600:
            os.chmod(path, 0o600)
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def _line(entry: str) -> str:
    return entry.replace("\\", "\\\\").replace("\n", "\\n")


def _entry(line: str) -> str:
    try:
        return unescape(line, "a line")
    except InputError:  # another program wrote the line
        return line
