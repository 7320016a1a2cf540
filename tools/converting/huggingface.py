"""Reads Hugging Face directories: safetensors or pytorch_model*.bin, in one file or in shards."""

from pathlib import Path

import numpy as np

from converting.source import Source, Tensor, file_tensor, quantized
from converting.tokenizers import DESCRIBING as TOKENIZER_FILES
from converting.torch_file import checked_tensors, read_torch_file
from npllama.config import LlamaConfig, read_json
from npllama.errors import OtherTokenizerError, TokenizerError, WeightsError
from npllama.safetensors_file import DTYPES, SafetensorsFile
from npllama.tokenizer_files import tokenizer_file
from npllama.tokenizer_json import sentencepiece_from_json
from npllama.weight_formats import FORMATS, scale_name
from npllama.weight_table import EMBEDDING, LM_HEAD
from npllama.weights import INDEX, SINGLE, check_index, is_rotary_table, shard_files

_DTYPES = DTYPES | {"F64": np.dtype("float64")}  # npllama.load does not read float64
BIN_SINGLE, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
COPIED = (*TOKENIZER_FILES, "chat_template.jinja")


def is_hugging_face(directory: Path) -> bool:
    """Whether the directory holds weights in one of the two formats."""
    names = (SINGLE, INDEX, BIN_SINGLE, BIN_INDEX)
    return directory.is_dir() and any((directory / name).exists() for name in names)


def read_hugging_face(directory: Path) -> Source:
    """Read the config and the headers of all weight files.

    Raises:
        ConfigError, WeightsError: something is missing or wrong. The message names file and tensor.
    """
    config = LlamaConfig.from_directory(directory)
    notes: tuple[str, ...] = ()
    if (directory / SINGLE).exists() or (directory / INDEX).exists():
        kind, single, index, read_file = "safetensors", SINGLE, INDEX, _safetensors
        if (directory / BIN_SINGLE).exists() or (directory / BIN_INDEX).exists():
            notes = (f"{directory} also holds pytorch_model.bin; the safetensors are read",)
    else:
        kind, single, index, read_file = "pytorch_model.bin", BIN_SINGLE, BIN_INDEX, _torch
    paths = shard_files(directory, single, index)
    files = {path.name: read_file(path) for path in paths}
    if single not in files:
        check_index(directory / index, files, config.tie_embeddings)
    tensors: dict[str, Tensor] = {}
    for of_file in files.values():
        for name, tensor in of_file.items():
            if name in tensors:
                raise WeightsError(f"{tensor.where} is also in another shard: expected it in one")
            if not is_rotary_table(name):
                tensors[name] = tensor
    tensors = _with_scales(tensors)
    head, embedding = tensors.get(LM_HEAD), tensors.get(EMBEDDING)
    stored_tie = None
    if config.tie_embeddings and head is not None and embedding is not None:
        del tensors[LM_HEAD]  # a second copy of the embedding
        if head.place is None or head.place != embedding.place:
            stored_tie = head
    tokenizer, generation = tokenizer_file(directory), directory / "generation_config.json"
    no_tokenizer = Source.no_tokenizer
    if tokenizer is not None and tokenizer.suffix == ".json":
        try:
            sentencepiece_from_json(tokenizer)
        except OtherTokenizerError as error:
            tokenizer, no_tokenizer = None, str(error)
        except TokenizerError:
            pass  # a damaged file is refused only if it is converted; --tokenizer replaces it
    return Source(
        format=f"Hugging Face, {kind}, {len(paths)} {'file' if len(paths) == 1 else 'files'}",
        config=config,
        tensors=tensors,
        tokenizer=tokenizer,
        no_tokenizer=no_tokenizer,
        hf_config=read_json(directory / "config.json"),
        generation_config=read_json(generation) if generation.exists() else {},
        copied=tuple(directory / name for name in COPIED if (directory / name).exists()),
        notes=notes,
        stored_tie=stored_tie,
    )


def _safetensors(path: Path) -> dict[str, Tensor]:
    return {
        name: file_tensor(path, name, info.dtype, info.shape, info.begin)
        for name, info in SafetensorsFile(path, _DTYPES, is_rotary_table).tensors.items()
    }


def _torch(path: Path) -> dict[str, Tensor]:
    return checked_tensors(read_torch_file(path), path)


def _with_scales(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Combine each quantized matrix with its scales."""
    joined = {}
    scales = {scale_name(name) for name in tensors}
    for name, tensor in tensors.items():
        if name in scales:
            continue
        scale = tensors.get(scale_name(name))
        joined[name] = tensor if scale is None else _quantized(name, tensor, scale)
    return joined


def _quantized(name: str, values: Tensor, scale: Tensor) -> Tensor:
    found = [f for f in FORMATS.values() if not f.is_float and f.dtype == values.dtype]
    if not found or len(values.shape) != 2:
        raise WeightsError(
            f"{scale.where} is unexpected: {name} is {values.dtype} of shape "
            f"{list(values.shape)}, and only int8 matrices have scales"
        )
    stored = found[0].stored(name, found[0].shape(values.shape))
    dtype, shape = stored[scale_name(name)]
    if scale.shape != shape:
        raise WeightsError(
            f"{scale.where} has shape {list(scale.shape)}: expected {list(shape)}, one per row"
        )
    if scale.dtype != dtype:
        raise WeightsError(f"{scale.where} is stored as {scale.dtype}: expected {dtype}")
    return quantized(found[0], (values, scale))
