"""Choose the next token of each row in one kernel."""

import math

import numpy as np

from npllama.backend import Array
from npllama.ops.cuda.kernels import Kernels, instance
from npllama.sampling_options import Sampling

FILTERS = ("keep_top_k", "keep_top_p", "keep_min_p")
"""The filters that the kernel has, as method names of `Ops`, in the kernel's order."""
MOST_TOKENS = 2**18  # for more tokens, sums of fixed-point probabilities would not fit 64 bits
MOST_THREADS = 1024
OWN_SHARED = 10 * 1024
"""Bytes of shared memory per thread block besides the row of logits, rounded up."""


def fits(logits: Array, sampling: Sampling) -> bool:
    """Whether `next_token` supports these logits and all filters that are enabled."""
    wanted = [method for method, _value in sampling.filters()]
    known = [method for method in FILTERS if method in wanted]
    return logits.dtype == np.float32 and logits.shape[1] <= MOST_TOKENS and wanted == known


def next_token(
    kernels: Kernels,
    logits: Array,
    uniform: Array | None,
    sampling: Sampling,
    seen: Array | None = None,
    n_tokens: int | None = None,
    allowed: Array | None = None,
) -> tuple[Array, Array]:
    """Compute `SamplingEquations.next_token` for (B, V) float32 logits that satisfy `fits`.

    The kernel skips the filters that are disabled.
    """
    xp = kernels.xp
    n_rows, n_vocab = logits.shape
    n_tokens = n_vocab if n_tokens is None else min(n_tokens, n_vocab)
    is_sampled = sampling.temperature > 0
    values = dict(sampling.filters())
    top_k, min_p = values.get("keep_top_k", 0), values.get("keep_min_p", 0)
    ids, log_probs = xp.empty(n_rows, dtype="int64"), xp.empty(n_rows, dtype="float32")
    is_kept = is_sampled and 4 * n_tokens <= kernels.max_shared - OWN_SHARED
    kernels.launch(
        "sampling",
        instance("next_token", is_sampled, is_kept),
        (n_rows,),
        (min(-(-n_vocab // 32) * 32, MOST_THREADS),),
        (
            xp.ascontiguousarray(logits),
            xp.ascontiguousarray(uniform) if is_sampled else None,
            seen,
            None if allowed is None else xp.ascontiguousarray(allowed),
            ids,
            log_probs,
            n_vocab,
            n_tokens,
            float(sampling.repetition_penalty),
            math.log2(math.e) / min(max(sampling.temperature, 1e-30), 1e30),
            0 if top_k >= n_tokens else int(top_k),
            np.float64(values.get("keep_top_p", 1)),
            math.log2(min_p) if min_p > 0 else -math.inf,
        ),
        shared=4 * n_tokens if is_kept else 0,
    )
    return ids, log_probs
