"""What a user asks of sampling, checked; and the random numbers it gets.

The mathematics is in ops/sampling.py.
"""

import math
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from npllama.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Applied in the order: repetition penalty, temperature,
    top-k, top-p, min-p, draw.

    Attributes:
        temperature: 0 takes the likeliest token (greedy); logits are divided by it otherwise.
        top_k: only the k likeliest; 0 for all.
        top_p: only the fewest likeliest whose probabilities exceed p together; 1 for all.
        min_p: only those at least this times as likely as the likeliest; 0 for all.
        repetition_penalty: above 1, tokens of the prompt and the text so far become less
            likely; 1 for none.

    Raises:
        InputError: a number out of range.
    """

    temperature: float = 0.6
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        _require(
            "top_k",
            self.top_k,
            is_integer(self.top_k) and self.top_k >= 0,
            "a whole number from 0, 0 for all",
        )
        _require_between("temperature", self.temperature, 0, sys.float_info.max, "0 or above")
        _require_between("top_p", self.top_p, sys.float_info.min, 1, "above 0 and at most 1")
        _require_between("min_p", self.min_p, 0, 1, "from 0 to 1")
        penalty = self.repetition_penalty
        _require_between("repetition_penalty", penalty, 1e-3, 1e3, "0.001 to 1000, 1 for none")
        for name, value in vars(self).items():
            if isinstance(value, np.generic):  # which would widen float32 arrays
                object.__setattr__(self, name, value.item())


def checked_seed(seed: int | None) -> int:
    """The seed itself, or a random one for None.

    Raises:
        InputError: not an integer in [0, 2^64).
    """
    if seed is None:
        return secrets.randbits(32)
    _require(
        "seed", seed, is_integer(seed) and 0 <= seed < 2**64, "a whole number from 0 below 2^64"
    )
    return int(seed)


def uniforms(seed: int, rows: Sequence[int], step: int) -> np.ndarray:
    """One number in [0, 1) for each row's token number `step`: (B,) float64.

    Counter-based (Salmon et al. 2011, Philox): a function of (seed, row, step) alone, so a
    row's text does not depend on which other rows run, on the backend, or on what came before.
    """
    keys = [np.array([seed, row], dtype="uint64") for row in rows]
    streams = [np.random.Philox(key=key, counter=[0, 0, 0, step]) for key in keys]
    return np.array([np.random.Generator(stream).random() for stream in streams])


def is_integer(value: object) -> bool:
    """Whether a value is an integer of Python's or NumPy's, and no bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _require_between(name: str, value: object, least: float, most: float, expected: str) -> None:
    is_number = isinstance(value, float | np.floating) or is_integer(value)
    if not is_number:
        expected = f"a number, {expected}"
    elif not is_integer(value) and not math.isfinite(value):
        expected = f"a finite number, {expected}"
    _require(name, value, is_number and least <= value <= most, expected)


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        shown = repr(value) if isinstance(value, str) else value  # NumPy's have a long repr
        raise InputError(f"{name} is {shown}: expected {expected}")
