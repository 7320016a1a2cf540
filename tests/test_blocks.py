"""The upper level of ops, against a float64 transformer written independently in a few lines."""

import numpy as np
import pytest

from conftest import TINY, make_llama, rope_table
from npllama.kv_cache import KVCache
from npllama.ops import CupyOps
from npllama.parameters import Head, Layer, Matrix
from test_equations import EXACT, assert_close, attention_one_by_one, rope_one


def random_layer(rng, move, dim=18, n_heads=6, n_kv_heads=3, ffn_dim=11, dtype="float64"):
    """A random layer, as float64 NumPy arrays and as a Layer on the device."""
    kv = n_kv_heads * dim // n_heads
    shapes = {
        "wq": (dim, dim), "wk": (kv, dim), "wv": (kv, dim), "wo": (dim, dim),
        "w_gate": (ffn_dim, dim), "w_up": (ffn_dim, dim), "w_down": (dim, ffn_dim),
    }  # fmt: skip
    host = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    norms = {"attention_norm": rng.random(dim) + 0.5, "ffn_norm": rng.random(dim) + 0.5}
    device = {name: Matrix(move(w.astype(dtype))) for name, w in host.items()}
    device |= {name: move(w.astype(dtype)) for name, w in norms.items()}
    return host | norms, Layer(**device, norm_eps=1e-3)


def norm(x, weight, eps=1e-3):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def make_cache(ops, head_dim=6, n_kv_heads=3, batch=1, context=12, dtype="float64"):
    table = rope_table(ops, context, head_dim, 100.0, dtype=dtype)
    return KVCache(
        ops.backend,
        table,
        n_layers=1,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        batch=batch,
        context=context,
        dtype=dtype,
    )


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(3, 3), (6, 3), (3, 1)])
def test_attention_block_is_norm_projections_rope_attention_and_residual(
    ops, to_device, to_host, rng, n_heads, n_kv_heads
):
    dim, n = 12 * n_heads // 2, 5  # C = 6
    host, layer = random_layer(rng, to_device, dim, n_heads, n_kv_heads)
    x = rng.standard_normal((n, dim))
    h = norm(x, host["attention_norm"])
    q, k, v = ((h @ host[w].T).reshape(n, -1, 6) for w in ("wq", "wk", "wv"))
    q, k = (
        np.array([[rope_one(head, t, 100.0) for head in a[t]] for t in range(n)]) for a in (q, k)
    )
    o, _ = attention_one_by_one(*(a.swapaxes(0, 1) for a in (q, k, v)))
    truth = x + o.swapaxes(0, 1).reshape(n, dim) @ host["wo"].T
    cache = make_cache(ops, 6, n_kv_heads)
    got = ops.attention_block(to_device(x[None]), layer, cache.layers[0], cache.positions(n))
    assert_close(to_host(got)[0], truth)
    assert_close(to_host(cache.layers[0].k)[0, :, :n], k.swapaxes(0, 1))
    assert_close(to_host(cache.layers[0].v)[0, :, :n], v.swapaxes(0, 1))


def test_feed_forward_is_norm_swiglu_and_residual(ops, to_device, to_host, rng):
    host, layer = random_layer(rng, to_device)
    x = rng.standard_normal((2, 3, 18))
    h = norm(x, host["ffn_norm"])
    gate, up = h @ host["w_gate"].T, h @ host["w_up"].T
    truth = x + (gate / (1 + np.exp(-gate)) * up) @ host["w_down"].T
    assert_close(to_host(ops.feed_forward(to_device(x), layer)), truth)


def test_head_is_norm_and_projection(ops, to_device, to_host, rng):
    weight, w = rng.random(7), rng.standard_normal((11, 7))
    x = rng.standard_normal((2, 1, 7))
    head = Head(to_device(weight), Matrix(to_device(w)), 1e-3)
    assert_close(to_host(ops.head(to_device(x), head)), norm(x, weight) @ w.T)


