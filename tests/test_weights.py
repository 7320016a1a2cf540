"""From model directories to parameters: names, shapes, dtypes, memory maps and errors."""

import gc
import json
import math
import mmap
import shutil
import tracemalloc
import weakref
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import convert
import npllama.ops.shared_products as shared_products
import npllama.weights
from conftest import FIXTURES, TINY, make_llama, make_ops
from model_directory import random_tensors, write_model
from npllama.backend import Backend
from npllama.config import LLAMA_2, LlamaConfig
from npllama.errors import NpllamaError, WeightsError
from npllama.llama import Llama
from npllama.ops import NumpyOps
from npllama.ops.workers import can_work
from npllama.shared_arrays import MappedFile, location_of, memory_of
from npllama.threads import Threads
from npllama.weight_table import (
    EMBEDDING,
    LM_HEAD,
    NORM,
    OF_LAYER,
    PRODUCTS,
    layer_name,
    tensor_shapes,
)
from npllama.weights import INDEX, SINGLE, Checkpoint

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
TIED = LlamaConfig(**{**vars(TINY), "tie_embeddings": True})
ROTARY_TABLES = [
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.layers.1.self_attn.rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq",
]


def load(directory, ops, config=TINY, dtype=None):
    return Checkpoint(directory, config, dtype).parameters(ops)


def by_name(parameters):
    """Name in the file -> device array, for all loaded weights."""
    arrays = {
        EMBEDDING: parameters.embedding.values,
        NORM: parameters.head.norm,
        LM_HEAD: parameters.head.lm_head.values,
    }
    for i, layer in enumerate(parameters.layers):
        for weight in OF_LAYER:
            part = getattr(layer, weight.field)
            arrays[weight.hf_name(i)] = part.values if weight.is_matrix else part
    return arrays


def refused(directory, config=TINY, dtype=None, error=WeightsError):
    """The one-line message with which a directory is refused, without the path."""
    with pytest.raises(error) as caught:
        load(directory, make_ops("numpy"), config, dtype)
    message = str(caught.value)
    assert message.startswith(str(directory)) and "\n" not in message
    return message.removeprefix(str(directory))


def lies_in_a_memory_map(array):
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array.obj if isinstance(array, memoryview) else array, mmap.mmap)


def write_index(directory, weight_map):
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# -- names and shapes


@pytest.mark.parametrize("size", LLAMA_2)
def test_the_tensors_of_each_size_add_up_to_its_parameters(size):
    config = LLAMA_2[size]
    assert sum(math.prod(shape) for shape in tensor_shapes(config).values()) == config.n_parameters


def test_a_tied_head_has_no_tensor_of_its_own():
    assert set(tensor_shapes(TINY)) - set(tensor_shapes(TIED)) == {LM_HEAD}
    assert sum(math.prod(shape) for shape in tensor_shapes(TIED).values()) == TIED.n_parameters


@pytest.mark.parametrize("case", ["mha", "gqa", "mqa", "tied"])
def test_names_and_shapes_are_those_that_transformers_writes(case):
    directory = FIXTURES / "hf" / case
    tensors = safetensors.numpy.load_file(directory / SINGLE)
    shapes = tensor_shapes(LlamaConfig.from_directory(directory))
    assert {name: array.shape for name, array in tensors.items()} == shapes


# -- loading


@pytest.mark.parametrize("stored", DTYPES)
def test_every_tensor_arrives_where_it_belongs_as_it_was_stored(tmp_path, ops, to_host, stored):
    tensors = random_tensors(TINY, seed=3, dtype=stored)
    checkpoint = Checkpoint(write_model(tmp_path, TINY, tensors=tensors), TINY)
    assert checkpoint.storage_dtype == DTYPES[stored]
    arrays = by_name(checkpoint.parameters(ops))
    assert set(arrays) == set(tensors)
    for name, array in arrays.items():
        expected = tensors[name]
        if expected.ndim == 1:
            expected = expected.astype("float32")
        got = to_host(array)
        assert got.dtype == expected.dtype and np.array_equal(got, expected), name


