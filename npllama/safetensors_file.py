"""One .safetensors file, memory-mapped: 8 bytes of length, a JSON header, the tensors.

The safetensors library gives arrays but no offsets, and its NumPy arrays are copies; views of
a memory map cost nothing until a page is read. The tests hold this reader to the library.
Format: https://huggingface.co/docs/safetensors (section "Format").
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from npllama.errors import WeightsError
from npllama.not_a_model import content_instead
from npllama.shared_arrays import MappedFile
from npllama.small_file import MAX_JSON, parse_json

DTYPES = {
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I8": np.dtype("int8"),
}
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: dtype, shape, and its byte range in the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """The tensors of one file by name, as read-only views of its memory map.

    Args:
        dtypes: those that are read, by the format's names for them.

    Raises:
        WeightsError: the file is missing, truncated, or its header does not describe it.
    """

    def __init__(self, path: Path, dtypes: Mapping[str, np.dtype] = DTYPES) -> None:
        self.path = Path(path)
        self._dtypes = dtypes
        try:
            with open(self.path, "rb") as file:
                size = file.seek(0, 2)
                if size < _LENGTH_BYTES:
                    raise self._damaged(f"it has {size} bytes")
                self._map = MappedFile(file)
        except OSError as error:
            raise WeightsError(f"{self.path} cannot be read: {error.strerror}") from None
        length = int.from_bytes(self._map[:_LENGTH_BYTES], "little")
        data_begin = _LENGTH_BYTES + length
        if length > MAX_JSON or data_begin > size:
            raise self._damaged(f"its header claims {length} bytes and the file has {size}")
        self.tensors = self._parse(self._map[_LENGTH_BYTES:data_begin], data_begin)
        for name, info in sorted(self.tensors.items(), key=lambda item: item[1].end):
            if info.end > size:
                raise self._damaged(
                    f"tensor {name} of shape {list(info.shape)} ends at byte {info.end} and the "
                    f"file at {size}"
                )
        data_end = max((info.end for info in self.tensors.values()), default=data_begin)
        if data_end != size:
            raise self._damaged(f"its tensors end at byte {data_end} and the file at {size}")

    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor called `name`, a view of the file in its stored dtype."""
        info = self.tensors[name]
        count = int(np.prod(info.shape, dtype=np.int64))
        flat = np.frombuffer(self._map, dtype=info.dtype, count=count, offset=info.begin)
        return flat.reshape(info.shape)

    def _parse(self, header: bytes, data_begin: int) -> dict[str, TensorInfo]:
        try:
            entries = parse_json(header)
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"its header is not JSON ({str(error)[:200]})") from None
        if not isinstance(entries, dict):
            raise self._damaged("its header is not a JSON object")
        entries.pop("__metadata__", None)
        tensors = {name: self._info(name, entry, data_begin) for name, entry in entries.items()}
        reached = data_begin
        for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
            if info.begin != reached:
                raise self._damaged(f"tensor {name} does not begin where the one before it ends")
            reached = info.end
        return tensors

    def _info(self, name: str, entry: object, data_begin: int) -> TensorInfo:
        try:
            dtype_name = entry["dtype"]  # type: ignore[index]
            shape = tuple(entry["shape"])  # type: ignore[index]
            begin, end = entry["data_offsets"]  # type: ignore[index]
            if not isinstance(entry["shape"], list) or not isinstance(dtype_name, str):
                raise TypeError
            if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)):
                raise TypeError
            if len(shape) > 64 or 8 * math.prod(max(n, 1) for n in shape) >= 2**63:
                raise TypeError  # NumPy cannot, even where one of them is 0
        except (TypeError, KeyError, ValueError):
            raise self._damaged(f"the header's entry for tensor {name} is malformed") from None
        if dtype_name not in self._dtypes:
            raise WeightsError(
                f"{self.path}: tensor {name} is stored as {dtype_name}: "
                f"expected one of {', '.join(self._dtypes)}"
            )
        dtype = self._dtypes[dtype_name]
        n_bytes = dtype.itemsize
        for n in shape:
            n_bytes *= n
        if end - begin != n_bytes:
            raise self._damaged(
                f"tensor {name} of shape {list(shape)} in {dtype_name} needs {n_bytes} bytes "
                f"and has {end - begin}"
            )
        return TensorInfo(dtype, shape, data_begin + begin, data_begin + end)

    def _damaged(self, what: str) -> WeightsError:
        if (instead := content_instead(self.path)) is not None:
            return WeightsError(f"{self.path} {instead}")
        return WeightsError(f"{self.path} is damaged or truncated ({what}): get the file again")
