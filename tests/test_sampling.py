"""From logits to a token: each filter against its formula, the order of the filters, and
sampling."""

import itertools
import math
from dataclasses import fields

import numpy as np
import pytest

from npllama.errors import InputError
from npllama.sampling_options import Sampling, checked_seed

SHAPES = [(1, 1), (1, 2), (3, 7), (2, 101), (5, 13)]
LARGEST_BELOW_1 = np.nextafter(1.0, 0.0)
PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


def sampling(**changes):
    return Sampling(**(PLAIN | changes))


# -- the formulas for one row, in float64


def softmax(x):
    e = [math.exp(v - max(x)) for v in x]
    return np.array(e) / math.fsum(e)


def keep(x, kept):
    return np.array([v if k else -math.inf for v, k in zip(x, kept, strict=True)])


def penalize(x, seen, penalty):
    moved = [v / penalty if v > 0 else v * penalty for v in x]
    return np.array([m if s else v for v, m, s in zip(x, moved, seen, strict=True)])


def top_k(x, k):
    least = sorted(x, reverse=True)[:k][-1]
    return keep(x, [v >= least for v in x])


def top_p(x, p):
    total, least = 0.0, math.inf
    for least in sorted(softmax(x), reverse=True):
        total += least
        if total > p:  # the token that crosses p is the last one kept
            break
    return keep(x, softmax(x) >= least)


def min_p(x, p):
    return keep(x, softmax(x) >= p * softmax(x).max())


def rows(function, x, *args):
    return np.stack([function(row, *args) for row in x])


def assert_equal_filters(got, truth):
    assert got.shape == truth.shape
    assert np.array_equal(np.isneginf(got), np.isneginf(truth))
    kept = ~np.isneginf(truth)
    assert np.array_equal(got[kept], truth[kept])


# -- each filter


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 2, 5, 1000])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_top_k_keeps_the_k_largest(ops, to_device, to_host, rng, shape, k, dtype):
    x = rng.standard_normal(shape).astype(dtype)
    y = to_host(ops.keep_top_k(to_device(x), k))
    assert y.dtype == dtype
    assert_equal_filters(y, rows(top_k, x, k))
    assert (np.isfinite(y).sum(axis=-1) == min(k, shape[1])).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_top_p_keeps_the_fewest_that_exceed_p(ops, to_device, to_host, rng, shape, p, dtype):
    x = (rng.standard_normal(shape) * 2).astype(dtype)
    y = to_host(ops.keep_top_p(to_device(x), p))
    assert y.dtype == dtype
    assert_equal_filters(y, rows(top_p, x, p))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [1e-9, 0.02, 0.3, 0.9])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_min_p_keeps_what_is_p_times_as_likely_as_the_likeliest(
    ops, to_device, to_host, rng, shape, p, dtype
):
    x = (rng.standard_normal(shape) * 2).astype(dtype)
    y = to_host(ops.keep_min_p(to_device(x), p))
    assert y.dtype == dtype
    assert_equal_filters(y, rows(min_p, x, p))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3, 5.0])
def test_repetition_penalty_moves_seen_tokens_alone(ops, to_device, to_host, rng, shape, penalty):
    x, seen = rng.standard_normal(shape), rng.random(shape) < 0.5
    y = to_host(ops.penalize_repetition(to_device(x), to_device(seen), penalty))
    truth = np.stack([penalize(*pair, penalty) for pair in zip(x, seen, strict=True)])
    assert np.array_equal(y, truth)
    if penalty > 1:
        assert (y[seen] < x[seen]).all()  # less likely, for both signs
    assert np.array_equal(y[~seen], x[~seen])


def test_the_token_that_crosses_p_is_kept(ops, to_device, to_host):
    x = np.log([[0.5, 0.3, 0.15, 0.05]])
    for p, n_kept in [(0.01, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.94, 3), (0.96, 4)]:
        y = to_host(ops.keep_top_p(to_device(x), p))
        assert np.isfinite(y[0]).tolist() == [i < n_kept for i in range(4)], p