def test_the_layers_norms_follow_the_configs_eps(tmp_path, ops):
    config = LlamaConfig(**{**vars(TINY), "norm_eps": 3e-4})
    parameters = load(write_model(tmp_path, config), ops, config)
    assert {part.norm_eps for part in (*parameters.layers, parameters.head)} == {3e-4}


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("shards", [2, 5])
def test_a_sharded_model_is_the_same_as_one_file(tmp_path, ops, to_host, stored, shards):
    single = load(write_model(tmp_path / "one", TINY, 1, stored), ops)
    sharded = load(write_model(tmp_path / "some", TINY, 1, stored, shards=shards), ops)
    assert len(list((tmp_path / "some").glob("*.safetensors"))) == shards
    expected = by_name(single)
    for name, array in by_name(sharded).items():
        got = to_host(array)
        assert got.dtype == to_host(expected[name]).dtype
        assert np.array_equal(got, to_host(expected[name])), name
    assert single.nbytes == sharded.nbytes


def test_one_file_goes_before_an_index(tmp_path):
    write_model(tmp_path, TINY, seed=1, shards=2)
    expected = random_tensors(TINY, seed=2)
    write_model(tmp_path, TINY, tensors=expected)
    arrays = by_name(load(tmp_path, make_ops("numpy")))
    assert np.array_equal(arrays[NORM], expected[NORM])


def test_shards_may_be_links_as_in_hugging_faces_cache(tmp_path):
    blobs = write_model(tmp_path / "blobs", TINY, shards=2)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    expected = by_name(load(blobs, make_ops("numpy")))
    for name, array in by_name(load(snapshot, make_ops("numpy"))).items():
        assert np.array_equal(array, expected[name])


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("asked", DTYPES)
def test_matrices_are_converted_where_asked_and_norms_never(tmp_path, ops, to_host, stored, asked):
    tensors = random_tensors(TINY, dtype=stored)
    checkpoint = Checkpoint(write_model(tmp_path, TINY, tensors=tensors), TINY, asked)
    assert checkpoint.storage_dtype == DTYPES[asked]
    for name, array in by_name(checkpoint.parameters(ops)).items():
        expected = tensors[name].astype("float32" if tensors[name].ndim == 1 else DTYPES[asked])
        got = to_host(array)
        assert got.dtype == expected.dtype and np.array_equal(got, expected), name


def test_a_file_of_several_dtypes_keeps_them(tmp_path, ops, to_host):
    tensors = random_tensors(TINY)
    tensors[LM_HEAD] = tensors[LM_HEAD].astype("float16")
    tensors[layer_name(1, "wk")] = tensors[layer_name(1, "wk")].astype(ml_dtypes.bfloat16)
    checkpoint = Checkpoint(write_model(tmp_path, TINY, tensors=tensors), TINY)
    parameters = checkpoint.parameters(ops)
    assert to_host(parameters.head.lm_head.values).dtype == np.float16
    assert to_host(parameters.layers[1].wk.values).dtype == ml_dtypes.bfloat16
    assert to_host(parameters.layers[0].wk.values).dtype == np.float32
    assert checkpoint.nbytes == parameters.nbytes


@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("asked", [None, *DTYPES])
def test_the_bytes_foretold_are_the_bytes_loaded(tmp_path, ops, config, stored, asked):
    checkpoint = Checkpoint(write_model(tmp_path, config, dtype=stored), config, asked)
    norms = (2 * config.n_layers + 1) * config.dim
    matrices = config.n_parameters - norms
    expected = 4 * norms + np.dtype(DTYPES[asked or stored]).itemsize * matrices
    assert checkpoint.nbytes == checkpoint.parameters(ops).nbytes == expected


# -- tied heads


