"""The four blocks of the model (embedding, attention, feed-forward, head), composed of equations.

A layer of the model consists of an attention block and a feed-forward block. Each adds its result
to the residual stream (B, T, D).

A model can be sharded over several devices. Each shard then has some of the heads and ffn elements
of every layer, and H, K and F count only these. Every shard has the whole residual stream. Shards
communicate only in `all_reduce` and `all_gather`.
"""

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from npllama.backend import Array
from npllama.ops.derivatives import Derivatives
from npllama.ops.sampling import SamplingEquations
from npllama.parameters import Head, Layer, Matrix

if TYPE_CHECKING:  # ops receives these as arguments and never constructs them
    from npllama.kv_cache import LayerCache, Positions

Part = TypeVar("Part", Matrix, Layer, Head)
Step = TypeVar("Step", bound=Callable)


class Ops(SamplingEquations, Derivatives):
    """The reference implementation of all mathematics of the model, for any `xp`.

    `embed`, `attention_block` and `feed_forward` return the new residual stream, and `head` returns
    the logits. A backend's override of a block may overwrite its argument x and the scratch memory
    of the KV cache. After a call, callers may therefore use only the result and the cached keys and
    values.
    """

    # -- the blocks --------------------------------------------------------------------------

    def embed(self, tokens: Array, embedding: Matrix) -> Array:
        """The residual stream before the first layer: token ids (B, T) -> (B, T, D) float32."""
        return self.embedding(tokens, embedding)

    def attention_block(
        self,
        x: Array,
        layer: Layer,
        cache: "LayerCache",
        positions: "Positions",
        n_last: int | None = None,
    ) -> Array:
        """x + Attention(RMSNorm(x)) W_o^T; also writes the new keys and values to the cache.

        Args:
            x: (B, T, D). Row b of x belongs to row positions.rows[b] of the cache.
            n_last: compute the result only for the last n_last of the T tokens (at least 1); None
                means all T. The keys and values of all T tokens are written in either case.

        Returns:
            (B, n, D) in x's dtype, where n is n_last or T.

        Source: Touvron et al. 2023a, section 2.2 (pre-normalization, as in GPT-3).
        """
        h = self.rms_norm(x, layer.attention_norm, layer.norm_eps)
        q, k, v = self.queries_keys_values(h, layer, positions, n_last)
        o = self.cached_attention(q, k, v, cache, positions)  # (B, n, H*C)
        return last(x, n_last) + self.all_reduce(self.linear(o, layer.wo))

    def cached_attention(
        self, q: Array, k: Array, v: Array, cache: "LayerCache", positions: "Positions"
    ) -> Array:
        """Write the new keys and values to the cache, and attend to all cached keys of each row.

        Args:
            q: (B, n, H, C), the queries of the last n of T tokens.
            k, v: (B, T, K, C). Row b belongs to row positions.rows[b] of the cache.

        Returns:
            (B, n, H*C) in q's dtype.
        """
        cache.write(k, v, positions)
        heads = []
        for b, (row, start) in enumerate(zip(positions.rows, positions.starts, strict=True)):
            end = start + positions.n_new  # N = S + T
            k_row, v_row = cache.k[row, :, :end], cache.v[row, :, :end]  # (K, N, C)
            q_row = q[b].swapaxes(0, 1)  # (n, H, C) -> (H, n, C)
            o = self.attention(q_row, k_row, v_row, cache.scratch)
            heads.append(o.swapaxes(0, 1)[None])  # (H, n, C) -> (1, n, H, C)
        o = self.xp.concatenate(heads)  # B x (1, n, H, C) -> (B, n, H, C)
        return o.reshape(*o.shape[:2], -1)  # (B, n, H, C) -> (B, n, H*C)

    def feed_forward(self, x: Array, layer: Layer) -> Array:
        """x + SwiGLU(RMSNorm(x)) W_down^T; (B, T, D) -> (B, T, D).

        Source: Shazeer 2020, equation 6; Touvron et al. 2023a, section 2.2.
        """
        h = self.rms_norm(x, layer.ffn_norm, layer.norm_eps)
        y = self.swiglu(self.linear(h, layer.w_gate), self.linear(h, layer.w_up))  # (B, T, F)
        return x + self.all_reduce(self.linear(y, layer.w_down))

    def head(self, x: Array, head: Head) -> Array:
        """The logits RMSNorm(x) W_head^T; (B, T, D) -> (B, T, V)."""
        h = self.rms_norm(x, head.norm, head.norm_eps)
        return self.all_gather(self.linear(h, head.lm_head))

    def attention_map(self, x: Array, layer: Layer, positions: "Positions") -> Array:
        """The attention weights of each head in `attention_block`, for display.

        The weights can differ slightly from those that `attention_block` computes, because this
        method uses no cache and so does not round the keys to the cache's dtype.

        Args:
            x: (1, T, D), the input of the block for one row without cached positions (S = 0).

        Returns:
            (H, T, T) in x's dtype.
        """
        h = self.rms_norm(x, layer.attention_norm, layer.norm_eps)
        q, k, _ = self.queries_keys_values(h, layer, positions)
        return self.attention_weights(q[0].swapaxes(0, 1), k[0].swapaxes(0, 1))

    def queries_keys_values(
        self, h: Array, layer: Layer, positions: "Positions", n_last: int | None = None
    ) -> tuple[Array, Array, Array]:
        """Project the normalized stream h (B, T, D) to q, k and v, and rotate q and k.

        Returns:
            q (B, n, H, C) for the last n tokens, k (B, T, K, C) and v (B, T, K, C), in h's dtype.
        """
        head_dim = 2 * positions.cos.shape[-1]

        def heads(x: Array, w: Matrix) -> Array:
            return self.linear(x, w).reshape(*x.shape[:2], -1, head_dim)

        q = heads(last(h, n_last), layer.wq)  # (B, n, D) -> (B, n, H, C)
        k, v = heads(h, layer.wk), heads(h, layer.wv)  # (B, T, D) -> (B, T, K, C)
        q = self.rope(q, last(positions.cos, n_last), last(positions.sin, n_last))
        k = self.rope(k, positions.cos, positions.sin)
        return q, k, v

    # -- backward passes of the blocks ---------------------------------------------------------
    #
    # Each method takes dy, the gradient of the loss with respect to the block's output, and x, the
    # block's input. The forward pass keeps no intermediate results, so the method computes them
    # again. It returns dx, the gradient with respect to x, and the gradients of the block's
    # parameters under their names in Layer or Head. Training does not support shards, so there is
    # no `all_reduce` here.

    def attention_block_backward(
        self, dy: Array, x: Array, layer: Layer, positions: "Positions"
    ) -> tuple[Array, dict[str, Array]]:
        """The backward pass of y = x + Attention(q, k, v) W_o^T.

        q, k and v are the projections of h = RMSNorm(x).

        Args:
            dy, x: (B, T, D). Rows have no cached positions (S = 0).

        Returns:
            dx (B, T, D), and the gradients of attention_norm, wq, wk, wv and wo.
        """
        h = self.rms_norm(x, layer.attention_norm, layer.norm_eps)
        q, k, v = self.queries_keys_values(h, layer, positions)
        p, o = [], []
        for b in range(len(x)):
            q_row, k_row, v_row = (a[b].swapaxes(0, 1) for a in (q, k, v))  # -> (heads, T, C)
            p.append(self.attention_weights(q_row, k_row))  # (H, T, T)
            o.append(self.weighted_values(p[b], v_row).swapaxes(0, 1))  # -> (T, H, C)
        o = self.xp.stack(o)  # B x (T, H, C) -> (B, T, H, C)
        do, dwo = self.linear_backward(dy, o.reshape(*x.shape[:2], -1), layer.wo)
        do = do.reshape(o.shape)  # (B, T, H*C) -> (B, T, H, C)
        dq, dk, dv = [], [], []
        for b in range(len(x)):
            do_row, q_row, k_row, v_row = (a[b].swapaxes(0, 1) for a in (do, q, k, v))
            rows = self.attention_backward(do_row, q_row, k_row, v_row, p[b])
            for gradients, row in zip((dq, dk, dv), rows, strict=True):
                gradients.append(row.swapaxes(0, 1))  # (heads, T, C) -> (T, heads, C)
        dq, dk, dv = (self.xp.stack(a) for a in (dq, dk, dv))  # B x (T, heads, C) -> (B, ...)
        dq = self.rope_backward(dq, positions.cos, positions.sin)
        dk = self.rope_backward(dk, positions.cos, positions.sin)
        dq, dk, dv = (a.reshape(*x.shape[:2], -1) for a in (dq, dk, dv))  # -> (B, T, heads*C)
        dh_q, dwq = self.linear_backward(dq, h, layer.wq)
        dh_k, dwk = self.linear_backward(dk, h, layer.wk)
        dh_v, dwv = self.linear_backward(dv, h, layer.wv)
        dx, dnorm = self.rms_norm_backward(
            dh_q + dh_k + dh_v, x, layer.attention_norm, layer.norm_eps
        )
        return dy + dx, {"attention_norm": dnorm, "wq": dwq, "wk": dwk, "wv": dwv, "wo": dwo}

    def feed_forward_backward(
        self, dy: Array, x: Array, layer: Layer
    ) -> tuple[Array, dict[str, Array]]:
        """The backward pass of y = x + SwiGLU(h W_gate^T, h W_up^T) W_down^T, h = RMSNorm(x).

        Args:
            dy, x: (B, T, D).

        Returns:
            dx (B, T, D), and the gradients of ffn_norm, w_gate, w_up and w_down.
        """
        h = self.rms_norm(x, layer.ffn_norm, layer.norm_eps)
        gate, up = self.linear(h, layer.w_gate), self.linear(h, layer.w_up)  # (B, T, F)
        dz, dw_down = self.linear_backward(dy, self.swiglu(gate, up), layer.w_down)
        dgate, dup = self.swiglu_backward(dz, gate, up)
        dh_gate, dw_gate = self.linear_backward(dgate, h, layer.w_gate)
        dh_up, dw_up = self.linear_backward(dup, h, layer.w_up)
        dx, dnorm = self.rms_norm_backward(dh_gate + dh_up, x, layer.ffn_norm, layer.norm_eps)
        return dy + dx, {"ffn_norm": dnorm, "w_gate": dw_gate, "w_up": dw_up, "w_down": dw_down}

    def head_backward(self, dlogits: Array, x: Array, head: Head) -> tuple[Array, dict[str, Array]]:
        """The backward pass of logits = h W_head^T, h = RMSNorm(x).

        Args:
            dlogits: (B, T, V).
            x: (B, T, D).

        Returns:
            dx (B, T, D), and the gradients of norm and lm_head.
        """
        h = self.rms_norm(x, head.norm, head.norm_eps)
        dh, dlm_head = self.linear_backward(dlogits, h, head.lm_head)
        dx, dnorm = self.rms_norm_backward(dh, x, head.norm, head.norm_eps)
        return dx, {"norm": dnorm, "lm_head": dlm_head}

    # -- hooks that a backend or a sharded model overrides -----------------------------------

    def prepare(self, part: Part, may_copy: bool = False) -> Part:
        """Prepare a part of the model for computation, while the model is loaded or initialized.

        This implementation moves the arrays to the device. Overrides may also join or shard the
        matrices.

        Args:
            may_copy: whether matrices with the same input, such as wq, wk and wv, may be copied in
                order to join them.
        """
        return part.map(self.backend.to_device)

    def forward_context(self, n_rows: int) -> AbstractContextManager:
        """The context manager that a caller holds during a forward pass over n_rows = B * T tokens.
        This implementation does nothing."""
        return nullcontext()

    def turn(self) -> AbstractContextManager:
        """The context manager that a generation holds during a turn, which is several consecutive
        steps. An override may make the generations of other threads wait until the turn ends. This
        implementation does nothing."""
        return nullcontext()

    def cache_dtype(self, storage_dtype: np.dtype) -> np.dtype:
        """The dtype of cached keys and values for weights of `storage_dtype`. This implementation
        always returns float32."""
        return np.dtype("float32")

    def prefill_chunk(self) -> int:
        """The maximum number of prompt tokens per forward pass.

        This limits the attention scores of a head to prefill_chunk() * context elements. Without
        chunks, they could have context^2 elements.
        """
        return 512

    def scratch_size(self, n_heads: int, n_kv_heads: int, chunk: int, context: int) -> int:
        """The number of float32 elements of scratch memory to allocate with the KV cache. This
        implementation needs none."""
        return 0

    def attention_nbytes(
        self,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        chunk: int,
        context: int,
        cache_dtype: np.dtype,
    ) -> int:
        """The maximum number of bytes that `attention` allocates for one chunk of one row.

        The result counts four arrays of scores (H, T, N), for T = chunk and N = context. At most
        three exist at the same time, and the fourth is a reserve. If the elements of the cache are
        smaller than float32, the result also counts widened copies of the row's keys and values,
        (K, N, C) each.
        """
        widened = 2 * n_kv_heads * context * head_dim if cache_dtype.itemsize < 4 else 0
        return 4 * (4 * n_heads * chunk * context + widened)

    keeps_caches = False
    """Whether the next generation should reuse the KV cache of the previous one. A backend that
    captures decode steps (see `compile`) needs this, because a captured step contains the addresses
    of its KV cache and can be replayed only with that cache."""

    def compile(
        self, step: Step, frozen: Hashable = None, constants: tuple[object, ...] = ()
    ) -> Step:
        """Return a version of a decode step that is fast to repeat. This implementation returns the
        step itself.

        A step is called as step(state, cache, place). `state` has the device arrays of the rows
        that are decoded (see StepState). `place` has their positions (see Place), and place.bucket
        is an upper bound of the number of keys.

        An override may capture the step: it records, once, the operations that the step launches on
        the device. Later calls, also those of later generations, replay the recorded operations
        (the capture) and do not run the step's Python code. The step and its caller must therefore
        follow these rules:

        - The arrays of `state` and `cache`, and place.device_rows, have the same addresses in every
          call. A different number of rows needs a different state.
        - A replay repeats the operations with the Python values that the step had when it was
          captured. The step must therefore not read place.rows and place.starts, which change from
          call to call. Two calls share a capture if they have the same state, cache,
          place.device_rows and constants, and equal place.bucket and `frozen`.
        - The step does all its work on the device, and advances the positions and the counters of
          random numbers there. It copies nothing between the host and the device.
        - The next call may overwrite the results of this one. The caller must start to copy them
          before the next call.

        Args:
            step: the function. It returns a tuple of arrays.
            frozen: the Python values that the step depends on, and anything else that
                distinguishes it from other steps.
            constants: the arrays, and objects with arrays, that the step reads besides the state
                and the cache. They are compared by identity.
        """
        return step

    def all_reduce(self, x: Array) -> Array:
        """The sum of x over all shards, in memory that the caller may overwrite. With one shard it
        is x itself."""
        return x

    def all_gather(self, x: Array) -> Array:
        """The arrays x of all shards, concatenated along the last axis. With one shard it is x
        itself."""
        return x


def last(x: Array, n: int | None) -> Array:
    """The last n of T tokens, or all if n is None: (B, T, ...) -> (B, n, ...)."""
    return x if n is None else x[:, x.shape[1] - n :]