@pytest.mark.parametrize(("p", "n_kept"), [(0.5, 2), (0.75, 3), (0.875, 5)])
def test_where_a_sum_is_p_exactly_the_next_token_is_kept(
    ops, to_device, to_host, monkeypatch, p, n_kept
):
    probability = np.array([[0.5, 0.25, 0.125, 0.0625, 0.0625]], dtype="float32")
    monkeypatch.setattr(ops, "softmax", lambda x: to_device(probability))  # without rounding
    x = to_device(np.log(probability))
    for at, kept in ((p, n_kept), (np.nextafter(p, 0), n_kept - 1 if p < 0.875 else 3)):
        y = to_host(ops.keep_top_p(x, float(at)))
        assert np.isfinite(y[0]).tolist() == [i < kept for i in range(5)]


def test_equals_stay_together(ops, to_device, to_host):
    x = to_device(np.array([[2.0, 1.0, 2.0, 0.0, 1.0, 1.0]]))
    for y, kept in [
        (ops.keep_top_k(x, 1), [0, 2]),
        (ops.keep_top_k(x, 3), [0, 1, 2, 4, 5]),
        (ops.keep_top_p(x, 0.1), [0, 2]),
        (ops.keep_top_p(x, 0.8), [0, 1, 2, 4, 5]),  # softmax is 0.31 0.11 0.31 0.04 0.11 0.11
        (ops.keep_min_p(x, 1.0), [0, 2]),
    ]:
        assert np.flatnonzero(np.isfinite(to_host(y)[0])).tolist() == kept


def test_filters_accept_what_others_have_excluded(ops, to_device, to_host):
    x = to_device(np.array([[-math.inf, 1.0, 3.0, -math.inf, 2.0]]))
    for y in (ops.keep_top_k(x, 2), ops.keep_top_p(x, 0.8), ops.keep_min_p(x, 0.3)):
        assert np.flatnonzero(np.isfinite(to_host(y)[0])).tolist() == [2, 4]
    assert np.isfinite(to_host(ops.keep_top_k(x, 4))).sum() == 3  # a logit of -inf stays excluded


# -- all filters together


def next_tokens(ops, x, uniform, parameters, seen=None, n_tokens=None, allowed=None):
    move, back = ops.backend.to_device, ops.backend.to_host
    allowed = None if allowed is None else move(allowed)
    seen = None if seen is None else move(seen.copy())  # next_token updates it in-place
    ids, log_probs = ops.next_token(move(x), move(uniform), parameters, seen, n_tokens, allowed)
    ids, log_probs = back(ids), back(log_probs)
    assert ids.dtype == np.int64 and log_probs.dtype == np.float32
    assert ids.shape == log_probs.shape == (len(x),)
    return ids, log_probs


def frequencies(ops, x, parameters, seen=None, n=4000, **kwargs):
    """How often each token is sampled for evenly spaced uniform numbers."""
    many = np.repeat(x[None].astype("float32"), n, axis=0)
    seen = None if seen is None else np.repeat(seen[None], n, axis=0)
    uniform = (np.arange(n) + 0.5) / n
    ids, _ = next_tokens(ops, many, uniform, parameters, seen, **kwargs)
    return np.bincount(ids, minlength=len(x)) / n


def probabilities(x, order, parameters, seen):
    """The distribution after applying the filters in this order."""
    step = {
        "repetition_penalty": lambda x: penalize(x, seen, parameters.repetition_penalty),
        "temperature": lambda x: x / parameters.temperature,
        "top_k": lambda x: top_k(x, parameters.top_k),
        "top_p": lambda x: top_p(x, parameters.top_p),
        "min_p": lambda x: min_p(x, parameters.min_p),
    }
    for name in order:
        x = step[name](x)
    return softmax(x)


ORDER = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")