@pytest.mark.parametrize("asked", [None, "bfloat16"])
@pytest.mark.parametrize("stored_too", [False, True])
def test_a_tied_head_is_the_embedding_itself(tmp_path, ops, stored_too, asked):
    tensors = random_tensors(TIED)
    if stored_too:
        tensors[LM_HEAD] = tensors[EMBEDDING].copy()
    directory = write_model(tmp_path, TIED, tensors=tensors)
    parameters = load(directory, ops, TIED, asked)
    assert parameters.head.lm_head.values is parameters.embedding.values
    assert Checkpoint(directory, TIED, asked).nbytes == parameters.nbytes


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_tied_head_that_differs_from_the_embedding_is_refused(tmp_path, dtype):
    tensors = random_tensors(TIED)
    tensors[LM_HEAD] = tensors[EMBEDDING].astype(dtype)
    tensors[LM_HEAD][3, 5] += 1
    assert LM_HEAD in refused(write_model(tmp_path, TIED, tensors=tensors), TIED)


def test_a_tied_head_of_another_shape_is_refused(tmp_path):
    tensors = random_tensors(TIED)
    tensors[LM_HEAD] = tensors[EMBEDDING][1:]
    assert LM_HEAD in refused(write_model(tmp_path, TIED, tensors=tensors), TIED)


def test_a_head_that_is_missing_but_not_tied_is_refused_with_a_hint(tmp_path):
    tensors = random_tensors(TINY)
    del tensors[LM_HEAD]
    message = refused(write_model(tmp_path, TINY, tensors=tensors))
    assert f"tensor {LM_HEAD} is missing" in message and "tie_word_embeddings" in message


# -- the memory map


@pytest.fixture
def is_large(monkeypatch):
    """Treats a model of any size as large, so nothing is copied."""
    monkeypatch.setattr(npllama.weights, "JOINED_NBYTES", 0)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_on_the_cpu_matrices_are_views_of_the_file(tmp_path, stored, shards, is_large):
    directory = write_model(tmp_path, TINY, dtype=stored, shards=shards)
    for asked in (None, stored):
        parameters = load(directory, make_ops("numpy"), dtype=asked)
        arrays = by_name(parameters)
        matrices = [array for array in arrays.values() if array.ndim == 2]
        assert len(matrices) == 2 + 7 * TINY.n_layers
        assert all(lies_in_a_memory_map(array) for array in matrices)


BIG = LlamaConfig(256, 6, 4, 4, 512, 400)
LARGEST = 4 * 512 * 256  # bytes of a float32 feed-forward matrix


def bytes_allocated(function):
    """The peak of allocated bytes, and the result."""
    tracemalloc.start()
    try:
        result = function()
        return tracemalloc.get_traced_memory()[1], result
    finally:
        tracemalloc.stop()


def test_loading_as_stored_allocates_less_than_one_matrix(tmp_path, is_large):
    directory = write_model(tmp_path, BIG)
    ops = make_ops("numpy")
    peak, parameters = bytes_allocated(lambda: load(directory, ops, BIG))
    assert peak < LARGEST < parameters.nbytes / 10


@pytest.mark.parametrize("asked", ["float16", "bfloat16"])
def test_converting_allocates_the_result_and_little_more_than_one_matrix(tmp_path, asked):
    directory = write_model(tmp_path, BIG)
    ops = make_ops("numpy")
    peak, parameters = bytes_allocated(lambda: load(directory, ops, BIG, asked))
    assert peak < parameters.nbytes + 2 * LARGEST
    assert peak < 8 * LARGEST or not can_work()  # one layer at a time, then shared with workers


