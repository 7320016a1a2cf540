"""All examples in docstrings produce the documented output."""

import doctest
import importlib

import pytest

MODULES = ["npllama", "npllama.llama", "npllama.model", "npllama.config"]
MODULES += ["npllama.rope_scaling", "npllama.not_a_model", "npllama.sampling_options"]
MODULES += ["npllama.escapes", "npllama.special_tokens", "npllama.explore.record"]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


@pytest.mark.parametrize("method", ["generate", "stream", "generate_batch", "logits", "trace"])
def test_the_public_methods_have_an_example(method):
    from npllama import Llama

    assert ">>> " in getattr(Llama, method).__doc__


def test_load_has_an_example():
    from npllama import load

    assert ">>> " in load.__doc__
