"""tools/file_system.py: without locks or syncs work goes on; errors of the disk are errors."""

import errno
import os
import stat

import pytest

import file_system
from conftest import TINY
from convert import main as convert_main
from file_system import locked, sync
from model_directory import random_tensors
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

    monkeypatch.setattr(file_system.fcntl, "flock", refuse)


def refuse_syncs(monkeypatch, number, of_folders):
    fsync = os.fsync

    def refuse(file):
        if stat.S_ISDIR(os.fstat(file).st_mode) == of_folders:
            raise OSError(number, os.strerror(number))
        fsync(file)

    monkeypatch.setattr(file_system.os, "fsync", refuse)


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
    """CIFS says EACCES where others say EAGAIN."""
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
    monkeypatch.setattr(file_system.os, "open", refuse)
    sync(tmp_path)
    with pytest.raises(PermissionError):
        sync(tmp_path / "file")
