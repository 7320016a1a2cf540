"""python -m npllama.generate: continue a prompt from the command line.

The text goes to stdout as it is made, everything else to stderr. Exit codes: 0, 2 for input
that cannot be served (one line says why), 130 after Ctrl-C.
"""

if __name__ == "__main__":  # first of all, since the imports take a while
    from npllama.early_interrupt import end_at_once

    end_at_once()

import argparse
import json
import os
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import NoReturn

from npllama.backend import BACKENDS
from npllama.chat_formats import FORMATS as CHAT_FORMATS
from npllama.completion import Completion
from npllama.console import (
    INTERRUPTED,
    ReaderLeftError,
    check_output,
    exit_code,
    open_streams,
    reason,
    started_as,
    tell,
    utf8,
    write,
)
from npllama.dialogue import encode_chat, find_chat_format
from npllama.dialogue_parts import ChatFormat
from npllama.errors import InputError, TokenizerWarning
from npllama.escapes import unescape
from npllama.generation import Generation
from npllama.llama import MAX_NEW_TOKENS, Llama, load
from npllama.progress_line import progress_shown
from npllama.prompt_cache_file import PromptCacheFile, check_options
from npllama.sampling_options import Sampling
from npllama.special_tokens import encode_special
from npllama.weight_formats import FORMATS

STANDARD_INPUT = "standard input"
BATCH_SIZE = 32
"""Prompts that are decoded together by default. More gain little: see tools/README.md."""


class _Parser(argparse.ArgumentParser):
    """argparse, with errors of one line.

    Attributes:
        text: the options of which one is required. argparse would check that before it finds
            words that belong to no option, so `parse_args` does.
    """

    text: argparse._MutuallyExclusiveGroup

    def format_help(self) -> str:
        self.text.required = True  # as the usage shows it
        try:
            return super().format_help()
        finally:
            self.text.required = False

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        options, rest = self.parse_known_args(args, namespace)
        if any(argument.startswith("-") for argument in rest):
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        if rest:
            self.error(
                f"{rest[0][:60]!r} belongs to no option: give the text with --prompt, in quotation "
                "marks"
            )
        if options.prompt is None and options.prompt_file is None:
            self.error("a text is required: give --prompt TEXT or --prompt-file FILE")
        return options

    def error(self, message: str) -> NoReturn:
        if "expected one argument" in message:
            message += "; a text that begins with a dash is given as --prompt=TEXT"
        self.exit(2, f"npllama: error: {message} (--help lists all options)\n")


class _Once(argparse.Action):
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


