"""The program that compares NumPy's overrides with the reference."""

import re

import numpy as np
import pytest

import measure_overrides
from conftest import ROOT, TINY
from measuring import ratios
from measuring.operations import RandomLayer, Sizes, operations
from npllama.ops import NumpyOps, Ops

SMALL = Sizes(
    TINY, n_tokens=70, n_logits=80, n_likely=10, training=TINY, batch=2
)  # 70 tokens use several threads
HOOKS = {"prepare", "forward_context", "turn", "scratch_size", "attention_nbytes"}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(measure_overrides, "SIZES", SMALL)
    monkeypatch.setattr(measure_overrides, "PAUSE", 0)
    monkeypatch.setattr(ratios, "SECONDS", 0)


def names():
    return {operation.name for operation in operations(SMALL)}


def test_it_prints_a_row_for_each_operation(capsys):
    assert measure_overrides.main(["--runs", "2", "--threads", "2"]) == 0
    out = capsys.readouterr().out
    rows = re.findall(
        r"^\| `(\w+)` \| [^|]+ \| [12] \| [\d.]+ [um]s \| [\d.]+ [um]s "
        r"\| \d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\) \|$",
        out,
        re.M,
    )
    assert rows == [operation.name for operation in operations(SMALL)]


def test_every_override_is_measured():
    overridden = {
        name
        for name in dir(Ops)
        if not name.startswith("_") and getattr(Ops, name) is not getattr(NumpyOps, name)
    }
    assert names() == overridden - HOOKS


@pytest.mark.parametrize("operation", operations(SMALL), ids=lambda o: f"{o.name}-{o.operands}")
def test_both_sides_compute_the_same_result(operation):
    layer = RandomLayer(SMALL, operation.is_training, n_threads=2)
    override, reference = measure_overrides.sides(operation, layer)
    for actual, expected in zip(arrays(override), arrays(reference), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def arrays(side):
    result = side.call()
    return result if isinstance(result, tuple) else (result,)


def test_the_sides_alternate_and_are_timed_in_their_contexts(monkeypatch):
    from contextlib import contextmanager

    events = []

    def side(name):
        @contextmanager
        def context():
            events.append(f"enter {name}")
            yield

        return ratios.Side(lambda: events.append(name), context)

    timings = ratios.compare(side("a"), side("b"), n_runs=2, pause=0)
    assert len(timings.override) == len(timings.reference) == 2
    assert events[-8:] == [e for name in "abba" for e in (f"enter {name}", name)]


def test_the_ratios_are_those_of_each_run():
    timings = ratios.Timings([1.0, 2.0, 30.0], [2.0, 2.0, 10.0])
    assert timings.ratios() == (0.75, 1.0, 2.0)


def test_list_shows_the_chosen_operations(capsys):
    assert measure_overrides.main(["--list", "--operation", "sample"]) == 0
    assert capsys.readouterr().out == "sample: V = 80, 6 left\nsample: V = 80, all left\n"


def test_the_readme_names_operations_of_the_program():
    page = (ROOT / "tools" / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"measure_overrides\.py --operation (\w+)", page)
    assert set(named) - {"NAME"} <= names()
    assert len(named) > 10


@pytest.mark.parametrize("option", ["--runs", "--threads"])
def test_a_number_below_one_ends_in_one_line(capsys, option):
    assert measure_overrides.main([option, "0"]) == 2
    error = capsys.readouterr().err
    assert error == f"measure_overrides: error: {option} is 0: expected at least 1\n"


def test_an_unknown_operation_ends_in_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        measure_overrides.main(["--operation", "mixture"])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.startswith("measure_overrides: error: ") and error.count("\n") == 1
