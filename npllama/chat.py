"""python -m npllama.chat: a dialogue with a model, at a terminal or through pipes.

Answers go to standard output as they are generated, and everything else to standard error.

At a terminal, Ctrl-C stops the answer. Wrong input is reported in one line, and the dialogue
continues. Through a pipe, Ctrl-C ends the program with exit code 130, and wrong input ends it with
exit code 2. The exit code at the end of input is 0.
"""

if __name__ == "__main__":  # before the other imports, which take a while
    from npllama.early_interrupt import end_at_once

    end_at_once()

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from npllama.chat_commands import command_words, run_command
from npllama.chat_formats import story
from npllama.chat_session import Session
from npllama.console import OutputError, open_streams, started_as, tell
from npllama.conversation import Chat
from npllama.dialogue_parts import ChatFormat
from npllama.errors import InputError, NpllamaError, exhausted
from npllama.input_history import History, history_file
from npllama.interrupts import Interrupts
from npllama.llama import Llama
from npllama.message_input import Entry, PipedInput, Source, TypedInput, read_entry
from npllama.options import (
    CONTROL_TOKENS,
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
    find_format,
    generation_options,
    load_model,
    run_program,
    unescape_texts,
)
from npllama.prompt_cache_file import PromptCacheFile, check_options, saved_at_end

STORIES = (
    "the model that ships with npllama tells stories and cannot chat: it continues each line as a "
    "separate story; load a chat model with --model DIR"
)
HINT = "/help lists the commands; Ctrl-D leaves"


class _Parser(Parser):
    texts = "--system"
    stray = "messages are typed, or piped to standard input"

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        words = sys.argv[1:] if args is None else args
        for name in (word.partition("=")[0] for word in words):
            if name in ("--chat", "--prompt", "--prompt-file"):  # else an abbreviation of others
                self.error(f"{name} is an option of generate: {self.stray}")
        return super().parse_args(args, namespace)


def parser() -> argparse.ArgumentParser:
    """All options, each with a help text for somebody who has never run a language model."""
    p = _Parser(
        prog=started_as("chat", "python -m npllama.chat"),
        description="Talk with a LLaMA-2 chat model. At a terminal, Ctrl-C stops an answer, "
        'Ctrl-D leaves, """ begins and ends a message of several lines, and /help lists the '
        "commands. Through a pipe, each line of standard input is a message, or a command if it "
        "begins with / (write // for a message that begins with /). Each answer is written to "
        "standard output with a line end. The first line with an error ends the program.",
        epilog='Example: python -m npllama.chat --model ./llama-2-7b-chat --system "Be brief."',
    )
    add_model(p)
    add_escapes(p, "--system, --stop, /system and /set stop")
    add_length(p)
    add_choice(p)

    chat = p.add_argument_group("the dialogue", CONTROL_TOKENS)
    add_system(chat)
    add_chat_format(chat)
    chat.add_argument(
        "--no-drop",
        dest="drop",
        action="store_false",
        help="refuse a message if the context is full; without this option, the oldest messages "
        "and their answers are left out, and a line reports it",
    )
    chat.add_argument(
        "--no-history",
        dest="history",
        action="store_false",
        help="do not save what you type for the arrow keys of the next session",
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
    advice = "use a shorter --context or a narrower --dtype"
    return run_program(lambda: run(args), out_of_memory=advice)


def run(args: argparse.Namespace) -> int:
    """Do what the parsed arguments ask for, and return the exit code."""
    check_model(args)
    for option, value in (("--system", args.system), ("--chat-format", args.chat_format)):
        if value is not None and args.model is None:
            raise InputError(
                f"{option} needs a chat model, and the model that ships with npllama cannot "
                f"chat: give --model DIR, or leave out {option}"
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
    with saved_at_end(session.prompt_cache):
        if source.is_typed:
            tell(f"npllama: {HINT}")
            talk(session, source)
        else:
            serve(session, source)
    return 0


def chat_format_of(args: argparse.Namespace) -> tuple[ChatFormat, str | None]:
    """The model's chat format, and a note if the model may need another format, or cannot chat.

    Raises:
        TokenizerError: the chat template is damaged.
    """
    return (story, STORIES) if args.model is None else find_format(args)


def open_source(args: argparse.Namespace) -> Source:
    """The source of the messages: a terminal, or a pipe or file."""
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
    return Session(chat, args.stats, args.escapes, prompt_cache)


def do(session: Session, entry: Entry) -> None:
    """Answer a message, or run a command."""
    if entry.is_command:
        run_command(session, entry.text)
    else:
        session.say(entry.text)


def talk(session: Session, source: Source) -> None:
    """Hold a dialogue at a terminal, until the user leaves.

    Raises:
        OutputError: standard output cannot be written.
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
                tell("")  # a line end after the prompt sign
                return
            with suppress(KeyboardInterrupt), interrupts.heard():
                try_to_do(session, entry)


def try_to_do(session: Session, entry: Entry) -> None:
    """As `do`; an error is one line on standard error.

    Raises:
        OutputError: standard output cannot be written.
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
        tell(f"npllama: out of {memory}: shorten the dialogue with /undo or /clear")


def serve(session: Session, source: Source) -> None:
    """Hold a dialogue through a pipe, until the input ends.

    Raises:
        InputError: a line has an error; the message has its number.
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
