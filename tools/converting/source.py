"""What every format is read as: a config, and tensors that are not read yet.

A reader looks at headers alone. It gives each tensor's dtype and shape and a function that reads
it, so that a conversion holds one tensor at a time and an inspection none.
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
    """A tensor of a source, not read yet.

    Attributes:
        where: file and name, for messages.
        dtype: of what `read` gives.
        read: the values in `dtype` and `shape`; each call reads the file again.
        format: of a quantized matrix that the file holds as npllama does: that of its `parts`.
        parts: what the file holds, where `read` makes the values of it: int8 and scales.
        place: where in a file the numbers lie; two names of one tensor share it.
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
        """Of the numbers in the file."""
        return self.parts[0].dtype if self.parts else self.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        if self.parts:
            return sum(part.nbytes for part in self.parts)
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


@dataclass
class Source:
    """A checkpoint of any format.

    Attributes:
        format: its name, for --inspect.
        config: the model's shape.
        tensors: Hugging Face name -> Tensor.
        tokenizer: tokenizer.model, tokenizer.json or tokenizer.bin beside the weights, if any.
        no_tokenizer: why the one beside the weights, or None, is not taken.
        hf_config, generation_config: the source's own files, kept where it has them.
        copied: further files that DEST gets as they are.
        notes: what a user should know of the choices that were made.
        stored_tie: a tied head that is stored beside the embedding all the same, and must be
            equal to it.
    """

    format: str
    config: LlamaConfig
    tensors: dict[str, Tensor]
    tokenizer: Path | None = None
    no_tokenizer: str = "no tokenizer was found beside the source"
    hf_config: dict = field(default_factory=dict)
    generation_config: dict = field(default_factory=dict)
    copied: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    stored_tie: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read_numbers(path: Path, dtype: np.dtype, count: int, offset: int, where: str) -> np.ndarray:
    """`count` numbers from byte `offset` of a file, in an array of their own.

    They are read rather than mapped: the pages of a map would count as this program's memory.

    Raises:
        WeightsError: the file cannot be read, or ends before.
    """
    try:
        values = np.empty(count, dtype=dtype)
        n_read = _read_into(values, path, offset)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from None
    except MemoryError:
        n_bytes = count * np.dtype(dtype).itemsize
        raise WeightsError(f"{where} has {n_bytes:,} bytes, more than the memory holds") from None
    if n_read != values.nbytes:
        raise WeightsError(f"{where} is truncated: get the file again")
    return values


def _read_into(values: np.ndarray, path: Path, offset: int) -> int:
    """Bytes that were read; not by np.fromfile, which takes an error of the disk for the end."""
    rest = memoryview(values.view("uint8"))
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while n := file.readinto(rest):
            rest = rest[n:]
    return values.nbytes - rest.nbytes


def file_tensor(
    path: Path, name: str, dtype: np.dtype, shape: tuple[int, ...], offset: int
) -> Tensor:
    """A tensor that lies in a file as it is, row after row."""
    where = f"{path}: tensor {name}"

    def read() -> np.ndarray:
        count = int(np.prod(shape, dtype=np.int64))
        return read_numbers(path, dtype, count, offset, where).reshape(shape)

    return Tensor(where, np.dtype(dtype), shape, read)


def concatenated(parts: list[Tensor], axis: int) -> Tensor:
    """The shards of one matrix side by side."""
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)

    def read() -> np.ndarray:
        whole = np.empty(shape, dtype=parts[0].dtype)
        begin = 0
        for part in parts:  # one shard's slice at a time
            end = begin + part.shape[axis]
            whole[(slice(None),) * axis + (slice(begin, end),)] = part.read()
            begin = end
        return whole

    return Tensor(parts[0].where, parts[0].dtype, tuple(shape), read)


def in_hf_row_order(w: Tensor, heads: int) -> Tensor:
    """Rows of wq or wk from Meta's order, where rotation pairs (2i, 2i+1), to Hugging Face's,
    where it pairs (i, i + C/2).

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
    """All tensors by their Hugging Face names, with every wq and wk in its row order."""
    turned = dict(tensors)
    for i in range(min(config.n_layers, len(tensors))):  # whatever the config claims
        for weight in OF_LAYER:
            name, heads = weight.hf_name(i), weight.heads(config)
            # of another shape it is refused
            if heads is not None and name in turned and len(turned[name].shape) == 2:
                turned[name] = in_hf_row_order(turned[name], heads)
    return turned


def grouped_int8(values: Tensor, scales: Tensor, group: int) -> Tensor:
    """int8 values with one scale for each `group` of the flattened tensor, as float32."""

    def read() -> np.ndarray:
        flat = values.read().reshape(-1, group)  # groups may straddle rows
        return dequantize(flat, scales.read()).reshape(values.shape)

    parts = (values, scales)
    return Tensor(values.where, np.dtype("float32"), values.shape, read, parts=parts)


def quantized(format_: Format, parts: tuple[Tensor, ...]) -> Tensor:
    """A matrix in a quantized format of npllama's, whose arrays are `parts`, as float32."""

    def read() -> np.ndarray:
        return format_.to_float(*(part.read() for part in parts))

    shape = format_.shape(parts[0].shape)
    return Tensor(parts[0].where, np.dtype("float32"), shape, read, format_, parts)