# -- joined matrices


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_small_model_is_joined_while_loading_and_computes_as_a_converted_one(
    tmp_path, stored, n_threads, rng, monkeypatch
):
    monkeypatch.setattr(shared_products, "SHARED_SIZE", 1000)
    monkeypatch.setattr(shared_products, "SHARED_SMALL_SIZE", 1000)
    monkeypatch.setattr(shared_products.SharedProducts, "begin", lambda self: False)
    config = TINY
    apart = write_model(tmp_path / "apart", config, dtype=stored)
    assert convert.main([str(apart), str(tmp_path / "side by side")]) == 0
    logits = []
    for directory in (apart, tmp_path / "side by side"):
        ops = NumpyOps(Backend(threads=Threads(n_threads)))
        parameters = load(directory, ops, config)
        for layer in parameters.layers:
            for name, weights in PRODUCTS.items():
                if len(weights) == 1:
                    continue
                whole = getattr(layer, name).values
                parts = [getattr(layer, weight.field).values for weight in weights]
                assert all(np.shares_memory(part, whole) for part in parts)
                assert np.array_equal(np.concatenate(parts), whole)
            is_copied = directory is apart  # q, k and v only; gate and up are contiguous
            assert isinstance(memory_of(layer.qkv.values), MappedFile) != is_copied
            assert isinstance(memory_of(layer.gate_up.values), MappedFile)
            if can_work() and n_threads == 2:
                assert location_of(layer.qkv.values) is not None
        llama = Llama(config, parameters, ops)
        logits.append(llama.logits([1, 5, 7]))
    assert np.array_equal(*logits)


def test_matrices_of_two_dtypes_stay_apart(tmp_path):
    tensors = random_tensors(TINY)
    tensors[layer_name(1, "wk")] = tensors[layer_name(1, "wk")].astype("float16")
    first, second = load(write_model(tmp_path, TINY, tensors=tensors), make_ops("numpy")).layers
    assert first.qkv is not None and second.qkv is None
    assert second.wk.values.dtype == np.float16


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_weights_live_no_longer_than_their_model(dtype, monkeypatch):
    monkeypatch.setattr(shared_products, "SHARED_SIZE", 1000)
    monkeypatch.setattr(shared_products, "SHARED_SMALL_SIZE", 1000)
    monkeypatch.setattr(shared_products, "CACHED_SIZE", 1000)
    ops = make_ops("numpy")
    first, second = (make_llama(ops, seed=seed, dtype=dtype) for seed in (0, 1))
    want = second.logits([1, 5])
    first.logits([1, 5])
    parts = (first.parameters.embedding, *first.parameters.layers, first.parameters.head)
    dead = [weakref.ref(array) for part in parts for array in part.arrays()]
    dead += [weakref.ref(w.values) for w in (first.parameters.layers[0].qkv,)]
    dead += [weakref.ref(memory_of(array())) for array in dead]
    workers = ops.shared.workers
    assert (workers is not None) == can_work()
    del first, parts
    gc.collect()
    assert not [ref for ref in dead if ref() is not None]
    assert np.abs(second.logits([1, 5]) - want).max() <= 1e-5 * np.abs(want).max()
    if workers is not None:  # the workers that map the first model's memory have ended
        assert ops.shared.workers is not workers and all(p.poll() for p in workers._processes)
        ops.shared.workers.close()


def test_a_part_that_is_changed_has_nothing_left_of_what_was_derived(rng):
    layer = make_llama(make_ops("numpy")).parameters.layers[0]
    assert layer.qkv is not None
    for changed in (replace(layer, wq=layer.wk), layer.map(np.copy)):
        assert changed.qkv is None and changed.gate_up is None
    assert layer.map(lambda array: array) is layer


# -- lossy conversion


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [EMBEDDING, layer_name(1, "w_down"), LM_HEAD])
@pytest.mark.parametrize("value", [70000, -70000])
def test_a_value_beyond_float16_is_refused_by_its_tensor(tmp_path, stored, name, value):
    tensors = random_tensors(TINY, dtype=stored)
    tensors[name][2, 3] = value
    directory = write_model(tmp_path, TINY, tensors=tensors)
    message = refused(directory, dtype="float16")
    assert f"tensor {name} " in message and "65504" in message and "bfloat16" in message
    for fitting in (None, "float32", "bfloat16"):
        load(directory, make_ops("numpy"), dtype=fitting)


