"""The decode step, captured and replayed on the CuPy for tests."""

import gc
import logging
import math
import weakref
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from conftest import TINY, make_llama
from cuda_simulator import compiler
from model_directory import write_model
from npllama.backend import Backend
from npllama.config import LlamaConfig
from npllama.errors import InputError, OutOfMemoryError
from npllama.generate import main
from npllama.ops import CupyOps, NumpyOps, Ops, ops_for
from npllama.sampling_options import Sampling
from strict_cupy import DEVICE, StrictCupyBackend
from strict_memory import MemoryPool
from strict_streams import Graph

GREEDY = Sampling(0)
LIVELY = Sampling(1.0, 20, 0.95, 0.01, 1.2)
PROMPTS = [[1, 5, 6, 7], [1, 8], list(range(3, 20))]
OPTIONS = {"max_new_tokens": 12, "sampling": LIVELY, "seed": 7, "ignore_eos": True}


class SumOps(CupyOps):
    """CupyOps without kernels and cuBLAS. Products are elementwise products and sums, which a graph
    can contain."""

    attention_block, feed_forward, head = Ops.attention_block, Ops.feed_forward, Ops.head
    attention, next_token = Ops.attention, Ops.next_token

    def linear(self, x, w):
        y = (x[..., None, :] * w.format.unscaled(w, x.dtype)).sum(axis=-1)  # -> (..., O)
        return w.format.scaled(w, y)

    def cached_attention(self, q, k, v, cache, positions):
        xp, bucket = self.xp, positions.bucket
        if k.shape[1] > 1:
            return super().cached_attention(q, k, v, cache, positions)
        rows, starts = positions.device_rows, positions.device_starts
        cache.k[rows, :, starts] = k[:, 0]
        cache.v[rows, :, starts] = v[:, 0]
        keys, values = (buffer[rows, :, None, :bucket] for buffer in (cache.k, cache.v))
        grouped = q.reshape(len(q), k.shape[2], -1, 1, k.shape[3])  # (B, K, G, 1, C)
        scores = (grouped * keys).sum(axis=-1) / math.sqrt(k.shape[3])  # (B, K, G, N)
        hidden = self.is_hidden(starts[:, None], xp.arange(bucket)[None])
        scores = xp.where(hidden[:, None, None], -math.inf, scores)
        return (self.softmax(scores)[..., None] * values).sum(axis=3).reshape(len(q), 1, -1)


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr("npllama.kv_cache.BUCKET", 16)


@pytest.fixture
def llama():
    return make_llama(SumOps(StrictCupyBackend()))


@pytest.fixture(scope="module")
def on_numpy():
    return make_llama(NumpyOps(Backend()))


def ids_of(completions):
    return [completion.ids for completion in completions]


def warnings_in(caplog):
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


def run(llama, prompts, **options):
    """Generate. Returns the ids, and the compiled step with its counts."""
    before = DEVICE.n_captures
    generation = llama.new_generation(prompts, **OPTIONS | options)
    generation.run()
    assert DEVICE.stream.null and DEVICE.stream.capture is None
    (steps,) = generation._compiled.values()
    assert steps.n_eager + steps.n_replayed == generation.timings.decode_steps
    assert steps.n_captured <= DEVICE.n_captures - before  # some captures may have failed
    return ids_of(generation.completions()), steps


@pytest.mark.parametrize("sampling", [GREEDY, LIVELY], ids=["greedy", "sampled"])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["B1", "B3"])
def test_a_replayed_step_says_what_numpy_says(llama, on_numpy, prompts, sampling):
    options = {"sampling": sampling, "max_new_tokens": 28}  # spans two buckets
    want = ids_of(on_numpy.generate_batch(prompts, **OPTIONS | options))
    before = DEVICE.n_captures
    got, steps = run(llama, prompts, **options)
    assert (got, steps.n_captured, steps.n_eager, steps.n_replayed) == (want, 2, 2, 25)
    assert DEVICE.n_captures == before + 2
    got, steps = run(llama, prompts, **options)  # the next generation replays from its first step
    assert (got, steps.n_captured, steps.n_eager, steps.n_replayed) == (want, 0, 0, 27)
    assert steps.report() == "27 replayed; 0 graphs captured"
    assert DEVICE.n_captures == before + 2


