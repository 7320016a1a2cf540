"""Blocks with many tokens on CUDA: products by cuBLAS, and the kernels between them.

The expected results are those of the reference in float64 on NumPy. The kernels run on the CPU
(cuda_simulator.py) in several thread orders, and NumPy computes the products (strict_cublas.py).
"""

import itertools

import numpy as np
import pytest

from cuda_simulator import ORDERS, compiler
from npllama.backend import Backend
from npllama.kv_cache import KVCache, LayerCache
from npllama.ops import CupyOps, Ops
from npllama.ops.cuda import decode_attention, prompt
from npllama.parameters import Head, Matrix
from npllama.weight_formats import FORMATS
from strict_cupy import DEVICE, StrictCupyBackend
from test_overrides import TOLERANCE, make_cache, make_layer

pytestmark = pytest.mark.skipif(compiler() is None, reason="no g++ 12 on this machine")

REFERENCE = Ops(Backend())
DTYPES = ("float16", "bfloat16", "int8")
ATTENTION = ["rms_norm_rows", "rotate_and_cache", "softmax_rows"]
DIM, HEAD_DIM, FFN_DIM = 48, 16, 64
FEW = [  # T, S, B, G, n_last: T of one query and of several tiles; no past, a short and a long one
    (2, 0, 1, 1, None),
    (9, 5, 2, 2, None),
    (33, 600, 1, 2, 1),
    (40, 3, 3, 4, 11),
]


@pytest.fixture
def cuda():
    return CupyOps(StrictCupyBackend())


@pytest.fixture(params=["at once", "in turns"])
def room(request, monkeypatch):
    """Workspace for all queries and heads at once, or for a few queries, one key head and some
    rows."""
    if request.param == "in turns":
        monkeypatch.setattr(prompt, "QUERIES", 7)
        monkeypatch.setattr(prompt, "SCORES", 2000)
        monkeypatch.setattr(prompt, "WIDENED", 20 * DIM)  # 16 rows


def tolerance(dtype):
    return TOLERANCE["cupy", "int8, many rows" if dtype == "int8" else dtype]


def wide(a):
    return a.astype("float64")


def joined(ops, *matrices):
    arrays = zip(*(m.arrays() for m in matrices), strict=True)
    return Matrix(*(ops.xp.concatenate(parts) for parts in arrays))


def layer_on(ops, dtype, heads, **shape):
    """The same layer for the kernels and, in float64, for the reference."""
    if not isinstance(ops, CupyOps):
        return make_layer(ops, wide, lambda a: a, dtype, *heads, **shape)
    layer = make_layer(ops, lambda a: a, ops.backend.to_device, dtype, *heads, **shape)
    qkv = joined(ops, layer.wq, layer.wk, layer.wv)
    return layer.with_derived(qkv=qkv, gate_up=joined(ops, layer.w_gate, layer.w_up))


def cache_on(ops, dtype, starts, n_new, heads, head_dim=HEAD_DIM):
    """The same cache contents in the cache dtype for `dtype` and, for the reference, in float64."""
    if not isinstance(ops, CupyOps):
        return make_cache(ops, wide, lambda a: a, starts, n_new, *heads, head_dim)
    kept = FORMATS[dtype].cache_dtype
    cache = make_cache(
        ops, lambda a: a.astype(kept), ops.backend.to_device, starts, n_new, *heads, head_dim
    )
    cache.rope_table = tuple(table.astype("float32") for table in cache.rope_table)
    return cache


def attention_block(ops, dtype, case, head_dim=HEAD_DIM, dim=DIM, cache_dtype=None):
    """The output, and the keys and values in the cache."""
    n_new, n_past, batch, groups, n_last = case
    heads = (2 * groups, 2)
    layer = layer_on(ops, dtype, heads, head_dim=head_dim, ffn_dim=FFN_DIM, dim=dim)
    starts = [max(0, n_past - b) for b in range(batch)]
    cache = cache_on(ops, cache_dtype or dtype, starts, n_new, heads, head_dim)
    x = np.random.default_rng(0).standard_normal((batch, n_new, dim), dtype="float32")
    x = ops.backend.to_device(x if isinstance(ops, CupyOps) else wide(x))
    y = ops.attention_block(x, layer, cache.layers[0], cache.positions(n_new), n_last)
    return [ops.backend.to_host(a) for a in (y, cache.layers[0].k, cache.layers[0].v)]


