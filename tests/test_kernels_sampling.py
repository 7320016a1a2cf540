"""The kernel that chooses the next token, executed on the CPU, against float64."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest

from cuda_simulator import ORDERS, compiler
from npllama.backend import Backend
from npllama.ops import CupyOps, Ops
from npllama.ops.cuda import sampling as on_cuda
from npllama.ops.cuda.kernels import Kernels
from npllama.sampling_options import Sampling, option
from strict_cupy import DEVICE, StrictCupyBackend

pytestmark = pytest.mark.skipif(compiler() is None, reason="no g++ 12 on this machine")

ARGUMENTS = (
    "logits", "uniform", "seen", "allowed", "ids", "log_probs", "n_vocab", "n_tokens", "penalty",
    "sharpness", "top_k", "top_p", "log2_min_p",
)  # fmt: skip
LARGEST_BELOW_1 = np.nextafter(1.0, 0.0)
GREEDY, IN_SHARED, FROM_L2 = (
    f"next_token<{arguments}>" for arguments in ("false, false", "true, true", "true, false")
)
PLAIN = Sampling(1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
ALL = {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.25}
OPTIONS = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.25},
    {},
    {"temperature": 0.6},
    {"temperature": 1e-30, "top_k": 3, "top_p": 0.9},
    {"temperature": 1e30, "top_k": 4},
    {"temperature": 1e30, "top_p": 0.5},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 10**12},
    {"top_p": 1e-9},
    {"top_p": 0.9},
    {"top_p": 1 - 1e-7},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"repetition_penalty": 1.25},
    {"repetition_penalty": 0.5, "top_k": 5},
    ALL,
]


class Launcher(Kernels):
    """Kernels on the CuPy for tests, which records launches.

    Attributes:
        launched: the names of the launched kernels.
        read, written: bytes accessed in each argument of the last launch, summed over all threads.
    """

    def __init__(self, order="forward", max_shared=None):
        backend = StrictCupyBackend()
        super().__init__(backend)
        self.to_device, self.to_host = backend.to_device, backend.to_host
        self.launched, self._order = [], order
        if max_shared is not None:
            self.max_shared = max_shared

    def launch(self, *args, **kwargs):
        with DEVICE.thread_order(self._order), DEVICE.recording() as launches:
            super().launch(*args, **kwargs)
        (launch,) = launches
        self.launched.append(launch.name)
        self.read = dict(zip(ARGUMENTS, launch.read, strict=True))
        self.written = dict(zip(ARGUMENTS, launch.written, strict=True))


@dataclass
class Case:
    """Inputs of next_token.

    Attributes:
        x: (B, V) float32 logits.
        uniform: (B,) random numbers.
        seen, allowed: as in next_token. `check` does not change `seen`.
    """

    x: np.ndarray
    uniform: np.ndarray
    seen: np.ndarray | None = None
    n_tokens: int | None = None
    allowed: np.ndarray | None = None

    def run(self, kernels, sampling):
        x, uniform, seen, allowed = (
            None if a is None else kernels.to_device(a)
            for a in (self.x, self.uniform, self.seen, self.allowed)
        )
        found = on_cuda.next_token(kernels, x, uniform, sampling, seen, self.n_tokens, allowed)
        ids, log_probs = (kernels.to_host(a) for a in found)
        assert ids.dtype == np.int64 and log_probs.dtype == np.float32
        if seen is not None:
            expected = self.seen.copy()
            expected[np.arange(len(ids)), ids] = True
            assert np.array_equal(kernels.to_host(seen), expected)
        return ids, log_probs

    def check(self, kernels, sampling):
        """Compare ids and log-probabilities with float64, and return them."""
        ids, log_probs = self.run(kernels, sampling)
        right = [self.distribution(replace(sampling, top_p=p)) for p in about(sampling.top_p)]
        for b, id_ in enumerate(ids):
            assert any(self.may_choose(cumulative[b], b, id_) for cumulative in right), (b, id_)
        wide = self.x.astype("float64")
        truth = Ops(Backend()).log_softmax(wide)[np.arange(len(ids)), ids]
        assert np.abs(log_probs - truth).max() < 1e-6 * max(1, np.abs(truth).max())
        return ids, log_probs

    def distribution(self, sampling):
        """The cumulative probabilities after all filters, (B, V) float64."""
        ops, x = Ops(Backend()), self.x[:, : self.n_tokens].astype("float64")
        if self.allowed is not None:
            x = np.where(self.allowed, x, -np.inf)
        if sampling.repetition_penalty != 1:
            seen = self.seen[:, : self.n_tokens]
            x = ops.penalize_repetition(x, seen, sampling.repetition_penalty)
        if sampling.temperature == 0:
            likeliest = x.argmax(axis=-1)[:, None]
            return (np.arange(x.shape[1]) >= likeliest).astype("float64")
        x = ops.divide_by_temperature(x, sampling.temperature)
        for method, value in sampling.filters():
            x = getattr(ops, method)(x, value)
        return np.cumsum(ops.softmax(x), axis=-1)

    def may_choose(self, cumulative, b, id_):
        """Whether the uniform number is in this id's interval, or within 1e-6 of it."""
        before = cumulative[id_ - 1] if id_ else 0.0
        is_kept = cumulative[id_] > before
        u = self.uniform[b]
        return is_kept and before - 1e-6 <= u <= cumulative[id_] + 1e-6


