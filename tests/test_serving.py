"""Threads that share one model: each request has the same result as on its own."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from conftest import make_llama, make_ops
from npllama.errors import InputError, NumericalError, TokenizerError
from npllama.llama import Llama
from npllama.row import Row

WAIT = 60  # seconds until a test fails instead of waiting forever


@pytest.fixture(params=["numpy", "strict-cupy"])
def llama(request) -> Llama:
    return make_llama(make_ops(request.param))


REQUESTS = [
    ([1, 100, 7], {"temperature": 0, "seed": 0, "max_new_tokens": 12}),
    ([1, *range(5, 35)], {"seed": 1, "max_new_tokens": 20, "temperature": 1.5, "top_logprobs": 3}),
    ("ab", {"seed": 2, "max_new_tokens": 9, "temperature": 1.5, "repetition_penalty": 1.3}),
    ([1], {"temperature": 0, "seed": 3, "max_new_tokens": 30, "ignore_eos": True}),
    ([1] * 64, {"seed": 4}),
    ([1, 42], {"seed": 5, "max_new_tokens": 0}),
    ([1, 8], {"seed": 6, "max_new_tokens": 7, "temperature": 1.5, "top_logprobs": 1}),
    ([1, 9, 9], {"seed": 7, "max_new_tokens": 16, "top_k": 20, "temperature": 2.0}),
]


def likeliest(completion):
    """Ids, texts and rounded log-probabilities of the most likely tokens; None if they were not
    requested."""
    top = completion.top_logprobs
    return top and [[(t.id, t.text, pytest.approx(t.log_prob, abs=1e-4)) for t in at] for at in top]


def test_eight_threads_are_answered_as_if_each_were_alone(llama):
    want = [llama.generate(prompt, **options) for prompt, options in REQUESTS]
    is_slow = llama.backend.steps_ahead > 0  # a simulator runs the kernels
    for batch_size in (3,) if is_slow else (1, 3, 8):
        start = threading.Barrier(8)
        with llama.server(batch_size=batch_size) as server:

            def ask(request, server=server, start=start):
                prompt, options = request
                start.wait(WAIT)
                return server.generate(prompt, **options), [*server.stream(prompt, **options)]

            with ThreadPoolExecutor(8) as threads:
                answers = list(threads.map(ask, REQUESTS, timeout=WAIT))
        for (got, pieces), alone in zip(answers, want, strict=True):
            assert (got.ids, got.text, got.seed) == (alone.ids, alone.text, alone.seed)
            assert got.finish_reason == alone.finish_reason
            assert got.log_probs == pytest.approx(alone.log_probs, abs=1e-4)
            assert "".join(pieces) == alone.text
            assert likeliest(got) == likeliest(alone)
            assert got.prompt_tokens == alone.prompt_tokens
            assert got.timings.new_tokens == len(got.ids)


def test_requests_are_decoded_together(monkeypatch):
    llama = make_llama(make_ops("numpy"))
    sizes, compute = [], llama.compute
    monkeypatch.setattr(
        llama, "compute", lambda t, *rest: sizes.append(len(t)) or compute(t, *rest)
    )
    options = {"max_new_tokens": 50, "ignore_eos": True}
    with llama.server(batch_size=4) as server:
        with llama.ops.turn():  # delays decoding until all requests are made
            streams = [server.stream([1, i], seed=i, **options) for i in range(4)]
        texts = ["".join(stream) for stream in streams]
    assert texts == [llama.generate([1, i], seed=i, **options).text for i in range(4)]
    assert max(sizes) == 4 and sizes.count(4) > 30


def test_a_stream_has_its_completion_at_the_end(llama):
    with llama.server(batch_size=2) as server:
        stream = server.stream([1, 5], seed=1, max_new_tokens=6, stop="zz")
        assert iter(stream) is stream and stream.completion is None
        text = "".join(stream)
        assert stream.completion.text == text
        assert stream.completion.ids == llama.generate([1, 5], seed=1, max_new_tokens=6).ids
        with pytest.raises(StopIteration):
            next(stream)


@pytest.fixture
def at_third_token(monkeypatch):
    """A function that registers an action, which the server's thread runs at the third token of a
    prompt."""
    accept, actions = Row.accept, {}

    def act(row, id_, *rest):
        if len(row.ids) == 2 and tuple(row.prompt_ids) in actions:
            actions[tuple(row.prompt_ids)]()
        return accept(row, id_, *rest)

    monkeypatch.setattr(Row, "accept", act)
    return lambda prompt, action: actions.update({tuple(prompt): action})


@pytest.mark.parametrize("leave", ["close", "drop"])
def test_a_caller_that_leaves_makes_room(llama, leave, at_third_token):
    """With one row, the second request would wait for the end of the first one."""
    options = {"max_new_tokens": 20, "ignore_eos": True, "temperature": 0}
    reached, left = threading.Event(), threading.Event()
    at_third_token([1], lambda: reached.set() or left.wait(WAIT))
    with llama.server(batch_size=1) as server:
        stream = server.stream([1], **options)
        rows = [*server._requests]
        assert reached.wait(WAIT)
        if leave == "close":
            stream.close()
        else:
            del stream
            gc.collect()
        assert [row.finish_reason for row in rows] == ["interrupted"]
        left.set()
        assert server.generate([1, 5], **options).ids == llama.generate([1, 5], **options).ids
    assert len(rows[0].ids) <= 3


def test_closing_waits_for_the_requests_that_were_taken(llama):
    options = {"max_new_tokens": 9, "ignore_eos": True}
    server = llama.server(batch_size=1)
    streams = [server.stream([1, i], seed=i, **options) for i in range(3)]
    server.close()
    assert not server._thread.is_alive()
    texts = ["".join(stream) for stream in streams]
    assert texts == [llama.generate([1, i], seed=i, **options).text for i in range(3)]
    with pytest.raises(InputError, match="the server is closed"):
        server.generate([1])
    server.close()  # has no further effect


def test_cancelling_ends_the_requests_at_once(llama, at_third_token):
    reached, closing = threading.Event(), threading.Event()
    at_third_token([1, 0], lambda: reached.set() or closing.wait(WAIT))
    with pytest.raises(ZeroDivisionError), llama.server(batch_size=1) as server:
        streams = [server.stream([1, i], max_new_tokens=60, ignore_eos=True) for i in range(3)]
        assert reached.wait(WAIT)
        server._changed.notify_all = lambda: closing.set()  # called when it is cancelled
        raise ZeroDivisionError
    assert not server._thread.is_alive()
    for stream in streams:
        "".join(stream)
    assert streams[2].completion.finish_reason == "interrupted"
    assert streams[2].completion.ids == []


def test_wrong_requests_are_refused_in_their_callers_thread(llama):
    with llama.server(batch_size=2, context=32) as server:
        with pytest.raises(InputError, match="temperature is -1"):
            server.generate([1], temperature=-1)
        with pytest.raises(InputError, match="batch_size was given with a request: leave it out"):
            server.generate([1], batch_size=2)
        with pytest.raises(InputError, match="the prompt has 33 tokens: expected at most 32"):
            server.stream([1] * 33)
        with pytest.raises(TypeError, match="no keyword is named temprature"):
            server.generate([1], temprature=1)
        full = server.generate([1] * 30, max_new_tokens=9, ignore_eos=True)
        assert (len(full.ids), full.finish_reason) == (2, "length")
    for wrong in (0, 1.5, True):
        with pytest.raises(InputError, match="batch_size is"):
            llama.server(batch_size=wrong)
    with pytest.raises(InputError, match="a cache of 1 rows and 65 positions"):
        llama.server(batch_size=1, context=65)


def test_without_a_tokenizer_ids_work(llama):
    bare = Llama(llama.config, llama.parameters, llama.ops)
    with bare.server(batch_size=1) as server:
        assert server.generate([1, 5], max_new_tokens=3, ignore_eos=True).text is None
        with pytest.raises(TokenizerError):
            server.stream([1, 5])


def together(server, requests):
    """Submit each request in a separate thread, and return the results or exceptions."""

    def ask(request):
        prompt, options = request
        try:
            return server.generate(prompt, **options)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(requests)) as threads:
        return list(threads.map(ask, requests, timeout=WAIT))


def test_an_error_of_one_request_is_its_callers_alone(llama, monkeypatch):
    """In one request a token raises an error, in another one prefill fails."""
    accept, prefill = Row.accept, llama.prefill

    def refuse(row, id_, *rest):
        if row.prompt_ids == [1, 77] and len(row.ids) == 2:
            raise NumericalError("no such token")
        return accept(row, id_, *rest)

    def unreadable(ids, *rest):
        if ids == [1, 88]:
            raise MemoryError("no room")
        return prefill(ids, *rest)

    options = {"max_new_tokens": 9, "ignore_eos": True, "seed": 1}
    prompts = [[1, 5], [1, 77], [1, 88], [1, 6], [1, 77], [1, 7]]
    want = {i: llama.generate(prompts[i], **options).ids for i in (0, 3, 5)}
    monkeypatch.setattr(Row, "accept", refuse)
    monkeypatch.setattr(llama, "prefill", unreadable)
    for batch_size in (2, 8):
        with llama.server(batch_size=batch_size) as server:
            answers = together(server, [(prompt, options) for prompt in prompts])
        assert {i: answers[i].ids for i in want} == want
        assert [type(answers[i]) for i in (1, 2, 4)] == [
            NumericalError,
            MemoryError,
            NumericalError,
        ]


def test_numbers_that_are_not_finite_do_not_stay_in_the_cache(llama, at_third_token):
    """A row with NaN keys is cleared before the next prompt uses it."""

    def spoil():
        for layer in server._cache.layers:
            layer.k[...] = np.nan
            layer.v[...] = np.nan

    at_third_token([1, 5, 6], spoil)
    options = {"max_new_tokens": 9, "temperature": 0, "ignore_eos": True}
    with llama.server(batch_size=1) as server:
        with pytest.raises(NumericalError, match="log-probability of nan"):
            server.generate([1, 5, 6], **options)
        assert server.generate([1, 9], **options).ids == llama.generate([1, 9], **options).ids


def test_after_a_step_that_failed_the_next_requests_are_served(llama, monkeypatch):
    options = {"max_new_tokens": 9, "ignore_eos": True, "seed": 1}
    want = llama.generate([1, 5], **options).ids
    compute = llama.compute

    def fail(tokens, *rest):
        if tokens.shape[1] == 1 and len(tokens) == 1:
            raise RuntimeError("the device is gone")
        return compute(tokens, *rest)

    with llama.server(batch_size=2) as server:
        with monkeypatch.context() as patch:
            patch.setattr(llama, "compute", fail)
            with pytest.raises(RuntimeError, match="the device is gone"):
                server.generate([1, 5], **options)
        assert server.generate([1, 5], **options).ids == want
