"""Reads Meta's checkpoints: params.json and one consolidated.NN.pth per model-parallel shard."""

from pathlib import Path

import numpy as np

from converting.meta_layout import by_hf_name, config_from, number
from converting.source import Source, Tensor, concatenated, from_meta_row_order
from converting.torch_file import checked_tensors, read_torch_file
from npllama.config import LlamaConfig, read_json
from npllama.errors import ConfigError, WeightsError
from npllama.weight_table import EMBEDDING, find_hf, layer_name


def is_meta(directory: Path) -> bool:
    """Whether the directory holds files of a Meta checkpoint."""
    return directory.is_dir() and (
        (directory / "params.json").exists() or any(directory.glob("consolidated.*.pth"))
    )


def read_meta(directory: Path) -> Source:
    """Read params.json and the header of every shard.

    Raises:
        ConfigError, WeightsError: something is missing or wrong. The message names file and tensor.
    """
    missing = "copy it from where the shards came from"
    params = read_json(directory / "params.json", missing=missing)
    paths = sorted(directory.glob("consolidated.*.pth"))
    _check_names([path.name for path in paths], directory)
    if len(paths) not in (1, 2, 4, 8):
        raise WeightsError(f"{directory} holds {len(paths)} shards: expected 1, 2, 4 or 8")
    shards = [by_hf_name(checked_tensors(read_torch_file(path), path), path) for path in paths]
    _check_count(params, shards, directory)
    config = _config(params, shards, directory / "params.json")
    tensors = {name: _merged(name, shards, paths) for name in shards[0]}
    tokenizers = (directory / "tokenizer.model", directory.parent / "tokenizer.model")
    return Source(
        format=f"Meta, {len(paths)} {'shard' if len(paths) == 1 else 'shards'}",
        config=config,
        tensors=from_meta_row_order(tensors, config),
        tokenizer=next((path for path in tokenizers if path.exists()), None),
    )


def _check_names(names: list[str], directory: Path) -> None:
    """Check that the shards are numbered from 00 without gaps."""
    expected = [f"consolidated.{i:02}.pth" for i in range(max(len(names), 1))]
    missing = next((name for name in expected if name not in names), None)
    if missing is not None:
        found = ", ".join(names[:8]) or "no shard"
        raise WeightsError(
            f"{missing} is missing: {directory} holds {found}; get all files of the checkpoint"
        )


def _check_count(params: dict, shards: list[dict[str, Tensor]], directory: Path) -> None:
    """Check the number of shards. The first shard's columns of the embedding imply this number."""
    embedding, dim = shards[0].get(EMBEDDING), params.get("dim")
    if embedding is None or len(embedding.shape) != 2 or not isinstance(dim, int):
        return  # later checks refuse this and name what is wrong
    columns = embedding.shape[1]
    if columns and dim % columns == 0 and dim // columns > len(shards):
        raise WeightsError(
            f"consolidated.{len(shards):02}.pth is missing: {directory} holds {len(shards)} of "
            f"{dim // columns} shards, since its first shard has {columns} of the {dim} columns of "
            "tok_embeddings.weight; get all files of the checkpoint"
        )


def _config(params: dict, shards: list[dict[str, Tensor]], path: Path) -> LlamaConfig:
    for name in ("use_scaled_rope", "rope_scaling", "quantization_args", "moe", "lora_args"):
        if params.get(name):
            raise ConfigError(f"{path}: {name} is set: only plain LLaMA-2 is implemented")
    theta = number(params, "rope_theta", path, 10000.0)
    return config_from(
        params,
        path,
        ffn_dim=_rows(shards, layer_name(0, "w_gate"), path),  # params.json does not state it
        vocab_size=_vocab_size(params, shards, path),
        context_length=16384 if theta == 1e6 else 4096,
        rope_theta=theta,
    )


def _vocab_size(params: dict, shards: list[dict[str, Tensor]], path: Path) -> int:
    given = number(params, "vocab_size", path, -1)
    if given != -1:  # -1 means unknown
        return given
    if EMBEDDING not in shards[0] or len(shards[0][EMBEDDING].shape) != 2:
        raise WeightsError(
            f"{path.parent}: tensor tok_embeddings.weight is missing or is not a matrix"
        )
    return shards[0][EMBEDDING].shape[0]  # shards split its columns, so each has all rows


def _rows(shards: list[dict[str, Tensor]], name: str, path: Path) -> int:
    missing = [i for i, shard in enumerate(shards) if name not in shard or not shard[name].shape]
    if missing:
        raise WeightsError(
            f"{path.parent}: shard {missing[0]} lacks tensor layers.0.feed_forward.w1.weight"
        )
    return sum(shard[name].shape[0] for shard in shards)


def _merged(name: str, shards: list[dict[str, Tensor]], paths: list[Path]) -> Tensor:
    """Merge one tensor from all shards. Norms are equal in all shards; matrices are split by rows
    or columns (`split` in npllama.weight_table)."""
    for shard, path in zip(shards, paths, strict=True):
        if shard.keys() != shards[0].keys():
            odd = sorted(shard.keys() ^ shards[0].keys())[0]
            raise WeightsError(
                f"{path} and {paths[0].name} are shards of different models: tensor {odd} is in "
                "only one of them"
            )
    parts = [shard[name] for shard in shards]
    if any(part.shape != parts[0].shape or part.dtype != parts[0].dtype for part in parts):
        raise WeightsError(
            f"{parts[0].where} has shape {list(parts[0].shape)} in {parts[0].dtype}, but differs "
            "in another shard: these are shards of different models"
        )
    weight, _layer = find_hf(name)
    if weight.split is None or len(parts[0].shape) != 2:  # a wrong shape is refused later
        return _equal_in_all(parts)
    return concatenated(parts, weight.split)


def _equal_in_all(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]

    def read() -> np.ndarray:
        first = parts[0].read()
        for part in parts[1:]:
            if part.read().tobytes() != first.tobytes():
                raise WeightsError(
                    f"{part.where} differs from the same tensor in another shard: these are shards "
                    "of different models"
                )
        return first

    return Tensor(parts[0].where, parts[0].dtype, parts[0].shape, read)
