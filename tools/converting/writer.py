"""Writes safetensors files, one tensor at a time, and the index of several.

The safetensors library sorts tensors by name, and needs all of them in memory at once. This module
writes them one by one. Within a layer it writes q, k and v contiguously, and likewise gate and up,
so that the CPU can view each group as one matrix. (A group with two dtypes is not contiguous,
because wider dtypes come first in a file. No known checkpoint has such a group, and --dtype makes
none.)
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path

import numpy as np

from npllama.safetensors_file import header_of
from npllama.weight_table import find_hf
from npllama.weights import INDEX, SINGLE


@dataclass(frozen=True)
class Entry:
    """A tensor to write: name, dtype, shape."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Shard:
    """One file: name, header, and the position of each tensor."""

    file: str
    header: bytes
    offsets: dict[str, int]
    nbytes: int


def plan(entries: Iterable[Entry], max_shard_size: int) -> list[Shard]:
    """Distribute tensors over files of at most `max_shard_size` bytes. Joined matrices stay in
    one file, even if that exceeds the size."""
    groups: list[list[Entry]] = []
    for entry in entries:
        if groups and _belongs_to_the_one_before(entry.name):
            groups[-1].append(entry)
        else:
            groups.append([entry])
    files: list[list[Entry]] = [[]]
    filled = 0
    for group in groups:
        n = sum(entry.nbytes for entry in group)
        if filled and filled + n > max_shard_size:
            files.append([])
            filled = 0
        files[-1] += group
        filled += n
    if len(files) == 1:
        return [_shard(SINGLE, files[0])]
    return [
        _shard(f"model-{i:05}-of-{len(files):05}.safetensors", file)
        for i, file in enumerate(files, start=1)
    ]


def _belongs_to_the_one_before(name: str) -> bool:
    """Whether a tensor must be in the same file as the previous one: a scale, or a joined matrix
    other than the first of its group."""
    found = find_hf(name)
    return found is None or found[0].follows


def _shard(file: str, entries: list[Entry]) -> Shard:
    # wider dtypes first, so that every tensor is aligned to its item size
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    # transformers requires the metadata
    header = header_of({e.name: (e.dtype, e.shape) for e in entries}, {"format": "pt"})
    *begins, end = accumulate((entry.nbytes for entry in entries), initial=len(header))
    offsets = {entry.name: begin for entry, begin in zip(entries, begins, strict=True)}
    return Shard(file, header, offsets, end)


def write_shards(
    directory: Path,
    shards: list[Shard],
    tensors: Iterable[tuple[str, np.ndarray]],
    written: Callable[[int], object],
) -> None:
    """Write each (name, values) to its place. Only one file is open at a time.

    Args:
        tensors: those of the first shard, then those of the next, in any order within a shard.
        written: called with the number of bytes after each tensor.
    """
    tensors = iter(tensors)
    for shard in shards:
        with open(directory / shard.file, "wb") as file:
            file.write(shard.header)
            for name, values in islice(tensors, len(shard.offsets)):
                file.seek(shard.offsets[name])
                # tofile would not report the reason of a failure, such as a full disk
                file.write(np.ascontiguousarray(values).reshape(-1).view("uint8"))
                written(values.nbytes)
                del values  # frees the array before the next one is read


def index_files(shards: list[Shard]) -> dict[str, bytes]:
    """The index file by its name; empty if there is only one shard."""
    if len(shards) == 1:
        return {}
    total = sum(shard.nbytes - len(shard.header) for shard in shards)
    weight_map = {name: shard.file for shard in shards for name in shard.offsets}
    return {INDEX: to_json({"metadata": {"total_size": total}, "weight_map": weight_map})}


def to_json(value: object) -> bytes:
    """Indented JSON."""
    return (json.dumps(value, indent=2) + "\n").encode()
