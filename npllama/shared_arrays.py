"""Arrays whose memory other processes can map: parts of files, and shared memory.

Shared memory here is an anonymous file (Linux: memfd). The kernel frees it when the last process
that holds it ends, even if that process crashes.

Measurements: tools/README.md.
"""

import contextlib
import mmap
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import BinaryIO

import ml_dtypes
import numpy as np

_HUGE = 2 * 1024 * 1024
_MADV_COLLAPSE = 25
_ALIGNMENT = 64


def _duplicate(fd: int) -> int:
    """Duplicate a descriptor to a number above 2. Numbers 0 to 2 may be free in this process, but
    in a child they are its standard streams."""
    low = []
    while (new := os.dup(fd)) <= 2:
        low.append(new)
    for each in low:
        os.close(each)
    return new


class MappedFile(mmap.mmap):
    """A read-only memory map of a file. A process that inherits the descriptor can map the same
    file by `path`, even if the file has been renamed or replaced since.

    Attributes:
        path: /dev/fd/N.
        offset: 0, the byte of the file at which the map begins.
    """

    path: str
    offset = 0

    def __new__(cls, file: BinaryIO) -> "MappedFile":
        made = super().__new__(cls, file.fileno(), 0, access=mmap.ACCESS_READ)
        fd = _duplicate(file.fileno())
        weakref.finalize(made, os.close, fd)
        made.path = f"/dev/fd/{fd}"
        return made


