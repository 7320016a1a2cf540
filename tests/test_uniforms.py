"""The random numbers of sampling are those of NumPy's Philox, and depend only on seed, row and
step."""

import numpy as np

from npllama.uniforms import uniforms

SEEDS = [0, 1, 2, 3, 2**32, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1]


def test_uniforms_are_those_of_numpys_philox():
    rows, steps = [0, 1, 7, 2**31], [0, 1, 5, 511, 4096]
    for seed in SEEDS:
        keys = [np.array([seed, row], dtype="uint64") for row in rows]
        want = [
            [
                np.random.Generator(np.random.Philox(key=k, counter=[0, 0, 0, step])).random()
                for k in keys
            ]
            for step in steps
        ]
        assert uniforms(seed, rows, steps).tolist() == want


def test_uniforms_stay_what_they_were():
    """A seed must give the same text in later versions."""
    assert uniforms(0, [0, 1], [0]).tolist() == [[0.011546754286331562, 0.8133540609793564]]
    assert uniforms(7, [2], [3]).tolist() == [[0.1448670800594859]]


def test_uniforms_are_a_function_of_seed_row_and_step_alone():
    whole = uniforms(5, range(8), range(10))
    np.random.seed(1)
    assert np.array_equal(uniforms(5, (7, 0), (9, 2)), whole[np.ix_((9, 2), (7, 0))])


def test_uniforms_differ_in_each_of_seed_row_and_step():
    every = [uniforms(seed, range(8), (0, 1, 2, 3, 4096)) for seed in SEEDS]
    assert len(set(np.stack(every).reshape(-1).tolist())) == len(SEEDS) * 8 * 5


def test_uniforms_are_below_1_and_even():
    numbers = uniforms(3, range(100), range(100)).reshape(-1)
    assert numbers.dtype == np.float64
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 45  # chi-square, 19 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(numbers[:-100], numbers[100:])[0, 1]) < 0.04  # the next step of a row
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.04  # the next row
