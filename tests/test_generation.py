"""The generation loop: its results, when it ends, and that batches and queues do not change
results."""

import copy
import inspect
import pickle
import re
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest

from conftest import TINY, make_llama, make_ops
from interrupted_lines import interrupted_at_line
from model_directory import BYTE_PIECES, write_model
from npllama import threads
from npllama.config import LlamaConfig
from npllama.errors import InputError, NumericalError, OutOfMemoryError, TokenizerError
from npllama.initialization import random_parameters
from npllama.llama import Llama, load
from npllama.sampling_options import Sampling

GREEDY = Sampling(temperature=0)
LIVELY = Sampling(temperature=1.5, top_k=50, top_p=0.95, min_p=0.001, repetition_penalty=1.3)
PROMPTS = [[1, 100, 7], [1], [1, 9, 9, 9, 30, 31, 8], [1, 42]]


def run(llama, prompts, **options):
    generation = llama.new_generation(prompts, **options)
    pieces = list(generation)
    completions = generation.completions()
    for row, completion in enumerate(completions):
        assert "".join(text for at, text in pieces if at == row) == (completion.text or "")
    return completions


def test_no_random_numbers_are_made_where_nothing_is_drawn(llama, monkeypatch):
    def refuse(*args):
        raise AssertionError("asked for random numbers")

    monkeypatch.setattr("npllama.generation.uniforms", refuse)
    assert len(llama.generate([1, 5], max_new_tokens=3, temperature=0, ignore_eos=True).ids) == 3
    with pytest.raises(AssertionError, match="random numbers"):
        llama.generate([1, 5], max_new_tokens=3, temperature=1)


@pytest.mark.array_calls
def test_options_are_given_in_one_way(llama):
    """Options are keywords, a Sampling, or a Sampling and keywords that replace some of its
    fields."""
    keywords = {"temperature": 1.5, "top_k": 50, "repetition_penalty": 1.3}
    common = {"max_new_tokens": 12, "seed": 4, "ignore_eos": True}
    ways = [keywords, {"sampling": Sampling(**keywords)}]
    ways += [{"sampling": Sampling(**keywords | {"top_k": 3}), "top_k": 50}]
    for prompt in ([1, 100, 7], "abc"):
        want = llama.generate(prompt, **common, **keywords)
        for way in ways:
            assert llama.generate(prompt, **common, **way).ids == want.ids
            assert llama.generate_batch([prompt], **common, **way)[0].ids == want.ids
            assert "".join(llama.stream(prompt, **common, **way)) == want.text
        assert llama.generate(prompt, **common).ids != want.ids  # the options have an effect


def test_signatures_show_every_option_and_its_default():
    expected = {"max_new_tokens": 512, "seed": None, "stop": (), "ignore_eos": False}
    expected |= {
        "fresh_text": False,
        "cache": None,
        "batch_size": None,
        "top_logprobs": 0,
        "sampling": Sampling(),
        **vars(Sampling()),
    }
    for name, first in (
        ("generate", "prompt"),
        ("stream", "prompt"),
        ("generate_batch", "prompts"),
        ("new_generation", "prompts"),
    ):
        itself, prompt, *options = inspect.signature(getattr(Llama, name)).parameters.values()
        assert (itself.name, prompt.name) == ("self", first)
        assert {p.name: p.default for p in options} == expected
        assert {p.kind for p in options} == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("method", ["generate", "stream", "generate_batch", "new_generation"])
def test_a_misspelled_keyword_is_named_with_those_there_are(llama, method):
    expected = r"^no keyword is named temprature: expected one of max_new_tokens, .*temperature, "
    with pytest.raises(TypeError, match=expected):
        getattr(llama, method)([1, 5], temprature=0.5)


def test_greedy_takes_the_likeliest_token_each_time(llama):
    ids = [1, 100, 7]
    completion = llama.generate(ids, max_new_tokens=6, temperature=0, ignore_eos=True)
    for id_, log_prob in zip(completion.ids, completion.log_probs, strict=True):
        logits = llama.logits(ids)[-1].astype("float64")
        assert id_ == logits.argmax()
        shifted = logits - logits.max()
        assert log_prob == pytest.approx(shifted[id_] - np.log(np.exp(shifted).sum()), abs=1e-5)
        ids.append(id_)


def test_log_probs_are_of_the_unmodified_logits(llama):
    options = {"temperature": 3.0, "top_k": 5, "repetition_penalty": 2.0, "seed": 1}
    completion = llama.generate([1, 5], max_new_tokens=4, ignore_eos=True, **options)
    logits = llama.logits([1, 5, *completion.ids])[1:-1].astype("float64")
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = [row[id_] for row, id_ in zip(log_p, completion.ids, strict=True)]
    assert completion.log_probs == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("sampling", [GREEDY, LIVELY], ids=["greedy", "lively"])
