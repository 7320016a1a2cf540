"""How many bytes a model needs, found out before any is taken."""

import numpy as np

from npllama.config import LlamaConfig
from npllama.errors import OutOfMemoryError
from npllama.kv_cache import KVCache
from npllama.model import PREFILL_CHUNK
from npllama.ops import Ops


def check_memory(
    config: LlamaConfig, ops: Ops, cache_dtype: np.dtype, batch: int, context: int, weights: int = 0
) -> None:
    """Compare the bytes that weights, cache and scratch need with those that are free.

    Raises:
        OutOfMemoryError: too few; the message has both numbers.
    """
    cache = KVCache.nbytes(
        config.n_layers, config.n_kv_heads, config.head_dim, batch, context, cache_dtype.itemsize
    )
    chunk = min(PREFILL_CHUNK, context)
    scratch = 4 * ops.scratch_size(config.n_heads, config.n_kv_heads, chunk, context)
    scratch += _activation_bytes(config, max(batch, chunk))
    needed = weights + cache + scratch
    free = ops.backend.free_bytes()
    if free is not None and needed > free:
        parts = f"cache {_gb(cache)} for {batch} x {context} positions, workspace {_gb(scratch)}"
        if weights:
            parts = f"weights {_gb(weights)}, {parts}"
        raise OutOfMemoryError(
            f"{_gb(needed)} of {ops.backend.memory_name()} needed ({parts}) and {_gb(free)} are "
            "free: use a shorter --context, a narrower --dtype, fewer prompts or a smaller model"
        )


def _activation_bytes(config: LlamaConfig, n_tokens: int) -> int:
    """float32 temporaries of the widest block, for `n_tokens` at a time: residual, norm,
    q k v and their rotated copies; gate, up, their product and its factors."""
    attention = 8 * config.dim
    feed_forward = 2 * config.dim + 6 * config.ffn_dim
    return 4 * (n_tokens * max(attention, feed_forward) + 2 * config.vocab_size)


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB"
