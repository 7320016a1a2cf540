"""What CuPy does better than the reference: 16-bit products on tensor cores, kernels of our own."""

import math
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np

from npllama.backend import Array, Backend
from npllama.ops.blocks import Ops
from npllama.ops.cuda import decode_attention, gemv
from npllama.ops.cuda.kernels import Kernels
from npllama.parameters import Head, Layer, Matrix
from npllama.weight_formats import format_of

if TYPE_CHECKING:
    from npllama.kv_cache import LayerCache, Positions


class CupyOps(Ops):
    """Overrides for CUDA; each computes what the method of the same name in Ops does.

    Where shapes and dtypes fit a kernel, the kernel computes it, and array calls elsewhere.
    """

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.kernels = Kernels(backend)

    def attention_block(
        self,
        x: Array,
        layer: Layer,
        cache: "LayerCache",
        positions: "Positions",
        n_last: int | None = None,
    ) -> Array:
        """One new token in each row: three kernels."""
        n_rows = x.shape[0]
        if (
            x.shape[1] == 1
            and gemv.fits(layer.qkv, n_rows)
            and gemv.fits(layer.wo, n_rows)
            and decode_attention.fits(cache)
        ):
            norm, eps = layer.attention_norm, layer.norm_eps
            qkv = gemv.gemv(self.kernels, layer.qkv, x, norm=norm, eps=eps)  # (B, 1, (H + 2K) C)
            o = decode_attention.attend(self.kernels, qkv, cache, positions)  # (B, 1, H*C)
            return gemv.gemv(self.kernels, layer.wo, o, residual=x)
        return super().attention_block(x, layer, cache, positions, n_last)

    def feed_forward(self, x: Array, layer: Layer) -> Array:
        """One new token in each row: two kernels."""
        n_rows = x.shape[0]
        if x.shape[1] == 1 and gemv.fits(layer.gate_up, n_rows) and gemv.fits(layer.w_down, n_rows):
            norm, eps = layer.ffn_norm, layer.norm_eps
            y = gemv.gemv(self.kernels, layer.gate_up, x, norm=norm, eps=eps, swiglu=True)
            return gemv.gemv(self.kernels, layer.w_down, y, residual=x)  # (B, 1, F) -> (B, 1, D)
        return super().feed_forward(x, layer)

    def head(self, x: Array, head: Head) -> Array:
        """One token in each row: one kernel."""
        if x.shape[1] == 1 and gemv.fits(head.lm_head, x.shape[0]):
            return gemv.gemv(self.kernels, head.lm_head, x, norm=head.norm, eps=head.norm_eps)
        return super().head(x, head)

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

    def cached_attention(
        self, q: Array, k: Array, v: Array, cache: "LayerCache", positions: "Positions"
    ) -> Array:
        """One new token in each row: by the positions on the device alone, as a captured step
        needs it. All rows attend together to the first `bucket` keys, of which those after a
        row's own position are hidden."""
        xp = self.xp
        if k.shape[1] > 1:
            return super().cached_attention(q, k, v, cache, positions)
        rows, starts = positions.device_rows, positions.device_starts  # (B,), (B,)
        cache.k[rows, :, starts] = k[:, 0]  # (B, 1, K, C) -> (B, K, C)
        cache.v[rows, :, starts] = v[:, 0]
        n_kv_heads, head_dim = k.shape[2:]
        keys = cache.k[rows, :, : positions.bucket].astype(q.dtype, copy=False)  # (B, K, N, C)
        values = cache.v[rows, :, : positions.bucket].astype(q.dtype, copy=False)
        grouped = q.reshape(len(q), n_kv_heads, -1, head_dim)  # (B, 1, H, C) -> (B, K, G, C)
        scores = grouped @ keys.swapaxes(2, 3) / math.sqrt(head_dim)  # (B, K, G, N)
        hidden = self.is_hidden(starts[:, None], xp.arange(positions.bucket)[None])  # (B, N)
        scores = xp.where(hidden[:, None, None], -math.inf, scores)
        o = self.softmax(scores) @ values  # (B, K, G, N) @ (B, K, N, C) -> (B, K, G, C)
        return o.reshape(len(q), 1, -1)  # (B, K, G, C) -> (B, 1, H*C)

    def forward_context(self, n_rows: int) -> AbstractContextManager:
        """The forward is queued on the backend's device, whatever thread runs it."""
        self.backend.use()
        return super().forward_context(n_rows)

    def cache_dtype(self, storage_dtype: np.dtype) -> np.dtype:
        """Keys and values are kept as the weights are; float16 beside int8 weights."""
        return format_of(storage_dtype).cache_dtype
