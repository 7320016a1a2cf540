"""The shapes for which speeds are reported, and the matrix products of a forward pass."""

from collections.abc import Sequence

import numpy as np

from benchmarking.device_weights import device_parameters
from npllama.backend import Backend
from npllama.config import LlamaConfig
from npllama.initialization import random_parameters
from npllama.llama import Llama
from npllama.memory import require_free_memory
from npllama.ops import ops_for
from npllama.weight_formats import FORMATS
from npllama.weight_table import EMBEDDING, LM_HEAD, tensor_shapes

# Shapes with published speeds of other programs: llama2.c's stories models, TinyLlama, Llama 2.
SHAPES = {
    "15m": LlamaConfig(288, 6, 6, 6, 768, 32000),
    "110m": LlamaConfig(768, 12, 12, 12, 2048, 32000),
    "1.1b": LlamaConfig(2048, 22, 32, 4, 5632, 32000),
    "7b": LlamaConfig.named("7B"),
    "13b": LlamaConfig.named("13B"),
    "34b": LlamaConfig.named("34B"),
    "70b": LlamaConfig.named("70B"),
}


def random_llama(config: LlamaConfig, backend: Backend, dtype: str, context: int) -> Llama:
    """A model of this shape with random weights and without a tokenizer.

    Zero weights would be too fast: the kernel backs untouched zeros with a single page, which
    stays in the cache. Weights for a device are generated there.

    Raises:
        OutOfMemoryError: the model does not fit. Raised before any of it is allocated.
    """
    ops = ops_for(backend)
    storage = FORMATS[dtype].dtype
    cache_dtype = ops.cache_dtype(storage)
    require_free_memory(
        config,
        ops,
        cache_dtype,
        batch=1,
        context=context,
        chunk=min(ops.prefill_chunk(), context),
        weights=config.n_parameters * storage.itemsize,
    )
    make = random_parameters if backend.xp is np else device_parameters
    parameters = make(config, ops, dtype=storage)
    return Llama(config, parameters, ops, context, cache_dtype=cache_dtype)


def forward_matrices(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Name and shape (O, D) of each matrix that a forward pass multiplies by, in its order.

    The embedding is included only as a tied head, because a lookup reads just one row per token.
    """
    shapes = tensor_shapes(config)
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    embedding = matrices.pop(EMBEDDING)
    head = EMBEDDING if config.tie_embeddings else LM_HEAD
    return matrices | {head: embedding}


def forward_flops(config: LlamaConfig, n_tokens: int, n_logits: int) -> int:
    """Floating point operations of a forward pass's matrix products: 2 O D per matrix and row.

    Attention over the cache and elementwise operations are not counted, because the roofline has
    neither. All rows count in all layers, as in the roofline, although npllama's last layer skips
    most rows of a prompt.

    Args:
        n_tokens: rows that go through the layers.
        n_logits: rows that go through the head.
    """
    *layers, head = [n * d for n, d in forward_matrices(config).values()]
    return 2 * (sum(layers) * n_tokens + head * n_logits)


def prompt_lengths(n_tokens: int, batch: int) -> list[int]:
    """Lengths of `batch` ragged prompts. Each is one token shorter than the last, if possible."""
    return [max(1, n_tokens - row) for row in range(batch)]


def prefill_flops(config: LlamaConfig, lengths: Sequence[int]) -> int:
    """`forward_flops` of prompts read one after the other, with the head only on the last token."""
    return sum(forward_flops(config, length, 1) for length in lengths)
