"""Random numbers as a function of (seed, row, step), by the counter-based generator Philox.

The text of a row therefore depends neither on the other rows of its batch, nor on the backend, nor
on random numbers that were generated before.
"""

from collections.abc import Sequence

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157))
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)  # added to the key in each round
_ROUNDS = 10
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def uniforms(seed: int, rows: Sequence[int], steps: Sequence[int]) -> np.ndarray:
    """One random number in [0, 1) per step and row.

    The number equals np.random.Generator(np.random.Philox(key=[seed, row], counter=[0, 0, 0,
    step])).random(): the upper 53 bits of the first output word of Philox4x64-10, divided by 2^53.

    Args:
        seed: an integer in [0, 2^64).
        rows: the numbers of the B rows.
        steps: the numbers of the steps.

    Returns:
        (n_steps, B) float64.

    Source: Salmon et al. 2011, section 3.3 (Philox).
    """
    step = np.array(steps, dtype="uint64")[:, None]  # (n_steps, 1)
    zeros = np.zeros((len(step), len(rows)), dtype="uint64")  # (n_steps, B)
    # NumPy increments the counter before it generates a number, so its first word is 1
    counter = [zeros + np.uint64(1), zeros, zeros, zeros + step]
    keys = [np.uint64(seed), np.array(rows, dtype="uint64")]  # (), (B,)
    with np.errstate(over="ignore"):  # the sums are modulo 2^64
        for round_ in range(_ROUNDS):
            high_0, low_0 = _product(counter[0], _MULTIPLIERS[0])
            high_1, low_1 = _product(counter[2], _MULTIPLIERS[1])
            key_0, key_1 = (
                key + np.uint64(round_ * weyl % 2**64)
                for key, weyl in zip(keys, _WEYL, strict=True)
            )
            counter = [high_1 ^ counter[1] ^ key_0, low_1, high_0 ^ counter[3] ^ key_1, low_0]
    return (counter[0] >> np.uint64(11)) * 2.0**-53


def _product(a: np.ndarray, b: np.uint64) -> tuple[np.ndarray, np.ndarray]:
    """The upper and the lower 64 bits of a * b, from products of 32-bit halves."""
    a_low, a_high = a & _LOW, a >> _HALF
    b_low, b_high = b & _LOW, b >> _HALF
    low, middle, cross = a_low * b_low, a_high * b_low, a_low * b_high
    carry = (low >> _HALF) + (middle & _LOW) + cross  # at most 2^64 - 1
    return a_high * b_high + (middle >> _HALF) + (carry >> _HALF), a * b
