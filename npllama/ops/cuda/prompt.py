"""The blocks of the model for many tokens: 16-bit products on tensor cores, and our own kernels.

M = B * T rows. "16 bit" means float16 or bfloat16. The residual stream x and the results of
products are float32. The kernels that compute the operands of products round them to 16 bits.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from npllama.backend import Array
from npllama.ops.cuda.cublas import product as cublas_product
from npllama.ops.cuda.kernels import Kernels, instance
from npllama.parameters import Matrix

if TYPE_CHECKING:
    from npllama.kv_cache import LayerCache, Positions

THREADS = 256
"""Threads per thread block, as in prompt.cu."""
QUERIES = 512
"""The maximum number of tokens per attention product. More tokens would waste work on masked
scores."""
SCORES = 2**25
"""The maximum number of attention scores in memory, unless one key head alone has more. If all
heads together have more, a few heads are computed at a time. Each score takes 6 bytes."""
WIDENED = 2**25
"""The maximum number of elements of an int8 matrix that are widened at a time."""


def fits(kernels: Kernels, x: Array, *weights: Matrix | None) -> bool:
    """Whether the functions of this module support these weights and this residual stream.

    Args:
        x: (B, T, D), the residual stream.
    """
    if x.dtype != np.float32 or not _has_room(kernels, x.shape[-1]):
        return False
    if not all(w is not None and _fits(w) for w in weights):
        return False
    return len({w.format.operand_dtype for w in weights}) == 1


def _fits(w: Matrix) -> bool:
    n_out, width = w.shape
    is_whole = width % 16 == 0 and n_out % 8 == 0  # rows of int8 are whole 16-byte vectors too
    return w.format.operand_dtype is not None and is_whole


def fits_attention(kernels: Kernels, cache: "LayerCache", w: Matrix) -> bool:
    """Whether `attend` supports the cache's head width and context, and the cache has the dtype in
    which the result is multiplied by w, which is W_o."""
    *_, context, head_dim = cache.k.shape
    is_same = cache.k.dtype == w.format.operand_dtype
    return is_same and head_dim % 8 == 0 and _has_room(kernels, _stride(context))


def _has_room(kernels: Kernels, n: int) -> bool:
    """Whether a row of n float32 elements fits the shared memory of a thread block."""
    return _of_row(n) <= kernels.max_shared


def queries_at_once(groups: int, context: int) -> int:
    """The number of tokens per tile. A tile is some consecutive tokens of a row, whose queries are
    computed together.

    It is at most QUERIES, and small enough that one key head has about SCORES scores at most.
    """
    return max(1, min(QUERIES, SCORES // (groups * context)))


# -- products ----------------------------------------------------------------------------------


def normalized(kernels: Kernels, x: Array, norm: Array, eps: float, w: Matrix) -> Array:
    """RMSNorm(x) as the operand of a product with w: (B, T, D) float32 -> (M, D) 16 bit."""
    dtype, width = w.format.operand_dtype, x.shape[-1]
    h = kernels.xp.empty((x.size // width, width), dtype=dtype)
    arguments = (x, norm, h, width, eps)
    _launch(kernels, "rms_norm_rows", dtype, (len(h),), arguments, _of_row(width))
    return h


def product(kernels: Kernels, h: Array, w: Matrix, out: Array | None = None) -> Array:
    """h W^T without the scale of W's rows: (M, D) 16 bit, (O, D) -> (M, O) float32.

    Args:
        out: (M, O) float32. The product is added to it in-place; None returns a new array.
    """
    kernels.cublas.n_calls += 1
    beta = 0.0 if out is None else 1.0
    if out is None:
        out = kernels.xp.empty((len(h), w.shape[0]), dtype="float32")
    for some, operand in _operands(kernels, w):
        cublas_product(kernels.xp, h, operand, out[:, some], beta=beta)
    return out


def add_product(kernels: Kernels, x: Array, h: Array, w: Matrix) -> None:
    """x += h W^T in-place, for contiguous x (B, T, O) float32 and h (M, D) 16 bit."""
    x = x.reshape(-1, w.shape[0])  # (B, T, O) -> (M, O), a view
    if w.scale is None:
        product(kernels, h, w, out=x)
        return
    y = product(kernels, h, w)  # (M, O)
    grid = _grid(y.shape)
    kernels.launch("prompt", "add_scaled_rows", grid, (THREADS,), (y, w.scale, x, y.shape[1]))


def swiglu(kernels: Kernels, gate_up: Array, w: Matrix, w_down: Matrix) -> Array:
    """SiLU(gate) * up as the operand of a product with w_down.

    Args:
        gate_up: (M, 2F) float32, the product with w without the scale of w's rows. The kernel
            applies this scale.

    Returns:
        (M, F) 16 bit.
    """
    dtype, width = w_down.format.operand_dtype, w_down.shape[1]
    y = kernels.xp.empty((len(gate_up), width), dtype=dtype)
    _launch(kernels, "swiglu_rows", dtype, _grid(y.shape), (gate_up, w.scale, y, width))
    return y


def _operands(kernels: Kernels, w: Matrix) -> Iterator[tuple[slice, Array]]:
    """W as 16-bit operands: all rows at once, or for int8 some rows at a time, widened."""
    dtype = w.format.operand_dtype
    if w.values.dtype == dtype:
        yield slice(None), w.values
        return
    n_out, width = w.shape
    at_once = min(n_out, max(8, WIDENED // width // 8 * 8))  # keeps the slices of `out` aligned
    wide = kernels.xp.empty((at_once, width), dtype=dtype)
    for begin in range(0, n_out, at_once):
        values = w.values[begin : begin + at_once]
        grid = (-(-values.size // (16 * THREADS)),)
        _launch(kernels, "widen_int8", dtype, grid, (values, wide[: len(values)], values.size))
        yield slice(begin, begin + len(values)), wide[: len(values)]


# -- attention ---------------------------------------------------------------------------------


def attend(
    kernels: Kernels,
    qkv: Array,
    w: Matrix,
    cache: "LayerCache",
    positions: "Positions",
    n_last: int | None = None,
) -> Array:
    """Rotate q and k, write k and v to the cache, and attend to all cached keys of each row.

    Args:
        qkv: (M, (H + 2K) C) float32, the product with w without the scale of w's rows. The kernel
            applies this scale.
        n_last: as in `Ops.attention_block`.

    Returns:
        o (B * n, H*C) 16 bit, for the last n tokens of each row.
    """
    batch, n_new, _ = positions.cos.shape
    _, n_kv_heads, context, head_dim = cache.k.shape
    n_heads = qkv.shape[1] // head_dim - 2 * n_kv_heads
    n = n_last or n_new
    tile = queries_at_once(n_heads // n_kv_heads, context)
    xp, dtype = kernels.xp, cache.k.dtype
    q, o = (xp.empty((batch, n, n_heads * head_dim), dtype=dtype) for _ in range(2))
    at = (positions.cos, positions.sin, positions.device_rows, positions.device_starts)
    sizes = (n_heads, n_kv_heads, head_dim, context, n_new, n, tile)
    arguments = (qkv, w.scale, *at, q, cache.k, cache.v, *sizes)
    _launch(kernels, "rotate_and_cache", dtype, (batch * n_new,), arguments)
    size = _room(n_heads, n_kv_heads, min(tile, n), context)
    room = xp.empty(size, dtype="float32"), xp.empty(size, dtype=dtype)
    for b, (row, start) in enumerate(zip(positions.rows, positions.starts, strict=True)):
        for begin in range(0, n, tile):
            some = slice(begin, min(begin + tile, n))
            n_keys = start + n_new - n + some.stop  # the keys of the tile's last query
            k, v = cache.k[row, :, :n_keys], cache.v[row, :, :n_keys]  # (K, N, C)
            _attend_tile(kernels, q[b, some], k, v, o[b, some], room)
    return o.reshape(batch * n, -1)


def _room(n_heads: int, n_kv_heads: int, tile: int, context: int) -> int:
    """The number of scores in memory: at most SCORES, but at least those of one key head."""
    of_key_head = n_heads // n_kv_heads * tile * _stride(context)
    return of_key_head * min(n_kv_heads, max(1, SCORES // of_key_head))


def _heads_at_once(n_kv_heads: int, of_key_head: int, room: int) -> int:
    """The number of key heads that are computed at a time, if each has of_key_head scores. Their
    scores fit `room`, and the key heads are divided as evenly as possible."""
    turns = -(-n_kv_heads // (room // of_key_head))
    return -(-n_kv_heads // turns)


def _stride(n_keys: int) -> int:
    """n_keys rounded up such that rows of 16-bit scores are aligned to 16 bytes."""
    return -(-n_keys // 8) * 8


def _attend_tile(
    kernels: Kernels, q: Array, k: Array, v: Array, o: Array, room: tuple[Array, Array]
) -> None:
    """o = softmax(q k^T / sqrt(C) + mask) v for the last t of N positions, all 16 bit.

    The size of `room` limits K', the number of key heads that are computed at a time. The queries
    of the G query heads of a key head are multiplied by its keys in one product.

    Args:
        q: t * H * C elements in the order (H, t, C), as `rotate_and_cache` writes them. Its nominal
            shape is (t, H*C).
        k, v: (K, N, C), views of the cache.
        o: (t, H*C), which the function writes.
        room: memory for the scores, float32, and for their softmax, 16 bit.
    """
    xp = kernels.xp
    n_kv_heads, n_keys, head_dim = k.shape
    q = q.reshape(n_kv_heads, -1, head_dim)  # (H, t, C) in memory -> (K, G*t, C)
    o = o.reshape(len(o), n_kv_heads, -1, head_dim)  # (t, H*C) -> (t, K, G, C)
    t, _, groups, _ = o.shape
    stride = _stride(n_keys)
    at_once = _heads_at_once(n_kv_heads, groups * t * stride, room[0].size)
    for first in range(0, n_kv_heads, at_once):
        some = slice(first, min(first + at_once, n_kv_heads))
        shape = (some.stop - first, groups * t, stride)
        scores, p = (a[: math.prod(shape)].reshape(shape) for a in room)
        alpha = 1 / math.sqrt(head_dim)
        cublas_product(xp, q[some], k[some], scores[:, :, :n_keys], alpha)  # (K', G*t, N)
        rows = (shape[0] * shape[1],)
        arguments = (scores, p, t, stride, n_keys - t + 1)
        _launch(kernels, "softmax_rows", k.dtype, rows, arguments, _of_row(stride))
        for g in range(groups):
            of_group = p[:, g * t : (g + 1) * t, :n_keys]  # (K', t, N)
            out = o[:, some, g].swapaxes(0, 1)  # (t, K', C) -> (K', t, C)
            cublas_product(xp, of_group, v[some].swapaxes(1, 2), out)


# -- launching ---------------------------------------------------------------------------------


def _of_row(n: int) -> int:
    """The shared memory, in bytes, of n float32 elements and one more per warp."""
    return 4 * (n + THREADS // 32)


def _grid(shape: tuple[int, ...]) -> tuple[int, int]:
    """The grid for an array (M, columns). A thread block computes 4 * THREADS elements of a row."""
    return shape[0], -(-shape[1] // (4 * THREADS))


def _launch(
    kernels: Kernels, name: str, dtype: np.dtype, grid: tuple, arguments: tuple, shared: int = 0
) -> None:
    kernels.launch("prompt", instance(name, dtype), grid, (THREADS,), arguments, shared)