@pytest.mark.parametrize("value", [65504, -65504, 65519])  # 65519 is rounded down
def test_the_largest_float16_is_not_refused(tmp_path, value):
    tensors = random_tensors(TINY)
    tensors[LM_HEAD][2, 3] = value
    tensors[NORM][0] = 1e9  # norms are always float32
    parameters = load(
        write_model(tmp_path, TINY, tensors=tensors), make_ops("numpy"), dtype="float16"
    )
    assert abs(parameters.head.lm_head.values[2, 3]) == 65504
    assert parameters.head.norm[0] == 1e9


# -- missing, surplus and misshapen tensors


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("name", [EMBEDDING, NORM, *(w.hf_name(1) for w in OF_LAYER)])
def test_a_missing_tensor_is_named(tmp_path, name, shards):
    tensors = random_tensors(TINY)
    del tensors[name]
    message = refused(write_model(tmp_path, TINY, tensors=tensors, shards=shards))
    assert f"tensor {name} is missing" in message and "21 tensors" in message
    assert "tie_word_embeddings" not in message


def test_many_missing_tensors_are_counted(tmp_path):
    config = LlamaConfig(**{**vars(TINY), "n_layers": 3})
    message = refused(write_model(tmp_path, TINY), config)
    assert f"tensors {layer_name(2, 'attention_norm')}, " in message
    assert "and 6 more are missing" in message


def test_a_directory_whose_file_holds_nothing_is_refused(tmp_path):
    assert "missing" in refused(write_model(tmp_path, TINY, tensors={}))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.mlp.gate_proj.weight_scale",
        "model.layers.2.input_layernorm.weight",
        "model.layers.0.inv_freq",
        "inv_freq",
        "",
        "model.layers.00.input_layernorm.weight",
        "two\nlines",
    ],
)
def test_a_surplus_tensor_is_named(tmp_path, name):
    tensors = random_tensors(TINY) | {name: np.ones(4, dtype="float32")}
    message = refused(write_model(tmp_path, TINY, tensors=tensors))
    assert (name.splitlines() or ["tensor"])[0] in message
    assert "not part of the model" in message and "21 tensors" in message


def test_more_layers_than_the_config_says_are_refused(tmp_path):
    config = LlamaConfig(**{**vars(TINY), "n_layers": 1})
    message = refused(write_model(tmp_path, TINY), config)
    assert "tensors model.layers.1." in message and "and 6 more are not part" in message


@pytest.mark.parametrize("dtype", [*DTYPES.values(), "float64", "int64"])
def test_the_rotary_tables_of_older_files_are_skipped(tmp_path, dtype):
    tensors = random_tensors(TINY)
    tables = {name: np.ones(4, dtype=dtype) for name in ROTARY_TABLES}
    plain = Checkpoint(write_model(tmp_path / "plain", TINY, tensors=tensors), TINY)
    older = Checkpoint(write_model(tmp_path / "older", TINY, tensors=tensors | tables), TINY)
    assert plain.nbytes == older.nbytes
    arrays = by_name(older.parameters(make_ops("numpy")))
    assert all(np.array_equal(arrays[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (EMBEDDING, lambda a: a[:-1]),
        (EMBEDDING, lambda a: np.ascontiguousarray(a.T)),
        (NORM, lambda a: a[None]),
        (NORM, lambda a: a[0]),
        (LM_HEAD, lambda a: np.concatenate([a, a[:1]])),
        (layer_name(0, "wq"), lambda a: a.reshape(-1)),
        (layer_name(1, "wk"), lambda a: np.ascontiguousarray(a.T)),
        (layer_name(1, "wv"), lambda a: np.concatenate([a, a])),
        (layer_name(0, "w_down"), lambda a: np.ascontiguousarray(a.T)),
        (layer_name(0, "ffn_norm"), lambda a: a[:0]),
    ],
)
def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path, name, change):
    tensors = random_tensors(TINY)
    wanted = list(tensors[name].shape)
    tensors[name] = np.asarray(change(tensors[name]))
    message = refused(write_model(tmp_path, TINY, tensors=tensors))
    assert f"tensor {name} has shape {list(tensors[name].shape)}" in message
    assert f"asks for {wanted}" in message


