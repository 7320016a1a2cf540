"""One row of a batch: its prompt, its completion so far, and the reason why it ends."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from npllama.completion import Completion, LikelyToken, Timings
from npllama.sampling_options import Sampling
from npllama.tokenizer import StreamDecoder, Tokenizer


class StopFilter:
    """Passes text on until a stop text occurs, and delays text that may be the start of one.

    Of several stop texts, the one that is complete first ends the text. If two are complete at the
    same time, the longer one does. With this rule the result does not depend on how the text was
    divided into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str, final: bool = False) -> str:
        """Add a piece of text, and return the text that no stop text can affect any more.

        Args:
            final: whether this piece is the last, so that no text needs to be delayed.
        """
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
        """The length of the longest suffix of the delayed text that is a prefix of a stop text."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0


@dataclass(eq=False)
class Row:
    """One prompt and its completion so far.

    Args:
        number: the number of the prompt. The row's random numbers depend only on it and the seed.
        prompt_ids: the token ids of the prompt.
        limit: the maximum number of new tokens: max_new_tokens, or fewer if the context is full.
        eos_ids: the token ids that end the completion.
        stop: the filter for stop texts.
        tokenizer: the tokenizer; None to generate ids without text.
        fresh_text: whether the completion is a new text rather than a continuation of the prompt's.

    Attributes:
        ids, log_probs: the new tokens, and their log-probabilities.
        likeliest: per new token, the ids and log-probabilities of the most likely tokens.
        text: the text of the completion so far, without delayed text.
        finish_reason: why the row ended; None while it continues.
        seed, sampling: the options for choosing tokens.
        n_likeliest: how many of the most likely tokens each step reports.
        cache_row: the row of the cache; None while the row waits for one.
        launched: the number of new tokens that have been computed or queued.
        error: the exception that ended the row, if finish_reason is "error".
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
            for id_ in self.prompt_ids:  # the completion's text continues that of the prompt
                self._decoder.push(id_)
        if self.limit == 0:
            self.finish_reason = "length"

    def interrupt(self) -> str:
        """End the row, and return the text that was delayed until now."""
        held = ""
        if self.finish_reason is None and self._decoder is not None:
            held = self.stop.push(self._decoder.flush(), final=True)
        self.finish_reason = self.finish_reason or "interrupted"
        self.text += held
        return held

    def accept(self, id_: int, log_prob: float, likeliest: Sequence[tuple[int, float]] = ()) -> str:
        """Add the next token, and return the new text that is certain with it.

        Args:
            id_: the token id.
            log_prob: its log-probability.
            likeliest: the ids and log-probabilities of the most likely tokens at this step.
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
        """The result so far, with the given timings."""
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
        """The most likely tokens of each step, with their texts."""
        name = (lambda id_: None) if self.tokenizer is None else self.tokenizer.piece
        return [[LikelyToken(i, name(i), p) for i, p in likeliest] for likeliest in self.likeliest]
