"""The derivative of the embedding: adds up the rows of each token in a fixed order."""

from npllama.backend import Array
from npllama.ops.cuda.kernels import Kernels, instance

THREADS = 256
"""Threads per thread block, as in embedding.cu."""


def embedding_backward(kernels: Kernels, dx: Array, tokens: Array, n_vocab: int) -> Array:
    """dW[v] = the sum of dx[b, t] over all b, t where tokens[b, t] is v. The result is
    deterministic.

    Args:
        dx: (B, T, D) float32 or float64.
        tokens: (B, T) integers.
        n_vocab: V.

    Returns:
        dW (V, D) in dx's dtype.
    """
    xp, width = kernels.xp, dx.shape[-1]
    tokens = tokens.reshape(-1)  # (B, T) -> (M,)
    order = xp.argsort(tokens, kind="stable")  # (M,) int64: the indices of token 0, 1, ...
    begins = xp.searchsorted(tokens[order], xp.arange(n_vocab + 1))  # (V + 1,) int64
    dw = xp.empty((n_vocab, width), dtype=dx.dtype)
    name = instance("embedding_backward", dx.dtype)
    arguments = (xp.ascontiguousarray(dx), order, begins, dw, width)
    kernels.launch("embedding", name, (n_vocab, -(-width // THREADS)), (THREADS,), arguments)
    return dw
