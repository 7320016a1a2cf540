"""Matrix products on the CPU with weights in any format, tile by tile.

A tile is some consecutive rows of a matrix. BLAS has no products for 16-bit or 8-bit weights.
Widening a whole matrix to float32 would write it to memory and read it back. Instead, one tile at a
time is widened to float32 in a buffer that stays in the processor's cache, and BLAS multiplies by
this buffer.

Measurements: tools/README.md.
"""

import threading

import numpy as np

from npllama.parameters import Matrix

# Elements per tile. For smaller tiles the overhead of the interpreter is too high, and larger ones
# do not fit the cache.
TILE = 512 * 1024


def product(
    x: np.ndarray, w: Matrix, some: slice | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """y^T = W x^T, without the scale of W's rows.

    OpenBLAS computes W x^T faster than x W^T for any M. For M = 2 and float32 weights, two products
    with one row of x each are faster still.

    Args:
        x: (M, D) float32.
        w: (number of rows, D) in any format.
        some: the O rows of w to multiply by; None for all rows.
        out: (O, M) float32, the array for the result; None allocates it.

    Returns:
        (O, M) float32.
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
    """One tile buffer per thread, reused because newly allocated memory costs page faults."""

    tile = np.empty(0, dtype="float32")


_buffers = _Buffers()


def _buffer(size: int) -> np.ndarray:
    if _buffers.tile.size < size:
        _buffers.tile = np.empty(size, dtype="float32")
    return _buffers.tile[:size]
