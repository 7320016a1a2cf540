"""Device and pinned memory of the CuPy for tests: memory pools, and arrays in graphs."""

import functools
import math
import weakref
from collections import defaultdict

import numpy as np


class CUDARuntimeError(RuntimeError):
    """CuPy's exception of this name. The tests also raise it for errors that CUDA does not
    detect."""


def owner_of(array: np.ndarray) -> np.ndarray:
    """The array that owns the memory of a view."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def poison(array: np.ndarray) -> np.ndarray:
    """Fill new memory with bytes 0xFF, which are NaN, -1 or the largest unsigned integer."""
    array.reshape(-1).view("uint8")[:] = 0xFF
    return array


class Block(bytearray):
    """Memory of a private pool."""


class MemoryPool:
    """Allocates memory for arrays, and reuses it when an array is deleted.

    The memory lives as long as the pool. The default pool allocates nothing; it only counts the
    bytes of the arrays that are alive.
    """

    _ALIGNMENT = 512

    def __init__(self):
        self._free = defaultdict(list)  # size -> free blocks
        self._blocks = []
        self._counted = {}  # id of an array -> a weak reference; weakref.finalize is slow
        self._used = self._total = 0

    def malloc(self, size):
        """The allocator for `using_allocator`. Arrays are allocated by `empty`, so this is never
        called."""
        raise NotImplementedError("memory without an array")

    def empty(self, shape, dtype) -> np.ndarray:
        """An array in memory of this pool, filled with bytes 0xFF."""
        dtype = np.dtype(dtype)
        size = max(1, math.prod(shape) * dtype.itemsize)
        size = -(-size // self._ALIGNMENT) * self._ALIGNMENT
        if not self._free[size]:
            self._blocks.append(Block(size + self._ALIGNMENT))
            self._free[size].append(self._blocks[-1])
        block = self._free[size].pop()
        offset = -_address(block) % self._ALIGNMENT
        array = np.ndarray(shape, dtype, block, offset)
        self.count(array, size)
        weakref.finalize(array, _take_back, weakref.ref(self), size, block)
        return poison(array)

    def count(self, owner, size):
        """Count an array's bytes until it is deleted."""
        self._used += size
        self._total = max(self._total, self._used)
        key = id(owner)
        uncount = functools.partial(_uncount, weakref.ref(self), key, size)
        self._counted[key] = weakref.ref(owner, uncount)

    def used_bytes(self):
        return self._used

    def total_bytes(self):
        return self._total

    def free_bytes(self):
        return self._total - self._used

    def free_all_blocks(self):
        free = {id(block) for blocks in self._free.values() for block in blocks}
        self._blocks = [block for block in self._blocks if id(block) not in free]
        self._free.clear()
        self._total = self._used


# As in CuPy, an array does not keep its pool alive.


def _uncount(pool, key, size, _):
    pool = pool()
    if pool is not None:
        pool._counted.pop(key, None)
        pool._used -= size


def _take_back(pool, size, block):
    if pool() is not None:
        pool()._free[size].append(block)


class Held:
    """A reference to an array by its address, as in a graph. It does not keep the memory alive.

    Memory of a private pool is valid as long as the pool. Other memory returns to the default pool
    when its array is deleted, and may then be allocated again.
    """

    def __init__(self, array: np.ndarray):
        owner = owner_of(array)
        self._owner, self._block = weakref.ref(owner), lambda: None
        if isinstance(owner.base, Block):
            self._block = weakref.ref(owner.base)
            self._in_block = owner.ctypes.data - _address(owner.base)
        self._in_owner = array.ctypes.data - owner.ctypes.data
        self._shape, self._strides, self._dtype = array.shape, array.strides, array.dtype

    def array(self) -> np.ndarray:
        """The array at the address."""
        owner, block = self._owner(), self._block()
        if owner is not None:
            if owner.size == 0:
                return np.empty(self._shape, self._dtype)
            memory, offset = owner.ravel(order="K").view("uint8"), self._in_owner
        elif block is not None:
            memory, offset = block, self._in_block + self._in_owner
        else:
            raise CUDARuntimeError(
                f"the graph uses an array of {self._dtype.name}, shape {self._shape}, that was "
                "freed after its capture: it must live as long as the graph, or be of a private "
                "pool that does"
            )
        return np.ndarray(self._shape, self._dtype, memory, offset, self._strides)


def _address(block: Block) -> int:
    return np.frombuffer(block, "uint8").ctypes.data


class PinnedMemory(bytearray):
    """The result of `alloc_pinned_memory`: a buffer for np.frombuffer(memory, dtype, count)."""

    def __init__(self, n_bytes):
        super().__init__(-(-n_bytes // 512) * 512)  # CuPy also rounds the size up
        self[:] = b"\xff" * len(self)


def pinned_memory_of(array: np.ndarray) -> PinnedMemory | None:
    """The pinned memory that contains an array; None if its memory is not pinned."""
    base = owner_of(array).base
    memory = base.obj if isinstance(base, memoryview) else base
    return memory if isinstance(memory, PinnedMemory) else None