@pytest.mark.parametrize(
    "swapped, x, changes",
    [
        (
            ("repetition_penalty", "top_k"),
            [3.0, 2.9, 2.8, 1.0],
            {"repetition_penalty": 2.0, "top_k": 2},
        ),
        (("temperature", "top_p"), [2.0, 1.5, 1.0, 0.0], {"temperature": 3.0, "top_p": 0.7}),
        (("top_k", "top_p"), [1.0, 0.9, 0.8, 0.7], {"top_k": 2, "top_p": 0.5}),
        (("top_p", "min_p"), [2.0, 1.5, 0.0, -0.2, -0.3, -0.4], {"top_p": 0.55, "min_p": 0.5}),
        (("temperature", "min_p"), [2.0, 1.0, 0.0, -1.0], {"temperature": 2.0, "min_p": 0.3}),
    ],
)
def test_filters_are_applied_in_the_published_order(ops, swapped, x, changes):
    x, seen = np.array(x), np.arange(len(x)) == 0
    parameters = sampling(**changes)
    order = [name for name in ORDER if name in swapped]
    truth = probabilities(x, order, parameters, seen)
    other = probabilities(x, order[::-1], parameters, seen)
    assert np.abs(truth - other).max() > 0.05  # the order matters for this input
    assert np.abs(frequencies(ops, x, parameters, seen) - truth).max() < 1e-3


def test_the_penalty_sees_the_signs_of_the_logits_as_they_came(ops):
    x, seen = np.array([2.0, 1.0, -1.0, -1.0]), np.array([True, False, True, False])
    truth = softmax([1.0, 1.0, -2.0, -1.0])
    sampled = frequencies(ops, x, sampling(repetition_penalty=2.0), seen)
    assert np.abs(sampled - truth).max() < 1e-3


@pytest.mark.array_calls
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 5.0},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"repetition_penalty": 1.7},
        {
            "temperature": 1.3,
            "top_k": 5,
            "top_p": 0.85,
            "min_p": 0.15,
            "repetition_penalty": 1.2,
        },
    ],
)
def test_tokens_are_sampled_as_often_as_they_are_probable(ops, rng, changes):
    x, seen = rng.standard_normal(9) * 2, rng.random(9) < 0.5
    parameters = sampling(**changes)
    active = [name for name in ORDER if name in changes]
    sampled = frequencies(ops, x, parameters, seen, n=4000)
    # with evenly spaced uniform numbers, the count of an interval is off by less than 1 at each end
    assert np.abs(sampled - probabilities(x, active, parameters, seen)).max() <= 1.5 / 4000


@pytest.mark.parametrize("n", [1, 3, 9])
def test_the_likeliest_are_in_falling_order_and_equals_in_that_of_their_ids(
    ops, to_device, to_host, rng, n
):
    logits = rng.standard_normal((3, 9)).round(1).astype("float32")
    logits[0, [2, 7]] = 4
    logits[1, 1:8] = -np.inf
    ids, log_probs = map(to_host, ops.likeliest(to_device(logits), n))
    want = np.argsort(-logits, axis=-1, kind="stable")[:, :n]
    log_p = logits - np.log(np.exp(logits.astype("float64")).sum(-1, keepdims=True))
    possible = np.take_along_axis(logits, want, axis=-1) > -np.inf  # ids of others are arbitrary
    assert np.array_equal(ids[possible], want[possible])
    assert np.allclose(log_probs, np.take_along_axis(log_p, want, axis=-1), atol=1e-5)
    assert (ids.dtype, log_probs.dtype) == ("int64", "float32")


def test_sample_is_the_first_token_whose_cumulative_probability_exceeds_the_uniform(
    ops, to_device, to_host
):
    x = np.log([[0.25, 0.5, 0.25]] * 8)
    uniform = np.array([0, 0.2499, 0.2501, 0.5, 0.7499, 0.7501, 0.9, LARGEST_BELOW_1])
    ids = to_host(ops.sample(to_device(x), to_device(uniform)))
    assert ids.tolist() == [0, 0, 1, 1, 1, 2, 2, 2]


def test_a_large_vocabulary_is_summed_precisely_enough_to_sample_its_end(ops, to_device, to_host):
    n = 30000  # with equal probabilities, a float32 sum would miss the end by many tokens
    wanted = np.array([0, 1, 14999, 29998, 29999])
    logits = to_device(np.zeros((len(wanted), n), dtype="float32"))
    assert to_host(ops.sample(logits, to_device((wanted + 0.5) / n))).tolist() == wanted.tolist()


