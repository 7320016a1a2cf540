"""Products with a matrix in its storage dtype, on the CPU: tile by tile through the cache.

NumPy has no BLAS for 16-bit or 8-bit types. Widening such a matrix whole would write and read it
once more at full width; a tile is widened into a buffer that stays in the processor's cache, and
multiplied from there.
"""

import threading

import numpy as np

# Numbers that are widened at a time. Measured on two cores: smaller tiles drown in the
# interpreter's overhead, larger ones fall out of the cache.
TILE = 512 * 1024


def product(x: np.ndarray, w: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """y = x W^T: x (M, D) float32, W (N, D) in any storage dtype -> (M, N) float32.

    Args:
        out: (N, M), where y^T is written; y is then a view of it.
    """
    n_rows, width = x.shape
    n_out = len(w)
    if w.dtype == np.float32:
        return _product(x, w)
    y = np.empty((n_out, n_rows), dtype="float32") if out is None else out
    rows = max(1, TILE // width)
    tiles = _buffer(rows * width).reshape(rows, width)
    x_t, exponent = x.T, 0
    if w.dtype == np.float16:
        x_t, exponent = np.ldexp(x_t, _X_EXPONENT), _Y_EXPONENT
    for begin in range(0, n_out, rows):
        narrow = w[begin : begin + rows]  # (rows, D)
        tile = tiles[: len(narrow)]
        widen(narrow, tile)
        np.dot(tile, x_t, out=y[begin : begin + rows])  # (rows, D) @ (D, M) -> (rows, M)
    if exponent:
        np.ldexp(y, exponent, out=y)
    return y.T  # (N, M) -> (M, N)


class _Buffers(threading.local):
    """A tile's memory for each thread, kept: fresh memory costs a page fault every 4 KB."""

    tile = np.empty(0, dtype="float32")


_buffers = _Buffers()


def _buffer(size: int) -> np.ndarray:
    if _buffers.tile.size < size:
        _buffers.tile = np.empty(size, dtype="float32")
    return _buffers.tile[:size]


# float16 has 5 bits of exponent and a bias of 15, float32 8 and 127. With its exponent's bits in
# float32's place, a float16 reads as 2^-112 of itself, subnormal numbers included; the factor is
# made good partly in x and partly in y, so that no product leaves float32's range.
_X_EXPONENT, _Y_EXPONENT = 48, 64
_SIGN_EXPONENT_FRACTION = np.uint32(0x8FFFE000)


def widen(narrow: np.ndarray, tile: np.ndarray) -> None:
    """Write narrow (rows, D) to tile (rows, D) float32; float16 as 2^-112 of itself.

    NumPy converts float16 number by number (0.4 G a second and core); three integer operations
    over a tile in the cache, which it has vector code for, are five times as fast. Infinity and
    NaN, which no weight is, read as 2^16 and above.
    """
    if narrow.dtype != np.float16:
        np.copyto(tile, narrow, casting="unsafe")
        return
    bits = tile.view("int32")
    np.copyto(bits, narrow.view("int16"))  # the sign fills the upper half
    np.left_shift(bits, 13, out=bits)
    bits = tile.view("uint32")
    np.bitwise_and(bits, _SIGN_EXPONENT_FRACTION, out=bits)


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
