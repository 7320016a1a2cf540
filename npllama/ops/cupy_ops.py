"""Faster blocks for CuPy: 16-bit products on tensor cores, and our own CUDA kernels."""

import math
from collections.abc import Hashable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np

from npllama.backend import Array, Backend
from npllama.ops.blocks import Ops, Part, Step, last
from npllama.ops.cuda import decode_attention, embedding, gemv, prompt
from npllama.ops.cuda import sampling as sampling_kernel
from npllama.ops.cuda.graph import DecodeSteps
from npllama.ops.cuda.kernels import Kernels
from npllama.ops.cuda.upload import upload
from npllama.parameters import Head, Layer, Matrix
from npllama.sampling_options import Sampling
from npllama.weight_formats import format_of

if TYPE_CHECKING:
    from npllama.kv_cache import LayerCache, Positions


class CupyOps(Ops):
    """Overrides for CUDA. Each computes the same result as the method of that name in Ops.

    If our CUDA kernels support the shapes and dtypes, cuBLAS computes the large matrix products,
    and the kernels compute everything else. Otherwise array calls compute the result.

    Args:
        graph: whether decode steps are captured as CUDA graphs.
    """

    def __init__(self, backend: Backend, graph: bool = True) -> None:
        super().__init__(backend)
        self.kernels = Kernels(backend)
        self.keeps_caches = graph

    def compile(
        self, step: Step, frozen: Hashable = None, constants: tuple[object, ...] = ()
    ) -> Step:
        """Return a callable that captures the step as a CUDA graph, and replays the graph.

        Steps that call cuBLAS are not captured, because CuPy cannot capture such calls.
        """
        return DecodeSteps(self.kernels, step, frozen, constants, is_on=self.keeps_caches)

    def attention_block(
        self,
        x: Array,
        layer: Layer,
        cache: "LayerCache",
        positions: "Positions",
        n_last: int | None = None,
    ) -> Array:
        """`Ops.attention_block`; it may overwrite x.

        For one new token per row and few rows, three kernels compute the block. Otherwise cuBLAS
        computes the products with W_qkv and W_o. For several tokens per row, cuBLAS also computes
        the products q k^T and P v. Kernels compute the rest.
        """
        if self._fits_step(x, layer.qkv, layer.wo) and decode_attention.fits(cache):
            norm, eps = layer.attention_norm, layer.norm_eps
            qkv = gemv.gemv(self.kernels, layer.qkv, x, norm=norm, eps=eps)  # (B, 1, (H + 2K) C)
            o = decode_attention.attend(self.kernels, qkv, cache, positions)  # (B, 1, H*C)
            return gemv.gemv(self.kernels, layer.wo, o, residual=x)
        if x.shape[1] == 1:
            fits = decode_attention.fits(cache)
        else:
            fits = prompt.fits_attention(self.kernels, cache, layer.wo)
        if fits and self._fits_prompt(x, layer.qkv, layer.wo):
            return self._attention_of_many(x, layer, cache, positions, n_last)
        return super().attention_block(x, layer, cache, positions, n_last)

    def _fits_step(self, x: Array, *weights: Matrix | None) -> bool:
        is_step = x.dtype == np.float32 and x.shape[1] == 1
        return is_step and all(gemv.fits(w, len(x)) for w in weights)

    def _fits_prompt(self, x: Array, *weights: Matrix | None) -> bool:
        return prompt.fits(self.kernels, x, *weights)

    def _attention_of_many(
        self,
        x: Array,
        layer: Layer,
        cache: "LayerCache",
        positions: "Positions",
        n_last: int | None,
    ) -> Array:
        """`Ops.attention_block` with 16-bit products, for many tokens M = B * T."""
        kernels, qkv, wo = self.kernels, layer.qkv, layer.wo
        x = self.xp.ascontiguousarray(x)
        h = prompt.normalized(kernels, x, layer.attention_norm, layer.norm_eps, qkv)  # (M, D)
        y = prompt.product(kernels, h, qkv)  # (M, D) -> (M, (H + 2K) C)
        if x.shape[1] > 1:
            o = prompt.attend(kernels, y, qkv, cache, positions, n_last)  # (B * n, H*C)
        else:
            y = qkv.format.scaled(qkv, y)[:, None]  # -> (B, 1, (H + 2K) C)
            o = decode_attention.attend(kernels, y, cache, positions)  # (B, 1, H*C)
            o = o[:, 0].astype(wo.format.operand_dtype)  # (B, 1, H*C) -> (B, H*C)
        return self._plus_product(last(x, n_last), o, wo)

    def _plus_product(self, x: Array, h: Array, w: Matrix) -> Array:
        """x + h W^T for h (M, D) with 16-bit elements; computed in-place if the model is not
        sharded."""
        if getattr(self.all_reduce, "__func__", None) is Ops.all_reduce:
            x = self.xp.ascontiguousarray(x)
            prompt.add_product(self.kernels, x, h, w)
            return x
        y = w.format.scaled(w, prompt.product(self.kernels, h, w))  # (M, O)
        return x + self.all_reduce(y.reshape(x.shape))

    def feed_forward(self, x: Array, layer: Layer) -> Array:
        """`Ops.feed_forward`; it may overwrite x.

        For one new token per row and few rows, two kernels compute the block. Otherwise cuBLAS
        computes the products with W_gate_up and W_down, and kernels compute the rest.
        """
        if self._fits_step(x, layer.gate_up, layer.w_down):
            norm, eps = layer.ffn_norm, layer.norm_eps
            y = gemv.gemv(self.kernels, layer.gate_up, x, norm=norm, eps=eps, swiglu=True)
            return gemv.gemv(self.kernels, layer.w_down, y, residual=x)  # (B, 1, F) -> (B, 1, D)
        if self._fits_prompt(x, layer.gate_up, layer.w_down):
            kernels, gate_up, w_down = self.kernels, layer.gate_up, layer.w_down
            x = self.xp.ascontiguousarray(x)
            h = prompt.normalized(kernels, x, layer.ffn_norm, layer.norm_eps, gate_up)  # (M, D)
            y = prompt.product(kernels, h, gate_up)  # (M, D) -> (M, 2F)
            y = prompt.swiglu(kernels, y, gate_up, w_down)  # (M, 2F) -> (M, F)
            return self._plus_product(x, y, w_down)
        return super().feed_forward(x, layer)

    def head(self, x: Array, head: Head) -> Array:
        """`Ops.head`: one kernel for one token per row and few rows, else a cuBLAS product."""
        w = head.lm_head
        if self._fits_step(x, w):
            return gemv.gemv(self.kernels, w, x, norm=head.norm, eps=head.norm_eps)
        if self._fits_prompt(x, w):
            x = self.xp.ascontiguousarray(x)
            h = prompt.normalized(self.kernels, x, head.norm, head.norm_eps, w)  # (M, D)
            y = w.format.scaled(w, prompt.product(self.kernels, h, w))  # (M, D) -> (M, V)
            return self.all_gather(y.reshape(*x.shape[:-1], -1))  # (M, V) -> (B, T, V)
        return super().head(x, head)

    def next_token(
        self,
        logits: Array,
        uniform: Array | None,
        sampling: Sampling,
        seen: Array | None = None,
        n_tokens: int | None = None,
        allowed: Array | None = None,
    ) -> tuple[Array, Array]:
        """`Ops.next_token` in one kernel, if that kernel supports these logits and filters."""
        arguments = (logits, uniform, sampling, seen, n_tokens, allowed)
        if sampling_kernel.fits(logits, sampling):
            return sampling_kernel.next_token(self.kernels, *arguments)
        return super().next_token(*arguments)

    def linear(self, x: Array, w: Matrix) -> Array:
        """y = x W^T in x's dtype. For 16-bit weights, x is first rounded to the dtype of W.

        Products of 16-bit elements accumulate in float32. Both operands are two-dimensional and
        have the same dtype, because CuPy would otherwise copy W^T before it calls cuBLAS. int8
        weights are widened, because CuPy's int8 products accumulate in int8 and overflow.
        """
        self.kernels.cublas.n_calls += 1
        dtype = w.format.product_dtype or x.dtype
        flat = x.reshape(-1, x.shape[-1]).astype(dtype, copy=False)  # (..., D) -> (M, D)
        y = flat @ w.format.unscaled(w, dtype).T  # (M, D) @ (D, O) -> (M, O)
        y = y.astype(x.dtype, copy=False)
        y = w.format.scaled(w, y)
        return y.reshape(*x.shape[:-1], w.shape[0])  # (M, O) -> (..., O)

    def cached_attention(
        self, q: Array, k: Array, v: Array, cache: "LayerCache", positions: "Positions"
    ) -> Array:
        """`Ops.cached_attention`, for all rows together if each row has one new token.

        It reads the positions only from the device, as `Ops.compile` requires. It computes the
        scores of the first positions.bucket keys of each row, and the mask hides the keys after the
        row's own position.
        """
        xp = self.xp
        if k.shape[1] > 1:
            return super().cached_attention(q, k, v, cache, positions)
        self.kernels.cublas.n_calls += 1
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

    def attention(self, q: Array, k: Array, v: Array, scratch: Array | None = None) -> Array:
        """`Ops.attention` for one part of the tokens at a time, so that it allocates at most
        `attention_nbytes`.

        The scores of a part are computed for the keys up to the position of its last token.
        """
        n_new, n_keys = q.shape[1], k.shape[1]
        at_once = prompt.queries_at_once(len(q) // len(k), n_keys)
        parts = []
        for begin in range(0, n_new, at_once):
            end = min(begin + at_once, n_new)
            keys = slice(n_keys - n_new + end)  # up to the position of the last token
            parts.append(super().attention(q[:, begin:end], k[:, keys], v[:, keys], scratch))
        return parts[0] if len(parts) == 1 else self.xp.concatenate(parts, axis=1)

    def embedding_backward(self, dx: Array, tokens: Array, w: Matrix) -> Array:
        """Sort the rows of dx by token id, and add up the rows with the same id.

        This reads dx once. The reference multiplies a (V, B*T) matrix by dx.
        """
        return embedding.embedding_backward(self.kernels, dx, tokens, w.shape[0])

    # -- hooks -----------------------------------------------------------------------------------

    def prefill_chunk(self) -> int:
        """More tokens than on the CPU, because smaller products leave parts of a large GPU idle."""
        return 2048

    def attention_nbytes(
        self,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        chunk: int,
        context: int,
        cache_dtype: np.dtype,
    ) -> int:
        """The maximum number of bytes that `attention` allocates for one chunk of one row, plus the
        bytes of one widened part of an int8 matrix.

        If kernels compute the attention of a prompt, they allocate less than `attention`.
        """
        at_once = prompt.queries_at_once(n_heads // n_kv_heads, context)
        nbytes = super().attention_nbytes(
            n_heads, n_kv_heads, head_dim, min(chunk, at_once), context, cache_dtype
        )
        return nbytes + 2 * prompt.WIDENED

    def prepare(self, part: Part, may_copy: bool = False) -> Part:
        """Upload a part of the model.

        On the device, wq, wk and wv are joined to one matrix, and w_gate and w_up to another. One
        call can then multiply by a whole joined matrix.
        """
        if isinstance(part, Layer):
            return upload(self.backend, part)
        return super().prepare(part, may_copy)

    def forward_context(self, n_rows: int) -> AbstractContextManager:
        """Select the backend's device, because each thread has its own current device in CuPy."""
        self.backend.use()
        return super().forward_context(n_rows)

    def cache_dtype(self, storage_dtype: np.dtype) -> np.dtype:
        """The dtype of the weights, or float16 for int8 weights."""
        return format_of(storage_dtype).cache_dtype
