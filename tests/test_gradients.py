"""The gradient of the whole model against PyTorch's autograd, central differences, and
invariants."""

import json

import numpy as np
import pytest
import safetensors.numpy

from conftest import FIXTURES, TINY
from npllama.config import LlamaConfig
from npllama.errors import InputError
from npllama.gradients import loss_and_gradients
from npllama.initialization import random_parameters
from npllama.model import Transformer
from npllama.parameters import Head, Layer, Matrix, Parameters
from npllama.weight_table import EMBEDDING, LM_HEAD, NORM, OF_LAYER
from npllama.weights import named_arrays

CASES = sorted(path.stem for path in (FIXTURES / "gradients").glob("*.json"))


def parameters_of(arrays, config):
    """Parameters from arrays by tensor name."""
    embedding = Matrix(arrays[EMBEDDING])
    layers = []
    for i in range(config.n_layers):
        given = {w.field: arrays[w.hf_name(i)] for w in OF_LAYER}
        parts = {field: a if a.ndim == 1 else Matrix(a) for field, a in given.items()}
        layers.append(Layer(**parts, norm_eps=config.norm_eps))
    lm_head = embedding if config.tie_embeddings else Matrix(arrays[LM_HEAD])
    return Parameters(embedding, tuple(layers), Head(arrays[NORM], lm_head, config.norm_eps))


def torch_case(name, ops):
    config = LlamaConfig.from_hf(json.loads((FIXTURES / "gradients" / f"{name}.json").read_text()))
    case = safetensors.numpy.load_file(FIXTURES / "gradients" / f"{name}.safetensors")
    case = {key: value.copy() for key, value in case.items()}
    move = ops.backend.to_device
    weights = {key[2:]: move(value) for key, value in case.items() if key.startswith("w/")}
    model = Transformer(config, parameters_of(weights, config), ops)
    batch = [move(case[key]) for key in ("tokens", "targets", "weights")]
    return model, batch, case


def test_every_case_is_there():
    assert CASES == ["gqa", "head-dim", "tied-mqa"]


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_those_of_pytorchs_autograd(name, ops, to_host):
    model, batch, case = torch_case(name, ops)
    loss, gradients = loss_and_gradients(model, *batch)
    assert abs(float(to_host(loss)) - case["loss"]) < 1e-12 * abs(case["loss"])
    got = named_arrays(gradients, model.config)
    assert {f"g/{key}" for key in got} == {key for key in case if key.startswith("g/")}
    for key, gradient in got.items():
        truth = case[f"g/{key}"]
        gradient = to_host(gradient)
        assert gradient.dtype == np.float64
        assert np.abs(gradient - truth).max() <= 1e-10 * np.abs(truth).max(), key


def test_gradients_equal_central_differences(rng):
    """Check one element of every tensor."""
    from conftest import make_ops

    model, batch, _case = torch_case("gqa", make_ops("numpy"))
    _, gradients = loss_and_gradients(model, *batch)
    weights = named_arrays(model.parameters, model.config)
    step = 1e-5
    for name, gradient in named_arrays(gradients, model.config).items():
        place = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)
        kept = weights[name][place]
        losses = []
        for change in (step, -step):
            weights[name][place] = kept + change
            losses.append(float(loss_and_gradients(model, *batch)[0]))
        weights[name][place] = kept
        difference = (losses[0] - losses[1]) / (2 * step)
        assert abs(difference - gradient[place]) <= 1e-6 * abs(gradient[place]), name


def tiny_case(ops, rng, batch=3, n=9, config=TINY):
    model = Transformer(config, random_parameters(config, ops), ops)
    tokens = rng.integers(0, config.vocab_size, (batch, n)).astype("int32")
    targets = rng.integers(0, config.vocab_size, (batch, n)).astype("int32")
    return model, tokens, targets, np.full((batch, n), 1 / (batch * n), dtype="float32")


def gradients_of(model, *batch):
    _loss, gradients = loss_and_gradients(model, *(model.backend.to_device(a) for a in batch))
    arrays = named_arrays(gradients, model.config)
    return {key: model.backend.to_host(array) for key, array in arrays.items()}


def assert_same(got, truth, tolerance=1e-5):
    assert got.keys() == truth.keys()
    for key, value in truth.items():
        assert np.abs(got[key] - value).max() <= tolerance * np.abs(value).max(), key


def test_the_loss_is_that_of_the_models_own_logits(ops, rng, to_host):
    model, tokens, targets, weights = tiny_case(ops, rng)
    loss, _ = loss_and_gradients(model, *map(model.backend.to_device, (tokens, targets, weights)))
    surprise = 0.0
    for row, wanted in zip(tokens, targets, strict=True):
        logits = model.logits(row.tolist()).astype("float64")
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        surprise -= log_p[np.arange(len(wanted)), wanted].sum()
    assert abs(float(to_host(loss)) - surprise / tokens.size) < 1e-5


def test_micro_batches_add_up_to_the_batch(ops, rng):
    model, *batch = tiny_case(ops, rng)
    whole = gradients_of(model, *batch)
    parts = [gradients_of(model, *(a[i] for a in batch)) for i in (slice(0, 1), slice(1, 3))]
    assert_same({key: parts[0][key] + parts[1][key] for key in whole}, whole)


def test_padding_changes_nothing(ops, rng):
    model, tokens, targets, weights = tiny_case(ops, rng)
    truth = gradients_of(model, tokens, targets, weights)
    padded = [np.pad(a, ((0, 0), (0, 4))) for a in (tokens, targets, weights)]
    assert_same(gradients_of(model, *padded), truth)


def test_the_gradient_is_in_the_parameters_shape_and_leaves_them_alone(ops, rng, to_host):
    model, *batch = tiny_case(ops, rng)
    before = {k: to_host(a).copy() for k, a in named_arrays(model.parameters, TINY).items()}
    got = gradients_of(model, *batch)
    for key, array in named_arrays(model.parameters, TINY).items():
        assert got[key].shape == array.shape
        assert got[key].dtype == np.float32
        assert np.array_equal(to_host(array), before[key])


def test_a_step_against_the_gradient_lowers_the_loss(ops, rng, to_host):
    model, *batch = tiny_case(ops, rng)
    batch = [model.backend.to_device(a) for a in batch]
    before, gradients = loss_and_gradients(model, *batch)
    named = named_arrays(gradients, TINY)
    for key, array in named_arrays(model.parameters, TINY).items():
        array -= 0.05 * named[key]
    after, _ = loss_and_gradients(model, *batch)
    assert float(to_host(after)) < float(to_host(before))


@pytest.mark.parametrize("dtype", ["int8", "float16", "bfloat16"])
def test_weights_that_are_rounded_have_no_gradient(ops, rng, dtype):
    model = Transformer(TINY, random_parameters(TINY, ops, dtype=dtype), ops)
    ids = ops.backend.to_device(np.ones((1, 3), dtype="int32"))
    weights = ops.backend.to_device(np.ones((1, 3), dtype="float32"))
    with pytest.raises(InputError, match="gradients need them all in float32"):
        loss_and_gradients(model, ids, ids, weights)
