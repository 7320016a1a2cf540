"""What a generation leaves: text, ids, log-probabilities, and where the time went."""

from dataclasses import dataclass


@dataclass
class Timings:
    """Where the time of one generation went; shared by all rows of a batch.

    Attributes:
        rows: prompts of the generation, whose timings these are, however many at once.
        prompt_tokens, new_tokens: over all rows; of prompts those that were read, not those that a
            cache held.
        first_token_seconds: from the start to the first row's first token.
        prefill_seconds: the prompts, and the first token of each row.
        decode_seconds: all further tokens, without the caller's own time between them.
        prefill_forwards, decode_steps: forwards; each reads the weights once.
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
    """One of the tokens that were likeliest at a step.

    Attributes:
        id: its token id.
        text: as the vocabulary writes it: "\u2581" is a space, "<0x0A>" a byte; None where there
            is no tokenizer.
        log_prob: under the unmodified logits, in nats.
    """

    id: int
    text: str | None
    log_prob: float


@dataclass(repr=False)
class Completion:
    """What the model said.

    Attributes:
        text: the completion without the prompt; None where there is no tokenizer.
        ids: its token ids, the end-of-sequence id included where there was one.
        log_probs: of each id under the unmodified logits, in nats.
        finish_reason: "eos" (an end-of-sequence id), "stop" (a stop text; ids and log_probs
            then hold its tokens, text does not), "length" (max_new_tokens, or the context is
            full), or "interrupted" (a stream or a generation that was left before its end, by
            its caller or by Ctrl-C).
        timings: of the whole batch; see Timings.
        seed: reproduces the text.
        prompt_tokens: ids of this row's own prompt, those that a cache held included.
        new_tokens: this row's own, as many as `ids`.
        top_logprobs: of each id, the tokens that were likeliest in its place, the likeliest first
            and whether it is one of them or not; fewer where all others are impossible. None
            where they were not asked for.
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
