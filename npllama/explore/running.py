"""Costs of a token on this machine, with and without the cache, and the time of each operation."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from npllama.costs import attention_flops, forward_flops
from npllama.errors import OutOfMemoryError
from npllama.kv_cache import KVCache
from npllama.llama import Llama
from npllama.op_times import watched

OUTSIDE = "outside of ops"
SHORTEST = 16
_REPEATS = 5
_PART_TO_REPEAT = 0.1
"""The largest part of the remaining time that the repeats of a measurement may take."""


@dataclass(frozen=True)
class Growth:
    """The cost of the last token of a text of n tokens, for several n.

    Attributes:
        n: (points,) lengths, the new token included.
        flops_with, flops_without: (points,), with the cache, and if all n tokens are computed
            again.
        bytes_with, bytes_without: (points,), the bytes of weights and cache that a step reads.
        seconds_with, seconds_without: (points,), measured or extrapolated. A step with the cache
            is limited by reading memory, so its last measurement is multiplied by the ratio of
            the bytes. A step without the cache is limited by arithmetic, so its last measurement
            is multiplied by the ratio of the FLOPs.
        measured_with, measured_without: (points,) bool.
    """

    n: np.ndarray
    flops_with: np.ndarray
    flops_without: np.ndarray
    bytes_with: np.ndarray
    bytes_without: np.ndarray
    seconds_with: np.ndarray
    seconds_without: np.ndarray
    measured_with: np.ndarray
    measured_without: np.ndarray


@dataclass(frozen=True)
class Times:
    """The time of each operation of a generation, the slowest first.

    Attributes:
        names: methods of ops, with the shape of the matrix if the method takes one.
        seconds: the time of each, excluding the operations that it calls.
        total: seconds of the generation.
        n_read, n_new: tokens of the prompt, and new tokens.
    """

    names: tuple[str, ...]
    seconds: np.ndarray
    total: float
    n_read: int
    n_new: int


def measure_growth(llama: Llama, budget: float) -> Growth:
    """The costs up to the full context. Times are measured for about `budget` seconds."""
    n = _lengths(llama.context)
    config = llama.config
    matrices = forward_flops(config, 1, 1)
    flops_with = np.array([matrices + attention_flops(config, 1, m - 1) for m in n], dtype=float)
    flops_without = np.array(
        [forward_flops(config, m, 1) + attention_flops(config, m, 0) for m in n], dtype=float
    )
    weights = llama.bytes_per_forward
    bytes_with = np.array([weights + _cache_nbytes(llama, m) for m in n], dtype=float)
    end = time.perf_counter() + budget
    with_cache = _measured(lambda m: _one_more(llama, m), n, bytes_with, end - budget / 2)
    without = _measured(lambda m: _all_again(llama, m), n, flops_without, end)
    return Growth(
        n=np.array(n),
        flops_with=flops_with,
        flops_without=flops_without,
        bytes_with=bytes_with,
        bytes_without=np.full(len(n), weights, dtype=float),
        seconds_with=with_cache[0],
        seconds_without=without[0],
        measured_with=with_cache[1],
        measured_without=without[1],
    )


def _lengths(context: int) -> list[int]:
    """Powers of two up to the context, and the context."""
    lengths, n = [], min(SHORTEST, context)
    while n < context:
        lengths.append(n)
        n *= 2
    return [*lengths, context]


def _cache_nbytes(llama: Llama, n: int) -> int:
    c = llama.config
    return KVCache.nbytes(c.n_layers, c.n_kv_heads, c.head_dim, 1, n, llama.cache_dtype.itemsize)


def _measured(
    timed: Callable[[int], float], n: Sequence[int], cost: np.ndarray, end: float
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds at each length, and whether they were measured.

    The first length is always measured. A length that does not fit before `end` is extrapolated
    in proportion to `cost`.
    """
    seconds, measured = np.zeros(len(n)), np.zeros(len(n), dtype=bool)
    for i, length in enumerate(n):
        guess = seconds[i - 1] * cost[i] / cost[i - 1] if i else 0.0
        fits = i == 0 or (measured[i - 1] and time.perf_counter() + 1.5 * guess < end)
        try:
            seconds[i] = timed(length) if fits else guess
        except OutOfMemoryError:
            if i == 0:
                raise
            seconds[i], fits = guess, False
        measured[i] = fits
        left = end - time.perf_counter()
        if fits and _REPEATS * seconds[i] < _PART_TO_REPEAT * left:
            # other programs can only make a measurement longer
            seconds[i] = min(seconds[i], *(timed(length) for _ in range(_REPEATS - 1)))
    return seconds, measured


def _one_more(llama: Llama, n: int) -> float:
    """Seconds of one token after n - 1 cached ones. The cached keys are zeros, because the time
    does not depend on their values."""
    llama.check_memory(1, n)
    cache = llama.new_cache(context=n)
    if n > 1:
        place = cache.place(n - 1)
        cache.advance_on_device(place)
        cache.advance(place.rows, [n - 1])
    return _seconds(llama, 1, cache)


def _all_again(llama: Llama, n: int) -> float:
    """Seconds of n tokens that are computed from an empty cache."""
    llama.check_memory(1, n)
    return _seconds(llama, n, llama.new_cache(context=n))


def _seconds(llama: Llama, n_new: int, cache: KVCache) -> float:
    ids = [llama.config.bos_id % llama.config.vocab_size] * n_new
    begin = time.perf_counter()
    llama.backend.to_host(llama.prefill(ids, cache))  # waits for the device
    return time.perf_counter() - begin


def time_operations(llama: Llama, run: Callable[[], int], n_read: int) -> Times:
    """The time of each method of the ops object during `run`.

    Args:
        run: generates text and returns the number of new tokens.
        n_read: tokens of the prompt.
    """
    marker = llama.backend.xp.zeros(1)
    with watched(llama.ops, lambda: llama.backend.to_host(marker)) as watch:
        begin = time.perf_counter()
        n_new = run()
        total = time.perf_counter() - begin
    rest = max(total - sum(watch.seconds.values()), 0.0)
    lines = sorted([*watch.seconds.items(), (OUTSIDE, rest)], key=lambda line: -line[1])
    return Times(
        names=tuple(name for name, _ in lines),
        seconds=np.array([seconds for _, seconds in lines]),
        total=total,
        n_read=n_read,
        n_new=n_new,
    )
