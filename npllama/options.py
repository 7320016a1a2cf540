"""The options that generate and chat have in common, and what follows from them."""

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from npllama.backend import BACKENDS
from npllama.chat_formats import FORMATS as CHAT_FORMATS
from npllama.console import WRONG_INPUT, tell, utf8
from npllama.errors import InputError, TokenizerWarning
from npllama.escapes import unescape
from npllama.llama import MAX_NEW_TOKENS, Llama, load
from npllama.sampling_options import Sampling
from npllama.weight_formats import FORMATS


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line.

    Attributes:
        texts: the option that takes a text, for the hint about one that begins with a dash.
        stray: where a word that belongs to no option was probably meant to go.
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
            message += f"; a text that begins with a dash is given as {self.texts}=TEXT"
        self.exit(WRONG_INPUT, f"npllama: error: {message} (--help lists all options)\n")


class Once(argparse.Action):
    """Store a value, and refuse a second one rather than forget the first."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            hint = "; --prompt-file takes several prompts, one a line"
            raise argparse.ArgumentError(
                self, f"it is given twice: expected one{hint if self.dest == 'prompt' else ''}"
            )
        setattr(namespace, self.dest, values)


# -- the options, by group


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
        texts: the options whose texts may hold escapes.
    """
    p.add_argument(
        "-e",
        dest="escapes",
        action="store_true",
        help=f"\\n, \\t, \\\\ and \\uXXXX in {texts} are a line "
        "end, a tab, a backslash and the character with that number; without it they are text",
    )


def add_length(p: argparse.ArgumentParser) -> None:
    """Where a completion ends, and the context."""
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
        "--ignore-eos", action="store_true", help="go on where the model would end the text"
    )
    length.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="room for N tokens of prompt and completion together; less needs less memory "
        "(default: all that the model was trained for)",
    )
    length.add_argument(
        "--rope-scaling",
        action=Once,
        metavar="TYPE:FACTOR",
        help="for a model of a longer context whose config.json does not say how: linear, dynamic "
        "or yarn and how many times longer, such as linear:4; dynamic changes nothing unless "
        "--context asks for more than the model's own",
    )


def add_choice(p: argparse.ArgumentParser) -> None:
    """The fields of Sampling, and the seed."""
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
        help="how the assistant should behave",
    )


def add_chat_format(group: argparse._ArgumentGroup) -> None:
    """--chat-format."""
    group.add_argument(
        "--chat-format",
        choices=tuple(CHAT_FORMATS),
        help="the format that the model was trained on (default: the checkpoint's own chat "
        "template, which needs the extra [chat]; llama-2 where it has none)",
    )


def add_prompt_cache(p: argparse.ArgumentParser) -> None:
    """--prompt-cache and --prompt-cache-read-only."""
    reuse = p.add_argument_group("what is not computed again")
    reuse.add_argument(
        "--prompt-cache",
        action=Once,
        metavar="FILE",
        help="save what was computed for the prompt and the completion, or for the dialogue, to "
        "this file (about 1 MB per token for a model of 7 billion parameters); a later run "
        "computes only what follows the tokens that both begin with; the file is created if there "
        "is none, and replaced in one step at the end",
    )
    reuse.add_argument(
        "--prompt-cache-read-only",
        action="store_true",
        help="use the file of --prompt-cache and leave it as it is",
    )


def add_machine(p: argparse.ArgumentParser) -> None:
    """What `load` is given beside the model."""
    machine = p.add_argument_group("how it is computed")
    machine.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="numpy on the CPU, cupy on an NVIDIA GPU, auto takes the GPU if there is one",
    )
    machine.add_argument(
        "--device",
        type=int,
        metavar="N",
        help="which GPU where there are several, counted from 0 (default: the first)",
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
        help="processor cores to compute on (default: all that no other program uses)",
    )
    machine.add_argument(
        "--no-graph",
        dest="graph",
        action="store_false",
        help="on a GPU, launch every kernel of a step anew instead of replaying it as a CUDA graph",
    )


def add_stats(group: argparse._ArgumentGroup) -> None:
    """--stats."""
    group.add_argument(
        "--stats", action="store_true", help="show speed, memory and seed on standard error"
    )


def flag(field: str) -> str:
    """The option for a field of Sampling or a keyword: "top_k" is "--top-k"."""
    return "--" + field.replace("_", "-")


# -- what they ask for


def unescape_texts(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Put the characters that escapes stand for into the options `names` and --stop."""
    for name in names:
        if (text := getattr(args, name)) is not None:
            setattr(args, name, unescape(text, f"--{name}"))
    args.stop = [unescape(text, "--stop") for text in args.stop]


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of Llama.new_generation for the options on length and choice.

    Raises:
        InputError: a number out of the range of a field of Sampling.
    """
    sampling = Sampling(**{field.name: getattr(args, field.name) for field in fields(Sampling)})
    return {
        "max_new_tokens": args.max_new_tokens,
        "sampling": sampling,
        "seed": args.seed,
        "stop": args.stop,
        "ignore_eos": args.ignore_eos,
    }


def check_model(args: argparse.Namespace) -> None:
    """Raise InputError where --model is empty, before anything is read."""
    if args.model == "":
        raise InputError("--model is empty: expected a model directory")


def load_model(args: argparse.Namespace) -> Llama:
    """Load the model, and write to standard error what there is to know about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TokenizerWarning)  # shown below, as a line
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
        tell(f"npllama: {llama.dtype} weights are slow to compute with here: {hint}")
    return llama
