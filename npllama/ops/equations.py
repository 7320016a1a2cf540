"""The equations of LLaMA-2 in plain array calls, written once for any array module `xp`.

Letters: B batch, T new tokens, S cached positions, N = S + T keys, D width, H query heads,
K key-value heads, G = H / K, C head width, F ffn width, V vocabulary, L layers. In a plain matrix
product, M is the number of rows, and O the number of outputs per row.

dtypes: every method computes in the dtype of its activations (float32 in the model, float64 in
the tests), and widens a weight from its storage dtype to that dtype.
"""

import math

from npllama.backend import Array, Backend
from npllama.config import LlamaConfig
from npllama.ops.rope_frequencies import Rotation, rotation
from npllama.parameters import Matrix


class Equations:
    """The equations, from which blocks.py composes the blocks of the model.

    A backend may override a method. The override has the same signature, and the same result up to
    rounding.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.xp = backend.xp

    # -- embedding and projections ---------------------------------------------------------

    def embedding(self, tokens: Array, w: Matrix, dtype: str = "float32") -> Array:
        """The embedding of each token:  x[b, t] = W[tokens[b, t]].

        Args:
            tokens: (B, T) integers in [0, V). The caller checks the range, because NumPy accepts
                negative indices.
            w: (V, D) in any format. Only the rows of the given tokens are widened.

        Returns:
            (B, T, D) in `dtype`.

        Source: Vaswani et al. 2017, section 3.4 (without the factor sqrt(D)).
        """
        return w.format.gather_rows(w, tokens, dtype)  # (V, D), (B, T) -> (B, T, D)

    def linear(self, x: Array, w: Matrix) -> Array:
        """Projection without bias:  y = x W^T.

        Args:
            x: (..., D).
            w: (O, D) in any format. The whole matrix is widened to x's dtype. A quantized format
                (int8) also has a scale, which is one factor per row of W. x is then multiplied by
                the unscaled W, and each output by the factor of its row.

        Returns:
            (..., O) in x's dtype.

        Source: Vaswani et al. 2017, section 3.2.2 (the projection matrices W).
        """
        y = x @ w.format.unscaled(w, x.dtype).T  # (..., D) @ (D, O) -> (..., O)
        return w.format.scaled(w, y)

    # -- normalization -----------------------------------------------------------------------

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """Root mean square normalization:  y = x / sqrt(mean(x^2) + eps) * weight.

        Args:
            x: (..., D).
            weight: (D,).
            eps: added inside the square root, as in Meta's and Hugging Face's code.

        Returns:
            (..., D) in x's dtype.

        Source: Zhang & Sennrich 2019, equation 4; Touvron et al. 2023a (LLaMA), section 2.2, which
        normalizes the input of each sub-layer and not its output.
        """
        mean_square = (x * x).mean(axis=-1, keepdims=True)  # (..., D) -> (..., 1)
        return x / self.xp.sqrt(mean_square + eps) * weight.astype(x.dtype, copy=False)

    # -- rotary position embeddings ----------------------------------------------------------

    def rope_frequencies(self, config: LlamaConfig, context: int | None = None) -> Rotation:
        """The frequency of each pair of elements of a head:  theta_i = theta^(-2i / C).

        `rope` rotates pair i by the angle theta_i per position. The base theta is the config's
        rope_theta. The config's `rope_scaling` changes the frequencies, and its kind "yarn" also
        scales the attention scores. rope_frequencies.py has one function for each kind.

        Args:
            context: the maximum number of positions, by default the config's. Only the
                frequencies of the kind "dynamic" depend on it.

        Returns:
            The frequencies, (C/2,) float64 in radians per position, and the attention scaling,
            which is 1 for all kinds except "yarn".

        Source: Su et al. 2021 (RoFormer), section 3.2.2, Theta = {theta_i}.
        """
        return rotation(self.xp, config, context or config.context_length)

    def rope_table(
        self, n_positions: int, rotation: Rotation, dtype: str = "float32"
    ) -> tuple[Array, Array]:
        """Scaled cosine and sine of every rotation angle:  a cos(p theta_i), a sin(p theta_i).

        p is the position, theta_i the frequency of pair i, and a the attention scaling.

        The angles are computed in float64, and only the results are rounded to `dtype`. In half
        precision, the rounding error of an angle of 4000 radians can be one radian.

        Args:
            rotation: the frequencies, (C/2,) float64, and the attention scaling, as returned by
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
        """Rotate pair i of a head, (x_i, x_{i+C/2}), by the pair's angle at the token's position:

            y_i       = x_i cos_i - x_{i+C/2} sin_i
            y_{i+C/2} = x_{i+C/2} cos_i + x_i sin_i

        Element i is paired with element i + C/2, because the rows of wq and wk are in the order of
        Hugging Face. In Meta's files, element 2i is paired with element 2i + 1. The converter
        therefore permutes the rows of wq and wk in these files.

        Args:
            x: (B, T, heads, C), queries or keys.
            cos, sin: (B, T, C/2), the rows of the table at each token's position.

        Returns:
            (B, T, heads, C) in x's dtype. The rotation preserves the norm of each head, unless
            cos and sin include yarn's attention scaling. The product q . k of a rotated query and
            a rotated key depends on their positions only through the difference of the positions.

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
        """Softmax over the last axis:  p_i = exp(x_i - max x) / sum_j exp(x_j - max x).

        Subtracting the maximum changes only the rounding, and prevents overflow because the
        largest exponent is then 0.

        Args:
            x: (...), with at least one finite element along the last axis. The softmax of an
                element -inf is 0.

        Returns:
            The shape and dtype of x.

        Source: Vaswani et al. 2017, equation 1.
        """
        e = self.xp.exp(x - x.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)

    def log_softmax(self, x: Array) -> Array:
        """log softmax(x) over the last axis:  x_i - max x - log sum_j exp(x_j - max x).

        Args:
            x: (...), with at least one finite element along the last axis.

        Returns:
            The shape and dtype of x.

        Source: the logarithm of Vaswani et al. 2017, equation 1.
        """
        x = x - x.max(axis=-1, keepdims=True)
        return x - self.xp.log(self.xp.exp(x).sum(axis=-1, keepdims=True))

    def is_hidden(self, query: Array, key: Array) -> Array:
        """The causal mask: a query attends to the keys up to and including its own position.

        `hidden_keys` applies this mask to the T new positions, and assumes that every query attends
        to all cached keys. A mask that hides cached keys too, such as a sliding window, must
        override both methods. The CUDA kernels compute the causal mask themselves.

        A changed mask must still hide all keys after the query, because the backends' overrides of
        `attention` process the queries in parts, and compute no scores for keys after the last
        query of a part.

        Args:
            query, key: positions, integers whose shapes broadcast.

        Returns:
            bool in the broadcast shape, True where the query may not attend to the key.

        Source: Vaswani et al. 2017, section 3.2.3 ("masking out").
        """
        return key > query

    def hidden_keys(self, n_new: int, n_keys: int) -> Array | None:
        """The mask of the last T of N = S + T positions, from `is_hidden`.

        Args:
            n_new: T.
            n_keys: N.

        Returns:
            (T, n) bool for some n <= N: one row per query, and one column for each of the last n
            keys. An element is True where the query may not attend to the key. Every query attends
            to all keys before the last n. This implementation sets n = T: the columns are the T
            new keys. The result is None if every query attends to every key.
        """
        if n_new == 1:  # the last position attends to all positions
            return None
        position = self.xp.arange(n_new)  # relative to S
        return self.is_hidden(position[:, None], position[None, :])  # (T, 1), (1, T) -> (T, T)

    def attention_weights(self, q: Array, k: Array) -> Array:
        """Attention weights of grouped queries:  P = softmax(q k^T / sqrt(C) + mask).

        The T queries are at the last T of the N = S + T positions. The mask adds -inf to the score
        of each key that `hidden_keys` hides from the query. G = H / K consecutive query heads share
        one key head. Reshaping the queries to (K, G*T, C) avoids a copy of the keys for each query
        head. G = 1 is multi-head attention, and K = 1 is multi-query attention.

        Args:
            q: (H, T, C), rotated.
            k: (K, N, C), rotated.

        Returns:
            (H, T, N) in q's dtype. The N weights of each query sum to 1.

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
            masked = scores[..., n_keys - hidden.shape[1] :]  # (H, T, columns of the mask)
            masked[...] = self.xp.where(hidden, -math.inf, masked)
        return self.softmax(scores)

    def weighted_values(self, p: Array, v: Array) -> Array:
        """The weighted sum of the values:  o = P v, where G query heads share one value head.

        Args:
            p: (H, T, N), from `attention_weights`.
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
        """Attention of grouped queries:  o = softmax(q k^T / sqrt(C) + mask) v.

        Args:
            q: (H, T, C), rotated.
            k: (K, N, C), rotated; N = S + T includes the keys of the new tokens.
            v: (K, N, C).
            scratch: float32 memory of any size (n,), in which an override may store scores. This
                implementation ignores it.

        Returns:
            (H, T, C) in q's dtype.

        Source: Vaswani et al. 2017, equation 1; Ainslie et al. 2023 (GQA), section 2.2.
        """
        return self.weighted_values(self.attention_weights(q, k), v)

    # -- feed-forward ------------------------------------------------------------------------

    def sigmoid(self, x: Array) -> Array:
        """The logistic function, elementwise:  1 / (1 + e^-x), for any shape (...).

        For x < 0 the equal expression e^x / (1 + e^x) is used. No exponent is then positive, so
        nothing overflows.

        Source: Elfwing et al. 2017, section 2.
        """
        xp = self.xp
        e = xp.exp(-xp.abs(x))
        return xp.where(x >= 0, 1.0, e) / (1.0 + e)

    def silu(self, x: Array) -> Array:
        """x * sigmoid(x), elementwise, for any shape (...); also called Swish with beta = 1.

        Source: Elfwing et al. 2017, equation 5; Ramachandran et al. 2017.
        """
        return x * self.sigmoid(x)

    def swiglu(self, gate: Array, up: Array) -> Array:
        """SiLU(gate) * up, elementwise, where gate = x W_gate^T and up = x W_up^T.

        Args:
            gate, up: (..., F).

        Returns:
            (..., F).

        Source: Shazeer 2020 (GLU variants), equation 6. In Meta's code W_gate is w1, and W_up is
        w3.
        """
        return self.silu(gate) * up

    # -- loss --------------------------------------------------------------------------------

    def cross_entropy(self, logits: Array, targets: Array) -> Array:
        """The cross-entropy of each token:  loss = -log softmax(logits)[target], in nats.

        Args:
            logits: (..., V).
            targets: (...) integers in [0, V), the token that follows each position.

        Returns:
            (...) in the dtype of the logits.

        Source: Shannon 1948, section 6; Bengio et al. 2003 (neural language models), section 2.
        """
        log_p = self.log_softmax(logits)
        chosen = self.xp.take_along_axis(log_p, targets[..., None], axis=-1)  # (..., V) -> (..., 1)
        return -chosen[..., 0]
