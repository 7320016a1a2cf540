"""Products with a matrix in its storage dtype, on the CPU: tile by tile through the cache.

NumPy has no BLAS for 16-bit or 8-bit types. Widening such a matrix whole would write and read it
once more at full width; a tile is widened into a buffer that stays in the processor's cache, and
multiplied from there.
"""

import threading

import numpy as np

# Numbers that are widened at a time. Measured at 1.1B on two cores of a Zen 3: 128 K and 256 K are
# 0.84 to 0.98 times as fast, drowning in the interpreter's overhead; larger tiles fall out of the
# cache.
TILE = 512 * 1024


def product(x: np.ndarray, w: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """y^T = W x^T: x (M, D) float32, W (O, D) in any storage dtype -> (O, M) float32, in `out`
    where that is given.

    In this order of operands OpenBLAS was faster than in the other for any M; for M = 2 it takes
    2.5 times as long as for two products of one row (4096 x 4096, two cores).
    """
    out = np.empty((len(w), len(x)), dtype="float32") if out is None else out
    if w.dtype == np.float32:
        if len(x) == 2:
            out[:, 0], out[:, 1] = w @ x[0], w @ x[1]
        else:
            np.dot(w, x.T, out=out)  # (O, D) @ (D, M) -> (O, M)
        return out
    width = x.shape[1]
    rows = max(1, TILE // width // 16 * 16)
    tiles = _buffer(rows * width).reshape(rows, width)
    x_t, exponent = x.T, 0
    if w.dtype == np.float16:
        x_t, exponent = np.ldexp(x_t, _X_EXPONENT), _Y_EXPONENT
    for begin in range(0, len(w), rows):
        narrow = w[begin : begin + rows]  # (rows, D)
        tile = tiles[: len(narrow)]
        widen(narrow, tile)
        np.dot(tile, x_t, out=out[begin : begin + rows])  # (rows, D) @ (D, M) -> (rows, M)
    if exponent:
        np.ldexp(out, exponent, out=out)
    return out


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
    NaN would read as 2^16 and above: a matrix that is not `is_finite` must not come here.
    """
    if narrow.dtype != np.float16:
        np.copyto(tile, narrow, casting="unsafe")
        return
    bits = tile.view("int32")
    np.copyto(bits, narrow.view("int16"))  # the sign fills the upper half
    np.left_shift(bits, 13, out=bits)
    bits = tile.view("uint32")
    np.bitwise_and(bits, _SIGN_EXPONENT_FRACTION, out=bits)


# As signed integers the positive infinity and NaNs are the largest numbers of float16; as unsigned
# ones the negative.
_INFINITY, _MINUS_INFINITY = 0x7C00, 0xFC00


def is_finite(narrow: np.ndarray) -> bool:
    """Whether no number of a float16 matrix (rows, D) is infinite or NaN: two passes of integers,
    without a copy."""
    rows = max(1, TILE // max(1, narrow.shape[1]))
    for begin in range(0, len(narrow), rows):
        some = narrow[begin : begin + rows]
        if some.view("int16").max(initial=0) >= _INFINITY:
            return False
        if some.view("uint16").max(initial=0) >= _MINUS_INFINITY:
            return False
    return True
