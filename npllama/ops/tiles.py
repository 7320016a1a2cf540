"""Products with a matrix in its format, on the CPU: tile by tile through the cache.

NumPy has no BLAS for 16-bit or 8-bit types. Widening such a matrix whole would write and read it
once more at full width; a tile is widened into a buffer that stays in the processor's cache, and
multiplied from there.
"""

import threading

import numpy as np

from npllama.parameters import Matrix

# Numbers that are widened at a time. Measured at 1.1B on two cores of a Zen 3: 128 K and 256 K are
# 0.84 to 0.98 times as fast, drowning in the interpreter's overhead; larger tiles fall out of the
# cache.
TILE = 512 * 1024


def product(
    x: np.ndarray, w: Matrix, some: slice | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """y^T = W x^T, up to the factors a row: x (M, D) float32, W (O, D) in any format -> (O, M)
    float32, in `out` where that is given.

    Args:
        some: rows of W to compute with, O in number; None for all.

    In this order of operands OpenBLAS was faster than in the other for any M; for M = 2 it takes
    2.5 times as long as for two products of one row (4096 x 4096, two cores).
    """
    begin, end = (0, w.shape[0]) if some is None else (some.start, some.stop)
    out = np.empty((end - begin, len(x)), dtype="float32") if out is None else out
    if w.format.is_wide:
        values = w.values[begin:end]
        if len(x) == 2:
            out[:, 0], out[:, 1] = values @ x[0], values @ x[1]
        else:
            np.dot(values, x.T, out=out)  # (O, D) @ (D, M) -> (O, M)
        return out
    format_, width = w.format, x.shape[1]
    rows = max(1, TILE // width // 16 * 16)
    tiles = _buffer(rows * width).reshape(rows, width)
    x_t = x.T
    if format_.x_exponent:
        x_t = np.ldexp(x_t, format_.x_exponent)
    for first in range(begin, end, rows):
        last = min(first + rows, end)
        tile = tiles[: last - first]
        format_.widen(w, slice(first, last), tile)
        np.dot(tile, x_t, out=out[first - begin : last - begin])  # (rows, D) @ (D, M)
    if format_.y_exponent:
        np.ldexp(out, format_.y_exponent, out=out)
    return out


class _Buffers(threading.local):
    """A tile's memory for each thread, kept: fresh memory costs a page fault every 4 KB."""

    tile = np.empty(0, dtype="float32")


_buffers = _Buffers()


def _buffer(size: int) -> np.ndarray:
    if _buffers.tile.size < size:
        _buffers.tile = np.empty(size, dtype="float32")
    return _buffers.tile[:size]