def test_the_likeliest_of_each_step_are_those_of_the_unmodified_logits(llama, sampling):
    options = {"sampling": sampling, "seed": 1, "max_new_tokens": 5, "ignore_eos": True}
    plain = llama.generate_batch(PROMPTS, **options)
    completions = llama.generate_batch(PROMPTS, top_logprobs=4, **options)
    assert [c.ids for c in completions] == [c.ids for c in plain]  # does not change the ids
    assert {c.top_logprobs for c in plain} == {None}
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        logits = llama.logits(prompt + completion.ids)[len(prompt) - 1 : -1].astype("float64")
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        assert len(completion.top_logprobs) == len(completion.ids)
        for row, top in zip(log_p, completion.top_logprobs, strict=True):
            assert [token.log_prob for token in top] == pytest.approx(-np.sort(-row)[:4], abs=1e-4)
            assert [row[token.id] for token in top] == pytest.approx(-np.sort(-row)[:4], abs=1e-4)
            assert [token.text for token in top] == [llama.tokenizer.piece(t.id) for t in top]
    stream = llama.stream(PROMPTS[0], top_logprobs=4, **options)
    assert "".join(stream) == completions[0].text
    got = [[t.id for t in top] for top in stream.completion.top_logprobs]
    assert got == [[t.id for t in top] for top in completions[0].top_logprobs]


def test_fewer_tokens_than_asked_for_are_likeliest_in_a_small_vocabulary(ops):
    config = LlamaConfig(**{**vars(TINY), "vocab_size": 9})
    llama = Llama(config, random_parameters(config, ops), ops)
    completion = llama.generate([1, 5], max_new_tokens=2, ignore_eos=True, top_logprobs=20)
    for top in completion.top_logprobs:
        assert sorted(token.id for token in top) == [*range(9)]
        assert {token.text for token in top} == {None}
    head = llama.ops.head
    possible = np.arange(9) < 3

    def head_of_three(x, p):
        out = ops.backend.to_host(head(x, p)).copy()
        out[..., ~possible] = -np.inf
        return ops.backend.to_device(out)

    llama.ops.head = head_of_three
    completion = llama.generate([1, 5], max_new_tokens=2, ignore_eos=True, top_logprobs=4)
    assert [sorted(t.id for t in top) for top in completion.top_logprobs] == [[0, 1, 2]] * 2


@pytest.mark.parametrize("sampling", [GREEDY, LIVELY], ids=["greedy", "lively"])
def test_a_batch_says_what_each_row_says_alone(llama, sampling):
    together = run(llama, PROMPTS, sampling=sampling, seed=3, max_new_tokens=12)
    for row, prompt in enumerate(PROMPTS):
        # only this row in the batch continues; the other rows end at once
        generation = llama.new_generation(PROMPTS, sampling=sampling, seed=3, max_new_tokens=12)
        for other in generation.rows:
            if other.number != row:
                other.finish_reason = "length"
        for _ in generation:
            pass
        alone = generation.completions()[row]
        assert alone.ids == together[row].ids, prompt
        assert alone.log_probs == pytest.approx(together[row].log_probs, abs=1e-4)


def test_steps_that_run_ahead_change_nothing(llama, monkeypatch):
    results = []
    for steps_ahead in (0, 1, 3):
        monkeypatch.setattr(type(llama.backend), "steps_ahead", steps_ahead)
        completions = run(llama, PROMPTS, sampling=LIVELY, seed=5, max_new_tokens=20)
        results.append([(c.ids, c.text, c.finish_reason) for c in completions])
    assert results[0] == results[1] == results[2]


def test_rows_leave_the_batch_when_they_end(llama, monkeypatch):
    sizes = []
    compute = llama.compute
    monkeypatch.setattr(
        llama, "compute", lambda t, *rest: sizes.append(t.shape) or compute(t, *rest)
    )
    monkeypatch.setattr(type(llama.backend), "steps_ahead", 0)
    prompts = [[1] * (llama.context - room) for room in (2, 4, 3)]
    completions = run(llama, prompts, sampling=GREEDY, ignore_eos=True, max_new_tokens=99)
    assert [len(c.ids) for c in completions] == [2, 4, 3]
    assert [shape[0] for shape in sizes] == [1, 1, 1, 3, 2, 1]


@pytest.mark.array_calls
def test_the_seed_reproduces_the_text_and_another_does_not(llama):
    def say(seed):
        return llama.generate([1, 5], max_new_tokens=20, temperature=1.0, top_p=1, seed=seed)

    assert say(7).ids == say(7).ids
    assert say(7).ids != say(8).ids
    random = say(None)
    assert say(random.seed).ids == random.ids


def test_generation_ends_at_the_context_with_reason_length(llama):
    prompt = [1] * (llama.context - 3)
    completion = llama.generate(prompt, max_new_tokens=99, temperature=0, ignore_eos=True)
    assert (len(completion.ids), completion.finish_reason) == (3, "length")
    full = llama.generate([1] * llama.context, max_new_tokens=99)
    assert (full.ids, full.text, full.finish_reason) == ([], "", "length")
    with pytest.raises(InputError, match="65 tokens do not fit the context of 64"):
        llama.generate([1] * (llama.context + 1))


def test_max_new_tokens_zero_is_an_empty_completion(llama):
    completion = llama.generate([1], max_new_tokens=0)
    assert (completion.ids, completion.text, completion.finish_reason) == ([], "", "length")


def test_eos_ends_a_row_and_is_its_last_id(ops):
    eos = make_llama(ops).generate([1, 5], max_new_tokens=9, temperature=0, ignore_eos=True).ids[4]
    config = LlamaConfig(**{**vars(TINY), "eos_ids": (259, eos)})
    llama = make_llama(ops, config)
    completion = llama.generate([1, 5], max_new_tokens=9, temperature=0)
    assert completion.finish_reason == "eos"
    assert completion.ids[-1] == eos
    assert eos not in completion.ids[:-1]
    assert completion.text == llama.tokenizer.decode(completion.ids[:-1])
    on = llama.generate([1, 5], max_new_tokens=9, temperature=0, ignore_eos=True)
    assert on.ids[: len(completion.ids)] == completion.ids
    assert (len(on.ids), on.finish_reason) == (9, "length")


