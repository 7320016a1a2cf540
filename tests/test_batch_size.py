"""Prompts that wait for a free row: no result depends on how many rows are decoded together."""

import numpy as np
import pytest

from conftest import TINY, make_llama, make_ops
from npllama import generation as loop
from npllama.errors import InputError, OutOfMemoryError
from npllama.llama import Llama
from npllama.sampling_options import Sampling

GREEDY = Sampling(temperature=0)
LIVELY = Sampling(temperature=1.5, top_k=50, top_p=0.95, min_p=0.001, repetition_penalty=1.3)
PROMPTS = [[1, 100, 7], [1], [1, *range(9, 39)], [1, 42], [1] * 62, [1, 7, 7, 8], [5], [1, 200]]


@pytest.fixture(params=["numpy", "strict-cupy"])
def llama(request) -> Llama:
    """With CuPy arrays, steps are launched ahead."""
    llama = make_llama(make_ops(request.param))
    assert (llama.backend.steps_ahead > 0) == (request.param == "strict-cupy")
    return llama


def said(completions):
    return [(c.ids, c.text, c.finish_reason) for c in completions]


@pytest.mark.parametrize("sampling", [GREEDY, LIVELY], ids=["greedy", "lively"])
def test_no_batch_size_changes_what_a_prompt_is_answered(llama, sampling, monkeypatch):
    monkeypatch.setattr(loop, "PROMPT_TOKENS_BETWEEN_STEPS", 7)
    stop = llama.generate(PROMPTS[0], sampling=sampling, seed=3, max_new_tokens=9).text[3:6]
    is_slow = llama.backend.steps_ahead > 0  # a simulator runs the kernels
    options = {"sampling": sampling, "seed": 3, "max_new_tokens": 7 if is_slow else 14}
    options["stop"] = stop
    want = said(llama.generate_batch(PROMPTS, batch_size=1, **options))
    assert {reason for _ids, _text, reason in want} >= {"stop", "length"}
    for batch_size in (2, 3, 8) if is_slow else (2, 3, 8, 99, None):
        generation = llama.new_generation(PROMPTS, batch_size=batch_size, **options)
        pieces = list(generation)
        got = said(generation.completions())
        assert got == want
        for number, (_ids, text, _reason) in enumerate(got):
            assert "".join(piece for row, piece in pieces if row == number) == text


def test_no_batch_size_changes_which_tokens_are_likeliest(llama):
    options = {"sampling": LIVELY, "seed": 3, "max_new_tokens": 4, "top_logprobs": 2}

    def top(batch_size):
        completions = llama.generate_batch(PROMPTS, batch_size=batch_size, **options)
        assert {c.timings.rows for c in completions} == {len(PROMPTS)}
        assert [c.prompt_tokens for c in completions] == [*map(len, PROMPTS)]
        assert all(len(c.top_logprobs) == len(c.ids) for c in completions)
        return [[[token.id for token in at] for at in c.top_logprobs] for c in completions]

    want = [llama.generate(prompt, **options) for prompt in PROMPTS[:1]]
    got = top(3)
    assert got == top(None)
    assert got[0] == [[token.id for token in at] for at in want[0].top_logprobs]


def test_alone_the_first_prompt_says_the_same(llama):
    options = {"sampling": LIVELY, "seed": 5, "max_new_tokens": 10}
    alone = llama.generate(PROMPTS[0], **options)
    assert said([alone]) == said(llama.generate_batch(PROMPTS, batch_size=2, **options)[:1])


def test_a_row_that_ends_at_eos_makes_room(llama):
    eos = llama.generate([1, 5], max_new_tokens=9, temperature=0, ignore_eos=True).ids[4]
    ending = make_llama(llama.ops, type(TINY)(**{**vars(TINY), "eos_ids": (259, eos)}))
    prompts = [[1, 5], [1, 9], [1, 5], [1, 10, 11], [1, 5]]
    options = {"temperature": 0, "max_new_tokens": 12}
    got = ending.generate_batch(prompts, batch_size=2, **options)
    assert [c.finish_reason for c in got].count("eos") >= 3
    assert said(got) == said([ending.generate(prompt, **options) for prompt in prompts])


def test_the_cache_has_no_more_rows_than_the_batch(llama, monkeypatch):
    made, take = [], llama.take_cache
    monkeypatch.setattr(llama, "take_cache", lambda *size: made.append(size) or take(*size))
    llama.generate_batch([[1, 5]] * 9, batch_size=3, max_new_tokens=4, ignore_eos=True)
    llama.generate_batch([[1, 5]] * 2, batch_size=3, max_new_tokens=4, ignore_eos=True)
    assert made == [(3, 6), (2, 6)]


