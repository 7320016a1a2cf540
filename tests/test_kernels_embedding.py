"""The derivative of the embedding on CUDA: sums rows per token, with the same bits in each run."""

import numpy as np
import pytest

from cuda_simulator import ORDERS, compiler
from npllama.ops import CupyOps
from npllama.parameters import Matrix
from strict_cupy import DEVICE, StrictCupyBackend

pytestmark = pytest.mark.skipif(compiler() is None, reason="no g++ 12 on this machine")


def derivative(dx, tokens, n_vocab):
    """The result of the kernel, and its launch."""
    ops = CupyOps(StrictCupyBackend())
    move = ops.backend.to_device
    w = Matrix(move(np.zeros((n_vocab, dx.shape[-1]), dx.dtype)))
    with DEVICE.recording() as launches:
        dw = ops.embedding_backward(move(dx), move(tokens), w)
    return ops.backend.to_host(dw), launches


def truth(dx, tokens, n_vocab):
    dw = np.zeros((n_vocab, dx.shape[-1]))
    np.add.at(dw, tokens.reshape(-1), dx.reshape(-1, dx.shape[-1]).astype("float64"))
    return dw


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 3e-7), ("float64", 1e-15)])
@pytest.mark.parametrize(
    ("n_vocab", "width", "batch", "n_new"),
    [(2, 5, 1, 1), (5, 6, 3, 33), (300, 7, 2, 9), (9, 600, 2, 20)],
)
def test_a_row_is_the_sum_over_the_places_of_its_token(n_vocab, width, batch, n_new, dtype, bound):
    rng = np.random.default_rng(0)
    dx = rng.standard_normal((batch, n_new, width)).astype(dtype)
    tokens = rng.integers(0, n_vocab, (batch, n_new))
    tokens[0, -1] = n_vocab - 1
    expected = truth(dx, tokens, n_vocab)
    for order in ORDERS:
        with DEVICE.thread_order(order):
            got, launches = derivative(dx, tokens, n_vocab)
        assert len(launches) == 1 and launches[0].name.startswith("embedding_backward<")
        assert got.dtype == dtype
        assert np.abs(got - expected).max() <= bound * np.abs(expected).max()


def test_two_runs_give_the_same_bits():
    """A token occurs 500 times, so another order of additions would change the last bits."""
    rng = np.random.default_rng(0)
    dx = rng.standard_normal((2, 500, 4), dtype="float32")
    tokens = np.where(rng.random((2, 500)) < 0.5, 1, 3)
    runs = []
    for order in ORDERS:
        with DEVICE.thread_order(order):
            runs.append(derivative(dx, tokens, 5)[0])
    assert all(np.array_equal(run.view("int32"), runs[0].view("int32")) for run in runs)
    backwards = derivative(dx[:, ::-1].copy(), tokens[:, ::-1].copy(), 5)[0]
    assert not np.array_equal(backwards, runs[0])
    assert np.abs(backwards - truth(dx, tokens, 5)).max() < 1e-4


def test_dx_is_read_once_and_dw_written_once():
    dx = np.ones((2, 10, 64), "float32")
    _, (launch,) = derivative(dx, np.arange(20).reshape(2, 10) % 7, 50)
    assert launch.read[0] == dx.nbytes
    assert launch.written[3] == 50 * 64 * 4
