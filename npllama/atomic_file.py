"""Writes a file whole or not at all, and waits until its bytes are on the disk.

Some network file systems (Lustre, NFS without a lock service, CIFS, FUSE) have no locks, or cannot
sync a folder. On them, files are written without locks or without the sync.
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
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

IS_MISSING = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
"""The errors of a file system without locks or syncs."""
NO_LOCKS = IS_MISSING | {errno.ENOLCK}
_NO_SYNC = IS_MISSING
_NO_SYNC_OF_FOLDERS = IS_MISSING | {errno.EBADF, errno.EISDIR, errno.EACCES}


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A partial file to write to. It replaces `path` when the block ends without an error.

    If the program is killed, `path` has its old content or all of the new one. The partial file
    may remain, and the next call replaces it. Programs that write the same path at the same time
    wait for each other, and the last one replaces the others' files. The new file has the
    permissions of the old one.

    Raises:
        InputError: the file cannot be written.
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
    """Give the partial file the permissions of `path`, if it exists, and `more`."""
    with suppress(OSError):  # `path` does not exist, or the file system has no permissions
        os.chmod(partial, stat.S_IMODE(os.stat(path).st_mode) | more)


def check_writable(path: Path) -> None:
    """Raise the errors of `atomic_file` before the work that produces the content.

    Raises:
        InputError: no file of this name can be created in the folder, or an existing file must not
            be written.
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
    """An empty file in the folder of `path`. No other process writes to it. It is removed if the
    block fails."""
    partial = path.with_name(f"{path.name}.partial")
    file = None if fcntl is None else _locked(partial)
    if file is None:  # without locks, a name that no other process uses
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
    """The descriptor of an empty file that this process has locked. None if the file system has no
    locks.

    The system releases the lock however the process ends.
    """
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
        os.close(file)  # the process with the lock has renamed the file to `path`, or removed it


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk.

    A file system that cannot sync is not an error.

    Raises:
        OSError: the content could not be written, for example on a full disk.
    """
    is_folder = path.is_dir()
    if is_folder and fcntl is None:  # Windows cannot open a folder
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
