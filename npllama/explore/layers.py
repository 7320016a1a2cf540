"""The arrays that each layer of the model computes for the tokens of the window."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from npllama.backend import Array
from npllama.explore.calls import Calls, recorded
from npllama.kv_cache import KVCache
from npllama.model import Transformer
from npllama.ops import Ops

_EQUATIONS = ("rms_norm", "rope", "attention_weights", "weighted_values", "silu", "swiglu")
_CURVE_POINTS, _CURVE_LEAST = 121, 4.0


@dataclass(frozen=True)
class LayerRecord:
    """The arrays that one layer computed for the T tokens of the window.

    Attributes:
        normed: (T, D), the attention's input after RMSNorm.
        q_plain, k_plain: (H, T, C) and (K, T, C), before RoPE.
        q, k, v: (H, T, C), (K, T, C), (K, T, C); q and k after RoPE.
        attention: (H, T, T), the share that each token gives to each token of the window. A row
            and the shares of the tokens before the window sum to 1.
        to_first: (H,), the share that goes to the prompt's first token, averaged over the tokens
            of the window. The prompt's first token is excluded, since it sees only itself; 1 if
            the prompt has no other token.
        to_earlier: (H,), the share that goes to the tokens before the window, averaged over the
            tokens of the window.
        after_attention: (T, D), the residual stream between attention and feed-forward.
        gate, opened, gated: (T, F), the gate h W_gate^T, SiLU(gate), and the result of SwiGLU.
        silu_curve: (2, 121), evenly spaced x around 0 that include the last token's gates, and
            SiLU(x).
        hidden: (T, D), the residual stream after the layer.
    """

    normed: np.ndarray
    q_plain: np.ndarray
    k_plain: np.ndarray
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    attention: np.ndarray
    to_first: np.ndarray
    to_earlier: np.ndarray
    after_attention: np.ndarray
    gate: np.ndarray
    opened: np.ndarray
    silu_curve: np.ndarray
    gated: np.ndarray
    hidden: np.ndarray


def record_layers(
    model: Transformer, ids: Sequence[int], start: int, cache: KVCache
) -> tuple[np.ndarray, tuple[LayerRecord, ...]]:
    """Run ids through a model of reference ops, and record the arrays of ids[start:].

    Args:
        cache: an empty cache; afterwards it holds the ids.

    Returns:
        The embedded tokens (T, D), and the record of each layer.
    """
    ops, parameters = model.ops, model.parameters
    if start:
        model.prefill(ids[:start], cache)
    tokens = model.to_tokens(ids[start:])[None]  # (1, T)
    place = cache.place(len(ids) - start)
    positions = cache.on_device(place)
    with ops.forward_context(tokens.size):
        x = ops.embed(tokens, parameters.embedding)  # (1, T) -> (1, T, D)
        embedded, layers = model.backend.to_host(x[0]), []
        for layer, layer_cache in zip(parameters.layers, cache.layers, strict=True):
            with recorded(ops, _EQUATIONS) as calls:
                between = ops.attention_block(x, layer, layer_cache, positions)
                x = ops.feed_forward(between, layer)
            layers.append(_layer(ops, calls, between, x, start))
    cache.advance_on_device(place)
    cache.advance(place.rows, [place.n_new])
    return embedded, tuple(layers)


def _layer(ops: Ops, calls: Calls, between: Array, after: Array, start: int) -> LayerRecord:
    to_host = ops.backend.to_host
    turned_q, turned_k = calls.named("rope")
    (weights,) = calls.named("attention_weights")
    (mixed,) = calls.named("weighted_values")
    (gates,), (opened,) = calls.named("swiglu"), calls.named("silu")
    gate = to_host(gates.args[0][0])  # (1, T, F) -> (T, F)
    q, k = (to_host(a) for a in weights.args)  # (H, T, C), (K, N, C)
    attention = to_host(weights.result)  # (H, T, N)
    later = attention[:, 1:] if start == 0 and attention.shape[1] > 1 else attention
    return LayerRecord(
        normed=to_host(calls.named("rms_norm")[0].result[0]),
        q_plain=to_host(turned_q.args[0][0]).swapaxes(0, 1),  # (T, H, C) -> (H, T, C)
        k_plain=to_host(turned_k.args[0][0]).swapaxes(0, 1),  # (T, K, C) -> (K, T, C)
        q=q,
        k=k[:, start:].copy(),  # (K, N, C) -> (K, T, C); a view would keep the whole cache
        v=to_host(mixed.args[1])[:, start:].copy(),
        attention=attention[:, :, start:].copy(),  # (H, T, N) -> (H, T, T)
        to_first=later[:, :, 0].mean(axis=1),
        to_earlier=attention[:, :, :start].sum(axis=2).mean(axis=1),
        after_attention=to_host(between[0]),
        gate=gate,
        opened=to_host(opened.result[0]),
        silu_curve=_silu_curve(ops, gate[-1]),
        gated=to_host(gates.result[0]),
        hidden=to_host(after[0]),
    )


def _silu_curve(ops: Ops, gate: np.ndarray) -> np.ndarray:
    """(2, 121): x beyond the largest |gate| on both sides, and SiLU(x)."""
    end = max(_CURVE_LEAST, 1.05 * float(np.abs(gate).max()))
    x = np.linspace(-end, end, _CURVE_POINTS, dtype="float32")
    return np.stack([x, ops.backend.to_host(ops.silu(ops.backend.to_device(x)))])
