"""The options that generate and chat share, and the functions that evaluate them."""

import argparse
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from npllama.backend import BACKENDS
from npllama.chat_formats import FORMATS as CHAT_FORMATS
from npllama.console import WRONG_INPUT, ReaderLeftError, check_output, exit_code, tell, utf8
from npllama.dialogue import find_chat_format
from npllama.dialogue_parts import ChatFormat
from npllama.errors import InputError, TokenizerWarning
from npllama.escapes import unescape
from npllama.llama import MAX_NEW_TOKENS, Llama, load
from npllama.progress_line import progress_shown
from npllama.sampling_options import Sampling
from npllama.weight_formats import FORMATS

CONTROL_TOKENS = (
    "The text of a message never becomes a control token. A plain-text tag in a message, such as "
    "[INST], stays text, but the model may take it for a tag."
)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line.

    Attributes:
        texts: an option that takes a text, for the hint about a text that begins with a dash.
        stray: a hint about a word that belongs to no option.
    """

    texts: str
    stray: str

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        options, rest = self.parse_known_args(args, namespace)
        if any(argument.startswith("-") for argument in rest):
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        if rest:
            self.error(f"{rest[0][:60]!r} belongs to no option: {self.stray}")
        return options

    def error(self, message: str) -> NoReturn:
        if "expected one argument" in message:
            message += f"; write {self.texts}=TEXT for a text that begins with a dash"
        self.exit(WRONG_INPUT, f"npllama: error: {message} (--help lists all options)\n")


class Once(argparse.Action):
    """Store a value; a second value is an error."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            hint = "; --prompt-file takes several prompts, one per line"
            raise argparse.ArgumentError(
                self, f"it is given twice: expected one{hint if self.dest == 'prompt' else ''}"
            )
        setattr(namespace, self.dest, values)


# -- adding the options, by group


def add_model(p: argparse.ArgumentParser) -> None:
    """--model."""
    p.add_argument(
        "--model",
        metavar="DIR",
        help="directory with config.json, safetensors and tokenizer.model or tokenizer.json "
        "(default: the story model that ships with npllama)",
    )


def add_escapes(p: argparse.ArgumentParser, texts: str) -> None:
    """-e.

    Args:
        texts: the options whose texts may contain escapes.
    """
    p.add_argument(
        "-e",
        dest="escapes",
        action="store_true",
        help=f"read \\n, \\t, \\\\ and \\uXXXX in {texts} as a line "
        "end, a tab, a backslash and the character with that number; without it they are text",
    )


def add_length(p: argparse.ArgumentParser) -> None:
    """The length of a completion, and the context."""
    length = p.add_argument_group("how long")
    length.add_argument(
        "--max-new-tokens",
        type=int,
        default=MAX_NEW_TOKENS,
        metavar="N",
        help="stop after N tokens; a token is a word or a part of one (default: %(default)s)",
    )
    length.add_argument(
        "--stop",
        type=utf8,
        action="append",
        default=[],
        metavar="TEXT",
        help="stop before this text appears; may be given several times",
    )
    length.add_argument(
        "--ignore-eos", action="store_true", help="continue where the model would end the text"
    )
    add_context(length)


def add_context(group: argparse._ArgumentGroup) -> None:
    """--context and --rope-scaling."""
    group.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="number of tokens of prompt and completion together; fewer need less memory "
        "(default: as many as the model was trained for)",
    )
    group.add_argument(
        "--rope-scaling",
        action=Once,
        metavar="TYPE:FACTOR",
        help="for a long-context model whose config.json lacks the RoPE scaling: linear, dynamic "
        "or yarn, and how many times longer the context is, such as linear:4; dynamic has an "
        "effect only if --context is longer than the model's own",
    )


