"""The lower level of ops in float64, against independent and very plain versions of the
formulas."""

import cmath
import math
from pathlib import Path

import numpy as np
import pytest

from conftest import rope_table
from npllama.config import LLAMA_2, LlamaConfig
from npllama.ops.equations import Equations
from npllama.parameters import Matrix

EXACT = 1e-12  # float64; ops performs the same operations in another order
GROUPS = [(6, 6), (6, 3), (6, 1), (1, 1), (5, 5)]  # H, K


def assert_close(got, truth, tolerance=EXACT):
    assert got.shape == truth.shape
    assert np.abs(got - truth).max() <= tolerance * max(1.0, np.abs(truth).max())


@pytest.fixture
def matrix(to_device):
    def make(values, scale=None):
        scale = None if scale is None else to_device(scale)
        return Matrix(to_device(values), scale)

    return make


# -- embedding and projections


def test_embedding_takes_rows(ops, to_device, to_host, matrix, rng):
    w = rng.standard_normal((11, 7))
    tokens = np.array([[0, 10, 3], [3, 3, 9]])
    x = to_host(ops.embedding(to_device(tokens), matrix(w), dtype="float64"))
    for b in range(2):
        for t in range(3):
            assert np.array_equal(x[b, t], w[tokens[b, t]])


def test_embedding_widens_and_scales_int8_rows(ops, to_device, to_host, matrix, rng):
    w = rng.integers(-127, 128, (11, 7)).astype(np.int8)
    scale = rng.random(11).astype("float32")
    x = to_host(ops.embedding(to_device(np.array([[4, 0]])), matrix(w, scale)))
    assert x.dtype == np.float32
    assert_close(x[0], w[[4, 0]] * scale[[4, 0], None].astype("float64"), 1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 7), (2, 3, 7), (5, 7), (7,)])
def test_linear_is_a_sum_over_inputs(ops, to_device, to_host, matrix, rng, shape):
    x, w = rng.standard_normal(shape), rng.standard_normal((5, 7))
    y = to_host(ops.linear(to_device(x), matrix(w)))
    truth = np.array([sum(x[..., d] * w[n, d] for d in range(7)) for n in range(5)])
    assert_close(y, np.moveaxis(truth, 0, -1))


def test_linear_multiplies_each_output_by_its_scale(ops, to_device, to_host, matrix, rng):
    x = rng.standard_normal((2, 7))
    w = rng.integers(-127, 128, (5, 7)).astype(np.int8)
    scale = rng.random(5).astype("float32")
    y = to_host(ops.linear(to_device(x), matrix(w, scale)))
    assert_close(y, x @ (w.astype("float64") * scale[:, None]).T)


# -- normalization


@pytest.mark.parametrize("shape", [(1, 1, 7), (2, 3, 13)])
@pytest.mark.parametrize("size", [1.0, 0.003, 0.0])
def test_rms_norm_divides_by_the_root_mean_square(ops, to_device, to_host, rng, shape, size):
    x, weight, eps = rng.standard_normal(shape) * size, rng.standard_normal(shape[-1]), 1e-5
    y = to_host(ops.rms_norm(to_device(x), to_device(weight), eps))
    for i in np.ndindex(shape[:-1]):
        rms = math.sqrt(sum(v * v for v in x[i]) / shape[-1] + eps)
        assert_close(y[i], np.array([v / rms * w for v, w in zip(x[i], weight, strict=True)]))


def test_rms_norm_of_ones_has_unit_mean_square(ops, to_device, to_host, rng):
    y = to_host(ops.rms_norm(to_device(rng.standard_normal((3, 50))), to_device(np.ones(50)), 1e-9))
    assert_close((y * y).mean(-1), np.ones(3), 1e-6)


# -- rotary position embeddings