def test_the_likeliest_tokens_are_told_by_a_captured_step(llama, on_numpy):
    def told(completions):
        return [[[t.id for t in top] for top in c.top_logprobs or ()] for c in completions]

    for n_top in (4, 2, 0, 4):  # each n_top needs a separate step
        options = OPTIONS | {"top_logprobs": n_top, "max_new_tokens": 14}
        want = on_numpy.generate_batch(PROMPTS, **options)
        generation = llama.new_generation(PROMPTS, **options)
        generation.run()
        got, (steps,) = generation.completions(), generation._compiled.values()
        assert (ids_of(got), told(got)) == (ids_of(want), told(want))
        assert steps.eager_because is None and steps.n_replayed >= 11
    assert steps.n_captured == 0  # the last one was captured before


def test_without_graphs_each_step_is_launched(on_numpy):
    llama = make_llama(SumOps(StrictCupyBackend(), graph=False))
    got, steps = run(llama, PROMPTS)
    assert got == ids_of(on_numpy.generate_batch(PROMPTS, **OPTIONS))
    assert steps.report() == "11 eager; 0 graphs captured: graphs are off"
    assert not llama._kept_cache.give_up()


def test_a_step_with_a_product_of_cublas_stays_eager(on_numpy):
    llama = make_llama(CupyOps(StrictCupyBackend()))
    for _ in range(2):
        got, steps = run(llama, PROMPTS)
        assert got == ids_of(on_numpy.generate_batch(PROMPTS, **OPTIONS))
        assert (steps.n_eager, steps.n_captured) == (11, 0)
        assert "11 eager; 0 graphs captured: cuBLAS computes a product" in steps.report()


def test_a_smaller_batch_is_captured_though_the_larger_one_was_not(llama, on_numpy, monkeypatch):
    linear = llama.ops.linear

    def as_for_more_rows_than_a_kernel_takes(x, w):
        llama.ops.kernels.cublas.n_calls += x.shape[:2] == (3, 1)
        return linear(x, w)

    monkeypatch.setattr(llama.ops, "linear", as_for_more_rows_than_a_kernel_takes)
    prompts = [[1] * (TINY.context_length - n) for n in (3, 9, 12)]
    got, steps = run(llama, prompts)
    assert got == ids_of(on_numpy.generate_batch(prompts, **OPTIONS))
    assert steps.n_captured > 1 and steps.n_replayed > 3


def test_rows_that_leave_the_batch_leave_the_others_as_they_were(llama, on_numpy):
    prompts = [[1] * (TINY.context_length - n) for n in (12, 4, 9)]
    want = ids_of(on_numpy.generate_batch(prompts, **OPTIONS))
    got, steps = run(llama, prompts)
    assert [len(ids) for ids in got] == [12, 4, 9] and got == want
    assert steps.n_captured == 3  # with three rows, with two and with one
    # the same numbers of rows, but other rows end first
    other = [prompts[1], prompts[2], prompts[0]]
    got, steps = run(llama, other)
    assert got == ids_of(on_numpy.generate_batch(other, **OPTIONS))
    assert steps.n_captured == 0


def test_a_longer_generation_captures_one_bucket_more(llama, on_numpy):
    running = iter(llama.new_generation(PROMPTS[:1], **OPTIONS | {"max_new_tokens": 40}))
    for _ in range(8):
        next(running)
    running.close()
    for n, n_captured in ((8, 0), (20, 1), (20, 0), (8, 0), (36, 1)):
        got, steps = run(llama, PROMPTS[:1], max_new_tokens=n)
        assert steps.n_captured == n_captured, n
        assert got == ids_of(
            on_numpy.generate_batch(PROMPTS[:1], **OPTIONS | {"max_new_tokens": n})
        )


def test_each_way_to_sample_is_captured_once(llama, on_numpy):
    ways = [GREEDY, LIVELY, Sampling(0.5), Sampling(1.5, top_k=9)]  # two of them share a state
    for i, sampling in enumerate(ways * 2):
        got, steps = run(llama, PROMPTS[:1], sampling=sampling, seed=i)
        want = on_numpy.generate_batch(PROMPTS[:1], **OPTIONS | {"sampling": sampling, "seed": i})
        assert (got, steps.n_captured) == (ids_of(want), 1 if i < len(ways) else 0)


