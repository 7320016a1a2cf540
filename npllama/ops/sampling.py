"""From logits to the next token: the mathematics of sampling, with its randomness an input.

Each filter is a threshold: what falls below it becomes -inf, and equals stay together, so a
backend may find the threshold any way it likes and choose the same token.
Order: repetition penalty, temperature, top-k, top-p, min-p, sample.
"""

import math
from typing import Protocol

from npllama.backend import Array
from npllama.ops.equations import Equations


class SamplingParameters(Protocol):
    """What `next_token` reads; npllama.sampling.Sampling is one, checked."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float: ...
    @property
    def repetition_penalty(self) -> float: ...


class SamplingEquations(Equations):
    """Logits are (B, V) float32 throughout; a token that cannot be sampled has -inf."""

    def penalize_repetition(self, logits: Array, seen: Array, penalty: float) -> Array:
        """x_i / penalty where x_i > 0, x_i * penalty below, for the tokens already `seen`.

        Args:
            seen: (B, V) bool, the tokens of each row's prompt and completion so far.

        Source: Keskar et al. 2019 (CTRL), section 4.1, with Hugging Face's care for signs.
        """
        xp = self.xp
        penalized = xp.where(logits > 0, logits / penalty, logits * penalty)
        return xp.where(seen, penalized, logits)

    def keep_top_k(self, logits: Array, k: int) -> Array:
        """The k largest logits (and equals of the k-th), the rest -inf; (B, V) -> (B, V).

        Source: Fan et al. 2018, section 5.4.
        """
        n = logits.shape[-1]
        k = min(k, n)
        kth = self.xp.partition(logits, n - k, axis=-1)[..., n - k, None]  # (B, V) -> (B, 1)
        return self.xp.where(logits < kth, -math.inf, logits)

    def keep_top_p(self, logits: Array, p: float) -> Array:
        """The fewest most likely tokens whose probabilities exceed p together, the rest -inf.

        (B, V) -> (B, V). A token is dropped where the sum of those more likely exceeds p. The
        token that crosses p is kept. Where a sum is exactly p, the next token is kept too, as in
        Meta's code, which drops where cumsum - p_i > p; the paper's ">= p" would keep one less.

        Source: Holtzman et al. 2019 (nucleus sampling), equation 2.
        """
        xp = self.xp
        probability = self.softmax(logits)
        falling = -xp.sort(-probability, axis=-1)  # (B, V), largest first
        before = xp.cumsum(falling, axis=-1, dtype="float64") - falling
        least = xp.where(before <= p, falling, math.inf).min(axis=-1, keepdims=True)  # (B, 1)
        return xp.where(probability < least, -math.inf, logits)

    def keep_min_p(self, logits: Array, p: float) -> Array:
        """The tokens at least p times as likely as the likeliest, the rest -inf.

        (B, V) -> (B, V).  p_i >= p * max_j p_j  is  x_i >= max x + log p.

        Source: Nguyen et al. 2024, section 3.
        """
        least = logits.max(axis=-1, keepdims=True) + math.log(p)  # (B, 1)
        return self.xp.where(logits < least, -math.inf, logits)

    def sample(self, logits: Array, uniform: Array) -> Array:
        """Inverse transform: the first token whose cumulative probability exceeds `uniform`.

        Args:
            uniform: (B,) in [0, 1). The sum is float64 and not assumed to be 1, nor to stay as
                it is behind the last token that has a probability: a device adds in another
                order. So that token is reached, and none with -inf ever is.

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

    def next_token(
        self,
        logits: Array,
        uniform: Array,
        sampling: SamplingParameters,
        seen: Array | None = None,
        n_tokens: int | None = None,
        allowed: Array | None = None,
    ) -> tuple[Array, Array]:
        """Choose each row's next token.

        Args:
            logits: (B, V) float32.
            uniform: (B,) float64 in [0, 1); unused at temperature 0, which takes the likeliest.
            sampling: temperature, top_k (0: all), top_p (1: all), min_p (0: all),
                repetition_penalty (1: none).
            seen: (B, V) bool, needed where repetition_penalty is not 1; updated in place.
            n_tokens: only ids below it are chosen; a model's vocabulary may be padded beyond
                its tokenizer's.
            allowed: (n_tokens,) bool, the ids that are chosen; None for all of them.

        Returns:
            ids (B,) int64, and (B,) float32 log-probabilities of those ids under `logits`
            as they came in.
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
            # what is divided is at most 0, and by no less or more than float32 has room for: a
            # tiny temperature then is greedy, a huge one even, and neither inf nor 0 / 0
            temperature = min(max(sampling.temperature, 1e-30), 1e30)
            x = (x - x.max(axis=-1, keepdims=True)) / temperature
            if sampling.top_k > 0:
                x = self.keep_top_k(x, sampling.top_k)
            if sampling.top_p < 1:
                x = self.keep_top_p(x, sampling.top_p)
            if sampling.min_p > 0:
                x = self.keep_min_p(x, sampling.min_p)
            ids = self.sample(x, uniform)
        row = xp.arange(ids.shape[0])
        if seen is not None:
            seen[row, ids] = True
        return ids, self.log_softmax(logits)[row, ids]
