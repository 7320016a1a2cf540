"""Reading small files that may be damaged: checks of size, file type and duplicate JSON names.

Measurements: tools/README.md.
"""

import errno
import json
import stat
from pathlib import Path
from typing import Any

MAX_JSON = 16 * 2**20
"""Largest JSON file that is read, in bytes; the index of a 70B model is far smaller."""
MAX_TOKENIZER = 64 * 2**20
"""Largest tokenizer file that is read, in bytes; Llama 2's is far smaller."""


def read_small_file(path: Path, most: int) -> bytes:
    """The contents of a regular file of at most `most` bytes.

    Raises:
        OSError: the file cannot be read, is larger, or is not a regular file. (Reading a pipe
            could block forever.)
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "Is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")
    if status.st_size > most:
        raise OSError(errno.EFBIG, f"it has {status.st_size} bytes, expected at most {most}")
    return path.read_bytes()


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: not valid JSON, or an object has a name twice (json would keep only the last).
        RecursionError: the text is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice!r} is given twice")
    return value
