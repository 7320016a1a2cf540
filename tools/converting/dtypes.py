"""Changing the dtype of a tensor, and measuring what that loses."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from npllama.errors import WeightsError
from npllama.weight_formats import Format

_CHUNK = 2**20  # elements at a time, so that temporary arrays are small and stay in the cache
_UNSIGNED = {2: np.dtype("uint16"), 4: np.dtype("uint32"), 8: np.dtype("uint64")}
_EXPONENT = {  # the exponent bits; if all are ones, the element is an infinity or a NaN
    np.dtype("float16"): 0x7C00,
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
    np.dtype("float32"): 0x7F800000,
    np.dtype("float64"): 0x7FF0000000000000,
}
FLOATS = tuple(_EXPONENT)
_WIDE = (np.dtype(ml_dtypes.bfloat16), np.dtype("float32"))  # --dtypes with a large range


@dataclass
class Loss:
    """What a conversion lost.

    Attributes:
        relative_error: largest |new - old| / |old| among elements that a float dtype rounded to a
            normal number.
        underflowed: number of elements that became subnormal (and lost precision) or 0.
        zeroed: number of those that became 0.
        int8_error: largest |new - old| among elements rounded to int8, as a fraction of the
            largest |old| in the same row.
    """

    relative_error: float = 0.0
    underflowed: int = 0
    zeroed: int = 0
    int8_error: float = 0.0

    def lines(self) -> list[str]:
        """Lines for the user; empty if nothing was lost."""
        lines = []
        if self.relative_error:
            lines.append(f"largest relative error by rounding: {100 * self.relative_error:.3g} %")
        if self.underflowed:
            lines.append(
                f"elements too small for the new dtype's full precision: {self.underflowed:,}, "
                f"of which {self.zeroed:,} became 0"
            )
        if self.int8_error:
            lines.append(
                f"largest error by rounding to int8: {100 * self.int8_error:.3g} % of the largest "
                "element in the same row"
            )
        return lines


def check_finite(values: np.ndarray, where: str) -> None:
    """Refuse infinities and NaNs. The test of the exponent bits is as fast as reading memory.

    Raises:
        WeightsError: the tensor has some. The message states the tensor and their number.
    """
    mask = _EXPONENT[values.dtype]
    bits = values.reshape(-1).view(_UNSIGNED[values.dtype.itemsize])
    bad = 0
    for begin in range(0, bits.size, _CHUNK):
        exponents = bits[begin : begin + _CHUNK] & bits.dtype.type(mask)
        if exponents.max(initial=0) == mask:
            bad += int((exponents == mask).sum())
    if bad:
        raise WeightsError(
            f"{where} holds {bad} infinities or NaNs: the checkpoint is damaged, get it again"
        )


def as_dtype(values: np.ndarray, dtype: np.dtype, where: str, loss: Loss) -> np.ndarray:
    """Convert `values` to another float dtype, and record in `loss` what this loses.

    Raises:
        WeightsError: elements would become infinite. The message names dtypes that can hold them.
    """
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
                f"{where} holds {n} or more elements beyond {dtype}'s range of {largest:g}: "
                f"{_what_to_do(values)}"
            )
        _note(before, after, smallest, loss)
    return out


def quantized(w: np.ndarray, target: Format, loss: Loss) -> tuple[np.ndarray, ...]:
    """W (O, D) in a float dtype -> the arrays of a quantized format. Records in `loss` what this
    loses."""
    arrays = target.from_float(w)
    rows = max(1, _CHUNK // max(1, w.shape[1]))
    for begin in range(0, len(w), rows):
        some = slice(begin, begin + rows)
        before = w[some].astype("float32")  # (rows, D)
        error = target.to_float(*(array[some] for array in arrays))
        error -= before
        largest = np.abs(before, out=before).max(axis=1, initial=0)  # (rows, D) -> (rows,)
        error = np.abs(error, out=error).max(axis=1, initial=0)
        part = np.divide(error, largest, out=np.zeros_like(error), where=largest > 0)
        loss.int8_error = max(loss.int8_error, float(part.max(initial=0)))
    return arrays


def _note(before: np.ndarray, after: np.ndarray, smallest: float, loss: Loss) -> None:
    """Record in `loss` how elements changed. `smallest` is the smallest normal number."""
    is_normal = np.abs(after) >= smallest
    error = np.abs(after - before)
    loss.underflowed += np.count_nonzero(error[~is_normal])
    loss.zeroed += np.count_nonzero(before[after == 0])
    np.divide(error, np.abs(before), out=error, where=is_normal)
    loss.relative_error = max(loss.relative_error, float(error.max(where=is_normal, initial=0)))


def _what_to_do(values: np.ndarray) -> str:
    extreme = np.array([values.min(), values.max()], "float64")
    with np.errstate(over="ignore"):
        holding = [d for d in _WIDE if np.isfinite(extreme.astype(d).astype("float64")).all()]
    if not holding:
        return "no --dtype can hold them, so the checkpoint is damaged; get it again"
    return f"use --dtype {' or '.join(d.name for d in holding)}"
