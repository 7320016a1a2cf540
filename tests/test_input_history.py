"""The history of what was typed."""

import os
from pathlib import Path

import pytest

from npllama import input_history
from npllama.input_history import MOST_ENTRIES, History, history_file

ENTRIES = ["one", "two\nlines", r"C:\new", "größe 🦙\ttab", r'"""\\' + "\n\n"]


def test_entries_come_back_in_order_and_are_their_owners_alone(tmp_path):
    path = tmp_path / "state" / "npllama" / "chat_history"
    history = History(path)
    assert not path.parent.exists()  # before something is typed
    assert [history.add(entry) for entry in [*ENTRIES, ENTRIES[-1]]] == [*[True] * 5, False]
    assert History(path).entries == history.entries == ENTRIES
    assert path.read_text(encoding="utf-8").count("\n") == 5
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    path.chmod(0o644)
    assert History(path).add("more")
    assert path.stat().st_mode & 0o777 == 0o600


def test_two_sessions_append_to_one_file(tmp_path):
    path = tmp_path / "h"
    one, other = History(path), History(path)
    one.add("a")
    other.add("b")
    one.add("c")
    assert History(path).entries == ["a", "b", "c"]


def test_a_long_history_keeps_its_latest_entries(tmp_path, monkeypatch):
    path = tmp_path / "h"
    lines = [f"entry {i}" for i in range(2 * MOST_ENTRIES + 1)]
    path.write_text("\n".join(lines) + "\n")
    assert History(path).entries == lines[-MOST_ENTRIES:]
    assert path.read_text() == "\n".join(lines[-MOST_ENTRIES:]) + "\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["h"]
    path.write_text("\n".join(lines) + "\n")

    def fail(*_paths):
        raise OSError

    monkeypatch.setattr(os, "replace", fail)
    assert History(path).entries == lines[-MOST_ENTRIES:]
    assert os.listdir(tmp_path) == ["h"]
    assert path.read_text() == "\n".join(lines) + "\n"


def test_what_is_no_history_is_an_empty_one(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "pipe", tmp_path / "folder", tmp_path / "file" / "h", None):
        history = History(path)
        assert history.entries == [] and history.add("a") and history.entries == ["a"]
    monkeypatch.setattr(input_history, "_MOST_BYTES", 3)
    (tmp_path / "large").write_text("none of ours\n")
    history = History(tmp_path / "large")
    assert history.entries == [] and history.add("a")
    assert (tmp_path / "large").read_text() == "none of ours\n"


def test_lines_of_somebody_else_are_entries_too(tmp_path):
    (tmp_path / "h").write_bytes(b"\\q\n\n\xff\n")
    assert History(tmp_path / "h").entries == ["\\q", "\ufffd"]


@pytest.mark.parametrize(
    "state, home, path",
    [
        ("/s", "/h", "/s/npllama/chat_history"),
        ("", "/h", "/h/.local/state/npllama/chat_history"),
        ("relative", "/h", "/h/.local/state/npllama/chat_history"),
        ("", "", None),
    ],
)
def test_where_it_lies(monkeypatch, state, home, path):
    monkeypatch.setenv("XDG_STATE_HOME", state)
    monkeypatch.setenv("HOME", home)
    assert history_file() == (None if path is None else Path(path))
