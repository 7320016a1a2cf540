"""The loop that drives it all: prefill, decode, sample, and text as it becomes certain."""

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np

from npllama.backend import Array
from npllama.errors import InputError, NumericalError
from npllama.kv_cache import KVCache, Positions
from npllama.model import PREFILL_CHUNK, Transformer
from npllama.sampling_options import Sampling, uniforms
from npllama.tokenizer import StreamDecoder, Tokenizer


@dataclass
class Timings:
    """Where the time of one generation went; shared by all rows of a batch.

    Attributes:
        prompt_tokens, new_tokens: over all rows.
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

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass
class Completion:
    """What the model said.

    Attributes:
        text: the completion without the prompt; None where there is no tokenizer.
        ids: its token ids, the end-of-sequence id included where there was one.
        log_probs: of each id under the unmodified logits, in nats.
        finish_reason: "eos" (an end-of-sequence id), "stop" (a stop text; ids and log_probs
            then hold its tokens, text does not), "length" (max_new_tokens, or the context is
            full), or "interrupted" (the caller stopped iterating, or Ctrl-C).
        timings: see Timings.
        seed: reproduces the text.
    """

    text: str | None
    ids: list[int]
    log_probs: list[float]
    finish_reason: str
    timings: Timings
    seed: int


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
        number: its place in the batch; with the seed, all that its random numbers depend on.
        limit: new tokens at most: max_new_tokens, or what the context leaves.
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
    text: str = ""
    finish_reason: str | None = None

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

    def accept(self, id_: int, log_prob: float) -> str:
        """Take the next token; the text that it makes certain."""
        self.ids.append(id_)
        self.log_probs.append(log_prob)
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


class Generation:
    """Runs a batch of rows to their ends; iterating yields (row number, text) as it is made.

    Rows are prefilled one by one and decoded jointly, each at its own position; a row that has
    ended leaves the batch. On a device with a queue, `backend.steps_ahead` steps are launched
    before the oldest one's tokens are read, so it never waits for the text.

    Args:
        model: the transformer.
        rows: prompts that fit the model's context.
        sampling: how tokens are chosen.
        seed: an integer.
        n_tokens: only ids below it are chosen.
        allowed: (n_tokens,) bool on the device, the ids that are; None for all of them.
    """

    def __init__(
        self,
        model: Transformer,
        rows: list[Row],
        sampling: Sampling,
        seed: int,
        n_tokens: int,
        allowed: Array | None = None,
    ) -> None:
        self.model = model
        self.backend = model.backend
        self.ops = model.ops
        self.rows = rows
        self.sampling = sampling
        self.seed = seed
        self.n_tokens = n_tokens
        self.allowed = allowed
        self._began = False
        self.timings = Timings(prompt_tokens=sum(len(row.prompt_ids) for row in rows))

    def completions(self) -> list[Completion]:
        """Each row's completion; a row that has not ended is interrupted."""
        for row in self.rows:
            row.interrupt()
        return [
            Completion(
                text=None if row.tokenizer is None else row.text,
                ids=row.ids,
                log_probs=row.log_probs,
                finish_reason=row.finish_reason or "",
                timings=self.timings,
                seed=self.seed,
            )
            for row in self.rows
        ]

    def __iter__(self) -> Iterator[tuple[int, str]]:
        if self._began:
            raise InputError("this generation has run: make another to run it again")
        self._began = True
        return self._run()

    def _run(self) -> Iterator[tuple[int, str]]:
        active = [row for row in self.rows if row.finish_reason is None]
        if not active:
            return
        began = time.perf_counter()
        longest = max(len(row.prompt_ids) + row.limit for row in active)
        cache = self.model.new_cache(len(self.rows), longest)
        step = self.ops.compile(self._step)
        tokens, log_probs, seen = self._prefill(active, cache)
        rows = active
        in_flight = deque([(rows, tokens, log_probs)])
        launched = 1  # tokens of each active row that are computed or queued
        is_first = True
        while True:
            began_step = began if is_first else time.perf_counter()
            while len(in_flight) <= self.backend.steps_ahead:
                going_on = [r for r in rows if r.finish_reason is None and launched < r.limit]
                if not going_on:
                    break
                if len(going_on) < len(rows):
                    kept = [i for i, row in enumerate(rows) if row in going_on]
                    index = self.backend.to_device(np.array(kept))
                    tokens = tokens[index]
                    seen = None if seen is None else seen[index]
                    rows = going_on
                uniform = self._uniform(rows, launched)
                positions = cache.positions(1, tuple(row.number for row in rows))
                tokens, log_probs = step(tokens, uniform, seen, cache, positions)
                cache.advance(positions)
                in_flight.append((rows, tokens, log_probs))
                launched += 1
                self.timings.decode_steps += 1
            if not in_flight:
                return
            done_rows, done_tokens, done_log_probs = in_flight.popleft()
            ids = self.backend.to_host(done_tokens).tolist()
            values = self.backend.to_host(done_log_probs).tolist()
            n_new = sum(row.finish_reason is None for row in done_rows)
            self._count(time.perf_counter() - began_step, n_new, is_first)
            is_first = False
            for row, id_, log_prob in zip(done_rows, ids, values, strict=True):
                if row.finish_reason is None:
                    if not math.isfinite(log_prob):
                        raise NumericalError(
                            f"the model computed a log-probability of {log_prob} for token "
                            f"{len(row.ids) + 1}: the weights are damaged, or their dtype is too "
                            "narrow; try --dtype float32"
                        )
                    yield row.number, row.accept(id_, log_prob)

    def _prefill(self, rows: list[Row], cache: KVCache) -> tuple[Array, Array, Array | None]:
        """Feed every prompt; the first new token of each row, (B,), and its log-probability."""
        with _unwarned():
            logits = [self.model.prefill(row.prompt_ids, cache, row.number) for row in rows]
        self.timings.prefill_forwards = sum(
            math.ceil(len(row.prompt_ids) / PREFILL_CHUNK) for row in rows
        )
        seen = None
        if self.sampling.repetition_penalty != 1:
            host = np.zeros((len(rows), self.model.config.vocab_size), dtype=bool)
            for i, row in enumerate(rows):
                host[i, row.prompt_ids] = True
            seen = self.backend.to_device(host)
        logits = self.backend.xp.concatenate(logits)  # B x (1, V) -> (B, V)
        uniform = self._uniform(rows, 0)
        with _unwarned():
            tokens, log_probs = self._next_token(logits, uniform, seen)
        return tokens, log_probs, seen

    def _step(
        self,
        tokens: Array,
        uniform: Array,
        seen: Array | None,
        cache: KVCache,
        positions: Positions,
    ) -> tuple[Array, Array]:
        """One decode step, from tokens (B,) to the next tokens (B,) and their log-probabilities."""
        with _unwarned():
            logits = self.model.compute(tokens[:, None], cache, positions)  # (B, 1) -> (B, 1, V)
            return self._next_token(logits[:, 0], uniform, seen)

    def _next_token(self, logits: Array, uniform: Array, seen: Array | None) -> tuple[Array, Array]:
        return self.ops.next_token(
            logits, uniform, self.sampling, seen, self.n_tokens, self.allowed
        )

    def _uniform(self, rows: list[Row], step: int) -> Array:
        if self.sampling.temperature == 0:  # nothing is drawn
            return self.backend.xp.zeros(len(rows))
        return self.backend.to_device(uniforms(self.seed, [row.number for row in rows], step))

    def _count(self, seconds: float, n_new: int, is_first: bool) -> None:
        timings = self.timings
        timings.new_tokens += n_new
        if is_first:
            timings.prefill_seconds = timings.first_token_seconds = seconds
        else:
            timings.decode_seconds += seconds
            timings.decode_tokens += n_new


def _unwarned() -> AbstractContextManager:
    """NumPy's warnings of infinities and NaNs are off: each token's log-probability is checked,
    and the NumericalError says more."""
    return np.errstate(over="ignore", invalid="ignore")
