"""The loop that drives it all: prefill, decode, sample, and text as it becomes certain."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import numpy as np

from npllama.backend import Array
from npllama.completion import Completion, LikelyToken, Timings
from npllama.decode_step import StepState
from npllama.errors import InputError, NumericalError
from npllama.kv_cache import KVCache, Place
from npllama.model import Transformer
from npllama.row import Row
from npllama.sampling_options import Sampling
from npllama.uniforms import uniforms

TURN = 0.02
"""Seconds of steps in one turn of a generation whose text nobody waits for."""


class Generation:
    """Runs a batch of rows to their ends; iterating yields (row number, text) as it is made.

    Rows are prefilled one by one and decoded jointly, each at its own position; a row that has
    ended leaves the batch. The loop launches a decode step, reads the oldest one that was
    launched, and lets each row accept its token. On a device with a queue,
    `backend.steps_ahead` steps are launched before the oldest one's tokens are read, and their
    copies to the host are queued behind each, so the device never waits for the text.

    Args:
        model: the transformer.
        rows: prompts that fit the model's context.
        sampling: how tokens are chosen.
        seed: an integer.
        n_tokens: only ids below it are chosen.
        allowed: (n_tokens,) bool on the device, the ids that are; None for all of them.
        cache: row i may hold the first ids of prompt i, which are then not read again, and has
            room for the prompt and its completion; None for a cache of this generation's own.
            Afterwards row i holds its prompt and its completion without the last id.
        n_likeliest: how many of the likeliest tokens are told of each step.
    """

    def __init__(
        self,
        model: Transformer,
        rows: list[Row],
        sampling: Sampling,
        seed: int,
        n_tokens: int,
        allowed: Array | None = None,
        cache: KVCache | None = None,
        n_likeliest: int = 0,
    ) -> None:
        self.model = model
        self.backend = model.backend
        self.ops = model.ops
        self.rows = rows
        self.sampling = sampling
        self.seed = seed
        self.n_tokens = n_tokens
        self.allowed = allowed
        self._n_likeliest = min(n_likeliest, model.config.vocab_size)
        self._cache = cache
        self._began = False
        self._in_flight: deque[tuple[list[Row], Callable[[], tuple]]] = deque()
        self._compiled: Callable | None = None
        self._launched = 0  # tokens of each row that are computed or queued
        cached = [0] * len(rows) if cache is None else cache.lengths
        active = [row for row in rows if row.finish_reason is None]
        n_read = sum(len(row.prompt_ids) - cached[row.number] for row in active)
        self.timings = Timings(prompt_tokens=n_read, rows=len(rows))

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
                prompt_tokens=len(row.prompt_ids),
                top_logprobs=_named(row) if self._n_likeliest else None,
            )
            for row in self.rows
        ]

    def __repr__(self) -> str:
        ended = sum(row.finish_reason is not None for row in self.rows)
        n_new, most = sum(len(row.ids) for row in self.rows), sum(row.limit for row in self.rows)
        return (
            f"<Generation: {ended} of {len(self.rows)} ended, {n_new} of at most {most} new "
            f"tokens, seed {self.seed}>"
        )

    def steps_report(self) -> str | None:
        """How a device ran the decode steps: captured, replayed or eager; None where it has only
        one way."""
        return self._compiled.report() if hasattr(self._compiled, "report") else None

    def run(self) -> None:
        """Iterate to the end, for a caller who does not take the text as it is made.

        Several steps are one turn (`Ops.turn`): handing it to another thread takes longer than a
        small model's NumPy calls.
        """
        steps, is_running = iter(self), True
        while is_running:
            with self.ops.turn():
                until = time.monotonic() + TURN
                is_running = any(time.monotonic() > until for _ in steps)
            self.backend.threads.give_way()

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
        is_own = self._cache is None
        if is_own:
            longest = max(len(row.prompt_ids) + row.limit for row in active)
            self._cache = self.model.take_cache(len(self.rows), longest)
        for row in active:  # another generation may have run since this one was made
            self._cache.check_prefix(row.number, row.prompt_ids)
        self._cache.user = self
        try:
            self._prefill(active)
            while True:
                while len(self._in_flight) <= self.backend.steps_ahead and self._launch():
                    pass
                if not self._in_flight:
                    return
                rows, *results = self._read()
                self._count(time.perf_counter() - began, rows)
                for row, *result in zip(rows, *results, strict=True):
                    if row.finish_reason is None:
                        yield row.number, self._accept(row, *result)
                began = time.perf_counter()
        except Exception:
            if is_own:  # what a failed step has left is not used again
                self._cache.user, is_own = None, False
            raise
        finally:
            self._end(is_own)

    def _prefill(self, rows: list[Row]) -> None:
        """Read what the cache does not hold of every prompt, and choose each row's first token."""
        cache = self._cache
        rest = {row: row.prompt_ids[cache.lengths[row.number] :] for row in rows}
        with _unwarned(), self.model.reading(sum(map(len, rest.values()))):
            logits = [self.model.prefill(rest[row], cache, row.number) for row in rows]
        chunk = self.ops.prefill_chunk()
        self.timings.prefill_forwards = sum(math.ceil(len(ids) / chunk) for ids in rest.values())
        self._active = rows
        self._state = cache.step_buffers.begin(
            [row.number for row in rows], self._uniforms(rows), self._seen(rows)
        )
        self._compiled = self.ops.compile(
            self._step,
            frozen=(self.sampling, self.n_tokens, self._n_likeliest),
            constants=(self.model.parameters, self.allowed),
        )
        with _unwarned():
            # B x (1, V) -> (B, V)
            results = self._choose(self.backend.xp.concatenate(logits), self._state)
        self._in_flight.append((rows, self.backend.to_host_later(*results)))
        self._launched = 1

    def _launch(self) -> bool:
        """Queue the next decode step of the rows that need one; whether there are any."""
        going_on = [
            row for row in self._active if row.finish_reason is None and self._launched < row.limit
        ]
        if not going_on:
            return False
        if self._cache.user is not self:  # the buffers of its steps are the other's, too
            raise InputError("another generation uses the cache: this one cannot go on")
        if len(going_on) < len(self._active):
            kept = [i for i, row in enumerate(self._active) if row in going_on]
            index = self.backend.to_device(np.array(kept))
            self._state = self._cache.step_buffers.some_rows(self._state, index)
            self._active = going_on
        numbers = tuple(row.number for row in going_on)
        place = self._cache.place(1, numbers, self._state.rows)
        results = self._compiled(self._state, self._cache, place)
        self._cache.advance(place.rows, [1] * len(place.rows))
        self._in_flight.append((going_on, self.backend.to_host_later(*results)))
        self._launched += 1
        self.timings.decode_steps += 1
        return True

    def _step(self, state: StepState, cache: KVCache, place: Place) -> tuple[Array, ...]:
        """One decode step, from state.tokens (B,) to what `_choose` returns. See Ops.compile for
        what it may read."""
        with _unwarned():
            logits = self.model.compute(state.tokens[:, None], cache, place)  # -> (B, 1, V)
            return self._choose(logits[:, 0], state)

    def _choose(self, logits: Array, state: StepState) -> tuple[Array, ...]:
        """The ids (B,) that follow (B, V) logits, which become state.tokens, and their
        log-probabilities (B,); where they are asked for, ids and log-probabilities (B, n) of the
        likeliest."""
        ids, log_probs = self.ops.next_token(
            logits, state.next_uniform(), self.sampling, state.seen, self.n_tokens, self.allowed
        )
        state.tokens[...] = ids
        if self._n_likeliest == 0:
            return ids, log_probs
        return ids, log_probs, *self.ops.likeliest(logits, self._n_likeliest)

    def _read(self) -> tuple[list[Row], list[int], list[float], list[list[tuple[int, float]]]]:
        """The oldest step in flight: its rows, each one's id and log-probability, and the same of
        the likeliest."""
        rows, copied = self._in_flight.popleft()
        ids, log_probs, *top = (array.tolist() for array in copied())
        pairs = [[*zip(*both, strict=True)] for both in zip(*top, strict=True)] or [
            [] for _ in rows
        ]
        return rows, ids, log_probs, pairs

    def _accept(
        self, row: Row, id_: int, log_prob: float, likeliest: list[tuple[int, float]]
    ) -> str:
        """Give a row its next token; the text that it makes certain."""
        if not math.isfinite(log_prob):
            raise NumericalError(
                f"the model computed a log-probability of {log_prob} for token "
                f"{len(row.ids) + 1}: the weights are damaged, or their dtype is too "
                "narrow; try --dtype float32"
            )
        return row.accept(id_, log_prob, likeliest)

    def _end(self, keeps: bool) -> None:
        """Leave the cache to whoever uses it next, and hold none of its arrays.

        Args:
            keeps: it is this generation's own, and to be kept for another.
        """
        cache, self._cache, self._state = self._cache, None, None
        if keeps:
            for _rows, copied in self._in_flight:
                copied()  # nothing of this generation runs any more, on whatever stream
            self.model.give_cache_back(cache)
        elif cache.user is self:
            self._settle(cache)
        self._in_flight.clear()

    def _settle(self, cache: KVCache) -> None:
        """Leave in each row of the cache its prompt and its completion without the last id, as
        far as they were read: steps that were launched ahead or interrupted may have left more."""
        cache.user = None
        for row in self.rows:
            ids = row.prompt_ids + row.ids
            known = len(row.prompt_ids) + max(len(row.ids) - 1, 0)
            length = min(cache.lengths[row.number], known)
            cache.truncate(row.number, length)
            cache.ids[row.number] = ids[:length]

    def _uniforms(self, rows: list[Row]) -> np.ndarray | None:
        """(n_steps, B) random numbers of all tokens that may be chosen, to be moved at once."""
        if self.sampling.temperature == 0:  # nothing is drawn
            return None
        steps = range(max(row.limit for row in rows))
        return uniforms(self.seed, [row.number for row in rows], steps)

    def _seen(self, rows: list[Row]) -> np.ndarray | None:
        if self.sampling.repetition_penalty == 1:
            return None
        seen = np.zeros((len(rows), self.model.config.vocab_size), dtype=bool)
        for i, row in enumerate(rows):
            seen[i, row.prompt_ids] = True
        return seen

    def _count(self, seconds: float, rows: list[Row]) -> None:
        timings = self.timings
        n_new = sum(row.finish_reason is None for row in rows)
        if timings.new_tokens == 0:
            timings.prefill_seconds = timings.first_token_seconds = seconds
        else:
            timings.decode_seconds += seconds
            timings.decode_tokens += n_new
        timings.new_tokens += n_new


def _named(row: Row) -> list[list[LikelyToken]]:
    """A row's likeliest tokens at each step, with their names."""
    name = (lambda id_: None) if row.tokenizer is None else row.tokenizer.piece
    return [[LikelyToken(i, name(i), p) for i, p in likeliest] for likeliest in row.likeliest]


def _unwarned() -> AbstractContextManager:
    """NumPy's warnings of infinities and NaNs are off: each token's log-probability is checked,
    and the NumericalError says more."""
    return np.errstate(over="ignore", invalid="ignore")
