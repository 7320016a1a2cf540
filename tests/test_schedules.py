"""Learning rates against their formulas, evaluated for whole runs with NumPy."""

import numpy as np
import pytest

from training.schedules import constant, cosine, wsd

PEAK = 2.0


def rates(schedule, n, **settings):
    return np.array([schedule(step, peak=PEAK, **settings) for step in range(n)])


def rising(warmup):
    return np.linspace(0, PEAK, warmup + 1)[1:]


@pytest.mark.parametrize(("warmup", "steps", "final"), [(4, 14, 0.1), (0, 11, 0.0), (13, 14, 0.5)])
def test_cosine_is_half_a_cosine_after_the_warmup(warmup, steps, final):
    angles = np.linspace(0, np.pi, steps - warmup)
    falling = PEAK * final + PEAK * (1 - final) * (1 + np.cos(angles)) / 2
    got = rates(cosine, steps, warmup=warmup, steps=steps, final=final)
    assert np.allclose(got, np.concatenate([rising(warmup), falling]), rtol=1e-12, atol=1e-15)


def test_a_cosine_of_one_step_is_its_peak():
    assert cosine(0, peak=PEAK, warmup=0, steps=1, final=0.5) == PEAK


@pytest.mark.parametrize(
    ("warmup", "steps", "decay", "final"),
    [(4, 20, 5, 0.1), (0, 11, 11, 0.0), (3, 10, 0, 0.0), (3, 10, 7, 0.25)],
)
def test_wsd_is_stable_and_then_falls_as_one_minus_a_root(warmup, steps, decay, final):
    done = np.linspace(0, 1, decay + 1)[1:] if decay else np.empty(0)
    falling = PEAK * final + PEAK * (1 - final) * (1 - done**0.5)
    stable = np.full(steps - warmup - decay, PEAK)
    got = rates(wsd, steps, warmup=warmup, steps=steps, decay=decay, final=final)
    assert np.allclose(got, np.concatenate([rising(warmup), stable, falling]), rtol=1e-12)
    if decay:
        assert got[-1] == pytest.approx(final * PEAK)


def test_wsd_before_its_decay_does_not_depend_on_its_length():
    short = rates(wsd, 15, warmup=3, steps=20, decay=5, final=0.0)
    long = rates(wsd, 15, warmup=3, steps=200, decay=50, final=0.0)
    assert np.array_equal(short, long)


@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_constant_is_constant_after_the_warmup(warmup):
    truth = np.concatenate([rising(warmup), np.full(9, PEAK)])
    assert np.allclose(rates(constant, warmup + 9, warmup=warmup), truth, rtol=1e-12)
