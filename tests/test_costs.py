"""What a model of a shape costs, against counts written out."""

import doctest

import numpy as np
import pytest

from conftest import TINY, make_llama, make_ops
from npllama import costs
from npllama.config import LLAMA_2, LlamaConfig
from npllama.costs import attention_flops, forward_flops, parameters_by_part
from npllama.ops import Ops


def test_the_examples_run():
    assert doctest.testmod(costs).failed == 0


@pytest.mark.parametrize("name", LLAMA_2)
@pytest.mark.parametrize("tied", [False, True])
def test_the_parts_are_all_parameters(name, tied):
    c = LLAMA_2[name]
    c = LlamaConfig(
        c.dim, c.n_layers, c.n_heads, c.n_kv_heads, c.ffn_dim, c.vocab_size, tie_embeddings=tied
    )
    parts = parameters_by_part(c)
    assert sum(parts.values()) == c.n_parameters
    assert parts["feed-forward"] == 3 * c.n_layers * c.dim * c.ffn_dim
    assert parts["head"] == (0 if tied else c.vocab_size * c.dim)


def test_flops_are_two_a_number_and_row():
    norms = (2 * TINY.n_layers + 1) * TINY.dim
    numbers = TINY.n_parameters - norms - TINY.vocab_size * TINY.dim
    assert forward_flops(TINY, 1, 1) == 2 * numbers
    head = TINY.vocab_size * TINY.dim
    assert forward_flops(TINY, 5, 2) == 2 * (5 * (numbers - head) + 2 * head)


@pytest.mark.parametrize("n_new, n_past", [(1, 0), (1, 5), (4, 0), (3, 2)])
def test_flops_of_attention_are_those_of_its_two_products(monkeypatch, n_new, n_past):
    """Counted on the weights that the reference computes: those above 0 are visible pairs."""
    seen = []
    reference = Ops.attention_weights

    def counted(self, q, k):
        p = reference(self, q, k)
        seen.append(int((p > 0).sum()) * 2 * 2 * q.shape[-1])  # q k^T and P v, 2 FLOPs each
        return p

    monkeypatch.setattr(Ops, "attention_weights", counted)
    llama = make_llama(Ops(make_ops("numpy").backend))
    cache = llama.new_cache()
    if n_past:
        llama.prefill(list(range(n_past)), cache)
    seen.clear()
    llama.forward(np.arange(n_new)[None], cache, n_last=n_new)
    assert sum(seen) == attention_flops(TINY, n_new, n_past)
