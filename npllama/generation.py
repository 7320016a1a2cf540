"""The loop that drives it all: prefill, decode, sample, and text as it becomes certain."""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing
from functools import partial
from itertools import groupby

import numpy as np

from npllama.backend import Array
from npllama.completion import Completion, Timings
from npllama.decode_step import StepState
from npllama.errors import InputError, NumericalError
from npllama.kv_cache import KVCache, Place
from npllama.model import Transformer
from npllama.progress import on_progress
from npllama.row import Row
from npllama.sampling_options import Sampling
from npllama.uniforms import uniforms

Groups = tuple[tuple[Sampling, int, int | None], ...]
"""(sampling, begin, end): the rows begin .. end-1 of a state, whose tokens are chosen alike."""

PROMPT_TOKENS_BETWEEN_STEPS = 128
"""Prompt tokens that are read between two decode steps, at most: the rows that are being decoded
wait for no more, and this many read the weights nearly as well as a whole chunk."""

TURN = 0.02
"""Seconds of steps in one turn of a generation whose text nobody waits for."""


class Generation:
    """Runs a batch of rows to their ends; iterating yields (row number, text) as it is made.

    Rows are prefilled one by one and decoded jointly, each at its own position. A row that has
    ended leaves the batch, and the next prompt that waits takes its place: it is read into the
    same row of the cache, a piece between two decode steps of the others. The loop launches a
    decode step, reads the oldest one that was launched, and lets each row accept its token. On a
    device with a queue, `backend.steps_ahead` steps are launched before the oldest one's tokens
    are read, and their copies to the host are queued behind each, so the device never waits for
    the text.

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
        batch_size: rows that are decoded together at most, without a cache given; None for all.
        waiting: rows of a server, each with its own seed, sampling and n_likeliest, to which it
            adds while this runs. They share the rows of `cache`, and an error of one row ends that
            row alone.
        n_likeliest: how many of the likeliest tokens are reported for each step.
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
        batch_size: int | None = None,
        waiting: deque[Row] | None = None,
        n_likeliest: int = 0,
    ) -> None:
        self.model = model
        self.backend = model.backend
        self.ops = model.ops
        self.rows = rows
        self.seed = seed
        self.n_tokens = n_tokens
        self.allowed = allowed
        self._cache = cache
        self._began = False
        self._in_flight: deque[tuple[list[Row], Callable[[], tuple], bool]] = deque()
        self._compiled: dict[tuple[Groups, int], Callable] = {}
        self._active: list[Row] = []  # the rows of self._state, in its order
        self._state: StepState | None = None
        self._reading: deque[Row] = deque()  # rows of which a part of the prompt is not yet read
        self._seated: list[Row] = []  # rows that hold a row of the cache
        self._free: list[int] = []  # rows of the cache that nobody holds
        self._failed: list[Row] = []
        self._is_served = waiting is not None
        self._batch_size = min(batch_size or len(rows), len(rows))
        for row in rows:
            row.seed, row.sampling = seed, sampling
            row.n_likeliest = min(n_likeliest, model.config.vocab_size)
        cached = [0] * len(rows) if cache is None else cache.lengths
        active = [row for row in rows if row.finish_reason is None]
        n_read = sum(len(row.prompt_ids) - cached[row.number] for row in active)
        self.timings = Timings(prompt_tokens=n_read, rows=len(rows))
        self.waiting = deque(active) if waiting is None else waiting

    def completions(self) -> list[Completion]:
        """Each row's completion; a row that has not ended is interrupted."""
        return [self.completion(row) for row in self.rows]

    def completion(self, row: Row) -> Completion:
        """One row's completion."""
        row.interrupt()
        return row.completion(self.timings)

    def has_begun(self, row: Row) -> bool:
        """Whether there was a place for a row, or it needs none."""
        has_place = row.number < self._batch_size or row.cache_row is not None
        return has_place or row.finish_reason is not None

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
        reports = [step.report() for step in self._compiled.values() if hasattr(step, "report")]
        return "; ".join(reports) or None

    def run(self) -> None:
        """Iterate to the end, for a caller who does not take the text as it is made."""
        for _ in self.turns():
            pass

    def turns(self, take: Callable[[Row, str], None] | None = None) -> Generator[None, None, None]:
        """As `run`, with a pause for the caller after each turn.

        Several steps are one turn (`Ops.turn`): handing it to another thread takes longer than a
        small model's NumPy calls.

        Args:
            take: called with each piece of text, within the turn.
        """
        is_running = True
        with closing(self.pieces()) as pieces:
            while is_running:
                is_running = False
                with self.ops.turn():
                    until = time.monotonic() + TURN
                    for row, text in pieces:
                        if take is not None:
                            take(row, text)
                        if time.monotonic() > until:
                            is_running = True
                            break
                self.backend.threads.give_way()
                yield

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return ((row.number, text) for row, text in self.pieces())

    def pieces(self) -> Generator[tuple[Row, str], None, None]:
        """As iterating, with the rows themselves."""
        if self._began:
            raise InputError("this generation has run: make another to run it again")
        self._began = True
        return self._run()

    def _run(self) -> Generator[tuple[Row, str], None, None]:
        if not self.waiting:
            return
        began = time.perf_counter()
        is_own = self._cache is None
        if is_own:
            longest = max(len(row.prompt_ids) + row.limit for row in self.waiting)
            self._cache = self.model.take_cache(self._batch_size, longest)
        if is_own or self._is_served:
            self._free = list(range(len(self._cache.lengths)))
        else:
            self._keep_places()
        self._cache.user = self
        try:
            while True:
                self._seat()
                if self._reading:
                    self._read_prompts()
                    began = self._count_reading(began)
                while len(self._in_flight) <= self.backend.steps_ahead and self._launch():
                    pass
                while self._failed:
                    yield self._failed.pop(), ""
                if not self._in_flight:
                    if self._reading or self.waiting:
                        continue
                    return
                rows, is_first, results = self._read()
                self._count(time.perf_counter() - began, rows, is_first)
                for row, *result in zip(rows, *results, strict=True):
                    if row.finish_reason is None:
                        yield row, self._accept(row, *result)
                began = time.perf_counter()
        except Exception:
            if is_own:  # what a failed step has left is not used again
                self._cache.user, is_own = None, False
            raise
        finally:
            self._end(is_own)

    def _keep_places(self) -> None:
        """In a cache of the caller's, row i is that of prompt i."""
        while self.waiting:
            row = self.waiting.popleft()
            # another generation may have run since this one was made
            self._cache.check_prefix(row.number, row.prompt_ids)
            self._take_place(row, row.number)

    def _seat(self) -> None:
        """Give the rows of the cache whose prompts have ended to those that wait."""
        if not self.waiting:
            return
        for row in self._seated:
            if row.finish_reason is not None:
                self._cache.truncate(row.cache_row, 0)
                self._free.append(row.cache_row)
        self._seated = [row for row in self._seated if row.finish_reason is None]
        self._free.sort(reverse=True)
        while self._free and self.waiting:
            row = self.waiting.popleft()
            if row.finish_reason is None:
                self._take_place(row, self._free.pop())

    def _take_place(self, row: Row, cache_row: int) -> None:
        row.cache_row = cache_row
        self._seated.append(row)
        self._reading.append(row)

    def _read_prompts(self) -> None:
        """Read what the cache does not hold of the prompts, or some of it while other rows are
        decoded, and choose the first token of each row whose prompt is read."""
        is_decoding = any(map(_goes_on, self._active))
        left = PROMPT_TOKENS_BETWEEN_STEPS if is_decoding else sys.maxsize
        read, logits = [], []
        with self._reported_reading():
            while self._reading and left > 0:
                row = self._reading[0]
                rest = self._unread(row)
                part = rest[:left]
                if row.finish_reason is None:
                    left -= len(part)
                    last = self._prefill(row, part)  # (1, V)
                if row.finish_reason is not None:  # its caller has left, or it failed
                    self._reading.popleft()
                elif len(part) == len(rest):
                    self._reading.popleft()
                    read.append(row)
                    logits.append(last)
        if read:
            self._begin(read, logits)

    def _unread(self, row: Row) -> list[int]:
        """The ids of a prompt that the cache does not hold."""
        return row.prompt_ids[self._cache.lengths[row.cache_row] :]

    def _reported_reading(self) -> AbstractContextManager:
        """The prompts that are read before the first token are one work. Later ones report
        nothing: there is text then, and a line of progress would be drawn over it."""
        if self.timings.new_tokens:
            return on_progress(None)
        return self.model.reading(sum(len(self._unread(row)) for row in self._reading))

    def _prefill(self, row: Row, ids: list[int]) -> Array | None:
        """The model's, counted."""
        self.timings.prefill_forwards += math.ceil(len(ids) / self.ops.prefill_chunk())
        try:
            with _unwarned():
                return self.model.prefill(ids, self._cache, row.cache_row)
        except Exception as error:
            self._fail(row, error)
            self._failed.append(row)
            return None

    def _begin(self, rows: list[Row], logits: list[Array]) -> None:
        """Choose the first tokens of rows whose prompts are read, and let the rows join."""
        order = _by_sampling(rows)
        rows, logits = [rows[i] for i in order], [logits[i] for i in order]
        new = self._cache.step_buffers.begin(
            [row.cache_row for row in rows], self._uniforms(rows), self._seen(rows)
        )
        with _unwarned():
            # B x (1, V) -> (B, V)
            results = self._choose(
                self.backend.xp.concatenate(logits), new, _groups(rows), _most_likeliest(rows)
            )
        self._in_flight.append((rows, self.backend.to_host_later(*results), True))
        for row in rows:
            row.launched = 1
        if self._active:
            self._arrange(self._active + rows, [self._state, new])
        else:
            self._arrange(rows, [new])

    def _arrange(self, rows: list[Row], states: list[StepState]) -> None:
        """Make the rows that go on the ones that are decoded, those of one sampling side by side.

        Args:
            rows: of the states, in their order.
        """
        kept = [i for i, row in enumerate(rows) if _goes_on(row)]
        kept = [kept[i] for i in _by_sampling([rows[i] for i in kept])]
        self._active = [rows[i] for i in kept]
        if kept:
            index = self.backend.to_device(np.array(kept))
            self._state = self._cache.step_buffers.joined(states, index)

    def _launch(self) -> bool:
        """Queue the next decode step of the rows that need one; whether there are any."""
        if not all(map(_goes_on, self._active)):
            self._arrange(self._active, [self._state])
        if not self._active:
            return False
        if self._cache.user is not self:  # the buffers of its steps are the other's, too
            raise InputError("another generation uses the cache: this one cannot go on")
        rows = self._active
        place = self._cache.place(1, tuple(row.cache_row for row in rows), self._state.rows)
        step = self._compiled_for(_groups(rows), _most_likeliest(rows))
        results = step(self._state, self._cache, place)
        self._cache.advance(place.rows, [1] * len(place.rows))
        self._in_flight.append((rows, self.backend.to_host_later(*results), False))
        for row in rows:
            row.launched += 1
        self.timings.decode_steps += 1
        return True

    def _compiled_for(self, groups: Groups, n_likeliest: int) -> Callable:
        key = groups, n_likeliest
        if key not in self._compiled:
            self._compiled[key] = self.ops.compile(
                partial(self._step, *key),
                frozen=(*key, self.n_tokens),
                constants=(self.model.parameters, self.allowed),
            )
        return self._compiled[key]

    def _step(
        self, groups: Groups, n_likeliest: int, state: StepState, cache: KVCache, place: Place
    ) -> tuple[Array, ...]:
        """One decode step, from state.tokens (B,) to what `_choose` returns. See Ops.compile for
        what it may read."""
        with _unwarned():
            logits = self.model.compute(state.tokens[:, None], cache, place)  # -> (B, 1, V)
            return self._choose(logits[:, 0], state, groups, n_likeliest)

    def _choose(
        self, logits: Array, state: StepState, groups: Groups, n_likeliest: int
    ) -> tuple[Array, ...]:
        """The ids (B,) that follow (B, V) logits, which become state.tokens, and their
        log-probabilities (B,); where they are asked for, ids and log-probabilities (B, n) of the
        likeliest."""
        uniform, results = state.next_uniform(), []
        for sampling, begin, end in groups:
            part = slice(begin, end)
            results.append(
                self.ops.next_token(
                    logits[part],
                    uniform[part] if sampling.temperature else None,
                    sampling,
                    state.seen[part] if sampling.repetition_penalty != 1 else None,
                    self.n_tokens,
                    self.allowed,
                )
            )
        ids, log_probs = results[0]
        if len(results) > 1:
            ids, log_probs = map(self.backend.xp.concatenate, zip(*results, strict=True))
        state.tokens[...] = ids
        if n_likeliest == 0:
            return ids, log_probs
        return ids, log_probs, *self.ops.likeliest(logits, n_likeliest)

    def _read(self) -> tuple[list[Row], bool, tuple[list, list, list]]:
        """The oldest step in flight: its rows, whether it chose their first tokens, and each row's
        id, log-probability, and pairs of both of the likeliest."""
        rows, copied, is_first = self._in_flight.popleft()
        ids, log_probs, *top = (array.tolist() for array in copied())
        pairs = [[*zip(*both, strict=True)] for both in zip(*top, strict=True)] or [
            [] for _ in rows
        ]
        return rows, is_first, (ids, log_probs, pairs)

    def _accept(
        self, row: Row, id_: int, log_prob: float, likeliest: list[tuple[int, float]]
    ) -> str:
        """Give a row its next token; the text that it makes certain."""
        try:
            if not math.isfinite(log_prob):
                raise NumericalError(
                    f"the model computed a log-probability of {log_prob} for token "
                    f"{len(row.ids) + 1}: the weights are damaged, or their dtype is too "
                    "narrow; try --dtype float32"
                )
            return row.accept(id_, log_prob, likeliest[: row.n_likeliest])
        except Exception as error:
            self._fail(row, error)
            return ""

    def _fail(self, row: Row, error: Exception) -> None:
        """End a row by an error: alone where it is served, else with the whole generation."""
        if not self._is_served:
            raise error
        row.finish_reason, row.error = "error", error
        self._cache.clear_row(row.cache_row)  # what is not finite would harm the next one

    def _end(self, keeps: bool) -> None:
        """Leave the cache to whoever uses it next, and hold none of its arrays.

        Args:
            keeps: it is this generation's own, and to be kept for another.
        """
        cache, self._cache, self._state = self._cache, None, None
        if keeps:
            for _rows, copied, _is_first in self._in_flight:
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
        """(B, n_steps) random numbers of all tokens that may be chosen, to be moved at once."""
        if all(row.sampling.temperature == 0 for row in rows):  # nothing is drawn
            return None
        steps = range(max(row.limit for row in rows))
        if len({row.seed for row in rows}) == 1:
            return uniforms(rows[0].seed, [row.number for row in rows], steps).T
        each = [uniforms(row.seed, [row.number], steps).T for row in rows]  # (1, n_steps) each
        return np.concatenate(each)

    def _seen(self, rows: list[Row]) -> np.ndarray | None:
        if all(row.sampling.repetition_penalty == 1 for row in rows):
            return None
        seen = np.zeros((len(rows), self.model.config.vocab_size), dtype=bool)
        for i, row in enumerate(rows):
            seen[i, row.prompt_ids] = True
        return seen

    def _count_reading(self, began: float) -> float:
        """Count the time since `began` as that of prompts; when it was counted to."""
        if self.timings.new_tokens == 0:  # the first token's is not over
            return began
        now = time.perf_counter()
        self.timings.prefill_seconds += now - began
        return now

    def _count(self, seconds: float, rows: list[Row], is_first: bool) -> None:
        timings = self.timings
        n_new = sum(row.finish_reason is None for row in rows)
        if timings.new_tokens == 0:
            timings.first_token_seconds = seconds
        if is_first:
            timings.prefill_seconds += seconds
        else:
            timings.decode_seconds += seconds
            timings.decode_tokens += n_new
        timings.new_tokens += n_new


def _goes_on(row: Row) -> bool:
    """Whether a row needs a further step."""
    return row.finish_reason is None and row.launched < row.limit


def _most_likeliest(rows: list[Row]) -> int:
    """The largest number of likeliest tokens that one of the rows reports."""
    return max(row.n_likeliest for row in rows)


def _by_sampling(rows: list[Row]) -> list[int]:
    """The indices of rows in an order in which those of one sampling are side by side."""
    samplings = list(dict.fromkeys(row.sampling for row in rows))
    return sorted(range(len(rows)), key=lambda i: samplings.index(rows[i].sampling))


def _groups(rows: list[Row]) -> Groups:
    """The rows of each sampling; of a single one they read the same for any number of rows."""
    found: list[tuple[Sampling, int, int | None]] = []
    begin = 0
    for sampling, of_it in groupby(rows, key=lambda row: row.sampling):
        end = begin + len(list(of_it))
        found.append((sampling, begin, end))
        begin = end
    return ((found[0][0], 0, None),) if len(found) == 1 else tuple(found)


def _unwarned() -> AbstractContextManager:
    """NumPy's warnings of infinities and NaNs are off: each token's log-probability is checked,
    and the NumericalError says more."""
    return np.errstate(over="ignore", invalid="ignore")
