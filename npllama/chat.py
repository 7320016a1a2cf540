"""python -m npllama.chat: a dialogue with a model, at a terminal or through pipes.

Answers go to stdout as they are made, everything else to stderr. Exit codes: 0 at the end of
input, 2 for input that cannot be served (one line says why), 130 after Ctrl-C in a pipe. At a
terminal Ctrl-C stops the answer, and what cannot be served is a line, after which the dialogue
goes on.
"""

if __name__ == "__main__":  # first of all, since the imports take a while
    from npllama.early_interrupt import end_at_once

    end_at_once()

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from npllama.chat_commands import command_words, run_command
from npllama.chat_formats import story
from npllama.chat_session import Session
from npllama.console import (
    OutputError,
    ReaderLeftError,
    check_output,
    exit_code,
    open_streams,
    started_as,
    tell,
)
from npllama.conversation import Chat
from npllama.dialogue import find_chat_format
from npllama.dialogue_parts import ChatFormat
from npllama.errors import InputError, NpllamaError, exhausted
from npllama.input_history import History, history_file
from npllama.interrupts import Interrupts
from npllama.llama import Llama
from npllama.message_input import Entry, PipedInput, Source, TypedInput, read_entry
from npllama.options import (
    Parser,
    add_chat_format,
    add_choice,
    add_escapes,
    add_length,
    add_machine,
    add_model,
    add_prompt_cache,
    add_stats,
    add_system,
    check_model,
    generation_options,
    load_model,
    unescape_texts,
)
from npllama.progress_line import progress_shown
from npllama.prompt_cache_file import PromptCacheFile, check_options

STORIES = (
    "the model that ships with npllama tells stories and knows no dialogue: it continues each "
    "line as a story of its own; --model DIR takes a chat model"
)
HINT = "/help lists the commands; Ctrl-D leaves"


class _Parser(Parser):
    texts = "--system"
    stray = "messages are typed, or piped to standard input"