class SharedMemory(mmap.mmap):
    """Memory in an anonymous file. A process that inherits the descriptor can map it by `path`.

    Attributes:
        path: /dev/fd/N.
        offset: the byte of the file at which this map begins.
    """

    path: str
    offset: int

    @classmethod
    def create(cls, n_bytes: int) -> "SharedMemory":
        """Create writable memory with at least `n_bytes` after byte _HUGE of the file."""
        first = os.memfd_create("npllama")
        fd = _duplicate(first)
        os.close(first)
        os.ftruncate(fd, (-(-n_bytes // _HUGE) + 2) * _HUGE)
        made = cls.of(f"/dev/fd/{fd}", writable=True)
        weakref.finalize(made, os.close, fd)
        return made

    @classmethod
    def of(cls, path: str, writable: bool) -> "SharedMemory":
        """Map the memory at `path` so that huge pages can back it: the address must equal the
        file offset modulo the huge page size."""
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        offset = 0
        with open(path, "r+b" if writable else "rb") as file:
            size = os.fstat(file.fileno()).st_size - _HUGE
            for _ in range(4):  # the kernel usually chooses the same address again
                made = cls(file.fileno(), size, access=access, offset=offset)
                remainder = _address(made) % _HUGE
                if remainder == offset:
                    break
                made.close()
                offset = remainder
            else:
                made = cls(file.fileno(), size, access=access, offset=offset)
        made.path, made.offset = path, offset
        return made


@dataclass(frozen=True)
class Location:
    """The location of an array: all that another process needs to map it, apart from the
    descriptor that `path` names. `is_file` distinguishes a file from shared memory."""

    path: str
    is_file: bool
    offset: int
    shape: tuple[int, ...]
    dtype: str


def can_share() -> bool:
    """Whether this system has shared memory that other processes can map by path."""
    return hasattr(os, "memfd_create") and os.path.isdir("/dev/fd")


def location_of(array: np.ndarray) -> Location | None:
    """The location of a C-contiguous array in a file or in shared memory; None if in neither."""
    memory = memory_of(array)
    if not isinstance(memory, MappedFile | SharedMemory) or not array.flags.c_contiguous:
        return None
    offset = array.ctypes.data - _address(memory) + memory.offset
    is_file = isinstance(memory, MappedFile)
    return Location(memory.path, is_file, offset, array.shape, array.dtype.name)


def memory_of(array: np.ndarray) -> object:
    """The object that owns an array's memory: a memory map, or the array at the end of the chain
    of bases."""
    owner: object = array
    while isinstance(owner, np.ndarray | memoryview):
        inner = owner.base if isinstance(owner, np.ndarray) else owner.obj
        if inner is None:
            break
        owner = inner
    return owner


class Mapped:
    """Maps arrays by the locations that another process sent. Each file is mapped once."""

    def __init__(self) -> None:
        self._memories: dict[str, MappedFile | SharedMemory] = {}

    def array(self, location: Location, writable: bool = False) -> np.ndarray:
        """The array at `location`: a view of memory that other processes map too.

        Args:
            writable: map the shared memory writable. This holds for all arrays at that path.
        """
        if location.path not in self._memories:
            if location.is_file:
                with open(location.path, "rb") as file:
                    self._memories[location.path] = MappedFile(file)
            else:
                self._memories[location.path] = made = SharedMemory.of(location.path, writable)
                _make_huge(made)
        memory = self._memories[location.path]
        dtype = np.dtype(ml_dtypes.bfloat16) if location.dtype == "bfloat16" else location.dtype
        flat = np.frombuffer(memory, dtype, prod(location.shape), location.offset - memory.offset)
        return flat.reshape(location.shape)


def share(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Copy each array to shared memory."""
    return share_joined([[array] for array in arrays])


def share_joined(groups: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Copy each group of arrays (O_i, D) with one dtype to one array (sum O_i, D) in shared
    memory."""
    offsets, size = [], 0
    for group in groups:
        size = -(-size // _ALIGNMENT) * _ALIGNMENT
        offsets.append(size)
        size += sum(array.nbytes for array in group)
    memory = empty_shared(size, "uint8")
    shared = []
    for group, offset in zip(groups, offsets, strict=True):
        n_bytes = sum(array.nbytes for array in group)
        copy = memory[offset : offset + n_bytes].view(group[0].dtype)
        copy = copy.reshape(-1, *group[0].shape[1:])
        np.concatenate(group, out=copy)
        shared.append(copy)
    _make_huge(memory_of(memory))
    return shared


def empty_shared(size: int, dtype: str) -> np.ndarray:
    """(size,) zeros in shared memory. Pages take up memory once they are written."""
    memory = SharedMemory.create(size * np.dtype(dtype).itemsize)
    return np.frombuffer(memory, dtype, size, _HUGE - memory.offset)


def neighbours(arrays: Sequence[np.ndarray]) -> np.ndarray | None:
    """A view (sum O_i, D) of matrices (O_i, D) that are contiguous in memory in this order; None
    if they are not."""
    first = arrays[0]
    end = first.ctypes.data
    memory = memory_of(first)
    for array in arrays:
        if (
            array.ctypes.data != end
            or array.dtype != first.dtype
            or array.shape[1:] != first.shape[1:]
            or not array.flags.c_contiguous
            or memory_of(array) is not memory
        ):  # separately allocated arrays may be adjacent by chance
            return None
        end += array.nbytes
    shape = (sum(len(array) for array in arrays), *first.shape[1:])
    if isinstance(memory, mmap.mmap):
        offset = first.ctypes.data - _address(memory)
        return np.frombuffer(memory, first.dtype, prod(shape), offset).reshape(shape)
    if not isinstance(memory, np.ndarray) or memory.dtype != first.dtype:
        return None
    if not memory.flags.c_contiguous:
        return None
    flat = memory.reshape(-1)  # the base array of all views
    begin = (first.ctypes.data - flat.ctypes.data) // first.itemsize
    return flat[begin : begin + prod(shape)].reshape(shape)


def _address(memory: mmap.mmap) -> int:
    return np.frombuffer(memory, dtype="uint8").ctypes.data


def _make_huge(memory: mmap.mmap) -> None:
    """Ask the kernel for 2 MB pages, from which shared memory is read faster. A kernel without
    them ignores the request."""
    with contextlib.suppress(OSError, ValueError):
        memory.madvise(_MADV_COLLAPSE)
