"""A captured decode step reads only device arrays."""

from dataclasses import fields, replace

import numpy as np
import pytest

from conftest import TINY, ArrayCalls, make_llama
from npllama.kv_cache import Place
from npllama.ops import CupyOps, Ops
from npllama.sampling_options import Sampling
from strict_array import StrictArray, StrictBackend


class Frozen(tuple):
    """Host positions that a step must not read."""

    def _refuse(self, *args):
        raise AssertionError("a captured step read a position of the host")

    __iter__ = __getitem__ = __len__ = __contains__ = __eq__ = _refuse
    __hash__ = None


class CapturingOps(ArrayCalls):
    """Simulates a captured step: from its second call on, it has no access to host positions, and
    reads the arrays of its first call, also in later generations. The results of a call are valid
    until the next call."""

    def __init__(self, backend):
        super().__init__(backend)
        self.keys, self.replays = {}, 0
        self.results = ()  # of the last call

    def compile(self, step, frozen=None, constants=()):
        def compiled(state, cache, place):
            key = (cache, len(place.rows), place.bucket, frozen, *map(id, constants))
            arrays = [*vars(state).values(), cache.device_lengths, place.device_rows]
            addresses = [id(array) for array in arrays]
            if self.keys.setdefault(key, addresses) is not addresses:
                assert self.keys[key] == addresses, "an array moved between two calls"
                self.replays += 1
                place = replace(place, rows=Frozen(), starts=Frozen())
            held = state.tokens.array
            results = step(state, cache, place)
            assert state.tokens.array is held and results[0].array is not held
            for old in self.results:  # the results of this call overwrite them
                old.array[...] = -1
            self.results = results
            return results

        return compiled


@pytest.mark.parametrize("n_top", [0, 3])
@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(1.0, 20, 0.95, 0.01, 1.2)])
def test_a_captured_step_reads_the_device_alone(sampling, n_top, monkeypatch):
    monkeypatch.setattr("npllama.kv_cache.BUCKET", 16)
    prompts = [[1, 5, 6, 7], [1, 8], list(range(3, 20))]
    options = {"max_new_tokens": 20, "sampling": sampling, "seed": 7, "ignore_eos": True}
    options["top_logprobs"] = n_top
    captured, eager = CapturingOps(StrictBackend()), ArrayCalls(StrictBackend())
    got, want = (make_llama(ops).generate_batch(prompts, **options) for ops in (captured, eager))
    assert [c.ids for c in got] == [c.ids for c in want]
    assert captured.replays > 10 and len(captured.keys) > 1


def test_the_next_generation_of_a_batch_has_the_arrays_of_the_last(monkeypatch):
    monkeypatch.setattr("npllama.kv_cache.BUCKET", 16)
    ops = CapturingOps(StrictBackend())
    llama, eager = make_llama(ops), make_llama(ArrayCalls(StrictBackend(), graph=False))
    prompts = [[1, 5, 6], [1, 8]]
    seen = set()
    for n, new_keys in ((10, True), (6, False), (12, False), (25, True), (12, False)):
        options = {"max_new_tokens": n, "seed": n, "ignore_eos": True, "repetition_penalty": 1.2}
        got = llama.generate_batch(prompts, **options)
        assert [c.ids for c in got] == [c.ids for c in eager.generate_batch(prompts, **options)]
        assert (len(ops.keys) > len(seen)) == new_keys
        seen = set(ops.keys)


def test_it_is_found_out_when_a_step_reads_the_host(monkeypatch):
    ops = CapturingOps(StrictBackend())
    monkeypatch.setattr(CupyOps, "cached_attention", Ops.cached_attention)
    with pytest.raises(AssertionError, match="read a position of the host"):
        make_llama(ops).generate([1, 5], max_new_tokens=6, ignore_eos=True)


def test_nothing_is_moved_to_the_device_for_a_token(monkeypatch):
    backend = StrictBackend()
    llama = make_llama(ArrayCalls(backend))
    moved = []
    to_device = backend.to_device
    monkeypatch.setattr(backend, "to_device", lambda a: moved.append(np.shape(a)) or to_device(a))
    for n in (9, 30):
        moved.clear()
        llama.generate_batch([[1, 5], [1, 6, 7]], max_new_tokens=n, seed=1, ignore_eos=True)
        assert moved.count((2, n)) == 1  # the random numbers
        assert len(moved) < 10


def test_a_place_holds_host_integers_and_one_array():
    place = make_llama(ArrayCalls(StrictBackend()), TINY).new_cache(batch=2).place(1)
    on_device = [f.name for f in fields(Place) if isinstance(getattr(place, f.name), StrictArray)]
    assert on_device == ["device_rows"]
