"""Dialogues in files: whole or not at all, and checked."""

import json
import os

import pytest

from npllama.errors import InputError
from npllama.saved_dialogue import load_dialogue, save_dialogue

MESSAGES = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "größe\n🦙"},
    {"role": "assistant", "content": ""},
]


@pytest.mark.parametrize("messages", [[], MESSAGES[:1], MESSAGES[1:], MESSAGES])
def test_a_dialogue_comes_back_and_replaces_another(tmp_path, messages):
    file = tmp_path / "d.json"
    for content in (MESSAGES, messages):
        save_dialogue(file, content)
    assert load_dialogue(file) == messages
    assert os.listdir(tmp_path) == ["d.json"]
    if messages:
        assert "größe" in file.read_text(encoding="utf-8") or len(messages) == 1


def test_a_link_and_a_mode_stay(tmp_path):
    file, link = tmp_path / "d.json", tmp_path / "link"
    save_dialogue(file, [])
    file.chmod(0o640)
    link.symlink_to("d.json")
    save_dialogue(link, MESSAGES)
    assert link.is_symlink() and load_dialogue(file) == MESSAGES
    assert file.stat().st_mode & 0o777 == 0o640


def test_nothing_else_is_replaced(tmp_path):
    text = tmp_path / "notes.txt"
    for content in ("notes", "{}", '["a"]', ""):
        text.write_text(content)
        with pytest.raises(InputError, match="exists and is no saved dialogue"):
            save_dialogue(text, MESSAGES)
        assert text.read_text() == content
    with pytest.raises(InputError, match="is a directory: expected the name of a file"):
        save_dialogue(tmp_path, MESSAGES)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="exists and is no saved dialogue"):
        save_dialogue(tmp_path / "pipe", MESSAGES)


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "d.json"
    with pytest.raises(InputError, match="cannot be written: No such file"):
        save_dialogue(tmp_path / "none" / "d.json", MESSAGES)
    save_dialogue(file, MESSAGES)

    def fail(*_paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match="cannot be written: No space left"):
        save_dialogue(file, [])
    assert os.listdir(tmp_path) == ["d.json"] and load_dialogue(file) == MESSAGES


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        ({"messages": []}, "it is not a list"),
        ([1], "message 1 is not an object"),
        ([{"role": "user"}], "message 1 has no text as content"),
        ([{"role": "user", "content": ["a"]}], "message 1 has no text as content"),
        ([{"role": "user", "content": "\ud83e"}], "message 1 is not valid Unicode"),
        ([{"role": "tool", "content": ""}], "the role of message 1 is 'tool'"),
        ([*MESSAGES[1:], MESSAGES[0]], "the role of message 3 is system, expected user"),
        ([MESSAGES[2]], "the role of message 1 is assistant, expected user"),
        ([*MESSAGES, MESSAGES[2]], "the role of message 4 is assistant, expected user"),
        (MESSAGES[:2], "its last message has no answer"),
    ],
)
def test_what_is_no_dialogue_is_one_line(tmp_path, content, problem):
    file = tmp_path / "d.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(InputError) as error:
        load_dialogue(file)
    assert str(error.value).startswith(f"{file} ") and problem in str(error.value)


def test_other_names_of_a_message_are_left_out(tmp_path):
    file = tmp_path / "d.json"
    file.write_text(json.dumps([{**message, "id": 3} for message in MESSAGES]))
    assert load_dialogue(file) == MESSAGES


def test_a_file_that_is_missing_is_one_line(tmp_path):
    with pytest.raises(InputError, match="cannot be read: No such file or directory"):
        load_dialogue(tmp_path / "none.json")
