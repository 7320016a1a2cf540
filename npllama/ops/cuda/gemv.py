"""Matrix-vector products of the decode step, with what stands around them fused in."""

from npllama.backend import Array
from npllama.ops.cuda.kernels import Kernels
from npllama.parameters import Matrix

MAX_ROWS = 8
"""Tokens that one launch computes; more are computed as matrix products."""


def fits(w: Matrix | None, n_rows: int) -> bool:
    """Whether `gemv` takes this matrix and so many rows of x."""
    return False


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
    raise NotImplementedError
