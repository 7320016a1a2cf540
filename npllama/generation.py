"""The generation loop: prefill prompts, decode tokens, and yield text as soon as it is final."""

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
"""(sampling, begin, end): among the rows that are decoded together, those with the indices from
begin to end - 1 have the options `sampling`. If all rows have the same options, end is None."""

PROMPT_TOKENS_BETWEEN_STEPS = 128
"""The maximum number of prompt tokens to prefill between two decode steps. The rows that are being
decoded wait during this prefill, so the limit must be small. A forward pass over this many tokens
is still nearly as efficient per token as one over a full chunk."""

TURN = 0.02
"""The number of seconds after which a turn ends; see `Generation.turns`."""


class Generation:
    """Generates completions for a batch of rows.

    Iteration yields a pair (row number, text) for each new token. The text may be empty, for
    example if a character consists of several tokens.

    A row is one prompt and its completion. The loop prefills the prompts one at a time, and then
    decodes the rows together, each row at its own position. These rows are the decode batch. Each
    row uses one row of the KV cache, which is called its cache row. When a row ends, it leaves the
    decode batch, and the next waiting row gets its cache row. The loop prefills the new row's
    prompt in parts, one part between two decode steps of the other rows.

    A step is in flight from its launch until the loop reads its results. Each iteration of the loop
    launches decode steps, reads the results of the oldest step in flight, and passes each row its
    new token. A GPU executes steps asynchronously. While the loop reads the results of one step, it
    keeps `backend.steps_ahead` further steps in flight, so that the GPU does not wait for the host.

    Args:
        model: the transformer.
        rows: the prompts. Each fits the model's context.
        sampling: the options for choosing tokens.
        seed: the seed of the random numbers.
        n_tokens: all generated ids are less than n_tokens.
        allowed: (n_tokens,) bool on the device, which ids may be generated; None for all.
        cache: a KV cache with one row per prompt; None to take one from the model. Row i of the
            cache may contain the first ids of prompt i, which are then not computed again. Row i
            needs capacity for the prompt and its completion. After the generation, it contains
            both, except for the last id of the completion.
        batch_size: the maximum number of rows to decode together; None for all rows. It is used
            only if `cache` is None.
        waiting: a queue to which a server may append rows while this generation runs; None without
            a server. Each of these rows has its own seed, sampling options and n_likeliest, and
            uses any free row of `cache`. An error in one of these rows ends only that row.
        n_likeliest: how many of the most likely tokens to report per step.
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
        # per step in flight: its rows; a function that waits for its results and returns them as
        # NumPy arrays; and whether the step chose the first tokens of its rows
        self._in_flight: deque[tuple[list[Row], Callable[[], tuple], bool]] = deque()
        self._compiled: dict[tuple[Groups, int], Callable] = {}
        self._active: list[Row] = []  # the decode batch
        self._state: StepState | None = None  # its device arrays, in the same order of rows
        self._prefilling: deque[Row] = deque()  # rows whose prefill is not complete
        self._assigned: list[Row] = []  # rows that have a cache row
        self._free: list[int] = []  # unused rows of the cache
        self._failed: list[Row] = []  # rows whose prefill failed
        self._is_served = waiting is not None
        self._batch_size = min(batch_size or len(rows), len(rows))
        for row in rows:
            row.seed, row.sampling = seed, sampling
            row.n_likeliest = min(n_likeliest, model.config.vocab_size)
        cached = [0] * len(rows) if cache is None else cache.lengths
        active = [row for row in rows if row.finish_reason is None]
        n_computed = sum(len(row.prompt_ids) - cached[row.number] for row in active)
        self.timings = Timings(prompt_tokens=n_computed, rows=len(rows))
        self.waiting = deque(active) if waiting is None else waiting

    def completions(self) -> list[Completion]:
        """The completion of each row. Interrupts rows that have not ended."""
        return [self.completion(row) for row in self.rows]

    def completion(self, row: Row) -> Completion:
        """The completion of one row. Interrupts the row if it has not ended."""
        row.interrupt()
        return row.completion(self.timings)

    def has_begun(self, row: Row) -> bool:
        """Whether a row has a cache row, will get one when the generation starts, or has ended."""
        is_assigned = row.number < self._batch_size or row.cache_row is not None
        return is_assigned or row.finish_reason is not None

    def __repr__(self) -> str:
        ended = sum(row.finish_reason is not None for row in self.rows)
        n_new, most = sum(len(row.ids) for row in self.rows), sum(row.limit for row in self.rows)
        return (
            f"<Generation: {ended} of {len(self.rows)} ended, {n_new} of at most {most} new "
            f"tokens, seed {self.seed}>"
        )

    def steps_report(self) -> str | None:
        """How often decode steps were captured, replayed, and run without a capture; None if the
        backend cannot capture steps (see `Ops.compile`)."""
        reports = [step.report() for step in self._compiled.values() if hasattr(step, "report")]
        return "; ".join(reports) or None

    def run(self) -> None:
        """Run the generation to its end without streaming text."""
        for _ in self.turns():
            pass

    def turns(self, take: Callable[[Row, str], None] | None = None) -> Generator[None, None, None]:
        """Run the generation in turns, and yield after each turn.

        A turn may hold a lock (see `Ops.turn`), so that the generations of several threads run in
        alternation. A turn ends with the first new token after TURN seconds, and not after each
        step, because passing the lock to another thread can take longer than one step of a small
        model.

        Args:
            take: a function that is called within the turn, with each row and text from `pieces`.
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
        return _numbered(self.pieces())

    def pieces(self) -> Generator[tuple[Row, str], None, None]:
        """An iterator over pairs (row, text), one for each new token. A server's row whose prefill
        failed has one pair with an empty text. Iterating over the generation itself yields row
        numbers instead of rows.

        Raises:
            InputError: the generation has been run before.
        """
        if self._began:
            raise InputError("this generation has run already: create a new one")
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
            self._assign_own_rows()
        self._cache.user = self
        try:
            while True:
                self._assign_rows()
                if self._prefilling:
                    self._prefill_prompts()
                    began = self._count_prefill(began)
                while len(self._in_flight) <= self.backend.steps_ahead and self._launch():
                    pass
                while self._failed:
                    yield self._failed.pop(), ""
                if not self._in_flight:
                    if self._prefilling or self.waiting:
                        continue
                    return
                rows, is_first, results = self._read()
                self._count(time.perf_counter() - began, rows, is_first)
                for row, *result in zip(rows, *results, strict=True):
                    if row.finish_reason is None:
                        yield row, self._accept(row, *result)
                began = time.perf_counter()
        except Exception:
            if is_own:  # discard the cache, because the failed step may have damaged it
                self._cache.user, is_own = None, False
            raise
        finally:
            self._end(is_own)

    def _assign_own_rows(self) -> None:
        """Assign row i of the caller's cache to prompt i."""
        while self.waiting:
            row = self.waiting.popleft()
            # another generation may have changed the cache since this one was created
            self._cache.check_prefix(row.number, row.prompt_ids)
            self._assign(row, row.number)

    def _assign_rows(self) -> None:
        """If rows wait, free the cache rows of ended rows, and assign free cache rows to waiting
        rows."""
        if not self.waiting:
            return
        for row in self._assigned:
            if row.finish_reason is not None:
                self._cache.truncate(row.cache_row, 0)
                self._free.append(row.cache_row)
        self._assigned = [row for row in self._assigned if row.finish_reason is None]
        self._free.sort(reverse=True)
        while self._free and self.waiting:
            row = self.waiting.popleft()
            if row.finish_reason is None:
                self._assign(row, self._free.pop())

    def _assign(self, row: Row, cache_row: int) -> None:
        row.cache_row = cache_row
        self._assigned.append(row)
        self._prefilling.append(row)

    def _prefill_prompts(self) -> None:
        """Prefill prompts, and choose the first token of each row whose prefill is complete.

        While other rows are decoding, one call prefills at most PROMPT_TOKENS_BETWEEN_STEPS tokens.
        """
        is_decoding = any(map(_goes_on, self._active))
        left = PROMPT_TOKENS_BETWEEN_STEPS if is_decoding else sys.maxsize
        complete, logits = [], []
        with self._reported_prefill():
            while self._prefilling and left > 0:
                row = self._prefilling[0]
                rest = self._rest_of_prompt(row)
                part = rest[:left]
                if row.finish_reason is None:
                    left -= len(part)
                    last = self._prefill(row, part)  # (1, V)
                if row.finish_reason is not None:  # it was cancelled, or its prefill failed
                    self._prefilling.popleft()
                elif len(part) == len(rest):
                    self._prefilling.popleft()
                    complete.append(row)
                    logits.append(last)
        if complete:
            self._begin(complete, logits)

    def _rest_of_prompt(self, row: Row) -> list[int]:
        """The ids of a row's prompt that are not in the cache yet."""
        return row.prompt_ids[self._cache.lengths[row.cache_row] :]

    def _reported_prefill(self) -> AbstractContextManager:
        """A context manager that reports the progress of prefilling.

        All prompts that are prefilled before the first new token share one report. Later prompts
        are not reported, because a progress line would overwrite text on the terminal.
        """
        if self.timings.new_tokens:
            return on_progress(None)
        return self.model.reading(sum(len(self._rest_of_prompt(row)) for row in self._prefilling))

    def _prefill(self, row: Row, ids: list[int]) -> Array | None:
        """Prefill a part of a row's prompt.

        Returns:
            Logits (1, V) of the next token; None if the prefill failed. The row has then ended.
        """
        self.timings.prefill_forwards += math.ceil(len(ids) / self.ops.prefill_chunk())
        try:
            with _unwarned():
                return self.model.prefill(ids, self._cache, row.cache_row)
        except Exception as error:
            self._fail(row, error)
            self._failed.append(row)
            return None

    def _begin(self, rows: list[Row], logits: list[Array]) -> None:
        """Choose the first tokens of rows whose prefill is complete, and add these rows to the
        decode batch."""
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
        """Rebuild the decode batch from the rows that need further steps.

        Rows with the same sampling options become adjacent.

        Args:
            rows: the rows of all `states`, in the same order.
            states: the device arrays of these rows.
        """
        kept = [i for i, row in enumerate(rows) if _goes_on(row)]
        kept = [kept[i] for i in _by_sampling([rows[i] for i in kept])]
        self._active = [rows[i] for i in kept]
        if kept:
            index = self.backend.to_device(np.array(kept))
            self._state = self._cache.step_buffers.joined(states, index)

    def _launch(self) -> bool:
        """Queue the next decode step. Returns False if no row needs one."""
        if not all(map(_goes_on, self._active)):
            self._arrange(self._active, [self._state])
        if not self._active:
            return False
        if self._cache.user is not self:  # another generation has overwritten the state
            raise InputError("another generation uses the cache: this one cannot continue")
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
        """Run one decode step: compute logits from state.tokens, and choose the next tokens.

        Returns the results of `_choose`. A backend may capture and replay this function, so the
        function must follow the rules in `Ops.compile`.
        """
        with _unwarned():
            logits = self.model.compute(state.tokens[:, None], cache, place)  # -> (B, 1, V)
            return self._choose(logits[:, 0], state, groups, n_likeliest)

    def _choose(
        self, logits: Array, state: StepState, groups: Groups, n_likeliest: int
    ) -> tuple[Array, ...]:
        """Choose the next token of each row from logits (B, V), and write the ids to state.tokens.

        Returns:
            Ids (B,) and log-probabilities (B,) of the tokens. If n_likeliest is not 0, also ids
            and log-probabilities, both (B, n_likeliest), of the most likely tokens.
        """
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
        """Wait for the oldest step in flight, and read its results.

        Returns:
            The rows of the step; whether the step chose their first tokens; and three lists with
            one entry per row. The entries are the new id, its log-probability, and a list of the
            most likely tokens as pairs (id, log-probability).
        """
        rows, copied, is_first = self._in_flight.popleft()
        ids, log_probs, *top = (array.tolist() for array in copied())
        pairs = [[*zip(*both, strict=True)] for both in zip(*top, strict=True)] or [
            [] for _ in rows
        ]
        return rows, is_first, (ids, log_probs, pairs)

    def _accept(
        self, row: Row, id_: int, log_prob: float, likeliest: list[tuple[int, float]]
    ) -> str:
        """Append the next token to a row, and return the text that became final.

        Raises:
            NumericalError: the log-probability is not finite, and the row does not belong to a
                server. A server's row ends with this error instead.
        """
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
        """End a row with an error. Without a server, raise the error, which ends the generation."""
        if self._cache.user is self:  # NaNs would affect the next prompt in this cache row
            self._cache.clear_row(row.cache_row)
        if not self._is_served:
            raise error
        row.finish_reason, row.error = "error", error

    def _end(self, keeps: bool) -> None:
        """Release the cache.

        Args:
            keeps: whether to return the cache to the model, which may keep it for the next
                generation.
        """
        cache, self._cache, self._state = self._cache, None, None
        if keeps:
            for _rows, copied, _is_first in self._in_flight:
                copied()  # wait for each step: the next generation may use another CUDA stream
            self.model.give_cache_back(cache)
        elif cache.user is self:
            self._settle(cache)
        self._in_flight.clear()

    def _settle(self, cache: KVCache) -> None:
        """Truncate each row of the caller's cache to its prompt and completion.

        Each row keeps the positions of its prompt and of its completion without the last id. Steps
        that were launched ahead of the text may have written further positions. These are removed.
        """
        cache.user = None
        for row in self.rows:
            ids = row.prompt_ids + row.ids
            known = len(row.prompt_ids) + max(len(row.ids) - 1, 0)
            length = min(cache.lengths[row.number], known)
            cache.truncate(row.number, length)
            cache.ids[row.number] = ids[:length]

    def _uniforms(self, rows: list[Row]) -> np.ndarray | None:
        """The random numbers of all steps, (B, n_steps); None if all rows decode greedily."""
        if all(row.sampling.temperature == 0 for row in rows):
            return None
        steps = range(max(row.limit for row in rows))
        if len({row.seed for row in rows}) == 1:
            return uniforms(rows[0].seed, [row.number for row in rows], steps).T
        each = [uniforms(row.seed, [row.number], steps).T for row in rows]  # (1, n_steps) each
        return np.concatenate(each)

    def _seen(self, rows: list[Row]) -> np.ndarray | None:
        """Which tokens occur in each prompt, (B, V) bool; None if no row has a repetition
        penalty."""
        if all(row.sampling.repetition_penalty == 1 for row in rows):
            return None
        seen = np.zeros((len(rows), self.model.config.vocab_size), dtype=bool)
        for i, row in enumerate(rows):
            seen[i, row.prompt_ids] = True
        return seen

    def _count_prefill(self, began: float) -> float:
        """Add the time since `began` to prefill_seconds. Return the time at which the next
        measurement begins."""
        if self.timings.new_tokens == 0:  # `_count` will add all time up to the first token
            return began
        now = time.perf_counter()
        self.timings.prefill_seconds += now - began
        return now

    def _count(self, seconds: float, rows: list[Row], is_first: bool) -> None:
        """Add one step's time and tokens to the timings.

        Args:
            seconds: the time since the last measurement.
            rows: the rows of the step.
            is_first: whether the step chose the first tokens of these rows.
        """
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