@pytest.mark.parametrize("n", [3, 1000, 32000])
def test_the_ends_of_the_uniforms_sample_no_excluded_token(ops, to_device, to_host, rng, n):
    x = (rng.standard_normal((6, n)) * 3).astype("float32")
    x[:, 0] = x[:, -1] = x[1, : n // 2] = x[2, -(n // 2) :] = -math.inf
    allowed = np.isfinite(x)
    for u in (0.0, 5e-324, 0.5, 1 - 1e-12, LARGEST_BELOW_1):
        ids = to_host(ops.sample(to_device(x), to_device(np.full(6, u))))
        assert allowed[np.arange(6), ids].all(), u
        if u == 0:
            assert ids.tolist() == allowed.argmax(axis=-1).tolist()
        if u == LARGEST_BELOW_1 and n == 3:
            assert ids.tolist() == (n - 1 - allowed[:, ::-1].argmax(axis=-1)).tolist()


def test_a_sum_in_another_order_samples_no_excluded_token(ops, to_device, to_host, rng):
    """A device sums in blocks, so rounding may increase the sum after the last remaining token."""
    x = (rng.standard_normal((100, 4000)) * 3).astype("float32")
    x[:, 0] = x[:, 2000:] = -math.inf
    ids = to_host(ops.sample(to_device(x), to_device(np.full(100, LARGEST_BELOW_1))))
    assert np.isfinite(x[np.arange(100), ids]).all()


def test_numpy_numbers_become_pythons():
    """A NumPy float64 would widen float32 arrays, and CuPy's partition does not accept NumPy
    integers."""
    made = Sampling(np.float64(0.5), np.int32(3), np.float32(0.5), np.float64(0), np.int64(1))
    assert all(type(value) in (int, float) for value in vars(made).values())


@pytest.mark.parametrize("changes", [{"top_k": 3}, {"top_p": 0.4}, {"min_p": 0.5}])
@pytest.mark.parametrize("uniform", [0.0, 0.999999, LARGEST_BELOW_1])
def test_what_a_filter_drops_is_never_sampled(ops, rng, changes, uniform):
    x = rng.standard_normal((40, 53)).astype("float32")
    name, value = next(iter(changes.items()))
    allowed = np.isfinite(rows({"top_k": top_k, "top_p": top_p, "min_p": min_p}[name], x, value))
    assert not allowed[:, [0, -1]].all()  # in some rows the first or last token is excluded
    ids, _ = next_tokens(ops, x, np.full(40, uniform), sampling(**changes))
    assert allowed[np.arange(40), ids].all()


# -- greedy


def test_temperature_0_is_the_argmax_and_reads_no_uniform(ops, rng):
    x = rng.standard_normal((20, 31)).astype("float32")
    greedy = sampling(temperature=0.0, top_k=5, top_p=0.5, min_p=0.1)
    for uniform in (np.zeros(20), np.full(20, LARGEST_BELOW_1), np.full(20, math.nan)):
        ids, _ = next_tokens(ops, x, uniform, greedy)
        assert ids.tolist() == x.argmax(axis=-1).tolist()


def test_temperature_0_takes_the_first_of_equals(ops):
    x = np.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]], dtype="float32")
    ids, _ = next_tokens(ops, x, np.full(2, 0.9), sampling(temperature=0.0))
    assert ids.tolist() == [1, 0]


