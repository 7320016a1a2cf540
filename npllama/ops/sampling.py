"""Sampling: from logits to the next token, with the random number as an input.

`next_token` applies, in this order, the repetition penalty, the temperature, and the filters in the
order of Sampling's fields. Then it samples a token.

Each filter sets all logits below a threshold to -inf, so it treats equal logits equally. The kept
tokens therefore do not depend on how a backend finds the threshold, for example by sorting or by
bisection.
"""

import math

from npllama.backend import Array
from npllama.ops.equations import Equations
from npllama.sampling_options import Sampling


class SamplingEquations(Equations):
    """The equations of sampling, on logits (B, V) float32. A logit of -inf excludes a token."""

    def penalize_repetition(self, logits: Array, seen: Array, penalty: float) -> Array:
        """x_i / penalty if x_i > 0, else x_i * penalty, for each token i that `seen` marks.

        Args:
            logits: (B, V).
            seen: (B, V) bool, the tokens of each row's prompt and completion so far.

        Returns:
            (B, V).

        Source: Keskar et al. 2019 (CTRL), section 4.1, which divides in both cases. For x_i <= 0
        this method multiplies, as Hugging Face transformers does. Dividing a negative logit by a
        penalty above 1 would make the token more likely.
        """
        xp = self.xp
        penalized = xp.where(logits > 0, logits / penalty, logits * penalty)
        return xp.where(seen, penalized, logits)

    def divide_by_temperature(self, logits: Array, temperature: float) -> Array:
        """(x_i - max x) / t, which has the same softmax as x_i / t; (B, V) -> (B, V).

        The dividend is at most 0, and t is clipped to [1e-30, 1e30]. A tiny temperature therefore
        gives the greedy choice and a huge one the uniform distribution, without overflow and
        without 0 / 0.

        Source: Hinton et al. 2015, equation 1.
        """
        temperature = min(max(temperature, 1e-30), 1e30)
        return (logits - logits.max(axis=-1, keepdims=True)) / temperature

    def keep_top_k(self, logits: Array, k: int) -> Array:
        """Keep the k largest logits, and all that equal the k-th largest. Set the others to -inf.

        (B, V) -> (B, V).

        Source: Fan et al. 2018, section 5.4.
        """
        n = logits.shape[-1]
        k = min(k, n)
        kth = self.xp.partition(logits, n - k, axis=-1)[..., n - k, None]  # (B, V) -> (B, 1)
        return self.xp.where(logits < kth, -math.inf, logits)

    def keep_top_p(self, logits: Array, p: float) -> Array:
        """Keep the smallest set of most likely tokens whose probabilities add up to more than p.

        (B, V) -> (B, V), with -inf for the other tokens. In order of decreasing probability, a
        token is dropped if the sum of the probabilities before it exceeds p. The token at which
        the sum crosses p is thus kept. If the sum is exactly p, the next token is kept too, as in
        Meta's code. The paper's condition, a sum of at least p, would drop that token. Tokens that
        are as likely as the last kept token are kept too.

        Source: Holtzman et al. 2019 (nucleus sampling), equation 2.
        """
        xp = self.xp
        probability = self.softmax(logits)
        falling = -xp.sort(-probability, axis=-1)  # (B, V), largest first
        before = xp.cumsum(falling, axis=-1, dtype="float64") - falling
        least = xp.where(before <= p, falling, math.inf).min(axis=-1, keepdims=True)  # (B, 1)
        return xp.where(probability < least, -math.inf, logits)

    def keep_min_p(self, logits: Array, p: float) -> Array:
        """Keep the tokens with p_i >= p * max_j p_j; set the logits of the others to -inf.

        (B, V) -> (B, V). For logits the condition is  x_i >= max x + log p.

        Source: Nguyen et al. 2024, section 3.
        """
        least = logits.max(axis=-1, keepdims=True) + math.log(p)  # (B, 1)
        return self.xp.where(logits < least, -math.inf, logits)

    def sample(self, logits: Array, uniform: Array) -> Array:
        """Inverse transform: the first token whose cumulative probability exceeds `uniform`.

        The cumulative probability is float64. Rounding may give a total other than 1. On a device,
        which adds in parallel, rounding may also make the cumulative sum at a token of probability
        0 differ from the sum at the token before. `uniform` is therefore scaled by the largest
        cumulative probability among the tokens with a positive probability, and only these tokens
        are returned.

        Args:
            logits: (B, V).
            uniform: (B,) in [0, 1).

        Returns:
            (B,) int64 ids.

        Source: Devroye 1986 (Non-Uniform Random Variate Generation), section II.2.
        """
        probability = self.softmax(logits)
        cumulative = self.xp.cumsum(probability, axis=-1, dtype="float64")  # (B, V)
        has_any = probability > 0
        total = (cumulative * has_any).max(axis=-1, keepdims=True)  # (B, V) -> (B, 1)
        exceeds = (cumulative > uniform[:, None] * total) & has_any
        return exceeds.argmax(axis=-1)  # (B, V) -> (B,)

    def likeliest(self, logits: Array, n: int) -> tuple[Array, Array]:
        """The n most likely tokens, in order of decreasing probability, with log-probabilities.

        Among tokens with equal logits, the one with the lowest id comes first. The method makes n
        passes over the logits instead of sorting them, because a CUDA graph can capture CuPy's
        reductions but not its sort.

        Args:
            logits: (B, V).
            n: at most V.

        Returns:
            ids (B, n) int64, and their log-probabilities (B, n) in the dtype of the logits.
        """
        xp = self.xp
        x, all_ids = self.log_softmax(logits), xp.arange(logits.shape[-1])
        ids = xp.empty((len(logits), n), dtype="int64")
        log_probs = xp.empty((len(logits), n), dtype=x.dtype)
        for i in range(n):
            ids[:, i] = x.argmax(axis=-1)  # (B, V) -> (B,)
            log_probs[:, i] = x.max(axis=-1)
            x = xp.where(all_ids == ids[:, i, None], -math.inf, x)
        return ids, log_probs

    def next_token(
        self,
        logits: Array,
        uniform: Array | None,
        sampling: Sampling,
        seen: Array | None = None,
        n_tokens: int | None = None,
        allowed: Array | None = None,
    ) -> tuple[Array, Array]:
        """Choose the next token of each row.

        Args:
            logits: (B, V) float32.
            uniform: (B,) float64 in [0, 1). It may be None at temperature 0, which chooses the
                most likely token.
            sampling: the options. The names in `sampling.filters()` are methods of this class.
            seen: (B, V) bool, the tokens of each row's prompt and completion so far. The chosen
                tokens are added in-place. It may be None if repetition_penalty is 1.
            n_tokens: only ids below n_tokens are chosen, because a model's vocabulary may be padded
                beyond its tokenizer's. None allows all V ids.
            allowed: (n_tokens,) bool, the ids that may be chosen; None allows all.

        Returns:
            ids (B,) int64, and their log-probabilities (B,) float32. The log-probabilities are
            those of the original logits, without penalty, temperature and filters.
        """
        xp = self.xp
        x = logits[:, :n_tokens]
        if allowed is not None:
            x = xp.where(allowed, x, -math.inf)
        if sampling.repetition_penalty != 1:
            x = self.penalize_repetition(x, seen[:, :n_tokens], sampling.repetition_penalty)
        if sampling.temperature == 0:
            ids = x.argmax(axis=-1)
        else:
            x = self.divide_by_temperature(x, sampling.temperature)
            for method, value in sampling.filters():
                x = getattr(self, method)(x, value)
            ids = self.sample(x, uniform)
        row = xp.arange(ids.shape[0])
        if seen is not None:
            seen[row, ids] = True
        return ids, self.log_softmax(logits)[row, ids]