def rope_one(x, position, theta):
    """Rotate one head at one position. Each pair of elements is a complex number."""
    c = len(x)
    turned = [
        complex(x[i], x[i + c // 2]) * cmath.exp(1j * position * theta ** (-2 * i / c))
        for i in range(c // 2)
    ]
    return np.array([z.real for z in turned] + [z.imag for z in turned])


def rope_at(ops, x, places, theta=10000.0):
    """Apply ops.rope to x (B, T, heads, C) at `places` (B, T); returns a NumPy array."""
    n = int(places.max()) + 1
    cos, sin = rope_table(ops, n, x.shape[-1], theta, dtype="float64")
    move, index = ops.backend.to_device, ops.backend.to_device(places)
    return ops.backend.to_host(ops.rope(move(x), cos[index], sin[index]))


@pytest.mark.parametrize("theta", [10000.0, 1e6])
@pytest.mark.parametrize("head_dim", [2, 6, 10])
def test_rope_turns_each_pair_as_a_complex_number(ops, rng, theta, head_dim):
    x = rng.standard_normal((2, 3, 5, head_dim))
    places = np.array([[0, 1, 2], [40, 41, 42]])
    y = rope_at(ops, x, places, theta)
    for b, t, h in np.ndindex(2, 3, 5):
        assert_close(y[b, t, h], rope_one(x[b, t, h], places[b, t], theta))


def test_rope_keeps_the_norm(ops, rng):
    x = rng.standard_normal((1, 4, 3, 10))
    y = rope_at(ops, x, np.array([[0, 7, 100, 4000]]))
    assert_close((y * y).sum(-1), (x * x).sum(-1))


def test_scores_depend_on_relative_position_only(ops, rng):
    q, k = rng.standard_normal((2, 1, 1, 1, 10))
    scores = [
        (rope_at(ops, q, np.array([[s + 5]])) * rope_at(ops, k, np.array([[s]]))).sum()
        for s in (0, 3, 1000)
    ]
    assert_close(np.array(scores[1:]), np.array([scores[0]] * 2))
    other = (rope_at(ops, q, np.array([[6]])) * rope_at(ops, k, np.array([[0]]))).sum()
    assert abs(other - scores[0]) > 1e-3


def test_rope_frequencies_are_those_of_the_config(ops, to_host):
    config = LlamaConfig(36, 1, 4, 4, 1, 1, rope_theta=1e6, head_dim=10)
    frequencies, attention_scaling = ops.rope_frequencies(config)
    got = to_host(frequencies)
    assert attention_scaling == 1
    assert got.dtype == np.float64
    assert_close(got, np.array([1e6 ** (-2 * i / 10) for i in range(5)]))


def test_rope_angles_are_right_at_long_positions_in_float32(ops, to_host):
    rotation = ops.rope_frequencies(LLAMA_2["7B"])
    cos, sin = (to_host(table) for table in ops.rope_table(16384, rotation))
    assert cos.dtype == sin.dtype == np.float32
    angle = 16383 * 10000.0 ** (-2 * np.arange(64) / 128)
    assert np.abs(cos[-1] - np.cos(angle)).max() < 1e-7
    assert np.abs(sin[-1] - np.sin(angle)).max() < 1e-7


# -- attention


def attention_one_by_one(q, k, v):
    """Attention of each query of each head separately, over the keys that it sees."""
    n_heads, n_new, head_dim = q.shape
    n_kv_heads, n_keys, _ = k.shape
    o, p = np.zeros(q.shape), np.zeros((n_heads, n_new, n_keys))
    for h in range(n_heads):
        kv = h * n_kv_heads // n_heads
        for t in range(n_new):
            seen = n_keys - n_new + t + 1
            e = np.exp([q[h, t] @ k[kv, j] / math.sqrt(head_dim) for j in range(seen)])
            p[h, t, :seen] = e / e.sum()
            o[h, t] = sum(p[h, t, j] * v[kv, j] for j in range(seen))
    return o, p


def random_qkv(rng, n_heads, n_kv_heads, n_new, start, head_dim=6):
    n_keys = start + n_new
    q = rng.standard_normal((n_heads, n_new, head_dim))
    k, v = rng.standard_normal((2, n_kv_heads, n_keys, head_dim))
    return q, k, v


@pytest.mark.parametrize("heads", GROUPS)
@pytest.mark.parametrize("n_new", [1, 2, 5])
@pytest.mark.parametrize("start", [0, 1, 4])
def test_attention_is_each_query_over_the_keys_it_may_see(
    ops, to_device, to_host, rng, heads, n_new, start
):
    q, k, v = random_qkv(rng, *heads, n_new, start)
    truth_o, truth_p = attention_one_by_one(q, k, v)
    q, k, v = to_device(q), to_device(k), to_device(v)
    assert_close(to_host(ops.attention_weights(q, k)), truth_p)
    assert_close(to_host(ops.attention(q, k, v)), truth_o)


def test_a_later_key_is_hidden(ops, to_device, to_host):
    query, key = to_device(np.array([[3], [0]])), to_device(np.arange(6)[None])
    hidden = to_host(ops.is_hidden(query, key))
    assert hidden.tolist() == [[False] * 4 + [True] * 2, [False] + [True] * 5]


@pytest.mark.parametrize("n_new", [1, 2, 5])
@pytest.mark.parametrize("start", [0, 1, 4])
def test_a_query_sees_its_own_key_and_all_before_it(ops, to_host, n_new, start):
    hidden = ops.hidden_keys(n_new, start + n_new)
    sees = np.ones((n_new, start + n_new), dtype=bool)
    if hidden is not None:
        assert hidden.shape == (n_new, n_new)
        sees[:, start:] = ~to_host(hidden)
    for t in range(n_new):
        assert sees[t].tolist() == [key <= start + t for key in range(start + n_new)]


def test_no_future_token_moves_a_past_output(ops, to_device, to_host, rng):
    q, k, v = random_qkv(rng, 6, 3, 5, 2)
    before = to_host(ops.attention(to_device(q), to_device(k), to_device(v)))
    k[:, 5:], v[:, 5:] = 9.0, -9.0  # only the tokens t = 3 and t = 4 see these keys
    after = to_host(ops.attention(to_device(q), to_device(k), to_device(v)))
    assert np.array_equal(before[:, :3], after[:, :3])
    assert not np.isclose(before[:, 3:], after[:, 3:]).any()


def test_multi_head_and_multi_query_are_the_ends_of_grouped_query(ops, to_device, to_host, rng):
    q, k, v = random_qkv(rng, 6, 3, 4, 1)
    grouped = to_host(ops.attention(to_device(q), to_device(k), to_device(v)))
    repeated = (to_device(np.repeat(a, 2, axis=0)) for a in (k, v))  # as multi-head: K = H
    assert_close(to_host(ops.attention(to_device(q), *repeated)), grouped)
    for kv in range(3):  # each group as multi-query attention: K = 1
        own = slice(2 * kv, 2 * kv + 2)
        one = ops.attention(*(to_device(a) for a in (q[own], k[kv, None], v[kv, None])))
        assert_close(to_host(one), grouped[own])


def test_attention_survives_scores_beyond_the_exponents_range(ops, to_device, to_host):
    q = np.full((1, 2, 4), 100.0)
    k = np.stack([np.full((3, 4), 100.0) * np.array([[1], [2], [3]])])
    p = to_host(ops.attention_weights(to_device(q), to_device(k)))
    assert_close(p, np.array([[[0.0, 1, 0], [0, 0, 1]]]))


@pytest.mark.filterwarnings("error")
def test_softmax_is_safe_and_sums_to_one(ops, to_device, to_host):
    x = np.array([[1000.0, 999.0, -math.inf], [-1000.0, -1000.0, -1000.0]])
    e = math.e
    truth = np.array([[e / (1 + e), 1 / (1 + e), 0], [1 / 3, 1 / 3, 1 / 3]])
    assert_close(to_host(ops.softmax(to_device(x))), truth)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)])
