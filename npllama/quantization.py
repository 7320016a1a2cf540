"""Weight-only int8 quantization: symmetric, one scale per output row.

    scale[o] = max_d |W[o, d]| / 127        values[o, d] = round(W[o, d] / scale[o])

Reasons for this scheme:

- The scale of a row is a factor of that row's output: y = (x values^T) * scale. A product needs no
  scaled copy of W, only one extra multiplication per output, on any backend.
- The rows of a trained matrix differ in magnitude far more than the elements within a row.
- Symmetric values need no offset.
- The error of each weight is at most scale / 2.

Embedding rows are scaled in the same way. Norms stay float32: they are small, and every activation
is multiplied by them.

Source: Dettmers et al. 2022 (LLM.int8), section 2.1, "row-wise" quantization, here of the weights
only.
"""

import numpy as np

LARGEST = 127


def quantize(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """W (O, D) in any float dtype -> values (O, D) int8 and scale (O,) float32.

    A row of zeros has scale 0 and zero values. A row with an infinity or a NaN has that as its
    scale and zero values, so each product with the row is NaN.
    """
    values = np.empty(w.shape, dtype="int8")
    scale = np.empty(w.shape[0], dtype="float32")
    rows = max(1, 2**20 // max(1, w.shape[1]))  # so that the float32 copy stays in the cache
    for begin in range(0, w.shape[0], rows):
        some = slice(begin, begin + rows)
        part = w[some].astype("float32")  # (rows, D)
        step = np.abs(part).max(axis=1) / LARGEST  # (rows, D) -> (rows,)
        has_scale = np.isfinite(step) & (step > 0)
        part[~has_scale] = 0  # includes rows whose step underflows float32
        part /= np.where(has_scale, step, 1)[:, None]
        np.rint(part, out=part)
        values[some] = np.clip(part, -LARGEST, LARGEST)  # a subnormal step may round past 127
        scale[some] = step
    return values, scale


def dequantize(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """values (O, D) int8, scale (O,) float32 -> W (O, D) float32. A damaged scale may give inf."""
    w = values.astype("float32")
    with np.errstate(over="ignore", invalid="ignore"):
        w *= scale[:, None]
    return w
