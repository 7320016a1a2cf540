"""Compares every method that a backend overrides with the reference.

The expected results are those of the reference in float64 on NumPy. Each override in NumpyOps and
CupyOps must have a grid of inputs in GRIDS, or collection fails. Each grid runs on every
implementation, including the reference on each backend, with the tolerance of its backend and
dtype. One test runs a whole grid and reports the cases that differ, because a separate test for
each of the thousands of cases would take longer to set up than to compute.
"""

import functools
import inspect
import itertools
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import ml_dtypes
import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

from comparing.tolerance import tolerance
from conftest import rope_table
from npllama.backend import Backend
from npllama.kv_cache import KVCache
from npllama.ops import CupyOps, NumpyOps, Ops
from npllama.ops.cuda.gemv import MAX_ROWS
from npllama.parameters import Head, Layer, Matrix
from npllama.quantization import quantize
from npllama.sampling_options import Sampling
from npllama.threads import Threads
from strict_array import StrictBackend

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

FORMATS = ("float32", "float16", "bfloat16", "int8")
# The largest difference as a fraction of the largest value, from the table of tools/equivalence.py.
TOLERANCE = {
    (backend, dtype + rows): tolerance(backend, dtype, "q-k-v", phase)
    for backend in ("numpy", "cupy")
    for dtype in FORMATS
    for rows, phase in (("", "decode"), (", many rows", "prompt"))
}
WIDE = 70_000
"""A width larger than that of any model. cuBLAS has larger float32 rounding errors here."""
T = (1, 2, 8, 9, 33)
S = (0, 1, 600)
B = (1, 3)
G = (1, 2, 8)
KERNEL_B = (1, 3, 8, 9)
"""Numbers of rows with one token each. The kernels support up to 8."""


@functools.cache
def linear_rows(width):
    """The most rows that a case of linear uses. They are cached, because generating them takes
    longer than computing a product."""
    return np.random.default_rng(1).standard_normal((max(B), max(T), width), dtype="float32")


def linear_grid():
    """Yield (dtype, label, call) for widths around the tile size and odd numbers of outputs."""
    for dtype, shape in itertools.product(
        ("float32", "float16", "bfloat16", "int8"), ((5, 7), (600, 1000), (11, WIDE))
    ):
        rng = np.random.default_rng(0)
        if dtype == "int8":
            values = rng.integers(-127, 128, shape).astype("int8")
        else:
            values = rng.standard_normal(shape, dtype="float32").astype(dtype)
        has_scale = dtype == "int8" or (dtype == "float32" and shape[0] == 5)
        scale = rng.random(shape[0], dtype="float32") if has_scale else None
        for b, t in itertools.product(B, T):
            x = linear_rows(shape[1])[:b, :t].copy()

            def call(ops, wide, move, x=x, values=values, scale=scale):
                w = Matrix(move(wide(values)), None if scale is None else move(wide(scale)))
                return ops.linear(move(wide(x)), w)

            yield dtype, f"{dtype}-B{b}-T{t}-{shape[0]}x{shape[1]}", call


def attention_grid():
    """Every T, S and G, with workspace for all heads at once, for one head, and for less than
    one."""
    for t, s, g, room in itertools.product(T, S, G, ("all", "one", "none")):
        rng = np.random.default_rng(0)
        n_kv_heads, head_dim = (3, 6) if room == "all" else (1, 20)
        q = rng.standard_normal((n_kv_heads * g, t, head_dim), dtype="float32")
        k, v = rng.standard_normal((2, n_kv_heads, s + t, head_dim), dtype="float32")
        size = {"all": n_kv_heads, "one": 1, "none": 0.5}[room] * g * t * (s + t)

        def call(ops, wide, move, q=q, k=k, v=v, size=int(size)):
            scratch = move(np.zeros(size, dtype="float32"))
            return ops.attention(move(wide(q)), move(wide(k)), move(wide(v)), scratch)

        yield "float32", f"T{t}-S{s}-G{g}-{room}", call


def attention_weights_grid():
    for t, s, g in itertools.product(T, S, G):
        rng = np.random.default_rng(0)
        q = rng.standard_normal((3 * g, t, 6), dtype="float32")
        k = rng.standard_normal((3, s + t, 6), dtype="float32")

        def call(ops, wide, move, q=q, k=k):
            return ops.attention_weights(move(wide(q)), move(wide(k)))

        yield "float32", f"T{t}-S{s}-G{g}", call