def test_log_softmax_is_the_log_of_the_probabilities(ops, to_device, to_host, rng, shape):
    x = rng.standard_normal(shape) * 3
    truth = np.log(np.exp(x) / np.exp(x).sum(-1, keepdims=True))
    assert_close(to_host(ops.log_softmax(to_device(x))), truth)


def test_log_softmax_survives_large_and_excluded_logits(ops, to_device, to_host):
    x = np.array([[1000.0, 999.0, -1000.0, -math.inf]])
    log_z = math.log1p(math.exp(-1))
    y = to_host(ops.log_softmax(to_device(x)))
    assert np.allclose(y[0, :3], [-log_z, -1 - log_z, -2000 - log_z])
    assert y[0, 3] == -math.inf


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), GROUPS)
def test_weighted_values_mix_those_of_a_heads_group(
    ops, to_device, to_host, rng, n_heads, n_kv_heads
):
    p, v = rng.random((n_heads, 2, 5)), rng.standard_normal((n_kv_heads, 5, 4))
    groups = n_heads // n_kv_heads
    truth = np.stack([p[h] @ v[h // groups] for h in range(n_heads)])
    assert_close(to_host(ops.weighted_values(to_device(p), to_device(v))), truth)


# -- feed-forward


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sigmoid_is_between_0_and_1_and_never_overflows(ops, to_device, to_host, dtype):
    x = np.array([-1000.0, -20.0, -1.0, 0.0, 0.5, 3.0, 1000.0])
    truth = np.array([1 / (1 + math.exp(-v)) if v > -700 else 0.0 for v in x])
    y = to_host(ops.sigmoid(to_device(x.astype(dtype))))
    assert y.dtype == dtype
    assert_close(y, truth, EXACT if dtype == "float64" else 1e-7)


@pytest.mark.filterwarnings("error")
def test_silu_is_x_times_sigmoid_and_never_overflows(ops, to_device, to_host):
    x = np.array([-1000.0, -20.0, -1.0, 0.0, 0.5, 3.0, 1000.0])
    truth = np.array([v / (1 + math.exp(-v)) if v > -700 else 0.0 for v in x])
    assert_close(to_host(ops.silu(to_device(x))), truth)
    assert to_host(ops.silu(to_device(x.astype("float32")))).dtype == np.float32


def test_swiglu_gates_with_its_first_argument(ops, to_device, to_host, rng):
    gate, up = rng.standard_normal((2, 3, 7))
    truth = gate / (1 + np.exp(-gate)) * up
    assert_close(to_host(ops.swiglu(to_device(gate), to_device(up))), truth)


# -- loss


def test_cross_entropy_is_the_surprise_at_the_target(ops, to_device, to_host, rng):
    logits, targets = rng.standard_normal((2, 3, 5)) * 3, rng.integers(0, 5, (2, 3))
    loss = to_host(ops.cross_entropy(to_device(logits), to_device(targets)))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert_close(
        loss, np.array([[-np.log(p[b, t, targets[b, t]]) for t in range(3)] for b in (0, 1)])
    )


def test_cross_entropy_of_even_odds_is_the_log_of_their_number(ops, to_device, to_host):
    loss = ops.cross_entropy(to_device(np.zeros((1, 7))), to_device(np.array([4])))
    assert_close(to_host(loss), np.array([math.log(7)]))


# -- dtypes


def test_every_equation_stays_in_float32(ops, to_device, to_host, matrix, rng):
    x = to_device(rng.standard_normal((1, 3, 6, 8), dtype="float32"))
    norm = to_device(np.ones(8, dtype="float32"))
    w = matrix(rng.standard_normal((8, 8), dtype="float32"))
    cos, sin = rope_table(ops, 3, 8, 10000.0)
    q = x[0].swapaxes(0, 1)
    results = [
        ops.rms_norm(x, norm, 1e-5),
        ops.linear(x, w),
        ops.rope(x, cos[None], sin[None]),
        ops.softmax(x),
        ops.log_softmax(x),
        ops.sigmoid(x),
        ops.weighted_values(ops.attention_weights(q, q), q),
        ops.cross_entropy(x, to_device(np.zeros((1, 3, 6), dtype="int32"))),
        ops.attention_weights(q, q),
        ops.attention(q, q, q),
        ops.silu(x),
        ops.swiglu(x, x),
    ]
    assert [to_host(result).dtype for result in results] == ["float32"] * len(results)


def test_every_equation_has_a_test_here():
    """Detects equations without a test in this file."""
    methods = {name for name in vars(Equations) if not name.startswith("_")}
    source = Path(__file__).read_text(encoding="utf-8")
    assert methods and not [name for name in methods if f"ops.{name}(" not in source]