def parser() -> argparse.ArgumentParser:
    """All options, each with a help text for somebody who has never run a language model."""
    p = _Parser(
        prog=started_as("generate", "python -m npllama.generate"),
        description="Continue a text with a LLaMA-2 model. The text goes to standard output as "
        "it is made; everything else goes to standard error, on a terminal with the time left of "
        "what takes long.",
        epilog='Example: python -m npllama.generate --model ./llama-2-7b --prompt "The sea"',
    )
    p.add_argument(
        "--model",
        metavar="DIR",
        help="directory with config.json, safetensors and tokenizer.model or tokenizer.json "
        "(default: the story model that ships with npllama)",
    )
    source = p.text = p.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt",
        action=_Once,
        type=utf8,
        metavar="TEXT",
        help='the text to continue; "" starts from nothing, "-" reads all of standard input',
    )
    source.add_argument(
        "--prompt-file",
        action=_Once,
        metavar="FILE",
        help="a file with one prompt a line, continued together; an empty line starts from "
        'nothing, "-" reads the lines of standard input',
    )
    p.add_argument(
        "-e",
        dest="escapes",
        action="store_true",
        help="\\n, \\t, \\\\ and \\uXXXX in --prompt, --system, --answer and --stop are a line "
        "end, a tab, a backslash and the character with that number; without it they are text",
    )
    p.add_argument(
        "--special",
        action="store_true",
        help="control tokens written in the prompt count: </s>, say, and the added tokens of "
        "tokenizer.json; without it they are text like any other",
    )

    p.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="prompts of --prompt-file that are decoded together; the next one begins where one "
        f"has ended (default: {BATCH_SIZE}, or as many as fit the memory)",
    )

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
        action=_Once,
        metavar="TYPE:FACTOR",
        help="for a model of a longer context whose config.json does not say how: linear, dynamic "
        "or yarn and how many times longer, such as linear:4; dynamic changes nothing unless "
        "--context asks for more than the model's own",
    )

    choice = p.add_argument_group("how the next token is chosen")
    for field in fields(Sampling):
        about = field.metadata["option"]
        choice.add_argument(
            "--" + field.name.replace("_", "-"),
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

    chat = p.add_argument_group(
        "chat, for models that are made for it",
        "A message can make no control token, whatever it says. Tags that are plain text, such as "
        "[INST], stay text in a message, and the model may take them for tags.",
    )
    chat.add_argument(
        "--chat", action="store_true", help="the prompt is a message to be answered, not a text"
    )
    chat.add_argument(
        "--system",
        action=_Once,
        type=utf8,
        metavar="TEXT",
        help="how the assistant should behave",
    )
    chat.add_argument(
        "--answer",
        action=_Once,
        type=utf8,
        metavar="TEXT",
        help="how the assistant's answer begins; the model continues it",
    )
    chat.add_argument(
        "--chat-format",
        choices=tuple(CHAT_FORMATS),
        help="the format that the model was trained on (default: the checkpoint's own chat "
        "template, which needs the extra [chat]; llama-2 where it has none)",
    )

    reuse = p.add_argument_group("what is not computed again")
    reuse.add_argument(
        "--prompt-cache",
        action=_Once,
        metavar="FILE",
        help="keep what was computed for prompt and completion in this file (about 1 MB per token "
        "for a model of 7 billion parameters); a later prompt that begins with the same tokens "
        "reads only the rest; the file is made where there is none, and replaced in one step at "
        "the end",
    )
    reuse.add_argument(
        "--prompt-cache-read-only",
        action="store_true",
        help="use the file of --prompt-cache and leave it as it is",
    )

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

    output = p.add_argument_group("what is shown")
    output.add_argument(
        "--no-echo", action="store_true", help="print the completion without the prompt"
    )
    output.add_argument(
        "--logprobs",
        nargs="?",
        type=int,
        const=0,
        metavar="N",
        help="show each token's log-probability, on standard error or in --json, and with a number "
        "the N tokens, up to 20, that were likeliest in its place",
    )
    output.add_argument(
        "--stats", action="store_true", help="show speed, memory and seed on standard error"
    )
    output.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object a prompt instead of text; "
        'its "timings" are those of all "rows" of the batch together',
    )
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
        interrupted=lambda: None,  # it came before there was any text
        out_of_memory="use a shorter --context, a narrower --dtype or fewer prompts",
    )


def run(args: argparse.Namespace) -> int:
    """What the parsed arguments ask for; the exit code."""
    sampling = Sampling(**{field.name: getattr(args, field.name) for field in fields(Sampling)})
    if args.model == "":
        raise InputError("--model is empty: expected a model directory")
    if args.system is not None and not args.chat:
        raise InputError("--system is for --chat: give both, or neither")
    if (args.answer is not None or args.chat_format is not None) and not args.chat:
        option = "--chat-format" if args.answer is None else "--answer"
        raise InputError(f"{option} is for --chat: give both, or neither")
    if args.special and args.chat:
        raise InputError("--special is for a text, not for --chat's messages: give one of them")
    if args.escapes:
        unescape_texts(args)
    prompts = read_prompts(args)
    check_options(args.prompt_cache, args.prompt_cache_read_only, len(prompts))
    chat_format, chat_note = chat_format_of(args) if args.chat else (None, None)
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
    ids = encode_prompts(llama, prompts, args, chat_format)
    prompt_cache = open_prompt_cache(llama, ids[0], args)
    generation = llama.new_generation(
        ids,
        batch_size=default_batch_size(llama, ids, args.max_new_tokens)
        if args.batch_size is None
        else args.batch_size,
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        seed=args.seed,
        stop=args.stop,
        ignore_eos=args.ignore_eos,
        fresh_text=args.chat and not (args.answer or "").strip(),
        top_logprobs=args.logprobs,
        cache=None if prompt_cache is None else prompt_cache.cache,
    )
    if chat_note is not None:
        tell(f"npllama: {chat_note}")
    interrupted = reader_left = False
    try:
        if args.json:
            print_json(generation, prompts, llama, args.logprobs is not None)
        else:
            heads = [""] * len(prompts)
            if not args.no_echo:
                begun = "\n" + (args.answer or "") if args.chat else ""
                heads = [prompt + begun for prompt in prompts]
            print_text(generation, heads)
    except KeyboardInterrupt:
        interrupted = True
    except ReaderLeftError:
        reader_left = True
    if reader_left:
        if prompt_cache is not None:
            prompt_cache.save()
        return 0
    if args.logprobs is not None and not args.json:
        # first those that were begun, since `completion` ends a row
        begun = [row for row in generation.rows if generation.has_begun(row)]
        for row in begun:
            if len(prompts) > 1:
                tell(f"prompt {row.number + 1} of {len(prompts)}: {prompts[row.number][:60]!r}")
            print_log_probs(llama, generation.completion(row))
    completions = generation.completions()
    if args.max_new_tokens > 0 and (note := no_room(completions, llama)) is not None:
        tell(f"npllama: {note}")
    if args.stats:
        print_stats(llama, generation, prompt_cache)
    if prompt_cache is not None:  # last: an error ends the program
        prompt_cache.save()
    return INTERRUPTED if interrupted else 0


