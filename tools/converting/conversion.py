"""Converts a source to a model directory, one tensor at a time."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from atomic import atomic_directory
from converting.dtypes import Loss, as_dtype, check_finite, quantized
from converting.source import Source, Tensor
from converting.tokenizers import DESCRIBING as TOKENIZER_FILES
from converting.tokenizers import read_tokenizer, tokenizer_config
from converting.writer import Entry, index_files, plan, to_json, write_shards
from npllama.console import tell
from npllama.errors import InputError, WeightsError
from npllama.small_file import MAX_TOKENIZER, read_small_file
from npllama.tokenizer_files import read_tokenizer as load_tokenizer
from npllama.weight_formats import FORMATS, Format, format_of
from npllama.weight_table import EMBEDDING, tensor_shapes

_FLOAT32 = FORMATS["float32"]


def convert(
    source: Source,
    dest: Path,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    max_shard_size: int = 4 * 10**9,
    overwrite: bool = False,
) -> None:
    """Write `source` as the model directory `dest`, one tensor at a time. The directory appears
    only when it is complete.

    Args:
        dest: the directory by its real name (atomic.resolved).
        dtype: dtype of the matrices; None keeps the dtype of each tensor.
        tokenizer: a tokenizer.model, tokenizer.json or tokenizer.bin; None takes the one that
            comes with the source.
        max_shard_size: largest size of one weight file, in bytes.
        overwrite: whether to replace `dest` if it is a model directory.

    Raises:
        NpllamaError: damaged weights, a `dest` that may not be replaced, or too little disk space.
    """
    shards = plan(entries(source, dtype), max_shard_size)
    others = index_files(shards) | other_files(source, dtype, tokenizer)  # before writing anything
    total = sum(shard.nbytes for shard in shards)
    n_bytes = total + sum(len(content) for content in others.values())
    loss = Loss()
    with atomic_directory(dest, n_bytes + 2**24, overwrite) as partial:
        # disable=None shows a bar on a terminal only
        numbers = sum(shard.nbytes - len(shard.header) for shard in shards)
        with tqdm(total=numbers, unit="B", unit_scale=True, disable=None) as bar:
            write_shards(partial, shards, converted(source, dtype, loss), bar.update)
        for name, content in others.items():
            (partial / name).write_bytes(content)
    n_parameters = source.config.n_parameters
    _say(f"wrote {dest}: {n_parameters:,} parameters, {total / 1e6:,.1f} MB")
    for line in loss.lines():
        _say(line)
    left_out = [path.name for path in source.copied if path not in _copied(source, tokenizer)]
    if left_out:
        _say(f"not copied, because --tokenizer replaces what they describe: {', '.join(left_out)}")
    if "tokenizer.model" not in others:
        _say(f"{source.no_tokenizer}; the model takes only token ids; --tokenizer FILE adds one")


def _say(line: str) -> None:
    tell(f"convert: {line}")


def other_files(source: Source, dtype: str | None, tokenizer: Path | None) -> dict[str, bytes]:
    """The files of DEST other than tensors, by name. config.json is last: without it DEST does not
    load.

    Args:
        tokenizer: as for `convert`. If it is given, the source's files about its own tokenizer are
            left out.

    Raises:
        NpllamaError: a file cannot be read, or the tokenizer does not fit the model.
    """
    config = source.config
    copied = _copied(source, tokenizer)
    if source.tokenizer is not None and any(path.name in TOKENIZER_FILES for path in copied):
        load_tokenizer(source.tokenizer.parent, config)  # refuses what could not be loaded later
    files = {path.name: _content(path) for path in copied}
    tokenizer = tokenizer or source.tokenizer
    if tokenizer is not None:
        files["tokenizer.model"] = read_tokenizer(tokenizer, config.vocab_size)
        files.setdefault("tokenizer_config.json", to_json(tokenizer_config(tokenizer)))
    generation = {"bos_token_id": config.bos_id, "eos_token_id": list(config.eos_ids)}
    files["generation_config.json"] = to_json(source.generation_config or generation)
    files["config.json"] = to_json(hf_config(source, dtype))
    return files


def _copied(source: Source, tokenizer: Path | None) -> list[Path]:
    is_own = tokenizer is None or (
        source.tokenizer is not None and tokenizer.resolve() == source.tokenizer.resolve()
    )
    return [path for path in source.copied if is_own or path.name not in TOKENIZER_FILES]


def _content(path: Path) -> bytes:
    try:
        return read_small_file(path, MAX_TOKENIZER)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def entries(source: Source, dtype: str | None) -> Iterator[Entry]:
    """The tensors to write, in the order of the file."""
    for name, shape in tensor_shapes(source.config).items():
        for part, (part_dtype, part_shape) in (
            _target(source, name, dtype).stored(name, shape).items()
        ):
            yield Entry(part, part_dtype, part_shape)


def converted(source: Source, dtype: str | None, loss: Loss) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each tensor of `entries`, read, checked and converted on demand."""
    if source.stored_tie is not None:
        _check_tie(source.stored_tie, source.tensors[EMBEDDING])
    for name in tensor_shapes(source.config):
        target = _target(source, name, dtype)
        yield from _converted(name, source.tensors[name], target, loss)


