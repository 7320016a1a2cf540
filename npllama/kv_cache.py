"""The KV cache: keys and values of all past positions, in buffers allocated once.

Generation reads every past key and value at each step and computes only the new ones. Buffers
have room for the whole context from the start and are written in place ever after.
"""

from dataclasses import dataclass

import numpy as np

from npllama.backend import Array, Backend
from npllama.errors import InputError


@dataclass(frozen=True)
class Positions:
    """Where the T new tokens of each of B rows stand.

    The same positions twice: host integers, which NumPy slices by, and device integers, the
    only ones a captured GPU step may read.

    Attributes:
        rows: B rows of the cache.
        starts: S of each row, host integers: its first new token's position.
        device_starts: (B,) int32, the same on the device.
        n_new: T.
        cos, sin: (B, T, C/2), the rotation of each new token.
    """

    rows: tuple[int, ...]
    starts: tuple[int, ...]
    device_starts: Array
    n_new: int
    cos: Array
    sin: Array


@dataclass(frozen=True)
class LayerCache:
    """One layer's part of the cache: k and v (B, K, context, C), and the shared scratch."""

    k: Array
    v: Array
    scratch: Array | None = None

    def write(self, k: Array, v: Array, positions: Positions) -> None:
        """Put k and v (B, T, K, C) at their rows' positions S .. S+T-1, in place."""
        for b, (row, start) in enumerate(zip(positions.rows, positions.starts, strict=True)):
            new = slice(start, start + positions.n_new)
            self.k[row, :, new] = k[b].swapaxes(0, 1)  # (T, K, C) -> (K, T, C)
            self.v[row, :, new] = v[b].swapaxes(0, 1)


class KVCache:
    """Keys and values of `batch` rows, each with room for `context` positions.

    Memory: 2 * L * B * K * context * C numbers of `dtype`, and `scratch_size` float32.
    Rows are ragged: each has a length of its own, and nothing is padded.

    Attributes:
        layers: a LayerCache for each layer.
        lengths: positions filled in each row (host integers).
        device_lengths: (batch,) int32, the same on the device.
    """

    def __init__(
        self,
        backend: Backend,
        rope_table: tuple[Array, Array],
        *,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        batch: int,
        context: int,
        dtype: np.dtype | str,
        scratch_size: int = 0,
    ) -> None:
        xp = backend.xp
        self.backend = backend
        self.rope_table = rope_table
        self.context = context
        shape = (n_layers, batch, n_kv_heads, context, head_dim)
        scratch = xp.empty(scratch_size, dtype="float32") if scratch_size else None
        k, v = xp.zeros(shape, dtype=dtype), xp.zeros(shape, dtype=dtype)
        self.layers = tuple(LayerCache(k[i], v[i], scratch) for i in range(n_layers))
        self.lengths = [0] * batch
        self.device_lengths = xp.zeros(batch, dtype="int32")
        self._new = xp.arange(context, dtype="int32")
        self._all = xp.arange(batch, dtype="int32")

    @staticmethod
    def nbytes(
        n_layers: int, n_kv_heads: int, head_dim: int, batch: int, context: int, itemsize: int
    ) -> int:
        """Bytes of the keys and values that such a cache holds, without its scratch."""
        return 2 * n_layers * batch * n_kv_heads * context * head_dim * itemsize

    def positions(self, n_new: int, rows: tuple[int, ...] | None = None) -> Positions:
        """The places of the next `n_new` tokens of `rows` (default: all).

        Raises:
            InputError: they do not fit; the cache is as it was.
        """
        all_rows = tuple(range(len(self.lengths)))
        rows = all_rows if rows is None else tuple(rows)
        starts = tuple(self.lengths[row] for row in rows)
        if max(starts) + n_new > self.context:
            raise InputError(
                f"{max(starts)} positions are filled and {n_new} more do not fit: "
                f"the cache has room for {self.context}"
            )
        index = self._all if rows == all_rows else self._index(rows)
        device_starts = self.device_lengths[index]  # (batch,) -> (B,), a copy
        place = device_starts[:, None] + self._new[:n_new]  # (B, 1) + (T,) -> (B, T)
        cos, sin = (table[place] for table in self.rope_table)  # (context, C/2) -> (B, T, C/2)
        return Positions(rows, starts, device_starts, n_new, cos, sin)

    def advance(self, positions: Positions) -> None:
        """Count the new tokens of `positions` as filled."""
        for row in positions.rows:
            self.lengths[row] += positions.n_new
        if len(positions.rows) == len(self.lengths):
            self.device_lengths += positions.n_new
        else:
            self.device_lengths[self._index(positions.rows)] += positions.n_new

    def _index(self, rows: tuple[int, ...]) -> Array:
        return self.backend.to_device(np.asarray(rows, dtype="int32"))
