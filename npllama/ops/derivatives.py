"""The derivatives of the equations in equations.py, in the same letters.

The gradient of a scalar loss with respect to y is called dy: dy = dLoss/dy. It has the shape of y.

The first argument of each method is the gradient with respect to the equation's output. The other
arguments are those inputs and outputs of the equation that the derivative needs. The method returns
the gradients with respect to the differentiable inputs, in the order of the inputs.

dtypes: as in the equations, every method computes in the dtype of the activations (float32 in
training, float64 in the tests). Weights have the same dtype and no scale, because training does
not support quantized weights.
"""

import math

from npllama.backend import Array
from npllama.ops.equations import Equations
from npllama.parameters import Matrix


class Derivatives(Equations):
    """The chain rule: methods `<equation>_backward` for the equations that training needs.

    `attention_backward` covers `attention_weights` and `weighted_values` together.
    `cross_entropy_backward` covers `log_softmax` and the selection of each target's element.
    """

    # -- embedding and projections ---------------------------------------------------------

    def embedding_backward(self, dx: Array, tokens: Array, w: Matrix) -> Array:
        """The gradient of x = E W:  dW = E^T dx, where E[m, v] = 1 if token m is v, else 0.

        Row v of dW is the sum of dx over the positions of token v.

        Args:
            dx: (B, T, D).
            tokens: (B, T).

        Returns:
            dW (V, D).

        Source: the chain rule on Vaswani et al. 2017, section 3.4.
        """
        n_vocab, width = w.shape
        one_hot = self.xp.arange(n_vocab)[:, None] == tokens.reshape(-1)[None]  # (V, B*T)
        return one_hot.astype(dx.dtype) @ dx.reshape(-1, width)  # (V, B*T) @ (B*T, D) -> (V, D)

    def linear_backward(self, dy: Array, x: Array, w: Matrix) -> tuple[Array, Array]:
        """The gradients of y = x W^T:  dx = dy W  and  dW = dy^T x, summed over all tokens.

        Args:
            dy: (..., O).
            x: (..., D).
            w: (O, D).

        Returns:
            dx (..., D), dW (O, D).

        Source: Rumelhart et al. 1986, equations 4 to 7, without the nonlinearity.
        """
        n_out, width = w.shape
        dy, flat = dy.reshape(-1, n_out), x.reshape(-1, width)  # (..., O) -> (M, O)
        dx = dy @ w.values  # (M, O) @ (O, D) -> (M, D)
        dw = dy.T @ flat  # (O, M) @ (M, D) -> (O, D)
        return dx.reshape(x.shape), dw  # (M, D) -> (..., D)

    # -- normalization -----------------------------------------------------------------------

    def rms_norm_backward(
        self, dy: Array, x: Array, weight: Array, eps: float
    ) -> tuple[Array, Array]:
        """The gradients of y = n * weight, where n = x / r and r = sqrt(mean(x^2) + eps):

            dx      = (dn - n * mean(dn * n)) / r, where dn = dy * weight
            dweight = sum over tokens of dy * n

        The term with the mean removes the component of dx along x. If eps is 0, scaling x does not
        change y, so the gradient has no component along x. With a small eps this holds nearly.

        Args:
            dy, x: (..., D).
            weight: (D,).

        Returns:
            dx (..., D), dweight (D,).

        Source: the quotient rule on Zhang & Sennrich 2019, equation 4.
        """
        r = self.xp.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)  # (..., D) -> (..., 1)
        n = x / r
        dn = dy * weight
        dx = (dn - n * (dn * n).mean(axis=-1, keepdims=True)) / r
        dweight = (dy * n).reshape(-1, x.shape[-1]).sum(axis=0)  # (..., D) -> (M, D) -> (D,)
        return dx, dweight

    # -- rotary position embeddings ----------------------------------------------------------

    def rope_backward(self, dy: Array, cos: Array, sin: Array) -> Array:
        """The gradient of a rotation:  dx = rope(dy, cos, -sin).

        The transpose of a rotation is the rotation by the negative angle.

        Args:
            dy: (B, T, heads, C).
            cos, sin: (B, T, C/2).

        Returns:
            dx (B, T, heads, C).

        Source: the transpose of Su et al. 2021, equation 34.
        """
        return self.rope(dy, cos, -sin)

    # -- attention ---------------------------------------------------------------------------

    def softmax_backward(self, dp: Array, p: Array) -> Array:
        """The gradient of p = softmax(x):  dx_i = p_i * (dp_i - sum_j dp_j p_j).

        Args:
            dp: (..., N).
            p: (..., N), the output of the softmax.

        Returns:
            dx (..., N). It is 0 for masked elements, because p is 0 there.

        Source: the quotient rule on Vaswani et al. 2017, equation 1; Dao et al. 2022
        (FlashAttention), appendix B.2.
        """
        return p * (dp - (dp * p).sum(axis=-1, keepdims=True))

    def attention_backward(
        self, do: Array, q: Array, k: Array, v: Array, p: Array
    ) -> tuple[Array, Array, Array]:
        """The gradients of o = P v, where P = softmax(X) and X = q k^T / sqrt(C) + mask:

            dv = P^T do
            dP = do v^T,  dX = softmax_backward(dP, P)
            dq = dX k / sqrt(C),  dk = dX^T q / sqrt(C)

        The queries and do are reshaped to (K, G*T, C), as in `attention_weights`. The products for
        dk and dv then also sum over the G query heads of each key head.

        Args:
            do, q: (H, T, C).
            k, v: (K, N, C).
            p: (H, T, N), from `attention_weights(q, k)`.

        Returns:
            dq (H, T, C), dk (K, N, C), dv (K, N, C).

        Source: Dao et al. 2022 (FlashAttention), appendix B.2, for grouped queries.
        """
        n_kv_heads, n_keys, head_dim = k.shape
        grouped = (n_kv_heads, -1, head_dim)  # (H, T, C) -> (K, G*T, C)
        do, grouped_q = do.reshape(grouped), q.reshape(grouped)
        p = p.reshape(n_kv_heads, -1, n_keys)  # (H, T, N) -> (K, G*T, N)
        dv = p.swapaxes(1, 2) @ do  # (K, N, G*T) @ (K, G*T, C) -> (K, N, C)
        dp = do @ v.swapaxes(1, 2)  # (K, G*T, C) @ (K, C, N) -> (K, G*T, N)
        dx = self.softmax_backward(dp, p) / math.sqrt(head_dim)
        dq = dx @ k  # (K, G*T, N) @ (K, N, C) -> (K, G*T, C)
        dk = dx.swapaxes(1, 2) @ grouped_q  # (K, N, G*T) @ (K, G*T, C) -> (K, N, C)
        return dq.reshape(q.shape), dk, dv

    # -- feed-forward ------------------------------------------------------------------------

    def silu_backward(self, dy: Array, x: Array) -> Array:
        """The gradient of y = x s, where s = sigmoid(x):  dx = dy * s * (1 + x (1 - s)).

        All arrays are (...); the derivative of s is s (1 - s).

        Source: Elfwing et al. 2017, equation 6.
        """
        s = self.sigmoid(x)
        return dy * s * (1 + x * (1 - s))

    def swiglu_backward(self, dy: Array, gate: Array, up: Array) -> tuple[Array, Array]:
        """The gradients of y = SiLU(gate) * up:

            dgate = SiLU'(gate) * (dy * up)
            dup   = dy * SiLU(gate)

        Args:
            dy, gate, up: (..., F).

        Returns:
            dgate, dup: (..., F).

        Source: the product rule on Shazeer 2020, equation 6.
        """
        return self.silu_backward(dy * up, gate), dy * self.silu(gate)

    # -- loss --------------------------------------------------------------------------------

    def cross_entropy_backward(self, dloss: Array, logits: Array, targets: Array) -> Array:
        """The gradient of -log softmax(x)[target]:  dx_i = dloss * (softmax(x)_i - [i = target]).

        Args:
            dloss: (...), the weight of each token in the loss.
            logits: (..., V).
            targets: (...) integers in [0, V).

        Returns:
            dlogits (..., V).

        Source: Bridle 1990; Goodfellow et al. 2016, section 6.2.2.3.
        """
        is_target = self.xp.arange(logits.shape[-1]) == targets[..., None]  # (..., V)
        return (self.softmax(logits) - is_target) * dloss[..., None]
