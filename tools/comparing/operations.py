"""The operations of a layer, one at a time, on the same inputs for every implementation."""

from npllama.backend import Array
from npllama.kv_cache import LayerCache, Positions
from npllama.ops import Ops
from npllama.ops.cuda import decode_attention, gemv
from npllama.parameters import Head, Layer, Matrix

Arrays = dict[str, Array]


def inputs(ops: Ops, layer: Layer, x: Array, cache: LayerCache, positions: Positions) -> Arrays:
    """The inputs of each operation of a layer in a forward pass, computed equation by equation.

    Args:
        x: (B, T, D), the previous layer's output. All results have its dtype.
        cache: receives the new keys and values.
    """
    h = ops.rms_norm(x, layer.attention_norm, layer.norm_eps)  # (B, T, D)
    qkv = _linear(ops, h, layer.wq, layer.wk, layer.wv)  # (B, T, (H + 2K) C)
    q, k, v = _heads(qkv, layer, positions)
    q, k = (ops.rope(heads, positions.cos, positions.sin) for heads in (q, k))
    o = ops.cached_attention(q, k, v, cache, positions)  # (B, T, H*C)
    middle = x + ops.linear(o, layer.wo)
    h_ffn = ops.rms_norm(middle, layer.ffn_norm, layer.norm_eps)
    gate, up = ops.linear(h_ffn, layer.w_gate), ops.linear(h_ffn, layer.w_up)  # (B, T, F)
    return {
        "x": x,
        "h": h,
        "qkv": qkv,
        "q": q,
        "k": k,
        "v": v,
        "o": o,
        "middle": middle,
        "h_ffn": h_ffn,
        "gate": gate,
        "up": up,
        "y": ops.swiglu(gate, up),
    }


def operations(
    ops: Ops, layer: Layer, given: Arrays, cache: LayerCache, positions: Positions
) -> Arrays:
    """The result of each operation, and of the layer's two blocks, by name."""
    q, k, _v = _heads(given["qkv"], layer, positions)
    both = ops.xp.concatenate([q, k], axis=2)  # (B, T, H + K, C)
    g = given
    return {
        "rms_norm": ops.rms_norm(_own(g["x"]), layer.attention_norm, layer.norm_eps),
        "q-k-v": _linear(ops, g["h"], layer.wq, layer.wk, layer.wv),
        "rope": ops.rope(both, positions.cos, positions.sin),
        "attention": ops.cached_attention(
            _own(g["q"]), _own(g["k"]), _own(g["v"]), cache, positions
        ),
        "wo": ops.linear(g["o"], layer.wo),
        "gate-up": _linear(ops, g["h_ffn"], layer.w_gate, layer.w_up),
        "swiglu": ops.swiglu(_own(g["gate"]), _own(g["up"])),
        "w_down": ops.linear(g["y"], layer.w_down),
        "attention block": ops.attention_block(_own(g["x"]), layer, cache, positions),
        "feed-forward block": ops.feed_forward(_own(g["middle"]), layer),
    }


def fused_operations(
    ops: Ops, layer: Layer, given: Arrays, cache: LayerCache, positions: Positions
) -> Arrays:
    """The results of the decode step's fused kernels, for one new token per row. Kernels compute
    them if `has_kernels`; otherwise they are composed of single operations."""
    g, eps = given, layer.norm_eps
    if has_kernels(ops, layer, cache, len(given["x"])):
        x, kernels = g["x"], ops.kernels
        return {
            "norm, q-k-v": gemv.gemv(kernels, layer.qkv, x, norm=layer.attention_norm, eps=eps),
            "rope, attention": decode_attention.attend(kernels, g["qkv"], cache, positions),
            "wo, residual": gemv.gemv(kernels, layer.wo, g["o"], residual=x),
            "norm, gate-up, swiglu": gemv.gemv(
                kernels, layer.gate_up, g["middle"], norm=layer.ffn_norm, eps=eps, swiglu=True
            ),
            "w_down, residual": gemv.gemv(kernels, layer.w_down, g["y"], residual=g["middle"]),
        }
    h = ops.rms_norm(_own(g["x"]), layer.attention_norm, eps)
    h_ffn = ops.rms_norm(_own(g["middle"]), layer.ffn_norm, eps)
    q, k, v = _heads(g["qkv"], layer, positions)
    q, k = (ops.rope(heads, positions.cos, positions.sin) for heads in (q, k))
    gate, up = ops.linear(h_ffn, layer.w_gate), ops.linear(h_ffn, layer.w_up)
    return {
        "norm, q-k-v": _linear(ops, h, layer.wq, layer.wk, layer.wv),
        "rope, attention": ops.cached_attention(q, k, v, cache, positions),
        "wo, residual": g["x"] + ops.linear(g["o"], layer.wo),
        "norm, gate-up, swiglu": ops.swiglu(gate, up),
        "w_down, residual": g["middle"] + ops.linear(g["y"], layer.w_down),
    }


def head(ops: Ops, part: Head, x: Array) -> Array:
    """Logits (B, T, V) of x (B, T, D)."""
    return ops.head(_own(x), part)


def has_kernels(ops: Ops, layer: Layer, cache: LayerCache, n_rows: int) -> bool:
    """Whether `ops` computes a decode step of this layer with its own kernels."""
    products = (layer.qkv, layer.wo, layer.gate_up, layer.w_down)
    return (
        hasattr(ops, "kernels")
        and all(gemv.fits(w, n_rows) for w in products)
        and decode_attention.fits(cache)
    )


def _linear(ops: Ops, x: Array, *matrices: Matrix) -> Array:
    """The products of one input with several matrices, concatenated."""
    return ops.xp.concatenate([ops.linear(x, w) for w in matrices], axis=-1)


def _heads(qkv: Array, layer: Layer, positions: Positions) -> tuple[Array, Array, Array]:
    """(B, T, (H + 2K) C) -> q (B, T, H, C), k and v (B, T, K, C)."""
    head_dim = 2 * positions.cos.shape[-1]
    n_q, n_kv = layer.wq.shape[0], layer.wk.shape[0]
    parts = (qkv[..., :n_q], qkv[..., n_q : n_q + n_kv], qkv[..., n_q + n_kv :])
    q, k, v = (part.reshape(*part.shape[:2], -1, head_dim) for part in parts)
    return q, k, v


def _own(x: Array) -> Array:
    """A copy, because an operation may work in-place on its input."""
    return x.copy()
