"""What NumPy does better than sampling.py: most of a large vocabulary is left alone."""

import numpy as np

from npllama.backend import Array
from npllama.ops.sampling import SamplingEquations


class NumpySampling(SamplingEquations):
    """Overrides; each computes what the method of the same name in SamplingEquations does."""

    def keep_top_p(self, logits: Array, p: float) -> Array:
        """Only what can be among the kept is sorted: all tokens less likely than (1 - p) / V
        together are less likely than 1 - p, so those before them exceed p and they are dropped.

        Measured at V = 32,000, of which 1,000 can: 0.2 of the reference's time.
        """
        probability = self.softmax(logits)
        # half, since the sum of all is rounded; nothing where 1 - p is as small as that
        bound = (1 - p) / logits.shape[-1] / 2 if p < 1 - 1e-5 else 0
        kept = np.empty_like(logits)
        for row, likely, x in zip(kept, probability, logits, strict=True):
            falling = -np.sort(-likely[likely >= bound])
            before = np.cumsum(falling, dtype="float64") - falling
            least = falling[before <= p].min(initial=np.inf)  # of NaN nothing is left
            row[:] = np.where(likely < least, -np.inf, x)
        return kept

    def sample(self, logits: Array, uniform: Array) -> Array:
        """Of a row with few tokens left, among those alone: with 6 left of V = 32,000 0.6 of the
        reference's time, with most of them 1.1."""
        ids = np.empty(len(logits), dtype="int64")
        for i, x in enumerate(logits):
            is_left, u = x != -np.inf, uniform[i : i + 1]
            if not 0 < np.count_nonzero(is_left) <= len(x) // 4:
                ids[i] = super().sample(x[None], u)[0]
            else:
                left = np.flatnonzero(is_left)
                ids[i] = left[super().sample(x[None, left], u)[0]]  # (1, few) -> (1,)
        return ids
