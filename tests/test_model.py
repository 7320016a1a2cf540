"""The transformer: the results do not depend on the cache, on ragged rows or on chunks."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

from conftest import TINY, make_llama, make_ops
from model_directory import write_model
from npllama import load
from npllama.config import LlamaConfig
from npllama.errors import InputError, OutOfMemoryError
from npllama.llama import Llama
from npllama.ops import CupyOps, NumpyOps
from npllama.weight_table import OF_LAYER

F16 = np.dtype("float16")
CLOSE = 1e-5  # relative to the largest logit
IDS = [1, 100, 7, 259, 3, 42, 42, 8, 200, 11, 12]


def assert_same(got, want):
    """Logits agree within CLOSE. Greedy choices agree unless two logits are nearly equal."""
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= CLOSE * np.abs(want).max()
    second, first = np.sort(want, axis=-1)[..., -2:].reshape(-1, 2).T
    clear = first - second > 2 * CLOSE * np.abs(want).max()
    chosen, wanted = (a.argmax(-1).reshape(-1) for a in (got, want))
    assert clear.any()
    assert np.array_equal(chosen[clear], wanted[clear])


def test_decoding_with_the_cache_equals_recomputing_from_scratch(llama, to_device, to_host):
    cache = llama.new_cache()
    for n in range(1, len(IDS) + 1):
        token = to_device(np.array([[IDS[n - 1]]], dtype="int32"))
        step = to_host(llama.forward(token, cache))[0, 0]
        assert_same(step, llama.logits(IDS[:n])[-1])


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 11, 100])
def test_any_chunk_size_equals_any_other(llama, to_host, chunk):
    cache = llama.new_cache()
    got = to_host(llama.prefill(IDS, cache, chunk=chunk))
    assert_same(got[0], llama.logits(IDS)[-1])
    assert cache.lengths == [len(IDS)]


def test_logits_span_several_chunks(ops, monkeypatch):
    monkeypatch.setattr(ops, "prefill_chunk", lambda: 4)
    in_chunks = make_llama(ops).logits(IDS)
    monkeypatch.undo()
    assert_same(in_chunks, make_llama(ops).logits(IDS))


def test_rows_of_different_lengths_equal_each_row_alone(llama, to_device, to_host):
    prompts = [IDS[:1], IDS[:7], IDS[2:6]]
    cache = llama.new_cache(batch=3)
    for row, prompt in enumerate(prompts):
        assert_same(to_host(llama.prefill(prompt, cache, row))[0], llama.logits(prompt)[-1])
    for token in (9, 30):
        prompts = [[*prompt, token] for prompt in prompts]
        together = to_host(llama.forward(to_device(np.full((3, 1), token)), cache))
        for row, prompt in enumerate(prompts):
            assert_same(together[row, 0], llama.logits(prompt)[-1])


def test_some_rows_of_a_batch_may_go_on_without_the_others(llama, to_device, to_host):
    cache = llama.new_cache(batch=3)
    for row, prompt in enumerate((IDS[:3], IDS[:5], IDS[:2])):
        llama.prefill(prompt, cache, row)
    together = to_host(llama.forward(to_device(np.array([[9], [8]])), cache, (2, 0)))
    assert_same(together[0, 0], llama.logits([*IDS[:2], 9])[-1])
    assert_same(together[1, 0], llama.logits([*IDS[:3], 8])[-1])
    assert cache.lengths == [4, 5, 3]


def test_a_batch_may_take_several_tokens_at_different_positions(llama, to_device, to_host):
    cache = llama.new_cache(batch=2)
    llama.prefill(IDS[:4], cache, row=1)
    logits = to_host(llama.forward(to_device(np.array([IDS[:3], IDS[4:7]])), cache, n_last=3))
    assert_same(logits[0], llama.logits(IDS[:3]))
    assert_same(logits[1], llama.logits(IDS[:7])[4:])


def test_the_last_layer_and_the_head_run_on_the_last_positions_alone(
    llama, to_device, to_host, monkeypatch
):
    seen = []
    for name in ("feed_forward", "head"):
        method = getattr(llama.ops, name)
        monkeypatch.setattr(
            llama.ops,
            name,
            lambda x, p, name=name, method=method: seen.append((name, x.shape[1])) or method(x, p),
        )
    tokens = to_device(np.array([IDS[:5]]))
    logits = {n: to_host(llama.forward(tokens, llama.new_cache(), n_last=n)) for n in (1, 3, 5, 0)}
    n_layers = TINY.n_layers
    assert seen == [
        *[("feed_forward", 5)] * (n_layers - 1), ("feed_forward", 1), ("head", 1),
        *[("feed_forward", 5)] * (n_layers - 1), ("feed_forward", 3), ("head", 3),
        *[("feed_forward", 5)] * n_layers, ("head", 5),
        *[("feed_forward", 5)] * (n_layers - 1), ("feed_forward", 1),  # 1, not 0: no empty arrays
    ]  # fmt: skip
    assert [x.shape for x in logits.values()] == [(1, n, TINY.vocab_size) for n in (1, 3, 5, 0)]
    for n in (1, 3):
        assert_same(logits[n], logits[5][:, -n:])


@pytest.mark.parametrize("n_last", [-1, 6])
def test_more_last_positions_than_there_are_are_refused(llama, to_device, n_last):
    cache = llama.new_cache()
    with pytest.raises(InputError, match=rf"n_last is {n_last}: expected 0 to the 5"):
        llama.forward(to_device(np.array([IDS[:5]])), cache, n_last=n_last)
    assert cache.lengths == [0]


def test_prefill_memory_grows_with_the_context_not_its_square():
    """Only the scores of one chunk are in memory, so twice the context needs about twice the
    memory."""
    import tracemalloc

    from npllama.initialization import random_parameters

    ops = make_ops("numpy")
    config = LlamaConfig(32, 1, 4, 2, 32, 64, context_length=8192)
    llama = Llama(config, random_parameters(config, ops), ops)

    def peak(n):
        cache = llama.new_cache(context=n)
        tracemalloc.start()
        llama.prefill([5] * n, cache, chunk=64)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    largest = peak(8192)
    assert largest < 3 * peak(2048) + 1_000_000
    assert largest < 8192 * 8192  # in bytes: far less than the square of the context


def test_logits_are_a_float32_numpy_array(llama):
    logits = llama.logits([1])
    assert type(logits) is np.ndarray
    assert logits.dtype == np.float32
    assert logits.shape == (1, TINY.vocab_size)


def test_trace_shows_every_layer(llama):
    trace = llama.trace(IDS)
    n = len(IDS)
    assert trace.hidden.shape == (TINY.n_layers + 1, n, TINY.dim)
    assert trace.attention.shape == (TINY.n_layers, TINY.n_heads, n, n)
    assert np.abs(trace.attention.sum(-1) - 1).max() < 1e-6
    assert not np.triu(trace.attention, k=1).any()
    embedding = llama.backend.to_host(llama.parameters.embedding.values)
    assert np.array_equal(trace.hidden[0], embedding[IDS])
    assert_same(trace.hidden[:, :4], llama.trace(IDS[:4]).hidden)


def test_tied_embeddings_share_one_matrix(ops):
    config = LlamaConfig(**{**vars(TINY), "tie_embeddings": True})
    llama = make_llama(ops, config)
    assert llama.parameters.nbytes == 4 * config.n_parameters
    assert llama.bytes_per_forward == llama.parameters.nbytes
    untied = make_llama(ops)
    assert untied.bytes_per_forward == untied.parameters.nbytes - 4 * 260 * TINY.dim


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_compute_as_their_float32_values(ops, dtype):
    import ml_dtypes  # registers bfloat16

    if isinstance(ops, CupyOps):
        pytest.skip("CupyOps multiplies in 16 bits; test_conformance and test_overrides bound it")
    storage = {"bfloat16": ml_dtypes.bfloat16, "float16": "float16"}[dtype]
    narrow = make_llama(ops, dtype=storage)

    def widen(array):
        return ops.backend.to_device(ops.backend.to_host(array).astype("float32"))

    parameters = narrow.parameters
    from npllama.parameters import Parameters

    wide = Parameters(
        parameters.embedding.map(widen),
        tuple(layer.map(widen) for layer in parameters.layers),
        parameters.head.map(widen),
    )
    assert_same(narrow.logits(IDS), Llama(TINY, wide, ops).logits(IDS))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "no token ids"),
        ([1, -1], "token id -1 at position 1 is outside the vocabulary of 260"),
        ([260], "token id 260 at position 0"),
        ([1.0], "1.0 at position 0 is not an integer"),
        ([True], "not an integer"),
        ([1] * 65, "65 tokens do not fit the context of 64"),
    ],
)
def test_bad_ids_are_refused_on_the_host(llama, ids, message):
    for call in (llama.logits, llama.trace, llama.generate):
        with pytest.raises(InputError, match=message):
            call(ids)


# -- sizes of a shard


def half_of(parameters, i):
    """Half of the heads and of the ffn width of each layer. Embedding, norms and head are not
    split."""

    def half(w, axis):
        n = w.shape[axis] // 2
        return w[i * n : (i + 1) * n] if axis == 0 else w[:, i * n : (i + 1) * n]

    layers = []
    for layer in parameters.layers:
        halves = {
            weight.field: getattr(layer, weight.field).map(
                lambda w, axis=weight.split: half(w, axis)
            )
            for weight in OF_LAYER
            if weight.split is not None
        }
        layers.append(replace(layer, **halves))
    return replace(parameters, layers=tuple(layers))


@pytest.mark.parametrize("where", ["numpy", "strict"])
def test_two_shards_are_the_model_with_nothing_but_all_reduce_between_them(where):
    """Each shard has the config of the whole model, and takes its numbers of heads from its
    weights."""
    config = LlamaConfig(20, 2, 4, 2, 12, 260, 64, head_dim=6)
    whole = make_llama(make_ops(where), config)
    together, partial = threading.Barrier(2, timeout=20), [None, None]

    def run(i):
        ops = make_ops(where)

        def all_reduce(x):
            partial[i] = ops.backend.to_host(x).copy()
            together.wait()
            total = partial[0] + partial[1]
            together.wait()  # before the next partial sum overwrites this one
            return ops.backend.to_device(total)

        ops.all_reduce = all_reduce
        ops.forward_context = lambda _n_rows: nullcontext()  # no turns, as in a separate process
        parameters = half_of(whole.parameters, i)
        parameters = replace(parameters, layers=tuple(map(ops.prepare, parameters.layers)))
        llama = Llama(config, parameters, ops)
        assert llama.new_cache(batch=3).layers[0].k.shape == (3, 1, 64, 6)
        return llama.logits(IDS), llama.trace(IDS).attention

    with ThreadPoolExecutor(2) as pool:
        shards = list(pool.map(run, range(2)))
    truth = whole.logits(IDS)
    for logits, attention in shards:
        assert_same(logits, truth)
        assert attention.shape == (2, 2, len(IDS), len(IDS))
    attention = np.concatenate([attention for _, attention in shards], axis=1)
    assert np.abs(attention - whole.trace(IDS).attention).max() < CLOSE


def test_the_memory_of_a_shard_is_that_of_its_own_cache(monkeypatch):
    whole = make_llama(make_ops("numpy"), LlamaConfig(24, 2, 4, 2, 12, 260, 64))
    half = Llama(whole.config, half_of(whole.parameters, 0), whole.ops)
    monkeypatch.setattr(whole.ops, "attention_nbytes", lambda *_: 0)
    needed = []
    for llama in (whole, half):
        with monkeypatch.context() as patch:
            patch.setattr(llama.backend, "free_bytes", lambda: 0)
            with pytest.raises(OutOfMemoryError) as caught:
                llama.check_memory(10_000, 64)
        needed.append(float(re.search(r"cache (\S+) GB", str(caught.value))[1]))
    assert needed == [0.12, 0.06]  # 2 * 2 * 10,000 * K * 64 * 6 * 4 bytes, K 2 and 1


# -- the cache's dtype


def test_the_dtype_of_the_cache_is_decided_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(NumpyOps, "cache_dtype", lambda _ops, dtype: asked.append(dtype) or F16)
    llama = load(write_model(tmp_path, TINY), "numpy")
    assert llama.new_cache().layers[0].k.dtype == llama.cache_dtype == F16
    llama.generate([1, 5], max_new_tokens=2)
    llama.logits(IDS)
    assert asked == [np.float32]


def test_a_cache_may_be_narrower_than_the_computation(ops, to_host):
    wide = make_llama(ops)
    narrow = Llama(TINY, wide.parameters, ops, cache_dtype="float16")
    cache = narrow.new_cache()
    got = to_host(narrow.prefill(IDS, cache, chunk=4))[0]
    assert cache.layers[0].k.dtype == cache.layers[0].v.dtype == F16
    assert got.dtype == np.float32
    truth = wide.logits(IDS)[-1]
    assert 0 < np.abs(got - truth).max() <= 2e-3 * np.abs(truth).max()
