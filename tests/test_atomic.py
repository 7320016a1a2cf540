"""Files are written completely or not at all. A file system without locks or fsync is accepted, and
disk errors are reported."""

import errno
import os
import stat
import threading
import time

import pytest

import atomic
from atomic import locked, sync
from conftest import TINY
from convert import main as convert_main
from model_directory import random_tensors
from npllama.atomic_file import atomic_file, check_writable
from npllama.errors import InputError
from test_convert import write_llama2c

LACKING = [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return write_llama2c(folder / "model.bin", TINY, random_tensors(TINY))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refuse_locks(monkeypatch, number):
    def refuse(*_args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic.fcntl, "flock", refuse)


def refuse_syncs(monkeypatch, number, of_folders):
    fsync = os.fsync

    def refuse(file):
        if stat.S_ISDIR(os.fstat(file).st_mode) == of_folders:
            raise OSError(number, os.strerror(number))
        fsync(file)

    monkeypatch.setattr(atomic.os, "fsync", refuse)


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_file_is_the_new_one_or_the_old_one(tmp_path, old, monkeypatch):
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    before = names(tmp_path)
    for error in (ZeroDivisionError, KeyboardInterrupt):
        with pytest.raises(error), atomic_file(path) as partial:
            partial.write_bytes(b"half")
            assert (path.read_bytes() if path.exists() else None) == old
            raise error
        assert names(tmp_path) == before
    full = pytest.raises(InputError, match=r"file cannot be written: No space left")
    with full, monkeypatch.context() as patch, atomic_file(path) as partial:
        partial.write_bytes(b"new")
        refuse_syncs(patch, errno.ENOSPC, of_folders=False)
    assert names(tmp_path) == before
    assert old is None or path.read_bytes() == old
    with atomic_file(path) as partial:
        partial.write_bytes(b"new")
    assert names(tmp_path) == ["file"] and path.read_bytes() == b"new"


def test_a_new_file_has_the_permissions_of_the_old_one(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"private")
    for mode in (0o600, 0o400):
        path.chmod(mode)
        with atomic_file(path) as partial:
            assert stat.S_IMODE(partial.stat().st_mode) == 0o600  # before anything is written
            partial.write_bytes(b"new")
        assert path.read_bytes() == b"new" and stat.S_IMODE(path.stat().st_mode) == mode


def test_what_a_killed_writer_left_is_replaced(tmp_path):
    (tmp_path / "file.partial").write_bytes(b"half of something longer")
    with atomic_file(tmp_path / "file") as partial, open(partial, "ab") as file:
        file.write(b"new")
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"new"


def write_slowly(path, letter, times):
    """Whole files of one letter, each written in two parts, with time between them."""
    for _ in range(times):
        with atomic_file(path) as partial, open(partial, "wb", buffering=0) as file:
            for _ in range(2):
                file.write(letter * 1000)
                time.sleep(0.002)


@pytest.mark.parametrize("has_locks", [True, False])
def test_two_writers_at_once_do_not_mix(tmp_path, monkeypatch, has_locks):
    if not has_locks:
        refuse_locks(monkeypatch, errno.ENOLCK)
    path = tmp_path / "file"
    writers = [
        threading.Thread(target=write_slowly, args=(path, letter, 10)) for letter in (b"a", b"b")
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            assert path.read_bytes() in (b"a" * 2000, b"b" * 2000)
    for writer in writers:
        writer.join()
    assert names(tmp_path) == ["file"]


def test_what_cannot_be_written_is_known_before(tmp_path, monkeypatch):
    check_writable(tmp_path / "file")
    assert names(tmp_path) == []
    (tmp_path / "file").touch()
    check_writable(tmp_path / "file")
    with monkeypatch.context() as patch:  # root may write everything
        patch.setattr("os.access", lambda _path, _mode: False)
        with pytest.raises(InputError, match="file cannot be written: Permission denied"):
            check_writable(tmp_path / "file")
    with pytest.raises(InputError, match=r"none/file cannot be written: No such file"):
        check_writable(tmp_path / "none" / "file")
    with pytest.raises(InputError, match="cannot be written: File name too long"):
        check_writable(tmp_path / ("a" * 250))


def test_a_file_of_a_folder_that_is_not_there_is_one_line(tmp_path):
    path = tmp_path / "none" / "file"
    missing = pytest.raises(InputError, match=r"none/file cannot be written: No such file")
    with missing, atomic_file(path) as partial:
        partial.write_bytes(b"new")


def test_one_holder_at_a_time_and_no_file_stays(tmp_path):
    path = tmp_path / "lock"
    with locked(path, "first"):
        with pytest.raises(InputError, match="second is busy"), locked(path, "second is busy"):
            raise AssertionError
        assert names(tmp_path) == ["lock"]
    assert names(tmp_path) == []
    with pytest.raises(ZeroDivisionError), locked(path, "third"):
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_a_lock_file_that_a_killed_process_left_is_no_lock(tmp_path):
    (tmp_path / "lock").touch()
    with locked(tmp_path / "lock", "busy"):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [*LACKING, errno.ENOLCK])
def test_without_locks_a_conversion_goes_on(tmp_path, source, monkeypatch, number):
    refuse_locks(monkeypatch, number)
    assert convert_main([str(source), str(tmp_path / "out")]) == 0
    assert names(tmp_path) == ["out"]


def test_a_lock_that_is_denied_is_held_by_another(tmp_path, monkeypatch):
    """CIFS reports EACCES instead of EAGAIN if another process holds the lock."""
    refuse_locks(monkeypatch, errno.EACCES)
    with pytest.raises(InputError, match="busy"), locked(tmp_path / "lock", "busy"):
        raise AssertionError


def test_a_lock_that_fails_is_an_error(tmp_path, source, monkeypatch, capsys):
    refuse_locks(monkeypatch, errno.EIO)
    assert convert_main([str(source), str(tmp_path / "out")]) == 2
    assert "out cannot be written: Input/output error" in capsys.readouterr().err
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [*LACKING, errno.EBADF])
def test_without_syncs_of_folders_a_conversion_goes_on(
    tmp_path,
    source,
    monkeypatch,
    number,
):
    refuse_syncs(monkeypatch, number, of_folders=True)
    assert convert_main([str(source), str(tmp_path / "out")]) == 0
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("of_folders", [True, False])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_sync_that_fails_is_an_error(
    tmp_path,
    source,
    monkeypatch,
    capsys,
    number,
    of_folders,
):
    refuse_syncs(monkeypatch, number, of_folders)
    assert convert_main([str(source), str(tmp_path / "out")]) == 2
    assert f"out cannot be written: {os.strerror(number)}" in capsys.readouterr().err


def test_a_folder_that_cannot_be_opened_is_not_waited_for(tmp_path, monkeypatch):
    def refuse(*_args):
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "file").touch()
    monkeypatch.setattr(atomic.os, "open", refuse)
    sync(tmp_path)
    with pytest.raises(PermissionError):
        sync(tmp_path / "file")
