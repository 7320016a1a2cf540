"""Each derivative against central differences of its equation, in float64 and with odd shapes."""

from pathlib import Path

import numpy as np
import pytest

from conftest import rope_table
from npllama.backend import Backend
from npllama.kv_cache import KVCache
from npllama.ops import Ops
from npllama.ops.derivatives import Derivatives
from npllama.ops.equations import Equations
from npllama.parameters import Head, Layer, Matrix

STEP = 1e-5
TOLERANCE = 1e-6  # relative to the largest gradient; the error of the differences is about 1e-9
GROUPS = [(4, 4), (6, 3), (6, 1), (1, 1)]  # H, K


def central_differences(loss, x):
    """dLoss/dx, one element of x at a time: (loss(x + h) - loss(x - h)) / 2h."""
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        kept = x[i]
        x[i] = kept + STEP
        above = loss()
        x[i] = kept - STEP
        below = loss()
        x[i] = kept
        gradient[i] = (above - below) / (2 * STEP)
    return gradient


DIFFERENCES = {}


def differences(equation, inputs, n):
    """A random dy, and the derivatives of sum(dy * equation(*inputs)) by the first n inputs.

    They are computed on the NumPy reference, once for all implementations.
    """
    reference = Ops(Backend())
    y = equation(reference, *inputs)
    dy = np.random.default_rng(1).standard_normal(y.shape)
    key = (equation.__qualname__, y.tobytes(), *(x.tobytes() for x in inputs))
    if key not in DIFFERENCES:
        DIFFERENCES[key] = [
            central_differences(lambda: (dy * equation(reference, *inputs)).sum(), x)
            for x in inputs[:n]
        ]
    return dy, DIFFERENCES[key]


def check(ops, equation, backward, inputs, n_gradients=None):
    """Compare backward(ops, dy, *inputs) with central differences of sum(dy * equation(*inputs)).

    The differences are computed on the NumPy reference, and the derivative on `ops`.
    """
    n = n_gradients or len(inputs)
    dy, truths = differences(equation, inputs, n)
    move, to_host = ops.backend.to_device, ops.backend.to_host
    got = backward(ops, move(dy), *(move(x.copy()) for x in inputs))
    got = got if isinstance(got, tuple) else (got,)
    assert len(got) == n
    for gradient, truth in zip(got, truths, strict=True):
        gradient = to_host(gradient)
        assert gradient.shape == truth.shape
        assert gradient.dtype == np.float64
        assert np.abs(gradient - truth).max() <= TOLERANCE * max(np.abs(truth).max(), 1e-3)


@pytest.mark.parametrize("shape", [(2, 3, 7), (1, 1, 7), (5, 7)])
def test_linear_backward(ops, rng, shape):
    check(
        ops,
        lambda o, x, w: o.linear(x, Matrix(w)),
        lambda o, dy, x, w: o.linear_backward(dy, x, Matrix(w)),
        [rng.standard_normal(shape), rng.standard_normal((5, 7))],
    )


def test_embedding_backward_adds_where_a_token_comes_twice(ops, rng):
    tokens = np.array([[0, 10, 3], [3, 3, 9]])
    check(
        ops,
        lambda o, w: o.embedding(o.backend.to_device(tokens), Matrix(w), "float64"),
        lambda o, dx, w: o.embedding_backward(dx, o.backend.to_device(tokens), Matrix(w)),
        [rng.standard_normal((11, 7))],
    )


@pytest.mark.parametrize("size", [1.0, 0.003])
def test_rms_norm_backward(ops, rng, size):
    check(
        ops,
        lambda o, x, w: o.rms_norm(x, w, 1e-5),
        lambda o, dy, x, w: o.rms_norm_backward(dy, x, w, 1e-5),
        [rng.standard_normal((2, 3, 7)) * size, rng.standard_normal(7)],
    )


def test_rms_norm_has_no_gradient_along_its_input(ops, rng, to_device, to_host):
    """With eps 0, scaling x does not change the norm's output."""
    x, dy = rng.standard_normal((2, 2, 5, 7))
    dx, _ = ops.rms_norm_backward(to_device(dy), to_device(x), to_device(rng.random(7)), 0.0)
    assert np.abs((to_host(dx) * x).sum(-1)).max() < 1e-12


def test_rope_backward(ops, rng):
    def table(o):
        return tuple(t[None, :5] for t in rope_table(o, 5, 6, 100.0, "float64"))

    check(
        ops,
        lambda o, x: o.rope(x, *table(o)),
        lambda o, dy, x: o.rope_backward(dy, *table(o)),
        [rng.standard_normal((1, 5, 3, 6))],
    )


def test_softmax_backward(ops, rng):
    check(
        ops,
        lambda o, x: o.softmax(x),
        lambda o, dp, x: o.softmax_backward(dp, o.softmax(x)),
        [rng.standard_normal((2, 3, 5))],
    )


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), GROUPS)
@pytest.mark.parametrize("n_new", [1, 2, 5])
def test_attention_backward(ops, rng, n_heads, n_kv_heads, n_new):
    check(
        ops,
        lambda o, q, k, v: o.attention(q, k, v),
        lambda o, do, q, k, v: o.attention_backward(do, q, k, v, o.attention_weights(q, k)),
        [
            rng.standard_normal((n_heads, n_new, 6)),
            rng.standard_normal((n_kv_heads, n_new, 6)),
            rng.standard_normal((n_kv_heads, n_new, 6)),
        ],
    )


