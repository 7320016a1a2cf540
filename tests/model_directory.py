"""Writes small model directories in the layout of Hugging Face."""

import json
from pathlib import Path

import ml_dtypes  # noqa: F401  (NumPy then knows "bfloat16", and so does safetensors)
import numpy as np
import safetensors.numpy

from npllama.sentencepiece_model import PieceType, bpe_model, special_and_byte_pieces
from npllama.tokenizer import Tokenizer
from npllama.weights import INDEX, SINGLE, tensor_shapes

BYTE_PIECES = [*special_and_byte_pieces(), ("\u2581", 0.0, PieceType.NORMAL)]


def byte_tokenizer() -> Tokenizer:
    """A tokenizer without merges: three special tokens, 256 byte tokens, and the space."""
    return Tokenizer.from_bytes(bpe_model(BYTE_PIECES))


def random_tensors(config, seed=0, dtype="float32"):
    """Random tensors of a checkpoint by name. Norm weights are close to 1, but not equal to 1."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        values = rng.standard_normal(shape, dtype="float32")
        values = 1 + 0.2 * values if len(shape) == 1 else values * shape[-1] ** -0.5
        tensors[name] = values.astype(dtype)
    return tensors


def write_model(
    directory, config, seed=0, dtype="float32", *, tensors=None, shards=1, tokenizer=True, **fields
):
    """Write config.json, weights and tokenizer.model, and return the directory.

    Args:
        tensors: the tensors to write; by default random ones.
        shards: the number of weight files. With more than one, an index is also written.
        fields: fields of config.json to add or replace. None removes a field.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    hf = config.to_hf(dtype) | fields
    hf = {name: value for name, value in hf.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(hf))
    tensors = random_tensors(config, seed, dtype) if tensors is None else tensors
    if shards == 1:
        safetensors.numpy.save_file(tensors, directory / SINGLE)
    else:
        _write_shards(directory, tensors, shards)
    if tokenizer:
        (directory / "tokenizer.model").write_bytes(bpe_model(BYTE_PIECES))
    return directory


def _write_shards(directory, tensors, shards):
    weight_map = {
        name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors"
        for i, name in enumerate(tensors)
    }
    for shard in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == shard}
        safetensors.numpy.save_file(part, directory / shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))