def parser() -> argparse.ArgumentParser:
    """All options, each with a help text for somebody who has never run a language model."""
    p = _Parser(
        prog=started_as("chat", "python -m npllama.chat"),
        description="Talk with a LLaMA-2 chat model. At a terminal, Ctrl-C stops an answer, "
        'Ctrl-D leaves, """ begins and ends a message of several lines, and /help lists the '
        "commands. Through a pipe, each line of standard input is a message, or a command where "
        "it begins with / (// begins a message with /), and each answer goes to standard output "
        "with a line end behind it; the first line that cannot be served ends the program.",
        epilog='Example: python -m npllama.chat --model ./llama-2-7b-chat --system "Be brief."',
    )
    add_model(p)
    add_escapes(p, "--system, --stop, /system and /set stop")
    add_length(p)
    add_choice(p)

    chat = p.add_argument_group(
        "the dialogue",
        "A message can make no control token, whatever it says. Tags that are plain text, such as "
        "[INST], stay text in a message, and the model may take them for tags.",
    )
    add_system(chat)
    add_chat_format(chat)
    chat.add_argument(
        "--no-drop",
        dest="drop",
        action="store_false",
        help="where the context is full, refuse the message; without it the oldest messages are "
        "left out with their answers, and a line says so",
    )
    chat.add_argument(
        "--no-history",
        dest="history",
        action="store_false",
        help="keep nothing of what is typed for the arrow keys of the next session",
    )
    add_prompt_cache(p)
    add_machine(p)
    output = p.add_argument_group("what is shown")
    add_stats(output)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; its exit code."""
    open_streams()
    args = parser().parse_args(argv)

    def work() -> int:
        check_output()
        try:
            with progress_shown("npllama"):
                return run(args)
        except ReaderLeftError:
            return 0

    return exit_code(
        "npllama",
        work,
        interrupted=lambda: None,  # what was said until then is there
        out_of_memory="use a shorter --context or a narrower --dtype",
    )


def run(args: argparse.Namespace) -> int:
    """What the parsed arguments ask for; the exit code."""
    check_model(args)
    for option, value in (("--system", args.system), ("--chat-format", args.chat_format)):
        if value is not None and args.model is None:
            raise InputError(
                f"{option} is for a chat model, and the one that ships with npllama tells "
                f"stories: give --model DIR, or leave out {option}"
            )
    if args.escapes:
        unescape_texts(args, ("system",))
    options = generation_options(args)
    check_options(args.prompt_cache, args.prompt_cache_read_only)
    chat_format, note = chat_format_of(args)
    source = open_source(args)
    llama = load_model(args)
    session = new_session(llama, chat_format, options, args)
    if note is not None:
        tell(f"npllama: {note}")
    try:
        if source.is_typed:
            tell(f"npllama: {HINT}")
            talk(session, source)
        else:
            serve(session, source)
    finally:  # after Ctrl-C and errors too
        if session.prompt_cache is not None:
            session.prompt_cache.save()
    return 0


def chat_format_of(args: argparse.Namespace) -> tuple[ChatFormat, str | None]:
    """The model's chat format, and what to say of it where it has none.

    Raises:
        TokenizerError: a chat template that is damaged.
    """
    if args.model is None:
        return story, STORIES
    directory = Path(args.model) if os.path.isdir(args.model) else None  # load says what it is
    chat_format, note = find_chat_format(directory, args.chat_format)
    if note is not None:
        note = (
            f"{args.model} has no chat template (in chat_template.jinja or tokenizer_config.json): "
            "messages are put into Llama-2-chat's format; name another with --chat-format, or use "
            "npllama generate if it is no chat model"
        )
    return chat_format, note


def open_source(args: argparse.Namespace) -> Source:
    """Where messages come from: a terminal, or a pipe or file."""
    if sys.stdin is None or not sys.stdin.isatty():
        return PipedInput()
    return TypedInput(History(history_file() if args.history else None), command_words())


def new_session(
    llama: Llama, chat_format: ChatFormat, options: dict[str, Any], args: argparse.Namespace
) -> Session:
    """A session without messages.

    Raises:
        InputError: an option is out of range, or the file of --prompt-cache cannot be used.
        TokenizerError: the model has no tokenizer.
    """
    if chat_format is story:
        options = {**options, "fresh_text": False}
    prompt_cache = None
    if args.prompt_cache is not None:
        read_only = args.prompt_cache_read_only
        prompt_cache = PromptCacheFile(llama, args.prompt_cache, read_only=read_only)
    chat = Chat(
        llama,
        system=args.system,
        chat_format=chat_format,
        cache=None if prompt_cache is None else prompt_cache.cache,
        drop_old_turns=args.drop or chat_format is story,
        **options,
    )
    session = Session(chat, args.stats, args.escapes, prompt_cache)
    session.check_options(options)
    return session


def do(session: Session, entry: Entry) -> None:
    """Answer a message, or run a command."""
    if entry.is_command:
        run_command(session, entry.text)
    else:
        session.say(entry.text)


def talk(session: Session, source: Source) -> None:
    """A dialogue at a terminal, until the user leaves it.

    Raises:
        OutputError: standard output is gone.
    """
    with Interrupts() as interrupts:
        while not session.is_over:
            try:
                with interrupts.heard():
                    entry = read_entry(source)
            except KeyboardInterrupt:
                tell("\n(Ctrl-D or /bye leaves)")
                continue
            except InputError as error:
                tell(f"npllama: {error}")
                continue
            if entry is None:
                tell("")  # the prompt's line ends
                return
            with suppress(KeyboardInterrupt), interrupts.heard():
                try_to_do(session, entry)


def try_to_do(session: Session, entry: Entry) -> None:
    """As `do`, with a line on standard error where that is not possible.

    Raises:
        OutputError: standard output is gone.
    """
    try:
        do(session, entry)
    except OutputError:
        raise
    except NpllamaError as error:
        tell(f"npllama: {error}")
    except (MemoryError, RuntimeError) as error:
        if (memory := exhausted(error)) is None:
            raise
        tell(f"npllama: out of {memory}: /clear or /undo makes the dialogue shorter")


def serve(session: Session, source: Source) -> None:
    """A dialogue through a pipe: the first line that cannot be served ends it.

    Raises:
        InputError: such a line; the message names it.
    """
    while not session.is_over and (entry := read_entry(source)) is not None:
        try:
            do(session, entry)
        except OutputError:
            raise
        except NpllamaError as error:
            raise InputError(f"{source.where()}{error}") from None


if __name__ == "__main__":
    sys.exit(main())
