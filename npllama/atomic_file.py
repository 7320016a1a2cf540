"""A file that appears whole or not at all, and waiting until bytes are on the disk.

Network file systems such as Lustre, NFS without a lock service, CIFS and FUSE lack locks, or a
wait until a folder's names are on the disk. Writing then goes on without them.
"""

import errno
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from npllama.errors import InputError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

IS_MISSING = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
"""What a file system says that lacks locks or syncs."""
NO_LOCKS = IS_MISSING | {errno.ENOLCK}
_NO_SYNC = IS_MISSING
_NO_SYNC_OF_FOLDERS = IS_MISSING | {errno.EBADF, errno.EISDIR, errno.EACCES}


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it becomes `path` when the block ends without error.

    A program killed at any moment leaves the old `path` or the new one. It may also leave the
    file beside, which the next call replaces. Programs that write the same path at once wait for
    each other, and the last one's file stays. The new file has the permissions of the old one.

    Raises:
        InputError: it cannot be written.
    """
    try:
        with _partial_file(path) as partial:
            _copy_mode(path, partial, stat.S_IWUSR)
            yield partial
            _copy_mode(path, partial)
            sync(partial)
            os.replace(partial, path)
    except OSError as error:
        raise _not_written(path, error) from None


def _copy_mode(path: Path, partial: Path, more: int = 0) -> None:
    """Give a file the permissions of another one, if there is one, and `more`."""
    with suppress(OSError):  # there is none, or this file system has no permissions
        os.chmod(partial, stat.S_IMODE(os.stat(path).st_mode) | more)


def check_writable(path: Path) -> None:
    """Refuse at once what `atomic_file` would refuse after the work; nothing is changed.

    Raises:
        InputError: no file can be made in the folder of `path`, or none of such a name; or
            there is a file that must not be written.
    """
    try:
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f"{path.name}.", suffix=".partial"
        ):
            pass
    except OSError as error:
        raise _not_written(path, error) from None


def _not_written(path: Path, error: OSError) -> InputError:
    return InputError(f"{path} cannot be written: {error.strerror or error}")


@contextmanager
def _partial_file(path: Path) -> Iterator[Path]:
    """An empty file beside `path`, which no other process writes to; a failed block removes it."""
    partial = path.with_name(f"{path.name}.partial")
    file = None if fcntl is None else _locked(partial)
    if file is None:  # there are no locks: a name that no other process uses
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.touch()
        yield partial
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    finally:
        if file is not None:
            os.close(file)


def _locked(partial: Path) -> int | None:
    """The descriptor of a new or emptied file, once this process alone has its lock; the system
    releases the lock however the process ends. None where there are no locks."""
    while True:
        file = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(partial)):
                    os.ftruncate(file, 0)
                    return file
        except OSError as error:
            os.close(file)
            if error.errno not in NO_LOCKS:
                raise
            with suppress(OSError):
                partial.unlink()
            return None
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # the process that held the lock has renamed it to `path`, or removed it


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