@pytest.mark.array_calls
def test_a_stop_text_ends_the_completion_and_is_not_part_of_it(llama):
    options = {"max_new_tokens": 30, "temperature": 0, "ignore_eos": True}
    text = llama.generate([1, 5], **options).text
    assert len(text) > 8
    stop = text[4:7]
    for stops in (stop, [stop], ("never", stop)):
        stopped = llama.generate([1, 5], stop=stops, **options)
        assert stopped.text == text[: text.index(stop)]
        assert stopped.finish_reason == "stop"
        assert "".join(llama.stream([1, 5], stop=stops, **options)) == stopped.text


@pytest.mark.array_calls
def test_the_text_is_what_the_tokenizer_makes_of_prompt_and_completion(llama):
    prompts = [[1], [1, 100, 101], [1, 259, 100]] * 5
    sampling = Sampling(temperature=1.0, top_p=1)
    completions = run(llama, prompts, sampling=sampling, max_new_tokens=25, seed=0, ignore_eos=True)
    assert len({tuple(completion.ids) for completion in completions}) == len(prompts)
    for prompt, completion in zip(prompts, completions, strict=True):
        whole = llama.tokenizer.decode(prompt + completion.ids)
        assert whole == llama.tokenizer.decode(prompt) + completion.text


def test_an_empty_prompt_is_bos_alone(llama):
    options = {"max_new_tokens": 5, "temperature": 0}
    assert llama.generate("", **options).ids == llama.generate([1], **options).ids
    assert llama.generate(**options).ids == llama.generate([1], **options).ids


def test_a_text_prompt_is_its_ids(llama):
    options = {"max_new_tokens": 5, "temperature": 0}
    assert llama.generate("ab", **options).ids == llama.generate([1, 259, 100, 101], **options).ids


@pytest.mark.array_calls
def test_ids_beyond_the_tokenizer_are_never_chosen(ops):
    config = LlamaConfig(**{**vars(TINY), "vocab_size": 300})
    llama = make_llama(ops, config)
    assert llama.logits([1, 5])[:, 260:].max() > llama.logits([1, 5])[:, :260].mean()
    for temperature in (0, 5.0):
        ids = llama.generate(
            [1, 5], max_new_tokens=60, temperature=temperature, top_p=1, seed=0
        ).ids
        assert max(ids) < 260
    without = Llama(config, llama.parameters, ops)  # no tokenizer: all ids of the model
    ids = without.generate([1, 5], max_new_tokens=60, temperature=5.0, top_p=1, seed=0).ids
    assert max(ids) >= 260


def test_a_tokenizer_larger_than_the_model_is_refused(ops):
    config = LlamaConfig(**{**vars(TINY), "vocab_size": 200})
    with pytest.raises(TokenizerError, match="260 pieces, but the model has 200 embedding rows"):
        make_llama(ops, config)


def test_without_a_tokenizer_ids_work_and_text_says_what_is_missing(ops):
    llama = Llama(TINY, random_parameters(TINY, ops), ops)
    completion = llama.generate([1, 5], max_new_tokens=3, ignore_eos=True)
    assert len(completion.ids) == 3
    assert completion.text is None
    calls = [
        lambda: llama.generate("a"),
        lambda: llama.stream([1]),
        lambda: llama.generate([1], stop="x"),
        lambda: llama.encode(""),
    ]
    for call in calls:
        with pytest.raises(TokenizerError, match=r"no tokenizer\.model"):
            call()


def test_stream_raises_before_it_is_iterated(llama):
    with pytest.raises(InputError, match="temperature is -1"):
        llama.stream([1], temperature=-1)


@pytest.mark.array_calls
def test_a_stream_tells_its_completion_when_it_has_ended(llama):
    options = OPTIONS | {"max_new_tokens": 20}
    want = llama.generate(PROMPT, **options)
    stop = want.text[3:6]
    for more in ({}, {"stop": stop}, {"max_new_tokens": 0}):
        want = llama.generate(PROMPT, **options | more)
        stream = llama.stream(PROMPT, **options | more)
        assert stream.completion is None
        assert "".join(piece for piece in stream) == want.text
        got = stream.completion
        assert (got.ids, got.text, got.finish_reason) == (want.ids, want.text, want.finish_reason)
        assert got.log_probs == pytest.approx(want.log_probs, abs=1e-4)
        assert (got.seed, got.prompt_tokens) == (options["seed"], len(PROMPT))
        assert list(stream) == [] and stream.completion is got
    assert repr(stream).startswith("<TextStream ended: <Completion '")