def add_sampling(p: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The fields of Sampling. Returns their group, for further options."""
    choice = p.add_argument_group("how the next token is chosen")
    for field in fields(Sampling):
        about = field.metadata["option"]
        choice.add_argument(
            flag(field.name),
            type=field.type,
            default=field.default,
            metavar=about.metavar,
            help=f"{about.help} (default: %(default)s)",
        )
    return choice


def add_choice(p: argparse.ArgumentParser) -> None:
    """The fields of Sampling, and the seed."""
    choice = add_sampling(p)
    choice.add_argument(
        "--seed",
        type=int,
        metavar="S",
        help="the same seed gives the same text again (default: a random one; --stats shows it)",
    )


def add_system(group: argparse._ArgumentGroup) -> None:
    """--system."""
    group.add_argument(
        "--system",
        action=Once,
        type=utf8,
        metavar="TEXT",
        help="the system prompt: how the assistant should behave",
    )


def add_chat_format(group: argparse._ArgumentGroup) -> None:
    """--chat-format."""
    group.add_argument(
        "--chat-format",
        choices=tuple(CHAT_FORMATS),
        help="the format that the model was trained on (default: the checkpoint's own chat "
        "template, which needs the extra [chat]; llama-2 if it has none)",
    )


def add_prompt_cache(p: argparse.ArgumentParser) -> None:
    """--prompt-cache and --prompt-cache-read-only."""
    reuse = p.add_argument_group("what a later run reuses")
    reuse.add_argument(
        "--prompt-cache",
        action=Once,
        metavar="FILE",
        help="save the keys and values of the prompt and the completion, or of the dialogue, to "
        "this file (about 1 MB per token for a model of 7 billion parameters); a later run "
        "computes only the part of its prompt that follows the common beginning; the file is "
        "created if it does not exist, and replaced in one step at the end",
    )
    reuse.add_argument(
        "--prompt-cache-read-only",
        action="store_true",
        help="read the file of --prompt-cache and do not change it",
    )


def add_machine(p: argparse.ArgumentParser) -> None:
    """The arguments of `load` besides the model."""
    machine = p.add_argument_group("how it is computed")
    machine.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="numpy computes on the CPU, cupy on an NVIDIA GPU; auto uses the GPU if there is one",
    )
    machine.add_argument(
        "--device",
        type=int,
        metavar="N",
        help="number of the GPU, from 0 (default: the first)",
    )
    machine.add_argument(
        "--dtype",
        choices=tuple(FORMATS),
        help="number format of the weights in memory (default: as stored)",
    )
    machine.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="processor cores to use (default: all that no other program uses)",
    )
    machine.add_argument(
        "--no-graph",
        dest="graph",
        action="store_false",
        help="on a GPU, launch each kernel of a step instead of replaying a CUDA graph",
    )


def add_stats(group: argparse._ArgumentGroup) -> None:
    """--stats."""
    group.add_argument(
        "--stats", action="store_true", help="show speed, memory and seed on standard error"
    )


def flag(field: str) -> str:
    """The option of a field of Sampling or of a keyword: "top_k" has "--top-k"."""
    return "--" + field.replace("_", "-")


# -- evaluating the options


def unescape_texts(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Replace the escapes in the options `names` and in --stop by their characters."""
    for name in names:
        if (text := getattr(args, name)) is not None:
            setattr(args, name, unescape(text, f"--{name}"))
    args.stop = [unescape(text, "--stop") for text in args.stop]


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The options that `add_sampling` provides.

    Raises:
        InputError: a value is out of range.
    """
    return Sampling(**{field.name: getattr(args, field.name) for field in fields(Sampling)})


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of Llama.new_generation that `add_length` and `add_choice` provide.

    Raises:
        InputError: a value is out of the range of a field of Sampling.
    """
    return {
        "max_new_tokens": args.max_new_tokens,
        "sampling": sampling_of(args),
        "seed": args.seed,
        "stop": args.stop,
        "ignore_eos": args.ignore_eos,
    }


def check_model(args: argparse.Namespace) -> None:
    """Raise InputError if --model is empty."""
    if args.model == "":
        raise InputError("--model is empty: expected a model directory")


def find_format(args: argparse.Namespace) -> tuple[ChatFormat, str | None]:
    """`find_chat_format` for --model and --chat-format."""
    directory = Path(args.model) if os.path.isdir(args.model) else None  # load reports others
    return find_chat_format(directory, args.chat_format)


def load_model(args: argparse.Namespace) -> Llama:
    """Load the model, and write its notes to standard error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TokenizerWarning)  # written below as one line
        llama = load(
            args.model,
            args.backend,
            args.dtype,
            args.context,
            args.threads,
            args.device,
            graph=args.graph,
            rope_scaling=args.rope_scaling,
        )
    for note in llama.notes:
        tell(f"npllama: {note}")
    if llama.dtype in llama.backend.slow_dtypes:
        hint = llama.backend.slow_dtypes[llama.dtype]
        tell(f"npllama: computing with {llama.dtype} weights is slow on this machine: {hint}")
    return llama


def run_program(run: Callable[[], int], out_of_memory: str) -> int:
    """Call `run` and return the exit code of the program.

    An error is one line on standard error, and long work shows its progress there. The exit code is
    0 if the reader of standard output leaves, and 130 after Ctrl-C, without a line.

    Args:
        out_of_memory: advice for the line if memory runs out.
    """

    def work() -> int:
        check_output()
        try:
            with progress_shown("npllama"):
                return run()
        except ReaderLeftError:
            return 0

    return exit_code("npllama", work, interrupted=lambda: None, out_of_memory=out_of_memory)