def unescape_texts(args: argparse.Namespace) -> None:
    """Put the characters that escapes stand for into --prompt, --system, --answer and --stop."""
    for name in ("prompt", "system", "answer"):
        if (text := getattr(args, name)) is not None:
            setattr(args, name, unescape(text, f"--{name}"))
    args.stop = [unescape(text, "--stop") for text in args.stop]


def chat_format_of(args: argparse.Namespace) -> tuple[ChatFormat, str | None]:
    """The model's chat format, and what to say of it where it is not known for sure.

    Raises:
        InputError: the model that ships, which knows none.
        TokenizerError: a chat template that is damaged.
    """
    if args.model is None:
        raise InputError(
            "--chat needs a chat model, and the one that ships with npllama tells stories: give "
            "--model DIR, or leave out --chat"
        )
    directory = Path(args.model) if os.path.isdir(args.model) else None  # load says what it is
    return find_chat_format(directory, args.chat_format)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of --prompt or of --prompt-file's lines; "-" for standard input."""
    if args.prompt_file is None:
        if args.prompt != "-":
            return [args.prompt]
        return [_decoded(_standard_input(), STANDARD_INPUT).removesuffix("\n")]
    name = file_name(args)
    try:
        content = _standard_input() if args.prompt_file == "-" else Path(name).read_bytes()
    except OSError as error:
        raise InputError(
            f"--prompt-file {args.prompt_file!r} cannot be read: {error.strerror}"
        ) from None
    text = _decoded(content, name)
    if not text:
        raise InputError(f"{name} is empty: expected one prompt a line")
    return text.removesuffix("\n").split("\n")


def file_name(args: argparse.Namespace) -> str:
    """What messages call the file of --prompt-file."""
    return STANDARD_INPUT if args.prompt_file == "-" else args.prompt_file


def _standard_input() -> bytes:
    if sys.stdin is None:
        raise InputError("standard input is closed: give the prompt with --prompt TEXT")
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise InputError(f"standard input cannot be read: {reason(error)}") from None


def _decoded(content: bytes, name: str) -> str:
    """UTF-8, with or without a byte order mark, its line ends made "\\n"."""
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not UTF-8 (byte {error.start}): save it as UTF-8 and try again"
        ) from None


def encode_prompts(
    llama: Llama,
    prompts: Sequence[str],
    args: argparse.Namespace,
    chat_format: ChatFormat | None = None,
) -> list:
    """Each prompt's ids.

    Raises:
        InputError: a prompt that cannot be served; of --prompt-file its line is named.
    """
    if args.prompt_file is None:
        return [encode_prompt(llama, prompt, args, chat_format) for prompt in prompts]
    encoded = []
    for line, prompt in enumerate(prompts, start=1):
        try:
            encoded.append(encode_prompt(llama, prompt, args, chat_format))
            llama.to_tokens(encoded[-1])
        except InputError as error:
            raise InputError(f"{file_name(args)}, line {line}: {error}") from None
    return encoded


