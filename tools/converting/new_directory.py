"""A directory that appears whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from npllama.errors import InputError


@contextmanager
def new_directory(dest: Path, n_bytes: int, overwrite: bool) -> Iterator[Path]:
    """A folder beside `dest` to write to; it becomes `dest` when the block ends without error.

    With `overwrite` the old `dest` moves aside until the new one stands. A program killed at any
    moment leaves `dest` as it was, as it will be, or beside itself as `.NAME.replaced`, which the
    next run puts back; half-written work is in `.NAME.partial`, which the next run removes.

    Raises:
        InputError: `dest` has content and is not to be overwritten, or too little disk space.
    """
    dest = resolved(dest)
    partial = dest.with_name(f".{dest.name}.partial")
    replaced = dest.with_name(f".{dest.name}.replaced")
    check_dest(dest, overwrite)
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        if partial.exists():
            shutil.rmtree(partial)
        free = shutil.disk_usage(dest.parent).free
        if n_bytes > free:
            raise InputError(
                f"{dest} needs {n_bytes / 1e9:.2f} GB and {dest.parent} has {free / 1e9:.2f} GB "
                "free: choose another disk or a narrower --dtype"
            )
        partial.mkdir()
        try:
            yield partial
            if dest.exists():
                os.rename(dest, replaced)
            os.rename(partial, dest)
            if replaced.exists():
                shutil.rmtree(replaced)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if replaced.exists() and not dest.exists():
                os.rename(replaced, dest)
    except OSError as error:
        raise InputError(f"{dest} cannot be written: {error.strerror or error}") from None


def resolved(dest: Path) -> Path:
    """`dest` by its own name: "." has none, and a link would be replaced instead of its target.

    Raises:
        InputError: the root of the file system, which has no name.
    """
    real = Path(os.path.realpath(dest))
    if not real.name:
        raise InputError(f"{dest} is no place for a model: choose the name of a directory")
    return real


def check_dest(dest: Path, overwrite: bool) -> None:
    """Put back what a killed run left aside, then refuse a `dest` that is in the way.

    Raises:
        InputError: `dest` is a file, or has content and is not to be overwritten.
    """
    dest = resolved(dest)
    replaced = dest.with_name(f".{dest.name}.replaced")
    try:
        if replaced.exists():
            if dest.exists():
                shutil.rmtree(replaced)  # the new one stood already
            else:
                os.rename(replaced, dest)
        if not dest.exists():
            return
        if not dest.is_dir():
            raise InputError(f"{dest} is a file: choose the name of a directory")
        if any(dest.iterdir()) and not overwrite:
            raise InputError(f"{dest} has content: choose another, or replace it with --overwrite")
    except OSError as error:
        raise InputError(f"{dest} cannot be written: {error.strerror or error}") from None
