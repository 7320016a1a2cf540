"""gemv.cu, executed on the CPU, against float64, and the shapes for which it is launched."""

import itertools

import ml_dtypes  # noqa: F401  registers the name "bfloat16"
import numpy as np
import pytest

from cuda_simulator import ORDERS, compiler
from npllama.ops import CupyOps
from npllama.ops.cuda.gemv import MAX_ROWS, Plan, fits, gemv, plan
from npllama.ops.cuda.kernels import Kernels
from npllama.parameters import Head, Layer, Matrix
from strict_cupy import DEVICE, StrictCupyBackend

TOLERANCE = 1e-6
"""The largest difference as a fraction of the largest value. W is exact, and all else float32."""
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
needs_compiler = pytest.mark.skipif(compiler() is None, reason="no g++ 12 on this machine")


@pytest.fixture(scope="module")
def backend():
    return StrictCupyBackend()


@pytest.fixture(scope="module")
def kernels(backend):
    return Kernels(backend)


class Case:
    """Random W, x, norm and residual, and the expected y in float64."""

    def __init__(self, dtype, n_rows, n_out, width, *, norm, swiglu=False, residual=False, seed=0):
        rng = np.random.default_rng(seed)
        self.swiglu, self.eps = swiglu, 1e-3
        w = rng.standard_normal((n_out, width), dtype="float32")
        self.scale = None
        if dtype == "int8":
            w = np.clip(w * 40, -127, 127).round()
            self.scale = (rng.random(n_out, dtype="float32") + 0.5) / 40
        self.values = w.astype(dtype)
        self.x = rng.standard_normal((n_rows, 1, width), dtype="float32")
        self.norm = rng.random(width, dtype="float32") + 0.5 if norm else None
        shape = (n_rows, 1, n_out // 2 if swiglu else n_out)
        self.residual = rng.standard_normal(shape, dtype="float32") if residual else None

    def truth(self):
        h = self.x.astype("float64")
        if self.norm is not None:
            h = h / np.sqrt((h * h).mean(axis=-1, keepdims=True) + self.eps) * self.norm
        y = h @ self.values.astype("float64").T
        if self.scale is not None:
            y *= self.scale
        if self.swiglu:
            gate, up = np.split(y, 2, axis=-1)
            y = gate / (1 + np.exp(-gate)) * up
        return y if self.residual is None else y + self.residual

    def run(self, backend, kernels, order="forward"):
        """y on the host, and the only launch."""
        values, scale, x, norm, residual = (
            None if a is None else backend.to_device(a)
            for a in (self.values, self.scale, self.x, self.norm, self.residual)
        )
        w = Matrix(values, scale)
        assert fits(w, len(self.x))
        more = {"norm": norm, "eps": self.eps, "residual": residual, "swiglu": self.swiglu}
        with DEVICE.recording() as launches, DEVICE.thread_order(order):
            y = gemv(kernels, w, x, **more)
        (launch,) = launches
        return backend.to_host(y), launch

    def check(self, backend, kernels):
        """In each thread order, check y and the number of times that each array is read and
        written."""
        truth = self.truth()
        for order in ORDERS:
            y, launch = self.run(backend, kernels, order)
            assert y.shape == truth.shape
            assert np.abs(y - truth).max() <= TOLERANCE * np.abs(truth).max()
            blocks = launch.grid[0]
            nbytes = [
                0 if a is None else a.nbytes
                for a in (self.values, self.scale, self.x, self.norm, self.residual)
            ]
            w, scale, x, norm, residual = nbytes
            assert launch.read[:6] == (w, scale, blocks * x, blocks * norm, residual, 0)
            assert launch.written[:6] == (0, 0, 0, 0, 0, y.nbytes)
        return launch


# (n_out, width) with fewer outputs than the 4 multiprocessors of the tests, with a partial last
# batch, and with several batches. The widths have fewer chunks than threads, or as many.
NARROW = ((2, 32), (10, 64), (150, 256))


@needs_compiler
@pytest.mark.parametrize("dtype", ITEMSIZE)
@pytest.mark.parametrize("n_rows", [1, 2, 3, 8])
def test_rows_of_x(dtype, n_rows, backend, kernels):
    for n_out, width in NARROW:
        case = Case(dtype, n_rows, n_out, width, norm=False, residual=True)
        launch = case.check(backend, kernels)
        assert launch.grid[0] == min(n_out, DEVICE.n_sms)


@needs_compiler
@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_norm_and_swiglu(dtype, backend, kernels):
    for n_out, width in NARROW:
        Case(dtype, 1, n_out, width, norm=True).check(backend, kernels)
        Case(dtype, 1, n_out, width, norm=True, residual=True).check(backend, kernels)
        Case(dtype, 1, n_out, width, norm=True, swiglu=True).check(backend, kernels)
    Case(dtype, 7, 10, 64, norm=True, swiglu=True).check(backend, kernels)


# (width, rows of x, expected chunks per thread, expected tiles): several chunks, the last of which
# only some threads have, and tiles, the last of which is partial
WIDE = {
    "float32": [(3 * 4 * 400, 1, 3, 1), (3 * 4 * 480 + 20, 1, 2, 2)],
    "float16": [(8 * 500, 1, 2, 1), (8 * 1450, 1, 2, 2), (8 * 600, 3, 1, 3)],
    "bfloat16": [(8 * 530, 2, 2, 2)],
    "int8": [(16 * 430, 1, 1, 1), (16 * 500, 1, 1, 2), (16 * 200, 8, 1, 2)],
}


@needs_compiler
@pytest.mark.parametrize("dtype", WIDE)
def test_wide_rows(dtype, backend, kernels):
    for width, n_rows, chunks, n_tiles in WIDE[dtype]:
        case = Case(dtype, n_rows, 6, width, norm=True, residual=True)
        launch = case.check(backend, kernels)
        tile = launch.block[0] * chunks * 16 // ITEMSIZE[dtype]
        assert f", {launch.block[0]}, {chunks}, " in launch.name
        assert -(-width // tile) == n_tiles


@needs_compiler
def test_more_sums_than_a_block_has_room_for(backend, monkeypatch):
    """The kernel then uses more blocks than multiprocessors."""
    few = Kernels(backend)
    monkeypatch.setattr(DEVICE, "n_sms", 1)
    case = Case("float16", 8, 3000, 32, norm=False)
    launch = case.check(backend, few)
    assert launch.grid[0] == 3


@needs_compiler
@pytest.mark.parametrize("n_rows", [1, 3])
def test_int8_with_one_large_number(n_rows, backend, kernels):
    """x is converted to integers of three bytes. Small elements next to a large one lose no more
    accuracy than in float32 sums."""
    case = Case("int8", n_rows, 10, 256, norm=False)
    case.x[:, 0, 5] = 3e4
    case.check(backend, kernels)
    case.x *= 1e-20
    case.check(backend, kernels)
    case.x[:] = 0
    assert not case.run(backend, kernels)[0].any()


@needs_compiler
@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(dtype, number, backend, kernels):
    case = Case(dtype, 3, 10, 64, norm=False)
    case.x[1, 0, 7] = number
    y, _ = case.run(backend, kernels)
    assert not np.isfinite(y[1]).any()
    assert np.isfinite(y[[0, 2]]).all()


@needs_compiler
def test_x_that_is_not_contiguous(backend, kernels, rng):
    x = backend.to_device(rng.standard_normal((3, 2, 64), dtype="float32"))
    w = Matrix(backend.to_device(rng.standard_normal((10, 64), dtype="float32")))
    y = backend.to_host(gemv(kernels, w, x[:, 1:], residual=x[:, :1, :10]))
    x, w = backend.to_host(x), backend.to_host(w.values)
    assert np.allclose(y, x[:, 1:] @ w.T + x[:, :1, :10], atol=1e-5)


# -- supported shapes


def test_what_it_takes():
    for dtype, itemsize in ITEMSIZE.items():
        n = 16 // itemsize
        for width, n_rows in itertools.product((n, 3 * n, 70_000), (1, MAX_ROWS)):
            assert fits(Matrix(np.zeros((3, width), dtype)), n_rows)
        assert not fits(Matrix(np.zeros((3, n), dtype)), MAX_ROWS + 1)
        assert not fits(Matrix(np.zeros((3, n + 1), dtype)), 1)
        assert not fits(Matrix(np.zeros((3, n // 2), dtype)), 1)
    assert not fits(Matrix(np.zeros((3, 16), "float64")), 1)
    assert not fits(None, 1)


MODELS = {  # D, F, and the rows of q-k-v
    "15m": (192, 512, 576),
    "110m": (768, 2048, 2304),
    "1.1b": (2048, 5632, 2560),
    "7b": (4096, 11008, 12288),
    "13b": (5120, 13824, 15360),
    "70b": (8192, 28672, 10240),
}


@pytest.mark.parametrize("kilobytes", [227, 163, 99, 64, 48])
@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_a_plan_fits_the_device(model, itemsize, kilobytes):
    dim, ffn_dim, n_qkv = MODELS[model]
    products = [(n_qkv, dim), (dim, dim), (2 * ffn_dim, dim), (dim, ffn_dim), (128256, dim)]
    for n_rows, (n_out, width) in itertools.product(range(1, MAX_ROWS + 1), products):
        swiglu = n_out == 2 * ffn_dim
        norm = width == dim and n_out != dim
        cut = plan(itemsize, n_out, width, n_rows, norm, swiglu, 132, 1024 * kilobytes)
        assert isinstance(cut, Plan)
        assert cut.m >= n_rows
        assert cut.shared <= min(112, kilobytes) * 1024
        assert cut.threads % 32 == 0
        assert cut.rows * cut.m <= 32
        assert not swiglu or cut.rows % 2 == 0
        n_units = n_out // 2 if swiglu else n_out
        assert 1 <= cut.grid <= n_units
        tile = cut.threads * cut.chunks
        n_chunks = width * itemsize // 16
        assert tile * -(-n_chunks // tile) < 1.5 * n_chunks + 32  # bounds the bytes copied in vain
        queue = cut.stages * cut.rows * tile * 16
        most = min(48, kilobytes // 2)
        assert queue >= min(24 if width < 2048 else 48, most) * 1024 or cut.stages == 8


def test_every_plan_has_room_on_every_device():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        itemsize, kilobytes = rng.choice([1, 2, 4]), rng.choice([227, 163, 99, 64, 48])
        width = int(rng.integers(1, 4000)) * 16 // itemsize
        n_out, n_rows = 2 * int(rng.integers(1, 400_000)), int(rng.integers(1, 9))
        norm, swiglu, n_sms = rng.random() < 0.5, rng.random() < 0.5, int(rng.integers(1, 150))
        cut = plan(int(itemsize), n_out, width, n_rows, norm, swiglu, n_sms, 1024 * int(kilobytes))
        assert cut.shared <= 1024 * kilobytes and cut.rows * cut.m <= 32
        assert 32 <= cut.threads <= 1024 and cut.threads % 32 == 0


# -- CupyOps


def make_layer(ops, dim, ffn_dim, dtype="float16", **more):
    rng = np.random.default_rng(0)

    def matrix(n_out, n_in):
        values = rng.standard_normal((n_out, n_in), dtype="float32")
        if dtype == "int8":
            return Matrix((values * 40).astype("int8"), rng.random(n_out, dtype="float32"))
        return Matrix(values.astype(dtype))

    norms = [np.ones(dim, "float32") for _ in range(2)]
    attention = [matrix(dim, dim) for _ in range(4)]
    rest = [matrix(ffn_dim, dim), matrix(ffn_dim, dim), matrix(dim, ffn_dim)]
    return Layer(norms[0], *attention, norms[1], *rest, norm_eps=1e-3)


@needs_compiler
@pytest.mark.parametrize(
    ("batch", "n_new", "dim", "ffn_dim", "names"),
    [
        (1, 1, 64, 48, ["gemv", "gemv"]),
        (8, 1, 64, 48, ["gemv", "gemv"]),
        (9, 1, 64, 48, ["rms_norm_rows", "swiglu_rows"]),  # products by cuBLAS
        (1, 2, 64, 48, ["rms_norm_rows", "swiglu_rows"]),
        (1, 1, 68, 48, []),
        (1, 1, 64, 49, []),
    ],
)
def test_feed_forward_takes_the_kernels_where_they_fit(batch, n_new, dim, ffn_dim, names, backend):
    ops = CupyOps(backend)
    layer = ops.prepare(make_layer(ops, dim, ffn_dim))
    x = backend.to_device(np.ones((batch, n_new, dim), "float32"))
    with DEVICE.recording() as launches:
        ops.feed_forward(x, layer)
    assert [launch.name.partition("<")[0] for launch in launches] == names


@needs_compiler
@pytest.mark.parametrize(("batch", "dim", "n"), [(1, 64, 1), (8, 64, 1), (9, 64, 0), (1, 68, 0)])
def test_head_takes_the_kernel_where_it_fits(batch, dim, n, backend):
    ops = CupyOps(backend)
    norm, w = np.ones(dim, "float32"), np.ones((10, dim), "float16")
    head = ops.prepare(Head(norm, Matrix(w), 1e-3))
    with DEVICE.recording() as launches:
        ops.head(backend.to_device(np.ones((batch, 1, dim), "float32")), head)
    assert len(launches) == n


# -- joining on the device


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("where", ["apart", "side by side", "on the device"])
def test_prepare_joins_what_has_one_input(dtype, where, backend):
    ops = CupyOps(backend)
    layer = make_layer(ops, 64, 48, dtype)
    fields = {"qkv": ("wq", "wk", "wv"), "gate_up": ("w_gate", "w_up")}
    truth = {
        name: [
            np.concatenate([*arrays])
            for arrays in zip(*(getattr(layer, f).arrays() for f in parts), strict=True)
        ]
        for name, parts in fields.items()
    }
    if where == "side by side":
        for name, parts in fields.items():
            whole, begin = Matrix(*truth[name]), 0
            for field in parts:
                n = getattr(layer, field).shape[0]
                object.__setattr__(layer, field, whole.slice_rows(slice(begin, begin := begin + n)))
    if where == "on the device":
        layer = layer.map(backend.to_device)
    prepared = ops.prepare(layer)
    for name, parts in fields.items():
        whole = getattr(prepared, name)
        for array, expected in zip(whole.arrays(), truth[name], strict=True):
            assert np.array_equal(backend.to_host(array), expected)
        begin = [array.data.ptr for array in whole.arrays()]
        for field in parts:
            w = getattr(prepared, field)
            assert [array.data.ptr for array in w.arrays()] == begin
            begin = [array.data.ptr + array.nbytes for array in w.arrays()]
    assert np.array_equal(
        backend.to_host(prepared.wo.values), backend.to_host(backend.to_device(layer.wo.values))
    )


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_prepare_holds_no_more_than_one_tensor_twice(dtype, backend):
    ops = CupyOps(backend)
    layer = make_layer(ops, 64, 48, dtype)
    pool = backend.xp.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    prepared = ops.prepare(layer)
    sizes = [array.nbytes for array in prepared.arrays()]
    assert sum(sizes) <= pool.total_bytes() - before <= sum(sizes) + max(sizes)


def test_prepare_leaves_apart_what_is_stored_differently(backend):
    ops = CupyOps(backend)
    layer = make_layer(ops, 64, 48)
    object.__setattr__(layer, "wk", Matrix(layer.wk.values.astype("float32")))
    prepared = ops.prepare(layer)
    assert prepared.qkv is None
    assert prepared.gate_up is not None
