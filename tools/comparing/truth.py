"""The truth: the reference in float64, on the weights as they are stored."""

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
"""The weights for an ops, the same numbers each time."""


@dataclass
class Phase:
    """A forward of T tokens after S, in float64.

    Attributes:
        tokens: T ids.
        past: of each layer, k and v (K, S, C) of the tokens before.
        given: of each layer, what its operations are given, rounded to float32.
        results: of each layer, what they make of that.
        fused: the same of what kernels compute at once; {} where T is not 1.
        hidden: of each layer, what it leaves, (1, T, D), computed from the embedding on.
        last: (1, 1, D) what the head is given, rounded to float32.
        head: (V,) what the head makes of that.
        logits: (V,) of the next token, computed from the embedding on.
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
    """What every implementation is compared with.

    Attributes:
        phases: "prompt", all ids at once, and "decode", one token after them.
        ids: the greedy continuation.
        gaps: how far the likeliest logit is above the next, for each of `ids`.
    """

    config: LlamaConfig
    prompt: list[int]
    phases: dict[str, Phase]
    ids: list[int]
    gaps: list[float]


def make_truth(config: LlamaConfig, make: MakeParameters, prompt: Sequence[int], n: int) -> Truth:
    """The truth of a prompt and of the n tokens after it."""
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
    """What each layer leaves, (1, T, D), and the logits (V,) of the token after `ids`."""
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
    """An empty cache of one row; `rope_dtype` is that of cosines and sines."""
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
    """A forward of `ids` that counts them in the cache."""
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
    # last, since the operations above wrote to the cache what they made of rounded inputs
    hidden, logits = forward(ops, parameters, cache, ids, "float64")
    return Phase(ids, past, given, results, fused, hidden, last, made, logits)


def _rounded(x: np.ndarray) -> np.ndarray:
    return x.astype("float32")


def _likeliest(logits: np.ndarray) -> tuple[int, float]:
    """The id of the largest logit, and how far that is above the next."""
    second, first = np.partition(logits, -2)[-2:]
    return int(logits.argmax()), float(first - second)
