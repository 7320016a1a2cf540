"""The truth: the results of the reference in float64, with the weights as they are stored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from comparing.operations import Arrays, fused_operations, head, inputs, operations
from npllama.backend import Backend
from npllama.config import LlamaConfig
from npllama.kv_cache import KVCache
from npllama.ops import Ops
from npllama.parameters import Parameters

MakeParameters = Callable[[Ops], Parameters]
"""Makes the parameters for an ops object, with the same values each time."""


@dataclass
class Phase:
    """A forward pass of T tokens after S cached ones, in float64.

    Attributes:
        tokens: T ids.
        past: for each layer, k and v (K, S, C) of the previous tokens.
        given: for each layer, the inputs of its operations, rounded to float32.
        results: for each layer, the results of its operations on these inputs.
        fused: the same for the fused kernels; empty unless T is 1.
        hidden: for each layer, its output (1, T, D), computed from the embedding.
        last: (1, 1, D), the input of the head, rounded to float32.
        head: (V,), the result of the head on this input.
        logits: (V,) of the next token, computed from the embedding.
    """

    tokens: list[int]
    past: list[tuple[np.ndarray, np.ndarray]]
    given: list[Arrays]
    results: list[Arrays]
    fused: list[Arrays]
    hidden: list[np.ndarray]
    last: np.ndarray
    head: np.ndarray
    logits: np.ndarray


@dataclass
class Truth:
    """The values with which every implementation is compared.

    Attributes:
        phases: "prompt" (all ids at once) and "decode" (one token after them).
        ids: the greedy continuation.
        gaps: for each of `ids`, the difference of the largest and the second largest logit.
    """

    config: LlamaConfig
    prompt: list[int]
    phases: dict[str, Phase]
    ids: list[int]
    gaps: list[float]


def make_truth(config: LlamaConfig, make: MakeParameters, prompt: Sequence[int], n: int) -> Truth:
    """Compute the truth for a prompt and the n tokens after it."""
    ops = Ops(Backend())
    parameters, prompt = make(ops), list(prompt)
    cache = new_cache(ops, config, len(prompt) + max(n, 1), "float64", "float64")
    first = _phase(ops, parameters, cache, prompt)
    ids, gaps, logits = [], [], first.logits
    second = None
    for _ in range(max(n, 1)):
        id_, gap = _likeliest(logits)
        ids.append(id_)
        gaps.append(gap)
        if second is None:
            second = _phase(ops, parameters, cache, [id_])
            logits = second.logits
        elif len(ids) < n:
            _hidden, logits = forward(ops, parameters, cache, [id_], "float64")
    return Truth(config, prompt, {"prompt": first, "decode": second}, ids[:n], gaps[:n])


def forward(
    ops: Ops, parameters: Parameters, cache: KVCache, ids: Sequence[int], dtype: str = "float32"
) -> tuple[list[np.ndarray], np.ndarray]:
    """The output of each layer, (1, T, D), and the logits (V,) of the token after `ids`."""
    to_host = ops.backend.to_host
    tokens = ops.backend.to_device(np.array([ids], dtype="int32"))  # (1, T)
    hidden = []
    with ops.forward_context(len(ids)):
        place = cache.place(len(ids))
        positions = cache.on_device(place)
        x = ops.embedding(tokens, parameters.embedding, dtype)  # (1, T) -> (1, T, D)
        for layer, layer_cache in zip(parameters.layers, cache.layers, strict=True):
            x = ops.attention_block(x, layer, layer_cache, positions)
            x = ops.feed_forward(x, layer)
            hidden.append(np.array(to_host(x)))
        logits = np.array(to_host(ops.head(x[:, -1:], parameters.head)))  # (1, 1, V)
        cache.advance_on_device(place)
    cache.advance(place.rows, [len(ids)])
    return hidden, logits[0, 0]


def new_cache(
    ops: Ops, config: LlamaConfig, context: int, dtype: np.dtype | str, rope_dtype: str = "float32"
) -> KVCache:
    """An empty cache with one row. `rope_dtype` is the dtype of cosines and sines."""
    table = ops.rope_table(context, ops.rope_frequencies(config), rope_dtype)
    return KVCache(
        ops.backend,
        table,
        n_layers=config.n_layers,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        batch=1,
        context=context,
        dtype=dtype,
        scratch_size=ops.scratch_size(config.n_heads, config.n_kv_heads, context, context),
    )


def _phase(ops: Ops, parameters: Parameters, cache: KVCache, ids: list[int]) -> Phase:
    """Run a forward pass of `ids` and advance the cache."""
    start = cache.lengths[0]
    layers = list(zip(parameters.layers, cache.layers, strict=True))
    past = [(c.k[0, :, :start].copy(), c.v[0, :, :start].copy()) for _, c in layers]
    place = cache.place(len(ids))
    positions = cache.on_device(place)
    x = ops.embedding(np.array([ids]), parameters.embedding, "float64")
    given = []
    for layer, layer_cache in layers:
        exact = inputs(ops, layer, x, layer_cache, positions)
        given.append({name: _rounded(array) for name, array in exact.items()})
        x = ops.feed_forward(ops.attention_block(x, layer, layer_cache, positions), layer)
    last = _rounded(x[:, -1:])
    results, fused = [], []
    for (layer, layer_cache), rounded in zip(layers, given, strict=True):
        wide = {name: array.astype("float64") for name, array in rounded.items()}
        results.append(operations(ops, layer, wide, layer_cache, positions))
        if len(ids) == 1:
            fused.append(fused_operations(ops, layer, wide, layer_cache, positions))
    made = head(ops, parameters.head, last.astype("float64"))[0, 0]
    # runs last, because the operations above wrote keys and values of rounded inputs to the cache
    hidden, logits = forward(ops, parameters, cache, ids, "float64")
    return Phase(ids, past, given, results, fused, hidden, last, made, logits)


def _rounded(x: np.ndarray) -> np.ndarray:
    return x.astype("float32")


def _likeliest(logits: np.ndarray) -> tuple[int, float]:
    """The id of the largest logit, and the difference of that logit and the second largest."""
    second, first = np.partition(logits, -2)[-2:]
    return int(logits.argmax()), float(first - second)
