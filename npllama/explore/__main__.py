"""python -m npllama.explore: one run of a model, explained as a page.

Exit codes: 0, 2 for input that cannot be served (one line says why), 130 after Ctrl-C.
"""

if __name__ == "__main__":  # first of all, since the imports take a while
    from npllama.early_interrupt import end_at_once

    end_at_once()

import argparse
import importlib.util
import os
import shlex
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from npllama.backend import BACKENDS
from npllama.console import exit_code, open_streams, started_as, tell, utf8
from npllama.errors import InputError, TokenizerError, TokenizerWarning
from npllama.explore.record import BUDGET, NEW_TOKENS, WINDOW, record
from npllama.llama import load
from npllama.progress_line import progress_shown
from npllama.sampling_options import Sampling
from npllama.weight_formats import FORMATS

NEEDED = ("jinja2", "pygments", "latex2mathml")
"""What the page is made with: the extra [explore]."""


def parser() -> argparse.ArgumentParser:
    """All options."""
    p = argparse.ArgumentParser(
        prog=started_as("explore", "python -m npllama.explore"),
        description="Run a LLaMA-2 model on a prompt, and explain the run as one HTML page: for "
        "each step of the model its equation, its code, and a picture of this run. The page needs "
        "no network. It contains the prompt.",
        epilog='Example: python -m npllama.explore --prompt "Once upon a time" --out page.html',
    )
    p.add_argument(
        "--model",
        metavar="DIR",
        help="directory with config.json, safetensors and tokenizer.model or tokenizer.json "
        "(default: the story model that ships with npllama)",
    )
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", type=utf8, metavar="TEXT", help="the text to run")
    source.add_argument(
        "--ids",
        type=_ids,
        metavar="ID,ID,...",
        help="token ids in place of a text, for a model without a tokenizer",
    )
    p.add_argument("--out", required=True, metavar="FILE", help="the page, such as page.html")
    p.add_argument(
        "--window",
        type=int,
        default=WINDOW,
        metavar="N",
        help="of a longer prompt, show the last N tokens (default: %(default)s)",
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
        help="how long to measure what tokens cost with and without the cache, 0 to 5; what is "
        "not measured is extrapolated and marked (default: %(default)s)",
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
        default=0,
        metavar="S",
        help="the same seed gives the same text again (default: %(default)s)",
    )
    machine = p.add_argument_group("how it is computed")
    machine.add_argument("--backend", choices=BACKENDS, default="auto", help="see npllama generate")
    machine.add_argument("--dtype", choices=tuple(FORMATS), help="see npllama generate")
    machine.add_argument("--context", type=int, metavar="N", help="see npllama generate")
    machine.add_argument("--threads", type=int, metavar="N", help="see npllama generate")
    return p


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text[:60]!r} is no list of token ids: expected whole numbers, such as 1,261,300"
        ) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; its exit code."""
    open_streams()
    arguments = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)

    def work() -> None:
        with progress_shown("explore"):
            run(args, command=shlex.join(["python", "-m", "npllama.explore", *arguments]))

    return exit_code("explore", work, out_of_memory="use a shorter prompt, or a narrower --dtype")


def run(args: argparse.Namespace, command: str) -> None:
    """What the parsed arguments ask for."""
    out = _checked(args.out)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"{' and '.join(missing)} cannot be imported: pip install 'npllama[explore]' brings "
            "what the page is made with"
        )
    from npllama.explore.page import page

    if args.model == "":
        raise InputError("--model is empty: expected a model directory")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TokenizerWarning)  # shown below, as a line
        llama = load(args.model, args.backend, args.dtype, args.context, args.threads)
    for note in llama.notes:
        tell(f"explore: {note}")
    sampling = Sampling(**{field.name: getattr(args, field.name) for field in fields(Sampling)})
    prompt = args.ids if args.prompt is None else args.prompt
    try:
        llama.encode(prompt)
    except TokenizerError as error:
        raise InputError(f"{error}, as --ids 1,261,300") from None
    recorded = record(
        llama,
        prompt,
        model="the story model that ships with npllama"
        if args.model is None
        else Path(args.model).resolve().name,
        seed=args.seed,
        sampling=sampling,
        max_new_tokens=args.max_new_tokens,
        window=args.window,
        budget=args.measure,
    )
    text = page(recorded, command)
    write_whole(out, text.encode("utf-8", "replace"))
    tell(f"explore: {out} ({len(text.encode('utf-8', 'replace')) / 1e6:.2f} MB)")


def _checked(given: str) -> Path:
    """Refuse at once what could not be written after the work."""
    out = Path(os.path.realpath(given)) if given else Path()
    if not given or out.is_dir():
        raise InputError(f"--out is {given!r}, which is a directory: expected the name of a file")
    if out.exists() and not out.is_file():
        raise InputError(f"--out is {given!r}, which is no ordinary file: choose another name")
    if not out.parent.is_dir():
        raise InputError(f"--out is {given!r}, and {out.parent} is no directory: make it first")
    return out


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a program killed at any moment leaves the old one or the
    new one.

    Raises:
        InputError: it cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        partial = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.chmod(_mode(path))
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None


def _mode(path: Path) -> int:
    """The permissions that a new file has, or those of the one that is replaced."""
    with suppress(OSError):
        return path.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


if __name__ == "__main__":
    sys.exit(main())