def _check_tie(head: Tensor, embedding: Tensor) -> None:
    """Refuse a head that differs from the embedding. Comparing digests holds only one of the two
    in memory at a time."""
    for tensor in (head, embedding):
        check_finite(tensor.read(), tensor.where)
    if head.shape != embedding.shape or _digest(head) != _digest(embedding):
        raise WeightsError(
            f"{head.where} differs from the embedding, but config.json says that they are equal "
            "(tie_word_embeddings): get the files again"
        )


def _digest(tensor: Tensor) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(tensor.read()).view("uint8").data).digest()


def _converted(
    name: str, tensor: Tensor, target: Format, loss: Loss
) -> list[tuple[str, np.ndarray]]:
    """Convert one tensor. This is a separate function so that all of its arrays are freed before
    the next tensor is read."""
    parts = target.stored(name, tensor.shape)
    if target is tensor.format:  # copied unchanged, without a second rounding
        arrays = tuple(part.read() for part in tensor.parts)
        check_finite(target.bound(*arrays), tensor.where)
        return list(zip(parts, arrays, strict=True))
    values = np.ascontiguousarray(tensor.read())
    check_finite(values, tensor.where)
    if target.is_float:
        return [(name, as_dtype(values, target.dtype, tensor.where, loss))]
    if values.dtype == np.float64:  # scales are float32
        values = as_dtype(values, _FLOAT32.dtype, tensor.where, Loss())
    return list(zip(parts, quantized(values, target, loss), strict=True))


def _target(source: Source, name: str, dtype: str | None) -> Format:
    """The format to write: the given one, else the stored one. float64 becomes float32, and norms
    are float32 if matrices are int8.

    int8 with one scale per group, as in llama2.c, is not npllama's int8, so it becomes float32.
    """
    tensor = source.tensors[name]
    if dtype is None:
        stored = tensor.format or format_of(tensor.dtype)
        return stored if stored.name in FORMATS else _FLOAT32
    target = FORMATS[dtype]
    return target if target.is_float or len(tensor.shape) == 2 else _FLOAT32


def hf_config(source: Source, dtype: str | None) -> dict[str, object]:
    """The fields of config.json: the source's own if it has one, with the written dtype."""
    written = [_target(source, name, dtype) for name in tensor_shapes(source.config)]
    name = written[0].torch_dtype
    fields = (source.hf_config or source.config.to_hf(name)) | {"torch_dtype": name}
    fields.pop("dtype", None)  # transformers 5's name of the field, which could contradict ours
    fields.pop("quantization_config", None)
    for format_ in written:
        if format_.config is not None:
            fields["quantization_config"] = format_.config
    return fields
