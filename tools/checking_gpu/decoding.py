"""Decoding in the library's own loop: how long a step takes, and how many bytes it reads."""

import math
import statistics
import time
from dataclasses import dataclass

from benchmarking.measure import GREEDY, make_task
from npllama.generation import Generation
from npllama.llama import Llama

LONGEST = 6
"""Seconds of timed runs after which no further run begins."""


@dataclass(frozen=True)
class Decoding:
    """A decode step of `batch` rows.

    Attributes:
        seconds: seconds per step, of the median run.
        nbytes: bytes that a step reads: weights, and the keys and values of all earlier tokens.
        eager_because: the reason why steps of the last run were not replayed as a graph; "" if
            all were, or if there is no graph.
    """

    batch: int
    seconds: float
    nbytes: float
    eager_because: str = ""

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.seconds

    @property
    def bytes_per_second(self) -> float:
        return self.nbytes / self.seconds


def decode(
    llama: Llama, context: int, batch: int = 1, new_tokens: int = 64, runs: int = 3
) -> Decoding:
    """Decode greedily up to `context` positions in each row.

    The first run is not timed. It reads the prompts, compiles kernels and captures graphs; later
    runs find the prompts in the cache.
    """
    task = make_task([context - new_tokens] * batch, new_tokens, llama.config.vocab_size)
    cache = llama.new_cache(batch, context)
    found: list[float] = []
    until = math.inf
    while len(found) < 1 + runs and (len(found) < 2 or time.monotonic() < until):
        generation = llama.new_generation(
            task.prompts,
            max_new_tokens=new_tokens,
            sampling=GREEDY,
            seed=0,
            ignore_eos=True,
            cache=cache,
        )
        generation.run()
        if not found:
            until = time.monotonic() + LONGEST
        found.append(generation.timings.decode_seconds / generation.timings.decode_steps)
        for row, prompt in enumerate(task.prompts):
            cache.truncate(row, len(prompt) - 1)
    c = llama.sizes
    a_position = 2 * c.n_layers * c.n_kv_heads * c.head_dim * llama.cache_dtype.itemsize
    n_keys = context - new_tokens / 2  # number of keys in the middle step
    nbytes = llama.bytes_per_forward + batch * n_keys * a_position
    return Decoding(batch, statistics.median(found[1:]), nbytes, _eager_because(generation))


def _eager_because(generation: Generation) -> str:
    """The generation's explanation of steps that no graph replayed; "" if there were none."""
    report = generation.steps_report()
    return report if report is not None and "eager" in report else ""