def test_the_oldest_graphs_are_forgotten(llama, monkeypatch):
    monkeypatch.setattr("npllama.ops.cuda.graph.MOST_GRAPHS", 2)
    for temperature, n_captured in ((1, 1), (2, 1), (1, 0), (3, 1), (2, 0), (1, 1)):
        _, steps = run(llama, PROMPTS[:1], sampling=Sampling(temperature))
        assert steps.n_captured == n_captured


def test_other_weights_are_captured_anew_and_the_old_ones_freed(llama):
    first, steps = run(llama, PROMPTS[:1])
    old = weakref.ref(llama.parameters)
    other = make_llama(llama.ops, seed=1)
    llama.parameters = other.parameters
    got, steps = run(llama, PROMPTS[:1])
    assert steps.n_captured == 1 and got != first
    assert got == ids_of(other.generate_batch(PROMPTS[:1], **OPTIONS))
    gc.collect()
    assert old() is None


@pytest.mark.parametrize(
    ("option", "report"),
    [
        ([], "8 replayed, 2 eager; 2 graphs captured"),
        (["--no-graph"], "10 eager; 0 graphs captured: graphs are off"),
    ],
)
def test_stats_say_how_the_steps_ran(tmp_path, monkeypatch, capsys, option, report):
    write_model(tmp_path, TINY)
    monkeypatch.setattr("npllama.llama.get_backend", lambda *_: StrictCupyBackend())
    monkeypatch.setattr("npllama.llama.ops_for", SumOps)
    args = ["--model", str(tmp_path), "--prompt", "a tale of", "--max-new-tokens", "11", "--stats"]
    assert main([*args, "--ignore-eos", "--temperature", "0", *option]) == 0
    assert f"decode steps         {report}\n" in capsys.readouterr().err


# -- caches


def test_a_cache_of_the_callers_goes_on_with_its_graphs(llama, on_numpy):
    cache, own = llama.new_cache(batch=3), on_numpy.new_cache(batch=3)
    prompts, n_captured = PROMPTS, []
    for _ in range(3):
        got, steps = run(llama, prompts, cache=cache, max_new_tokens=8)
        assert got == ids_of(
            on_numpy.generate_batch(prompts, **OPTIONS | {"cache": own, "max_new_tokens": 8})
        )
        n_captured.append(steps.n_captured)
        prompts = [p + ids + [9, 11] for p, ids in zip(prompts, got, strict=True)]
    assert n_captured == [1, 1, 0]  # the last one stays in the bucket of the one before
    for row in range(3):
        cache.truncate(row, 1)
        own.truncate(row, 1)
    got, steps = run(llama, PROMPTS, cache=cache, max_new_tokens=20)
    want = on_numpy.generate_batch(PROMPTS, **OPTIONS | {"cache": own, "max_new_tokens": 20})
    assert (got, steps.n_captured) == (ids_of(want), 0)


def test_the_kept_cache_is_emptied(llama, on_numpy):
    """Attention multiplies hidden values by 0, which gives 0 only if they are finite."""
    run(llama, PROMPTS[:1], max_new_tokens=40)
    (cache,) = llama._kept_cache._kept
    for layer in cache.layers:
        layer.v[...] = math.nan
    got, steps = run(llama, PROMPTS[:1], max_new_tokens=30)
    want = on_numpy.generate_batch(PROMPTS[:1], **OPTIONS | {"max_new_tokens": 30})
    assert (got, steps.n_captured) == (ids_of(want), 0)
    assert [*llama._kept_cache._kept] == [cache]


@pytest.mark.parametrize("n_steps", [1, 2, 3, 6])
def test_an_interrupted_generation_leaves_graphs_that_go_on(llama, on_numpy, n_steps):
    want = ids_of(on_numpy.generate_batch(PROMPTS, **OPTIONS))
    for cache in (None, llama.new_cache(batch=3)):
        running = iter(llama.new_generation(PROMPTS, cache=cache, **OPTIONS))
        for _ in range(3 * n_steps):
            next(running)
        running.close()
        if cache is not None:
            for row in range(3):
                cache.truncate(row, min(1, cache.lengths[row]))
        assert run(llama, PROMPTS, cache=cache)[0] == want
        got, steps = run(llama, PROMPTS, cache=llama.new_cache(batch=3) if cache else None)
        assert got == want and (cache is not None or steps.n_captured == 0)


