"""How many bytes a model needs, computed before any of them are allocated."""

import numpy as np

from npllama.config import LlamaConfig
from npllama.errors import OutOfMemoryError
from npllama.kv_cache import KVCache
from npllama.ops import Ops
from npllama.parameters import Parameters
from npllama.shared_arrays import MappedFile, memory_of


def require_free_memory(
    config: LlamaConfig,
    ops: Ops,
    cache_dtype: np.dtype,
    batch: int,
    context: int,
    chunk: int,
    weights: int = 0,
    more: int = 0,
    has_cache: bool = False,
    upload: int = 0,
) -> None:
    """Check that the free memory suffices for weights, cache and workspace.

    Args:
        batch, context: rows of the cache, and positions per row.
        chunk: prompt tokens per forward pass.
        weights: bytes of the weights that are not loaded yet, or that must stay in memory.
        more: further bytes that are needed, such as those of a result.
        has_cache: whether the cache is already allocated.
        upload: bytes of the largest tensor that is not loaded yet. While it is joined with others,
            memory holds it twice. At that time there is no cache or workspace yet.

    Raises:
        OutOfMemoryError: too little memory is free. The message states both numbers.
    """
    cache = KVCache.nbytes(
        config.n_layers, config.n_kv_heads, config.head_dim, batch, context, cache_dtype.itemsize
    )
    cache = 0 if has_cache else cache
    workspace = more + workspace_nbytes(config, ops, batch, context, chunk, cache_dtype)
    needed = weights + max(cache + workspace, upload)
    free = ops.backend.free_bytes()
    if free is not None and needed > free:
        parts = f"cache {_gb(cache)} for {batch} x {context} positions, workspace {_gb(workspace)}"
        if weights:
            parts = f"weights {_gb(weights)}, {parts}"
        if upload > cache + workspace:
            parts += f", loading {_gb(upload)} before the last two are allocated"
        raise OutOfMemoryError(
            f"{_gb(needed)} of {ops.backend.memory_name()} needed ({parts}) and {_gb(free)} are "
            "free: use a shorter --context, a narrower --dtype, fewer prompts or a smaller model"
        )


def workspace_nbytes(
    config: LlamaConfig, ops: Ops, batch: int, context: int, chunk: int, cache_dtype: np.dtype
) -> int:
    """Peak bytes of a step other than weights and cache."""
    n_tokens = max(batch, chunk)
    # residual and norm; then q, k, v and the rotated copies, or gate, up and SwiGLU's output
    widest = max(config.n_heads * config.head_dim, config.ffn_dim)
    block = 4 * n_tokens * (2 * config.dim + 6 * widest)
    attention = ops.attention_nbytes(
        config.n_heads, config.n_kv_heads, config.head_dim, chunk, context, cache_dtype
    )
    # logits, copies made by the filters, their sums in float64, and the tokens seen
    sampling = 48 * batch * config.vocab_size
    return block + attention + sampling


def mapped_nbytes(parameters: Parameters) -> int:
    """Bytes of the weights that are views of memory-mapped files."""
    parts = (parameters.embedding, *parameters.layers, parameters.head)
    arrays = [array for part in parts for array in part.arrays()]
    return sum(array.nbytes for array in arrays if isinstance(memory_of(array), MappedFile))


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB"
