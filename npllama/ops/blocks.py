"""The upper level of ops: the four pieces of the model, each a short composition of equations.

Under sharding, a layer holds H, K and F of this shard; the residual stream is whole everywhere.
`all_reduce` and `all_gather` are then the only places where shards meet.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from npllama.backend import Array
from npllama.ops.sampling import SamplingEquations
from npllama.parameters import Head, Layer, Matrix

if TYPE_CHECKING:  # ops is given these and builds none of them
    from npllama.kv_cache import LayerCache, Positions

Part = TypeVar("Part", Matrix, Layer, Head)
Step = TypeVar("Step", bound=Callable)


class Ops(SamplingEquations):
    """The reference: all mathematics of the model for any `xp`.

    A block returns the new residual stream, (B, T, D) float32. An override may reuse its
    input's memory and the cache's scratch, so compare outputs and cache contents, not inputs.
    """

    # -- the model ---------------------------------------------------------------------------

    def embed(self, tokens: Array, embedding: Matrix) -> Array:
        """Token ids (B, T) -> residual stream (B, T, D), float32."""
        return self.embedding(tokens, embedding)

    def attention_block(
        self, x: Array, layer: Layer, cache: "LayerCache", positions: "Positions"
    ) -> Array:
        """x + Attention(RMSNorm(x)) W_o^T, writing the new keys and values to the cache.

        Args:
            x: (B, T, D); row b is the cache's row positions.rows[b].

        Returns:
            (B, T, D) in x's dtype.

        Source: Touvron et al. 2023a, section 2.2 (pre-normalization, as in GPT-3).
        """
        q, k, v = self.queries_keys_values(x, layer, positions)
        cache.write(k, v, positions)
        heads = []
        for b, (row, start) in enumerate(zip(positions.rows, positions.starts, strict=True)):
            end = start + positions.n_new  # N = S + T
            k_row, v_row = cache.k[row, :, :end], cache.v[row, :, :end]  # (K, N, C)
            q_row = q[b].swapaxes(0, 1)  # (T, H, C) -> (H, T, C)
            o = self.attention(q_row, k_row, v_row, cache.scratch)
            heads.append(o.swapaxes(0, 1))  # (H, T, C) -> (T, H, C)
        o = self.xp.stack(heads)  # B x (T, H, C) -> (B, T, H, C)
        o = o.reshape(*x.shape[:2], -1)  # (B, T, H, C) -> (B, T, H*C)
        return x + self.all_reduce(self.linear(o, layer.wo))

    def feed_forward(self, x: Array, layer: Layer) -> Array:
        """x + SwiGLU(RMSNorm(x)) W_down^T; (B, T, D) -> (B, T, D).

        Source: Shazeer 2020, equation 6; Touvron et al. 2023a, section 2.2.
        """
        h = self.rms_norm(x, layer.ffn_norm, layer.norm_eps)
        y = self.swiglu(self.linear(h, layer.w_gate), self.linear(h, layer.w_up))  # (B, T, F)
        return x + self.all_reduce(self.linear(y, layer.w_down))

    def head(self, x: Array, head: Head) -> Array:
        """Logits RMSNorm(x) W_head^T; (B, T, D) -> (B, T, V)."""
        h = self.rms_norm(x, head.norm, head.norm_eps)
        return self.all_gather(self.linear(h, head.lm_head))

    def attention_map(self, x: Array, layer: Layer, positions: "Positions") -> Array:
        """How attention_block divides each head's attention, for readers: (H, T, T).

        Computed from x (1, T, D) alone, as for a row without a past. Keys are not rounded to
        the cache's dtype here.
        """
        q, k, _ = self.queries_keys_values(x, layer, positions)
        return self.attention_weights(q[0].swapaxes(0, 1), k[0].swapaxes(0, 1))

    # -- shared by attention_block and attention_map ------------------------------------------

    def queries_keys_values(
        self, x: Array, layer: Layer, positions: "Positions"
    ) -> tuple[Array, Array, Array]:
        """RMSNorm(x), projected and, for q and k, rotated.

        Returns:
            q (B, T, H, C), k (B, T, K, C), v (B, T, K, C) in x's dtype.
        """
        heads = (*x.shape[:2], -1, 2 * positions.cos.shape[-1])  # (B, T, heads, C)
        h = self.rms_norm(x, layer.attention_norm, layer.norm_eps)
        q = self.linear(h, layer.wq).reshape(heads)  # (B, T, H*C) -> (B, T, H, C)
        k = self.linear(h, layer.wk).reshape(heads)  # (B, T, K*C) -> (B, T, K, C)
        v = self.linear(h, layer.wv).reshape(heads)
        q = self.rope(q, positions.cos, positions.sin)
        k = self.rope(k, positions.cos, positions.sin)
        return q, k, v

    # -- hooks: where a backend or several processes differ from this reference --------------

    def prepare(self, part: Part) -> Part:
        """The one place at load where weights are fused, uploaded or sharded."""
        return part.map(self.backend.to_device)

    def cache_dtype(self, storage_dtype: np.dtype) -> np.dtype:
        """The dtype in which keys and values are kept for weights of `storage_dtype`."""
        return np.dtype("float32")

    def scratch_size(self, n_heads: int, n_kv_heads: int, chunk: int, context: int) -> int:
        """float32 numbers of scratch to allocate with the cache; the reference needs none."""
        return 0

    def attention_nbytes(
        self, n_heads: int, n_kv_heads: int, head_dim: int, chunk: int, context: int
    ) -> int:
        """Bytes that `attention` holds for one row's chunk: here four arrays of all scores,
        (H, T, N), and the row's keys and values widened, (K, N, C) each."""
        return 4 * (4 * n_heads * chunk * context + 2 * n_kv_heads * context * head_dim)

    def compile(self, step: Step) -> Step:
        """A decode step, made fast to repeat; here the step itself."""
        return step

    def all_reduce(self, x: Array) -> Array:
        """Sum of all shards' partial x; with one shard x itself."""
        return x

    def all_gather(self, x: Array) -> Array:
        """The shards' slices of the last axis side by side; with one shard x itself."""
        return x
