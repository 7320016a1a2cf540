"""Random weights generated on the device, which is fast and needs no host memory."""

from typing import Any

import numpy as np

from npllama.backend import Array
from npllama.config import LlamaConfig
from npllama.ops import Ops
from npllama.parameters import Head, Layer, Matrix, Parameters
from npllama.quantization import LARGEST
from npllama.weight_formats import format_of
from npllama.weight_table import OF_LAYER, PRODUCTS

CHUNK = 2**26
"""Elements generated at a time; temporary arrays take three times their memory."""


def device_parameters(config: LlamaConfig, ops: Ops, dtype: np.dtype | str) -> Parameters:
    """Random weights with the scales of `random_parameters`, but from a uniform distribution.

    `ops.prepare` receives matrices that are already joined, as from a converted checkpoint.
    """
    n_made = 0  # elements so far; matrices continue one sequence, so no two are equal
    residual = (2 * config.n_layers) ** -0.5

    def matrix(n_out: int, n_in: int, size: float = 1.0) -> Matrix:
        nonlocal n_made
        first, n_made = n_made, n_made + n_out * n_in
        return _matrix(ops, n_out, n_in, size * n_in**-0.5, np.dtype(dtype), first)

    def ones() -> Array:
        return ops.xp.ones(config.dim, dtype="float32")

    eps, v, d = config.norm_eps, config.vocab_size, config.dim
    embedding = ops.prepare(matrix(v, d, 0.02 * d**0.5))
    layers = []
    for _ in range(config.n_layers):
        parts: dict[str, Any] = {w.field: ones() for w in OF_LAYER if not w.is_matrix}
        for weights in PRODUCTS.values():
            shapes = [weight.sizes(config) for weight in weights]
            sizes, is_residual = [n_out for n_out, _n_in in shapes], weights[0].shape[0] == "D"
            together = matrix(sum(sizes), shapes[0][1], residual if is_residual else 1.0)
            rows = together.split(sizes)
            parts |= {weight.field: w for weight, w in zip(weights, rows, strict=True)}
        layers.append(ops.prepare(Layer(**parts, norm_eps=eps)))
    lm_head = embedding if config.tie_embeddings else matrix(v, d)
    return Parameters(embedding, tuple(layers), ops.prepare(Head(ones(), lm_head, eps)))


def _matrix(ops: Ops, n_out: int, n_in: int, std: float, dtype: np.dtype, first: int) -> Matrix:
    """(O, D) elements with standard deviation `std`, from element `first` of the sequence on."""
    xp = ops.xp
    values = xp.empty((n_out, n_in), dtype=dtype)
    most = 3**0.5 * std  # bound of a uniform distribution with this standard deviation
    rows = max(1, CHUNK // n_in)
    for begin in range(0, n_out, rows):
        end = min(begin + rows, n_out)
        numbers = _uniform(xp, (end - begin) * n_in, first + begin * n_in)
        numbers *= most if format_of(dtype).is_float else LARGEST
        values[begin:end] = numbers.reshape(end - begin, n_in).astype(dtype)
    if format_of(dtype).is_float:
        return Matrix(values)
    return Matrix(values, xp.full(n_out, most / LARGEST, dtype="float32"))


def _uniform(xp: Any, n: int, first: int) -> Array:
    """n float32 values in [-1, 1): hashes of the integers first, first + 1, ...

    Source: Wellons 2018, "Prospecting for Hash Functions" (lowbias32).
    """
    x = xp.arange(n, dtype="uint32")
    x += first % 2**32
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= xp.right_shift(x, shift)
        x *= factor
    x ^= xp.right_shift(x, 16)
    return xp.right_shift(x, 8).astype("float32") * 2.0**-23 - 1.0  # 24 bits are exact in float32