def test_decoding_continues_where_prefill_ended(ops, to_device, to_host, rng):
    """One block over 5 tokens at once, and over 3, 1 and 1 tokens, returns the same rows."""
    _, layer = random_layer(rng, to_device, dim=36)
    x = rng.standard_normal((1, 5, 36))
    cache = make_cache(ops)
    whole = to_host(
        ops.attention_block(to_device(x), layer, cache.layers[0], cache.positions(5))
    ).copy()
    cache, parts = make_cache(ops), []
    for begin, end in ((0, 3), (3, 4), (4, 5)):
        positions = cache.positions(end - begin)
        part = to_device(x[:, begin:end])
        parts.append(to_host(ops.attention_block(part, layer, cache.layers[0], positions)).copy())
        cache.advance_on_device(positions)
        cache.advance(positions.rows, [end - begin])
    assert_close(np.concatenate(parts, axis=1), whole, 10 * EXACT)


def test_the_hooks_of_the_reference_change_nothing(ops, to_device, rng):
    x = to_device(rng.standard_normal((2, 3)))
    assert ops.all_reduce(x) is x
    assert ops.all_gather(x) is x
    step = object()
    if not isinstance(ops, CupyOps):  # test_capture.py tests CupyOps
        assert ops.compile(step) is step


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_layer_split_over_two_shards_is_the_whole(
    ops, to_device, to_host, rng, monkeypatch, dtype
):
    """A block with local H, K and F computes the output of its shard. The sum of both outputs,
    which `all_reduce` computes, is the output of the whole layer. Nothing else is exchanged."""
    host, layer = random_layer(rng, to_device, 24, n_heads=4, n_kv_heads=2, ffn_dim=10, dtype=dtype)

    def half(i):
        def rows(w):
            n = w.shape[0] // 2
            return Matrix(to_device(w[i * n : i * n + n].astype(dtype)))

        def columns(w):
            return Matrix(to_device(w.reshape(w.shape[0], 2, -1)[:, i].astype(dtype)))

        split = {name: rows(host[name]) for name in ("wq", "wk", "wv", "w_gate", "w_up")}
        split |= {name: columns(host[name]) for name in ("wo", "w_down")}
        norms = {
            name: to_device(host[name].astype(dtype)) for name in ("attention_norm", "ffn_norm")
        }
        return Layer(**split, **norms, norm_eps=1e-3)

    x = rng.standard_normal((1, 5, 24)).astype(dtype)

    def run(part, n_kv_heads, all_reduce):
        monkeypatch.setattr(ops, "all_reduce", all_reduce)
        cache = make_cache(ops, 6, n_kv_heads, dtype=dtype)
        part = ops.prepare(part)
        a = ops.attention_block(to_device(x), part, cache.layers[0], cache.positions(5))
        return to_host(a), to_host(ops.feed_forward(to_device(x), part))

    partial = []  # outputs of attention and feed-forward, first one half and then the other
    for i in range(2):
        run(half(i), 1, lambda y: partial.append(to_host(y).copy()) or y)
    truth = run(layer, 2, lambda y: y)
    for i in range(2):
        sums = map(to_device, [partial[0] + partial[2], partial[1] + partial[3]])
        parts = run(half(i), 1, lambda _, sums=sums: next(sums))
        for got, want in zip(parts, truth, strict=True):
            assert_close(got, want, 10 * EXACT if dtype == "float64" else 2e-6)


def test_the_model_is_its_blocks_in_order(ops, to_host):
    """The whole model in float64, from the embedding to the logits."""
    llama = make_llama(ops)
    ids = [1, 100, 7, 259, 3]
    p = llama.parameters

    def wide(a):
        return to_host(a).astype("float64")

    x = wide(p.embedding.values)[ids]
    for layer in p.layers:
        h = norm(x, wide(layer.attention_norm), TINY.norm_eps)
        q, k, v = (
            (h @ wide(w.values).T).reshape(len(ids), -1, 8) for w in (layer.wq, layer.wk, layer.wv)
        )
        q, k = (
            np.array([[rope_one(head, t, 1e4) for head in row] for t, row in enumerate(a)])
            for a in (q, k)
        )
        o, _ = attention_one_by_one(*(a.swapaxes(0, 1) for a in (q, k, v)))
        x = x + o.swapaxes(0, 1).reshape(len(ids), -1) @ wide(layer.wo.values).T
        h = norm(x, wide(layer.ffn_norm), TINY.norm_eps)
        gate, up = h @ wide(layer.w_gate.values).T, h @ wide(layer.w_up.values).T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ wide(layer.w_down.values).T
    truth = norm(x, wide(p.head.norm), TINY.norm_eps) @ wide(p.head.lm_head.values).T
    assert_close(llama.logits(ids), truth, 1e-5)
