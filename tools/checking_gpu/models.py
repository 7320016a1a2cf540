"""The models of the stages: the shipped one, and random ones made on the device."""

import gc

from benchmarking.shapes import SHAPES, random_llama
from npllama.backend import Backend
from npllama.config import LlamaConfig
from npllama.llama import SHIPPED, Llama
from npllama.ops import Ops
from npllama.tokenizer_files import read_tokenizer
from npllama.weights import Checkpoint

TINY = LlamaConfig(192, 1, 6, 2, 512, 260, context_length=512)
"""With --tiny, replaces every shape; its layer has the sizes of the shipped model's."""


def shipped_llama(ops: Ops, dtype: str | None = None) -> Llama:
    """The model that ships with the package, with any implementation of the mathematics."""
    config = LlamaConfig.from_directory(SHIPPED)
    parameters = Checkpoint(SHIPPED, config, dtype).parameters(ops)
    return Llama(config, parameters, ops, tokenizer=read_tokenizer(SHIPPED, config))


def shape_llama(shape: str, backend: Backend, dtype: str, tiny: bool) -> Llama:
    """A model of a shape with random weights. First frees the memory of earlier models."""
    gc.collect()  # a generation is part of a reference cycle
    backend.xp.get_default_memory_pool().free_all_blocks()
    config = TINY if tiny else SHAPES[shape]
    return random_llama(config, backend, dtype, config.context_length)