@pytest.mark.parametrize(
    ("changes", "name", "found", "wanted"),
    [
        ({"vocab_size": 270}, EMBEDDING, [260, 48], [270, 48]),
        ({"dim": 60}, EMBEDDING, [260, 48], [260, 60]),
        ({"n_kv_heads": 6}, layer_name(0, "wk"), [24, 48], [48, 48]),
        ({"n_heads": 3}, layer_name(0, "wk"), [24, 48], [48, 48]),
        ({"ffn_dim": 64}, layer_name(0, "w_gate"), [56, 48], [64, 48]),
        ({"head_dim": 10}, layer_name(0, "wq"), [48, 48], [60, 48]),
    ],
)
def test_a_config_of_another_model_shows_in_the_shapes(tmp_path, changes, name, found, wanted):
    config = LlamaConfig(**{**vars(TINY), "head_dim": None, **changes})
    message = refused(write_model(tmp_path, TINY), config)
    assert f"tensor {name} has shape {found}" in message and f"asks for {wanted}" in message


# -- truncated and damaged files


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1, -1000])
def test_a_truncated_file_is_named(tmp_path, shards, kept):
    write_model(tmp_path, TINY, shards=shards)
    path = sorted(tmp_path.glob("*.safetensors"))[-1]
    content = path.read_bytes()[:kept]
    path.write_bytes(content)
    message = refused(tmp_path)
    assert path.name in message and "truncated" in message and str(len(content)) in message


@pytest.mark.parametrize("shards", [1, 2])
def test_a_truncated_tensor_is_refused(tmp_path, shards):
    write_model(tmp_path, TINY, shards=shards)
    path = sorted(tmp_path.glob("*.safetensors"))[0]
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    for name in (layer_name(0, "wq"), layer_name(1, "wo")):
        if name in header:
            end = begin + header[name]["data_offsets"][1] - 1
            path.write_bytes(content[:end])
            message = refused(tmp_path)
            assert path.name in message and f"it has {end} bytes" in message
            assert "file not fully covered" in message


def test_an_unusable_dtype_is_named(tmp_path):
    tensors = random_tensors(TINY)
    tensors[NORM] = tensors[NORM].astype("float64")
    message = refused(write_model(tmp_path, TINY, tensors=tensors))
    assert SINGLE in message and NORM in message and "F64" in message


# -- directories and indices


def test_a_directory_without_weights_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    for directory in (tmp_path, tmp_path / "nowhere", tmp_path / "pytorch_model.bin"):
        message = refused(directory)
        assert SINGLE in message and INDEX in message and "convert" in message


@pytest.mark.parametrize(
    "shard",
    [
        "../outside/model.safetensors",
        "./model-1.safetensors",
        "inside/model.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "/",
        None,
        1,
        ["model-1.safetensors"],
        "model-1.safetensors/",
        "model-1.safetensors\0",
        "model-1\n.safetensors",
        "\ud800.safetensors",
        "no-such-file.safetensors",
        pytest.param("x" * 300, id="a name too long for the file system"),
    ],
    ids=ascii,
)
def test_an_index_names_files_of_its_own_directory_and_nothing_else(tmp_path, shard):
    model = write_model(tmp_path / "model", TINY)
    for folder in ("outside", "model/inside"):
        write_model(tmp_path / folder, TINY)
    (model / SINGLE).rename(model / "model-1.safetensors")
    weight_map = dict.fromkeys(tensor_shapes(TINY), "model-1.safetensors")
    write_index(model, weight_map)
    load(model, make_ops("numpy"))
    for changed in (dict.fromkeys(weight_map, shard), weight_map | {NORM: shard}):
        write_index(model, changed)
        message = refused(model)
        assert "weight_map does not name a file for each tensor" in message or "missing" in message


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": None}, {"weight_map": []}, {"weight_map": "model.safetensors"}]
)
def test_an_index_without_a_weight_map_is_refused(tmp_path, index):
    (tmp_path / INDEX).write_text(json.dumps(index))
    message = refused(tmp_path)
    assert INDEX in message and "weight_map" in message


