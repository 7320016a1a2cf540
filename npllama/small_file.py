"""Small files, read with care: damaged ones may claim any size, or say a thing twice."""

import errno
import json
import stat
from pathlib import Path
from typing import Any

MAX_JSON = 16 * 2**20
"""Bytes of a JSON file; a 70B model's index has under 0.1 MB."""
MAX_TOKENIZER = 64 * 2**20
"""Bytes of a tokenizer; Llama 2's has 0.5 MB."""


def read_small_file(path: Path, most: int) -> bytes:
    """The contents of a regular file of at most `most` bytes.

    Raises:
        OSError: it cannot be read, is no regular file (a pipe would be waited for without end),
            or is larger.
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "Is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")
    if status.st_size > most:
        raise OSError(errno.EFBIG, f"it has {status.st_size} bytes, expected at most {most}")
    return path.read_bytes()


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: not JSON, or an object that gives a name twice, of which json keeps the last.
        RecursionError: nested too deep.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice!r} is given twice")
    return value
