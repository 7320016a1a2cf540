"""DEST appears completely or not at all: after interrupts, kills, concurrent runs or a full
disk."""

import errno
import os
import resource
import signal
import subprocess
import sys

import pytest

from conftest import ROOT, TINY
from convert import main as convert_main
from model_directory import random_tensors
from test_convert import convert, error_line, loadable, write_llama2c

# Runs convert.py, but pauses at the first tensor, while partial files are next to DEST.
PAUSED = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import convert, converting.conversion

def pause(*_args):
    print("writing", flush=True)
    time.sleep(60)

converting.conversion.check_finite = pause
sys.exit(convert.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return write_llama2c(folder / "model.bin", TINY, random_tensors(TINY))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def in_mid_write(source, dest, *args):
    process = subprocess.Popen(
        [sys.executable, "-c", PAUSED, str(ROOT / "tools"), str(source), str(dest), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "writing\n"
    return process


def ended(process):
    _, told = process.communicate(timeout=30)
    return process.returncode, told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_says_so_and_leaves_nothing(tmp_path, source, number):
    dest = tmp_path / "new" / "folders" / "out"
    process = in_mid_write(source, dest)
    assert names(dest.parent) == [".out.lock", ".out.partial"]
    process.send_signal(number)
    assert ended(process) == (128 + number, f"convert: interrupted: {dest} is as it was\n")
    assert names(tmp_path) == []


def test_an_interrupted_overwrite_leaves_the_old_one(tmp_path, source):
    dest = tmp_path / "out"
    dest.mkdir()
    (dest / "config.json").write_text("kept")
    process = in_mid_write(source, dest, "--overwrite")
    process.send_signal(signal.SIGINT)
    assert ended(process)[0] == 130
    assert (names(tmp_path), names(dest)) == (["out"], ["config.json"])


def test_an_interrupt_while_headers_are_read_says_so(tmp_path, source, monkeypatch, capsys):
    def interrupted(_path):
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("convert.read_source", interrupted)
    assert convert_main([str(source), "--inspect"]) == 143
    assert capsys.readouterr().err == "convert: interrupted\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_interrupt_in_the_instant_of_the_renames_comes_too_late(
    tmp_path, source, monkeypatch, capsys
):
    rename = os.rename

    def interrupting(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        rename(*args)

    monkeypatch.setattr("atomic.os.rename", interrupting)
    assert convert_main([str(source), str(tmp_path / "out")]) == 0
    assert loadable(tmp_path / "out")


def test_an_interrupt_once_dest_stands_says_that_it_is_complete(
    tmp_path, source, monkeypatch, capsys
):
    from converting.conversion import convert as convert_in_full

    def convert_and_be_interrupted(*args):
        convert_in_full(*args)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("convert.convert", convert_and_be_interrupted)
    dest = tmp_path / "out"
    assert convert_main([str(source), str(dest)]) == 130
    assert capsys.readouterr().err.endswith(f"convert: interrupted: {dest} is complete\n")
    assert loadable(dest)


def test_two_conversions_to_one_dest_are_kept_apart(tmp_path, source):
    dest = tmp_path / "out"
    first = in_mid_write(source, dest)
    before = names(tmp_path)
    line = error_line(source, dest, "--overwrite")
    assert "out is being written by another conversion: wait until it ends" in line
    assert names(tmp_path) == before
    assert convert(source, tmp_path / "other").returncode == 0  # another destination is free
    first.kill()
    ended(first)
    assert convert(source, dest).returncode == 0  # a killed process holds no lock
    assert names(tmp_path) == ["other", "out"]


def test_many_conversions_to_one_dest_at_once_leave_a_whole_model(tmp_path, source):
    dest = tmp_path / "folder" / "out"
    command = [sys.executable, str(ROOT / "tools" / "convert.py"), str(source), str(dest)]
    processes = [
        subprocess.Popen([*command, "--overwrite"], stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    outcomes = [ended(process) for process in processes]
    assert 0 in [code for code, _ in outcomes]
    assert all(code == 0 or "another conversion" in told for code, told in outcomes), outcomes
    assert loadable(dest)
    assert names(dest.parent) == ["out"]


# -- leftovers of killed runs


def aside_of(tmp_path, source):
    """A model that was moved aside, as after a kill between the two renames of a replacement."""
    assert convert_main([str(source), str(tmp_path / ".out.replaced")]) == 0
    return tmp_path / ".out.replaced", tmp_path / "out"


@pytest.mark.parametrize("empty", [False, True], ids=["missing", "empty"])
def test_what_stands_aside_is_put_back_where_dest_holds_nothing(tmp_path, source, empty):
    _, dest = aside_of(tmp_path, source)
    if empty:
        dest.mkdir()
    assert "has content" in error_line(source, dest)
    assert names(tmp_path) == ["out"]
    assert loadable(dest)


def test_what_stands_aside_goes_once_dest_is_complete(tmp_path, source):
    _, dest = aside_of(tmp_path, source)
    assert convert_main([str(source), str(tmp_path / "b")]) == 0
    (tmp_path / "b").rename(dest)
    assert "has content" in error_line(source, dest)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("more", [(), ("--overwrite",), ("--dry-run",)])
def test_of_two_that_cannot_be_told_apart_none_is_lost(tmp_path, source, more):
    aside, dest = aside_of(tmp_path, source)
    dest.mkdir()
    (dest / "mine.txt").write_text("kept")
    assert f"{aside} is its former content" in error_line(source, dest, *more)
    assert (dest / "mine.txt").read_text() == "kept"
    assert loadable(aside)


def test_a_dry_run_changes_nothing(tmp_path, source):
    _, dest = aside_of(tmp_path, source)
    assert "has content" in error_line(source, dest, "--dry-run")
    assert convert(source, dest, "--dry-run", "--overwrite").returncode == 0
    assert names(tmp_path) == [".out.replaced"]
    (tmp_path / ".out.partial").mkdir()
    assert convert(source, tmp_path / "a" / "b", "--dry-run").returncode == 0
    assert names(tmp_path) == [".out.partial", ".out.replaced"]


# -- disks


def test_a_disk_that_is_full_in_mid_write_is_one_line_and_leaves_nothing(tmp_path, source):
    """A limit on the file size replaces a full disk: the write fails in the middle of a tensor."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "convert.py"), str(source), str(tmp_path / "a/out")],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"convert: error: {tmp_path}/a/out cannot be written: ")
    assert result.stderr.count("\n") == 1
    assert names(tmp_path) == []


def test_everything_is_on_the_disk_before_dest_is_named(tmp_path, source, monkeypatch):
    synced, order = os.fsync, []
    inode = {}

    def noting(file):
        order.append(os.fstat(file).st_ino)
        synced(file)

    rename = os.rename

    def renaming(before, after):
        inode.update({path.name: path.stat().st_ino for path in before.iterdir()})
        assert set(order) == {*inode.values(), before.stat().st_ino}
        rename(before, after)

    monkeypatch.setattr("atomic.os.fsync", noting)
    monkeypatch.setattr("atomic.os.rename", renaming)
    assert convert_main([str(source), str(tmp_path / "out")]) == 0
    assert {"model.safetensors", "config.json"} <= inode.keys()
    assert order[-1] == tmp_path.stat().st_ino  # the directory with the new name is synced last


def test_a_disk_that_fails_at_the_last_moment_leaves_the_old_one(
    tmp_path, source, monkeypatch, capsys
):
    dest = tmp_path / "out"
    assert convert_main([str(source), str(dest)]) == 0
    (dest / "old").touch()

    def full(_file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("atomic.os.fsync", full)
    assert convert_main([str(source), str(dest), "--overwrite"]) == 2
    assert capsys.readouterr().err.endswith("out cannot be written: No space left on device\n")
    assert (dest / "old").exists()
    assert names(tmp_path) == ["out"]


def test_directories_made_above_dest_go_again_when_it_fails(tmp_path, source):
    content = source.read_bytes()
    broken = tmp_path / "broken.bin"
    broken.write_bytes(content[:28] + b"\xff" * 4 + content[32:])
    (tmp_path / "mine").mkdir()
    assert "NaN" in error_line(broken, tmp_path / "mine" / "a" / "b" / "out")
    assert names(tmp_path) == ["broken.bin", "mine"]
    assert names(tmp_path / "mine") == []
