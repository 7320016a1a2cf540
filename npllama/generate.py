"""python -m npllama.generate: continue a prompt from the command line.

Text goes to standard output as it is generated, and everything else to standard error. Exit codes:
0, 2 for wrong input (with one line that says why), and 130 after Ctrl-C.
"""

if __name__ == "__main__":  # before the other imports, which take a while
    from npllama.early_interrupt import end_at_once

    end_at_once()

import argparse
import json
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from npllama.completion import Completion
from npllama.console import (
    INTERRUPTED,
    open_streams,
    reason,
    show,
    started_as,
    tell,
    utf8,
    write,
)
from npllama.dialogue import encode_chat
from npllama.dialogue_parts import ChatFormat
from npllama.errors import InputError
from npllama.generation import Generation
from npllama.llama import Llama
from npllama.options import (
    CONTROL_TOKENS,
    Once,
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
    flag,
    generation_options,
    load_model,
    run_program,
    unescape_texts,
)
from npllama.prompt_cache_file import PromptCacheFile, check_options, saved_at_end
from npllama.report import print_rows, stats
from npllama.special_tokens import encode_special

STANDARD_INPUT = "standard input"
BATCH_SIZE = 32
"""Prompts that are decoded together by default. More prompts gain little: see tools/README.md."""


class _Parser(Parser):
    """The parser of generate, which requires --prompt or --prompt-file.

    argparse checks a required group first, and would report it as missing instead of a word that
    belongs to no option. `parse_args` therefore checks the words first.

    Attributes:
        text: the group of the two options.
    """

    texts = "--prompt"
    stray = "give the text with --prompt, in quotation marks"
    text: argparse._MutuallyExclusiveGroup

    def format_help(self) -> str:
        self.text.required = True  # for the usage
        try:
            return super().format_help()
        finally:
            self.text.required = False

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        options = super().parse_args(args, namespace)
        if options.prompt is None and options.prompt_file is None:
            self.error("a text is required: give --prompt TEXT or --prompt-file FILE")
        return options


