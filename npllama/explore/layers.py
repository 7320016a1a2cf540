"""What every block of the model computes for the tokens that are shown."""

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
    """What one block computed for the T tokens of the window.

    Attributes:
        normed: (T, D), the attention's input after RMSNorm.
        q_plain, k_plain: (H, T, C) and (K, T, C), before RoPE.
        q, k, v: (H, T, C), (K, T, C), (K, T, C); q and k after RoPE.
        attention: (H, T, T), each token's attention to the tokens of the window. A row sums to 1
            together with the attention to the tokens before the window.
        to_first: (H,), the attention to the prompt's first token, averaged over the window's
            tokens without the first one, which sees nothing else; 1 where there is no other.
        to_earlier: (H,), the attention to tokens before the window, averaged over the window's.
        after_attention: (T, D), the residual stream between the two halves of the block.
        gate, opened, gated: (T, F), the gate x W_gate^T, SiLU of it, and the result of SwiGLU.
        silu_curve: (2, 121), evenly spaced x that span the last token's gates, and SiLU(x).
        hidden: (T, D), the residual stream after the block.
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
    """Run ids through a model of reference ops, and keep what ids[start:] meet.

    Args:
        cache: an empty one, which holds the ids afterwards.

    Returns:
        the embedded tokens (T, D), and the layers.
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
