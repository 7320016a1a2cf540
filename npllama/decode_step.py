"""What a decode step reads and writes on the device, besides the cache."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from npllama.backend import Array, Backend


@dataclass(frozen=True)
class StepState:
    """The device arrays of the rows that are decoded together; a step updates them in place.

    Attributes:
        rows: (B,) int32, the rows of the cache.
        tokens: (B,) int64, each row's last token: what the next step feeds, and then replaces.
        uniforms: (n_steps, B) float64, the random numbers of all steps; None where the likeliest
            token is taken.
        step: (1,) int64, which of the uniforms are next.
        seen: (B, V) bool, the tokens of each row so far; None where no penalty needs them.
    """

    rows: Array
    tokens: Array
    uniforms: Array | None
    step: Array
    seen: Array | None

    def next_uniform(self) -> Array | None:
        """(B,) numbers for the tokens that are chosen now."""
        if self.uniforms is None:
            return None
        step = self.step
        uniform = self.uniforms[step][0]  # (n_steps, B), (1,) -> (1, B) -> (B,)
        step += 1  # in place
        return uniform


class StepBuffers:
    """The memory of a cache's states. A captured step holds its addresses.

    States of different numbers of rows lie in the same memory, one at a time: that of fewer rows
    takes the place of the one whose rows have ended.

    Args:
        batch: rows of the largest state.
        n_steps: tokens that a row may be given at most.
    """

    def __init__(self, backend: Backend, batch: int, n_steps: int) -> None:
        self._backend = backend
        self._batch = batch
        self._n_steps = n_steps
        self._n_drawn = 0  # steps that there are random numbers for
        self._memory: dict[str, Array] = {}
        self._states: dict[tuple[int, bool, int | None], StepState] = {}

    def begin(
        self, rows: Sequence[int], uniforms: np.ndarray | None, seen: np.ndarray | None
    ) -> StepState:
        """The state of B rows before their first step.

        Args:
            rows: of the cache.
            uniforms: (n, B) float64 on the host, the random numbers of the first n steps.
            seen: (B, V) bool on the host.
        """
        n_vocab = None if seen is None else seen.shape[1]
        state = self._state(len(rows), uniforms is not None, n_vocab)
        move = self._backend.to_device
        state.rows[...] = move(np.asarray(rows, dtype="int32"))
        state.step[...] = 0
        if uniforms is not None:
            self._n_drawn = len(uniforms)
            state.uniforms[: self._n_drawn] = move(uniforms)
        if seen is not None:
            state.seen[...] = move(seen)
        return state

    def some_rows(self, state: StepState, index: Array) -> StepState:
        """The state of some of a state's rows, `index` (B',) on the device; it takes the place of
        the other one."""
        n_vocab = None if state.seen is None else state.seen.shape[1]
        some = self._state(len(index), state.uniforms is not None, n_vocab)
        some.rows[...] = state.rows[index]  # gathered, then copied: the memory is the same
        some.tokens[...] = state.tokens[index]
        if state.uniforms is not None:
            n = self._n_drawn
            some.uniforms[:n] = state.uniforms[:n, index]  # (n, B) -> (n, B')
        if state.seen is not None:
            some.seen[...] = state.seen[index]  # (B, V) -> (B', V)
        return some

    def _state(self, n_rows: int, draws: bool, n_vocab: int | None) -> StepState:
        key = n_rows, draws, n_vocab
        if key not in self._states:
            b, n = self._batch, self._n_steps
            self._states[key] = StepState(
                rows=self._part("rows", "int32", b)[:n_rows],
                tokens=self._part("tokens", "int64", b)[:n_rows],
                uniforms=None
                if not draws
                # (n*B,) -> (n, B'), without gaps between the rows
                else self._part("uniforms", "float64", n * b)[: n * n_rows].reshape(n, n_rows),
                step=self._part("step", "int64", 1),
                seen=None if n_vocab is None else self._part("seen", "bool", b, n_vocab)[:n_rows],
            )
        return self._states[key]

    def _part(self, name: str, dtype: str, *shape: int) -> Array:
        if name not in self._memory:
            self._memory[name] = self._backend.xp.zeros(shape, dtype=dtype)
        return self._memory[name]
