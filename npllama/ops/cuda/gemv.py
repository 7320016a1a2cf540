"""Matrix-vector products of the decode step, fused with RMSNorm, SwiGLU and the residual."""

from dataclasses import dataclass
from functools import lru_cache

from npllama.backend import Array
from npllama.ops.cuda.kernels import Kernels, instance
from npllama.parameters import Matrix

WEIGHT_DTYPES = ("float16", "bfloat16", "float32", "int8")
MAX_ROWS = 8
"""The maximum number of rows of x per launch. Matrix products are used for more rows."""
_CHUNK = 16  # bytes that a thread copies in one instruction
_MOST_THREADS = {1: 448, 2: 480, 4: 480}
"""The maximum number of threads per thread block, by bytes per element of W. A multiprocessor needs
registers for two thread blocks, because one of the next kernel may start before this one ends (see
kernels.py). With more threads, the registers would not suffice for both."""
_BATCH = 32 * 1024  # maximum bytes of a batch of rows, the unit in which a thread block requests W
_QUEUE = 96 * 1024  # maximum bytes of W that a thread block has requested and not yet used
# shared memory per thread block, such that a thread block of the next kernel has space too
_SHARED = 112 * 1024


@dataclass(frozen=True)
class Plan:
    """How a launch of gemv.cu divides the work.

    Attributes:
        m: the number of rows of x that the kernel is compiled for: 1, 2, 4 or 8.
        threads: threads per thread block. They share the 16-byte chunks of each row of W.
        chunks: the number of chunks of a tile that each thread processes. A tile is the part of a
            row of W that a thread block processes at a time.
        rows: rows of W per batch. A thread block copies W to shared memory batch by batch.
        stages: the number of batches that are copied at the same time.
        grid: the number of thread blocks.
        shared: bytes of shared memory per thread block.
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
    """Choose the plan for the product of W (n_out, width) with n_rows rows of x.

    Args:
        itemsize: bytes per element of W.
        norm, swiglu: whether the kernel applies RMSNorm or SwiGLU.
        n_sms: multiprocessors of the device.
        max_shared: the maximum number of bytes of shared memory per thread block.
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
    """The numbers of threads and of chunks, as in Plan.

    Two limits bound the size of a tile: most_bytes, and the registers, which hold the tile's
    columns for m rows of x. A longer row is split into tiles of about equal size.
    """
    numbers = _CHUNK // itemsize  # elements per chunk
    if m == 1:  # the registers also hold the elements of norm
        most_threads, most_numbers = _MOST_THREADS[itemsize], 16 if norm else 24
    else:
        most_threads, most_numbers = 256 if m * numbers <= 64 else 128, 32
    most_chunks = max(1, min(3, most_numbers // (m * numbers)))
    n_chunks = width // numbers
    # 96 chunks are 3, the largest number of chunks per thread, for each of the 32 threads of a warp
    most = min(most_threads * most_chunks, most_bytes // _CHUNK // 96 * 96)
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
    """The number of thread blocks, and the bytes of shared memory per thread block.

    There is one thread block per multiprocessor, or several if one would need more than `limit`
    bytes of shared memory to store the sums of its rows.
    """
    warps, of_unit = threads // 32, 2 if swiglu else 1
    n_units = n_out // of_unit
    fixed = stages * rows * chunks * threads * _CHUNK + 4 * warps * m  # queue, sums of squares
    of_row = 4 * (warps * m + m + 1)  # sums, residuals, scale
    units = max(1, (limit - fixed) // (of_row * of_unit))  # maximum per thread block
    grid = min(n_units, n_sms * -(-n_units // (n_sms * units)))
    return grid, fixed + -(-n_units // grid) * of_unit * of_row


def fits(w: Matrix | None, n_rows: int) -> bool:
    """Whether `gemv` supports this matrix and n_rows rows of x."""
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
    """y = h W^T + residual, where h = RMSNorm(x) if `norm` is given, and h = x otherwise.

    Args:
        w: (O, D), or with `swiglu` (2F, D): the F rows of gate, then the F rows of up.
        x: (B, 1, D) float32.
        norm: (D,), the weight of the RMSNorm.
        eps: the epsilon of the RMSNorm.
        residual: (B, 1, O) float32, or None for no residual.
        swiglu: compute y = SiLU(gate) * up instead, (B, 1, F), where gate, up = h W^T.

    Returns:
        (B, 1, O) float32, accumulated in float32; with `swiglu` (B, 1, F).
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