def test_a_stream_that_is_left_tells_what_it_has_said(llama):
    whole = llama.generate(PROMPT, **OPTIONS)
    cache = llama.new_cache(context=30)
    stream = llama.stream(PROMPT, cache=cache, stop=whole.text[:4] + "?", **OPTIONS)
    assert repr(stream) == "<TextStream runs>"
    for _piece in stream:
        break
    stream.close()
    got = stream.completion
    assert got.finish_reason == "interrupted" and 0 < len(got.ids) < len(whole.ids)
    assert got.ids == whole.ids[: len(got.ids)] and whole.text.startswith(got.text)
    assert cache.ids[0] == (PROMPT + got.ids)[: cache.lengths[0]]  # for the next prompt
    assert list(stream) == [] and stream.completion is got
    unbegun = llama.stream(PROMPT, **OPTIONS)
    unbegun.close()
    assert (unbegun.completion.ids, unbegun.completion.finish_reason) == ([], "interrupted")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens is -1: expected a whole number"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5: expected a whole number"),
        ({"stop": ""}, "a stop text is empty"),
        ({"stop": ["a", ""]}, "a stop text is empty"),
        ({"stop": [None]}, "a stop text is None"),
        ({"stop": [5]}, "a stop text is 5"),
        ({"seed": -1}, "seed is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_logprobs": -1}, "top_logprobs is -1: expected a whole number from 0 to 20"),
        ({"top_logprobs": 21}, "top_logprobs is 21: expected a whole number from 0 to 20"),
        ({"top_logprobs": True}, "top_logprobs is True"),
    ],
)
def test_arguments_out_of_range_are_refused(llama, options, message):
    with pytest.raises(InputError, match=message):
        llama.generate([1], **options)


def test_prompts_of_another_kind_are_refused(llama):
    generator = (prompt for prompt in "ab")
    for prompts in ([], "abc", b"abc", generator, iter([[1]]), np.array(3), 5, None):
        with pytest.raises(InputError, match=r"^prompts is .* a list of at least one prompt$"):
            llama.generate_batch(prompts)
    for prompt in (5, b"abc", np.array(5)):
        with pytest.raises(InputError, match="expected a text or token ids"):
            llama.generate(prompt)
    with pytest.raises(InputError, match=r"llama\.encode\(text\) returns"):
        llama.logits("abc")
    with pytest.raises(InputError, match=r"sampling is 0\.7"):
        llama.generate_batch(["abc"], sampling=0.7)


@pytest.mark.parametrize("method", ["generate", "stream"])
@pytest.mark.parametrize(
    "prompts", [["a", "b"], ("a",), [[1, 5], [1]], [(1,)], np.ones((2, 3), dtype="int64")]
)
def test_several_prompts_are_pointed_to_the_method_that_takes_them(llama, method, prompts):
    with pytest.raises(InputError, match=r"^found several .* generate_batch\(prompts\) contin"):
        getattr(llama, method)(prompts)


@pytest.mark.array_calls
def test_one_prompt_may_be_a_generator_of_ids(llama):
    want = llama.generate(PROMPT, **OPTIONS).ids
    assert llama.generate((id_ for id_ in PROMPT), **OPTIONS).ids == want
    with pytest.raises(InputError, match="token id 'a' at position 0 is not an integer"):
        llama.generate(p for p in "ab")
    with pytest.raises(InputError, match=r"^found <generator .*: expected a list of token ids"):
        llama.logits(id_ for id_ in PROMPT)


@pytest.mark.array_calls
def test_none_is_the_default_of_every_optional_argument(llama):
    names = [*inspect.signature(Llama.generate).parameters][2:]
    nothing = dict.fromkeys(names)
    calls = {
        "generate": lambda options: llama.generate(None, **options).ids,
        "stream": lambda options: list(llama.stream(None, **options)),
        "generate_batch": lambda options: llama.generate_batch([""], **options)[0].ids,
        "new_generation": lambda options: list(llama.new_generation([""], **options)),
    }
    for name, call in calls.items():
        assert call(nothing | {"seed": 3}) == call({"seed": 3}), name
    lively = {"sampling": LIVELY, "seed": 3, "max_new_tokens": 12}  # None changes none of them
    assert calls["generate"](nothing | lively) == calls["generate"](lively)
    assert calls["generate"](lively) != calls["generate"](lively | {"sampling": None})


def test_decode_is_the_way_back_from_encode(ops, llama):
    text = "a b\nü"
    ids = llama.encode(text)
    assert llama.decode(ids) == llama.decode(np.array(ids)) == llama.decode(iter(ids)) == text
    assert llama.decode([]) == llama.decode([1]) == ""
    completion = llama.generate([1, 5], **OPTIONS)
    assert llama.decode(completion.ids) == llama.tokenizer.decode(completion.ids)
    for ids, message in (
        ("abc", "the ids are 'abc': expected token ids"),
        (5, "the ids are 5: expected token ids"),
        ([1, "a"], "token id 'a' at position 1 is not an integer"),
        ([[1, 5]], r"token id \[1, 5\] at position 0 is not an integer"),
        ([1, 260], "token id 260 is not in the tokenizer's vocabulary of 260"),
    ):
        with pytest.raises(InputError, match=message):
            llama.decode(ids)
    with pytest.raises(TokenizerError, match=r"no tokenizer\.model"):
        Llama(TINY, llama.parameters, ops).decode([1])


def test_the_prompt_of_a_batch_that_cannot_be_served_is_named(llama):
    too_long = [5] * (TINY.context_length + 1)
    with pytest.raises(InputError, match=r"^prompt 2 of 3: 65 tokens do not fit the context of 64"):
        llama.generate_batch([[1], too_long, too_long])
    with pytest.raises(InputError, match=r"^prompt 3 of 3: token id 260 at position 1"):
        llama.generate_batch(["a", "", [1, 260]])
    with pytest.raises(InputError, match=r"^prompt 1 of 2: the prompt is None"):
        llama.generate_batch([None, "a"])
    with pytest.raises(InputError, match=r"^65 tokens do not fit"):
        llama.generate_batch([too_long])


