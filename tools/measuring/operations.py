"""The overrides of NumPy that are measured, with arguments as a model passes them.

Layouts in memory matter: for many rows, `NumpyOps.linear` returns a transposed view, and the
operations after it read this view. The arguments are therefore computed by a layer with random
weights wherever an operation follows a product.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from benchmarking.shapes import SHAPES, random_llama
from npllama.backend import Array, Backend
from npllama.config import LlamaConfig
from npllama.kv_cache import LayerCache, Positions
from npllama.parameters import Layer, Matrix
from npllama.threads import Threads

Arguments = tuple[Any, ...]

SHIPPED = LlamaConfig(192, 6, 6, 2, 512, 1024, context_length=256)
"""The shape of the shipped model, with a shorter context."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of all arguments.

    Attributes:
        config: the model of the prompt. Only one of its layers is computed.
        n_tokens: T, the tokens of the prompt.
        n_logits: V, the logits that the sampling operations receive.
        n_likely: the likely tokens among them.
        training: the model of a micro-batch in training.
        batch: rows of a micro-batch. Each has as many tokens as the context of `training`.
    """

    config: LlamaConfig = SHAPES["110m"]
    n_tokens: int = 512
    n_logits: int = 32_000
    n_likely: int = 1_000
    training: LlamaConfig = SHIPPED
    batch: int = 4


@dataclass(frozen=True)
class Operation:
    """One row of the table.

    Attributes:
        name: the method of NumpyOps, and of Ops.
        operands: what it computes with, in words.
        n_rows: the number of tokens in the forward pass.
        is_training: True for a micro-batch in training. It has one thread, because training gives
            each core a micro-batch of its own.
        arguments: makes the arguments from a layer.
    """

    name: str
    operands: str
    n_rows: int
    is_training: bool
    arguments: Callable[["RandomLayer"], Arguments]


class RandomLayer:
    """One layer with random weights, and the arrays of one forward pass through it.

    Args:
        is_training: whether it is a layer of `training`, with a micro-batch and one thread, or a
            layer of `config`, with the prompt and n_threads threads.
    """

    def __init__(self, sizes: Sizes, is_training: bool, n_threads: int) -> None:
        if is_training:
            config, n_threads = sizes.training, 1
            batch, n_tokens = sizes.batch, config.context_length
        else:
            config, batch, n_tokens = sizes.config, 1, sizes.n_tokens
        backend = Backend(threads=Threads(n_threads))
        llama = random_llama(
            replace(config, n_layers=1, vocab_size=1), backend, "float32", n_tokens
        )
        cache = llama.new_cache(batch, n_tokens)
        self.ops = llama.ops
        self.layer: Layer = llama.parameters.layers[0]
        self.cache: LayerCache = cache.layers[0]
        self.positions: Positions = cache.positions(n_tokens)
        self.x = normal(batch, n_tokens, config.dim)  # (B, T, D), the input of the products

    @cached_property
    def projections(self) -> tuple[Array, Array, Array]:
        """q (B, T, H, C), k and v (B, T, K, C), not yet rotated."""
        batch, n_tokens, _ = self.x.shape
        shape = (batch, n_tokens, -1, 2 * self.positions.cos.shape[-1])
        y = self.ops.linear(self.x, self.layer.qkv).reshape(shape)  # (B, T, H + 2K, C)
        width = shape[-1]
        n_q, n_k = (w.shape[0] // width for w in (self.layer.wq, self.layer.wk))
        return y[:, :, :n_q], y[:, :, n_q : n_q + n_k], y[:, :, n_q + n_k :]

    @cached_property
    def attended(self) -> tuple[Array, Array, Array]:
        """q (H, T, C) of row 0, rotated, and k and v (K, T, C), as views of the cache."""
        q, k, v = self.ops.queries_keys_values(self.x, self.layer, self.positions)
        self.cache.write(k, v, self.positions)
        return q[0].swapaxes(0, 1), self.cache.k[0], self.cache.v[0]  # (T, H, C) -> (H, T, C)

    @cached_property
    def gate_up(self) -> tuple[Array, Array]:
        """x W_gate^T and x W_up^T, (B, T, F) each."""
        both = self.ops.linear(self.x, self.layer.gate_up)  # (B, T, 2 F)
        n = both.shape[-1] // 2
        return both[..., :n], both[..., n:]


def operations(sizes: Sizes) -> list[Operation]:
    """All operations, in the order of the table."""
    return [*_of_a_prompt(sizes), *_of_sampling(sizes), *_of_training(sizes)]


def _of_a_prompt(sizes: Sizes) -> list[Operation]:
    c, t = sizes.config, sizes.n_tokens
    heads = f"{t} tokens, {c.n_heads} heads of width {c.head_dim}"

    def of(
        name: str, operands: str, arguments: Callable[[RandomLayer], Arguments], n_rows: int = t
    ) -> Operation:
        return Operation(name, operands, n_rows, False, arguments)

    def norm(n_rows: int) -> Callable[[RandomLayer], Arguments]:
        return lambda m: (normal(n_rows, 1, c.dim), m.layer.ffn_norm, c.norm_eps)

    return [
        of("rms_norm", f"1 row, D = {c.dim}", norm(1), n_rows=1),
        of("rms_norm", f"4 rows, D = {c.dim}", norm(4), n_rows=4),
        of("rope", heads, lambda m: (m.projections[0], m.positions.cos, m.positions.sin)),
        of("attention", heads, lambda m: (*m.attended, m.cache.scratch)),
        of("linear", f"{t} rows, {c.ffn_dim} x {c.dim}", lambda m: (m.x, m.layer.w_gate)),
        of("swiglu", f"{t} x {c.ffn_dim}", lambda m: m.gate_up),
        of(
            "feed_forward",
            f"{t} tokens, D = {c.dim}, F = {c.ffn_dim}",
            lambda m: (m.x, m.layer),
        ),
        of(
            "queries_keys_values",
            f"{t} tokens, D = {c.dim}",
            lambda m: (m.x, m.layer, m.positions),
        ),
    ]


def _of_sampling(sizes: Sizes) -> list[Operation]:
    n = sizes.n_logits

    def logits(n_left: int, rest: float) -> Array:
        x = np.full((1, n), rest, dtype="float32")
        x[0, :: n // n_left][:n_left] = normal(n_left)
        return x

    def of(name: str, operands: str, arguments: Callable[[RandomLayer], Arguments]) -> Operation:
        return Operation(name, f"V = {n}, {operands}", 1, False, arguments)

    u = np.array([0.5])
    return [
        of("keep_top_p", f"{sizes.n_likely} likely", lambda _: (logits(sizes.n_likely, -30), 0.9)),
        of("sample", "6 left", lambda _: (logits(6, -np.inf), u)),
        of("sample", "all left", lambda _: (logits(n, -np.inf), u)),
    ]


def _of_training(sizes: Sizes) -> list[Operation]:
    c, n = sizes.training, sizes.training.context_length
    n_rows = sizes.batch * n
    scores = (c.n_heads, n, n)
    ffn = f"{n_rows} x {c.ffn_dim}"

    def tokens() -> Array:
        return np.random.default_rng(1).integers(0, c.vocab_size, (sizes.batch, n))

    def embedding(m: RandomLayer) -> Arguments:
        return normal(*m.x.shape), tokens(), Matrix(normal(c.vocab_size, c.dim))

    def weights(m: RandomLayer) -> Arguments:
        return normal(*scores), m.ops.softmax(normal(*scores))

    def of(name: str, operands: str, arguments: Callable[[RandomLayer], Arguments]) -> Operation:
        return Operation(name, operands, n_rows, True, arguments)

    return [
        of("attention_weights", f"{n} tokens, {c.n_heads} heads", lambda m: m.attended[:2]),
        of("sigmoid", ffn, lambda m: m.gate_up[:1]),
        of(
            "embedding_backward",
            f"{n_rows} tokens, V = {c.vocab_size}, D = {c.dim}",
            embedding,
        ),
        of("softmax_backward", " x ".join(map(str, scores)), weights),
        of("swiglu_backward", ffn, lambda m: (normal(*m.gate_up[0].shape), *m.gate_up)),
    ]


def normal(*shape: int) -> Array:
    """Normally distributed elements, float32, the same in every run."""
    return np.random.default_rng(0).standard_normal(shape, dtype="float32")