def feed_forward(ops, dtype, n_rows, ffn_dim=FFN_DIM):
    layer = layer_on(ops, dtype, (4, 2), head_dim=HEAD_DIM, ffn_dim=ffn_dim, dim=DIM)
    x = np.random.default_rng(0).standard_normal((2, n_rows, DIM), dtype="float32")
    x = ops.backend.to_device(x if isinstance(ops, CupyOps) else wide(x))
    return ops.backend.to_host(ops.feed_forward(x, layer))


def head(ops, dtype, n_rows):
    layer = layer_on(ops, dtype, (4, 2), head_dim=HEAD_DIM, ffn_dim=FFN_DIM, dim=DIM)
    x = np.random.default_rng(0).standard_normal((2, n_rows, DIM), dtype="float32")
    x = ops.backend.to_device(x if isinstance(ops, CupyOps) else wide(x))
    return ops.backend.to_host(ops.head(x, Head(layer.ffn_norm, layer.w_up, 1e-3)))


def assert_close(got, truth, bound):
    assert got.shape == truth.shape
    assert np.abs(got.astype("float64") - truth).max() <= bound * np.abs(truth).max()


def names(launches):
    """The names of the launched kernels without template arguments, without duplicates."""
    return list(dict.fromkeys(launch.name.split("<")[0] for launch in launches))


# -- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_attention_block(cuda, room, dtype, case):
    truth = attention_block(REFERENCE, dtype, case)
    for order in ORDERS if case == FEW[1] else ORDERS[:1]:
        with DEVICE.recording() as launches, DEVICE.thread_order(order):
            got = attention_block(cuda, dtype, case)
        widened = ["widen_int8"] if dtype == "int8" else []
        scaled = ["add_scaled_rows"] if dtype == "int8" else []
        expected = [ATTENTION[0], *widened, *ATTENTION[1:], *scaled]
        assert names(launches) == expected
        assert got[0].dtype == np.float32
        for a, b in zip(got, truth, strict=True):
            assert_close(a, b, tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ORDERS)
