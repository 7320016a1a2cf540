"""python -m npllama.explore: one run of a model, explained as a page.

Exit codes: 0; 2 for wrong input, with one line that explains it; 130 after Ctrl-C.
"""

if __name__ == "__main__":  # first of all, since the imports take a while
    from npllama.early_interrupt import end_at_once

    end_at_once()

import argparse
import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from npllama.atomic_file import atomic_file, check_writable
from npllama.console import exit_code, open_streams, started_as, tell, utf8
from npllama.errors import InputError, TokenizerError
from npllama.explore.record import BUDGET, MAX_BUDGET, MAX_WINDOW, NEW_TOKENS, WINDOW, record
from npllama.options import (
    add_context,
    add_machine,
    add_model,
    add_sampling,
    check_model,
    load_model,
    sampling_of,
)
from npllama.progress_line import progress_shown

NEEDED = ("jinja2", "pygments", "latex2mathml")
"""The packages that make the page, in the extra [explore]."""


def parser() -> argparse.ArgumentParser:
    """All options."""
    p = argparse.ArgumentParser(
        prog=started_as("explore", "python -m npllama.explore"),
        description="Run a LLaMA-2 model on a prompt, and explain the run in one HTML page. Each "
        "step of the model has its equation, its code, and pictures of this run. The page needs "
        "no network. It contains the prompt and the text that the model writes.",
        epilog='Example: python -m npllama.explore --prompt "Once upon a time" --out page.html',
    )
    add_model(p)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", type=utf8, metavar="TEXT", help="the text to run")
    source.add_argument(
        "--ids",
        type=_ids,
        metavar="ID,ID,...",
        help="token ids instead of a text, for a model without a tokenizer",
    )
    p.add_argument(
        "--out", required=True, metavar="FILE", help="the file to write, such as page.html"
    )
    p.add_argument(
        "--window",
        type=int,
        default=WINDOW,
        metavar="N",
        help=f"show the last N tokens of a longer prompt, at most {MAX_WINDOW} "
        "(default: %(default)s)",
    )
    p.add_argument(
        "--max-new-tokens",
        type=int,
        default=NEW_TOKENS,
        metavar="N",
        help="tokens that the model writes after the prompt (default: %(default)s)",
    )
    p.add_argument(
        "--measure",
        type=float,
        default=BUDGET,
        metavar="SECONDS",
        help="how long to measure the time per token with and without the cache, "
        f"0 to {MAX_BUDGET:g}; the page extrapolates the other times and marks them "
        "(default: %(default)s)",
    )
    choice = add_sampling(p)
    choice.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="the same seed gives the same text (default: %(default)s)",
    )
    add_context(p.add_argument_group("how long the context is"))
    add_machine(p)
    return p


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text[:60]!r} is not a list of token ids: expected whole numbers, such as 1,261,300"
        ) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    open_streams()
    arguments = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)

    def work() -> None:
        with progress_shown("explore"):
            run(args, command=shlex.join(["python", "-m", "npllama.explore", *arguments]))

    return exit_code("explore", work, out_of_memory="use a shorter prompt, or a narrower --dtype")


def run(args: argparse.Namespace, command: str) -> None:
    """Make the page that the parsed arguments describe."""
    out = _checked(args.out)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"{', '.join(missing)} cannot be imported: install what the page needs with "
            "pip install 'npllama[explore]'"
        )
    from npllama.explore.page import page

    check_model(args)
    llama = load_model(args)
    sampling = sampling_of(args)
    prompt = args.ids if args.prompt is None else args.prompt
    try:
        llama.encode(prompt)
    except TokenizerError as error:
        raise InputError(f"{error}, for example --ids 1,261,300") from None
    recorded = record(
        llama,
        prompt,
        model="the model that ships with npllama, trained on short stories"
        if args.model is None
        else Path(args.model).resolve().name,
        seed=args.seed,
        sampling=sampling,
        max_new_tokens=args.max_new_tokens,
        window=args.window,
        budget=args.measure,
    )
    content = page(recorded, command).encode("utf-8", "replace")
    with atomic_file(out) as partial:
        partial.write_bytes(content)
    tell(f"explore: wrote {out} ({len(content) / 1e6:.2f} MB)")


def _checked(given: str) -> Path:
    """The path of the page. A path that cannot be written is refused before the work."""
    if not given:
        raise InputError("--out is empty: expected the name of a file, such as page.html")
    out = Path(os.path.realpath(given))
    if out.is_dir():
        raise InputError(f"--out is {given!r}, which is a directory: expected the name of a file")
    if out.exists() and not out.is_file():
        raise InputError(f"--out is {given!r}, which is not a regular file: choose another name")
    if not out.parent.is_dir():
        raise InputError(
            f"--out is {given!r}, but {out.parent} is not a directory: create it first"
        )
    check_writable(out)
    return out


if __name__ == "__main__":
    sys.exit(main())
