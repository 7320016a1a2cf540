"""The commands of npllama.chat: lines that begin with "/"."""

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from npllama.chat_session import Session
from npllama.chat_settings import changed, quoted, setting_name, setting_names, shown
from npllama.console import tell
from npllama.errors import InputError
from npllama.saved_dialogue import load_dialogue, save_dialogue


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        run: is called with the session and the argument.
        about: the description in /help.
        takes: the name of the argument in /help, in brackets if it is optional; "" if the command
            takes none.
    """

    run: Callable[[Session, str], None]
    about: str
    takes: str = ""


def run_command(session: Session, line: str) -> None:
    """Run the command of a line, which is given without its "/".

    Raises:
        InputError: there is no such command, its argument is wrong, or it fails.
    """
    word, _, rest = line.partition(" ")
    name, rest = word.lower(), rest.strip()
    name = _OTHER_NAMES.get(name, name)
    if name not in COMMANDS:
        raise InputError(_unknown(word))
    command = COMMANDS[name]
    if rest and not command.takes:
        raise InputError(f"/{name} takes no argument: found {rest!r:.60}")
    if not rest and command.takes and not command.takes.startswith("["):
        raise InputError(f"/{name} needs the name of a file: write /{name} {command.takes}")
    command.run(session, rest)


def command_words() -> list[str]:
    """The lines that Tab completes: commands, and /set with the name of a setting."""
    names = [f"/{name}" for name in (*COMMANDS, *_OTHER_NAMES)]
    return [*names, *(f"/set {name}" for name in setting_names())]


def _unknown(word: str) -> str:
    nearest = difflib.get_close_matches(word.lower(), [*COMMANDS, *_OTHER_NAMES], n=2, cutoff=0.5)
    hint = f" (did you mean {' or '.join(f'/{name}' for name in nearest)}?)" if nearest else ""
    return (
        f"there is no command {'/' + word!r:.60}{hint}: /help lists the commands; write // for a "
        "message that begins with /"
    )


def _help(session: Session, _rest: str) -> None:
    rows = [(f"/{name} {command.takes}", command.about) for name, command in COMMANDS.items()]
    width = max(len(usage) for usage, _ in rows)
    for usage, about in (*rows, *_TYPING):
        tell(f"  {usage:<{width}}  {about}")


def _system(session: Session, text: str) -> None:
    if not text:
        prompt = session.chat.system
        tell("there is no system prompt" if prompt is None else f"system prompt: {prompt}")
        return
    session.set_system(session.unescaped(quoted(text), "/system") or None)
    tell("the system prompt is " + ("set" if session.chat.system is not None else "removed"))


def _regen(session: Session, _rest: str) -> None:
    session.answer_again()


def _undo(session: Session, _rest: str) -> None:
    users = [m["content"] for m in session.chat.messages if m["role"] == "user"]
    if not session.chat.undo():
        raise InputError("there is no message to remove")
    tell(f"removed this message and its answer: {_short(users[-1])}")


def _clear(session: Session, _rest: str) -> None:
    session.chat.clear()
    kept = "" if session.chat.system is None else ", except for the system prompt"
    tell(f"the dialogue is empty{kept}")


def _save(session: Session, name: str) -> None:
    name = quoted(name)
    save_dialogue(_path(name), session.chat.messages)
    tell(f"saved {_messages(session)} to {name}")


def _load(session: Session, name: str) -> None:
    name = quoted(name)
    had_system = session.chat.system is not None
    session.replace_messages(load_dialogue(_path(name)))
    removed = had_system and session.chat.system is None
    note = "; it has no system prompt, and the earlier one is removed" if removed else ""
    tell(f"loaded {_messages(session)} from {name}{note}")


def _set(session: Session, rest: str) -> None:
    name, _, value = rest.partition(" ")
    if "=" in name:  # name=value
        name, _, value = rest.partition("=")
    names = [setting_name(name)] if name else setting_names()
    if value.strip():
        value = session.unescaped(value.strip(), f"/set {name}")
        session.change_options(changed(session.chat.options, name, value))
    width = max(map(len, names))
    for name in names:
        tell(f"  {name:<{width}}  {shown(session.chat.options, name)}")


def _stats(session: Session, _rest: str) -> None:
    session.print_stats()


def _bye(session: Session, _rest: str) -> None:
    session.is_over = True


COMMANDS = {
    "help": Command(_help, "show this list"),
    "system": Command(_system, 'show or set the system prompt; "" removes it', "[TEXT]"),
    "regen": Command(_regen, "answer the last message again"),
    "undo": Command(_undo, "remove the last message and its answer"),
    "clear": Command(_clear, "begin a new dialogue with the same system prompt"),
    "save": Command(_save, "write the dialogue to a file, as JSON", "FILE"),
    "load": Command(_load, "continue a saved dialogue", "FILE"),
    "set": Command(_set, "show or change settings, such as the temperature", "[NAME [VALUE]]"),
    "stats": Command(_stats, "show tokens read and kept, speed and more of the latest answer"),
    "bye": Command(_bye, "leave, as with Ctrl-D"),
}
_TYPING = (
    ('"""', "begin and end several lines of a message or of /system; a paste is one message"),
    ("//...", "send a message that begins with /"),
    ("Ctrl-C", "stop an answer"),
    ("Ctrl-D", "leave"),
)
_OTHER_NAMES = {"exit": "bye", "quit": "bye", "?": "help"}


def _path(name: str) -> Path:
    if "\0" in name:
        raise InputError("the name of the file contains a zero byte")
    return Path(os.path.expanduser(name))


def _messages(session: Session) -> str:
    n = len(session.chat.messages)
    return f"{n} message" + ("" if n == 1 else "s")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."
