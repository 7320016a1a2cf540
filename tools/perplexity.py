"""Measure how well a model predicts a text: nats per token, perplexity, bits per byte.

    python tools/perplexity.py --model DIR --text FILE

Lines of <|endoftext|> separate texts in the file; without such lines, the file is one text. Each
text is encoded with BOS first, and every id after BOS is scored. All bytes of the text count. Bits
per byte can be compared between models with different tokenizers; the other two measures cannot.
"""

if __name__ == "__main__":  # before the other imports, which take a while
    from npllama.early_interrupt import end_at_once

    end_at_once()

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

import npllama
from command_line import Parser, exit_code, named_path, say
from npllama.backend import Backend
from npllama.console import check_output, open_streams, tell
from npllama.errors import InputError
from npllama.llama import Llama
from npllama.ops import Ops
from npllama.progress_line import progress_shown
from npllama.weight_formats import FORMATS
from training.stories import read_stories

Map = Callable[[Callable[[list[int]], np.ndarray], Sequence[list[int]]], Iterable[np.ndarray]]
_OPS = Ops(Backend())


@dataclass(frozen=True)
class Score:
    """Totals over texts. The three measures are ratios of these totals."""

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

    If there are more ids than the context holds, they are scored in windows as long as the
    context, each shifted by half a context. Every id is scored once. After the first window, each
    is predicted from at least half a context of preceding ids.
    """
    ids = list(ids)
    parts, scored = [], 1
    with llama.reading(_n_read(llama, ids), "scoring the text"):
        for begin, end in _windows(llama, ids):
            window = ids[begin:end]
            with np.errstate(over="ignore", invalid="ignore"):  # the caller checks the sum
                logits = llama.logits(window[:-1])  # (T, V); row t predicts window[t + 1]
                surprise = _OPS.cross_entropy(logits, np.array(window[1:]))  # (T,)
            parts.append(surprise[scored - begin - 1 :])
            scored = end
    return np.concatenate(parts) if parts else np.empty(0, dtype="float32")


def _windows(llama: Llama, ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Begin and end of each window of `nats`. A window's last id is only a target."""
    begin, end = 0, 1
    while end < len(ids):
        end = min(begin + llama.context + 1, len(ids))
        yield begin, end
        begin += (llama.context + 1) // 2


def _n_read(llama: Llama, ids: Sequence[int]) -> int:
    """Number of tokens that the model reads to score `ids`."""
    return sum(end - begin - 1 for begin, end in _windows(llama, ids))


def score(llama: Llama, text: str) -> Score:
    """The score of one text, encoded with BOS first whatever tokenizer_config.json says."""
    return score_texts(llama, [text])


def score_texts(llama: Llama, texts: Sequence[str], each: Map = map) -> Score:
    """The total score of several texts, each with its own BOS. `each` may be a pool's map."""
    llama.encode("")  # raises the error for a missing tokenizer
    encoded = [llama.tokenizer.encode(text) for text in texts]
    n_read = [_n_read(llama, ids) for ids in encoded]
    total, read = Score(0.0, 0, 0), 0
    with llama.reading(sum(n_read), "scoring the text") as work:
        scored = each(lambda ids: nats(llama, ids), encoded)
        for text, ids, n, surprise in zip(texts, encoded, n_read, scored, strict=True):
            one = float(surprise.sum(dtype="float64"))
            total += Score(one, len(ids) - 1, len(text.encode()))
            read += n
            work.reach(read * llama.config.n_layers)  # threads of a pool report no progress
    return total


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    open_streams()
    options = _parser().parse_args(arguments)
    return exit_code(
        "perplexity",
        lambda: _shown_score(options),
        out_of_memory="use a narrower --dtype or a smaller model",
    )


def _shown_score(options: argparse.Namespace) -> None:
    with progress_shown("perplexity"):
        _print_score(options)


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
        raise InputError(f"{options.text} has no token after BOS: expected at least one character")
    if not math.isfinite(total.nats):
        raise InputError(
            f"the score of {options.text} is {total.nats}, not a finite number: the weights of the "
            "model are probably damaged, get them again"
        )
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
            f"{total.nats_per_token:.4f} nats per token, perplexity {total.perplexity:.4f}, "
            f"{total.bits_per_byte:.4f} bits per byte "
            f"({len(texts):,} texts, {total.n_tokens:,} tokens, {total.n_bytes:,} bytes)"
        )
    tell(f"perplexity: {total.n_tokens / seconds:,.0f} tokens/s")


def _parser() -> argparse.ArgumentParser:
    p = Parser("perplexity", "Score a text by a model: nats per token, perplexity, bits per byte.")
    p.add_argument(
        "--model",
        type=named_path,
        metavar="DIR",
        help="a model directory (default: the model that ships with npllama)",
    )
    p.add_argument(
        "--text",
        type=named_path,
        required=True,
        metavar="FILE",
        help="UTF-8; lines of <|endoftext|> separate texts, each of which begins with BOS",
    )
    p.add_argument("--limit", type=int, metavar="N", help="score only the first N texts")
    p.add_argument("--backend", choices=("auto", "numpy", "cupy"), default="auto")
    p.add_argument("--device", type=int, metavar="N", help="which GPU (default: the first)")
    p.add_argument(
        "--dtype", choices=tuple(FORMATS), help="dtype of the weights (default: as stored)"
    )
    p.add_argument("--json", action="store_true", help="print the figures as JSON")
    return p


if __name__ == "__main__":
    sys.exit(main())
