"""What CuPy does better than the reference: 16-bit matrix products on tensor cores."""

import numpy as np

from npllama.backend import Array
from npllama.ops.blocks import Ops
from npllama.parameters import Matrix


class CupyOps(Ops):
    """Overrides for CUDA; each computes what the method of the same name in Ops does."""

    def linear(self, x: Array, w: Matrix) -> Array:
        """y = x W^T, for 16-bit W in that dtype with float32 accumulation; returned as x's dtype.

        CuPy multiplies two 2-D operands of one dtype in cuBLAS as they lie, W^T without a copy;
        mixed dtypes, and 3-D operands, would copy W at full width on every call. int8 is
        widened, since its product would accumulate in int8 and overflow.
        """
        is_16_bit = w.values.dtype.itemsize == 2
        dtype = w.values.dtype if is_16_bit else x.dtype
        flat = x.reshape(-1, x.shape[-1]).astype(dtype, copy=False)  # (..., D) -> (M, D)
        y = flat @ w.values.astype(dtype, copy=False).T  # (M, D) @ (D, O) -> (M, O)
        y = y.astype(x.dtype, copy=False)
        y = y.reshape(*x.shape[:-1], w.shape[0])  # (M, O) -> (..., O)
        return y if w.scale is None else y * w.scale.astype(x.dtype)

    def cache_dtype(self, storage_dtype: np.dtype) -> np.dtype:
        """Keys and values are kept as the weights are; float16 beside int8 weights."""
        return np.dtype("float16") if storage_dtype == np.int8 else storage_dtype
