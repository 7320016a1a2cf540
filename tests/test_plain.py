"""npllama.plain: the library agrees with it, and it agrees with transformers."""

from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy

from conftest import FIXTURES, TINY
from model_directory import write_model
from npllama import generate, plain
from npllama.backend import Backend
from npllama.config import LlamaConfig
from npllama.initialization import random_parameters
from npllama.ops import Ops
from npllama.weights import Checkpoint

FIXTURE_NAMES = sorted(path.name for path in (FIXTURES / "hf").iterdir())


@pytest.mark.parametrize("prompt", ["Once upon a time", "", "Lily é 🦙"])
def test_it_prints_what_the_command_line_prints(prompt, capsys):
    length = ["--prompt", prompt, "--max-new-tokens", "60"]
    assert plain.main(length) == 0
    page = capsys.readouterr().out
    assert generate.main([*length, "--temperature", "0", "--backend", "numpy"]) == 0
    assert page == capsys.readouterr().out


@pytest.mark.parametrize("name", FIXTURE_NAMES)
def test_its_greedy_ids_are_those_of_transformers(name):
    directory = FIXTURES / "hf" / name
    config = replace(LlamaConfig.from_directory(directory), eos_ids=())
    parameters = Checkpoint(directory, config, "float32").parameters(Ops(Backend()))
    expected = safetensors.numpy.load_file(directory / "expected.safetensors")
    greedy = expected["greedy"].tolist()
    assert list(plain.generate(parameters, config, expected["ids"], len(greedy))) == greedy


def test_a_prompt_in_two_parts_gives_the_same_states(rng):
    config = LlamaConfig(32, 1, 4, 2, 40, 50, context_length=16)
    layer = random_parameters(config, Ops(Backend())).layers[0]
    x = rng.standard_normal((9, 32), dtype="float32")
    whole, parts = plain.Block(layer, config, 16), plain.Block(layer, config, 16)
    got = np.concatenate([parts(x[:4], 0), parts(x[4:], 4)])
    assert np.allclose(got, whole(x, 0), atol=1e-5)


def test_without_bos_it_prints_what_the_command_line_prints(capsys, tmp_path):
    model = write_model(tmp_path / "model", TINY)
    (model / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    options = ["--prompt", "The", "--model", str(model), "--max-new-tokens", "9"]
    assert plain.main(options) == 0
    page = capsys.readouterr().out
    assert generate.main([*options, "--temperature", "0", "--backend", "numpy"]) == 0
    assert page == capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [["--model", ""], ["--model", "/nowhere"], ["--max-new-tokens", "-1"]]
)
def test_wrong_input_is_one_line(capsys, options):
    assert plain.main(["--prompt", "a", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("plain: error: ") and error.count("\n") == 1


def test_a_prompt_beyond_the_context_is_one_line(capsys):
    assert plain.main(["--prompt", "a cat " * 1000]) == 2
    assert "expected at most 512 tokens in the prompt" in capsys.readouterr().err