def test_silu_backward(ops, rng):
    x = np.concatenate([rng.standard_normal(9), [-30.0, 0.0, 30.0]])
    check(ops, lambda o, x: o.silu(x), lambda o, dy, x: o.silu_backward(dy, x), [x])


def test_silu_backward_never_overflows(ops, to_device, to_host):
    x = np.array([-1000.0, 1000.0])
    dx = ops.silu_backward(to_device(np.ones(2)), to_device(x))
    assert to_host(dx).tolist() == [0.0, 1.0]


def test_swiglu_backward(ops, rng):
    check(
        ops,
        lambda o, gate, up: o.swiglu(gate, up),
        lambda o, dy, gate, up: o.swiglu_backward(dy, gate, up),
        [rng.standard_normal((2, 3, 5)), rng.standard_normal((2, 3, 5))],
    )


def test_cross_entropy_backward(ops, rng):
    targets = rng.integers(0, 5, (2, 3))
    check(
        ops,
        lambda o, x: o.cross_entropy(x, o.backend.to_device(targets)),
        lambda o, dloss, x: o.cross_entropy_backward(dloss, x, o.backend.to_device(targets)),
        [rng.standard_normal((2, 3, 5))],
    )


# -- the blocks

D, FFN, V, C, T = 12, 7, 11, 2, 5
NAMES = {
    "attention_norm": (D,), "wq": (6 * C, D), "wk": (3 * C, D), "wv": (3 * C, D), "wo": (D, 6 * C),
    "ffn_norm": (D,), "w_gate": (FFN, D), "w_up": (FFN, D), "w_down": (D, FFN),
}  # fmt: skip


def layer_of(arrays):
    given = dict(zip(NAMES, arrays, strict=True))
    return Layer(**{n: a if "norm" in n else Matrix(a) for n, a in given.items()}, norm_eps=1e-3)


def layer_inputs(rng):
    return [rng.standard_normal((2, T, D)), *(rng.standard_normal(s) for s in NAMES.values())]


def cache_of(ops):
    table = rope_table(ops, T, C, 100.0, "float64")
    return KVCache(
        ops.backend, table,
        n_layers=1, n_kv_heads=3, head_dim=C, batch=2, context=T, dtype="float64",
    )  # fmt: skip


def test_attention_block_backward(ops, rng):
    def forward(o, x, *arrays):
        cache = cache_of(o)
        return o.attention_block(x, layer_of(arrays), cache.layers[0], cache.positions(T))

    def backward(o, dy, x, *arrays):
        dx, d = o.attention_block_backward(dy, x, layer_of(arrays), cache_of(o).positions(T))
        return dx, *(d.get(name, o.xp.zeros(shape)) for name, shape in NAMES.items())

    check(ops, forward, backward, layer_inputs(rng))


def test_feed_forward_backward(ops, rng):
    def backward(o, dy, x, *arrays):
        dx, d = o.feed_forward_backward(dy, x, layer_of(arrays))
        return dx, *(d.get(name, o.xp.zeros(shape)) for name, shape in NAMES.items())

    check(ops, lambda o, x, *a: o.feed_forward(x, layer_of(a)), backward, layer_inputs(rng))


def test_head_backward(ops, rng):
    def head(norm, w):
        return Head(norm, Matrix(w), 1e-3)

    def backward(o, dy, x, norm, w):
        dx, d = o.head_backward(dy, x, head(norm, w))
        return dx, d["norm"], d["lm_head"]

    check(
        ops,
        lambda o, x, norm, w: o.head(x, head(norm, w)),
        backward,
        [rng.standard_normal((2, 3, D)), rng.random(D), rng.standard_normal((V, D))],
    )


# -- completeness


def test_every_derivative_has_a_test_here():
    """Detects derivatives, including those of blocks, that have no test in this file."""
    methods = {name for name in vars(Derivatives) if not name.startswith("_")}
    methods |= {name for name in vars(Ops) if name.endswith("_backward")}
    source = Path(__file__).read_text(encoding="utf-8")
    assert len(methods) > 10
    assert not [name for name in methods if f"def test_{name}" not in source]


def test_every_equation_of_the_forward_has_a_derivative():
    """Equations without a derivative are constants of the model, or compositions of other
    equations."""
    whole = {
        "rope_frequencies",
        "rope_table",
        "hidden_keys",
        "is_hidden",
        "attention_weights",
        "weighted_values",
        "log_softmax",
        "sigmoid",
    }
    equations = {name for name in vars(Equations) if not name.startswith("_")} - whole
    assert not [name for name in equations if not hasattr(Ops, f"{name}_backward")]


def test_every_derivative_stays_in_float32(ops, to_device, to_host, rng):
    x = to_device(rng.standard_normal((1, 3, 6, 8), dtype="float32"))
    w = Matrix(to_device(rng.standard_normal((8, 8), dtype="float32")))
    ids = to_device(np.zeros((1, 3, 6), dtype="int32"))
    cos, sin = rope_table(ops, 3, 8, 10000.0)
    q = x[0].swapaxes(0, 1)
    results = [
        ops.embedding_backward(x, ids, w),
        *ops.linear_backward(x, x, w),
        *ops.rms_norm_backward(x, x, to_device(np.ones(8, dtype="float32")), 1e-5),
        ops.rope_backward(x, cos[None], sin[None]),
        ops.softmax_backward(x, x),
        *ops.attention_backward(q, q, q, q, ops.attention_weights(q, q)),
        ops.silu_backward(x, x),
        *ops.swiglu_backward(x, x, x),
        ops.cross_entropy_backward(x[..., 0], x, ids),
    ]
    assert [to_host(result).dtype for result in results] == ["float32"] * len(results)