def test_two_generations_at_once_have_a_cache_each(llama, on_numpy):
    want = ids_of(on_numpy.generate_batch(PROMPTS[:1], **OPTIONS))
    for _ in range(2):
        generations = [llama.new_generation(PROMPTS[:1], **OPTIONS) for _ in range(2)]
        for _ in zip(*generations, strict=True):
            pass
        assert [ids_of(g.completions()) for g in generations] == [want, want]


def test_a_generation_that_lost_its_cache_writes_nothing_to_the_others_state(llama, on_numpy):
    prompts = [[1] * (TINY.context_length - n) for n in (12, 2, 9)]
    cache = llama.new_cache(batch=3)
    old = iter(llama.new_generation(prompts, cache=cache, **OPTIONS))
    for _ in range(3):
        next(old)
    for row in range(3):
        cache.truncate(row, 0)
    new = llama.new_generation(prompts, cache=cache, **OPTIONS)
    pieces = iter(new)
    next(pieces)
    with pytest.raises(InputError, match="another generation uses the cache"):
        list(old)  # the next step would remove a row from its batch
    list(pieces)
    assert ids_of(new.completions()) == ids_of(on_numpy.generate_batch(prompts, **OPTIONS))


def test_a_cache_on_which_a_step_failed_is_not_kept(llama, on_numpy, monkeypatch):
    run(llama, PROMPTS)
    with monkeypatch.context() as patch:
        patch.setattr(llama.backend, "to_host_later", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llama.generate_batch(PROMPTS, **OPTIONS)
    assert not llama._kept_cache._kept
    assert run(llama, PROMPTS)[0] == ids_of(on_numpy.generate_batch(PROMPTS, **OPTIONS))


def test_the_kept_cache_is_given_up_before_memory_is_missing(llama, monkeypatch):
    run(llama, PROMPTS[:1], max_new_tokens=40)
    (cache,) = llama._kept_cache._kept
    needed = []
    # The workspace fits together with the kept cache, but not together with a second cache.
    monkeypatch.setattr(
        "npllama.model.require_free_memory", lambda *a, **k: needed.append(k["has_cache"])
    )
    run(llama, PROMPTS[:1], max_new_tokens=20)
    assert needed == [True] and cache in llama._kept_cache._kept
    run(llama, PROMPTS[:2], max_new_tokens=20)
    assert needed == [True, False] and cache not in llama._kept_cache._kept

    def full(*_args, **_options):
        if llama._kept_cache._kept:
            raise OutOfMemoryError("full")

    monkeypatch.setattr("npllama.model.require_free_memory", full)
    llama.logits([1, 5])  # allocates a separate cache
    assert not llama._kept_cache._kept
    monkeypatch.setattr("npllama.model.require_free_memory", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llama.logits([1, 5])


def test_a_dropped_model_frees_its_graphs():
    llama = make_llama(SumOps(StrictCupyBackend()))
    run(llama, PROMPTS)
    (cache,) = llama._kept_cache._kept
    captures, pool = weakref.ref(cache.captured), cache.captured._pool
    buffer = weakref.ref(cache.layers[0].k.array.base)
    assert pool.total_bytes() > 0
    del llama, cache
    gc.collect()
    assert (captures(), buffer(), pool.total_bytes()) == (None, None, 0)


@pytest.fixture
def another_device():
    """A function that makes another device current, as a caller with several devices may do."""
    yield lambda: setattr(DEVICE, "current", 1)
    DEVICE.current = 0


def test_a_pool_is_freed_on_its_own_device(monkeypatch, another_device):
    llama, freed = make_llama(SumOps(StrictCupyBackend())), []
    run(llama, PROMPTS)
    another_device()
    monkeypatch.setattr(MemoryPool, "free_all_blocks", lambda _: freed.append(DEVICE.current))
    del llama
    gc.collect()
    assert (freed, DEVICE.current) == ([0], 1)


def test_a_replay_is_on_the_models_device_in_every_thread(llama, monkeypatch, another_device):
    launch, launched = Graph.launch, []
    run(llama, PROMPTS)

    def noted(graph):
        launched.append(DEVICE.current)
        launch(graph)

    monkeypatch.setattr(Graph, "launch", noted)
    for _ in llama.new_generation(PROMPTS, **OPTIONS):
        another_device()  # the caller's choice
    assert len(launched) > 3 and set(launched) == {0}


def test_a_cache_is_truncated_and_emptied_on_its_device(llama, another_device):
    for act in (lambda cache: cache.truncate(0, 0), lambda cache: cache.clear()):
        cache = llama.new_cache()
        another_device()
        act(cache)
        assert DEVICE.current == 0


def test_the_generation_itself_holds_no_array_of_its_cache(llama):
    generation = llama.new_generation(PROMPTS, **OPTIONS)
    generation.run()
    buffer = weakref.ref(llama._kept_cache._kept[0].layers[0].k.array.base)
    assert llama._kept_cache.give_up()
    assert buffer() is None  # freed even without a garbage collection


def test_numpy_keeps_no_cache(on_numpy):
    on_numpy.generate_batch(PROMPTS, **OPTIONS)
    assert not on_numpy._kept_cache.give_up()


# -- the queue


@pytest.mark.parametrize("steps_ahead", [0, 1, 3])
def test_a_step_is_launched_before_the_one_before_it_is_read(
    llama, on_numpy, monkeypatch, steps_ahead
):
    monkeypatch.setattr(StrictCupyBackend, "steps_ahead", steps_ahead)
    events, to_host_later = [], llama.backend.to_host_later

    def watched(*arrays):
        number = sum(name == "launch" for name, _ in events)
        events.append(("launch", number))
        copied = to_host_later(*arrays)
        return lambda: events.append(("read", number)) or copied()

    monkeypatch.setattr(llama.backend, "to_host_later", watched)
    monkeypatch.setattr(llama.backend, "to_host", lambda *_: pytest.fail("waits for all work"))
    got, steps = run(llama, PROMPTS)
    assert got == ids_of(on_numpy.generate_batch(PROMPTS, **OPTIONS))
    assert steps.n_replayed == 10
    assert [n for name, n in events if name == "read"] == [*range(12)]
    for n in range(12):
        launched = sum(name == "launch" for name, _ in events[: events.index(("read", n))])
        assert launched == min(n + 1 + steps_ahead, 12)


def test_what_is_copied_later_is_what_there_was(ops, to_device, to_host):
    a, b = to_device(np.arange(6)), to_device(np.ones((2, 3), "float32"))
    wait = ops.backend.to_host_later(a * 2, b / 3)
    b *= 7
    got = wait()
    for copy, want in zip(got, (to_host(a * 2), np.ones((2, 3), "float32") / 3), strict=True):
        assert copy.dtype == want.dtype and np.array_equal(copy, want)


def test_copies_are_of_the_step_that_they_were_queued_behind():
    backend = StrictCupyBackend()
    a, b = backend.to_device(np.arange(3)), backend.to_device(np.ones(2, "float32"))
    first = backend.to_host_later(a, b)
    a[...] = 7
    second = backend.to_host_later(a)
    assert [x.tolist() for x in second()] == [[7, 7, 7]]
    assert [(x.tolist(), x.dtype) for x in first()] == [([0, 1, 2], "int64"), ([1, 1], "float32")]


def test_on_numpy_the_results_are_not_copied():
    array = np.arange(3)
    assert Backend().to_host_later(array)()[0] is array


# -- errors


def while_capturing(llama, monkeypatch, act):
    """Call `act` in the head of each step that is being captured."""
    head = llama.ops.head

    def watched(*args):
        if DEVICE.stream.capture is not None:
            act()
        return head(*args)

    monkeypatch.setattr(llama.ops, "head", watched)


def refuse(error):
    def act():
        raise error

    return act


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (refuse(RuntimeError("of\nsome kind")), "of some kind"),
        (refuse(MemoryError()), "MemoryError"),
        (lambda: DEVICE.stream.done, "cudaErrorStreamCaptureInvalidated"),  # found at the end
        (lambda: DEVICE.stream.synchronize(), "cudaErrorStreamCaptureUnsupported"),
    ],
)
def test_a_step_whose_capture_fails_runs_eagerly(llama, on_numpy, monkeypatch, caplog, act, reason):
    want = ids_of(on_numpy.generate_batch(PROMPTS, **OPTIONS))
    with monkeypatch.context() as patch:
        while_capturing(llama, patch, act)
        got, steps = run(llama, PROMPTS)
    assert (got, steps.n_captured, steps.n_eager) == (want, 0, 11)
    assert f"the capture failed: {reason}" in steps.report()
    assert len(warnings_in(caplog)) == 1
    assert run(llama, PROMPTS)[1].n_eager == 11  # permanently
    got, steps = run(llama, PROMPTS, sampling=GREEDY)  # a step with another key is still captured
    assert steps.n_captured == 1


