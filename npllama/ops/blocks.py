"""The upper level of ops: the four pieces of the model, each a short composition of equations.

Under sharding, a layer holds H, K and F of this shard; the residual stream is whole everywhere.
`all_reduce` and `all_gather` are then the only places where shards meet.
"""

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from npllama.backend import Array
from npllama.ops.derivatives import Derivatives
from npllama.ops.sampling import SamplingEquations
from npllama.parameters import Head, Layer, Matrix

if TYPE_CHECKING:  # ops is given these and builds none of them
    from npllama.kv_cache import LayerCache, Positions

Part = TypeVar("Part", Matrix, Layer, Head)
Step = TypeVar("Step", bound=Callable)


class Ops(SamplingEquations, Derivatives):
    """The reference: all mathematics of the model for any `xp`.

    A block returns the new residual stream, (B, T, D) float32. An override may reuse its
    input's memory and the cache's scratch, so compare outputs and cache contents, not inputs.
    """

    # -- the model ---------------------------------------------------------------------------

    def embed(self, tokens: Array, embedding: Matrix) -> Array:
        """Token ids (B, T) -> residual stream (B, T, D), float32."""
        return self.embedding(tokens, embedding)

    def attention_block(
        self,
        x: Array,
        layer: Layer,
        cache: "LayerCache",
        positions: "Positions",
        n_last: int | None = None,
    ) -> Array:
        """x + Attention(RMSNorm(x)) W_o^T, writing the new keys and values to the cache.

        Args:
            x: (B, T, D); row b is the cache's row positions.rows[b].
            n_last: of how many of the T tokens, the last ones, the result is computed (n, at
                least 1; all where None). Keys and values are those of all.

        Returns:
            (B, n, D) in x's dtype.

        Source: Touvron et al. 2023a, section 2.2 (pre-normalization, as in GPT-3).
        """
        h = self.rms_norm(x, layer.attention_norm, layer.norm_eps)
        q, k, v = self.queries_keys_values(h, layer, positions, n_last)
        o = self.cached_attention(q, k, v, cache, positions)  # (B, n, H*C)
        return last(x, n_last) + self.all_reduce(self.linear(o, layer.wo))

    def cached_attention(
        self, q: Array, k: Array, v: Array, cache: "LayerCache", positions: "Positions"
    ) -> Array:
        """Write the new keys and values to the cache, and attend to all of each row's.

        Args:
            q: (B, n, H, C), of the last n of T tokens.
            k, v: (B, T, K, C); row b is the cache's row positions.rows[b].

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
        """Logits RMSNorm(x) W_head^T; (B, T, D) -> (B, T, V)."""
        h = self.rms_norm(x, head.norm, head.norm_eps)
        return self.all_gather(self.linear(h, head.lm_head))

    def attention_map(self, x: Array, layer: Layer, positions: "Positions") -> Array:
        """How attention_block divides each head's attention, for readers: (H, T, T).

        Computed from x (1, T, D) alone, as for a row without a past. Keys are not rounded to
        the cache's dtype here.
        """
        h = self.rms_norm(x, layer.attention_norm, layer.norm_eps)
        q, k, _ = self.queries_keys_values(h, layer, positions)
        return self.attention_weights(q[0].swapaxes(0, 1), k[0].swapaxes(0, 1))

    def queries_keys_values(
        self, h: Array, layer: Layer, positions: "Positions", n_last: int | None = None
    ) -> tuple[Array, Array, Array]:
        """The normalized stream h (B, T, D), projected and, for q and k, rotated.

        Returns:
            q (B, n, H, C) of the last n tokens, k (B, T, K, C), v (B, T, K, C) in h's dtype.
        """
        head_dim = 2 * positions.cos.shape[-1]

        def heads(x: Array, w: Matrix) -> Array:
            return self.linear(x, w).reshape(*x.shape[:2], -1, head_dim)

        q = heads(last(h, n_last), layer.wq)  # (B, n, D) -> (B, n, H, C)
        k, v = heads(h, layer.wk), heads(h, layer.wv)  # (B, T, D) -> (B, T, K, C)
        q = self.rope(q, last(positions.cos, n_last), last(positions.sin, n_last))
        k = self.rope(k, positions.cos, positions.sin)
        return q, k, v

    # -- the same blocks backwards -------------------------------------------------------------
    #
    # Each is given dy, the gradient of the loss with respect to its block's output, and the
    # block's input x; it computes again what the forward did not keep, and returns dx and the
    # gradients of the parameters it used, by their names in Layer or Head. All of a layer is on
    # one shard: training is not sharded.

    def attention_block_backward(
        self, dy: Array, x: Array, layer: Layer, positions: "Positions"
    ) -> tuple[Array, dict[str, Array]]:
        """Backwards through y = x + o W_o^T, o = Attention(q, k, v), q k v of h = RMSNorm(x).

        Args:
            dy, x: (B, T, D); rows without a past: S = 0.
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
        """Backwards through y = x + SwiGLU(h W_gate^T, h W_up^T) W_down^T, h = RMSNorm(x).

        Args:
            dy, x: (B, T, D).
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
        """Backwards through logits = h W_head^T, h = RMSNorm(x); dlogits (B, T, V)."""
        h = self.rms_norm(x, head.norm, head.norm_eps)
        dh, dlm_head = self.linear_backward(dlogits, h, head.lm_head)
        dx, dnorm = self.rms_norm_backward(dh, x, head.norm, head.norm_eps)
        return dx, {"norm": dnorm, "lm_head": dlm_head}

    # -- hooks: where a backend or several processes differ from this reference --------------

    def prepare(self, part: Part, may_copy: bool = False) -> Part:
        """The one place at load where weights are joined, uploaded or sharded.

        Args:
            may_copy: a backend that gains by matrices of one input side by side may copy them.
        """
        return part.map(self.backend.to_device)

    def forward_context(self, n_rows: int) -> AbstractContextManager:
        """The context that a forward of n_rows = B * T tokens runs in; here none."""
        return nullcontext()

    def turn(self) -> AbstractContextManager:
        """The context of several steps whose text nobody waits for; here none."""
        return nullcontext()

    def cache_dtype(self, storage_dtype: np.dtype) -> np.dtype:
        """The dtype in which keys and values are kept for weights of `storage_dtype`."""
        return np.dtype("float32")

    def prefill_chunk(self) -> int:
        """Prompt tokens in one forward: memory grows with this * context, not context^2."""
        return 512

    def scratch_size(self, n_heads: int, n_kv_heads: int, chunk: int, context: int) -> int:
        """float32 numbers of scratch to allocate with the cache; the reference needs none."""
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
        """Bytes that `attention` holds for one row's chunk: here four arrays of all scores,
        (H, T, N), and where the cache is narrower than float32, the row's keys and values
        widened, (K, N, C) each."""
        widened = 2 * n_kv_heads * context * head_dim if cache_dtype.itemsize < 4 else 0
        return 4 * (4 * n_heads * chunk * context + widened)

    keeps_caches = False
    """Whether a generation's cache is worth keeping for the next one: what `compile` has made of a
    step holds the addresses of the cache that it ran on."""

    def compile(
        self, step: Step, frozen: Hashable = None, constants: tuple[object, ...] = ()
    ) -> Step:
        """A decode step, made fast to repeat; here the step itself.

        Args:
            step: (state, cache, place) -> (ids, log_probs), and further arrays if it is asked
                for them.
            frozen: the Python values that the step depends on, and what else tells it from another
                step.
            constants: what it reads besides the state and the cache: arrays, and objects that hold
                some. They are told apart by identity.

        What a step may rely on and must keep, since a device captures it once and replays it, in
        later generations as well:

        - The arrays of `state` and of `cache`, and place.device_rows, are read and written at the
          same addresses at every call. Another number of rows is another state.
        - Python values are frozen as they were at the capture: place.rows and place.starts are
          not read. A capture serves all calls of the same state, place.bucket, `frozen` and
          `constants`.
        - All work of the step on the device happens inside, the counting of positions and of
          random numbers included; nothing moves between the host and the device.
        - The next call may overwrite the results: the host begins to copy them before it.
        """
        return step

    def all_reduce(self, x: Array) -> Array:
        """Sum of all shards' partial x, in memory that the caller may write to; with one shard
        x itself."""
        return x

    def all_gather(self, x: Array) -> Array:
        """The shards' slices of the last axis side by side; with one shard x itself."""
        return x


def last(x: Array, n: int | None) -> Array:
    """The last n of T tokens, all where None: (B, T, ...) -> (B, n, ...)."""
    return x if n is None else x[:, x.shape[1] - n :]
