"""npllama against Hugging Face transformers, on fixtures that tools/make_reference.py wrote."""

import numpy as np
import pytest
import safetensors.numpy

from conftest import FIXTURES, make_ops
from npllama.config import LlamaConfig
from npllama.llama import Llama
from npllama.ops import CupyOps
from npllama.sampling_options import Sampling
from npllama.weights import Checkpoint

CASES = sorted(path.name for path in (FIXTURES / "hf").iterdir())

# The largest difference as a fraction of the largest logit. transformers computes norms, angles and
# softmax in float32, so its own error is about 1e-6. CupyOps multiplies 16-bit weights by 16-bit
# activations, which have a relative rounding error of 2^-8 or 2^-11.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}


def hf_case(name, ops):
    directory = FIXTURES / "hf" / name
    config = LlamaConfig.from_directory(directory)
    checkpoint = Checkpoint(directory, config)
    expected = safetensors.numpy.load_file(directory / "expected.safetensors")
    dtype = checkpoint.storage_dtype.name if isinstance(ops, CupyOps) else "float32"
    return Llama(config, checkpoint.parameters(ops), ops), expected, TOLERANCE[dtype]


def test_every_case_is_there():
    assert set(CASES) == {
        "mha", "gqa", "mqa", "tied", "theta-1e6", "eps-1e-6", "bfloat16", "float16", "sharded",
        "head-dim",
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case, ops):
    llama, expected, tolerance = hf_case(case, ops)
    logits = llama.logits(expected["ids"])
    largest = np.abs(expected["logits"]).max()
    assert np.abs(logits - expected["logits"]).max() <= tolerance * largest


@pytest.mark.parametrize("case", CASES)
def test_every_layers_hidden_state_equals_that_of_transformers(case, ops):
    llama, expected, tolerance = hf_case(case, ops)
    hidden = llama.trace(expected["ids"]).hidden
    assert hidden.shape == expected["hidden"].shape
    for i, (ours, theirs) in enumerate(zip(hidden, expected["hidden"], strict=True)):
        assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max(), f"layer {i}"


@pytest.mark.parametrize("case", CASES)
def test_the_greedy_continuation_equals_that_of_transformers(case, ops):
    llama, expected, tolerance = hf_case(case, ops)
    ids = expected["ids"].tolist()
    completion = llama.new_generation(
        [ids], max_new_tokens=len(expected["greedy"]), sampling=Sampling(0), ignore_eos=True
    )
    for _ in completion:
        pass
    got = completion.completions()[0].ids
    if tolerance > 1e-5:  # with 16-bit products, ids may differ where two logits are nearly equal
        assert got[0] == expected["greedy"][0]
    else:
        assert got == expected["greedy"].tolist()


def test_a_wrong_eps_shows_where_embeddings_are_small():
    ops = make_ops("numpy")
    directory = FIXTURES / "hf" / "eps-1e-6"
    config = LlamaConfig.from_directory(directory)
    expected = safetensors.numpy.load_file(directory / "expected.safetensors")
    wrong = LlamaConfig(**{**vars(config), "norm_eps": 1e-5})
    logits = Llama(wrong, Checkpoint(directory, wrong).parameters(ops), ops).logits(expected["ids"])
    assert np.abs(logits - expected["logits"]).max() > 0.05 * np.abs(expected["logits"]).max()