def elementwise_grid(name, n_inputs):
    """`name` on `n_inputs` arrays (B, T, F) with some large elements. Several outputs are
    stacked."""

    def grid():
        for b, t in itertools.product(B, T):
            rng = np.random.default_rng(0)
            inputs = rng.standard_normal((n_inputs, b, t, 7), dtype="float32") * 3
            inputs[..., 0] *= 30

            def call(ops, wide, move, inputs=inputs):
                y = getattr(ops, name)(*(move(wide(x)) for x in inputs))
                return ops.xp.stack(y) if isinstance(y, tuple) else y

            yield "float32", f"B{b}-T{t}", call

    return grid


def embedding_backward_grid():
    """Few tokens for a large vocabulary, and many tokens for a small one."""
    for b, t, n_vocab in itertools.product(B, T, (2, 5, 300)):
        rng = np.random.default_rng(0)
        dx = rng.standard_normal((b, t, 6), dtype="float32")
        tokens = rng.integers(0, n_vocab, (b, t))
        w = np.zeros((n_vocab, 6), dtype="float32")

        def call(ops, wide, move, dx=dx, tokens=tokens, w=w):
            return ops.embedding_backward(move(wide(dx)), move(tokens), Matrix(move(wide(w))))

        yield "float32", f"B{b}-T{t}-V{n_vocab}", call


def rms_norm_grid():
    for b, t, width, order in itertools.product(B, T, (7, 148), "CF"):
        rng = np.random.default_rng(0)
        x = rng.standard_normal((b, t, width), dtype="float32") * 0.1
        x = np.asarray(x, order=order)
        weight = rng.random(width, dtype="float32") + 0.5

        def call(ops, wide, move, x=x, weight=weight):
            return ops.rms_norm(move(wide(x)), move(wide(weight)), 1e-3)

        yield "float32", f"B{b}-T{t}-{width}-{order}", call


def rope_grid():
    """Includes views of some heads of a larger array, as in a joint product."""
    for b, t, n_heads, order in itertools.product(B, T, (1, 5), "CF"):
        rng = np.random.default_rng(0)
        x = rng.standard_normal((b, t, n_heads + 2, 6), dtype="float32")
        x = np.asarray(x, order=order)
        cos, sin = rng.standard_normal((2, b, t, 3), dtype="float32")

        def call(ops, wide, move, x=x, cos=cos, sin=sin, n_heads=n_heads):
            heads = move(wide(x))[:, :, :n_heads]
            return ops.rope(heads, move(wide(cos)), move(wide(sin)))

        yield "float32", f"B{b}-T{t}-H{n_heads}-{order}", call


def make_layer(
    ops, wide, move, dtype, n_heads, n_kv_heads, head_dim=6, ffn_dim=11, apart=False, dim=None
):
    """A layer in which q, k, v and gate, up are contiguous, or in which all matrices are
    separate."""
    rng = np.random.default_rng(1)
    q, kv = n_heads * head_dim, n_kv_heads * head_dim
    dim = dim or q

    def matrices(n_in, *n_outs):
        values = rng.standard_normal((sum(n_outs), n_in), dtype="float32") / n_in**0.5
        scale = None
        if dtype == "int8":
            values, scale = quantize(values)
        values = wide(values.astype(dtype))
        begin = 0
        for n in n_outs:
            rows = slice(begin, begin := begin + n)
            part = values[rows].copy() if apart else values[rows]
            yield Matrix(move(part), None if scale is None else move(wide(scale[rows])))

    wq, wk, wv = matrices(dim, q, kv, kv)
    (wo,) = matrices(q, dim)
    w_gate, w_up = matrices(dim, ffn_dim, ffn_dim)
    (w_down,) = matrices(ffn_dim, dim)
    norms = [move(wide(rng.random(dim, dtype="float32") + 0.5)) for _ in range(2)]
    layer = Layer(norms[0], wq, wk, wv, wo, norms[1], w_gate, w_up, w_down, norm_eps=1e-3)
    return ops.prepare(layer)