def test_feed_forward(cuda, room, dtype, order):
    with DEVICE.recording() as launches, DEVICE.thread_order(order):
        got = feed_forward(cuda, dtype, 9)
    first = ["rms_norm_rows", *(["widen_int8"] if dtype == "int8" else []), "swiglu_rows"]
    assert names(launches) == first + (["add_scaled_rows"] if dtype == "int8" else [])
    assert_close(got, feed_forward(REFERENCE, dtype, 9), tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_head(cuda, dtype):
    with DEVICE.recording() as launches:
        got = head(cuda, dtype, 9)
    assert names(launches)[0] == "rms_norm_rows"
    assert_close(got, head(REFERENCE, dtype, 9), tolerance(dtype))


@pytest.mark.parametrize("width", [16, 1024, 1040])  # below, at and above threads * 4
def test_rms_norm_of_rows_that_threads_share(cuda, width):
    rng = np.random.default_rng(0)
    x, norm = rng.standard_normal((3, width)), rng.random(width)
    w = Matrix(cuda.backend.to_device(np.zeros((8, width), "float16")))
    x, norm = (a.astype("float32") for a in (x, norm))
    x[1] *= 1e-3  # makes eps significant
    move = cuda.backend.to_device
    h = prompt.normalized(cuda.kernels, move(x[None]), move(norm), 1e-5, w)
    truth = REFERENCE.rms_norm(wide(x), wide(norm), 1e-5)
    assert_close(cuda.backend.to_host(h), truth, 6e-4)


def test_softmax_of_more_keys_than_threads_take_at_once(cuda):
    """With 1,300 keys, a row has more than threads * 4 elements, and not a multiple of 4."""
    case = (3, 1298, 1, 1, None)
    for a, b in zip(
        attention_block(cuda, "float16", case),
        attention_block(REFERENCE, "float16", case),
        strict=True,
    ):
        assert_close(a, b, tolerance("float16"))


def test_large_scores_do_not_overflow(cuda):
    """In float32, exp of a score of 100 is infinite, but not exp of its difference to the
    maximum."""
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((5, 24), dtype="float32") * 60 + 100
    truth = REFERENCE.softmax(wide(scores[:, :21]))
    move, p = cuda.backend.to_device, cuda.xp.empty((5, 24), dtype="float16")
    arguments = (move(scores), p, 1, 24, 21)
    cuda.kernels.launch(
        "prompt", "softmax_rows<__half>", (5,), (256,), arguments, prompt._of_row(24)
    )
    p = cuda.backend.to_host(p)
    assert_close(p[:, :21], truth, 1e-3)
    assert not p[:, 21:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_new_token_in_many_rows(cuda, dtype, monkeypatch):
    """More rows than the kernels of the decode step support: products by cuBLAS, and decode
    attention."""

    def attend(kernels, qkv, cache, positions):
        heads = qkv.reshape(len(qkv), 1, -1, HEAD_DIM)
        q, k = (
            cuda.rope(a, positions.cos, positions.sin) for a in (heads[:, :, :4], heads[:, :, 4:6])
        )
        return cuda.cached_attention(q, k, heads[:, :, 6:], cache, positions)

    monkeypatch.setattr(decode_attention, "fits", lambda cache: True)
    monkeypatch.setattr(decode_attention, "attend", attend)
    case = (1, 20, 11, 2, None)
    with DEVICE.recording() as launches:
        got = attention_block(cuda, dtype, case)
    assert "rms_norm_rows" in names(launches) and "rotate_and_cache" not in names(launches)
    for a, b in zip(got, attention_block(REFERENCE, dtype, case), strict=True):
        assert_close(a, b, tolerance(dtype))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_with_other_shards_their_sums_are_added_once(cuda, dtype, monkeypatch):
    """With a second shard with the same weights, the residual stream must not be added twice."""
    for ops in (cuda, REFERENCE):
        monkeypatch.setattr(ops, "all_reduce", lambda x: x + x)
    with DEVICE.recording() as launches:
        got = attention_block(cuda, dtype, FEW[1])[0], feed_forward(cuda, dtype, 5)
    assert {"rotate_and_cache", "swiglu_rows"} <= set(names(launches))
    truth = attention_block(REFERENCE, dtype, FEW[1])[0], feed_forward(REFERENCE, dtype, 5)
    for a, b in zip(got, truth, strict=True):
        assert_close(a, b, tolerance(dtype))


# -- supported and unsupported cases -----------------------------------------------------------


@pytest.mark.parametrize(
    ("why", "dtype", "more"),
    [
        ("float32 weights", "float32", {}),
        ("odd width", "float16", {"dim": 40}),
        ("odd head width", "float16", {"head_dim": 12}),
        ("another cache", "float16", {"cache_dtype": "bfloat16"}),
    ],
)
def test_other_shapes_and_dtypes_are_array_calls(cuda, why, dtype, more):
    case = (9, 5, 1, 2, None)
    with DEVICE.recording() as launches:
        got = attention_block(cuda, dtype, case, **more)
    assert launches == []
    truth = attention_block(REFERENCE, dtype, case, **more)
    bound = tolerance("bfloat16" if more.get("cache_dtype") else dtype)
    for a, b in zip(got, truth, strict=True):
        assert_close(a, b, bound)


def test_rows_that_a_small_gpu_has_no_room_for_are_array_calls(cuda):
    case = (9, 5, 1, 2, None)  # 14 keys
    cuda.kernels.max_shared = 4 * (DIM + 8)  # a row, and one element per warp
    with DEVICE.recording() as launches:
        attention_block(cuda, "float16", case)
    assert set(names(launches)) == set(ATTENTION)
    cuda.kernels.max_shared -= 1
    with DEVICE.recording() as launches:
        got = attention_block(cuda, "float16", case)
    assert launches == []
    for a, b in zip(got, attention_block(REFERENCE, "float16", case), strict=True):
        assert_close(a, b, tolerance("float16"))


def test_a_context_that_a_small_gpu_has_no_room_for_is_array_calls(cuda):
    w = Matrix(cuda.xp.zeros((48, 64), dtype="float16"))
    cuda.kernels.max_shared = 4 * (64 + 8)
    for context, fits in ((64, True), (65, False)):
        cache = LayerCache(*(cuda.xp.zeros((1, 2, context, 16), dtype="float16") for _ in "kv"))
        assert prompt.fits_attention(cuda.kernels, cache, w) == fits


def test_matrices_that_are_not_joined_are_array_calls(cuda):
    layer = layer_on(cuda, "float16", (4, 2), head_dim=HEAD_DIM, ffn_dim=FFN_DIM, dim=DIM)
    x = cuda.backend.to_device(np.ones((1, 5, DIM), "float32"))
    with DEVICE.recording() as launches:
        cuda.feed_forward(x, layer.with_derived(gate_up=None))
    assert launches == []


@pytest.mark.parametrize("n_new", [33, 7, 8, 1])
def test_array_calls_attend_a_few_queries_at_a_time(cuda, n_new, monkeypatch):
    monkeypatch.setattr(prompt, "QUERIES", 7)
    rng = np.random.default_rng(0)
    q = rng.standard_normal((6, n_new, 8), dtype="float32")
    k, v = rng.standard_normal((2, 3, 50, 8), dtype="float32")
    got = cuda.attention(*(cuda.backend.to_device(a) for a in (q, k, v)))
    truth = REFERENCE.attention(wide(q), wide(k), wide(v))
    assert_close(cuda.backend.to_host(got), truth, TOLERANCE["cupy", "float32"])


# -- memory ------------------------------------------------------------------------------------


def test_each_kernel_reads_once_and_writes_once(cuda):
    n_new, n_past, groups = 9, 5, 2
    with DEVICE.recording() as launches:
        attention_block(cuda, "float16", (n_new, n_past, 1, groups, None))
        feed_forward(cuda, "float16", n_new)
    of = {launch.name.split("<")[0]: launch for launch in reversed(launches)}
    n_heads, n_kv = 2 * groups, 2
    columns, row = (n_heads + 2 * n_kv) * HEAD_DIM, 4 * DIM
    norm = of["rms_norm_rows"]
    assert norm.read[:2] == (n_new * row, n_new * row) and norm.written[2] == n_new * row // 2
    rotate = of["rotate_and_cache"]
    assert rotate.read[0] == 4 * n_new * columns
    assert rotate.written[6] == 2 * n_new * n_heads * HEAD_DIM
    assert rotate.written[7:9] == (2 * n_new * n_kv * HEAD_DIM,) * 2  # in a cache with 14 positions
    softmax = of["softmax_rows"]
    seen = [-(-(n_past + t + 1) // 4) * 4 for t in range(n_new)]  # in vectors of four
    assert softmax.read[0] == 4 * n_heads * sum(seen)
    assert softmax.written[1] == 2 * n_heads * n_new * 16  # 14 keys, rounded up
    swiglu = of["swiglu_rows"]
    assert swiglu.read[0] == 4 * 2 * n_new * 2 * FFN_DIM
    assert swiglu.written[2] == 2 * 2 * n_new * FFN_DIM


def test_scores_of_7b_are_never_all_there():
    """For 2,048 tokens and 4,096 keys, a layer has 268 million scores, but at most 2^25 are in
    memory."""
    assert prompt._room(32, 32, prompt.queries_at_once(1, 4096), 4096) <= prompt.SCORES
    at_once = prompt.queries_at_once(8, 50_000)  # a long context, and eight queries per key
    assert at_once >= 64 and prompt._room(64, 8, at_once, 50_000) <= prompt.SCORES


def test_the_room_is_enough_for_the_heads_that_take_it():
    sizes = [(32, 32, 128), (8, 64, 2560), (8, 64, 3500), (3, 6, 7), (1, 8, 50_000)]
    for (n_kv_heads, n_heads, n_keys), context in itertools.product(sizes, (7, 300, 3528, 50_000)):
        n_keys = min(n_keys, context)
        tile = prompt.queries_at_once(n_heads // n_kv_heads, context)
        room = prompt._room(n_heads, n_kv_heads, tile, context)
        of_key_head = n_heads // n_kv_heads * tile * prompt._stride(n_keys)
        at_once = prompt._heads_at_once(n_kv_heads, of_key_head, room)
        assert 1 <= at_once <= n_kv_heads and at_once * of_key_head <= room


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize(("n_new", "n_keys"), [(64, 64), (64, 300), (200, 200)])
def test_memory_is_what_is_foretold(cuda, dtype, n_new, n_keys, monkeypatch):
    """The memory of a prompt's chunk, in addition to what was allocated before."""
    monkeypatch.setattr(prompt, "QUERIES", 64)
    monkeypatch.setattr(prompt, "WIDENED", 16 * DIM)
    heads, ffn_dim = (4, 2), FFN_DIM
    layer = layer_on(cuda, dtype, heads, head_dim=HEAD_DIM, ffn_dim=ffn_dim, dim=DIM)
    cache = cache_on(cuda, dtype, [n_keys - n_new], n_new, heads)
    positions = cache.positions(n_new)
    x = cuda.backend.to_device(np.ones((1, n_new, DIM), "float32"))
    pool = DEVICE.pool
    pool._total = before = pool.used_bytes()
    y = cuda.attention_block(x, layer, cache.layers[0], positions)
    cuda.feed_forward(y, layer)
    taken = pool.total_bytes() - before
    block = 4 * n_new * (2 * DIM + 6 * max(heads[0] * HEAD_DIM, ffn_dim))  # as in memory.py
    assert taken <= block + cuda.attention_nbytes(
        *heads, HEAD_DIM, n_new, n_keys, cache.layers[0].k.dtype
    )


def test_the_chunk_is_larger_than_on_the_cpu(cuda):
    assert cuda.prefill_chunk() > REFERENCE.prefill_chunk()
    dtype = np.dtype("float16")
    assert cuda.attention_nbytes(32, 32, 128, 2048, 4096, dtype) == cuda.attention_nbytes(
        32, 32, 128, prompt.QUERIES, 4096, dtype
    )


# -- a whole prompt ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_any_chunk_gives_the_same_logits(cuda, dtype):
    """Two layers, the last of which computes only the last token."""
    layers = [layer_on(cuda, dtype, (4, 2), head_dim=HEAD_DIM, ffn_dim=FFN_DIM, dim=DIM)] * 2
    x = np.random.default_rng(3).standard_normal((1, 40, DIM), dtype="float32")
    logits = []
    for chunk in (40, 13, 8):
        caches = [cache_on(cuda, dtype, [0], 40, (4, 2)) for _ in layers]
        for begin, last_one in itertools.pairwise([*range(0, 40, chunk), 40]):
            y = cuda.backend.to_device(x[:, begin:last_one])
            for i, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
                positions = cache.positions(last_one - begin)
                y = cuda.attention_block(y, layer, cache.layers[0], positions, 1 if i else None)
                y = cuda.feed_forward(y, layer)
                advance(cache, last_one - begin)
        logits.append(cuda.backend.to_host(y))
    for other in logits[1:]:
        assert_close(other, wide(logits[0]), 1e-3)


def advance(cache: KVCache, n: int) -> None:
    cache.lengths[0] += n
    cache.device_lengths += n