def test_a_step_that_fails_in_both_ways_raises(llama, monkeypatch):
    head, calls = llama.ops.head, []

    def failing(*args):
        calls.append(1)
        if len(calls) > len(PROMPTS) + 1:  # after the prompts and the first step
            raise RuntimeError(f"in call {len(calls)}")
        return head(*args)

    monkeypatch.setattr(llama.ops, "head", failing)
    with pytest.raises(RuntimeError, match="in call 6"):
        llama.generate_batch(PROMPTS, **OPTIONS)
    assert DEVICE.stream.null and not llama._kept_cache._kept


def test_ctrl_c_while_capturing_ends_the_capture(llama, on_numpy, monkeypatch):
    cache = llama.new_cache(batch=3)
    with monkeypatch.context() as patch:
        while_capturing(llama, patch, refuse(KeyboardInterrupt()))
        for kept in (cache, None):
            with pytest.raises(KeyboardInterrupt):
                llama.generate_batch(PROMPTS, cache=kept, **OPTIONS)
            assert DEVICE.stream.null and DEVICE.stream.capture is None
    want = ids_of(on_numpy.generate_batch(PROMPTS, **OPTIONS))
    for row in range(3):
        cache.truncate(row, 1)
    for kept in (cache, None):
        got, steps = run(llama, PROMPTS, cache=kept)
        assert got == want and steps.n_captured > 0


