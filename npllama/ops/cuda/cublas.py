"""Products of 16-bit matrices by direct calls to cuBLAS, which avoid the copies of `xp.matmul`."""

import ctypes
from types import ModuleType

from npllama.backend import Array

_TYPES = {"float16": "CUDA_R_16F", "bfloat16": "CUDA_R_16BF", "float32": "CUDA_R_32F"}
"""cuBLAS's names of the dtypes."""


def product(
    cupy: ModuleType, x: Array, w: Array, out: Array, alpha: float = 1.0, beta: float = 0.0
) -> None:
    """out = alpha x w^T + beta out, for matrices or stacks of matrices. Sums are float32.

    The operands may be views of larger arrays, and are not copied.

    Args:
        x: (M, D) or (stack, M, D), float16 or bfloat16, with contiguous rows.
        w: (O, D) or (stack, O, D) in x's dtype, with contiguous rows or contiguous columns.
        out: (M, O) or (stack, M, O), float32 or in x's dtype, with contiguous rows.
    """
    cublas = cupy.cuda.cublas
    # cuBLAS is column-major: it sees a row-major (M, D) as a (D, M), and computes out^T = w x^T
    m, n, k = w.shape[-2], x.shape[-2], x.shape[-1]
    by_rows = w.strides[-1] == w.itemsize
    operation = cublas.CUBLAS_OP_T if by_rows else cublas.CUBLAS_OP_N
    a = _operand(cupy, w, -2 if by_rows else -1)
    b, c = _operand(cupy, x, -2), _operand(cupy, out, -2)
    one, other = ctypes.c_float(alpha), ctypes.c_float(beta)  # must live until the call returns
    factors = ctypes.addressof(one), ctypes.addressof(other)
    handle = cupy.cuda.Device().cublas_handle
    begin = (handle, operation, cublas.CUBLAS_OP_N, m, n, k, factors[0], *a, *b, factors[1], *c)
    how = (cublas.CUBLAS_COMPUTE_32F, cublas.CUBLAS_GEMM_DEFAULT)
    if x.ndim == 2:
        cublas.gemmEx(*begin, *how)
    else:
        cublas.gemmStridedBatchedEx(*begin, len(x), *how)


def _operand(cupy: ModuleType, array: Array, leading: int) -> tuple[int, ...]:
    """An operand's address, type, leading dimension and, in a stack, the stride of the matrices.

    The leading dimension is the stride of cuBLAS's columns. Both strides count elements.
    """
    type_ = getattr(cupy.cuda.runtime, _TYPES[array.dtype.name])
    strides = [array.strides[axis] // array.itemsize for axis in (leading, 0)]
    return array.data.ptr, type_, *strides[: array.ndim - 1]
