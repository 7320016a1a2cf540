"""One row of a batch: its prompt, its completion so far, and where that ends."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from npllama.completion import Completion, LikelyToken, Timings
from npllama.sampling_options import Sampling
from npllama.tokenizer import StreamDecoder, Tokenizer


class StopFilter:
    """Lets text through until a stop text appears, holding back what may become one.

    Of several stop texts the one that is complete first counts (the longer of two that end
    together): that alone does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str, final: bool = False) -> str:
        """The text that is certain to come before any stop text."""
        self._held += text
        places = ((self._held.find(stop), len(stop)) for stop in self._stops)
        found = [(at + length, at) for at, length in places if at >= 0]
        if found:
            _end, begin = min(found)
            self.found = True
            certain, self._held = self._held[:begin], ""
            return certain
        keep = 0 if final else self._prefix_of_a_stop()
        at = len(self._held) - keep
        certain, self._held = self._held[:at], self._held[at:]
        return certain

    def _prefix_of_a_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop text."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0


@dataclass(eq=False)
class Row:
    """One prompt and what has been said after it.

    Args:
        number: which of the prompts it is; with the seed, all that its random numbers depend on.
        limit: new tokens at most: max_new_tokens, or what the context leaves.

    Attributes:
        seed, sampling: how its tokens are chosen.
        n_likeliest: how many of the likeliest tokens are told of each step.
        cache_row: the row of the cache that holds it; None while it waits for one.
        launched: its tokens that are computed or queued.
        error: what ended it, where finish_reason is "error".
    """

    number: int
    prompt_ids: list[int]
    limit: int
    eos_ids: frozenset[int]
    stop: StopFilter
    tokenizer: Tokenizer | None
    fresh_text: bool = False
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    likeliest: list[list[tuple[int, float]]] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    n_likeliest: int = 0
    cache_row: int | None = None
    launched: int = 0
    error: Exception | None = None

    def __post_init__(self) -> None:
        self._decoder = None if self.tokenizer is None else StreamDecoder(self.tokenizer)
        if self._decoder is not None and not self.fresh_text:
            for id_ in self.prompt_ids:  # the completion continues the prompt's text
                self._decoder.push(id_)
        if self.limit == 0:
            self.finish_reason = "length"

    def interrupt(self) -> str:
        """End here; the text that was held back in case it became something else."""
        held = ""
        if self.finish_reason is None and self._decoder is not None:
            held = self.stop.push(self._decoder.flush(), final=True)
        self.finish_reason = self.finish_reason or "interrupted"
        self.text += held
        return held

    def accept(self, id_: int, log_prob: float, likeliest: Sequence[tuple[int, float]] = ()) -> str:
        """Take the next token; the text that it makes certain.

        Args:
            likeliest: ids and log-probabilities of the tokens likeliest in its place.
        """
        self.ids.append(id_)
        self.log_probs.append(log_prob)
        self.likeliest.append([(i, p) for i, p in likeliest if p != -math.inf])
        is_eos = id_ in self.eos_ids
        text = ""
        if self._decoder is not None and not is_eos:
            text = self.stop.push(self._decoder.push(id_))
        if is_eos:
            self.finish_reason = "eos"
        elif self.stop.found:
            self.finish_reason = "stop"
        elif len(self.ids) == self.limit:
            self.finish_reason = "length"
        if self._decoder is not None and self.finish_reason in ("eos", "length"):
            text += self.stop.push(self._decoder.flush(), final=True)
            if self.stop.found:
                self.finish_reason = "stop"
        self.text += text
        return text

    def completion(self, timings: Timings) -> Completion:
        """What was said so far, in so much time."""
        return Completion(
            text=None if self.tokenizer is None else self.text,
            ids=self.ids,
            log_probs=self.log_probs,
            finish_reason=self.finish_reason or "",
            timings=timings,
            seed=self.seed,
            prompt_tokens=len(self.prompt_ids),
            top_logprobs=self._named() if self.n_likeliest else None,
        )

    def _named(self) -> list[list[LikelyToken]]:
        """The likeliest tokens of each step, with their names."""
        name = (lambda id_: None) if self.tokenizer is None else self.tokenizer.piece
        return [[LikelyToken(i, name(i), p) for i, p in likeliest] for likeliest in self.likeliest]