def test_what_numpy_and_the_reference_do_with_graph():
    assert type(ops_for(Backend(), graph=True)) is NumpyOps
    for graph in (True, False):
        assert ops_for(StrictCupyBackend(), graph).keeps_caches is graph
    assert ops_for(StrictCupyBackend()).keeps_caches


def test_states_of_fewer_rows_lie_in_the_same_memory(llama):
    buffers = llama.new_cache(batch=3).step_buffers
    to_host, move = llama.backend.to_host, llama.backend.to_device
    uniforms, seen = np.arange(12.0).reshape(3, 4), np.eye(3, 7, dtype=bool)

    def joined(states, index):
        return buffers.joined(states, move(np.array(index)))

    state = joined([buffers.begin([0, 1, 2], uniforms, seen)], [0, 1, 2])
    state.tokens[...] = move(np.array([10, 11, 12]))
    assert to_host(state.next_uniform()).tolist() == [0, 4, 8]
    some = joined([state], [0, 2])
    assert some is joined([buffers.begin([0, 2], None, None), some], [2, 3])  # that of two rows
    assert to_host(some.rows).tolist() == [0, 2] and to_host(some.tokens).tolist() == [10, 12]
    assert to_host(some.next_uniform()).tolist() == [1, 9]
    assert to_host(some.seen).tolist() == seen[[0, 2]].tolist()
    for name in ("rows", "tokens", "uniforms", "at", "seen"):
        one, other = getattr(some, name).array, getattr(state, name).array
        assert np.shares_memory(one, other) and one.flags.c_contiguous


def test_a_row_that_joins_begins_with_its_first_random_number(llama):
    """The new row starts with its own first number, independent of the other row's step and of the
    cache row."""
    buffers = llama.new_cache(batch=2).step_buffers
    to_host, move = llama.backend.to_host, llama.backend.to_device
    old = buffers.begin([1], np.array([[0.1, 0.2, 0.3, 0.4]]), None)
    old.next_uniform(), old.next_uniform()
    new = buffers.begin([0], np.array([[0.5, 0.6]]), np.ones((1, 3), dtype=bool))
    state = buffers.joined([old, new], move(np.array([1, 0])))
    assert to_host(state.rows).tolist() == [0, 1]
    assert to_host(state.next_uniform()).tolist() == [0.5, 0.3]
    assert to_host(state.next_uniform()).tolist() == [0.6, 0.4]
    assert to_host(state.seen).tolist() == [[True] * 3, [False] * 3]  # the second row's is unused