def make_cache(ops, wide, move, starts, n_new, n_heads, n_kv_heads, head_dim=6, storage=None):
    """A cache of one layer with starts[b] positions of random keys and values in row b.

    Its dtype is the cache dtype of `ops` for weights in `storage`, or else the dtype of x.
    """
    rng = np.random.default_rng(2)
    context = max(starts) + n_new
    dtype = table_dtype = wide(np.zeros(1, dtype="float32")).dtype
    if storage is not None and dtype == np.float32:
        dtype = ops.cache_dtype(np.dtype(storage))
    cache = KVCache(
        ops.backend,
        rope_table(ops, context, head_dim, 100.0, table_dtype),
        n_layers=1,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        batch=len(starts),
        context=context,
        dtype=dtype,
        scratch_size=ops.scratch_size(n_heads, n_kv_heads, n_new, context),
    )
    for b, start in enumerate(starts):
        for buffer in (cache.layers[0].k, cache.layers[0].v):
            past = rng.standard_normal((n_kv_heads, start, head_dim), dtype="float32")
            buffer[b, :, :start] = move(wide(past))
        cache.lengths[b] = start
    cache.device_lengths = move(np.array(starts, dtype="int32"))
    return cache


def attention_block_grid():
    """Output, keys and values of ragged rows.

    Covers short prompts and prompts that are divided into chunks; outputs for all tokens and for
    the last ones; and heads whose total width is that of the residual stream, or another.
    """
    for t, s, b, g in itertools.product((*T, 130, 200), S, B, G):
        rng = np.random.default_rng(0)
        n_kv_heads = 2 if g < 8 else 1
        dim = 14 if g == 2 else n_kv_heads * g * 6
        x = rng.standard_normal((b, t, dim), dtype="float32")

        def call(ops, wide, move, x=x, s=s, g=g, n_kv_heads=n_kv_heads, n_last=None):
            heads = (n_kv_heads * g, n_kv_heads)
            layer = make_layer(ops, wide, move, "float32", *heads, apart=s == 1, dim=x.shape[-1])
            starts = [max(0, s - b) for b in range(len(x))]
            cache = make_cache(ops, wide, move, starts, x.shape[1], *heads)
            positions = cache.positions(x.shape[1])
            y = ops.attention_block(move(wide(x)), layer, cache.layers[0], positions, n_last)
            k, v = cache.layers[0].k, cache.layers[0].v
            return ops.xp.concatenate([a.reshape(-1) for a in (y, k, v)])

        yield "float32", f"B{b}-T{t}-S{s}-G{g}", call
        for n_last in {1, t // 2 + 1} - {t}:
            some = functools.partial(call, n_last=n_last)
            yield "float32", f"B{b}-T{t}-S{s}-G{g}-last{n_last}", some
    yield from attention_block_kernel_grid()


def attention_block_kernel_grid():
    """One new token per row in shapes that the GPU kernels support, with every format, number of
    rows and head width. Also shapes that they do not support: more rows, and one chunk too few for
    a format."""
    shapes = [(b, 2, 2, 32, 64) for b in KERNEL_B]
    shapes += [(3, n_heads, 1, width, 64) for n_heads, width in ((1, 16), (4, 64), (2, 128))]
    shapes += [(1, 2, 1, 16, 56), (1, 2, 1, 20, 64)]  # D not divisible by 16; C not divisible by 8
    for dtype, (b, n_heads, n_kv_heads, head_dim, dim) in itertools.product(FORMATS, shapes):
        x = np.random.default_rng(0).standard_normal((b, 1, dim), dtype="float32")

        def call(ops, wide, move, x=x, dtype=dtype, heads=(n_heads, n_kv_heads), head_dim=head_dim):
            layer = make_layer(
                ops, wide, move, dtype, *heads, head_dim, ffn_dim=32, dim=x.shape[-1]
            )
            starts = [(17 * b) % 40 for b in range(len(x))]
            cache = make_cache(ops, wide, move, starts, 1, *heads, head_dim, storage=dtype)
            positions = cache.positions(1)
            x = move(wide(x)) * 1  # an array operation, as the embedding in a step
            y = ops.attention_block(x, layer, cache.layers[0], positions)
            k, v = cache.layers[0].k, cache.layers[0].v
            return ops.xp.concatenate([a.astype(y.dtype).reshape(-1) for a in (y, k, v)])

        # for int8 weights, keys and values are float16
        rounded = "float16" if dtype == "int8" else dtype
        yield rounded, f"{dtype}-B{b}-H{n_heads}-K{n_kv_heads}-C{head_dim}-D{dim}", call


def cached_attention_grid():
    """Output, keys and values of ragged rows, for the queries of all tokens and of only the last
    one."""
    for t, s, b, g in itertools.product(T, S, B, G):
        rng = np.random.default_rng(0)
        q = rng.standard_normal((b, t, 2 * g, 6), dtype="float32")
        k, v = rng.standard_normal((2, b, t, 2, 6), dtype="float32")

        def call(ops, wide, move, q=q, k=k, v=v, s=s, g=g, n_last=None):
            starts = [max(0, s - b) for b in range(len(q))]
            cache = make_cache(ops, wide, move, starts, k.shape[1], 2 * g, 2)
            new = [move(wide(a)) for a in (q if n_last is None else q[:, -n_last:], k, v)]
            o = ops.cached_attention(*new, cache.layers[0], cache.positions(k.shape[1]))
            kept = cache.layers[0]
            return ops.xp.concatenate([a.reshape(-1) for a in (o, kept.k, kept.v)])

        yield "float32", f"B{b}-T{t}-S{s}-G{g}", call
        yield "float32", f"B{b}-T{t}-S{s}-G{g}-last1", functools.partial(call, n_last=1)


def of_rows(dtype, n_rows, n_tokens=1):
    """The key of TOLERANCE for a number of rows, with n_tokens tokens each."""
    is_few = n_rows <= MAX_ROWS and n_tokens == 1
    return dtype if is_few or dtype != "int8" else "int8, many rows"


def feed_forward_grid():
    yield from feed_forward_array_grid()
    yield from feed_forward_kernel_grid()


def feed_forward_kernel_grid():
    """Like attention_block_kernel_grid, with D and F that the kernels support, and others."""
    shapes = [(b, 64, 48) for b in KERNEL_B] + [(3, 160, 16), (1, 72, 48), (1, 64, 33)]
    for dtype, (b, dim, ffn_dim) in itertools.product(FORMATS, shapes):
        x = np.random.default_rng(0).standard_normal((b, 1, dim), dtype="float32")

        def call(ops, wide, move, x=x, dtype=dtype, ffn_dim=ffn_dim):
            layer = make_layer(ops, wide, move, dtype, 1, 1, ffn_dim=ffn_dim, dim=x.shape[-1])
            return ops.feed_forward(move(wide(x)), layer)

        yield of_rows(dtype, b), f"{dtype}-B{b}-D{dim}-F{ffn_dim}", call


def head_grid():
    """Like feed_forward_kernel_grid, and also several tokens per row."""
    shapes = [(b, 1, 64, 40) for b in KERNEL_B]
    shapes += [(3, 1, 160, 7), (1, 1, 72, 40), (1, 1, 61, 40), (2, 3, 64, 40)]
    for dtype, (b, t, dim, n_vocab) in itertools.product(FORMATS, shapes):
        rng = np.random.default_rng(0)
        x = rng.standard_normal((b, t, dim), dtype="float32")
        norm = rng.random(dim, dtype="float32") + 0.5
        values, scale = rng.standard_normal((n_vocab, dim), dtype="float32") / dim**0.5, None
        if dtype == "int8":
            values, scale = quantize(values)
        values = values.astype(dtype)

        def call(ops, wide, move, x=x, norm=norm, values=values, scale=scale):
            w = Matrix(move(wide(values)), None if scale is None else move(wide(scale)))
            return ops.head(move(wide(x)), ops.prepare(Head(move(wide(norm)), w, 1e-3)))

        yield of_rows(dtype, b, t), f"{dtype}-B{b}-T{t}-D{dim}-V{n_vocab}", call


def feed_forward_array_grid():
    for dtype, apart, t, b in itertools.product(
        ("float32", "int8"), (False, True), (*T, 130, 200), B
    ):
        x = np.random.default_rng(0).standard_normal((b, t, 24), dtype="float32")

        def call(ops, wide, move, x=x, dtype=dtype, apart=apart):
            layer = make_layer(ops, wide, move, dtype, 4, 2, apart=apart)
            return ops.feed_forward(move(wide(x)), layer)

        yield dtype, f"{dtype}-B{b}-T{t}-{'apart' if apart else 'joined'}", call


def queries_keys_values_grid():
    for dtype, apart, t, b, g in itertools.product(("float32", "int8"), (False, True), T, B, G):
        h = np.random.default_rng(0).standard_normal((b, t, 12 * g), dtype="float32")

        def call(ops, wide, move, h=h, dtype=dtype, apart=apart, g=g, n_last=None):
            layer = make_layer(ops, wide, move, dtype, 2 * g, 2, apart=apart)
            cache = make_cache(ops, wide, move, [5] * len(h), h.shape[1], 2 * g, 2)
            positions = cache.positions(h.shape[1])
            parts = ops.queries_keys_values(move(wide(h)), layer, positions, n_last)
            return ops.xp.concatenate([a.reshape(-1) for a in parts])

        label = f"{dtype}-B{b}-T{t}-G{g}-{'apart' if apart else 'joined'}"
        yield dtype, label, call
        yield dtype, f"{label}-last1", functools.partial(call, n_last=1)


def keep_top_p_grid():
    """Flat and peaked distributions with ties, and p from almost 0 to almost 1."""
    for b, n_vocab, p, sharpness in itertools.product(
        B, (1, 7, 1000), (1e-6, 0.5, 0.9, 1 - 1e-6), (0, 1, 8)
    ):
        rng = np.random.default_rng(0)
        logits = np.round(rng.standard_normal((b, n_vocab)), 1).astype("float32") * sharpness

        def call(ops, wide, move, logits=logits, p=p):
            return ops.keep_top_p(move(logits), p)  # logits, some of them removed

        yield "float32", f"B{b}-V{n_vocab}-p{p}-x{sharpness}", call


def sample_grid():
    """From only one possible token to all tokens."""
    for b, n_vocab, share in itertools.product(B, (1, 7, 1000), (0, 0.1, 1)):
        rng = np.random.default_rng(0)
        logits = rng.standard_normal((b, n_vocab), dtype="float32") * 3
        gone = rng.random((b, n_vocab)) >= share
        gone[:, n_vocab // 2] = False
        logits[gone] = -np.inf
        uniforms = np.linspace(0, 1, 40, endpoint=False)

        def call(ops, wide, move, logits=logits, uniforms=uniforms):
            x, n = move(wide(logits)), len(logits)
            ids = [ops.sample(x, move(np.full(n, u))) for u in uniforms]
            return ops.xp.stack(ids).astype("float32")

        yield "float32", f"B{b}-V{n_vocab}-{share}", call


def next_token_grid():
    """Greedy, without filters, with each filter and with all; returns ids and log-probabilities."""
    plain = {"temperature": 1.0, "top_p": 1.0}
    everything = {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2}
    one_each = [plain | {name: value} for name, value in everything.items()]
    chosen = [{"temperature": 0.0}, plain, *one_each, everything]
    for b, n_vocab, changes in itertools.product(B, (1, 7, 1000), chosen):
        rng = np.random.default_rng(0)
        logits = rng.standard_normal((b, n_vocab), dtype="float32") * 3
        uniform, seen = rng.random(b), rng.random((b, n_vocab)) < 0.3
        n_tokens = max(n_vocab - 2, 1)
        allowed = np.arange(n_tokens) % 3 != 1

        def call(ops, wide, move, part, x=logits, u=uniform, seen=seen, allowed=allowed, s=changes):
            n_tokens, state = len(allowed), move(seen.copy())
            arguments = move(wide(x)), move(u), Sampling(**s), state, n_tokens, move(allowed)
            return ops.next_token(*arguments)[part].astype("float32")

        label = f"B{b}-V{n_vocab}-{changes}"
        yield "float32", f"{label}-ids", functools.partial(call, part=0)
        yield "float32", f"{label}-log-probs", functools.partial(call, part=1)


def embed_grid():
    for b, t in itertools.product(B, T):
        rng = np.random.default_rng(0)
        tokens, w = rng.integers(0, 9, (b, t)), rng.standard_normal((9, 6), dtype="float32")

        def call(ops, wide, move, tokens=tokens, w=w):
            return ops.embed(move(tokens), Matrix(move(w)))

        yield "float32", f"B{b}-T{t}", call


# Fast grids come first, because a run with a seeded mistake ends at the first failure.
GRIDS = {
    "embed": embed_grid,
    "rms_norm": rms_norm_grid,
    "rope": rope_grid,
    "swiglu": elementwise_grid("swiglu", 2),
    "sigmoid": elementwise_grid("sigmoid", 1),
    "keep_top_p": keep_top_p_grid,
    "sample": sample_grid,
    "next_token": next_token_grid,
    "embedding_backward": embedding_backward_grid,
    "softmax_backward": elementwise_grid("softmax_backward", 2),
    "swiglu_backward": elementwise_grid("swiglu_backward", 3),
    "feed_forward": feed_forward_grid,
    "head": head_grid,
    "attention_weights": attention_weights_grid,
    "attention": attention_grid,
    "queries_keys_values": queries_keys_values_grid,
    "cached_attention": cached_attention_grid,
    "attention_block": attention_block_grid,
    "linear": linear_grid,
}

# Hooks that compute nothing. The comments name their tests.
NOT_MATHEMATICS = {
    "attention_nbytes",  # test_memory.py
    "prefill_chunk",  # test_kernels_prompt.py
    "scratch_size",  # test_the_scratch_has_room_for_some_queries_of_a_key_head_in_every_thread
    "prepare",  # test_weights.py, test_workers.py
    "turn",  # test_threads.py
    "forward_context",  # test_workers.py
    "compile",  # test_capture.py
    "cache_dtype",  # test_the_cache_keeps_the_dtype_that_design_says
}


def own_names(cls):
    """The public names of a class and its bases, except for those of the reference."""
    own = [base for base in cls.__mro__ if base not in Ops.__mro__]
    return {name for base in own for name in vars(base) if not name.startswith("_")}


def overrides(cls):
    return own_names(cls) - NOT_MATHEMATICS


def names_with_a_grid():
    found = [(cls, name) for cls in (NumpyOps, CupyOps) for name in sorted(overrides(cls))]
    for cls, name in found:
        assert hasattr(Ops, name), f"{cls.__name__}.{name} overrides nothing in Ops"
        assert name in GRIDS, f"{cls.__name__}.{name} overrides Ops without a grid of inputs"
    return list(GRIDS)


TRUTHS = {}
# For everything but NumPy's overrides: a second BLAS thread would wait longer than it computes.
ONE_BLAS_THREAD = functools.partial(ThreadpoolController().limit, limits=1, user_api="blas")


def cases(name, wanted=lambda _dtype, _label: True):
    """Yield (dtype, label, call, truth) for the selected cases. Each truth is computed only once
    for all tests."""
    for dtype, label, call in GRIDS[name]():
        if not wanted(dtype, label):
            continue
        if (name, label) not in TRUTHS:
            with ONE_BLAS_THREAD():
                wide = call(Ops(Backend()), lambda a: a.astype("float64"), lambda a: a)
            TRUTHS[name, label] = wide
        print(label)  # shows the label of a case that raises
        yield dtype, label, call, TRUTHS[name, label]


def is_close(got, truth, tolerance):
    if got.shape != truth.shape or got.dtype != np.float32:
        return False
    gone = np.isneginf(truth)  # removed by a filter
    if not np.array_equal(np.isneginf(got), gone):
        return False
    got, truth = np.where(gone, 0, got), np.where(gone, 0, truth)
    return np.abs(got - truth).max() <= tolerance * np.abs(truth).max()


def assert_equals_the_reference(ops, cases):
    kind = "cupy" if isinstance(ops, CupyOps) else "numpy"
    close = {}
    for dtype, label, call, truth in cases:
        with nullcontext() if isinstance(ops, NumpyOps) else ONE_BLAS_THREAD():
            got = ops.backend.to_host(call(ops, lambda a: a, ops.backend.to_device))
        more = 5 if ops.backend.name == "cupy" and label.endswith(f"x{WIDE}") else 1
        close[label] = is_close(got, truth, more * TOLERANCE[kind, dtype])
    assert [label for label in close if not close[label]] == []
    assert close


@pytest.mark.parametrize("name", names_with_a_grid())
def test_an_override_computes_what_the_reference_does(name, ops):
    assert_equals_the_reference(ops, cases(name))


@pytest.mark.parametrize("sharpness", [0, 1, 8])
def test_top_p_next_to_1_keeps_what_the_reference_keeps(ops, rng, sharpness):
    """The same tokens remain, except for those so close to the boundary that float32 rounding on
    the device can change the result."""
    logits = np.round(rng.standard_normal((3, 1000)), 1).astype("float32") * sharpness
    p = 1 - 1e-7
    reference = Ops(Backend())
    probability = reference.softmax(logits).astype("float64")
    truth = np.isfinite(reference.keep_top_p(logits, p))
    got = np.isfinite(ops.backend.to_host(ops.keep_top_p(ops.backend.to_device(logits), p)))
    order = np.argsort(-probability, axis=-1, kind="stable")
    falling = np.take_along_axis(probability, order, axis=-1)
    before = np.empty_like(probability)
    np.put_along_axis(before, order, np.cumsum(falling, axis=-1) - falling, axis=-1)
    undecided = np.abs(before - p) < (5e-7 if ops.backend.name == "cupy" else 0)
    assert np.array_equal(got | undecided, truth | undecided)


@pytest.mark.parametrize("name", ["linear", "embed", "feed_forward", "attention_block"])
def test_with_one_thread_it_computes_the_same(name):
    ops = NumpyOps(Backend(threads=Threads(1)))
    some = cases(name, lambda _dtype, label: "B3-T33" in label or "B1-T130" in label)
    assert_equals_the_reference(ops, some)


@pytest.mark.parametrize("name", ["rms_norm", "rope", "swiglu", "feed_forward", "attention_block"])
def test_in_many_chunks_it_computes_the_same(name, monkeypatch):
    """Cases with enough rows to be divided into chunks, which have only a few columns each."""
    monkeypatch.setattr("npllama.ops.chunks.MANY_ROWS", 30)
    monkeypatch.setattr("npllama.ops.chunks.CHUNK", 70)
    ops = NumpyOps(Backend(threads=Threads(2)))
    some = cases(name, lambda dtype, label: dtype == "float32" and "B1-T33" in label)
    assert_equals_the_reference(ops, some)


def test_one_ops_serves_several_threads(rng):
    ops = NumpyOps(Backend())
    w = Matrix(rng.standard_normal((1100, 512)).astype("float16"))  # two tiles
    inputs = rng.standard_normal((20, 1, 512)).astype("float32")
    truth = [ops.linear(x, w) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(lambda x: ops.linear(x, w), inputs), truth, strict=True):
            assert np.array_equal(got, want)


def test_a_row_wider_than_a_tile_is_a_tile_of_its_own(monkeypatch, rng):
    monkeypatch.setattr("npllama.ops.tiles.TILE", 4)
    x, w = rng.standard_normal((2, 7)), rng.standard_normal((5, 7)).astype("float16")
    got = NumpyOps(Backend()).linear(x.astype("float32"), Matrix(w))
    assert np.abs(got - x @ w.astype("float64").T).max() < 1e-5


def test_an_override_without_a_grid_is_found(monkeypatch):
    monkeypatch.setattr(NumpyOps, "silu", lambda self, x: x, raising=False)
    with pytest.raises(AssertionError, match=r"silu.*without a grid"):
        names_with_a_grid()


def test_an_override_has_the_signature_of_its_twin():
    for cls in (NumpyOps, CupyOps):
        for name in own_names(cls):
            assert inspect.signature(getattr(cls, name)) == inspect.signature(getattr(Ops, name))


def test_the_scratch_has_room_for_some_queries_of_a_key_head_in_every_thread():
    numpy_ops = NumpyOps(Backend(threads=Threads(2)))
    assert numpy_ops.scratch_size(n_heads=32, n_kv_heads=8, chunk=1, context=100) == 2 * 4 * 100
    assert numpy_ops.scratch_size(n_heads=32, n_kv_heads=8, chunk=512, context=100) == 2 * 128 * 100
    assert Ops(Backend()).scratch_size(32, 8, 64, 100) == 0


@pytest.mark.parametrize(
    ("storage", "on_cupy"),
    [("float32", "float32"), ("float16", "float16"), ("int8", "float16"), (BFLOAT16, BFLOAT16)],
)
def test_the_cache_keeps_the_dtype_that_design_says(storage, on_cupy):
    assert NumpyOps(Backend()).cache_dtype(np.dtype(storage)) == np.float32
    assert CupyOps(StrictBackend()).cache_dtype(np.dtype(storage)) == np.dtype(on_cupy)
