"""Directories that appear whole or not at all.

A directory uses three names beside it: `.NAME.partial` for half-written work, `.NAME.replaced`
for what moves aside until the new directory stands, and `.NAME.lock`, whose lock ends with its
process.

Network file systems such as Lustre, NFS without a lock service, CIFS and FUSE lack locks, or a
wait until a folder's names are on the disk. The programs then go on without them.
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
except ImportError:  # Windows, where two processes are not kept apart
    fcntl = None  # type: ignore[assignment]

_COMPLETE = "config.json"  # without it no directory is a model
_IS_LOCKED = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}  # the last on CIFS


@contextmanager
def atomic_directory(dest: Path, n_bytes: int, overwrite: bool) -> Iterator[Path]:
    """A folder beside `dest` to write to; it becomes `dest` when the block ends without error.

    With `overwrite` the old `dest` moves aside until the new one stands. A program killed at any
    moment leaves `dest` as it was, as it will be, or aside, from where the next run puts it back;
    the next run also removes half-written work. A block that fails leaves everything as it was.

    Args:
        dest: by its real name (see `resolved`).
        n_bytes: that will be written.

    Raises:
        InputError: `dest` has content and is not to be overwritten, another conversion is
            writing it, it cannot be written, or too little disk space.
    """
    partial, aside = _beside(dest, "partial"), _beside(dest, "replaced")
    busy = (
        f"{dest} is being written by another conversion: wait for its end, or choose another "
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
                _sync_content(partial)  # or a power cut could leave the name without the bytes
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
    """`dest` by its own name: "." has none, and a link would be replaced instead of its target.

    Raises:
        InputError: the root of the file system, which has no name.
    """
    real = Path(os.path.realpath(dest))
    if not real.name:
        raise InputError(f"{dest} is no place for a model: choose the name of a directory")
    return real


def check_dest(dest: Path, overwrite: bool) -> None:
    """Refuse a `dest` that is in the way; nothing is changed.

    Args:
        dest: by its real name (see `resolved`).

    Raises:
        InputError: `dest` is a file, or has content and is not to be overwritten.
    """
    try:
        standing, aside = _standing(dest), _beside(dest, "replaced")
        if is_free(standing, dest):
            return
        if standing == dest and aside.exists() and not (dest / _COMPLETE).exists():
            raise InputError(
                f"{dest} has content that is no model, and {aside} is what stood there before an "
                "interrupted conversion: move one of them away"
            )
        if not overwrite:
            raise InputError(f"{dest} has content: choose another, or replace it with --overwrite")
        if not (standing / _COMPLETE).exists():
            raise InputError(
                f"{dest} has content and no {_COMPLETE}: it is no model, so that --overwrite "
                "does not replace it; choose another directory"
            )
    except OSError as error:
        raise InputError(f"{dest} cannot be written: {error.strerror or error}") from None


def is_free(standing: Path, dest: Path) -> bool:
    """Whether nothing stands at `standing`, or an empty directory.

    Args:
        dest: its name in messages.

    Raises:
        InputError: it is a file.
    """
    if not standing.exists():
        return True
    if not standing.is_dir():
        raise InputError(f"{dest} is a file: choose the name of a directory")
    return not any(standing.iterdir())


def check_place(dest: Path, n_bytes: int, overwrite: bool) -> None:
    """Refuse at once what `atomic_directory` would refuse after the work; nothing is changed.

    Args:
        dest, n_bytes, overwrite: as for `atomic_directory`.

    Raises:
        InputError: as for `check_dest`; or the folder of `dest` is not writable, or too small.
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
            f"{dest} needs {n_bytes / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free: "
            "choose another disk or, with convert.py, a narrower --dtype"
        )


def identity(dest: Path) -> tuple[int, int] | None:
    """What stands at `dest`, to be compared later: another directory there has another."""
    try:
        status = _standing(dest).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def names_beside(dest: Path) -> tuple[Path, ...]:
    """The three paths that a conversion to `dest` may make or remove."""
    return tuple(_beside(dest, what) for what in ("partial", "replaced", "lock"))


def _beside(dest: Path, what: str) -> Path:
    return dest.with_name(f".{dest.name}.{what}")


def _standing(dest: Path) -> Path:
    """`dest`, or what a killed run left aside and the next one puts back there."""
    aside = _beside(dest, "replaced")
    has_no_content = not dest.exists() or (dest.is_dir() and not any(dest.iterdir()))
    return aside if has_no_content and aside.exists() else dest


def _recover(dest: Path) -> None:
    """Put back what a killed run left aside; remove it where the new directory stood already."""
    aside = _beside(dest, "replaced")
    if _standing(dest) == aside:
        os.rename(aside, dest)  # over an empty directory, if there is one
    elif aside.exists() and (dest / _COMPLETE).exists():
        shutil.rmtree(aside)


@contextmanager
def parents_of(dest: Path) -> Iterator[None]:
    """Make the directories above `dest`; those that were missing go again if the block fails."""
    missing = [parent for parent in dest.parents if not parent.exists()]
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with suppress(OSError):  # one that has content by now is somebody else's too
            for parent in missing:
                parent.rmdir()
        raise


def _sync_content(directory: Path) -> None:
    for path in directory.iterdir():
        sync(path)
    sync(directory)


@contextmanager
def locked(path: Path, message: str) -> Iterator[None]:
    """Hold the lock of the file `path` while the block runs; the file is made, and removed.

    The system releases the lock however the process ends. Where the file system has no locks,
    the block runs without one.

    Raises:
        InputError: another process holds the lock; the error has `message`.
        OSError: the file cannot be made.
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
    """The descriptor of the locked file; None where there are no locks."""
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
        os.close(file)  # it was removed by the process that held the lock until now
