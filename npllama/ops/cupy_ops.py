"""What CuPy does better than the reference: 16-bit matrix products on tensor cores."""

import numpy as np

from npllama.backend import Array
from npllama.ops.blocks import Ops
from npllama.parameters import Matrix
from npllama.weight_formats import format_of


class CupyOps(Ops):
    """Overrides for CUDA; each computes what the method of the same name in Ops does."""

    def linear(self, x: Array, w: Matrix) -> Array:
        """y = x W^T, for 16-bit W in that dtype with float32 accumulation; returned as x's dtype.

        CuPy multiplies two 2-D operands of one dtype in cuBLAS as they lie, W^T without a copy;
        mixed dtypes, and 3-D operands, would copy W at full width on every call. int8 is
        widened, since its product would accumulate in int8 and overflow.
        """
        dtype = w.format.product_dtype or x.dtype
        flat = x.reshape(-1, x.shape[-1]).astype(dtype, copy=False)  # (..., D) -> (M, D)
        y = flat @ w.format.unscaled(w, dtype).T  # (M, D) @ (D, O) -> (M, O)
        y = y.astype(x.dtype, copy=False)
        y = w.format.scaled(w, y)
        return y.reshape(*x.shape[:-1], w.shape[0])  # (M, O) -> (..., O)

    def cache_dtype(self, storage_dtype: np.dtype) -> np.dtype:
        """Keys and values are kept as the weights are; float16 beside int8 weights."""
        return format_of(storage_dtype).cache_dtype
