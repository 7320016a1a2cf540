"""The shapes for which speeds are reported, and their prompts."""

from collections.abc import Sequence

import numpy as np

from benchmarking.device_weights import device_parameters
from npllama.backend import Backend
from npllama.config import LlamaConfig
from npllama.costs import forward_flops
from npllama.initialization import random_parameters
from npllama.llama import Llama
from npllama.memory import require_free_memory
from npllama.ops import ops_for
from npllama.weight_formats import FORMATS

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


def prompt_lengths(n_tokens: int, batch: int) -> list[int]:
    """Lengths of `batch` ragged prompts. Each is one token shorter than the last, if possible."""
    return [max(1, n_tokens - row) for row in range(batch)]


def prefill_flops(config: LlamaConfig, lengths: Sequence[int]) -> int:
    """`forward_flops` of prompts read one after the other, with the head only on the last token."""
    return sum(forward_flops(config, length, 1) for length in lengths)
