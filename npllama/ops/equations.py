"""The paper, line by line: every equation of LLaMA-2 in plain array calls, once for any `xp`.

Letters: B batch, T new tokens, S cached positions, N = S + T keys, D width, H query heads,
K key-value heads, G = H / K, C head width, F ffn width, V vocabulary, L layers; of a plain matrix
product M rows and O outputs.

dtypes: every function computes in the dtype of the activations it is given (float32 in
the model, float64 in the tests), and widens a weight from its storage dtype to that.
"""

import math

from npllama.backend import Array, Backend
from npllama.config import LlamaConfig
from npllama.ops.rope_frequencies import Rotation, rotation
from npllama.parameters import Matrix


class Equations:
    """The lower level of ops. A backend overrides a method under the same signature."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.xp = backend.xp

    # -- embedding and projections ---------------------------------------------------------

    def embedding(self, tokens: Array, w: Matrix, dtype: str = "float32") -> Array:
        """Row `tokens[b, t]` of the embedding matrix:  x[b, t] = W[tokens[b, t]].

        Args:
            tokens: (B, T) integers in [0, V); checked on the host, since NumPy takes -1.
            w: (V, D) in any format; only the rows in use are widened.

        Returns:
            (B, T, D) in `dtype`.

        Source: Vaswani et al. 2017, section 3.4 (without the factor sqrt(D)).
        """
        return w.format.gather_rows(w, tokens, dtype)  # (V, D), (B, T) -> (B, T, D)

    def linear(self, x: Array, w: Matrix) -> Array:
        """Projection without bias:  y = x W^T.

        Args:
            x: (..., D).
            w: (O, D) in any format, widened whole to x's dtype; a scale multiplies the
                O outputs, since it is one factor a row of W.

        Returns:
            (..., O) in x's dtype.

        Source: Vaswani et al. 2017, section 3.2.2 (the W of "projections").
        """
        y = x @ w.format.unscaled(w, x.dtype).T  # (..., D) @ (D, O) -> (..., O)
        return w.format.scaled(w, y)

    # -- normalization -----------------------------------------------------------------------

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """Root mean square normalization:  y = x / sqrt(mean(x^2) + eps) * weight.

        Args:
            x: (..., D).
            weight: (D,).
            eps: inside the square root, as Meta and Hugging Face have it.

        Returns:
            (..., D) in x's dtype.

        Source: Zhang & Sennrich 2019, equation 4; LLaMA (Touvron et al. 2023a), section 2.2:
        the input of each sub-layer is normalized, not its output.
        """
        mean_square = (x * x).mean(axis=-1, keepdims=True)  # (..., D) -> (..., 1)
        return x / self.xp.sqrt(mean_square + eps) * weight.astype(x.dtype, copy=False)

    # -- rotary position embeddings ----------------------------------------------------------

    def rope_frequencies(self, config: LlamaConfig, context: int | None = None) -> Rotation:
        """How far each pair turns from one position to the next:  theta_i = theta^(-2i / C).

        A config with a `rope_scaling` has other frequencies, and yarn's an attention scaling;
        rope_frequencies.py has a function for each kind. Inference and training take them from
        here.

        Args:
            context: positions that the model has room for, which "dynamic" depends on; default
                the config's.

        Returns:
            (C/2,) float64, in radians, and the attention scaling, 1 for all kinds but yarn.

        Source: Su et al. 2021 (RoFormer), section 3.2.2, Theta = {theta_i}.
        """
        return rotation(self.xp, config, context or config.context_length)

    def rope_table(
        self, n_positions: int, rotation: Rotation, dtype: str = "float32"
    ) -> tuple[Array, Array]:
        """Cosine and sine of every rotation angle:  a cos(p theta_i), a sin(p theta_i).

        The angles are float64 and only the result is rounded: at position 4000 an angle in
        half precision would be off by more than a radian.

        Args:
            rotation: theta_i, (C/2,) float64, and the attention scaling a, from
                `rope_frequencies`.

        Returns:
            cos, sin: (n_positions, C/2) in `dtype`.

        Source: Su et al. 2021 (RoFormer), section 3.2.2.
        """
        xp = self.xp
        position = xp.arange(n_positions, dtype="float64")  # (n_positions,)
        angle = position[:, None] * rotation.frequencies[None, :]  # (n_positions, C/2)
        a = rotation.attention_scaling
        return (a * xp.cos(angle)).astype(dtype), (a * xp.sin(angle)).astype(dtype)

    def rope(self, x: Array, cos: Array, sin: Array) -> Array:
        """Turn the pair (x_i, x_{i+C/2}) of each head by its position's angle_i:

            y_i       = x_i cos_i - x_{i+C/2} sin_i
            y_{i+C/2} = x_{i+C/2} cos_i + x_i sin_i

        Pairs are (i, i + C/2), Hugging Face's row order; Meta's files pair (2i, 2i+1), and the
        converter permutes their wq and wk once.

        Args:
            x: (B, T, heads, C), queries or keys.
            cos, sin: (B, T, C/2), the table's rows at each token's position.

        Returns:
            (B, T, heads, C) in x's dtype. The norm of each head is kept (yarn multiplies it),
            and q . k depends on the distance of their positions alone.

        Source: Su et al. 2021, equation 34.
        """
        half = x.shape[-1] // 2
        first, second = x[..., :half], x[..., half:]  # (B, T, heads, C) -> 2 x (B, T, heads, C/2)
        cos = cos[:, :, None, :].astype(x.dtype, copy=False)  # (B, T, C/2) -> (B, T, 1, C/2)
        sin = sin[:, :, None, :].astype(x.dtype, copy=False)
        turned = (first * cos - second * sin, second * cos + first * sin)
        return self.xp.concatenate(turned, axis=-1)  # 2 x (B, T, heads, C/2) -> (B, T, heads, C)

    # -- attention ---------------------------------------------------------------------------

    def softmax(self, x: Array) -> Array:
        """p_i = exp(x_i - max x) / sum_j exp(x_j - max x) over the last axis; shape (...), as x.

        The largest exponent is 0, so nothing overflows; -inf gives 0. At least one entry of
        each row is finite.

        Source: Vaswani et al. 2017, equation 1; the shift changes nothing but the rounding.
        """
        e = self.xp.exp(x - x.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)

    def log_softmax(self, x: Array) -> Array:
        """log p_i = x_i - max x - log sum_j exp(x_j - max x) over the last axis; shape (...), as x.

        Source: the logarithm of Vaswani et al. 2017, equation 1, as `softmax` shifts it.
        """
        x = x - x.max(axis=-1, keepdims=True)
        return x - self.xp.log(self.xp.exp(x).sum(axis=-1, keepdims=True))

    def is_hidden(self, query: Array, key: Array) -> Array:
        """The mask: a query sees the keys up to its own position.

        Nothing else says which keys a query sees. It never sees a later key: overrides leave out
        the keys after their last query.

        Args:
            query, key: positions, integers whose shapes broadcast.

        Returns:
            bool, where the query at position `query` does not see the key at position `key`.

        Source: Vaswani et al. 2017, section 3.2.3 ("masking out").
        """
        return key > query

    def hidden_keys(self, n_new: int, n_keys: int) -> Array | None:
        """`is_hidden` for the last T of N = S + T positions.

        Returns:
            (T, M) bool, for the last M of the keys: True where query t does not see the key.
            Every query sees all keys before those; here M = T, the new ones. None where every
            query sees every key.
        """
        if n_new == 1:  # the last position comes after every other
            return None
        position = self.xp.arange(n_new)  # after S
        return self.is_hidden(position[:, None], position[None, :])  # (T, 1), (1, T) -> (T, T)

    def attention_weights(self, q: Array, k: Array) -> Array:
        """Attention of grouped queries:  P = softmax(q k^T / sqrt(C) + mask).

        The T queries are the last T of the N = S + T positions; `hidden_keys` is the mask.
        G = H / K neighbouring query heads share a key head and are viewed beside it, so no key
        is repeated. G = 1 is multi-head, K = 1 multi-query attention.

        Args:
            q: (H, T, C), rotated.
            k: (K, N, C), rotated.

        Returns:
            (H, T, N) in q's dtype; each row sums to 1.

        Source: Vaswani et al. 2017, equation 1; Ainslie et al. 2023 (GQA), section 2.2.
        """
        n_heads, n_new, head_dim = q.shape
        n_kv_heads, n_keys, _ = k.shape
        k = k.astype(q.dtype, copy=False)
        grouped = q.reshape(n_kv_heads, -1, head_dim)  # (H, T, C) -> (K, G*T, C)
        scores = grouped @ k.swapaxes(-1, -2)  # (K, G*T, C) @ (K, C, N) -> (K, G*T, N)
        scores = scores.reshape(n_heads, n_new, n_keys) / math.sqrt(head_dim)  # -> (H, T, N)
        hidden = self.hidden_keys(n_new, n_keys)
        if hidden is not None:
            masked = scores[..., n_keys - hidden.shape[1] :]  # (H, T, M)
            masked[...] = self.xp.where(hidden, -math.inf, masked)
        return self.softmax(scores)

    def weighted_values(self, p: Array, v: Array) -> Array:
        """o = P v, each query head with the values of its key head.

        Args:
            p: (H, T, N).
            v: (K, N, C).

        Returns:
            (H, T, C) in p's dtype.

        Source: Vaswani et al. 2017, equation 1; Ainslie et al. 2023 (GQA), section 2.2.
        """
        n_heads, n_new, n_keys = p.shape
        n_kv_heads, _, head_dim = v.shape
        grouped = p.reshape(n_kv_heads, -1, n_keys)  # (H, T, N) -> (K, G*T, N)
        o = grouped @ v.astype(p.dtype, copy=False)  # (K, G*T, N) @ (K, N, C) -> (K, G*T, C)
        return o.reshape(n_heads, n_new, head_dim)  # (K, G*T, C) -> (H, T, C)

    def attention(self, q: Array, k: Array, v: Array, scratch: Array | None = None) -> Array:
        """What each head reads:  o = softmax(q k^T / sqrt(C) + mask) v.

        Args:
            q: (H, T, C), rotated.
            k: (K, N, C), rotated; N = S + T, the new tokens' keys included.
            v: (K, N, C).
            scratch: (n,) room for scores, which an override may use and this ignores.

        Returns:
            (H, T, C) in q's dtype.

        Source: Vaswani et al. 2017, equation 1; Ainslie et al. 2023 (GQA), section 2.2.
        """
        return self.weighted_values(self.attention_weights(q, k), v)

    # -- feed-forward ------------------------------------------------------------------------

    def sigmoid(self, x: Array) -> Array:
        """1 / (1 + e^-x) for x >= 0 and e^x / (1 + e^x) below, elementwise, shape (...).

        The two are equal, and no exponent is above 0, so nothing overflows.
        """
        xp = self.xp
        e = xp.exp(-xp.abs(x))
        return xp.where(x >= 0, 1.0, e) / (1.0 + e)

    def silu(self, x: Array) -> Array:
        """x * sigmoid(x), elementwise, shape (...); also called Swish with beta = 1.

        Source: Elfwing et al. 2017, equation 5; Ramachandran et al. 2017.
        """
        return x * self.sigmoid(x)

    def swiglu(self, gate: Array, up: Array) -> Array:
        """SiLU(gate) * up, elementwise: gate = x W_gate^T, up = x W_up^T, all (..., F).

        Source: Shazeer 2020 (GLU variants), equation 6; w_gate is Meta's w1, w_up its w3.
        """
        return self.silu(gate) * up

    # -- loss --------------------------------------------------------------------------------

    def cross_entropy(self, logits: Array, targets: Array) -> Array:
        """Surprise at each token that came:  loss = -log softmax(logits)[target], in nats.

        Args:
            logits: (..., V).
            targets: (...) integers in [0, V), the token after each position.

        Returns:
            (...) in the dtype of the logits.

        Source: Shannon 1948, section 6; Bengio et al. 2003 (neural language models), section 2.
        """
        log_p = self.log_softmax(logits)
        chosen = self.xp.take_along_axis(log_p, targets[..., None], axis=-1)  # (..., V) -> (..., 1)
        return -chosen[..., 0]