def parser() -> argparse.ArgumentParser:
    """All options, each with a help text for somebody who has never run a language model."""
    p = _Parser(
        prog=started_as("generate", "python -m npllama.generate"),
        description="Continue a text with a LLaMA-2 model. Text goes to standard output as it is "
        "generated, and everything else to standard error. On a terminal, long work shows the time "
        "left.",
        epilog='Example: python -m npllama.generate --model ./llama-2-7b --prompt "The sea"',
    )
    add_model(p)
    source = p.text = p.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt",
        action=Once,
        type=utf8,
        metavar="TEXT",
        help='the text to continue; "" starts from nothing, "-" reads all of standard input',
    )
    source.add_argument(
        "--prompt-file",
        action=Once,
        metavar="FILE",
        help="a file with one prompt per line, all continued together; an empty line starts from "
        'nothing, "-" reads the lines of standard input',
    )
    add_escapes(p, "--prompt, --system, --answer and --stop")
    p.add_argument(
        "--special",
        action="store_true",
        help="read the names of control tokens, such as </s>, and of the added tokens of "
        "tokenizer.json in the prompt as these tokens; without it they are plain text",
    )

    p.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="number of prompts of --prompt-file that are decoded together; when one ends, the "
        f"next one begins (default: {BATCH_SIZE}, or as many as fit the memory)",
    )

    add_length(p)
    add_choice(p)

    chat = p.add_argument_group("chat, for models that are made for it", CONTROL_TOKENS)
    chat.add_argument(
        "--chat", action="store_true", help="answer the prompt as a message, not as a text"
    )
    add_system(chat)
    chat.add_argument(
        "--answer",
        action=Once,
        type=utf8,
        metavar="TEXT",
        help="the beginning of the assistant's answer, which the model continues",
    )
    add_chat_format(chat)

    add_prompt_cache(p)
    add_machine(p)

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
        help="show the log-probability of each token, on standard error or in --json; with N (up "
        "to 20), also the N most likely tokens at each position",
    )
    add_stats(output)
    output.add_argument(
        "--json",
        action="store_true",
        help="print one line of JSON per prompt instead of text; "
        'its "timings" are those of all "rows" of the batch together',
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; its exit code."""
    open_streams()
    args = parser().parse_args(argv)
    advice = "use a shorter --context, a narrower --dtype or fewer prompts"
    return run_program(lambda: run(args), out_of_memory=advice)


def run(args: argparse.Namespace) -> int:
    """Do what the parsed arguments ask for, and return the exit code."""
    check_model(args)
    check_combinations(args)
    if args.escapes:
        unescape_texts(args, ("prompt", "system", "answer"))
    options = generation_options(args)
    prompts = read_prompts(args)
    check_options(args.prompt_cache, args.prompt_cache_read_only, len(prompts))
    chat_format, chat_note = chat_format_of(args) if args.chat else (None, None)
    llama = load_model(args)
    ids = encode_prompts(llama, prompts, args, chat_format)
    prompt_cache = open_prompt_cache(llama, ids[0], args)
    generation = llama.new_generation(
        ids,
        batch_size=default_batch_size(llama, ids, args.max_new_tokens)
        if args.batch_size is None
        else args.batch_size,
        **options,
        fresh_text=args.chat and not (args.answer or "").strip(),
        top_logprobs=args.logprobs,
        cache=None if prompt_cache is None else prompt_cache.cache,
    )
    if chat_note is not None:
        tell(f"npllama: {chat_note}")
    with saved_at_end(prompt_cache):
        return write_results(generation, prompts, llama, args, prompt_cache)


def write_results(
    generation: Generation,
    prompts: Sequence[str],
    llama: Llama,
    args: argparse.Namespace,
    prompt_cache: PromptCacheFile | None,
) -> int:
    """Run the generation, and write its completions and what else `args` ask for.

    Returns:
        The exit code.
    """
    interrupted = False
    try:
        if args.json:
            print_json(generation, prompts, llama, args.logprobs is not None)
        else:
            print_text(generation, heads_of(prompts, args))
    except KeyboardInterrupt:
        interrupted = True
    if args.logprobs is not None and not args.json:
        print_all_log_probs(llama, generation, prompts)
    completions = generation.completions()
    if args.max_new_tokens > 0 and (note := no_room(completions, llama)) is not None:
        tell(f"npllama: {note}")
    if args.stats:
        print_stats(llama, generation, prompt_cache)
    return INTERRUPTED if interrupted else 0


def check_combinations(args: argparse.Namespace) -> None:
    """Raise InputError for options that need another option, or exclude one."""
    for name in ("system", "answer", "chat_format"):
        if getattr(args, name) is not None and not args.chat:
            raise InputError(f"{flag(name)} is for --chat: give both, or neither")
    if args.special and args.chat:
        raise InputError("--special is for a text, not for --chat's messages: give one of them")


def chat_format_of(args: argparse.Namespace) -> tuple[ChatFormat, str | None]:
    """The model's chat format, and a note if the model may need another format, or cannot chat.

    Raises:
        InputError: the model is the one that ships with npllama, which cannot chat.
        TokenizerError: the chat template is damaged.
    """
    if args.model is None:
        raise InputError(
            "--chat needs a chat model, and the one that ships with npllama tells stories: give "
            "--model DIR, or leave out --chat"
        )
    return find_format(args)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompt of --prompt, or the lines of --prompt-file; "-" is standard input."""
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
        raise InputError(f"{name} is empty: expected one prompt per line")
    return text.removesuffix("\n").split("\n")


def file_name(args: argparse.Namespace) -> str:
    """The name of --prompt-file in messages."""
    return STANDARD_INPUT if args.prompt_file == "-" else args.prompt_file


def _standard_input() -> bytes:
    if sys.stdin is None:
        raise InputError("standard input is closed: give the prompt with --prompt TEXT")
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise InputError(f"standard input cannot be read: {reason(error)}") from None


def _decoded(content: bytes, name: str) -> str:
    """The text of UTF-8 bytes, without a byte order mark and with "\\n" as line ends."""
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
    """The ids of each prompt.

    Raises:
        InputError: a prompt cannot be encoded or does not fit; the message has its line in
            --prompt-file.
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
    """The ids of a prompt: of a text, of a text with names of control tokens (--special), or of a
    dialogue of one message (--chat)."""
    if chat_format is None and not args.special:
        return llama.encode(prompt)
    llama.encode("")  # raises an error if there is no tokenizer
    if args.special:
        return encode_special(llama.tokenizer, prompt)
    messages = [{"role": "user", "content": prompt}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    return encode_chat(llama.tokenizer, messages, chat_format, args.answer or "")


def open_prompt_cache(
    llama: Llama, ids: Sequence[int], args: argparse.Namespace
) -> PromptCacheFile | None:
    """The file of --prompt-cache, with positions for the prompt and its completion."""
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
    """A line on a terminal that shows finished prompts and tokens per second.

    It is shown for several prompts whose text goes to a file or a pipe.
    """

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        is_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._is_shown = is_terminal and not sys.stdout.isatty() and len(generation.rows) > 1
        self._bar = None
        self._began = time.monotonic()
        self._next = 0.0

    def update(self) -> None:
        """Update the line, at most four times a second."""
        now = time.monotonic()
        if not self._is_shown or now < self._next:
            return
        self._next = now + 0.25
        if self._bar is None:  # not earlier: reading the prompts has a line of its own
            from tqdm import tqdm  # here, to keep --help fast

            self._bar = tqdm(total=len(self._generation.rows), unit="prompt", leave=False)
        self._bar.n = sum(row.finish_reason is not None for row in self._generation.rows)
        rate = self._generation.timings.new_tokens / max(now - self._began, 1e-9)
        self._bar.set_postfix_str(f"{rate:.1f} tokens/s", refresh=False)
        self._bar.refresh()

    def close(self) -> None:
        """Remove the line."""
        if self._bar is not None:
            self._bar.close()


def heads_of(prompts: Sequence[str], args: argparse.Namespace) -> list[str]:
    """The text before each completion: the prompt, and the beginning of the answer in a chat."""
    if args.no_echo:
        return [""] * len(prompts)
    begun = "\n" + (args.answer or "") if args.chat else ""
    return [prompt + begun for prompt in prompts]


def print_json(
    generation: Generation, prompts: Sequence[str], llama: Llama, log_probs: bool
) -> None:
    """Write one line per row, in order, each when the row and all rows before it have ended.

    After Ctrl-C, write the rows that have begun.
    """
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
    """Write the head and the completion of each row, in order.

    The first unfinished row is written as its text is generated. The text of the others waits
    until the rows before them have ended.
    """
    waiting = list(heads)
    turn = 0
    # written with the first piece, because until then the terminal's line shows progress
    head, waiting[0] = waiting[0], ""
    progress = Progress(generation)
    try:
        for row, text in generation:
            progress.update()
            show(head)
            head = ""
            if row == turn:
                show(text)
            else:
                waiting[row] += text
            while turn < len(waiting) - 1 and generation.rows[turn].finish_reason is not None:
                turn += 1
                show("\n" + waiting[turn])
    finally:  # after Ctrl-C too: the rest of the text
        progress.close()
        show(head + generation.rows[turn].interrupt())
        for row in filter(generation.has_begun, generation.rows[turn + 1 :]):
            show("\n" + waiting[row.number] + row.interrupt())
        show("\n")


def as_json(prompt: str, completion: Completion, llama: Llama, log_probs: bool) -> str:
    """One line of JSON for a completion. The "timings" are those of the whole batch, which has
    "rows" rows."""
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


def print_all_log_probs(llama: Llama, generation: Generation, prompts: Sequence[str]) -> None:
    """Write the table of each row that has begun to standard error."""
    # a list, because `completion` ends a row
    begun = [row for row in generation.rows if generation.has_begun(row)]
    for row in begun:
        if len(prompts) > 1:
            tell(f"prompt {row.number + 1} of {len(prompts)}: {prompts[row.number][:60]!r}")
        print_log_probs(llama, generation.completion(row))


def print_log_probs(llama: Llama, completion: Completion) -> None:
    """Write a table of id, log-probability and piece, with the most likely pieces if known."""
    likeliest = completion.top_logprobs
    tell(f"{'id':>6} {'log p':>9}  {'piece' if likeliest is None else 'piece           likeliest'}")
    for i, (id_, log_prob) in enumerate(zip(completion.ids, completion.log_probs, strict=True)):
        line = f"{id_:>6} {log_prob:>9.4f}  {llama.tokenizer.piece(id_)!r}"
        if likeliest is not None:
            listed = "  ".join(f"{token.text!r} {token.log_prob:.4f}" for token in likeliest[i])
            line = f"{line:<33} {listed}"
        tell(line)


def no_room(completions: Sequence[Completion], llama: Llama) -> str | None:
    """A note about prompts that fill the context, so that no token can follow; None if none
    does."""
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
        f"{what} the context of {llama.context} tokens, so there is no room for a new token: "
        f"shorten it{larger}"
    )


def finish_reasons(completions: Sequence[Completion]) -> str:
    """Why the completions ended: "eos" for one, "120 eos, 80 length" for many."""
    counts = Counter(completion.finish_reason for completion in completions)
    if len(completions) == 1:
        return next(iter(counts))
    return ", ".join(f"{n} {name}" for name, n in counts.most_common())


def print_stats(
    llama: Llama, generation: Generation, prompt_cache: PromptCacheFile | None = None
) -> None:
    """Write speed, memory and the settings that reproduce the text to standard error."""
    finish = finish_reasons(generation.completions())
    rows = stats(llama, generation.timings, finish, generation.seed)
    if prompt_cache is not None:
        n_ids = len(generation.rows[0].prompt_ids)
        rows["prompt cache"] = f"{prompt_cache.n_kept} of {n_ids} ids kept"
    if (report := generation.steps_report()) is not None:
        rows["decode steps"] = report
    print_rows(rows)


if __name__ == "__main__":
    sys.exit(main())
