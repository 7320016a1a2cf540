"""No override without its twin: every method that a backend overrides, against the reference.

The truth is the reference in float64 on NumPy. Every override found in NumpyOps or CupyOps
must be registered in GRIDS with a grid of inputs, or collection fails. Each grid runs on every
implementation, the reference on each backend included, within the tolerance of (backend, dtype).
"""

import inspect
import itertools
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from npllama.backend import Backend
from npllama.ops import CupyOps, NumpyOps, Ops
from npllama.parameters import Matrix
from strict_array import StrictBackend

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# Largest difference as a fraction of the largest value. NumPy computes in float32 whatever the
# storage. CuPy rounds activations and results of a 16-bit product to that type.
TOLERANCE = {
    ("numpy", "float32"): 2e-6,
    ("numpy", "float16"): 2e-6,
    ("numpy", "bfloat16"): 2e-6,
    ("numpy", "int8"): 2e-6,
    ("cupy", "float32"): 2e-6,
    ("cupy", "float16"): 2e-3,
    ("cupy", "bfloat16"): 1.6e-2,
    ("cupy", "int8"): 2e-6,
}
T = (1, 2, 8, 9, 33)
S = (0, 1, 600)
B = (1, 3)
G = (1, 2, 8)


def linear_grid():
    """(function name, dtype, call): widths around the tile, odd output counts."""
    for dtype, b, t, shape in itertools.product(
        ("float32", "float16", "bfloat16", "int8"), B, T, ((5, 7), (600, 1000), (11, 70_000))
    ):
        rng = np.random.default_rng(0)
        x = rng.standard_normal((b, t, shape[1]), dtype="float32")
        if dtype == "int8":
            values = rng.integers(-127, 128, shape).astype("int8")
            scale = rng.random(shape[0], dtype="float32")
        else:
            values = rng.standard_normal(shape, dtype="float32").astype(dtype)
            scale = None

        def call(ops, wide, move, x=x, values=values, scale=scale):
            w = Matrix(move(wide(values)), None if scale is None else move(wide(scale)))
            return ops.linear(move(wide(x)), w)

        yield dtype, f"{dtype}-B{b}-T{t}-{shape[0]}x{shape[1]}", call


def attention_grid():
    """Every T, S and G, with room for all heads at once, for one, and for less than one."""
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
    """`name` of `n_inputs` arrays (B, T, F), some numbers far out; several outputs are stacked."""

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
    """Few tokens for many places, many tokens for few."""
    for b, t, n_vocab in itertools.product(B, T, (2, 5, 300)):
        rng = np.random.default_rng(0)
        dx = rng.standard_normal((b, t, 6), dtype="float32")
        tokens = rng.integers(0, n_vocab, (b, t))
        w = np.zeros((n_vocab, 6), dtype="float32")

        def call(ops, wide, move, dx=dx, tokens=tokens, w=w):
            return ops.embedding_backward(move(wide(dx)), move(tokens), Matrix(move(wide(w))))

        yield "float32", f"B{b}-T{t}-V{n_vocab}", call


GRIDS = {
    "linear": linear_grid,
    "attention": attention_grid,
    "attention_weights": attention_weights_grid,
    "sigmoid": elementwise_grid("sigmoid", 1),
    "embedding_backward": embedding_backward_grid,
    "softmax_backward": elementwise_grid("softmax_backward", 2),
    "swiglu_backward": elementwise_grid("swiglu_backward", 3),
}

# Hooks that describe memory rather than compute; each has its own test where named.
NOT_MATHEMATICS = {
    "attention_nbytes",  # test_memory.py
    "scratch_size",  # test_the_scratch_has_room_for_a_token_of_every_head
    "cache_dtype",  # test_the_cache_keeps_the_dtype_that_design_says
}


def overrides(cls):
    return {name for name in vars(cls) if not name.startswith("_")} - NOT_MATHEMATICS


def cases():
    found = [(cls, name) for cls in (NumpyOps, CupyOps) for name in sorted(overrides(cls))]
    for cls, name in found:
        assert hasattr(Ops, name), f"{cls.__name__}.{name} overrides nothing in Ops"
        assert name in GRIDS, f"{cls.__name__}.{name} overrides Ops without a grid of inputs"
    for name in sorted({name for _, name in found}):
        for dtype, label, call in GRIDS[name]():
            yield pytest.param(dtype, call, id=f"{name}-{label}")


@pytest.mark.parametrize(("dtype", "call"), list(cases()))
def test_an_override_computes_what_the_reference_does(dtype, call, ops):
    truth = call(Ops(Backend()), lambda a: a.astype("float64"), lambda a: a)
    tolerance = TOLERANCE["cupy" if isinstance(ops, CupyOps) else "numpy", dtype]
    got = ops.backend.to_host(call(ops, lambda a: a, ops.backend.to_device))
    assert got.shape == truth.shape
    assert got.dtype == np.float32
    assert np.abs(got - truth).max() <= tolerance * np.abs(truth).max()


def test_one_ops_serves_several_threads(rng):
    ops = NumpyOps(Backend())
    w = Matrix(rng.standard_normal((2048, 512)).astype("float16"))
    inputs = rng.standard_normal((20, 1, 512)).astype("float32")
    truth = [ops.linear(x, w) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(lambda x: ops.linear(x, w), inputs), truth, strict=True):
            assert np.array_equal(got, want)


def test_a_row_wider_than_a_tile_is_a_tile_of_its_own(monkeypatch, rng):
    monkeypatch.setattr("npllama.ops.numpy_ops.TILE", 4)
    x, w = rng.standard_normal((2, 7)), rng.standard_normal((5, 7)).astype("float16")
    got = NumpyOps(Backend()).linear(x.astype("float32"), Matrix(w))
    assert np.abs(got - x @ w.astype("float64").T).max() < 1e-5


def test_an_override_without_a_grid_is_found(monkeypatch):
    monkeypatch.setattr(NumpyOps, "swiglu", lambda self, gate, up: gate * up, raising=False)
    with pytest.raises(AssertionError, match=r"swiglu.*without a grid"):
        list(cases())


def test_an_override_has_the_signature_of_its_twin():
    for cls in (NumpyOps, CupyOps):
        for name in {name for name in vars(cls) if not name.startswith("_")}:
            assert inspect.signature(getattr(cls, name)) == inspect.signature(getattr(Ops, name))


def test_the_scratch_has_room_for_a_token_of_every_head():
    numpy_ops = NumpyOps(Backend())
    assert numpy_ops.scratch_size(n_heads=32, n_kv_heads=8, chunk=1, context=100) == 32 * 100
    assert numpy_ops.scratch_size(n_heads=32, n_kv_heads=8, chunk=64, context=100) == 256 * 100
    assert Ops(Backend()).scratch_size(32, 8, 64, 100) == 0


@pytest.mark.parametrize(
    ("storage", "on_cupy"),
    [("float32", "float32"), ("float16", "float16"), ("int8", "float16"), (BFLOAT16, BFLOAT16)],
)
def test_the_cache_keeps_the_dtype_that_design_says(storage, on_cupy):
    assert NumpyOps(Backend()).cache_dtype(np.dtype(storage)) == np.float32
    assert CupyOps(StrictBackend()).cache_dtype(np.dtype(storage)) == np.dtype(on_cupy)
