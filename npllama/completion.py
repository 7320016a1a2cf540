"""The results of a generation: text, ids, log-probabilities and timings."""

from dataclasses import dataclass


@dataclass
class Timings:
    """The timings of one generation. All rows of the generation share them.

    Attributes:
        prompt_tokens: the number of prompt tokens that were computed, summed over all rows. Tokens
            that were already in a cache do not count.
        new_tokens: the number of new tokens, summed over all rows.
        first_token_seconds: the time from the start to the first new token of any row.
        prefill_seconds: the time for the prompts and for the first new token of each row.
        decode_seconds: the time for all other new tokens. The time that the caller of a stream
            spends between tokens does not count.
        decode_tokens: the number of new tokens that were generated during decode_seconds.
        prefill_forwards: the number of forward passes over prompt tokens.
        decode_steps: the number of forward passes over new tokens. Every forward pass reads the
            weights once.
        rows: the number of prompts of the generation, even if not all were decoded together.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    first_token_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_tokens: int = 0
    prefill_forwards: int = 0
    decode_steps: int = 0
    rows: int = 1

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class LikelyToken:
    """One of the most likely tokens at a step.

    Attributes:
        id: the token id.
        text: the token as the vocabulary contains it, with "\u2581" for a space and "<0x0A>" for a
            byte; None without a tokenizer.
        log_prob: the log-probability in nats, computed from the unmodified logits.
    """

    id: int
    text: str | None
    log_prob: float


@dataclass(repr=False)
class Completion:
    """The completion of one prompt.

    Attributes:
        text: the completion without the prompt; None without a tokenizer.
        ids: the token ids of the completion, including a final end-of-sequence id.
        log_probs: the log-probability of each id in nats, computed from the unmodified logits.
        finish_reason: why the completion ended.
            "eos": the model generated an end-of-sequence id.
            "stop": the text reached a stop text. `ids` and `log_probs` include the tokens of the
            stop text, but `text` does not include it.
            "length": the completion has max_new_tokens tokens, or the context is full.
            "interrupted": the caller or Ctrl-C ended the generation early.
        timings: the timings of the whole batch; see Timings.
        seed: the seed, with which the same completion can be generated again.
        prompt_tokens: the number of tokens of the prompt, including those that a cache contained.
        new_tokens: the number of tokens of the completion, which is len(ids).
        top_logprobs: for each id, the most likely tokens at its step, in descending order of
            probability. The id itself is not always one of them. Tokens with probability 0 are left
            out. None unless they were requested.
    """

    text: str | None
    ids: list[int]
    log_probs: list[float]
    finish_reason: str
    timings: Timings
    seed: int
    prompt_tokens: int = 0
    top_logprobs: list[list[LikelyToken]] | None = None

    @property
    def new_tokens(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        said = "" if self.text is None else f" {_shortened(self.text)!r}"
        return (
            f"<Completion{said}: {self.new_tokens} new tokens after {self.prompt_tokens}, "
            f"{self.finish_reason}, seed {self.seed}>"
        )


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
