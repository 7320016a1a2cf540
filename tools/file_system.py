"""What not every file system has: locks, and a wait until a folder's names are on the disk.

Network file systems such as Lustre, NFS without a lock service, CIFS and FUSE lack one or the
other. The programs then go on without it: the work itself does not depend on either.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from npllama.errors import InputError

try:
    import fcntl
except ImportError:  # Windows, where two processes are not kept apart
    fcntl = None  # type: ignore[assignment]

_IS_LOCKED = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}  # the last on CIFS
_IS_MISSING = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_NO_LOCKS = _IS_MISSING | {errno.ENOLCK}
_NO_SYNC = _IS_MISSING
_NO_SYNC_OF_FOLDERS = _IS_MISSING | {errno.EBADF, errno.EISDIR, errno.EACCES}


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
            if error.errno in _NO_LOCKS:
                return None
            raise
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # it was removed by the process that held the lock until now


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk.

    It returns at once where the file system cannot wait.

    Raises:
        OSError: the content could not be written, as on a full or broken disk.
    """
    is_folder = path.is_dir()
    if is_folder and fcntl is None:  # Windows opens no folder
        return
    try:
        file = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        if error.errno not in (_NO_SYNC_OF_FOLDERS if is_folder else _NO_SYNC):
            raise
