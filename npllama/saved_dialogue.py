"""Dialogues in files: each is a JSON list of messages."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from npllama.atomic_file import atomic_file
from npllama.dialogue_parts import Message
from npllama.errors import InputError
from npllama.small_file import MAX_JSON, parse_json, read_small_file

_ROLES = ("system", "user", "assistant")


def save_dialogue(path: Path, messages: Sequence[Message]) -> None:
    """Write messages to a file, whole or not at all.

    A saved dialogue at `path` is replaced; another file is not. A link is followed.

    Raises:
        InputError: another file is at `path`, or it cannot be written.
    """
    path = Path(os.path.realpath(path))
    _check_replaceable(path)
    content = json.dumps(list(messages), ensure_ascii=False, indent=1) + "\n"
    with atomic_file(path) as partial:
        partial.write_bytes(content.encode("utf-8"))


def _check_replaceable(path: Path) -> None:
    if not os.path.lexists(path):
        return
    if path.is_dir():
        raise InputError(f"{path} is a directory: expected the name of a file")
    try:
        load_dialogue(path)
    except InputError:
        raise InputError(
            f"{path} exists and is no saved dialogue: expected the name of a new file, or of a "
            "saved dialogue, which is replaced"
        ) from None


def load_dialogue(path: Path) -> list[dict[str, str]]:
    """The messages of a file that `save_dialogue` or another program wrote.

    A dialogue is an optional system prompt, and then the user's messages and the assistant's
    answers in turn.

    Raises:
        InputError: the file cannot be read, or is not a dialogue.
    """
    try:
        content = read_small_file(path, MAX_JSON)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        messages = parse_json(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not JSON: expected a dialogue that /save wrote") from None
    problem = _problem(messages)
    if problem is not None:
        raise InputError(
            f'{path} is not a dialogue: {problem}; expected [{{"role": "user", "content": "..."}}, '
            '{"role": "assistant", ...}, ...]'
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _problem(messages: object) -> str | None:
    """The first thing that is wrong with messages from a file; None if nothing is."""
    if not isinstance(messages, list):
        return "it is not a list"
    n_system = 0
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            return f"message {number} is not an object"
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                return f"message {number} has no text as {name}"
            if any("\ud800" <= c <= "\udfff" for c in message[name]):
                return f"message {number} is not valid Unicode"
        role = message["role"]
        if role not in _ROLES:
            return f"the role of message {number} is {role!r:.40}"
        if number == 1 and role == "system":
            n_system = 1
            continue
        turn = _ROLES[1 + (number - 1 - n_system) % 2]
        if role != turn:
            return f"the role of message {number} is {role}, expected {turn}"
    if (len(messages) - n_system) % 2:
        return "its last message has no answer"
    return None