def test_an_index_of_nothing_is_refused(tmp_path):
    write_index(tmp_path, {})
    assert "missing" in refused(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\ufeff{}"], ids=range(5))
def test_a_damaged_index_is_refused(tmp_path, text):
    (tmp_path / INDEX).write_text(text, encoding="utf-8")
    assert INDEX in refused(tmp_path, error=NpllamaError)


def test_a_missing_shard_is_named(tmp_path):
    write_model(tmp_path, TINY, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    message = refused(tmp_path)
    assert "model-00002-of-00003.safetensors is missing" in message and INDEX in message


def test_a_tensor_that_its_shard_lacks_is_named_with_the_shard(tmp_path):
    write_model(tmp_path, TINY, shards=2)
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    other = (set(weight_map.values()) - {weight_map[NORM]}).pop()
    write_index(tmp_path, weight_map | {NORM: other})
    message = refused(tmp_path)
    assert NORM in message and other in message and INDEX in message


@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
def test_an_index_may_name_what_no_shard_holds_and_no_model_needs(tmp_path, config):
    write_model(tmp_path, config, shards=2)
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    first = min(weight_map.values())
    surplus = dict.fromkeys(ROTARY_TABLES, first)
    surplus[ROTARY_TABLES[0]] = "model-00003-of-00002.safetensors"  # does not exist
    if config.tie_embeddings:
        surplus[LM_HEAD] = first
    expected = by_name(load(tmp_path, make_ops("numpy"), config))
    write_index(tmp_path, weight_map | surplus)
    arrays = by_name(load(tmp_path, make_ops("numpy"), config))
    assert all(np.array_equal(arrays[name], expected[name]) for name in expected)
    write_index(tmp_path, weight_map | {"model.layers.0.self_attn.q_proj.bias": first})
    assert "q_proj.bias, which" in refused(tmp_path, config)


def test_a_tensor_in_two_shards_is_refused_by_name(tmp_path):
    write_model(tmp_path, TINY, shards=2)
    path = tmp_path / "model-00001-of-00002.safetensors"
    first = safetensors.numpy.load_file(path)
    second = safetensors.numpy.load_file(tmp_path / "model-00002-of-00002.safetensors")
    name = min(second)
    safetensors.numpy.save_file({**first, name: second[name]}, path)
    message = refused(tmp_path)
    assert "more than one shard" in message and name in message


def test_a_surplus_tensor_in_a_shard_is_refused_though_the_index_does_not_know_it(tmp_path):
    write_model(tmp_path, TINY, shards=2)
    path = tmp_path / "model-00001-of-00002.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({**tensors, "surplus": np.ones(3, dtype="float32")}, path)
    assert "tensor surplus is not part" in refused(tmp_path)


@pytest.mark.parametrize("shards", [1, 2])
def test_no_flipped_bytes_raise_anything_else(tmp_path, rng, shards):
    model = write_model(tmp_path / "model", TIED, shards=shards)
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    names = ["model.safetensors"] if shards == 1 else [INDEX, "model-00001-of-00002.safetensors"]
    ops = make_ops("numpy")
    survived = 0
    for i in range(300):
        name = names[i % len(names)]
        content = bytearray((model / name).read_bytes())
        for position in rng.integers(0, min(len(content), 2500), 2):
            content[position] = rng.integers(256)
        (damaged / name).write_bytes(content)
        try:
            load(damaged, ops, TIED)
            survived += 1
        except NpllamaError as error:
            assert len(str(error).splitlines()) == 1
        (damaged / name).write_bytes((model / name).read_bytes())
    assert survived < 150


def test_layers_beyond_what_the_files_hold_are_refused_before_they_are_counted(tmp_path):
    write_model(tmp_path, TINY)
    config = replace(TINY, n_layers=10**9)
    with pytest.raises(WeightsError, match="describes 1000000000 layers, but the files hold"):
        Checkpoint(tmp_path, config)
