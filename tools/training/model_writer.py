"""Writes a trained model as a Hugging Face directory."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from atomic import atomic_directory, check_place, resolved
from converting.tokenizers import CONFIG as TOKENIZER_CONFIG
from converting.writer import Entry, index_files, plan, to_json, write_shards
from npllama.config import LlamaConfig
from npllama.llama import Llama
from npllama.weights import named_arrays

_MAX_SHARD_SIZE = 4 * 10**9


def check_model_place(config: LlamaConfig, dest: Path) -> None:
    """Refuse a `dest` that `write_model` could not write. Called before the training.

    Raises:
        InputError: as for `write_model`.
    """
    check_place(resolved(dest), 4 * config.n_parameters, overwrite=True)


def write_model(
    llama: Llama, tokenizer: bytes, dest: Path, files: Mapping[str, bytes] | None = None
) -> None:
    """Write float32 weights, config and tokenizer to `dest`. An existing `dest` is
    replaced when the new directory is complete.

    Args:
        files: further files by name, which replace the defaults, such as tokenizer_config.json.

    Raises:
        InputError: `dest` cannot be written, or the disk has too little space.
    """
    arrays = named_arrays(llama.parameters, llama.config)
    entries = [Entry(name, np.dtype("float32"), array.shape) for name, array in arrays.items()]
    shards = plan(entries, _MAX_SHARD_SIZE)
    others = index_files(shards) | {"tokenizer_config.json": to_json(TOKENIZER_CONFIG)}
    others |= {**(files or {}), "tokenizer.model": tokenizer}
    others["config.json"] = to_json(llama.config.to_hf())  # last: without it nothing loads
    n_bytes = sum(shard.nbytes for shard in shards) + sum(map(len, others.values()))
    to_host = llama.backend.to_host
    with atomic_directory(resolved(dest), n_bytes, overwrite=True) as partial:
        tensors = ((name, to_host(array)) for name, array in arrays.items())
        write_shards(partial, shards, tensors, written=lambda n_bytes: None)
        for name, content in others.items():
            (partial / name).write_bytes(content)
