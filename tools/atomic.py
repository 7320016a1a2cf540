"""Writes directories atomically: they appear whole or not at all.

A directory NAME uses three more names in the same folder. `.NAME.partial` is unfinished work.
`.NAME.replaced` is the old directory until the new one is in place. `.NAME.lock` is a lock file,
whose lock ends with the process that holds it.

Some network file systems (Lustre, NFS without a lock service, CIFS, FUSE) have no locks, or cannot
sync a folder's entries to disk. The programs then continue without these guarantees.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from interruption import uninterrupted
from npllama.atomic_file import NO_LOCKS, sync
from npllama.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: two processes may write the same directory
    fcntl = None  # type: ignore[assignment]

_COMPLETE = "config.json"  # every complete model directory has this file
_IS_LOCKED = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}  # the last on CIFS


@contextmanager
def atomic_directory(dest: Path, n_bytes: int, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary directory beside `dest`; it is renamed to `dest` if the block succeeds.

    With `overwrite`, the old `dest` is kept under another name until the new directory is in place.
    If the program is killed at any moment, `dest` is the old directory, the new one, or missing. If
    it is missing, the next run restores the old one. The next run also removes unfinished work. If
    the block fails, everything is as before.

    Args:
        dest: the directory by its real name (see `resolved`).
        n_bytes: number of bytes that will be written.

    Raises:
        InputError: `dest` has content and `overwrite` is False, another process is writing to
            it, it is not writable, or the disk has too little space.
    """
    partial, aside = _beside(dest, "partial"), _beside(dest, "replaced")
    busy = (
        f"{dest} is being written by another conversion: wait until it ends, or choose another "
        "directory"
    )
    try:
        with parents_of(dest), locked(_beside(dest, "lock"), busy):
            _recover(dest)
            check_dest(dest, overwrite)
            if partial.exists():
                shutil.rmtree(partial)
            _check_space(dest, n_bytes)
            try:
                partial.mkdir()
                yield partial
                _sync_content(partial)  # otherwise a power cut could lose data under a final name
                with uninterrupted():
                    if dest.exists():
                        os.rename(dest, aside)
                    os.rename(partial, dest)
                    sync(dest.parent)
                    if aside.exists():
                        shutil.rmtree(aside)
            except BaseException:
                with uninterrupted():
                    shutil.rmtree(partial, ignore_errors=True)
                    if aside.exists() and not dest.exists():
                        os.rename(aside, dest)
                raise
    except OSError as error:
        raise InputError(f"{dest} cannot be written: {error.strerror or error}") from None


def resolved(dest: Path) -> Path:
    """`dest` by its real name. "." has no name, and a rename would replace a link, not its target.

    Raises:
        InputError: `dest` is the root of the file system, which has no name.
    """
    real = Path(os.path.realpath(dest))
    if not real.name:
        raise InputError(f"{dest} cannot hold a model: choose the name of a directory")
    return real


def check_dest(dest: Path, overwrite: bool) -> None:
    """Refuse a `dest` that may not be replaced. Changes nothing.

    Args:
        dest: the directory by its real name (see `resolved`).

    Raises:
        InputError: `dest` is a file, or has content that may not be overwritten.
    """
    try:
        standing, aside = _standing(dest), _beside(dest, "replaced")
        if is_free(standing, dest):
            return
        if standing == dest and aside.exists() and not (dest / _COMPLETE).exists():
            raise InputError(
                f"{dest} has content that is not a model, and {aside} is its former content, kept "
                "by an interrupted conversion: move one of them to another place"
            )
        if not overwrite:
            raise InputError(f"{dest} has content: choose another, or replace it with --overwrite")
        if not (standing / _COMPLETE).exists():
            raise InputError(
                f"{dest} has content but no {_COMPLETE}: --overwrite replaces only model "
                "directories; choose another directory"
            )
    except OSError as error:
        raise InputError(f"{dest} cannot be written: {error.strerror or error}") from None


