"""Faster sampling for NumPy: the unlikely tokens of a large vocabulary are not sorted or summed.

Measurements: tools/README.md.
"""

import numpy as np

from npllama.backend import Array
from npllama.ops.sampling import SamplingEquations


class NumpySampling(SamplingEquations):
    """Overrides. Each computes the same result as the method of that name in SamplingEquations."""

    def keep_top_p(self, logits: Array, p: float) -> Array:
        """Top-p, with a sort of only those tokens that may be kept.

        A token is called unlikely here if its probability is below (1 - p) / V. The probabilities
        of all unlikely tokens add up to less than 1 - p, so those of the other tokens add up to
        more than p. Top-p therefore drops all unlikely tokens, and they need no sorting.
        """
        probability = self.softmax(logits)
        # The bound is halved because the computed probabilities do not add up to exactly 1. If
        # 1 - p is as small as this rounding error, all tokens are sorted.
        bound = (1 - p) / logits.shape[-1] / 2 if p < 1 - 1e-5 else 0
        kept = np.empty_like(logits)
        for row, likely, x in zip(kept, probability, logits, strict=True):
            falling = -np.sort(-likely[likely >= bound])
            before = np.cumsum(falling, dtype="float64") - falling
            least = falling[before <= p].min(initial=np.inf)  # no element is selected if x has NaN
            row[:] = np.where(likely < least, -np.inf, x)
        return kept

    def sample(self, logits: Array, uniform: Array) -> Array:
        """Sampling with the softmax and the cumulative sum of only the tokens that are left.

        These are the tokens that the filters have not set to -inf. Selecting them takes time too,
        so a row with more than a quarter of its tokens left goes to the reference.
        """
        ids = np.empty(len(logits), dtype="int64")
        for i, x in enumerate(logits):
            is_left, u = x != -np.inf, uniform[i : i + 1]
            if not 0 < np.count_nonzero(is_left) <= len(x) // 4:
                ids[i] = super().sample(x[None], u)[0]
            else:
                left = np.flatnonzero(is_left)
                ids[i] = left[super().sample(x[None, left], u)[0]]  # (1, few) -> (1,)
        return ids
