"""A source becomes a model directory, one tensor at a time."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from converting.new_directory import new_directory
from converting.numbers import Loss, as_dtype, check_finite
from converting.source import Source
from converting.tokenizers import CONFIG as TOKENIZER_CONFIG
from converting.tokenizers import read_tokenizer
from converting.writer import Entry, plan, write_json, write_shards
from npllama.quantization import quantize
from npllama.weights import INT8_CONFIG, STORAGE_DTYPES, scale_name, tensor_shapes

_FLOAT32 = np.dtype("float32")


def convert(
    source: Source,
    dest: Path,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    max_shard_size: int = 4 * 10**9,
    overwrite: bool = False,
) -> None:
    """Write `source` as the model directory `dest`, one tensor at a time, whole or not at all.

    Args:
        dtype: of the matrices; None keeps each tensor's own.
        tokenizer: tokenizer.model or tokenizer.bin; None takes the one beside the source.

    Raises:
        NpllamaError: broken weights, a `dest` in the way, too little disk space.
    """
    config = source.config
    tokenizer = tokenizer or source.tokenizer
    model = None if tokenizer is None else read_tokenizer(tokenizer, config.vocab_size)
    shards = plan(entries(source, dtype), max_shard_size)
    total = sum(shard.nbytes for shard in shards)
    loss = Loss()
    with new_directory(dest, total + 2**24, overwrite) as partial:
        # None: a bar on a terminal, quiet otherwise
        numbers = sum(shard.nbytes - len(shard.header) for shard in shards)
        with tqdm(total=numbers, unit="B", unit_scale=True, disable=None) as bar:
            write_shards(partial, shards, converted(source, dtype, loss), bar.update)
        for path in source.copied:
            shutil.copyfile(path, partial / path.name)
        if model is not None:
            (partial / "tokenizer.model").write_bytes(model)
            if not (partial / "tokenizer_config.json").exists():
                write_json(partial / "tokenizer_config.json", TOKENIZER_CONFIG)
        generation = {"bos_token_id": config.bos_id, "eos_token_id": list(config.eos_ids)}
        write_json(partial / "generation_config.json", source.generation_config or generation)
        write_json(partial / "config.json", hf_config(source, dtype))  # last: now it can load
    print(
        f"convert: wrote {dest}: {config.n_parameters:,} parameters, {total / 1e6:,.1f} MB",
        file=sys.stderr,
    )
    if loss.changed:
        print(f"convert: {loss}", file=sys.stderr)
    if model is None:
        print(
            "convert: no tokenizer was found beside the source: the model takes token ids only; "
            "--tokenizer FILE adds one",
            file=sys.stderr,
        )


def entries(source: Source, dtype: str | None) -> Iterator[Entry]:
    """What is written, in the order of the file."""
    for name, shape in tensor_shapes(source.config).items():
        target = _target_dtype(source, name, dtype)
        yield Entry(name, target, shape)
        if target == np.int8:
            yield Entry(scale_name(name), _FLOAT32, shape[:1])


def converted(source: Source, dtype: str | None, loss: Loss) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor of `entries`, read, checked and converted when its turn comes."""
    for name in tensor_shapes(source.config):
        tensor = source.tensors[name]
        values = np.ascontiguousarray(tensor.read())
        check_finite(values, tensor.where)
        target = _target_dtype(source, name, dtype)
        if target == np.int8:
            values, scale = quantize(values)
            yield scale_name(name), scale
            yield name, values
        else:
            yield name, as_dtype(values, target, tensor.where, loss)


def _target_dtype(source: Source, name: str, dtype: str | None) -> np.dtype:
    """As stored unless given (float64 becomes float32); norms beside int8 are float32."""
    tensor = source.tensors[name]
    if dtype is None:
        return _FLOAT32 if tensor.dtype == np.float64 else tensor.dtype
    if dtype == "int8" and len(tensor.shape) == 1:
        return _FLOAT32
    return STORAGE_DTYPES[dtype]


def hf_config(source: Source, dtype: str | None) -> dict[str, object]:
    """config.json: the source's own where it has one, with the dtype that was written."""
    first = next(entries(source, dtype)).dtype
    name = "float32" if first == np.int8 else first.name
    fields = (source.hf_config or source.config.to_hf(name)) | {"torch_dtype": name}
    fields.pop("dtype", None)  # transformers 5's spelling, which would contradict the other
    fields.pop("quantization_config", None)
    if first == np.int8:
        fields["quantization_config"] = INT8_CONFIG
    return fields