def is_free(standing: Path, dest: Path) -> bool:
    """Whether `standing` does not exist or is an empty directory.

    Args:
        dest: the name for messages.

    Raises:
        InputError: `standing` is a file.
    """
    if not standing.exists():
        return True
    if not standing.is_dir():
        raise InputError(f"{dest} is a file: choose the name of a directory")
    return not any(standing.iterdir())


def check_place(dest: Path, n_bytes: int, overwrite: bool) -> None:
    """Refuse before the work what `atomic_directory` would refuse after it. Changes nothing.

    Args:
        dest, n_bytes, overwrite: as for `atomic_directory`.

    Raises:
        InputError: as for `check_dest`; or the folder of `dest` is not writable, or its disk has
            too little space.
    """
    check_dest(dest, overwrite)
    try:
        folder = next(parent for parent in dest.parents if parent.exists())
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"{dest} cannot be written: {folder} is not writable")
        _check_space(dest, n_bytes)
    except OSError as error:
        raise InputError(f"{dest} cannot be written: {error.strerror or error}") from None


def _check_space(dest: Path, n_bytes: int) -> None:
    folder = next(parent for parent in dest.parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise InputError(
            f"{dest} needs {n_bytes / 1e9:.2f} GB, but {folder} has {free / 1e9:.2f} GB free: "
            "choose another disk or, with convert.py, a narrower --dtype"
        )


def identity(dest: Path) -> tuple[int, int] | None:
    """A value that identifies the directory at `dest`, to find out later if it was replaced."""
    try:
        status = _standing(dest).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def names_beside(dest: Path) -> tuple[Path, ...]:
    """The three paths that writing the directory `dest` may create or remove."""
    return tuple(_beside(dest, what) for what in ("partial", "replaced", "lock"))


def _beside(dest: Path, what: str) -> Path:
    return dest.with_name(f".{dest.name}.{what}")


def _standing(dest: Path) -> Path:
    """`dest`, or the old directory that a killed run renamed and the next run restores."""
    aside = _beside(dest, "replaced")
    has_no_content = not dest.exists() or (dest.is_dir() and not any(dest.iterdir()))
    return aside if has_no_content and aside.exists() else dest


def _recover(dest: Path) -> None:
    """Restore the directory that a killed run renamed, or remove it if the new one is in place."""
    aside = _beside(dest, "replaced")
    if _standing(dest) == aside:
        os.rename(aside, dest)  # also replaces an empty directory
    elif aside.exists() and (dest / _COMPLETE).exists():
        shutil.rmtree(aside)


@contextmanager
def parents_of(dest: Path) -> Iterator[None]:
    """Create the parents of `dest`. If the block fails, remove those that were missing."""
    missing = [parent for parent in dest.parents if not parent.exists()]
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with suppress(OSError):  # another program may have put content into one
            for parent in missing:
                parent.rmdir()
        raise


def _sync_content(directory: Path) -> None:
    for path in directory.iterdir():
        sync(path)
    sync(directory)


@contextmanager
def locked(path: Path, message: str) -> Iterator[None]:
    """Hold the lock of the file `path` while the block runs. The file is created and removed.

    The system releases the lock however the process ends. On a file system without locks, the
    block runs without one.

    Raises:
        InputError: another process holds the lock; its text is `message`.
        OSError: the file cannot be created.
    """
    file = None if fcntl is None else _take(path, message)
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):
                path.unlink()  # while it is still locked
            os.close(file)


def _take(path: Path, message: str) -> int | None:
    """The descriptor of the locked file; None if the file system has no locks."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(path)):
                    return file
        except OSError as error:
            os.close(file)
            if error.errno in _IS_LOCKED:
                raise InputError(message) from None
            with suppress(OSError):
                path.unlink()
            if error.errno in NO_LOCKS:
                return None
            raise
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # the previous holder has removed this file; try again