def test_temperature_0_heeds_the_repetition_penalty(ops):
    x = np.array([[3.0, 2.0, -1.0], [-1.0, -1.5, -9.0]], dtype="float32")
    seen = np.array([[True, False, False], [True, False, False]])
    greedy = sampling(temperature=0.0, repetition_penalty=2.0)
    ids, _ = next_tokens(ops, x, np.zeros(2), greedy, seen)
    assert ids.tolist() == [1, 1]


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-38, 1e-45, 1e-50, 5e-324])
@pytest.mark.parametrize("changes", [{}, {"top_k": 4, "top_p": 0.9, "min_p": 0.1}])
def test_tiny_temperatures_are_greedy_and_overflow_nowhere(ops, rng, temperature, changes):
    x = (rng.standard_normal((20, 31)) * 30).astype("float32")
    x[0] += 10000
    x[1] = -np.linspace(0, 1, 31)
    x[1, 7] = 0.001  # differs from the next by 1000 times the largest temperature
    for uniform in (0.0, 0.5, LARGEST_BELOW_1):
        parameters = sampling(temperature=temperature, **changes)
        ids, log_probs = next_tokens(ops, x, np.full(20, uniform), parameters)
        assert ids.tolist() == x.argmax(axis=-1).tolist()
        assert np.isfinite(log_probs).all()


def test_a_huge_temperature_is_even(ops):
    sampled = frequencies(ops, np.array([5.0, 1.0, -3.0, 0.0]), sampling(temperature=1e30))
    assert np.abs(sampled - 0.25).max() < 1e-3


@pytest.mark.parametrize("penalty", [1e-45, 1e-30, 1e-3, 1e3, 1e30, 1e300])
def test_extreme_penalties_are_refused_or_overflow_nowhere(ops, penalty):
    x = np.array([[3.0, 0.0, 2.0, -1.0]], dtype="float32")
    seen = np.array([[True, True, False, True]])
    likeliest = 2 if penalty > 1 else 0  # the token not seen, or the largest of the others
    for temperature in (0.0, 1.0):
        try:
            parameters = sampling(temperature=temperature, repetition_penalty=penalty, top_k=1)
        except InputError:
            assert not 1e-3 <= penalty <= 1e3
            return
        ids, log_probs = next_tokens(ops, x, np.array([0.5]), parameters, seen)
        assert ids.tolist() == [likeliest] and np.isfinite(log_probs).all()


# -- seen, n_tokens and log-probabilities


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_seen_is_updated_in_place(ops, to_device, to_host, rng, temperature, penalty):
    x = rng.standard_normal((5, 11)).astype("float32")
    before = rng.random((5, 11)) < 0.3
    seen = to_device(before.copy())
    parameters = sampling(temperature=temperature, repetition_penalty=penalty)
    ids, _ = ops.next_token(to_device(x), to_device(rng.random(5)), parameters, seen)
    after = before.copy()
    after[np.arange(5), to_host(ids)] = True
    assert np.array_equal(to_host(seen), after) and not np.array_equal(before, after)


def test_a_penalized_greedy_row_repeats_itself_only_when_all_is_seen(ops, to_device, to_host):
    x = to_device(np.array([[5.0, 4.0, 3.0, 2.9]], dtype="float32"))
    seen = to_device(np.zeros((1, 4), dtype=bool))
    greedy = sampling(temperature=0.0, repetition_penalty=2.0)
    said = [
        int(to_host(ops.next_token(x, to_device(np.zeros(1)), greedy, seen)[0])[0])
        for _ in range(5)
    ]
    assert said == [0, 1, 2, 3, 0]


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.0},
        {},
        {"top_k": 3},
        {"top_k": 500},
        {"top_p": 0.9},
        {"min_p": 0.01},
        {"repetition_penalty": 1.3},
        {"temperature": 0.0, "repetition_penalty": 1.3},
    ],
)
def test_ids_beyond_the_tokenizer_are_never_chosen(ops, rng, changes):
    x = rng.standard_normal((30, 20)).astype("float32")
    x[:, 17:] += 20
    seen = rng.random((30, 20)) < 0.5
    for uniform in (rng.random(30), np.full(30, LARGEST_BELOW_1)):
        ids, _ = next_tokens(ops, x, uniform, sampling(**changes), seen, n_tokens=17)
        assert ids.max() < 17
        alone, _ = next_tokens(ops, x[:, :17], uniform, sampling(**changes), seen[:, :17])
        assert ids.tolist() == alone.tolist()
    unlimited, _ = next_tokens(ops, x, np.full(30, 0.5), sampling(**changes), seen)
    assert unlimited.max() >= 17


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.0},
        {},
        {"temperature": 1e-30},
        {"top_k": 3},
        {"top_k": 500},
        {"top_p": 0.9},
        {"top_p": 0.9999999},
        {"min_p": 0.01},
        {"repetition_penalty": 1.3},
        {"temperature": 0.0, "repetition_penalty": 0.5},
    ],
)
def test_ids_that_are_not_allowed_are_never_chosen_and_the_others_as_if_alone(ops, rng, changes):
    x = rng.standard_normal((30, 20)).astype("float32")
    allowed = np.arange(18) < 9
    allowed[[12, 17]] = True  # gaps between allowed ids, and padding rows at the end
    x[:, 9:] += 20
    x[:, [12, 17]] -= 20
    x[0, [3, 17]] = 50
    seen = rng.random((30, 20)) < 0.5
    kept = np.flatnonzero(allowed)
    for uniform in (rng.random(30), np.zeros(30), np.full(30, LARGEST_BELOW_1)):
        ids, log_probs = next_tokens(ops, x, uniform, sampling(**changes), seen, 18, allowed)
        assert np.isin(ids, kept).all() and np.isfinite(log_probs).all()
        alone, _ = next_tokens(ops, x[:, kept], uniform, sampling(**changes), seen[:, kept])
        assert ids.tolist() == kept[alone].tolist()
    assert 17 in next_tokens(ops, x, np.full(30, 0.999), sampling(), seen, 18, allowed)[0]