def about(p):
    """p, and values that float32 cannot distinguish from p."""
    return [min(max(at, 1e-300), 1) for at in (p, p - 1e-6, p + 1e-6)] if p < 1 else [1]


def sampling(**changes):
    return replace(PLAIN, **changes)


def drawn(n_rows, n_vocab, kind="normal", seed=0):
    """Logits with a model's typical distribution or with many ties, and uniforms that include both
    ends."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n_rows, n_vocab), dtype="float32") * 3
    if kind == "equals":
        x = np.round(x * 4) / 4
    uniform = rng.random(n_rows)
    uniform[: n_rows // 3] = 0.0
    uniform[n_rows - n_rows // 3 :] = LARGEST_BELOW_1
    return Case(x, uniform, rng.random((n_rows, n_vocab)) < 0.3)


def check_in_three_orders(case, options, name, **launcher):
    """The ids are correct, and all thread orders return the same bits."""
    results = []
    for order in ORDERS:
        kernels = Launcher(order, **launcher)
        results.append(case.check(kernels, options))
        assert kernels.launched == [name]
    for ids, log_probs in results[1:]:
        assert ids.tobytes() == results[0][0].tobytes()
        assert log_probs.tobytes() == results[0][1].tobytes()


def name_of(options):
    return GREEDY if options.temperature == 0 else IN_SHARED


# -- ids and log-probabilities


@pytest.mark.parametrize("kind", ["normal", "equals"])
@pytest.mark.parametrize("changes", OPTIONS, ids=str)
def test_the_next_token_is_float64s_in_three_orders_of_the_threads(changes, kind):
    options = sampling(**changes)
    for n_rows, n_vocab in ((8, 5), (3, 40), (3, 1000), (1, 1024), (1, 1025)):
        check_in_three_orders(drawn(n_rows, n_vocab, kind), options, name_of(options))


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {"top_p": 0.9}, ALL], ids=str)
def test_a_vocabulary_of_llama(changes):
    options = sampling(**changes)
    kernels = Launcher("random")
    drawn(1, 32000).check(kernels, options)
    assert kernels.launched == [name_of(options)]


@pytest.mark.parametrize("changes", OPTIONS[2:], ids=str)
def test_a_row_that_shared_memory_has_no_room_for_is_read_again(changes):
    options = sampling(**changes)
    for n_rows, n_vocab in ((3, 40), (1, 1025)):
        check_in_three_orders(drawn(n_rows, n_vocab), options, FROM_L2, max_shared=0)


def test_a_large_vocabulary_is_read_again():
    kernels = Launcher(max_shared=163 * 1024)  # the limit of sm_80
    drawn(1, 50_001).check(kernels, sampling(**ALL))
    assert kernels.launched == [FROM_L2]


def test_every_token_of_the_largest_vocabulary_may_be_drawn():
    """The integer masses of 2^18 equally likely tokens sum to 2^62."""
    n = on_cuda.MOST_TOKENS
    for u, id_ in ((0.0, 0), (0.5, n // 2), (LARGEST_BELOW_1, n - 1)):
        case = Case(np.zeros((1, n), "float32"), np.array([u]))
        ids, _ = case.run(Launcher(), sampling(top_p=0.5))
        assert ids.tolist() == [id_]


@pytest.mark.parametrize("changes", OPTIONS, ids=str)
def test_only_tokens_below_n_tokens_and_allowed_are_chosen(changes):
    options = sampling(**changes)
    case = drawn(6, 300)
    case.n_tokens = 290
    case.allowed = np.arange(290) % 3 != 0
    case.x[:, 290:] += 50
    case.x[:, :290:3] += 20
    ids, _ = case.check(Launcher(), options)
    assert (ids < 290).all() and case.allowed[ids].all()


def test_tokens_are_drawn_as_often_as_they_are_probable():
    x = np.random.default_rng(0).standard_normal(77).astype("float32") * 2
    case = Case(np.tile(x, (600, 1)), (np.arange(600) + 0.5) / 600)
    ids, _ = case.check(Launcher(), sampling(top_p=0.95))
    share = np.diff(case.distribution(sampling(top_p=0.95))[0], prepend=0.0)
    assert np.abs(np.bincount(ids, minlength=77) / 600 - share).max() <= 1.5 / 600


# -- thresholds

A_LONG_TAIL = Case(
    np.array([[0.0, *(-8 - np.arange(2000) * 1e-3)]], "float32"), np.array([LARGEST_BELOW_1])
)
"""Many unlikely tokens share half of the probability, and the last token kept is drawn."""


ODD_ROWS = {
    "a factor 2 apart": np.ldexp(1.0, -np.arange(21)),
    "from the smallest to the largest": np.ldexp(1.0, np.arange(-126, 127, 4)),
    "both signs, as far apart as can be": np.array([3e38, -3e38, 1.0, -1.0, 2.9e38, 0.0]),
    "0 and -0": np.array([0.0, -0.0, -1.0, -0.0, 0.0, -2.0]),
    "neighbours": 7 + np.arange(50) * 2.0**-21,
    "masked by a large number": np.where(np.arange(90) % 7, -1e9, np.arange(90) / 20),
    "one token": np.array([3.0]),
    "all equal": np.full(70, -2.0),
    "-inf between": np.where(np.arange(50) % 2, -np.inf, np.arange(50) / 9),
}


@pytest.mark.parametrize("changes", OPTIONS, ids=str)
@pytest.mark.parametrize("row", ODD_ROWS)
def test_odd_rows(row, changes):
    x = np.array(ODD_ROWS[row], "float32")
    uniform = np.array([0.0, 0.3, 0.9, LARGEST_BELOW_1])
    case = Case(np.tile(x, (4, 1)), uniform, np.zeros((4, len(x)), bool))
    case.check(Launcher(), sampling(**changes))


@pytest.mark.parametrize("k", [1, 2, 31, 32, 33, 999, 1000, 1001])
def test_top_k_of_evenly_likely_tokens(k):
    """Places the threshold at almost every lane of a warp and in almost every bin."""
    x = np.arange(1000, dtype="float32")[None] * 1e-3
    for u, id_ in ((0.0, max(1000 - k, 0)), (LARGEST_BELOW_1, 999)):
        case = Case(x, np.array([u]))
        ids, _ = case.run(Launcher(), sampling(temperature=1e30, top_k=k))
        assert ids.tolist() == [id_]


def test_a_threshold_in_a_long_tail():
    for p in (0.8, 0.9, 0.99):
        ids, _ = A_LONG_TAIL.check(Launcher(), sampling(top_p=p))
        assert ids[0] > 100


# -- numerical errors


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {}, ALL], ids=str)
def test_a_logit_that_is_not_finite_is_told_by_the_log_probability(changes, bad):
    for n_vocab, place in ((5, 0), (1025, 1024), (40, 7)):
        case = drawn(2, n_vocab)
        case.x[0, place] = bad
        ids, log_probs = case.run(Launcher(), sampling(**changes))
        assert not math.isfinite(log_probs[0]) and math.isfinite(log_probs[1])
        assert ids.min() >= 0 and ids.max() < n_vocab


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("changes", OPTIONS, ids=str)
def test_a_row_of_nothing_else(changes, bad):
    case = drawn(1, 40)
    case.x[:], case.n_tokens = bad, 30
    ids, log_probs = case.run(Launcher(), sampling(**changes))
    assert 0 <= ids[0] < 30 and not math.isfinite(log_probs[0])


# -- bytes


def test_a_greedy_row_is_read_once():
    case, kernels = drawn(3, 1000), Launcher()
    case.run(kernels, sampling(temperature=0.0, top_k=5, top_p=0.5, min_p=0.1))
    assert kernels.read["logits"] == 3 * 1000 * 4
    assert kernels.written["ids"] == 3 * 8 and kernels.written["log_probs"] == 3 * 4
    assert kernels.written["seen"] == 3
    assert kernels.read["seen"] == kernels.read["uniform"] == kernels.read["allowed"] == 0
    case.run(kernels, sampling(temperature=0.0, repetition_penalty=1.25))
    # the chosen token is read again, for its log-probability
    assert kernels.read["logits"] == 3 * (1000 + 1) * 4
    assert kernels.read["seen"] == 3 * 1000


def test_a_row_in_shared_memory_is_read_once():
    case, kernels = drawn(3, 1000), Launcher()
    case.allowed = np.ones(1000, bool)
    case.run(kernels, sampling(**ALL))
    assert kernels.read["logits"] == 3 * (1000 + 1) * 4
    assert kernels.read["seen"] == kernels.read["allowed"] == 3 * 1000


def test_filters_that_are_off_cost_nothing():
    """Filters that are off add no pass over the logits."""
    passes = {}
    for name, changes in {
        "none": {}, "min_p": {"min_p": 0.1}, "top_k": {"top_k": 9}, "top_p": {"top_p": 0.7},
        "both": {"top_k": 9, "top_p": 0.7},
    }.items():  # fmt: skip
        kernels = Launcher(max_shared=0)
        drawn(1, 1024).run(kernels, sampling(**changes))
        passes[name] = kernels.read["logits"] / (1024 * 4)
    # the summary, the segments, and the token's segment of 32
    assert passes["none"] < 2.04 and passes["min_p"] == passes["none"]
    # a threshold takes two or three rounds of two passes each
    assert passes["none"] + 2 <= passes["top_k"] <= passes["none"] + 6
    assert passes["none"] + 2 <= passes["top_p"] <= passes["none"] + 6
    assert passes["both"] <= passes["none"] + 10


# -- supported inputs


@dataclass(frozen=True)
class MoreSampling(Sampling):
    """Options with a filter that the kernel does not support."""

    odd: int = option(
        0, least=0, most=1, expected="0 or 1", metavar="X", help="odd ids", method="keep_odd", off=0
    )


def test_a_filter_that_the_kernel_does_not_have_runs_as_array_calls(monkeypatch):
    ops = CupyOps(StrictCupyBackend())
    monkeypatch.setattr(
        ops,
        "keep_odd",
        lambda x, value: ops.xp.where(ops.xp.arange(x.shape[1]) % 2 == 0, -math.inf, x),
        raising=False,
    )

    def refuse(*args):
        raise AssertionError("launched")

    monkeypatch.setattr(on_cuda, "next_token", refuse)
    move, case = ops.backend.to_device, drawn(6, 20)
    arguments = move(case.x), move(case.uniform)
    ids, _ = ops.next_token(*arguments, MoreSampling(1.0, odd=1))
    assert (ops.backend.to_host(ids) % 2 == 1).all()
    with pytest.raises(AssertionError, match="launched"):
        ops.next_token(*arguments, MoreSampling(1.0, odd=0))


def test_what_fits():
    x = np.zeros((1, 9), "float32")
    for changes in OPTIONS:
        assert on_cuda.fits(x, sampling(**changes))
    assert not on_cuda.fits(x.astype("float64"), PLAIN)
    assert not on_cuda.fits(np.broadcast_to(x[:, :1], (1, 2**18 + 1)), PLAIN)


def test_filters_in_another_order_do_not_fit(monkeypatch):
    monkeypatch.setattr(on_cuda, "FILTERS", ("keep_top_p", "keep_top_k", "keep_min_p"))
    x = np.zeros((1, 9), "float32")
    assert on_cuda.fits(x, sampling(top_p=0.5, min_p=0.1))
    assert not on_cuda.fits(x, sampling(top_k=3, top_p=0.5))
