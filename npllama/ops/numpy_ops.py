"""What NumPy does better than the reference: fewer bytes moved, no large temporaries."""

import math

import numpy as np

from npllama.backend import Array
from npllama.ops.blocks import Ops
from npllama.parameters import Matrix

# Numbers of a narrow matrix that are widened at a time. Measured on two cores: smaller tiles
# drown in interpreter overhead, larger ones fall out of the cache (best: 128 K to 256 K).
TILE = 256 * 1024


class NumpyOps(Ops):
    """Overrides for the CPU; each computes what the method of the same name in Ops does."""

    def linear(self, x: Array, w: Matrix) -> Array:
        """y = x W^T; a narrow W is widened tile by tile, and the tile is used from the cache.

        NumPy has no BLAS for 16-bit or 8-bit types, and widening W whole would write and read
        it once more at full width.
        """
        if x.dtype != np.float32:
            return super().linear(x, w)
        n_out, width = w.shape
        flat = x.reshape(-1, width)  # (..., D) -> (M, D)
        if w.values.dtype == np.float32:
            y = _product(flat, w.values)
        else:
            y = np.empty((flat.shape[0], n_out), dtype="float32")
            rows = max(1, TILE // width)
            tiles = np.empty((min(rows, n_out), width), dtype="float32")
            for begin in range(0, n_out, rows):
                narrow = w.values[begin : begin + rows]  # (rows, D)
                tile = tiles[: narrow.shape[0]]
                np.copyto(tile, narrow, casting="unsafe")
                y[:, begin : begin + rows] = _product(flat, tile)
        if w.scale is not None:
            y *= w.scale
        return y.reshape(*x.shape[:-1], n_out)  # (M, N) -> (..., N)

    def scratch_size(self, n_heads: int, n_kv_heads: int, chunk: int, context: int) -> int:
        """Scores of one key head's queries over a chunk, or of all heads for one token."""
        return max(n_heads, n_heads // n_kv_heads * chunk) * context

    def attention_nbytes(
        self, n_heads: int, n_kv_heads: int, head_dim: int, chunk: int, context: int
    ) -> int:
        """The scratch, and queries and outputs of one chunk."""
        scores = self.scratch_size(n_heads, n_kv_heads, chunk, context)
        return 4 * (scores + 3 * n_heads * chunk * head_dim)

    def attention(self, q: Array, k: Array, v: Array, scratch: Array | None = None) -> Array:
        """softmax(q k^T / sqrt(C) + mask) v, in place in `scratch`, as many heads at a time as
        it has room for; the reference would allocate four arrays of all scores.
        """
        if scratch is None or q.dtype != np.float32 or k.dtype != np.float32:
            return super().attention(q, k, v)
        n_heads, n_new, head_dim = q.shape
        n_kv_heads, n_keys, _ = k.shape
        queries = n_heads // n_kv_heads * n_new  # G*T
        grouped = q.reshape(n_kv_heads, queries, head_dim)  # (H, T, C) -> (K, G*T, C)
        grouped = grouped * np.float32(1 / math.sqrt(head_dim))
        o = np.empty_like(grouped)
        at_once = max(1, min(n_kv_heads, scratch.size // (queries * n_keys)))
        if scratch.size < queries * n_keys:
            scratch = np.empty(queries * n_keys, dtype="float32")
        hidden = np.triu(np.ones((n_new, n_new), dtype=bool), k=1) if n_new > 1 else None
        for begin in range(0, n_kv_heads, at_once):
            some = slice(begin, min(begin + at_once, n_kv_heads))
            n = some.stop - some.start
            scores = scratch[: n * queries * n_keys].reshape(n, queries, n_keys)
            np.matmul(grouped[some], k[some].swapaxes(1, 2), out=scores)
            if hidden is not None:  # only the T x T corner of new keys has anything to hide
                corner = scores.reshape(n, -1, n_new, n_keys)[..., n_keys - n_new :]
                np.copyto(corner, np.float32(-np.inf), where=hidden)
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            total = scores.sum(axis=-1, keepdims=True)
            np.matmul(scores, v[some], out=o[some])  # (n, G*T, N) @ (n, N, C) -> (n, G*T, C)
            o[some] /= total
        return o.reshape(q.shape)  # (K, G*T, C) -> (H, T, C)


def _product(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x (M, D) W^T (D, N), in the order of operands that BLAS is fastest at.

    Measured at 4096 x 4096 on two cores: OpenBLAS takes 2.5 times as long for x W^T with two
    rows as for two products of one row, and W x^T beats x W^T by a third from 3 rows to about 16.
    """
    if x.shape[0] == 2:
        return np.stack([w @ row for row in x])
    if 3 <= x.shape[0] <= 16:
        return (w @ x.T).T  # (N, D) @ (D, M) -> (N, M) -> (M, N)
    return x @ w.T
