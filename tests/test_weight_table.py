"""The table of weights: names are found again, and its rows are consistent."""

import pytest

from conftest import TINY
from npllama.config import LLAMA_2
from npllama.parameters import Head, Layer, Parameters
from npllama.weight_table import (
    PRODUCTS,
    TABLE,
    find_hf,
    find_meta,
    layer_name,
    named_weights,
    tensor_shapes,
)


def test_every_tensor_is_found_by_either_name():
    for name, weight, layer in named_weights(LLAMA_2["7B"]):
        assert find_hf(name) == find_meta(weight.meta_name(layer)) == (weight, layer)
        assert (layer is not None) == weight.in_layer


@pytest.mark.parametrize(
    "index", ["", "01", "-1", "+1", "1.0", "1_0", "x", "{layer}", "\u00b2", "\u0661", "1" * 9]
)
def test_a_layer_whose_index_nobody_writes_is_not_found(index):
    assert find_meta(f"layers.{index}.attention.wq.weight") is None
    assert find_hf(f"model.layers.{index}.self_attn.q_proj.weight") is None


@pytest.mark.parametrize("name", ["", "layers.0", "layers.0.", "rope.freqs", "0.norm.weight"])
def test_other_names_are_not_found(name):
    assert find_hf(name) is None and find_meta(name) is None


def test_fields_are_those_of_the_parameters():
    for weight in TABLE:
        owners = (Layer,) if weight.in_layer else (Parameters, Head)
        assert any(weight.field in owner.__annotations__ for owner in owners)


def test_what_is_joined_has_one_input_and_follows_in_the_file():
    order = list(tensor_shapes(TINY))
    for name, weights in PRODUCTS.items():
        assert name in Layer.__annotations__
        assert len({weight.shape[1] for weight in weights}) == 1
        assert [weight.follows for weight in weights] == [False] + [True] * (len(weights) - 1)
        first = order.index(layer_name(0, weights[0].field))
        names = [layer_name(0, weight.field) for weight in weights]
        assert order[first : first + len(names)] == names


def test_shards_split_a_products_outputs_or_its_inputs():
    """As in Megatron: q, k, v, gate and up are split by rows, and the products after them by
    columns."""
    by_rows = {weight.field for weight in TABLE if weight.split == 0}
    by_columns = {weight.field for weight in TABLE if weight.split == 1}
    assert by_rows == {"wq", "wk", "wv", "w_gate", "w_up", "lm_head"}
    assert by_columns == {"wo", "w_down", "embedding"}
    assert all(weight.is_matrix for weight in TABLE if weight.split is not None)
