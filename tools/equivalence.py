"""Compare NumPy and CuPy with float64: by operation, by layer, and at the logits.

    python tools/equivalence.py --model DIR
    python tools/equivalence.py --model DIR --dtype float16 --prompt "The sea" --json

The true values are those of the reference in float64 on NumPy, with the weights as each dtype
stores them. Thus the rounding of the weights is not counted as a difference. "reference" means the
plain array calls of npllama.ops.Ops; "numpy" and "cupy" mean the overrides that the library uses. A
difference is the largest absolute difference divided by the largest absolute value. The layer with
that difference is in brackets.
"""

if __name__ == "__main__":  # before the other imports, which take a while
    from npllama.early_interrupt import end_at_once

    end_at_once()

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict

import npllama
from command_line import Parser, exit_code, named_path, say
from comparing.differences import Differences, measure
from comparing.table import as_text
from comparing.truth import Truth, make_truth
from npllama.backend import Backend, get_backend
from npllama.config import LlamaConfig
from npllama.console import check_output, open_streams
from npllama.errors import BackendError, InputError
from npllama.llama import SHIPPED
from npllama.ops import Ops, ops_for
from npllama.weight_formats import FORMATS
from npllama.weights import Checkpoint

PROMPT = "Once upon a time there was a little girl who liked to play in the park."


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    open_streams()
    options = _parser().parse_args(arguments)
    return exit_code("equivalence", lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    check_output()
    if options.tokens < 1:
        raise InputError(f"--tokens is {options.tokens}: expected at least 1")
    backends, missing = _backends(options.backend)
    reports = []
    for dtype in options.dtype or tuple(FORMATS):
        truth, found = compare(options.model, dtype, options.prompt, options.tokens, backends)
        if options.json:
            reports.append({"dtype": dtype, "implementations": [asdict(d) for d in found]})
        else:
            title = f"{options.model}, {dtype} weights: differences from float64"
            say(as_text(title, truth, found) + "\n")
    if options.json:
        say(json.dumps({"missing": missing, "dtypes": reports}))
    elif missing is not None:
        say(missing)


def compare(
    directory: object, dtype: str, prompt: str, n_tokens: int, backends: list[Backend]
) -> tuple[Truth, list[Differences]]:
    """The true values for a model directory in a dtype, and the differences of the reference and
    of each backend's overrides from them."""
    config = LlamaConfig.from_directory(directory)
    checkpoint = Checkpoint(directory, config, dtype)
    ids = npllama.load(directory, "numpy").encode(prompt)
    if len(ids) + n_tokens > config.context_length:
        raise InputError(
            f"{len(ids)} tokens of the prompt and --tokens {n_tokens} do not fit the context of "
            f"{config.context_length}: use fewer"
        )
    truth = make_truth(config, checkpoint.parameters, ids, n_tokens)
    found = []
    for name, ops in implementations(backends):
        found.append(measure(name, ops, checkpoint.parameters, truth))
    return truth, found


def implementations(backends: list[Backend]) -> Iterator[tuple[str, Ops]]:
    """The reference and the overrides of each backend, by name."""
    for backend in backends:
        yield f"{backend.name} reference", Ops(backend)
        yield backend.name, ops_for(backend)


def _backends(name: str) -> tuple[list[Backend], str | None]:
    """The backends to compare, and a line for the user if CuPy was not required and is missing."""
    if name == "numpy":
        return [get_backend("numpy")], None
    try:
        return [get_backend("numpy"), get_backend("cupy")], None
    except BackendError as error:
        if name == "cupy":
            raise
        return [get_backend("numpy")], f"CuPy is left out: {error}"


def _parser() -> argparse.ArgumentParser:
    p = Parser("equivalence", "Compare NumPy and CuPy with float64, operation by operation.")
    p.add_argument(
        "--model",
        type=named_path,
        default=SHIPPED,
        metavar="DIR",
        help="a model directory (default: the model that ships with the package)",
    )
    p.add_argument(
        "--prompt", default=PROMPT, metavar="TEXT", help="the prompt (default: an English sentence)"
    )
    p.add_argument(
        "--tokens",
        type=int,
        default=32,
        metavar="N",
        help="length of the greedy continuations that are compared (default: %(default)s)",
    )
    p.add_argument(
        "--backend",
        choices=("auto", "numpy", "cupy"),
        default="auto",
        help="what is compared with float64; numpy: only NumPy; cupy: NumPy and CuPy "
        "(default: CuPy if it is available)",
    )
    p.add_argument(
        "--dtype",
        action="append",
        choices=tuple(FORMATS),
        help="dtype of the weights; may be given several times (default: all)",
    )
    p.add_argument("--json", action="store_true", help="print all differences as JSON")
    return p


if __name__ == "__main__":
    sys.exit(main())
