"""A model that has learnt nothing: seeded random weights, where training begins."""

from itertools import accumulate, pairwise

import numpy as np

from npllama.config import LlamaConfig
from npllama.ops import Ops
from npllama.parameters import Head, Layer, Matrix, Parameters
from npllama.quantization import quantize


def random_parameters(
    config: LlamaConfig, ops: Ops, seed: int = 0, dtype: np.dtype | str = "float32"
) -> Parameters:
    """Weights as at the start of training: normal with variance 1 / (inputs), norms 1.

    The two matrices of a layer that add to the residual stream are 1 / sqrt(2 L) of that, so
    that the sum of all layers does not grow with their number, and the embedding has a standard
    deviation of 0.02.

    Source: Radford et al. 2019 (GPT-2), section 2.3.
    """
    generator = np.random.default_rng(seed)
    residual = (2 * config.n_layers) ** -0.5

    def matrices(*n_outs: int, n_in: int, size: float = 1.0) -> list[Matrix]:
        """Matrices of one input, side by side as a converted file has them."""
        values = generator.standard_normal((sum(n_outs), n_in), dtype="float32")
        values *= size * n_in**-0.5
        if np.dtype(dtype) == np.int8:
            together = Matrix(*quantize(values))
        else:
            together = Matrix(values.astype(dtype, copy=False))
        ends = [0, *accumulate(n_outs)]
        return [
            together.map(lambda array, rows=slice(a, b): array[rows]) for a, b in pairwise(ends)
        ]

    def matrix(n_out: int, n_in: int, size: float = 1.0) -> Matrix:
        return matrices(n_out, n_in=n_in, size=size)[0]

    d, f, v = config.dim, config.ffn_dim, config.vocab_size
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim

    def ones() -> np.ndarray:
        return np.ones(d, dtype="float32")

    eps = config.norm_eps
    embedding = ops.prepare(matrix(v, d, 0.02 * d**0.5))
    layers = []
    for _ in range(config.n_layers):
        wq, wk, wv = matrices(q, kv, kv, n_in=d)
        wo = matrix(d, q, residual)
        w_gate, w_up = matrices(f, f, n_in=d)
        w_down = matrix(d, f, residual)
        layer = Layer(ones(), wq, wk, wv, wo, ones(), w_gate, w_up, w_down, norm_eps=eps)
        layers.append(ops.prepare(layer))
    lm_head = embedding if config.tie_embeddings else matrix(v, d)
    return Parameters(embedding, tuple(layers), ops.prepare(Head(ones(), lm_head, eps)))
