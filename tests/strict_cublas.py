"""A cuBLAS for tests: the two products that the project uses, on the memory of strict arrays.

An operand is an address that must come from `array.data.ptr` of a live array. The matrix that a
call describes must lie within this array and have its dtype. Calls that cuBLAS refuses raise an
error. So do calls that cuBLAS accepts although they are slow (addresses that are not multiples of
16 bytes) or wrong (an output that overlaps an operand).
"""

import ctypes
import weakref

import numpy as np
from numpy.lib.array_utils import byte_bounds
from numpy.lib.stride_tricks import as_strided

HANDLE = 12
TYPES = {"CUDA_R_32F": 0, "CUDA_R_16F": 2, "CUDA_R_16BF": 14}
"""Constants from library_types.h, as in cupy.cuda.runtime."""
_DTYPES = {0: "float32", 2: "float16", 14: "bfloat16"}
_LIVE: dict[int, weakref.ref] = {}


class CUBLASError(RuntimeError):
    pass


class Memory:
    """The attribute `array.data` of a device array."""

    def __init__(self, array: np.ndarray) -> None:
        self.ptr = array.ctypes.data
        _LIVE[self.ptr] = weakref.ref(array)


class StrictCublas:
    """The part of `cupy.cuda.cublas` that the project uses, with the signatures of CuPy 14.

    Args:
        device: a strict_cupy.CupyDevice, which has the current stream.

    Attributes:
        calls: the names of all calls so far.
    """

    CUBLAS_OP_N, CUBLAS_OP_T = 0, 1
    CUBLAS_COMPUTE_32F = 68
    CUBLAS_GEMM_DEFAULT = -1
    CUBLASError = CUBLASError

    def __init__(self, device) -> None:
        self._device = device
        self.calls: list[str] = []

    def gemmEx(
        self, handle, transa, transb, m, n, k, alpha, a, atype, lda, b, btype, ldb, beta, c, ctype,
        ldc, compute_type, algo,
    ):  # fmt: skip
        a, b, c = (a, atype, lda, 0), (b, btype, ldb, 0), (c, ctype, ldc, 0)
        how = (compute_type, algo)
        self._gemm("gemmEx", handle, transa, transb, m, n, k, alpha, a, b, beta, c, 1, how)

    def gemmStridedBatchedEx(
        self, handle, transa, transb, m, n, k, alpha, a, atype, lda, stride_a, b, btype, ldb,
        stride_b, beta, c, ctype, ldc, stride_c, batch_count, compute_type, algo,
    ):  # fmt: skip
        a, b, c = (a, atype, lda, stride_a), (b, btype, ldb, stride_b), (c, ctype, ldc, stride_c)
        name, how = "gemmStridedBatchedEx", (compute_type, algo)
        self._gemm(name, handle, transa, transb, m, n, k, alpha, a, b, beta, c, batch_count, how)

    def _gemm(self, name, handle, transa, transb, m, n, k, alpha, a, b, beta, c, stack, how):
        """C = alpha op(A) op(B) + beta C with column-major matrices: (m, k), (k, n) -> (m, n)."""
        if self._device.stream.capture is not None:
            raise NotImplementedError("cuBLAS's stream cannot be set while a stream is capturing")
        if handle != HANDLE:
            raise CUBLASError("CUBLAS_STATUS_NOT_INITIALIZED")
        whole = (transa, transb, m, n, k, stack, *how, *a, *b, *c)
        if not all(type(number) is int for number in whole):
            raise TypeError(f"{name}: an argument is not an int: {whole}")
        if (
            how != (self.CUBLAS_COMPUTE_32F, self.CUBLAS_GEMM_DEFAULT)
            or a[1] == TYPES["CUDA_R_32F"]
        ):
            raise CUBLASError(f"{name}: not by float32 accumulation of 16-bit products")
        if a[1] != b[1] or c[1] not in (a[1], TYPES["CUDA_R_32F"]):
            raise CUBLASError("CUBLAS_STATUS_NOT_SUPPORTED: types that do not go together")
        if min(m, n, k, stack) < 1:
            raise CUBLASError(f"{name}: nothing to multiply: {m} x {n} x {k}, {stack} times")
        a = _matrices("A", a, (k, m) if transa else (m, k), stack)
        b = _matrices("B", b, (n, k) if transb else (k, n), stack)
        c = _matrices("C", c, (m, n), stack)
        for operand in (a, b):
            if np.shares_memory(operand, c):
                raise CUBLASError(f"{name}: C lies in the memory of an operand")
        a, b = (x.swapaxes(1, 2) if t else x for x, t in ((a, transa), (b, transb)))
        alpha, beta = (ctypes.c_float.from_address(x).value for x in (alpha, beta))
        y = np.float32(alpha) * (a.astype("float32") @ b.astype("float32"))
        if beta != 0:  # with beta 0, C is not read and may contain anything
            y += np.float32(beta) * c.astype("float32")
        self._device.stream.touch([a, b, c])
        c[...] = y
        self.calls.append(name)


def _matrices(name, operand, shape, stack):
    """A view (stack, rows, columns) of the array at an address."""
    address, type_, leading, stride = operand
    array = _LIVE.get(address, lambda: None)()
    if array is None:
        raise CUBLASError(f"{name}: no live array has this address")
    if array.dtype.name != _DTYPES.get(type_):
        raise CUBLASError(f"{name}: an array of {array.dtype.name}, of type {type_} by the call")
    if leading < shape[0]:
        raise CUBLASError("CUBLAS_STATUS_INVALID_VALUE: a leading dimension below the rows")
    size = array.itemsize
    if address % 16 or leading * size % 16 or stride * size % 16:
        raise CUBLASError(f"{name}: columns do not begin at 16 bytes, which is slow")
    last = (stack - 1) * stride + (shape[1] - 1) * leading + shape[0] - 1
    if stride < 0 or address + (last + 1) * size > byte_bounds(array)[1]:
        raise CUBLASError(f"{name}: {stack} x {shape} with {leading} between columns ends outside")
    return as_strided(array, (stack, *shape), (stride * size, size, leading * size))