def _numbered(
    pieces: Generator[tuple[Row, str], None, None],
) -> Generator[tuple[int, str], None, None]:
    """Pairs (row number, text).

    Closing this generator closes `pieces`. A closed generator expression would leave `pieces`
    suspended in Python 3.12.
    """
    with closing(pieces):
        for row, text in pieces:
            yield row.number, text


def _goes_on(row: Row) -> bool:
    """Whether a row needs a further decode step."""
    return row.finish_reason is None and row.launched < row.limit


def _most_likeliest(rows: list[Row]) -> int:
    """The largest n_likeliest of the rows."""
    return max(row.n_likeliest for row in rows)


def _by_sampling(rows: list[Row]) -> list[int]:
    """The indices of the rows, sorted so that rows with the same sampling options are adjacent."""
    samplings = list(dict.fromkeys(row.sampling for row in rows))
    return sorted(range(len(rows)), key=lambda i: samplings.index(rows[i].sampling))


def _groups(rows: list[Row]) -> Groups:
    """Divide sorted rows into groups with the same sampling options.

    If there is only one group, its end is None. The groups then do not depend on the number of
    rows, so the same compiled step works for any number of rows.
    """
    found: list[tuple[Sampling, int, int | None]] = []
    begin = 0
    for sampling, of_it in groupby(rows, key=lambda row: row.sampling):
        end = begin + len(list(of_it))
        found.append((sampling, begin, end))
        begin = end
    return ((found[0][0], 0, None),) if len(found) == 1 else tuple(found)


def _unwarned() -> AbstractContextManager:
    """A context without NumPy's warnings about infinities and NaNs. `_accept` checks every
    log-probability, and its error is more helpful."""
    return np.errstate(over="ignore", invalid="ignore")
