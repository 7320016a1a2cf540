"""Random weights from a seed, with which training begins."""

from typing import Any

import numpy as np

from npllama.config import LlamaConfig
from npllama.ops import Ops
from npllama.parameters import Head, Layer, Matrix, Parameters
from npllama.weight_formats import format_of
from npllama.weight_table import OF_LAYER, PRODUCTS, Weight


def random_parameters(
    config: LlamaConfig, ops: Ops, seed: int = 0, dtype: np.dtype | str = "float32"
) -> Parameters:
    """Initial parameters: matrices are normally distributed with variance 1 / inputs, norms are 1.

    The results of two matrices per layer, wo and w_down, are added to the residual stream. These
    matrices are multiplied by 1 / sqrt(2 L), so that the sum over all layers does not grow with L.
    The embedding has a standard deviation of 0.02.

    Source: Radford et al. 2019 (GPT-2), section 2.3.
    """
    generator = np.random.default_rng(seed)
    residual = (2 * config.n_layers) ** -0.5

    def matrix(n_out: int, n_in: int, size: float = 1.0) -> Matrix:
        values = generator.standard_normal((n_out, n_in), dtype="float32")
        values *= size * n_in**-0.5
        return Matrix(*format_of(dtype).from_float(values))

    def product(weights: tuple[Weight, ...]) -> dict[str, Matrix]:
        """Matrices with the same input, by field name; contiguous, as in converted files."""
        shapes = [weight.sizes(config) for weight in weights]
        sizes, is_residual = [n_out for n_out, _n_in in shapes], weights[0].shape[0] == "D"
        together = matrix(sum(sizes), shapes[0][1], residual if is_residual else 1.0)
        rows = together.split(sizes)
        return {weight.field: w for weight, w in zip(weights, rows, strict=True)}

    def ones() -> np.ndarray:
        return np.ones(config.dim, dtype="float32")

    eps, v, d = config.norm_eps, config.vocab_size, config.dim
    embedding = ops.prepare(matrix(v, d, 0.02 * d**0.5))
    layers = []
    for _ in range(config.n_layers):
        parts: dict[str, Any] = {w.field: ones() for w in OF_LAYER if not w.is_matrix}
        for weights in PRODUCTS.values():
            parts |= product(weights)
        layers.append(ops.prepare(Layer(**parts, norm_eps=eps)))
    lm_head = embedding if config.tie_embeddings else matrix(v, d)
    return Parameters(embedding, tuple(layers), ops.prepare(Head(ones(), lm_head, eps)))
