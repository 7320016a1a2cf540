"""Writing a Hugging Face directory: safetensors a tensor at a time, whole or not at all.

The safetensors library sorts tensors by name and wants them all at once. Here they are written
one by one, and within a layer q, k, v are neighbours in the file, and gate and up, so that the
CPU can view each group as one matrix. (A group of two dtypes, which no known checkpoint has and
no --dtype makes, is separated: wider ones come first in a file.)
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
    """A tensor to be written: name, dtype, shape."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Shard:
    """One file: its name, its header, and where in it each tensor begins."""

    file: str
    header: bytes
    offsets: dict[str, int]
    nbytes: int


def plan(entries: Iterable[Entry], max_shard_size: int) -> list[Shard]:
    """Divide tensors into files of at most `max_shard_size` bytes, but at least one group each."""
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
    """Whether a tensor stays in the file of the one before it: a scale does, and all but the
    first of the matrices that are joined."""
    found = find_hf(name)
    return found is None or found[0].follows


def _shard(file: str, entries: list[Entry]) -> Shard:
    # wider dtypes first: every tensor then begins at a multiple of its item size
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    # transformers asks for the metadata
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
    """Write each (name, values) at its place; one file is open at a time.

    Args:
        tensors: those of the first shard, then those of the next; in any order within one.
        written: called with the bytes of each tensor once it is in its file.
    """
    tensors = iter(tensors)
    for shard in shards:
        with open(directory / shard.file, "wb") as file:
            file.write(shard.header)
            for name, values in islice(tensors, len(shard.offsets)):
                file.seek(shard.offsets[name])
                # not tofile, which forgets why it failed, such as for a full disk
                file.write(np.ascontiguousarray(values).reshape(-1).view("uint8"))
                written(values.nbytes)
                del values  # before the next is read


def index_files(shards: list[Shard]) -> dict[str, bytes]:
    """The index, by its file name, where there is more than one shard."""
    if len(shards) == 1:
        return {}
    total = sum(shard.nbytes - len(shard.header) for shard in shards)
    weight_map = {name: shard.file for shard in shards for name in shard.offsets}
    return {INDEX: to_json({"metadata": {"total_size": total}, "weight_map": weight_map})}


def to_json(value: object) -> bytes:
    """JSON that a person can read."""
    return (json.dumps(value, indent=2) + "\n").encode()