def test_a_sampling_of_no_penalty_needs_no_seen_tokens(llama):
    state = llama.new_cache(batch=2).step_buffers.begin([0, 1], None, None)
    assert state.uniforms is None and state.seen is None and state.next_uniform() is None


def test_frozen_options_are_those_that_the_step_depends_on(llama):
    """The step is captured again for another n_tokens, which is a Python number and not an
    array."""
    run(llama, PROMPTS[:1])
    llama._n_tokens = 50
    got, steps = run(llama, PROMPTS[:1], sampling=replace(LIVELY))
    assert steps.n_captured == 1 and max(got[0]) < 50


# -- a complete step with kernels

ON_KERNELS = LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96, vocab_size=260, context_length=64
)
needs_compiler = pytest.mark.skipif(compiler() is None, reason="no g++ 12 on this machine")


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "prompts", "sampling"),
    [
        ("float32", PROMPTS, GREEDY),
        ("float32", PROMPTS[:1], LIVELY),
        ("float16", PROMPTS[:1], GREEDY),
        ("float16", PROMPTS, LIVELY),
        ("int8", PROMPTS, LIVELY),
    ],
)
def test_a_step_of_kernels_is_replayed_and_says_what_numpy_says(dtype, prompts, sampling):
    options = {"sampling": sampling, "max_new_tokens": 24}  # spans two buckets
    on_numpy = make_llama(NumpyOps(Backend()), ON_KERNELS, dtype=dtype)
    want = ids_of(on_numpy.generate_batch(prompts, **OPTIONS | options))
    llama = make_llama(CupyOps(StrictCupyBackend()), ON_KERNELS, dtype=dtype)
    with DEVICE.recording() as launches:
        got, steps = run(llama, prompts, **options)
    assert (got, steps.n_captured, steps.n_eager, steps.n_replayed) == (want, 2, 2, 21)
    names = Counter(launch.name.partition("<")[0] for launch in launches)
    assert names["gemv"] >= 23 * (4 * 2 + 1)  # four per layer, and the head
    assert (names["attend"], names["next_token"]) == (23 * 2, 24)
    got, steps = run(llama, prompts, **options)
    assert (got, steps.n_captured, steps.n_eager, steps.n_replayed) == (want, 0, 0, 23)


@needs_compiler
def test_a_step_of_kernels_in_bfloat16_says_the_same_replayed_and_launched():
    """The reference is a run without a graph, because NumPy's cache is float32 and gives other
    ids."""
    replayed, launched = (
        make_llama(CupyOps(StrictCupyBackend(), graph), ON_KERNELS, dtype="bfloat16")
        for graph in (True, False)
    )
    got, steps = run(replayed, PROMPTS)
    assert (got, steps.n_replayed) == (run(launched, PROMPTS)[0], 10)


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "float16"])  # products by cupy.matmul and by gemmEx
def test_nine_rows_are_eager_and_eight_are_captured(dtype, caplog):
    llama = make_llama(CupyOps(StrictCupyBackend()), ON_KERNELS, dtype=dtype)
    on_numpy = make_llama(NumpyOps(Backend()), ON_KERNELS, dtype=dtype)
    prompts = [[1] * (ON_KERNELS.context_length - n) for n in (4, *[9] * 8)]
    got, steps = run(llama, prompts, sampling=GREEDY)
    assert got == ids_of(on_numpy.generate_batch(prompts, **OPTIONS | {"sampling": GREEDY}))
    assert (steps.n_eager, steps.n_captured, steps.n_replayed) == (4, 1, 4)
    assert "cuBLAS computes a product" in steps.report() and not warnings_in(caplog)


def test_a_second_generation_replays_wherever_there_are_kernels(ops, on_numpy):
    llama = make_llama(ops, ON_KERNELS)
    on_numpy = make_llama(on_numpy.ops, ON_KERNELS)
    for sampling in (GREEDY, LIVELY):
        options = OPTIONS | {"sampling": sampling, "max_new_tokens": 24}
        want = ids_of(on_numpy.generate_batch(PROMPTS, **options))
        for n_eager in (2, 0):  # spans two buckets
            generation = llama.new_generation(PROMPTS, **options)
            generation.run()
            assert ids_of(generation.completions()) == want
            if type(ops) is CupyOps:
                (steps,) = generation._compiled.values()
                assert (steps.n_eager, steps.n_captured) == (n_eager, n_eager), steps.report()
