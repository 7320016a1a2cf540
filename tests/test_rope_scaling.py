"""RoPE for long contexts: frequencies and logits against transformers, all spellings of the config,
and one table for all uses.

tools/make_reference.py rope wrote the fixtures.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy

from conftest import FIXTURES, TINY, make_ops
from convert import main as convert
from model_directory import write_model
from npllama import generate, load, plain
from npllama.config import LLAMA_2, LlamaConfig
from npllama.errors import ConfigError, InputError
from npllama.gradients import loss_and_gradients
from npllama.initialization import random_parameters
from npllama.llama import Llama
from npllama.model import Transformer
from npllama.ops.rope_frequencies import Rotation
from npllama.rope_scaling import RopeScaling
from npllama.weights import Checkpoint, named_arrays

ROPE = FIXTURES / "rope"
CONFIGS = json.loads((ROPE / "configs.json").read_text())
EXPECTED = safetensors.numpy.load_file(ROPE / "expected.safetensors")
MODELS = [name for name in CONFIGS if f"logits/{name}" in EXPECTED]
N_TOKENS = len(EXPECTED["ids"])
SCALINGS = {
    "linear": RopeScaling("linear", 2.0),
    "dynamic": RopeScaling("dynamic", 4.0),
    "yarn": RopeScaling("yarn", 4.0, 16),
    "llama3": RopeScaling("llama3", 4.0, 16, low_freq_factor=1.0, high_freq_factor=4.0),
}


# -- results of transformers


def test_every_kind_has_a_fixture():
    kinds = {LlamaConfig.from_hf(CONFIGS[name]).rope_scaling for name in MODELS}
    assert {kind and kind.kind for kind in kinds} == {None, *SCALINGS}


@pytest.mark.parametrize("name", CONFIGS)
def test_rope_frequencies_equal_those_of_transformers(ops, to_host, name):
    config = LlamaConfig.from_hf(CONFIGS[name])
    n_tokens = CONFIGS[name].get("n_tokens", N_TOKENS)
    frequencies, attention_scaling = ops.rope_frequencies(config, n_tokens)
    got, truth = to_host(frequencies), EXPECTED[f"frequencies/{name}"]
    assert got.dtype == np.float64
    assert np.abs(got / truth - 1).max() < 2e-6  # transformers computes them in float32
    assert abs(attention_scaling / EXPECTED[f"attention_scaling/{name}"] - 1) < 1e-12


def fixture_model(name, ops):
    config = LlamaConfig.from_hf(CONFIGS[name])
    parameters = Checkpoint(ROPE, config).parameters(ops)
    return Llama(config, parameters, ops, context=N_TOKENS)


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_long_text_equal_those_of_transformers(ops, name):
    truth = EXPECTED[f"logits/{name}"]
    logits = fixture_model(name, ops).logits(EXPECTED["ids"])
    assert np.abs(logits - truth).max() <= 1e-5 * np.abs(truth).max()


def test_the_fixtures_tell_the_scalings_apart():
    logits = [EXPECTED[f"logits/{name}"] for name in MODELS]
    for i, one in enumerate(logits):
        for other in logits[:i]:
            assert np.abs(one - other).max() > 0.01 * np.abs(one).max()


# -- spellings


def spellings(fields):
    """The config in every spelling."""
    fields = dict(fields)
    rope = {**fields.pop("rope_scaling", {}), **fields.pop("rope_parameters", {})}
    kind = rope.pop("rope_type", None) or rope.pop("type", None)
    rope = {name: value for name, value in rope.items() if name != "type"}
    theta = rope.pop("rope_theta", fields.pop("rope_theta"))
    for field in ("rope_scaling", "rope_parameters"):
        for kinds in ({"type": kind}, {"rope_type": kind}, {"type": "su", "rope_type": kind}):
            for of_theta in ({"rope_theta": theta}, {"rope_theta": None}):
                outside = {"rope_theta": 7.0 if of_theta["rope_theta"] else theta}
                other = {"rope_scaling": None} if field == "rope_parameters" else {}
                yield {**fields, **outside, **other, field: kinds | rope | of_theta}
    if "original_max_position_embeddings" in rope and kind != "dynamic":
        original = rope.pop("original_max_position_embeddings")
        rope |= {"type": kind, "rope_theta": theta}
        yield fields | {"original_max_position_embeddings": original, "rope_scaling": rope}
        wrong = rope | {"original_max_position_embeddings": 7}  # the outer field takes precedence
        yield fields | {"original_max_position_embeddings": original, "rope_scaling": wrong}


@pytest.mark.parametrize("name", [name for name in CONFIGS if "factor" in str(CONFIGS[name])])
def test_every_spelling_is_the_same_config(name):
    config = LlamaConfig.from_hf(CONFIGS[name])
    assert config.rope_scaling is not None
    for fields in spellings(CONFIGS[name]):
        assert LlamaConfig.from_hf(fields) == config, fields


def test_rope_scaling_replaces_rope_parameters():
    fields = TINY.to_hf() | {"rope_parameters": {"type": "linear", "factor": 4.0}}
    fields["rope_scaling"] = {"type": "dynamic", "factor": 2.0}
    assert LlamaConfig.from_hf(fields).rope_scaling == RopeScaling("dynamic", 2.0)


def test_yarn_without_a_factor_has_that_of_the_contexts():
    rope = {"type": "yarn", "original_max_position_embeddings": 16}
    config = LlamaConfig.from_hf(TINY.to_hf() | {"rope_scaling": rope})
    assert config.rope_scaling == RopeScaling("yarn", 4.0, 16)


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_scaled_config_that_is_written_reads_back_the_same(kind):
    config = replace(TINY, rope_scaling=SCALINGS[kind])
    assert LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize(
    ("kind", "factor"), [("su", 2.0), ("linear", 0.5), ("yarn", 2.0), ("llama3", 2.0)]
)
def test_a_scaling_made_in_python_is_checked(kind, factor):
    with pytest.raises(ConfigError):
        RopeScaling(kind, factor)


# -- context length


@pytest.mark.parametrize(
    ("name", "context", "longest"),
    [
        ("llama-2", 4096, 4096),
        ("codellama", 16384, 16384),
        ("vicuna-7b-v1.5-16k", 16384, 16384),
        ("llama-2-7b-32k", 32768, 32768),
        ("yarn-llama-2-7b-64k", 65536, 65536),
        ("yarn-llama-2-7b-128k", 131072, 131072),
        ("yarn-llama-2-70b-32k", 32768, 32768),
        ("tinyllama-1.1b-chat-32k", 2048, 32768),
        ("llama-3.1", 131072, 131072),
        ("llama-3.2", 131072, 131072),
    ],
)
def test_the_context_of_published_checkpoints_is_found(name, context, longest):
    for without in ((), ("max_sequence_length",)):  # not in Vicuna's first revision
        fields = {key: value for key, value in CONFIGS[name].items() if key not in without}
        config = LlamaConfig.from_hf(fields)
        assert (config.context_length, config.longest_context) == (context, longest)


def test_max_sequence_length_says_less_than_the_factor_would():
    fields = TINY.to_hf() | {"rope_scaling": {"type": "linear", "factor": 4.0}}
    assert LlamaConfig.from_hf(fields).context_length == 256
    assert LlamaConfig.from_hf(fields | {"max_sequence_length": 100}).context_length == 100
    for wrong in ("100", 0, 2**31, 1.5):
        with pytest.raises(ConfigError, match="max_sequence_length is"):
            LlamaConfig.from_hf(fields | {"max_sequence_length": wrong})
    assert LlamaConfig.from_hf(TINY.to_hf() | {"max_sequence_length": 100}) == TINY


# -- one rope table


def scaled_llama(ops, kind, context):
    config = replace(TINY, context_length=16, rope_scaling=SCALINGS[kind])
    return Llama(config, random_parameters(config, ops), ops, context=context)


@pytest.mark.parametrize("kind", ["dynamic", "yarn"])
def test_chunks_decode_and_batch_agree_with_the_whole_text(ops, to_host, kind, rng):
    """The texts are longer than the original context. The base of "dynamic" depends on the context
    of the model, and not on the length of a text."""
    llama = scaled_llama(ops, kind, context=40)
    texts = [rng.integers(3, 260, n).tolist() for n in (40, 23)]
    truth = [llama.logits(ids) for ids in texts]
    tolerance = 2e-5 * np.abs(truth[0]).max()
    for n in (40, 23, 9):  # a prefix has the logits of the whole text
        assert np.abs(llama.logits(texts[0][:n]) - truth[0][:n]).max() < tolerance
    cache = llama.new_cache(batch=2)
    for row, (ids, chunk) in enumerate(zip(texts, (7, 64), strict=True)):
        got = to_host(llama.prefill(ids[: len(ids) - 6], cache, row, chunk))
        assert np.abs(got[0] - truth[row][len(ids) - 7]).max() < tolerance
    for i in range(-6, 0):  # both rows, at different positions
        tokens = ops.backend.to_device(np.array([[ids[i]] for ids in texts], dtype="int32"))
        got = to_host(llama.forward(tokens, cache))[:, 0]
        for row in range(2):
            assert np.abs(got[row] - truth[row][i]).max() < tolerance


def test_dynamic_has_the_frequencies_of_the_models_context():
    """Values of transformers 5.24 for C = 128, factor 2 and 4096 positions."""
    ops = make_ops("numpy")
    config = replace(LLAMA_2["7B"], rope_scaling=RopeScaling("dynamic", 2.0))
    for context, last in ((4097, 1.154218480e-4), (6000, 5.984295785e-5), (8192, 3.849273344e-5)):
        got = ops.rope_frequencies(config, context).frequencies[63]
        assert abs(got / last - 1) < 1e-6


def test_dynamic_is_plain_up_to_the_context_and_other_beyond():
    ops = make_ops("numpy")
    ids = list(range(3, 16))
    unscaled = replace(TINY, context_length=16)
    truth = Llama(unscaled, random_parameters(unscaled, ops), ops).logits(ids)
    for context in (None, 13, 16):
        assert np.array_equal(scaled_llama(ops, "dynamic", context).logits(ids), truth)
    longer = [scaled_llama(ops, "dynamic", n).logits(ids) for n in (17, 64)]
    assert np.abs(longer[0] - truth).max() > 1e-4
    assert np.abs(longer[1] - truth).max() > np.abs(longer[0] - truth).max()


def test_a_row_with_attention_scaling_is_longer_by_it(ops, to_host, rng):
    x = ops.backend.to_device(rng.standard_normal((1, 5, 2, 8)))
    frequencies = ops.rope_frequencies(replace(TINY, head_dim=8)).frequencies
    cos, sin = ops.rope_table(5, Rotation(frequencies, 1.25), "float64")
    norms = (np.linalg.norm(to_host(a), axis=-1) for a in (ops.rope(x, cos[None], sin[None]), x))
    np.testing.assert_allclose(next(norms), 1.25 * next(norms), rtol=1e-12)


# -- training


@pytest.mark.parametrize("kind", SCALINGS)
def test_training_turns_by_the_same_frequencies(ops, to_host, kind, rng):
    llama = scaled_llama(ops, kind, context=24)
    tokens, targets = rng.integers(3, 260, (2, 1, 20)).astype("int32")
    weights = np.full((1, 20), 1 / 20, dtype="float32")
    batch = [ops.backend.to_device(a) for a in (tokens, targets, weights)]
    loss, _gradients = loss_and_gradients(llama, *batch)
    logits = llama.logits(tokens[0].tolist()).astype("float64")
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    truth = -log_p[np.arange(20), targets[0]].mean()
    assert abs(float(to_host(loss)) - truth) < 1e-5


def test_gradients_with_attention_scaling_equal_central_differences(rng):
    ops = make_ops("numpy")
    config = replace(TINY, context_length=16, rope_scaling=SCALINGS["yarn"])
    parameters = random_parameters(config, ops)
    wide = replace(
        parameters,
        embedding=parameters.embedding.map(lambda a: a.astype("float64")),
        layers=tuple(
            layer.map(lambda a: 6 * a.astype("float64") if a.ndim == 2 else a.astype("float64"))
            for layer in parameters.layers
        ),
        head=parameters.head.map(lambda a: a.astype("float64")),
    )
    model = Transformer(config, wide, ops, context=24)
    tokens, targets = rng.integers(3, 260, (2, 1, 20)).astype("int32")
    batch = (tokens, targets, np.full((1, 20), 1 / 20))
    _loss, gradients = loss_and_gradients(model, *batch)
    weights = named_arrays(wide, config)
    for name, gradient in named_arrays(gradients, config).items():
        if "q_proj" not in name and "k_proj" not in name:
            continue
        place = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)
        kept, losses = weights[name][place], []
        for change in (1e-5, -1e-5):
            weights[name][place] = kept + change
            losses.append(float(loss_and_gradients(model, *batch)[0]))
        weights[name][place] = kept
        difference = (losses[0] - losses[1]) / 2e-5
        assert abs(difference - gradient[place]) <= 1e-5 * abs(gradient[place]), name


# -- load and the command line


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_the_option_is_as_good_as_the_field(tmp_path, kind):
    bare = write_model(tmp_path / "bare", TINY)
    rope = {"type": kind, "factor": 2.0}
    written = write_model(tmp_path / "written", TINY, rope_scaling=rope)
    options = {"backend": "numpy", "context": 100}
    given = load(bare, rope_scaling=f"{kind}:2", **options)
    assert given.config == load(written, **options).config
    ids = list(range(3, 93))
    assert np.array_equal(given.logits(ids), load(written, **options).logits(ids))


def test_the_option_takes_the_place_of_the_field(tmp_path):
    rope = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 5e5, "alpha": 3}
    rope["original_max_position_embeddings"] = 32
    model = write_model(tmp_path, TINY, rope_parameters=rope, rope_theta=None)
    config = LlamaConfig.from_directory(model, "yarn:8")
    assert config.rope_scaling == RopeScaling("yarn", 8.0, 32)
    assert (config.context_length, config.rope_theta) == (256, 5e5)
    assert LlamaConfig.from_directory(model, "linear:1") == replace(TINY, rope_theta=5e5)
    model = write_model(tmp_path, TINY, rope_scaling="dynamic")
    assert LlamaConfig.from_directory(model, "dynamic:2").longest_context == 128
    fields = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 16384}
    (model / "config.json").write_text(json.dumps(fields))
    assert LlamaConfig.from_directory(model, "linear:2").context_length == 32768


@pytest.mark.parametrize(
    "text", ["linear", "linear:", "linear:x", "linear:0.5", "yarn:nan", "yarn:1e9", "su:2", ":", 4]
)
def test_another_option_is_refused(tmp_path, text):
    with pytest.raises(InputError, match="expected TYPE:FACTOR with type linear, dynamic or yarn"):
        LlamaConfig.from_directory(write_model(tmp_path, TINY), text)


def test_the_option_with_llama3_says_what_is_missing(tmp_path):
    with pytest.raises(InputError, match=r"llama3 has more parameters, so set it in config\.json"):
        LlamaConfig.from_directory(write_model(tmp_path, TINY), "llama3:8")


def context_line(capsys, model, *options):
    """The value of "context" in the output of --stats."""
    arguments = ["--model", str(model), "--prompt", "a", "--max-new-tokens", "1", "--stats"]
    assert generate.main([*arguments, *options]) == 0
    lines = capsys.readouterr().err.splitlines()
    return next(line[20:].strip() for line in lines if line.startswith("context "))


def test_stats_show_the_context_and_the_scaling(tmp_path, capsys):
    model = write_model(tmp_path, TINY)
    assert context_line(capsys, model) == "64 of the model's 64 tokens"
    said = context_line(capsys, model, "--rope-scaling", "linear:2")
    assert said == "128 of the model's 128 tokens; RoPE scaling linear, factor 2"
    dynamic = ("--rope-scaling", "dynamic:1.5")
    said = context_line(capsys, model, *dynamic)
    assert said == "64 of the model's 96 tokens; RoPE scaling dynamic, not used up to 64"
    said = context_line(capsys, model, *dynamic, "--context", "96")
    assert said == "96 of the model's 96 tokens; RoPE scaling dynamic, factor 1.5"


def test_a_full_context_says_that_the_scaling_makes_more(tmp_path, capsys):
    model = str(write_model(tmp_path, TINY, rope_scaling={"type": "dynamic", "factor": 2.0}))
    for context, larger in (("64", True), ("128", False)):  # BOS, the space, and one byte per token
        prompt = "a" * (int(context) - 2)
        assert generate.main(["--model", model, "--prompt", prompt, "--context", context]) == 0
        line = capsys.readouterr().err
        assert f"the prompt fills the context of {context} tokens" in line
        assert line.endswith("or give a larger --context\n") == larger


def refused(capsys, main, *arguments):
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_refusals_are_one_line(tmp_path, capsys):
    model = str(write_model(tmp_path, TINY, rope_scaling={"type": "dynamic", "factor": 2.0}))
    asked = ("--model", model, "--prompt", "a" * 100)
    line = refused(capsys, generate.main, *asked, "--context", "129")
    assert "context is 129: the model was trained for 128 positions" in line
    line = refused(capsys, generate.main, *asked)
    assert "do not fit the context of 64: shorten the prompt, or give --context" in line
    assert "up to 128" in line
    assert "TYPE:FACTOR" in refused(capsys, generate.main, *asked, "--rope-scaling", "4")
    line = refused(capsys, plain.main, *asked)
    assert "uses RoPE scaling, which npllama.plain does not support" in line


# -- conversion


def test_conversion_keeps_the_fields(tmp_path, capsys):
    fields = {
        "rope_scaling": {"factor": 4.0, "type": "yarn", "finetuned": True},
        "max_sequence_length": 200,
        "original_max_position_embeddings": 32,
    }
    source = write_model(tmp_path / "source", TINY, **fields)
    assert convert([str(source), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: written[name] for name in fields} == fields
    one, other = (LlamaConfig.from_directory(path) for path in (source, tmp_path / "out"))
    assert one == other and one.rope_scaling == RopeScaling("yarn", 4.0, 32)
    assert convert([str(source), "--inspect"]) == 0
    assert "context 200, norm eps 1e-05, rope theta 10000 scaled by yarn, factor 4" in (
        capsys.readouterr().out
    )