@pytest.mark.parametrize("n_tokens", [None, 7])
def test_log_probabilities_are_of_the_logits_as_they_came(ops, rng, n_tokens):
    x = (rng.standard_normal((6, 10)) * 2).astype("float32")
    truth = np.log(rows(softmax, x.astype("float64")))
    everything = {"temperature": 0.3, "top_k": 4, "top_p": 0.8, "min_p": 0.1}
    for changes in (everything, {"temperature": 0.0}, {}):
        parameters = sampling(repetition_penalty=1.8, **changes)
        seen = rng.random((6, 10)) < 0.5
        ids, log_probs = next_tokens(ops, x, rng.random(6), parameters, seen, n_tokens)
        assert np.abs(log_probs - truth[np.arange(6), ids]).max() < 1e-5


def test_the_logits_themselves_are_left_as_they_came(ops, to_device, to_host, rng):
    x = rng.standard_normal((3, 9)).astype("float32")
    logits, seen = to_device(x.copy()), to_device(np.ones((3, 9), dtype=bool))
    parameters = Sampling(0.7, top_k=4, top_p=0.8, min_p=0.1, repetition_penalty=1.4)
    ops.next_token(logits, to_device(rng.random(3)), parameters, seen, 8)
    assert np.array_equal(to_host(logits), x)


def test_a_row_does_not_depend_on_the_rows_beside_it(ops, rng):
    x = (rng.standard_normal((7, 33)) * 2).astype("float32")
    uniform, seen = rng.random(7), rng.random((7, 33)) < 0.4
    parameters = Sampling(0.8, top_k=9, top_p=0.9, min_p=0.05, repetition_penalty=1.2)
    together, _ = next_tokens(ops, x, uniform, parameters, seen)
    for i in range(7):
        one = slice(i, i + 1)
        alone, _ = next_tokens(ops, x[one], uniform[one], parameters, seen[one])
        assert alone[0] == together[i]


# -- values of options


def test_each_filter_of_the_table_is_a_method_of_ops(ops):
    methods = [field.metadata["option"].method for field in fields(Sampling)]
    assert [m for m in methods if m] == ["keep_top_k", "keep_top_p", "keep_min_p"]
    assert all(callable(getattr(ops, method)) for method in methods if method)