def test_numpy_integers_are_integers(llama):
    options = {"max_new_tokens": np.int64(3), "top_k": np.int32(5), "seed": np.int64(1)}
    assert len(llama.generate(np.array([1, 5]), ignore_eos=True, **options).ids) == 3


def test_fresh_text_has_no_leading_space(ops):
    llama = make_llama(ops)
    space = BYTE_PIECES.index(("\u2581", 0.0, 1))
    logits = llama.ops.head

    def head(x, p):  # generates a space, and then "a" forever
        out = ops.backend.to_host(logits(x, p)) * 0
        out[..., space if llama.spoken == 0 else 100] = 9
        llama.spoken += 1
        return ops.backend.to_device(out)

    llama.ops.head = head
    for fresh, text in ((False, " aa"), (True, "aa")):
        llama.spoken = 0
        options = {"max_new_tokens": 3, "temperature": 0, "fresh_text": fresh}
        assert llama.generate("b", **options).text == text
        llama.spoken = 0
        assert "".join(llama.stream("b", **options)) == text


def test_a_model_that_computes_nan_is_an_error(ops):
    llama = make_llama(ops)
    norm = np.full(TINY.dim, np.nan, dtype="float32")
    head = replace(llama.parameters.head, norm=ops.backend.to_device(norm))
    broken = Llama(TINY, replace(llama.parameters, head=head), ops)
    with pytest.raises(NumericalError, match="computed a log-probability of nan for token 1"):
        broken.generate([1, 5])


