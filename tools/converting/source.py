"""The common form of all checkpoint formats: a config, and tensors that are read on demand.

A reader reads only headers. For each tensor it provides dtype, shape and a function that reads the
values. A conversion therefore holds one tensor in memory at a time, and an inspection none.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from npllama.config import LlamaConfig
from npllama.errors import WeightsError
from npllama.quantization import dequantize
from npllama.weight_formats import Format
from npllama.weight_table import OF_LAYER


@dataclass(frozen=True)
class Tensor:
    """A tensor of a source, read on demand.

    Attributes:
        where: file and name, for messages.
        dtype: dtype of what `read` returns.
        read: returns the values with `dtype` and `shape`. Each call reads the file again.
        format: the quantized npllama format in which `parts` store the tensor, if there is one.
        parts: for a quantized matrix, the stored tensors: int8 values and scales.
        place: location of the data. Two names of one tensor have the same place.
    """

    where: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    format: Format | None = None
    parts: tuple["Tensor", ...] = ()
    place: tuple | None = None

    @property
    def stored_dtype(self) -> np.dtype:
        """The dtype of the elements in the file."""
        return self.parts[0].dtype if self.parts else self.dtype

    @property
    def nbytes(self) -> int:
        """Number of bytes in the file."""
        if self.parts:
            return sum(part.nbytes for part in self.parts)
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


@dataclass
class Source:
    """A checkpoint of any format.

    Attributes:
        format: name of the format, for --inspect.
        config: shape of the model.
        tensors: Hugging Face name -> Tensor.
        tokenizer: tokenizer.model, tokenizer.json or tokenizer.bin that comes with the weights.
        no_tokenizer: if `tokenizer` is None, the reason.
        hf_config, generation_config: contents of the source's own files, if it has them.
        copied: further files that are copied to DEST unchanged.
        notes: choices that the reader made, for the user.
        stored_tie: a tied head that the file stores although it should equal the embedding; the
            conversion compares the two.
    """

    format: str
    config: LlamaConfig
    tensors: dict[str, Tensor]
    tokenizer: Path | None = None
    no_tokenizer: str = "no tokenizer was found with the source"
    hf_config: dict = field(default_factory=dict)
    generation_config: dict = field(default_factory=dict)
    copied: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    stored_tie: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read_numbers(path: Path, dtype: np.dtype, count: int, offset: int, where: str) -> np.ndarray:
    """Read `count` elements from byte `offset` of a file into a new array.

    The file is not mapped, because the pages of a map would count as this program's memory.

    Raises:
        WeightsError: the file cannot be read, or ends too early.
    """
    try:
        values = np.empty(count, dtype=dtype)
        n_read = _read_into(values, path, offset)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from None
    except MemoryError:
        n_bytes = count * np.dtype(dtype).itemsize
        raise WeightsError(f"{where} has {n_bytes:,} bytes, more than the free memory") from None
    if n_read != values.nbytes:
        raise WeightsError(f"{where} is truncated: get the file again")
    return values


def _read_into(values: np.ndarray, path: Path, offset: int) -> int:
    """Read into an array and return the number of bytes. (np.fromfile takes disk errors for the
    end of the file.)"""
    rest = memoryview(values.view("uint8"))
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while n := file.readinto(rest):
            rest = rest[n:]
    return values.nbytes - rest.nbytes


def file_tensor(
    path: Path, name: str, dtype: np.dtype, shape: tuple[int, ...], offset: int
) -> Tensor:
    """A tensor that is stored in row-major order, without any encoding."""
    where = f"{path}: tensor {name}"

    def read() -> np.ndarray:
        count = int(np.prod(shape, dtype=np.int64))
        return read_numbers(path, dtype, count, offset, where).reshape(shape)

    return Tensor(where, np.dtype(dtype), shape, read)


def concatenated(parts: list[Tensor], axis: int) -> Tensor:
    """Concatenate the shards of one matrix along an axis."""
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)

    def read() -> np.ndarray:
        whole = np.empty(shape, dtype=parts[0].dtype)
        begin = 0
        for part in parts:  # reads one shard's part at a time
            end = begin + part.shape[axis]
            whole[(slice(None),) * axis + (slice(begin, end),)] = part.read()
            begin = end
        return whole

    return Tensor(parts[0].where, parts[0].dtype, tuple(shape), read)


def in_hf_row_order(w: Tensor, heads: int) -> Tensor:
    """Reorder rows of wq or wk from Meta's order to Hugging Face's. RoPE pairs rows (2i, 2i+1) in
    Meta's order and rows (i, i + C/2) in Hugging Face's.

    Args:
        w: (heads*C, D).
        heads: H for wq, K for wk.
    """
    rows, width = w.shape

    def read() -> np.ndarray:
        pairs = w.read().reshape(heads, rows // heads // 2, 2, width)
        return pairs.swapaxes(1, 2).reshape(rows, width)  # (heads, 2, C/2, D) -> (heads*C, D)

    return replace(w, read=read, format=None)


def from_meta_row_order(tensors: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """All tensors by their Hugging Face names, with wq and wk in Hugging Face's row order."""
    turned = dict(tensors)
    for i in range(min(config.n_layers, len(tensors))):  # a damaged config may claim any number
        for weight in OF_LAYER:
            name, heads = weight.hf_name(i), weight.heads(config)
            # a later check refuses tensors of another shape
            if heads is not None and name in turned and len(turned[name].shape) == 2:
                turned[name] = in_hf_row_order(turned[name], heads)
    return turned


def grouped_int8(values: Tensor, scales: Tensor, group: int) -> Tensor:
    """int8 values with one scale per `group` elements of the flattened tensor, read as float32."""

    def read() -> np.ndarray:
        flat = values.read().reshape(-1, group)  # a group may span two rows
        return dequantize(flat, scales.read()).reshape(values.shape)

    parts = (values, scales)
    return Tensor(values.where, np.dtype("float32"), values.shape, read, parts=parts)


def quantized(format_: Format, parts: tuple[Tensor, ...]) -> Tensor:
    """A matrix in one of npllama's quantized formats with the arrays `parts`, read as float32."""

    def read() -> np.ndarray:
        return format_.to_float(*(part.read() for part in parts))

    shape = format_.shape(parts[0].shape)
    return Tensor(parts[0].where, np.dtype("float32"), shape, read, format_, parts)
