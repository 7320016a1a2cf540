"""Weight formats are objects, so adding one requires no changes where formats are used."""

import numpy as np
import pytest

import convert
from conftest import TINY, make_ops
from converting import huggingface
from model_directory import write_model
from npllama import load, safetensors_file, weight_formats
from npllama.backend import Backend
from npllama.ops import CupyOps, NumpyOps, Ops, shared_products
from npllama.ops.workers import Workers, can_work
from npllama.parameters import Matrix
from npllama.threads import Threads
from npllama.weight_formats import FORMATS, Format, format_of, scale_name
from npllama.weights import Checkpoint

GROUP = 8


class FourBits(Format):
    """Two values from 0 to 15 per byte, and a float16 scale per group of columns."""

    is_float = False
    tiled = ("values", "scale")

    def __init__(self):
        super().__init__("uint8")
        self.name, self.torch_dtype, self.product_dtype = "four-bits", "float32", None
        self.cache_dtype = np.dtype("float16")

    def stored(self, name, shape):
        if len(shape) == 1:
            return {name: (self.dtype, shape)}
        n_out, width = shape
        return {
            name: (self.dtype, (n_out, width // 2)),
            scale_name(name): (np.dtype("float16"), (n_out, width // GROUP)),
        }

    def shape(self, stored):
        return (*stored[:-1], 2 * stored[-1]) if len(stored) == 2 else stored

    def from_float(self, w):
        groups = w.astype("float32").reshape(len(w), -1, GROUP)
        scale = (np.abs(groups).max(axis=2) / 7).astype("float16")
        numbers = np.clip(np.rint(groups / scale[..., None].astype("float32")) + 8, 0, 15)
        numbers = numbers.reshape(w.shape).astype("uint8")
        return numbers[:, ::2] + 16 * numbers[:, 1::2], scale

    def to_float(self, values, scale):
        w = np.stack([values % 16, values // 16], axis=-1).astype("float32") - 8
        w = w.reshape(len(values), -1, GROUP) * scale[..., None].astype("float32")
        return w.reshape(len(values), -1)

    def gather_rows(self, w, index, dtype):
        flat = self.to_float(w.values[index.reshape(-1)], w.scale[index.reshape(-1)])
        return flat.reshape(*index.shape, -1).astype(dtype)

    def unscaled(self, w, dtype):
        return self.to_float(w.values, w.scale).astype(dtype)

    def scaled(self, w, y):
        return y

    def widen(self, w, some, tile):
        tile[...] = self.to_float(w.values[some], w.scale[some])

    def bound(self, values, scale):
        return scale.astype("float32") * 16


@pytest.fixture
def four_bits(monkeypatch):
    made = FourBits()
    monkeypatch.setitem(weight_formats._BY_DTYPE, made.dtype, made)
    monkeypatch.setitem(FORMATS, made.name, made)
    for dtypes in (safetensors_file.DTYPES, huggingface._DTYPES):
        monkeypatch.setitem(dtypes, "U8", made.dtype)
    monkeypatch.setitem(safetensors_file._NAMES, made.dtype, "U8")
    return made


def test_a_new_format_is_one_class_for_every_product(four_bits, rng, monkeypatch):
    monkeypatch.setattr("npllama.ops.tiles.TILE", 16 * 64)
    exact = rng.standard_normal((100, 64), dtype="float32")
    w = Matrix(*four_bits.from_float(exact))
    assert w.shape == exact.shape and w.nbytes == four_bits.nbytes(w.shape) == 100 * (32 + 16)
    wide = four_bits.to_float(w.values, w.scale)
    assert np.abs(wide - exact).max() < 0.6 * np.abs(exact).max() / 7
    x = rng.standard_normal((3, 5, 64), dtype="float32")
    for ops in (NumpyOps(Backend(threads=Threads(2))), CupyOps(Backend()), Ops(Backend())):
        for n in (1, 2, 5):
            assert np.allclose(ops.linear(x[:, :n], w), x[:, :n] @ wide.T, atol=1e-4)
        ids = np.array([[3, 99, 3]])
        assert np.array_equal(ops.embed(ids, w), wide[ids])
    assert np.allclose(ops.linear(x, w.slice_rows(slice(7, 30))), x @ wide[7:30].T, atol=1e-4)


def test_a_new_format_is_converted_loaded_joined_and_mapped(four_bits, tmp_path, monkeypatch):
    monkeypatch.setattr(shared_products, "SHARED_SIZE", 1000)
    monkeypatch.setattr(Workers, "_start", lambda *_: None)  # workers would not know the class
    source = write_model(tmp_path / "source", TINY)
    narrow, again = tmp_path / "narrow", tmp_path / "again"
    assert convert.main([str(source), str(narrow), "--dtype", "four-bits"]) == 0
    assert convert.main([str(narrow), str(again)]) == 0
    assert (narrow / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    ids, exact = [1, 5, 7, 9], load(source, "numpy").logits([1, 5, 7, 9])
    for directory, dtype in ((narrow, None), (source, "four-bits")):
        llama = load(directory, "numpy", dtype=dtype, threads=1)
        assert llama.dtype == "four-bits"
        logits = llama.logits(ids)
        assert 0.001 < np.abs(logits - exact).max() / np.abs(exact).max() < 0.3
        prepared = load(directory, "numpy", dtype=dtype, threads=2)
        for layer in prepared.parameters.layers:
            whole = four_bits.to_float(layer.qkv.values, layer.qkv.scale)
            parts = [four_bits.to_float(w.values, w.scale) for w in (layer.wq, layer.wk, layer.wv)]
            assert np.array_equal(whole, np.concatenate(parts))
            assert (layer.qkv.number is not None) == can_work()
        checkpoint = Checkpoint(directory, TINY, dtype)
        assert checkpoint.nbytes == llama.parameters.nbytes == prepared.parameters.nbytes
    wide = load(narrow, "numpy", dtype="float32", threads=1)
    assert np.abs(wide.logits(ids) - load(narrow, "numpy", threads=1).logits(ids)).max() < 1e-4


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_says_what_a_file_holds_and_what_that_takes(name, rng):
    format_ = FORMATS[name]
    w = rng.standard_normal((6, 8), dtype="float32")
    arrays = format_.from_float(w)
    stored = format_.stored("w", w.shape)
    assert [(a.dtype, a.shape) for a in arrays] == list(stored.values())
    assert format_.nbytes(w.shape) == sum(a.nbytes for a in arrays) == Matrix(*arrays).nbytes
    assert format_.shape(arrays[0].shape) == w.shape
    assert Matrix(*arrays).format is format_ is format_of(arrays[0].dtype)
    assert np.abs(format_.to_float(*arrays).astype("float32") - w).max() < 0.02


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_a_matrix_compute_as_they_do_in_it(name, rng):
    ops = make_ops("numpy")
    x = rng.standard_normal((2, 3, 8), dtype="float32")
    w = Matrix(*FORMATS[name].from_float(rng.standard_normal((6, 8), dtype="float32")))
    assert np.allclose(
        ops.linear(x, w.slice_rows(slice(2, 5))), ops.linear(x, w)[..., 2:5], atol=1e-6
    )
    assert w.slice_rows(slice(2, 5)).shape == (3, 8)


@pytest.mark.parametrize(("name", "value"), [("float16", 65504), ("int8", 254)])
def test_the_bounds_of_a_format_hold(name, value):
    format_ = FORMATS[name]
    w = np.array([[value, 0, 1.0]], dtype="float32")
    arrays = format_.from_float(w)
    assert np.isfinite(format_.to_float(*arrays)).all()
    if not format_.is_float:
        assert (format_.bound(*arrays) >= np.abs(format_.to_float(*arrays)).max(axis=1)).all()
    else:
        assert format_.largest == value and np.isinf(format_.from_float(2 * w)[0]).any()