def test_a_cache_is_usable_after_logits_that_are_not_finite(llama, to_host):
    prompt, options = [1, 5, 6, 7], {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    want = llama.generate(prompt, **options).ids
    embedding = llama.parameters.embedding
    values = to_host(embedding.values).copy()
    values[77] = np.nan
    damaged = replace(embedding, values=llama.backend.to_device(values))
    llama.parameters = replace(llama.parameters, embedding=damaged)
    cache = llama.new_cache()
    with pytest.raises(NumericalError):
        llama.generate([*prompt[:3], *[77] * 9], cache=cache, **options)
    cache.keep(0, prompt)
    assert llama.generate(prompt, cache=cache, **options).ids == want


def test_a_batch_that_does_not_fit_the_memory_is_refused(llama, monkeypatch):
    monkeypatch.setattr(llama.backend, "free_bytes", lambda: 1_000_000)
    with pytest.raises(OutOfMemoryError, match=r"GB of (GPU )?memory needed .* 0\.00 GB are free"):
        llama.generate_batch([[1]] * 500, max_new_tokens=60, batch_size=500)


def test_timings_count_what_was_done(llama):
    completion = llama.generate([1, 2, 3], max_new_tokens=5, ignore_eos=True, temperature=0)
    t = completion.timings
    assert (t.prompt_tokens, t.new_tokens, t.decode_tokens) == (3, 5, 4)
    assert (t.prefill_forwards, t.decode_steps) == (1, 4)
    assert 0 < t.first_token_seconds <= t.prefill_seconds
    assert t.decode_tokens_per_second == pytest.approx(4 / t.decode_seconds)


def test_a_completion_of_a_batch_has_its_own_token_counts(llama):
    cache = llama.new_cache(batch=3)
    llama.prefill([1, 5, 6], cache, row=1)
    stop = llama.generate([1, 5, 6, 7], max_new_tokens=9, temperature=0, ignore_eos=True).text[:3]
    options = {"max_new_tokens": 9, "temperature": 0, "ignore_eos": True, "stop": stop}
    completions = llama.generate_batch([[1], [1, 5, 6, 7], [1, 8]], cache=cache, **options)
    assert [c.prompt_tokens for c in completions] == [1, 4, 2]
    assert [c.new_tokens for c in completions] == [len(c.ids) for c in completions]
    assert completions[1].new_tokens < completions[0].new_tokens == 9
    t = completions[1].timings
    assert (t.rows, t.prompt_tokens, t.new_tokens) == (3, 4, sum(c.new_tokens for c in completions))
    assert llama.generate([1, 5], max_new_tokens=2).timings.rows == 1


def test_what_is_printed_is_one_line_with_the_numbers_that_matter(llama):
    generation = llama.new_generation([[1], [1, 5, 6]], max_new_tokens=5, seed=7, ignore_eos=True)
    assert repr(generation) == "<Generation: 0 of 2 ended, 0 of at most 10 new tokens, seed 7>"
    generation.run()
    assert "2 of 2 ended, 10 of at most 10 new tokens" in repr(generation)
    completion = generation.completions()[1]
    completion.text = "a\n" * 50
    shown = "a\\n" * 28 + "a..."
    assert repr(completion) == f"<Completion '{shown}': 5 new tokens after 3, length, seed 7>"
    completion.text = None
    assert repr(completion) == "<Completion: 5 new tokens after 3, length, seed 7>"
    cache = llama.new_cache(batch=2, context=10)
    n_bytes = 2 * 2 * 2 * 3 * 10 * 8 * llama.cache_dtype.itemsize  # k and v, L, B, K, context, C
    size = f"{llama.cache_dtype.name}, {n_bytes / 1e6:.1f} MB>"
    assert repr(cache) == f"<KVCache of 2 x 10 positions, 0 filled in each row, {size}"
    llama.prefill([1, 5, 6], cache, row=1)
    assert "positions, 0 to 3 filled in each row" in repr(cache)
    assert repr(llama.tokenizer) == "<Tokenizer of 260 pieces and 0 added tokens, BOS 1, EOS 2>"
    n_bytes = llama.parameters.nbytes
    assert repr(llama) == (
        f"<Llama of 2 layers, D 48, V 260, {n_bytes / 1e6:.1f} MB in float32, context 64, "
        f"{llama.backend.name}>"
    )


def test_a_generation_runs_once(llama):
    generation = llama.new_generation([[1, 5]], max_new_tokens=5, ignore_eos=True)
    next(iter(generation))
    with pytest.raises(InputError, match="has run"):
        iter(generation)
    assert generation.completions()[0].finish_reason == "interrupted"


def test_what_was_held_back_is_said_when_a_row_is_interrupted(llama):
    options = {"max_new_tokens": 9, "sampling": GREEDY, "ignore_eos": True}
    whole = run(llama, [[1, 5]], **options)[0].text
    generation = llama.new_generation([[1, 5]], stop=whole[:6] + "?", **options)
    pieces = iter(generation)
    while len(generation.rows[0].ids) < 5:
        next(pieces)
    assert generation.rows[0].text == ""  # all of it may still become part of the stop text
    text = generation.completions()[0].text
    assert text
    assert whole.startswith(text)


def test_the_compiled_step_is_what_runs(llama, monkeypatch):
    calls = []

    def compile_step(step, frozen, constants):
        return lambda *args: calls.append(1) or step(*args)

    monkeypatch.setattr(llama.ops, "compile", compile_step)
    llama.generate([1, 5], max_new_tokens=5, ignore_eos=True)
    assert len(calls) == 4


def test_a_model_is_pickled_by_its_path(tmp_path, monkeypatch):
    write_model(tmp_path / "m", TINY)
    monkeypatch.chdir(tmp_path)
    one = load("m", "numpy", dtype="bfloat16", context=40, threads=1, rope_scaling="linear:4")
    want = one.generate("ab", **OPTIONS).ids
    pickled = pickle.dumps(one)
    assert len(pickled) < 1000
    monkeypatch.chdir("/")  # another process may have another working directory
    again = pickle.loads(pickled)
    assert (again.dtype, again.context, again.backend.name) == ("bfloat16", 40, "numpy")
    assert again.config == one.config and again.config.rope_scaling is not None
    assert again.generate("ab", **OPTIONS).ids == want
    assert pickle.dumps(again) == pickled
    shutil.rmtree(tmp_path / "m")
    with pytest.raises(InputError, match=r"/m does not exist: expected a model directory"):
        pickle.loads(pickled)
    assert copy.copy(one).parameters is one.parameters  # without reading files
    assert load(backend="numpy").__reduce__()[1][0] is None  # the shipped model


def test_a_model_that_cannot_be_pickled_says_why(ops, llama):
    with pytest.raises(InputError, match="by its path, and this one was not loaded from a dir"):
        pickle.dumps(llama)
    changed = load(backend="numpy")
    changed.parameters = replace(changed.parameters)
    with pytest.raises(InputError, match="by its path, and the weights of this one were replaced"):
        pickle.dumps(changed)


# -- a cache from the caller


PROMPT = [1, 5, 100, 7, 33, 8, 64, 9]
OPTIONS = {"max_new_tokens": 6, "seed": 3, "ignore_eos": True}


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_continuing_on_a_kept_cache_equals_starting_anew(llama, monkeypatch, chunk):
    whole = llama.generate(PROMPT, **OPTIONS)
    monkeypatch.setattr(llama.ops, "prefill_chunk", lambda: chunk)
    forward, widths = llama.forward, []
    monkeypatch.setattr(
        llama, "forward", lambda t, *a, **k: widths.append(t.shape[1]) or forward(t, *a, **k)
    )
    for split in range(len(PROMPT)):
        cache = llama.new_cache(context=30)
        if split:
            llama.prefill(PROMPT[:split], cache)
        completion = llama.generate(PROMPT, cache=cache, **OPTIONS)
        assert completion.ids == whole.ids
        assert completion.log_probs == pytest.approx(whole.log_probs, abs=2e-2)
        assert completion.timings.prompt_tokens == len(PROMPT) - split
        assert cache.ids[0] == (PROMPT + whole.ids)[:-1]
        assert cache.lengths == [len(PROMPT) + 5]
    assert max(widths) == min(chunk, len(PROMPT))


def test_a_batch_goes_on_from_rows_of_different_lengths(llama):
    prompts = [PROMPT, [1, 8], PROMPT[:5]]
    cache = llama.new_cache(batch=3, context=40)
    first = llama.generate_batch(prompts, cache=cache, max_new_tokens=4, seed=1, ignore_eos=True)
    longer = [p + c.ids + [50, 60] for p, c in zip(prompts, first, strict=True)]
    got = llama.generate_batch(longer, cache=cache, **OPTIONS)
    want = llama.generate_batch(longer, **OPTIONS)
    assert [c.ids for c in got] == [c.ids for c in want]
    assert got[0].timings.prompt_tokens == 3 * 3  # the last id of each, and the two after it


def test_a_row_that_ended_or_was_left_holds_what_is_known(llama):
    ids = llama.generate(PROMPT, **OPTIONS).ids
    ended, other = llama.new_cache(context=30), llama.new_cache(context=30)
    stop = next(iter(llama.stream(PROMPT, **OPTIONS)))
    said = llama.generate(PROMPT, cache=ended, stop=stop, **OPTIONS).ids
    assert ended.ids[0] == (PROMPT + said)[:-1]  # even if a step was launched ahead
    pieces = llama.new_generation([PROMPT], cache=other, **OPTIONS)
    running = iter(pieces)
    next(running), next(running)
    running.close()
    for cache in (ended, other):
        held = cache.ids[0]
        assert len(held) == cache.lengths[0] and held == (PROMPT + ids)[: len(held)]
        cache.truncate(0, len(PROMPT) - 1)
        assert llama.generate(PROMPT, cache=cache, **OPTIONS).ids == ids


def test_ctrl_c_in_a_forward_leaves_a_cache_that_can_go_on(llama, monkeypatch):
    want = llama.generate(PROMPT, **OPTIONS).ids
    cache = llama.new_cache(context=30)
    head, calls = llama.ops.head, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return head(*args)

    monkeypatch.setattr(llama.ops, "head", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llama.generate(PROMPT, cache=cache, **OPTIONS)
    cache.truncate(0, min(cache.lengths[0], len(PROMPT) - 1))
    assert llama.generate(PROMPT, cache=cache, **OPTIONS).ids == want


def interrupting(call, at):
    """`call`, but its at-th invocation starts with Ctrl-C."""
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return call(*args)

    return interrupted


def test_after_ctrl_c_a_stream_and_a_generation_keep_what_was_said(llama, monkeypatch):
    whole = llama.generate(PROMPT, **OPTIONS)
    head = llama.ops.head

    def left(run):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(llama.ops, "head", interrupting(head, 5))
            run()

    left(lambda: llama.generate(PROMPT, **OPTIONS))  # returns no partial completion
    stream, generation = llama.stream(PROMPT, **OPTIONS), llama.new_generation([PROMPT], **OPTIONS)
    left(lambda: list(stream))
    left(generation.run)
    for completion in (stream.completion, *generation.completions()):
        assert completion.finish_reason == "interrupted"
        assert 2 <= len(completion.ids) <= 4  # of four; results in flight are lost
        assert completion.ids == whole.ids[: len(completion.ids)]
        assert completion.text and whole.text.startswith(completion.text)
        assert len(completion.log_probs) == len(completion.ids)


MODULES = ("generation.py", "model.py", "kv_cache.py", "decode_step.py", "row.py")
"""Those that write to a cache."""


@pytest.mark.parametrize(("on", "stride"), [("numpy", 7), ("strict", 97)])
def test_ctrl_c_at_any_line_leaves_a_cache_that_says_what_it_holds(on, stride, monkeypatch):
    """Ctrl-C at every `stride`-th line.

    Afterwards the cache knows its ids, except if Ctrl-C came during the last lines, which record
    them. Then the error message of the next generation states how many positions can be kept.
    """
    # The end of a `with` block is traced as a line before `__exit__` is called, so the turn is not
    # released.
    monkeypatch.setattr("npllama.threads._turn", threads._Turn())
    llama = make_llama(make_ops(on))
    prompts = [PROMPT, [1, 8, 9]]
    options = OPTIONS | {"max_new_tokens": 4}
    want = [c.ids for c in llama.generate_batch(prompts, **options)]
    at, was_interrupted = 1, True
    while was_interrupted:
        cache = llama.new_cache(batch=2, context=30)
        generation = llama.new_generation(prompts, cache=cache, **options)
        was_interrupted = interrupted_at_line(at, generation.run, MODULES)
        for row, prompt in enumerate(prompts):
            assert cache.ids[row] == (prompt + want[row])[: len(cache.ids[row])]
        for _ in range(4):
            try:
                got = llama.generate_batch(prompts, cache=cache, **options)
                break
            except InputError as error:
                found = re.search(r"cache\.truncate\((\d), (\d+)\)", str(error))
                cache.truncate(int(found[1]), int(found[2]))
        assert [c.ids for c in got] == want, f"after Ctrl-C at line {at}"
        at += stride
    assert at > 600


@pytest.mark.parametrize(
    ("held", "prompt", "message"),
    [
        ([1, 5], [1, 6, 7], r"the prompt can reuse the first 1: call cache.truncate\(0, 1\)"),
        ([1, 5, 6], [1, 5, 6], r"reuse the first 2: call cache.truncate\(0, 2\)"),
        ([1, 5, 6], [1, 5], r"reuse the first 1: call cache.truncate\(0, 1\)"),
        ([1], list(range(3, 20)), "17 tokens do not fit the cache of 12 positions"),
    ],
)
def test_a_cache_that_holds_something_else_is_refused(llama, held, prompt, message):
    cache = llama.new_cache(context=12)
    llama.prefill(held, cache)
    with pytest.raises(InputError, match=message):
        llama.generate(prompt, cache=cache)
    assert cache.lengths == [len(held)]


def test_a_cache_of_another_model_or_batch_is_refused(ops, llama):
    with pytest.raises(InputError, match="not this model's"):
        llama.generate([1], cache=make_llama(ops, seed=1).new_cache())
    with pytest.raises(InputError, match="2 rows and there are 1 prompts"):
        llama.generate([1], cache=llama.new_cache(batch=2))
    cache = llama.new_cache()
    llama.forward(ops.backend.to_device(np.ones((1, 4), dtype="int32")), cache)
    with pytest.raises(InputError, match=r"4 positions, of which the ids of 0 are known"):
        llama.generate([1, 1, 1, 1, 5], cache=cache)


def test_the_caches_room_ends_a_completion(llama):
    completion = llama.generate(PROMPT, cache=llama.new_cache(context=10), seed=1, ignore_eos=True)
    assert (len(completion.ids), completion.finish_reason) == (2, "length")


def test_wherever_a_generation_is_left_the_cache_knows_what_it_holds(llama):
    prompts = [PROMPT, [1, 8, 9]]
    want = [c.ids for c in llama.generate_batch(prompts, **OPTIONS)]
    for n_steps in range(9):
        cache = llama.new_cache(batch=2, context=30)
        running = iter(llama.new_generation(prompts, cache=cache, **OPTIONS))
        for _ in range(n_steps):
            next(running)
        running.close()
        for row, prompt in enumerate(prompts):
            assert len(cache.ids[row]) == cache.lengths[row]
            cache.truncate(row, min(cache.lengths[row], len(prompt) - 1))
        again = llama.generate_batch(prompts, cache=cache, **OPTIONS)
        assert [c.ids for c in again] == want


def test_closing_an_iterator_ends_the_generation_whoever_refers_to_its_pieces(llama, monkeypatch):
    cache = llama.new_cache(context=30)
    generation = llama.new_generation([PROMPT], cache=cache, **OPTIONS)
    pieces = generation.pieces()
    monkeypatch.setattr(generation, "pieces", lambda: pieces)
    running = iter(generation)
    next(running), next(running)
    running.close()  # Python 3.12 does not release what a closed generator expression refers to
    assert pieces.gi_frame is None and cache.user is None
    assert len(cache.ids[0]) == cache.lengths[0]


def test_a_generation_that_was_made_before_another_ran_is_refused(llama):
    cache = llama.new_cache(context=30)
    first, second = (llama.new_generation([PROMPT], cache=cache, **OPTIONS) for _ in range(2))
    list(first)
    held = list(cache.ids[0])
    with pytest.raises(InputError, match=r"reuse the first 7: call cache.truncate\(0, 7\)"):
        list(second)
    assert cache.ids == [held] and cache.lengths == [len(held)]


def test_an_old_iterator_neither_goes_on_nor_writes_over_a_newer_ones_record(llama):
    cache = llama.new_cache(context=40)
    old = iter(llama.new_generation([[3, 4, 5]], cache=cache, **OPTIONS))
    next(old)
    cache.truncate(0, 0)
    newer = llama.generate(PROMPT, cache=cache, **OPTIONS)
    with pytest.raises(InputError, match="another generation uses the cache"):
        for _ in range(4):
            next(old)
    assert cache.ids[0] == (PROMPT + newer.ids)[:-1]
    longer = [*PROMPT, *newer.ids, 77]
    got = llama.generate(longer, cache=cache, **OPTIONS)
    assert got.ids == llama.generate(longer, **OPTIONS).ids


def test_ids_behind_unknown_ones_are_not_known(ops, llama):
    cache = llama.new_cache(context=30)
    llama.forward(ops.backend.to_device(np.array([[90, 91]], dtype="int32")), cache)
    llama.prefill([1, 5], cache)
    assert (cache.lengths, cache.ids) == ([4], [[]])


def test_an_error_in_the_head_leaves_the_cache_as_it_was(ops, llama, monkeypatch, to_host):
    cache = llama.new_cache(context=30)
    llama.prefill(PROMPT[:3], cache)
    with monkeypatch.context() as patch:
        patch.setattr(llama.ops, "head", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            llama.prefill(PROMPT[3:5], cache)
    assert cache.lengths == to_host(cache.device_lengths).tolist() == [3]
    assert (
        llama.generate(PROMPT, cache=cache, **OPTIONS).ids == llama.generate(PROMPT, **OPTIONS).ids
    )


def test_a_prompt_that_is_to_get_no_token_is_not_read(llama):
    cache = llama.new_cache(context=30)
    completion = llama.generate(PROMPT, cache=cache, max_new_tokens=0)
    assert (cache.lengths, completion.timings.prompt_tokens) == ([0], 0)


def test_prompts_may_be_arrays(llama):
    prompts = np.array([[1, 5], [1, 8]])
    got = llama.generate_batch(prompts, **OPTIONS)
    assert [c.ids for c in got] == [llama.generate_batch(prompts, **OPTIONS)[i].ids for i in (0, 1)]
    with pytest.raises(InputError, match="expected a text or token ids"):
        llama.generate(np.array(5))
    with pytest.raises(InputError, match="at least one prompt"):
        llama.generate_batch(np.zeros((0, 2), dtype="int64"))


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int16, np.int64])
def test_numbers_of_numpy_are_numbers(kind):
    llama = load(backend="numpy", context=kind(100), threads=kind(1))
    options = {"seed": 1, "ignore_eos": True}
    got = llama.generate("Once", max_new_tokens=kind(3), temperature=np.float32(0.5), **options)
    want = llama.generate("Once", max_new_tokens=3, temperature=0.5, **options)
    assert got.ids == want.ids and llama.context == 100
