"""Products of 16-bit matrices as cuBLAS has them, where `xp.matmul` would copy or widen."""

import ctypes
from types import ModuleType

from npllama.backend import Array

_TYPES = {"float16": "CUDA_R_16F", "bfloat16": "CUDA_R_16BF", "float32": "CUDA_R_32F"}
"""What cuBLAS calls a dtype."""


def product(
    cupy: ModuleType, x: Array, w: Array, out: Array, alpha: float = 1.0, beta: float = 0.0
) -> None:
    """out = alpha x w^T + beta out, of two matrices or of a stack of pairs; float32 accumulation.

    No operand is copied: each is read where it lies, as a view of a larger array too.

    Args:
        x: (M, D) or (stack, M, D), 16 bit; rows are contiguous.
        w: (O, D) or (stack, O, D) in x's dtype; rows are contiguous, or columns are.
        out: (M, O) or (stack, M, O), float32 or in x's dtype; rows are contiguous.
    """
    cublas = cupy.cuda.cublas
    # cuBLAS stores matrices by columns, so what is (M, D) here is (D, M) there: out^T = w x^T
    m, n, k = w.shape[-2], x.shape[-2], x.shape[-1]
    by_rows = w.strides[-1] == w.itemsize
    operation = cublas.CUBLAS_OP_T if by_rows else cublas.CUBLAS_OP_N
    a = _operand(cupy, w, -2 if by_rows else -1)
    b, c = _operand(cupy, x, -2), _operand(cupy, out, -2)
    one, other = ctypes.c_float(alpha), ctypes.c_float(beta)  # cuBLAS reads them in the call
    factors = ctypes.addressof(one), ctypes.addressof(other)
    handle = cupy.cuda.Device().cublas_handle
    begin = (handle, operation, cublas.CUBLAS_OP_N, m, n, k, factors[0], *a, *b, factors[1], *c)
    how = (cublas.CUBLAS_COMPUTE_32F, cublas.CUBLAS_GEMM_DEFAULT)
    if x.ndim == 2:
        cublas.gemmEx(*begin, *how)
    else:
        cublas.gemmStridedBatchedEx(*begin, len(x), *how)


def _operand(cupy: ModuleType, array: Array, leading: int) -> tuple[int, ...]:
    """Address, type, leading dimension (from one of cuBLAS's columns to the next) and, in a
    stack, the distance from one matrix to the next; both are counted in numbers."""
    type_ = getattr(cupy.cuda.runtime, _TYPES[array.dtype.name])
    strides = [array.strides[axis] // array.itemsize for axis in (leading, 0)]
    return array.data.ptr, type_, *strides[: array.ndim - 1]
