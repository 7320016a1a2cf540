"""Changing the dtype of a tensor's numbers, and noticing what that loses."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from npllama.errors import WeightsError

_CHUNK = 2**20  # numbers at a time: temporaries stay in the cache, and small
_UNSIGNED = {2: np.dtype("uint16"), 4: np.dtype("uint32"), 8: np.dtype("uint64")}
_EXPONENT = {  # all ones in these bits is an infinity or not a number
    np.dtype("float16"): 0x7C00,
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
    np.dtype("float32"): 0x7F800000,
    np.dtype("float64"): 0x7FF0000000000000,
}
FLOATS = tuple(_EXPONENT)
_WIDE = (np.dtype(ml_dtypes.bfloat16), np.dtype("float32"))  # --dtypes of a large range


@dataclass
class Loss:
    """What a conversion changed: numbers in all, rounded, and rounded to 0 or a subnormal."""

    total: int = 0
    changed: int = 0
    underflowed: int = 0

    def __str__(self) -> str:
        share = 100 * self.changed / max(1, self.total)
        text = f"{self.changed:,} of {self.total:,} numbers changed ({share:.2f} %)"
        if self.underflowed:
            text += f", {self.underflowed:,} of them too small for the new format's full precision"
        return text


def check_finite(values: np.ndarray, where: str) -> None:
    """Refuse infinities and NaNs by their bits, which is as fast as reading them.

    Raises:
        WeightsError: naming the tensor and how many there are.
    """
    mask = _EXPONENT[values.dtype]
    bits = values.reshape(-1).view(_UNSIGNED[values.dtype.itemsize])
    bad = 0
    for begin in range(0, bits.size, _CHUNK):
        exponents = bits[begin : begin + _CHUNK] & bits.dtype.type(mask)
        if exponents.max(initial=0) == mask:
            bad += int((exponents == mask).sum())
    if bad:
        raise WeightsError(f"{where} holds {bad} infinities or NaNs: the checkpoint is broken")


def as_dtype(values: np.ndarray, dtype: np.dtype, where: str, loss: Loss) -> np.ndarray:
    """`values` in another float dtype, counting in `loss` the numbers that this changes.

    Raises:
        WeightsError: numbers that would become infinite, and the dtypes that hold them.
    """
    loss.total += values.size
    if values.dtype == dtype:
        return values
    out = np.empty(values.shape, dtype)
    source, target = values.reshape(-1), out.reshape(-1)
    smallest = float(ml_dtypes.finfo(dtype).smallest_normal)
    for begin in range(0, source.size, _CHUNK):
        some = slice(begin, begin + _CHUNK)
        wide = source[some]
        with np.errstate(over="ignore", under="ignore"):
            target[some] = wide
        if dtype.itemsize > wide.dtype.itemsize:
            continue  # widening loses nothing
        precise = np.promote_types(wide.dtype, np.float32)
        before, after = wide.astype(precise), target[some].astype(precise)
        if np.isinf(after).any():
            n, largest = int(np.isinf(after).sum()), float(ml_dtypes.finfo(dtype).max)
            raise WeightsError(
                f"{where} holds {n} or more numbers beyond {dtype}'s range of {largest:g}: "
                f"{_what_to_do(values)}"
            )
        is_changed = before != after
        loss.changed += int(is_changed.sum())
        loss.underflowed += int((is_changed & (np.abs(after) < smallest)).sum())
    return out


def _what_to_do(values: np.ndarray) -> str:
    extreme = np.array([values.min(), values.max()], "float64")
    with np.errstate(over="ignore"):
        holding = [d for d in _WIDE if np.isfinite(extreme.astype(d).astype("float64")).all()]
    if not holding:
        return "no format here holds them, the checkpoint is broken"
    return f"use --dtype {' or '.join(d.name for d in holding)}"
