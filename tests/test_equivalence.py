"""The error of each implementation, per operation, is within the published tolerance. The errors
are measured with the functions of tools/equivalence.py."""

import json
import sys

import numpy as np
import pytest

import equivalence
from comparing.differences import measure
from comparing.table import as_text, worst_of
from comparing.tolerance import tolerance
from comparing.truth import make_truth
from conftest import TINY, make_ops
from model_directory import write_model
from npllama.backend import Backend
from npllama.config import LlamaConfig
from npllama.initialization import random_parameters
from npllama.ops import CupyOps, Ops

DTYPES = ("float32", "float16", "bfloat16", "int8")
WIDE_HEADS = LlamaConfig(256, 2, 4, 2, 320, 260, context_length=64)
"""A head width of 64, and matrix widths that the kernels support."""
PROMPT = [1, 17, 5, 44, 17, 201, 8, 99, 3]
OPERATIONS = {
    "rms_norm", "q-k-v", "rope", "attention", "wo", "gate-up", "swiglu", "w_down",
    "attention block", "feed-forward block",
}  # fmt: skip


def truth_of(config, dtype, n=4):
    def make(ops):
        return random_parameters(config, ops, 0, dtype)

    return make_truth(config, make, PROMPT, n), make


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [TINY, WIDE_HEADS], ids=["tiny", "wide-heads"])
def test_every_operation_is_within_its_tolerance(ops, config, dtype):
    truth, make = truth_of(config, dtype)
    found = measure("it", ops, make, truth)
    backend = "cupy" if isinstance(ops, CupyOps) else "numpy"
    # the errors of all operations add up
    whole = 4 * tolerance(backend, dtype, "attention", "prompt")
    for kind in ("prompt", "decode"):
        phase = found.phases[kind]
        assert set(phase.operations) >= OPERATIONS
        for name, layers in phase.operations.items():
            most = tolerance(backend, dtype, name, kind)
            assert max(layers) <= most, f"{kind}: {name}, layer {np.argmax(layers)}"
        assert phase.head <= tolerance(backend, dtype, "head", kind)
        assert max(*phase.layers, phase.logits) <= whole
    if found.equal_ids < len(truth.ids):  # ids differ only where two logits are nearly equal
        largest = np.abs(truth.phases["prompt"].logits).max()
        assert truth.gaps[found.equal_ids] <= 2 * whole * largest


def test_a_kernel_is_measured_where_there_is_one():
    """The reference has no fused operations, so their results are composed of single ones."""
    truth, _make = truth_of(TINY, "float32")
    fused = truth.phases["decode"].fused[0]
    results = truth.phases["decode"].results[0]
    assert not truth.phases["prompt"].fused
    np.testing.assert_allclose(fused["rope, attention"], results["attention"], atol=1e-6)
    given = truth.phases["decode"].given[0]
    np.testing.assert_allclose(fused["wo, residual"], given["x"] + results["wo"], rtol=1e-12)


MISTAKES = {
    "rms_norm": ("rms_norm", lambda y: y * 1.001),
    "rope": ("rope", lambda y: y * 1.01),
    "swiglu": ("swiglu", lambda y: y + 1e-3),
    "attention": ("cached_attention", lambda y: -y),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_shows_in_its_operation_and_in_no_other(name):
    method, wrong = MISTAKES[name]
    truth, make = truth_of(TINY, "float32")
    ops = Ops(Backend())
    right = getattr(ops, method)
    setattr(ops, method, lambda *args: wrong(right(*args)))
    phase = measure("wrong", ops, make, truth).phases["decode"]
    single = OPERATIONS - {"attention block", "feed-forward block"}
    assert max(phase.operations[name]) > 1e-4
    assert all(max(phase.operations[other]) < 2e-6 for other in single - {name})
    assert phase.logits > 1e-5


def test_a_mistake_in_one_layer_is_reported_with_that_layer():
    truth, make = truth_of(TINY, "float32")
    ops = make_ops("numpy")
    right, calls = ops.swiglu, []

    def swiglu(gate, up):
        calls.append(None)
        return right(gate, up) * (1.1 if len(calls) in (3, 4) else 1)  # two times in a layer

    ops.swiglu = swiglu
    phase = measure("wrong", ops, make, truth).phases["prompt"]
    assert worst_of(phase)[:2] == ("swiglu", 1)


def test_ids_that_part_are_counted_to_where_they_do():
    truth, make = truth_of(TINY, "float32", n=6)
    truth.ids[4] = (truth.ids[4] + 1) % 260
    found = measure("it", Ops(Backend()), make, truth)
    assert found.equal_ids == 4
    text = as_text("title", truth, [found])
    assert "differ from float64's at token 5 of 6" in text


def test_the_truth_is_float64_of_inputs_in_float32():
    truth, _make = truth_of(TINY, "float16")
    assert all(a.dtype == "float64" for r in truth.phases["prompt"].results for a in r.values())
    assert all(a.dtype == "float32" for g in truth.phases["prompt"].given for a in g.values())
    assert set(truth.phases["decode"].fused[0]) == {
        "norm, q-k-v", "rope, attention", "wo, residual", "norm, gate-up, swiglu",
        "w_down, residual",
    }  # fmt: skip


# -- the program -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("equivalence") / "model", TINY)


def run(capsys, *arguments):
    code = equivalence.main([str(a) for a in arguments])
    return code, capsys.readouterr()


def test_the_table_is_aligned_and_says_what_is_missing(directory, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    arguments = ("--dtype", "float16", "--tokens", 3, "--prompt", "The sea")
    code, said = run(capsys, "--model", directory, *arguments)
    lines = said.out.splitlines()
    assert code == 0
    assert lines[0].endswith("float16 weights: differences from float64")
    begins = [line.index("numpy", 20) for line in lines if "numpy reference" in line[20:]]
    (row,) = (line for line in lines if line.startswith("  swiglu") and lines.index(line) < 12)
    assert row[begins[0] - 1] == " " and row[begins[0]].isdigit()
    assert "greedy ids, numpy: all 3 as in float64" in lines
    assert lines[-1].startswith("CuPy is left out: backend cupy cannot be used")
    assert "layer 1" in said.out and "layer 2" not in said.out


def test_json_has_every_layer(directory, capsys):
    arguments = ("--backend", "numpy", "--dtype", "int8", "--tokens", 2, "--prompt", "a", "--json")
    code, said = run(capsys, "--model", directory, *arguments)
    found = json.loads(said.out)
    assert code == 0 and found["missing"] is None
    (report,) = found["dtypes"]
    assert report["dtype"] == "int8"
    assert [i["name"] for i in report["implementations"]] == ["numpy reference", "numpy"]
    phase = report["implementations"][1]["phases"]["decode"]
    assert set(phase["operations"]) >= OPERATIONS
    assert all(len(layers) == TINY.n_layers for layers in phase["operations"].values())
    assert len(phase["layers"]) == TINY.n_layers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", 0), "--tokens is 0: expected at least 1"),
        (("--tokens", 99), "do not fit the context of 64"),
    ],
)
def test_wrong_input_is_one_line(directory, capsys, arguments, message):
    code, said = run(
        capsys, "--model", directory, "--backend", "numpy", "--prompt", "a", *arguments
    )
    assert code == 2
    assert message in said.err and len(said.err.splitlines()) == 1


def test_cupy_asked_for_and_missing_is_an_error(directory, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    code, said = run(capsys, "--model", directory, "--backend", "cupy")
    assert code == 2 and "backend cupy cannot be used" in said.err
