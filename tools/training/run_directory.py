"""The directory of a run: which files identify it, and which directories are refused."""

from pathlib import Path

from atomic import is_free
from npllama.console import reason
from npllama.errors import InputError

CHECKPOINT, LOCK = "checkpoint.npz", ".train.lock"
_MARK = ".train.run"
"""The first file of a run, which identifies it before it has a checkpoint."""


def check_out(out: Path) -> None:
    """Refuse a directory that has content and is not a run of train.py. Changes nothing.

    Raises:
        InputError: `out` is a file, cannot be read, or has content that is not a run.
    """
    try:
        is_run = any((out / name).exists() for name in (CHECKPOINT, LOCK, _MARK))
        if not is_run and not is_free(out, out):
            raise InputError(
                f"--out {out} has content but is not a run of train.py, and its files would be "
                "overwritten: choose another directory"
            )
    except OSError as error:
        raise InputError(f"--out {out} cannot be read: {reason(error)}") from None


def mark_as_run(out: Path) -> None:
    """Make `out` a directory that the next call recognizes as a run, even without a checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).write_text("A run of npllama train; the same command resumes it.\n")
