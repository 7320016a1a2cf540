"""Weight-only int8: symmetric, one scale an output row.

    scale[o] = max_d |W[o, d]| / 127        values[o, d] = round(W[o, d] / scale[o])

Why this scheme: the scale of a row is a factor of that row's output, so y = (x values^T) * scale
needs no widened W and one multiplication an output, on any backend; rows of a trained matrix
differ in size far more than the numbers within one; symmetric values need no offset; and the
error of each weight is at most scale / 2. Embedding rows are scaled alike. Norms stay float32:
they are few, and multiply everything.

Source: Dettmers et al. 2022 (LLM.int8), section 2.1, "row-wise" quantization, of weights alone.
"""

import numpy as np

LARGEST = 127


def quantize(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """W (O, D) in any float dtype -> values (O, D) int8 and scale (O,) float32.

    A row of zeros has scale 0 and stays zeros. A row with an infinity or a NaN has that as its
    scale, and zeros: each product with it is NaN.
    """
    values = np.empty(w.shape, dtype="int8")
    scale = np.empty(w.shape[0], dtype="float32")
    rows = max(1, 2**20 // max(1, w.shape[1]))  # the float32 copy of a few rows stays in cache
    for begin in range(0, w.shape[0], rows):
        some = slice(begin, begin + rows)
        part = w[some].astype("float32")  # (rows, D)
        step = np.abs(part).max(axis=1) / LARGEST  # (rows, D) -> (rows,)
        has_scale = np.isfinite(step) & (step > 0)
        part[~has_scale] = 0  # also where the step is too small for float32
        part /= np.where(has_scale, step, 1)[:, None]
        np.rint(part, out=part)
        values[some] = np.clip(part, -LARGEST, LARGEST)  # a subnormal step is not exact
        scale[some] = step
    return values, scale


def dequantize(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """values (O, D) int8 and scale (O,) float32 -> W (O, D) float32; a damaged scale gives inf."""
    w = values.astype("float32")
    with np.errstate(over="ignore", invalid="ignore"):
        w *= scale[:, None]
    return w
