"""Hugging Face directories: safetensors or pytorch_model*.bin, single or sharded."""

from pathlib import Path

import numpy as np

from converting.source import Source, Tensor, file_tensor, scaled_int8
from converting.torch_file import checked_tensors, read_torch_file
from npllama.config import LlamaConfig, read_json
from npllama.errors import WeightsError
from npllama.safetensors_file import SafetensorsFile
from npllama.weights import (
    EMBEDDING,
    INDEX,
    LM_HEAD,
    SINGLE,
    is_rotary_table,
    scale_name,
    shard_files,
)

BIN_SINGLE, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_COPIED = ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")
_COPIED += ("added_tokens.json", "chat_template.jinja")


def is_hugging_face(directory: Path) -> bool:
    """Whether the directory holds a config.json and weights of either kind."""
    names = (SINGLE, INDEX, BIN_SINGLE, BIN_INDEX)
    return directory.is_dir() and any((directory / name).exists() for name in names)


def read_hugging_face(directory: Path) -> Source:
    """Read the config and the headers of all files.

    Raises:
        ConfigError, WeightsError: naming file and tensor.
    """
    config = LlamaConfig.from_directory(directory)
    if (directory / SINGLE).exists() or (directory / INDEX).exists():
        kind, paths = "safetensors", shard_files(directory, SINGLE, INDEX)
        read_file = _safetensors
    else:
        kind, paths = "pytorch_model.bin", shard_files(directory, BIN_SINGLE, BIN_INDEX)
        read_file = _torch
    tensors: dict[str, Tensor] = {}
    for path in paths:
        for name, tensor in read_file(path).items():
            if name in tensors:
                raise WeightsError(f"{tensor.where} stands in another shard too")
            if not is_rotary_table(name):
                tensors[name] = tensor
    tensors = _with_scales(tensors)
    head, embedding = tensors.get(LM_HEAD), tensors.get(EMBEDDING)
    if config.tie_embeddings and head is not None and embedding is not None:
        if head.shape != embedding.shape or not np.array_equal(head.read(), embedding.read()):
            raise WeightsError(
                f"{head.where} differs from the embedding that config.json ties it to"
            )
        del tensors[LM_HEAD]  # the embedding, stored a second time
    tokenizer, generation = directory / "tokenizer.model", directory / "generation_config.json"
    return Source(
        format=f"Hugging Face, {kind}, {len(paths)} {'file' if len(paths) == 1 else 'files'}",
        config=config,
        tensors=tensors,
        tokenizer=tokenizer if tokenizer.exists() else None,
        hf_config=read_json(directory / "config.json"),
        generation_config=read_json(generation) if generation.exists() else {},
        copied=tuple(directory / name for name in _COPIED if (directory / name).exists()),
    )


def _safetensors(path: Path) -> dict[str, Tensor]:
    return {
        name: file_tensor(path, name, info.dtype, info.shape, info.begin)
        for name, info in SafetensorsFile(path).tensors.items()
    }


def _torch(path: Path) -> dict[str, Tensor]:
    return checked_tensors(read_torch_file(path), path)


def _with_scales(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """int8 matrices joined with the scales beside them."""
    joined = {}
    scales = {scale_name(name) for name in tensors}
    for name, tensor in tensors.items():
        if name in scales:
            continue
        scale = tensors.get(scale_name(name))
        if scale is not None and (tensor.dtype != np.int8 or len(tensor.shape) != 2):
            raise WeightsError(
                f"{scale.where} is surplus: {name} is {tensor.dtype} of shape "
                f"{list(tensor.shape)}, and int8 matrices alone have scales"
            )
        if scale is not None and scale.shape != tensor.shape[:1]:
            raise WeightsError(f"{scale.where} has shape {list(scale.shape)}: expected one a row")
        joined[name] = tensor if scale is None else scaled_int8(tensor, scale)
    return joined
