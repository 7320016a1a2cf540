"""A model that has learnt nothing: seeded random weights, where training begins."""

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

    def matrix(n_out: int, n_in: int, size: float = 1.0) -> Matrix:
        values = generator.standard_normal((n_out, n_in), dtype="float32")
        values *= size * n_in**-0.5
        if np.dtype(dtype) == np.int8:
            return Matrix(*quantize(values))
        return Matrix(values.astype(dtype, copy=False))

    d, f, v = config.dim, config.ffn_dim, config.vocab_size
    kv = config.n_kv_heads * config.head_dim

    def ones() -> np.ndarray:
        return np.ones(d, dtype="float32")

    eps = config.norm_eps
    embedding = ops.prepare(matrix(v, d, 0.02 * d**0.5))
    layers = tuple(
        ops.prepare(
            Layer(
                attention_norm=ones(),
                wq=matrix(d, d),
                wk=matrix(kv, d),
                wv=matrix(kv, d),
                wo=matrix(d, d, residual),
                ffn_norm=ones(),
                w_gate=matrix(f, d),
                w_up=matrix(f, d),
                w_down=matrix(d, f, residual),
                norm_eps=eps,
            )
        )
        for _ in range(config.n_layers)
    )
    lm_head = embedding if config.tie_embeddings else matrix(v, d)
    return Parameters(embedding, layers, ops.prepare(Head(ones(), lm_head, eps)))