def test_a_filter_at_the_value_that_keeps_all_is_not_called(ops, monkeypatch, rng):
    assert list(sampling().filters()) == []
    assert list(sampling(min_p=0.1, top_k=2).filters()) == [("keep_top_k", 2), ("keep_min_p", 0.1)]

    def refuse(*args):
        raise AssertionError("called")

    monkeypatch.setattr("npllama.ops.cuda.sampling.fits", lambda *_: False)  # forces array calls
    for method in ("keep_top_k", "keep_top_p", "keep_min_p", "penalize_repetition"):
        monkeypatch.setattr(ops, method, refuse)
    x = rng.standard_normal((2, 7)).astype("float32")
    next_tokens(ops, x, rng.random(2), sampling())
    for changes in ({"top_k": 1}, {"top_p": 0.9}, {"min_p": 0.1}, {"repetition_penalty": 1.1}):
        with pytest.raises(AssertionError, match="called"):
            next_tokens(ops, x, rng.random(2), sampling(**changes), np.zeros((2, 7), dtype=bool))


def test_positions_of_the_options_stay_what_they_were():
    """`Sampling(0.7, 40)` in existing programs keeps its meaning."""
    names = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty"]
    assert [field.name for field in fields(Sampling)][: len(names)] == names


@pytest.mark.parametrize(
    "name, value, expected",
    [
        *itertools.product(["temperature"], [-0.1, math.inf, math.nan, "0"], ["0 or above"]),
        *itertools.product(["top_k"], [-1, 2.0, 1.5, True, "5"], ["whole number"]),
        *itertools.product(["top_p"], [0, -0.1, 1.1, math.nan, "1"], ["above 0 and at most 1"]),
        *itertools.product(["min_p"], [-0.1, 1.1, math.nan, "0.5"], ["from 0 to 1"]),
        *itertools.product(
            ["repetition_penalty"], [0, -1, math.inf, math.nan, "1"], ["1 for none"]
        ),
    ],
)
def test_numbers_out_of_range_are_refused(name, value, expected):
    with pytest.raises(InputError) as error:
        Sampling(**{name: value})
    message = str(error.value)
    assert message.startswith(f"{name} is {value!r}: expected ") and expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0},
        {"temperature": 100.0},
        {"top_k": 0},
        {"top_k": 10**6},
        {"top_p": 1},
        {"top_p": 1e-300},
        {"min_p": 0},
        {"min_p": 1},
        {"min_p": 1e-300},
        {"repetition_penalty": 0.5},
    ],
)
def test_numbers_at_the_ends_of_their_ranges_work(ops, rng, changes):
    x = rng.standard_normal((3, 7)).astype("float32")
    seen = np.zeros((3, 7), dtype=bool)
    ids, _ = next_tokens(ops, x, rng.random(3), Sampling(**changes), seen)
    assert (ids >= 0).all() and (ids < 7).all()


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "5", True, math.nan])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises(InputError) as error:
        checked_seed(seed)
    message = str(error.value)
    assert message.startswith(f"seed is {seed!r}: expected a whole number")
    assert "\n" not in message


@pytest.mark.parametrize(
    "name, expected",
    [
        ("temperature", "a number, 0 or above"),
        ("top_k", "a whole number from 0, 0 for all"),
        ("top_p", "a number, above 0 and at most 1"),
        ("min_p", "a number, from 0 to 1"),
        ("repetition_penalty", "a number, 0.001 to 1000, 1 for none"),
    ],
)
def test_a_text_is_told_that_a_number_is_expected(name, expected):
    for value in ("0.5", None):
        with pytest.raises(InputError) as error:
            Sampling(**{name: value})
        assert str(error.value) == f"{name} is {value!r}: expected {expected}"


def test_an_integer_beyond_every_float_is_refused():
    with pytest.raises(InputError, match="expected 0 or above"):
        Sampling(10**400)


def test_a_number_of_numpys_is_shown_as_a_number():
    with pytest.raises(InputError, match=r"^temperature is -1\.5: expected"):
        Sampling(np.float64(-1.5))


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1, np.int64(7), np.uint64(2**64 - 1)])
def test_a_seed_is_itself(seed):
    assert checked_seed(seed) == seed and type(checked_seed(seed)) is int


def test_without_a_seed_there_is_a_random_one():
    seeds = {checked_seed(None) for _ in range(20)}
    assert len(seeds) > 15 and all(0 <= seed < 2**64 for seed in seeds)
