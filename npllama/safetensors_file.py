"""One .safetensors file, memory-mapped.

The safetensors library reads and checks the header. The library's arrays are copies. This module
returns views of a memory map instead, which cost nothing until a page is read. The format leaves
no gaps, so each tensor begins where the previous one ends.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np

from npllama.errors import WeightsError
from npllama.not_a_model import content_instead
from npllama.shared_arrays import MappedFile

DTYPES = {
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I8": np.dtype("int8"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {np.dtype("int32"): "I32"}
_LENGTH_BYTES = 8  # the file starts with the length of its header
_LONGEST_REASON = 200  # the library's message may list every dtype of the format


@dataclass(frozen=True)
class TensorInfo:
    """Location of one tensor: dtype, shape, and its byte range in the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """The tensors of one file by name, as read-only views of its memory map.

    Args:
        dtypes: the dtypes that are accepted, by their names in the format.
        is_ignored: whether to leave out the tensor with a given name. A tensor that is left out
            may have any dtype.
        remedy: what to do about a damaged file, at the end of its message.

    Attributes:
        tensors: the position of each tensor.
        metadata: the texts of the header's __metadata__.

    Raises:
        WeightsError: the file is missing or truncated, or its header does not match its contents.
    """

    def __init__(
        self,
        path: Path,
        dtypes: Mapping[str, np.dtype] = DTYPES,
        is_ignored: Callable[[str], bool] = lambda name: False,
        remedy: str = "get the file again",
    ) -> None:
        self.path = Path(path)
        self._dtypes = dtypes
        self._remedy = remedy
        self.metadata: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            with open(self.path, "rb") as file:
                self._size = file.seek(0, 2)
                layout = self._layout()
                self._map = MappedFile(file)
        except OSError as error:
            raise WeightsError(f"{self.path} cannot be read: {error.strerror or error}") from None
        begin = _LENGTH_BYTES + int.from_bytes(self._map[:_LENGTH_BYTES], "little")
        for name, dtype, shape in layout:
            end = begin + _nbytes(dtype, shape)
            if not is_ignored(name):
                self.tensors[name] = self._info(name, dtype, shape, begin, end)
            begin = end
        if begin != self._size:
            raise self._damaged(f"its tensors end at byte {begin}")

    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor called `name`: a view of the file, in the stored dtype."""
        return self._view(self.tensors[name])

    def _view(self, info: TensorInfo) -> np.ndarray:
        count = prod(info.shape)
        return np.frombuffer(self._map, info.dtype, count, info.begin).reshape(info.shape)

    def _layout(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of every tensor, in the order of their data; sets `metadata`."""
        from safetensors import SafetensorError, safe_open  # here, so that --help starts fast

        try:
            with safe_open(self.path, framework="np") as file:
                self.metadata = dict(file.metadata() or {})
                slices = {name: file.get_slice(name) for name in file.offset_keys()}
                return [(n, s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()]
        except SafetensorError as error:
            raise self._damaged(str(error).removeprefix("Error while deserializing ")) from None

    def _info(
        self, name: str, dtype: str, shape: tuple[int, ...], begin: int, end: int
    ) -> TensorInfo:
        if dtype not in self._dtypes:
            raise WeightsError(
                f"{self.path}: tensor {name} is stored as {dtype}: "
                f"expected one of {', '.join(self._dtypes)}"
            )
        info = TensorInfo(self._dtypes[dtype], shape, begin, end)
        try:
            self._view(info)
        except (ValueError, OverflowError):  # too many axes, or one of 2^63 next to one of 0
            raise self._damaged(f"no array can have the shape of tensor {name}") from None
        return info

    def _damaged(self, what: str) -> WeightsError:
        if (instead := content_instead(self.path)) is not None:
            return WeightsError(f"{self.path} {instead}")
        return WeightsError(
            f"{self.path} is damaged or truncated (it has {self._size} bytes; "
            f"{what[:_LONGEST_REASON]}): {self._remedy}"
        )


def header_of(
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """The bytes of a file before its data: dtype and shape of each tensor, whose data follow in
    the order of `tensors`, without gaps.

    The data begin at a multiple of 8. Each tensor begins at a multiple of its item size if
    wider dtypes come first.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + dtype.itemsize * prod(shape)
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor. The format's name of a dtype contains its bits: 8 in F8_E4M3."""
    bits = re.search(r"\d+", dtype)
    return prod(shape) * (8 if bits is None else int(bits[0])) // 8  # BOOL names no bits
