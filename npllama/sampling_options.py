"""The table of sampling options. Python's keywords and the command line are derived from it.

The mathematics is in ops/sampling.py.
"""

import math
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from npllama.errors import InputError


@dataclass(frozen=True)
class Option:
    """Properties of one field of `Sampling`, in addition to its name, type and default.

    Attributes:
        least, most: bounds of the accepted values, both inclusive.
        expected: the accepted values in words, for error messages.
        metavar, help: what the command line's help shows.
        method: for a filter, the method of ops (see ops/sampling.py) that applies it, called as
            `method(logits, value)`. None if `next_token` reads the field itself.
        off: for a filter, the value that keeps every token.
    """

    least: float
    most: float
    expected: str
    metavar: str
    help: str
    method: str | None = None
    off: float | None = None


def option(default: float, **about: float | str) -> Any:
    """A field of `Sampling` with this default. `about` holds the attributes of its `Option`."""
    return field(default=default, metadata={"option": Option(**about)})


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The order is: repetition penalty, temperature, the filters in
    the order of their fields, then the random choice.

    Each field is a keyword of `Llama.generate`, `stream` and `generate_batch`, and an option of
    the command line. To add a filter, add a field here and the method of ops that it names.

    Raises:
        InputError: a value is out of range.

    >>> Sampling(top_k=40)
    Sampling(temperature=0.6, top_k=40, top_p=0.9, min_p=0.0, repetition_penalty=1.0)
    >>> list(Sampling(top_k=40).filters())
    [('keep_top_k', 40), ('keep_top_p', 0.9)]
    """

    temperature: float = option(
        0.6,
        least=0,
        most=sys.float_info.max,
        expected="0 or above",
        metavar="T",
        help="0 always takes the most likely token; higher values vary the text more",
    )
    top_k: int = option(
        0,
        least=0,
        most=math.inf,
        expected="a whole number from 0, 0 for all",
        metavar="K",
        help="choose among the K most likely tokens; 0 for all",
        method="keep_top_k",
        off=0,
    )
    top_p: float = option(
        0.9,
        least=sys.float_info.min,
        most=1,
        expected="above 0 and at most 1",
        metavar="P",
        help="choose among the fewest tokens whose probabilities add up to more than P; 1 for all",
        method="keep_top_p",
        off=1,
    )
    min_p: float = option(
        0.0,
        least=0,
        most=1,
        expected="from 0 to 1",
        metavar="P",
        help="leave out tokens whose probability is less than P times the highest; 0 for none",
        method="keep_min_p",
        off=0,
    )
    repetition_penalty: float = option(
        1.0,
        least=1e-3,
        most=1e3,
        expected="0.001 to 1000, 1 for none",
        metavar="X",
        help="above 1, makes tokens that the text already has less likely; 1 for none",
    )

    def __post_init__(self) -> None:
        for option_field in fields(self):
            about, value = option_field.metadata["option"], getattr(self, option_field.name)
            if isinstance(value, np.generic):  # a NumPy float64 would widen float32 arrays
                value = value.item()
                object.__setattr__(self, option_field.name, value)
            is_float, is_whole = isinstance(value, float), is_integer(value)
            is_number = is_whole or (option_field.type is float and is_float)
            holds = is_number and about.least <= value <= about.most
            expected = about.expected
            if option_field.type is float and not is_number:
                expected = f"a number, {expected}"
            elif is_float and not math.isfinite(value):
                expected = f"a finite number, {expected}"
            _require(option_field.name, value, holds, expected)

    def filters(self) -> Iterator[tuple[str, float]]:
        """(method of ops, value) of each filter that is not off, in the order of the fields."""
        for option_field in fields(self):
            about, value = option_field.metadata["option"], getattr(self, option_field.name)
            if about.method is not None and value != about.off:
                yield about.method, value


def checked_seed(seed: int | None) -> int:
    """`seed` itself, or a random seed for None.

    Raises:
        InputError: `seed` is not an integer in [0, 2^64).
    """
    if seed is None:
        return secrets.randbits(32)
    _require(
        "seed", seed, is_integer(seed) and 0 <= seed < 2**64, "a whole number from 0 below 2^64"
    )
    return int(seed)


def is_integer(value: object) -> bool:
    """Whether a value is a Python or NumPy integer and not a bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        shown = repr(value) if isinstance(value, str) else value  # str is shorter for NumPy scalars
        raise InputError(f"{name} is {shown}: expected {expected}")