def test_rows_are_decoded_together_while_prompts_wait(monkeypatch):
    """Nine prompts of equal length, three at a time: each step decodes as many rows as possible."""
    llama = make_llama(make_ops("numpy"))
    sizes, compute = [], llama.compute
    monkeypatch.setattr(
        llama, "compute", lambda t, *rest: sizes.append(t.shape) or compute(t, *rest)
    )
    llama.generate_batch([[1, 5]] * 9, batch_size=3, max_new_tokens=4, ignore_eos=True)
    assert sizes == ([(1, 2)] * 3 + [(3, 1)] * 3) * 3


def test_a_long_prompt_is_read_between_the_steps_of_others(monkeypatch):
    monkeypatch.setattr(loop, "PROMPT_TOKENS_BETWEEN_STEPS", 10)
    llama = make_llama(make_ops("numpy"))
    sizes, compute = [], llama.compute
    monkeypatch.setattr(
        llama, "compute", lambda t, *rest: sizes.append(t.shape) or compute(t, *rest)
    )
    limits = {0: 40, 1: 2}
    generation = llama.new_generation([[1], [1], [1] * 35], batch_size=2, max_new_tokens=40)
    for row in generation.rows:
        row.limit, row.eos_ids = limits.get(row.number, 3), frozenset()
    generation.run()
    assert sizes[:4] == [(1, 1), (1, 1), (2, 1), (1, 10)]
    assert sizes[4:11] == [(1, 1), (1, 10), (1, 1), (1, 10), (1, 1), (1, 5), (2, 1)]
    assert [len(row.ids) for row in generation.rows] == [40, 2, 3]


def test_timings_count_all_prompts(llama):
    prompts = [[1, 5, 6], [1, 8], [1], [1, 9]]
    generation = llama.new_generation(prompts, batch_size=2, max_new_tokens=5, ignore_eos=True)
    generation.run()
    t = generation.timings
    assert (t.prompt_tokens, t.new_tokens, t.decode_tokens) == (8, 20, 16)
    assert (t.prefill_forwards, t.decode_steps) == (4, 8)
    assert 0 < t.first_token_seconds <= t.prefill_seconds


def test_as_many_run_as_fit_the_memory(llama, monkeypatch):
    chunk = llama.ops.prefill_chunk()
    free = 10_000_000 if chunk == 512 else 80_000_000  # CuPy needs more workspace
    monkeypatch.setattr(llama.backend, "free_bytes", lambda: free)
    generation = llama.new_generation([[1, 5]] * 2000, max_new_tokens=60)
    fits = generation._batch_size
    assert 1 < fits < 2000
    llama.check_own_memory(fits, 62)
    with pytest.raises(OutOfMemoryError):
        llama.check_own_memory(fits + 1, 62)
    assert llama.new_generation([[1, 5]] * 3, max_new_tokens=60)._batch_size == 3
    with pytest.raises(OutOfMemoryError):
        llama.new_generation([[1, 5]] * 2000, max_new_tokens=60, batch_size=fits + 1)
    monkeypatch.setattr(llama.backend, "free_bytes", lambda: 1000)
    with pytest.raises(OutOfMemoryError):
        llama.new_generation([[1, 5]] * 2000, max_new_tokens=60)


def test_a_batch_size_out_of_range_is_refused(llama):
    for wrong in (0, -1, 1.5, True, "2"):
        with pytest.raises(InputError, match=r"batch_size is .*: expected a whole number from 1"):
            llama.generate_batch([[1]], batch_size=wrong)
    cache = llama.new_cache(batch=2)
    with pytest.raises(InputError, match="batch_size is 1 and the cache has a row for each of 2"):
        llama.generate_batch([[1], [1]], batch_size=1, cache=cache)
    assert len(llama.generate_batch([[1], [1]], batch_size=np.int64(2), cache=cache)) == 2


def test_an_interrupted_generation_knows_which_rows_have_begun(llama):
    generation = llama.new_generation(
        [[1, 5]] * 4, batch_size=1, max_new_tokens=3, ignore_eos=True, temperature=0
    )
    for number, _text in generation:
        if number == 1:
            break
    assert [generation.has_begun(row) for row in generation.rows] == [True, True, False, False]
    reasons = [c.finish_reason for c in generation.completions()]
    assert reasons == ["length", "interrupted", "interrupted", "interrupted"]
