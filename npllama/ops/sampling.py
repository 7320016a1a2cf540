"""From logits to the next token: the mathematics of sampling, with its randomness an input.

Each filter is a threshold: what falls below it becomes -inf, and equals stay together, so a
backend may find the threshold any way it likes and choose the same token.
Order: repetition penalty, temperature, the filters in the order of Sampling's fields, sample.
"""

import math

from npllama.backend import Array
from npllama.ops.equations import Equations
from npllama.sampling_options import Sampling


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

    def divide_by_temperature(self, logits: Array, temperature: float) -> Array:
        """(x_i - max x) / t, whose softmax is that of x_i / t; (B, V) -> (B, V).

        The dividend is at most 0, and t stays within what float32 has room for: a tiny
        temperature is then greedy, a huge one even, and neither makes inf nor 0 / 0.

        Source: Hinton et al. 2015, equation 1.
        """
        temperature = min(max(temperature, 1e-30), 1e30)
        return (logits - logits.max(axis=-1, keepdims=True)) / temperature

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

    def likeliest(self, logits: Array, n: int) -> tuple[Array, Array]:
        """The n likeliest tokens, the likeliest first; of equals the one with the lower id.

        n passes over the logits, since a captured step on CuPy can hold reductions and no sort.

        Args:
            n: at most V.

        Returns:
            ids (B, n) int64, and (B, n) float32 log-probabilities of those ids under `logits`.
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
        """Choose each row's next token.

        Args:
            logits: (B, V) float32.
            uniform: (B,) float64 in [0, 1); None at temperature 0, which takes the likeliest.
            sampling: its `filters()` are methods of this class, applied in that order.
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
            x = self.divide_by_temperature(x, sampling.temperature)
            for method, value in sampling.filters():
                x = getattr(self, method)(x, value)
            ids = self.sample(x, uniform)
        row = xp.arange(ids.shape[0])
        if seen is not None:
            seen[row, ids] = True
        return ids, self.log_softmax(logits)[row, ids]
