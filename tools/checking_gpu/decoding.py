"""One token after another, by the library's own loop: how long a step takes, and what it reads."""

import math
import statistics
import time
from dataclasses import dataclass

from benchmarking.measure import GREEDY, make_task
from npllama.generation import Generation
from npllama.llama import Llama

LONGEST = 6
"""Seconds of timed runs, after which no further one begins."""


@dataclass(frozen=True)
class Decoding:
    """A decode step of `batch` rows.

    Attributes:
        seconds: the median run's, a step.
        nbytes: weights, and the keys and values of all tokens so far, that a step reads.
        eager_because: what the last run says of steps that were not replayed; "" where all were,
            or where there is no graph.
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
    """Greedy tokens that end at `context` positions in each row.

    The prompts are read once, with a run that is not timed: kernels are compiled and graphs
    captured in it. Then the cache holds them.
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
    n_keys = context - new_tokens / 2  # of the middle step
    nbytes = llama.bytes_per_forward + batch * n_keys * a_position
    return Decoding(batch, statistics.median(found[1:]), nbytes, _eager_because(generation))


def _eager_because(generation: Generation) -> str:
    """The generation's own words on steps that no graph replayed."""
    report = generation.steps_report()
    return report if report is not None and "eager" in report else ""
