"""How well a model predicts a text: nats per token, perplexity, bits per byte.

    python tools/perplexity.py --model DIR --text FILE

Each text of the file (separated by lines of <|endoftext|>; without them the file is one) is encoded
as BOS and its ids, and scored on every id after BOS; all its bytes count. Bits per byte, unlike
the other two, can be compared between tokenizers.
"""

if __name__ == "__main__":  # first of all, since the imports take a while
    from npllama.early_interrupt import end_at_once

    end_at_once()

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

import npllama
from command_line import Parser, exit_code, named_path, say
from npllama.backend import Backend
from npllama.console import check_output, open_streams, tell
from npllama.errors import InputError
from npllama.llama import Llama
from npllama.ops import Ops
from npllama.weight_formats import FORMATS
from training.stories import read_stories

Map = Callable[[Callable[[str], "Score"], Sequence[str]], Iterable["Score"]]
_OPS = Ops(Backend())


@dataclass(frozen=True)
class Score:
    """Totals over texts; the figures are ratios of them."""

    nats: float
    n_tokens: int
    n_bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.n_tokens

    @property
    def perplexity(self) -> float:
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.n_bytes

    def __add__(self, other: "Score") -> "Score":
        return Score(
            self.nats + other.nats, self.n_tokens + other.n_tokens, self.n_bytes + other.n_bytes
        )


def nats(llama: Llama, ids: Sequence[int]) -> np.ndarray:
    """-log p(ids[t] | ids[:t]) for t = 1 .. len(ids) - 1, float32.

    Where ids are longer than the context they are scored in windows of the whole context, each
    half a context on from the last: every id but the first window's is predicted from at least
    half a context of ids before it, and none twice.
    """
    ids = list(ids)
    parts, begin, scored = [], 0, 1
    while scored < len(ids):
        window = ids[begin : begin + llama.context + 1]
        with np.errstate(over="ignore", invalid="ignore"):  # the sum is checked
            logits = llama.logits(window[:-1])  # (T, V); row t predicts window[t + 1]
            surprise = _OPS.cross_entropy(logits, np.array(window[1:]))  # (T,)
        parts.append(surprise[scored - begin - 1 :])
        scored = begin + len(window)
        begin += (llama.context + 1) // 2
    return np.concatenate(parts) if parts else np.empty(0, dtype="float32")


def score(llama: Llama, text: str) -> Score:
    """The score of one text after BOS, whatever tokenizer_config.json adds to a prompt."""
    llama.encode("")  # says what is missing where there is no tokenizer
    ids = llama.tokenizer.encode(text)
    return Score(float(nats(llama, ids).sum(dtype="float64")), len(ids) - 1, len(text.encode()))


def score_texts(llama: Llama, texts: Sequence[str], each: Map = map) -> Score:
    """The score of several texts together, each from its own BOS; `each` may be a pool's map."""
    total = Score(0.0, 0, 0)
    with tqdm(total=len(texts), unit="text", disable=None, leave=False) as bar:
        for one in each(lambda text: score(llama, text), texts):
            total += one
            bar.update()
    return total


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    open_streams()
    options = _parser().parse_args(arguments)
    return exit_code(
        "perplexity",
        lambda: _print_score(options),
        out_of_memory="use a narrower --dtype or a smaller model",
    )


def _print_score(options: argparse.Namespace) -> None:
    check_output()
    texts = read_stories(options.text)
    if options.limit is not None:
        if options.limit < 1:
            raise InputError(f"--limit is {options.limit}: expected at least 1")
        texts = texts[: options.limit]
    llama = npllama.load(options.model, options.backend, dtype=options.dtype, device=options.device)
    began = time.perf_counter()
    total = score_texts(llama, texts)
    seconds = time.perf_counter() - began
    if total.n_tokens == 0:
        raise InputError(f"{options.text} has no token after BOS: expected a text")
    if not math.isfinite(total.nats):
        raise InputError(f"the surprise of {options.text} is {total.nats}: the model is damaged")
    figures = {
        "nats_per_token": total.nats_per_token,
        "perplexity": total.perplexity,
        "bits_per_byte": total.bits_per_byte,
        "texts": len(texts),
        "tokens": total.n_tokens,
        "bytes": total.n_bytes,
    }
    if options.json:
        say(json.dumps(figures))
    else:
        say(
            f"{total.nats_per_token:.4f} nats a token, perplexity {total.perplexity:.4f}, "
            f"{total.bits_per_byte:.4f} bits per byte "
            f"({len(texts):,} texts, {total.n_tokens:,} tokens, {total.n_bytes:,} bytes)"
        )
    tell(f"perplexity: {total.n_tokens / seconds:,.0f} tokens/s")


def _parser() -> argparse.ArgumentParser:
    p = Parser("perplexity", "Score a text by a model: nats a token, perplexity, bits per byte.")
    p.add_argument(
        "--model",
        type=named_path,
        metavar="DIR",
        help="(default: the model that ships with npllama)",
    )
    p.add_argument(
        "--text",
        type=named_path,
        required=True,
        metavar="FILE",
        help="UTF-8; texts separated by lines of <|endoftext|> each begin with BOS",
    )
    p.add_argument("--limit", type=int, metavar="N", help="score the first N texts alone")
    p.add_argument("--backend", choices=("auto", "numpy", "cupy"), default="auto")
    p.add_argument("--device", type=int, metavar="N", help="which GPU (default: the first)")
    p.add_argument("--dtype", choices=tuple(FORMATS), help="(default: as stored)")
    p.add_argument("--json", action="store_true", help="print the figures as JSON")
    return p


if __name__ == "__main__":
    sys.exit(main())
