"""Starts a program by its name: npllama PROGRAM, or python -m npllama PROGRAM.

`npllama generate ...` is `python -m npllama.generate ...`. The programs of the repository's folder
tools/ are in an installed package as npllama/tools/. Their modules import each other by their own
names, as `python tools/convert.py` finds them, so `main` puts that folder first in sys.path.
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import npllama
from npllama.early_interrupt import end_at_once, handle_again

PROGRAMS = {
    "generate": "continue a text",
    "chat": "talk with a chat model",
    "convert": "make a model directory from a checkpoint of Meta, Hugging Face or llama2.c",
    "train": "train a model on a text file",
    "perplexity": "measure how well a model predicts a text",
    "benchmark": "measure the speed and memory of a model",
    "equivalence": "compare each backend with float64, operation by operation",
    "plain": "continue a text by the model on one page of NumPy",
    "explore": "explain one run of a model as an HTML page",
}
# the others are in tools/
_IN_PACKAGE = {
    "generate": "npllama.generate",
    "chat": "npllama.chat",
    "plain": "npllama.plain",
    "explore": "npllama.explore.__main__",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program that the first word names; its exit code."""
    end_at_once()
    try:
        word, *rest = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
        if word in PROGRAMS:
            return _program(word).main(rest)
        return _answer(word)
    finally:
        handle_again()


def _program(word: str) -> ModuleType:
    if word in _IN_PACKAGE:
        return importlib.import_module(_IN_PACKAGE[word])
    folder = str(tools_folder())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(word)


def tools_folder() -> Path:
    """npllama/tools in an installed package, tools beside npllama in the repository."""
    package = Path(npllama.__file__).resolve().parent
    return next(p for p in (package / "tools", package.parent / "tools") if p.is_dir())


def _answer(word: str) -> int:
    """Print the help or the version, or an error for an unknown word; the exit code."""
    from npllama.console import WRONG_INPUT, check_output, exit_code, open_streams, tell, write

    open_streams()
    said = {"-h": _help, "--help": _help, "help": _help, "--version": _version, "-V": _version}
    if word in said:

        def work() -> None:
            check_output()
            write(said[word]())

        return exit_code("npllama", work)
    tell(f"npllama: error: {_unknown(word)} (npllama --help lists them)")
    return WRONG_INPUT


def _help() -> str:
    width = max(map(len, PROGRAMS))
    lines = [f"  npllama {word:<{width}}  {about}" for word, about in PROGRAMS.items()]
    return "\n".join(
        [
            "usage: npllama PROGRAM ... (or python -m npllama PROGRAM ...)",
            "",
            *lines,
            "",
            "npllama PROGRAM --help explains one; npllama --version prints the version.",
            'Example: npllama generate --prompt "Once upon a time"',
            "",
        ]
    )


def _version() -> str:
    return f"npllama {npllama.__version__}\n"


def _unknown(word: str) -> str:
    import difflib

    if word.startswith("-"):
        return f"{word[:60]!r} precedes the program: try npllama generate {word[:60]} ..."
    nearest = difflib.get_close_matches(word.lower(), PROGRAMS, n=1, cutoff=0.5)
    expected = f"did you mean npllama {nearest[0]}?" if nearest else "expected the name of one"
    return f"there is no program {word[:60]!r}: {expected}"


if __name__ == "__main__":
    sys.exit(main())