def encode_prompt(
    llama: Llama, prompt: str, args: argparse.Namespace, chat_format: ChatFormat | None = None
) -> list[int]:
    """A prompt's ids: as text, with --special also of tokens that it names, or in a chat format
    as a dialogue of one message."""
    if chat_format is None and not args.special:
        return llama.encode(prompt)
    llama.encode("")  # says what is missing where there is no tokenizer
    if args.special:
        return encode_special(llama.tokenizer, prompt)
    messages = [{"role": "user", "content": prompt}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    return encode_chat(llama.tokenizer, messages, chat_format, args.answer or "")


def open_prompt_cache(
    llama: Llama, ids: Sequence[int], args: argparse.Namespace
) -> PromptCacheFile | None:
    """The file of --prompt-cache, with room for the prompt and its completion."""
    if args.prompt_cache is None:
        return None
    n_positions = len(llama.to_tokens(ids)) + max(args.max_new_tokens, 0)
    context = min(n_positions, llama.context)
    return PromptCacheFile(llama, args.prompt_cache, ids, context, args.prompt_cache_read_only)


def default_batch_size(llama: Llama, prompts: Sequence[Sequence[int]], n_new: int) -> int:
    """BATCH_SIZE, or as many of the prompts as fit the memory."""
    longest = max(min(len(ids) + max(n_new, 0), llama.context) for ids in prompts)
    return llama.rows_that_fit(min(BATCH_SIZE, len(prompts)), longest)


class Progress:
    """A line on a terminal that does not show the text itself: prompts done, tokens a second."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        is_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._is_shown = is_terminal and not sys.stdout.isatty() and len(generation.rows) > 1
        self._bar = None
        self._began = time.monotonic()
        self._next = 0.0

    def update(self) -> None:
        """Show how far it is, some times a second."""
        now = time.monotonic()
        if not self._is_shown or now < self._next:
            return
        self._next = now + 0.25
        if self._bar is None:  # not before: until then the line is that of the prompts' reading
            from tqdm import tqdm  # not for --help

            self._bar = tqdm(total=len(self._generation.rows), unit="prompt", leave=False)
        self._bar.n = sum(row.finish_reason is not None for row in self._generation.rows)
        rate = self._generation.timings.new_tokens / max(now - self._began, 1e-9)
        self._bar.set_postfix_str(f"{rate:.1f} tokens/s", refresh=False)
        self._bar.refresh()

    def close(self) -> None:
        """Take the line away."""
        if self._bar is not None:
            self._bar.close()


def print_json(
    generation: Generation, prompts: Sequence[str], llama: Llama, log_probs: bool
) -> None:
    """A line a row, in order, each as soon as it and all before it have ended; after Ctrl-C those
    of all rows that have begun."""
    rows = deque(generation.rows)

    def write_next() -> None:
        row = rows.popleft()
        completion = generation.completion(row)
        write(as_json(prompts[row.number], completion, llama, log_probs) + "\n")

    progress = Progress(generation)
    try:
        for _ in generation.turns():
            while rows and rows[0].finish_reason is not None:
                write_next()
            progress.update()
    except KeyboardInterrupt:
        while rows and generation.has_begun(rows[0]):
            write_next()
        raise
    finally:
        progress.close()


def print_text(generation: Generation, heads: Sequence[str]) -> None:
    """Each row's head and completion in order: the first unfinished row as its text is made,
    the others when their turn comes."""
    waiting = list(heads)
    turn = 0
    # with the first piece: until then a terminal's line belongs to the progress
    head, waiting[0] = waiting[0], ""
    progress = Progress(generation)
    try:
        for row, text in generation:
            progress.update()
            _write(head)
            head = ""
            if row == turn:
                _write(text)
            else:
                waiting[row] += text
            while turn < len(waiting) - 1 and generation.rows[turn].finish_reason is not None:
                turn += 1
                _write("\n" + waiting[turn])
    finally:  # all that was said, also after Ctrl-C
        progress.close()
        _write(head + generation.rows[turn].interrupt())
        for row in filter(generation.has_begun, generation.rows[turn + 1 :]):
            _write("\n" + waiting[row.number] + row.interrupt())
        _write("\n")


# Control characters but for tab and newline. A terminal obeys them; a file keeps them.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd")


def _write(text: str) -> None:
    if text:
        write(text.translate(_CONTROLS) if sys.stdout.isatty() else text)


def as_json(prompt: str, completion: Completion, llama: Llama, log_probs: bool) -> str:
    """One line of JSON about one completion; its "timings" are those of its whole batch, whose
    size is their "rows"."""
    fields = {
        "prompt": prompt,
        **asdict(completion),
        "new_tokens": completion.new_tokens,
        "backend": llama.backend.name,
        "dtype": llama.dtype,
    }
    if not log_probs:
        del fields["log_probs"]
    if completion.top_logprobs is None:
        del fields["top_logprobs"]
    return json.dumps(fields, allow_nan=False)


def print_log_probs(llama: Llama, completion: Completion) -> None:
    """A table of id, log-probability, piece, and the likeliest pieces where they are known."""
    likeliest = completion.top_logprobs
    tell(f"{'id':>6} {'log p':>9}  {'piece' if likeliest is None else 'piece           likeliest'}")
    for i, (id_, log_prob) in enumerate(zip(completion.ids, completion.log_probs, strict=True)):
        line = f"{id_:>6} {log_prob:>9.4f}  {llama.tokenizer.piece(id_)!r}"
        if likeliest is not None:
            told = "  ".join(f"{token.text!r} {token.log_prob:.4f}" for token in likeliest[i])
            line = f"{line:<33} {told}"
        tell(line)


def no_room(completions: Sequence[Completion], llama: Llama) -> str | None:
    """What to say of prompts that left no room for a new token, if any did."""
    full = [
        i for i, one in enumerate(completions, 1) if one.finish_reason == "length" and not one.ids
    ]
    if not full:
        return None
    what = "the prompt fills"
    if len(completions) > 1:
        what = f"{len(full)} of {len(completions)} prompts fill (the first is number {full[0]})"
    larger = " or give a larger --context" if llama.context < llama.config.longest_context else ""
    return (
        f"{what} the context of {llama.context} tokens, so there was room for no new token: "
        f"shorten it{larger}"
    )


def finish_reasons(completions: Sequence[Completion]) -> str:
    """Why the completions ended: "eos" of one, "120 eos, 80 length" of many."""
    counts = Counter(completion.finish_reason for completion in completions)
    if len(completions) == 1:
        return next(iter(counts))
    return ", ".join(f"{n} {name}" for name, n in counts.most_common())


def describe_context(llama: Llama) -> str:
    """Room for how many tokens, of how many the model is good for, and how that came about."""
    config, scaling = llama.config, llama.config.rope_scaling
    text = f"{llama.context} of the model's {config.longest_context} tokens"
    if scaling is None:
        return text
    off = scaling.kind == "dynamic" and llama.context <= config.context_length
    state = f"not used up to {config.context_length}" if off else f"factor {scaling.factor:g}"
    return f"{text}; RoPE scaling {scaling.kind}, {state}"


def print_stats(
    llama: Llama, generation: Generation, prompt_cache: PromptCacheFile | None = None
) -> None:
    """Speed, memory, and what is needed to have the same text again."""
    t = generation.timings
    gb_per_forward = llama.bytes_per_forward / 1e9  # GB/s: weights read, once for all rows
    peak = llama.backend.peak_bytes()
    memory = f"weights {llama.parameters.nbytes / 1e6:.1f} MB"
    if peak is not None:
        memory += f", peak {peak / 1e6:.1f} MB"
        if peak < llama.parameters.nbytes:  # mapped, such as the embedding's other rows
            memory += " (some weights were never read)"
    backend = [llama.backend.device_name()]
    if llama.backend.no_gpu is not None:
        backend.append(llama.backend.no_gpu)
    rows = {
        "time to first token": f"{t.first_token_seconds * 1e3:.1f} ms",
        "prefill": f"{t.prompt_tokens} tokens, {t.prefill_tokens_per_second:.1f} tokens/s, "
        f"{t.prefill_forwards * gb_per_forward / max(t.prefill_seconds, 1e-9):.2f} GB/s",
        "decode": f"{t.decode_tokens} tokens, {t.decode_tokens_per_second:.1f} tokens/s, "
        f"{t.decode_steps * gb_per_forward / max(t.decode_seconds, 1e-9):.2f} GB/s",
        "memory": memory,
        "context": describe_context(llama),
        "backend": f"{llama.backend.name} ({'; '.join(backend)})",
        "dtype": llama.dtype,
        "finish": finish_reasons(generation.completions()),
        "seed": str(generation.seed),
    }
    if prompt_cache is not None:
        n_ids = len(generation.rows[0].prompt_ids)
        rows["prompt cache"] = f"{prompt_cache.n_kept} of {n_ids} ids kept"
    if (report := generation.steps_report()) is not None:
        rows["decode steps"] = report
    for name, value in rows.items():
        tell(f"{name:<20} {value}")


if __name__ == "__main__":
    sys.exit(main())
