"""An infinite weight ends a generation with the same error for every dtype, and without warnings.

The test configuration turns warnings into errors.
"""

import ml_dtypes  # noqa: F401  (NumPy then knows "bfloat16")
import numpy as np
import pytest

import npllama.ops.shared_products as shared_products
from conftest import TINY
from model_directory import random_tensors, write_model
from npllama import load
from npllama.errors import NumericalError
from npllama.ops.chunks import MANY_ROWS
from npllama.ops.workers import can_work
from npllama.weight_formats import FORMATS
from npllama.weights import EMBEDDING, LM_HEAD, NORM, layer_name

STORED = ("float32", "bfloat16", "float16")
ASKED = (None, *STORED, "int8")
SHORT, LONG = [1, 5], [1, *range(5, 5 + MANY_ROWS // 2), *range(5, 5 + MANY_ROWS // 2)]
CONFIG = type(TINY)(**{**vars(TINY), "context_length": 2 * MANY_ROWS})


def error_of(directory, ids, dtype=None, threads=1):
    llama = load(directory, backend="numpy", dtype=dtype, threads=threads)
    with pytest.raises(NumericalError) as caught:
        llama.generate(ids, max_new_tokens=2, temperature=0)
    return str(caught.value)


def write_infinite(directory, name, value, stored):
    tensors = random_tensors(CONFIG, dtype=stored)
    tensors[name][(5,) if tensors[name].ndim == 1 else (5, 3)] = value
    return write_model(directory, CONFIG, tensors=tensors)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        (EMBEDDING, np.inf),
        (layer_name(0, "attention_norm"), -np.inf),
        (layer_name(0, "wq"), np.inf),
        (layer_name(0, "wk"), -np.inf),
        (layer_name(1, "wv"), np.inf),
        (layer_name(1, "wo"), -np.inf),
        (layer_name(0, "w_gate"), -np.inf),
        (layer_name(1, "w_up"), np.inf),
        (layer_name(1, "w_down"), np.nan),
        (NORM, np.inf),
        (LM_HEAD, np.inf),
    ],
)
def test_the_error_is_the_same_for_every_dtype(tmp_path, stored, name, value):
    directory = write_infinite(tmp_path, name, value, stored)
    messages = {error_of(directory, ids, dtype) for dtype in ASKED for ids in (SHORT, LONG)}
    assert len(messages) == 1, messages
    assert "log-probability of nan for token 1: the weights are damaged" in messages.pop()


@pytest.mark.skipif(not can_work(), reason="there are no worker processes on this machine")
@pytest.mark.parametrize("dtype", [None, "int8"])
def test_the_error_is_the_same_where_worker_processes_and_threads_compute(
    tmp_path, dtype, monkeypatch
):
    monkeypatch.setattr(shared_products, "SHARED_SIZE", 1)
    directory = write_infinite(tmp_path, layer_name(1, "w_up"), np.inf, "float16")
    for ids in (SHORT, LONG):
        message = error_of(directory, ids, dtype, threads=2)
        assert "log-probability of nan for token 1: the weights are damaged" in message


is_finite = FORMATS["float16"].is_finite


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan])
@pytest.mark.parametrize("place", [0, 1, 998, 999])
def test_every_infinity_and_nan_of_float16_is_found(value, place):
    w = np.full((1000, 1), 65504, dtype="float16")
    w[::2] = -65504
    w[::3] = 6e-8  # subnormal
    w[::5] = -0.0
    assert is_finite(w)
    w[place] = value
    assert not is_finite(w)


def test_no_number_of_float16_is_taken_for_another():
    every = np.arange(2**16, dtype="uint16").view("float16")
    finite = every[np.isfinite(every)]
    assert is_finite(finite[None])
    assert not any(is_finite(number[None, None]) for number in every[~np.isfinite(every)])
