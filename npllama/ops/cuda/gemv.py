"""Matrix-vector products of the decode step, with what stands around them fused in."""

from dataclasses import dataclass
from functools import lru_cache

from npllama.backend import Array
from npllama.ops.cuda.kernels import Kernels, instance
from npllama.parameters import Matrix

WEIGHT_DTYPES = ("float16", "bfloat16", "float32", "int8")
MAX_ROWS = 8
"""Tokens that one launch computes; more are computed as matrix products."""
_CHUNK = 16  # bytes of a row that a thread copies at once
_MOST_THREADS = {1: 448, 2: 480, 4: 480}
"""By bytes of an element: more had too few registers, as two blocks share a multiprocessor's."""
_BATCH = 32 * 1024  # bytes that a block works on between two requests, at most
_QUEUE = 96 * 1024  # bytes in flight: what two blocks of a multiprocessor have room for
_SHARED = 112 * 1024  # of a block: a multiprocessor has room for two, of one kernel and the next


@dataclass(frozen=True)
class Plan:
    """How a launch of gemv.cu divides the work.

    Attributes:
        m: vectors that the kernel is compiled for: 1, 2, 4 or 8.
        threads: of a block, which share a row's 16-byte chunks.
        chunks: of a row that a thread takes at once.
        rows: of W in a batch, the unit of the queue.
        stages: batches in flight.
        grid: blocks.
        shared: bytes of shared memory of a block.
    """

    m: int
    threads: int
    chunks: int
    rows: int
    stages: int
    grid: int
    shared: int


@lru_cache(maxsize=256)
def plan(
    itemsize: int,
    n_out: int,
    width: int,
    n_rows: int,
    norm: bool,
    swiglu: bool,
    n_sms: int,
    max_shared: int,
) -> Plan:
    """How to multiply W (n_out, width) with n_rows vectors.

    Args:
        norm, swiglu: whether there is one.
        n_sms: multiprocessors of the device.
        max_shared: bytes of shared memory that a block may have.
    """
    m = next(m for m in (1, 2, 4, 8) if m >= n_rows)
    limit = min(_SHARED, max_shared)
    queue = min(_QUEUE if m <= 2 else _QUEUE * 2 // 3, limit * 8 // 9)
    batch = min(_BATCH, queue // 2)
    least = 2 if swiglu else 1  # a row of gate and one of up
    threads, chunks = _tile(itemsize, width, m, norm, queue // 2 // least)
    row_bytes = threads * chunks * _CHUNK
    most = max(least, min(32 // m, batch // row_bytes))
    rows = max(r for r in (1, 2, 4) if r <= most)
    stages = max(2, min(8, queue // (rows * row_bytes)))
    grid, shared = blocks(
        m, threads, chunks, rows, stages, n_out, swiglu=swiglu, n_sms=n_sms, limit=limit
    )
    return Plan(m, threads, chunks, rows, stages, grid, shared)


def _tile(itemsize: int, width: int, m: int, norm: bool, most_bytes: int) -> tuple[int, int]:
    """Threads, and chunks of each: one tile where the registers hold so much of m rows of x and a
    row of it has `most_bytes`, else tiles of about equal size."""
    numbers = _CHUNK // itemsize  # of a chunk
    if m == 1:  # the elements of norm are in registers beside those of x
        most_threads, most_numbers = _MOST_THREADS[itemsize], 16 if norm else 24
    else:
        most_threads, most_numbers = 256 if m * numbers <= 64 else 128, 32
    most_chunks = max(1, min(3, most_numbers // (m * numbers)))
    n_chunks = width // numbers
    most = min(most_threads * most_chunks, most_bytes // _CHUNK // 96 * 96)  # of whole warps
    n_tiles = -(-n_chunks // most)
    tile = -(-n_chunks // n_tiles)
    chunks = -(-tile // most_threads)
    return -(-tile // (32 * chunks)) * 32, chunks


def blocks(
    m: int,
    threads: int,
    chunks: int,
    rows: int,
    stages: int,
    n_out: int,
    *,
    swiglu: bool,
    n_sms: int,
    limit: int,
) -> tuple[int, int]:
    """How many blocks, and bytes of shared memory of each.

    One block a multiprocessor; several where the sums of one's rows would exceed the limit.
    """
    warps, of_unit = threads // 32, 2 if swiglu else 1
    n_units = n_out // of_unit
    fixed = stages * rows * chunks * threads * _CHUNK + 4 * warps * m  # queue, squares
    of_row = 4 * (warps * m + m + 1)  # sums, residuals, scale
    units = max(1, (limit - fixed) // (of_row * of_unit))  # of a block, at most
    grid = min(n_units, n_sms * -(-n_units // (n_sms * units)))
    return grid, fixed + -(-n_units // grid) * of_unit * of_row


def fits(w: Matrix | None, n_rows: int) -> bool:
    """Whether `gemv` takes this matrix and so many rows of x."""
    return (
        w is not None
        and n_rows <= MAX_ROWS
        and w.format.name in WEIGHT_DTYPES
        and w.shape[1] * w.values.itemsize % _CHUNK == 0
    )


def gemv(
    kernels: Kernels,
    w: Matrix,
    x: Array,
    *,
    norm: Array | None = None,
    eps: float = 0.0,
    residual: Array | None = None,
    swiglu: bool = False,
) -> Array:
    """y = h W^T (+ residual), with h = RMSNorm(x) where `norm` is given, else x.

    Args:
        w: (O, D); with `swiglu` (2F, D), F rows of gate above F rows of up.
        x: (B, 1, D) float32.
        residual: (B, 1, O) float32.
        swiglu: y = silu(gate) * up, (B, 1, F), of gate, up = h W^T.

    Returns:
        (B, 1, O) float32, accumulated in float32.
    """
    xp = kernels.xp
    n_rows, (n_out, width) = x.shape[0], w.shape
    device, has_norm = (kernels.n_sms, kernels.max_shared), norm is not None
    cut = plan(w.values.itemsize, n_out, width, n_rows, has_norm, swiglu, *device)
    sizes = (cut.m, cut.threads, cut.chunks, cut.rows, cut.stages)
    name = instance("gemv", w.format.name, *sizes, has_norm, swiglu)
    y = xp.empty((n_rows, 1, n_out // 2 if swiglu else n_out), dtype="float32")
    x = xp.ascontiguousarray(x)
    if residual is not None:
        residual = xp.ascontiguousarray(residual)
    args = (w.values, w.scale, x, norm, residual, y, n_out, width, n_rows, eps)
    kernels.launch("gemv", name, (cut.grid,), (cut.threads,), args, cut.shared)
    return y
