"""The device arrays that a decode step reads and writes, besides the cache."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from npllama.backend import Array, Backend


@dataclass(frozen=True)
class StepState:
    """The device arrays of the rows that are decoded together. A step updates them in-place.

    Attributes:
        rows: (B,) int32, the rows of the cache.
        tokens: (B,) int64, the last token of each row. The next step reads it as input, and
            replaces it with the new token.
        uniforms: (rows of the cache, n_steps) float64, the random numbers of all steps; None for
            greedy decoding.
        at: (B,) int64, the index of each row's next random number in the flattened `uniforms`. Rows
            that began at different times are at different steps.
        seen: (B, V) bool, the tokens of each row so far; None without a repetition penalty.
    """

    rows: Array
    tokens: Array
    uniforms: Array | None
    at: Array
    seen: Array | None

    def next_uniform(self) -> Array | None:
        """The random numbers (B,) of this step; advances `at` to the next step."""
        if self.uniforms is None:
            return None
        at = self.at
        uniform = self.uniforms.reshape(-1)[at]  # (rows, n_steps) -> (rows * n_steps,) -> (B,)
        at += 1  # in-place
        return uniform


class StepBuffers:
    """The memory of the states of one cache. Captured steps contain its addresses.

    All states that `joined` returns share this memory, so only the newest one is valid.

    Args:
        batch: the number of rows of the cache, and the maximum number of rows of a state.
        n_steps: the maximum number of new tokens per row.
    """

    def __init__(self, backend: Backend, batch: int, n_steps: int) -> None:
        self._backend = backend
        self._batch = batch
        self._n_steps = n_steps
        self._memory: dict[str, Array] = {}
        self._states: dict[tuple[int, bool, int | None], StepState] = {}

    def begin(
        self, rows: Sequence[int], uniforms: np.ndarray | None, seen: np.ndarray | None
    ) -> StepState:
        """The state of B rows before their first step.

        Except for `uniforms`, its arrays are newly allocated. `joined` copies them to the shared
        memory that decode steps read.

        Args:
            rows: B rows of the cache, none of which belongs to a state that is still in use.
            uniforms: (B, n) float64 on the host, the random numbers of the first n steps.
            seen: (B, V) bool on the host.
        """
        move = self._backend.to_device
        on_device = move(np.asarray(rows, dtype="int32"))
        all_uniforms = None
        if uniforms is not None:
            all_uniforms = self._uniforms()
            all_uniforms[on_device, : uniforms.shape[1]] = move(uniforms)
        return StepState(
            rows=on_device,
            tokens=self._backend.xp.zeros(len(rows), dtype="int64"),
            uniforms=all_uniforms,
            at=on_device.astype("int64") * self._n_steps,  # step 0 of each row
            seen=None if seen is None else move(seen),
        )

    def joined(self, states: Sequence[StepState], index: Array) -> StepState:
        """One state of B rows, selected from several states. It replaces the earlier states.

        Args:
            index: (B,) on the device, indices into the concatenated rows of `states`.
        """
        xp = self._backend.xp

        def gathered(parts: Sequence[Array]) -> Array:
            return (parts[0] if len(parts) == 1 else xp.concatenate(parts))[index]  # a copy

        draws = any(state.uniforms is not None for state in states)
        n_vocab = next((s.seen.shape[1] for s in states if s.seen is not None), None)
        joined = self._state(len(index), draws, n_vocab)
        joined.rows[...] = gathered([state.rows for state in states])
        joined.tokens[...] = gathered([state.tokens for state in states])
        joined.at[...] = gathered([state.at for state in states])
        if n_vocab is not None:
            joined.seen[...] = gathered(
                [
                    xp.zeros((len(s.rows), n_vocab), dtype="bool") if s.seen is None else s.seen
                    for s in states
                ]
            )
        return joined

    def _state(self, n_rows: int, draws: bool, n_vocab: int | None) -> StepState:
        key = n_rows, draws, n_vocab
        if key not in self._states:
            b = self._batch
            self._states[key] = StepState(
                rows=self._part("rows", "int32", b)[:n_rows],
                tokens=self._part("tokens", "int64", b)[:n_rows],
                uniforms=self._uniforms() if draws else None,
                at=self._part("at", "int64", b)[:n_rows],
                seen=None if n_vocab is None else self._part("seen", "bool", b, n_vocab)[:n_rows],
            )
        return self._states[key]

    def _uniforms(self) -> Array:
        """The random numbers (batch, n_steps). Row i belongs to row i of the cache, so nothing is
        copied when rows join or leave a state."""
        return self._part("uniforms", "float64", self._batch, self._n_steps)

    def _part(self, name: str, dtype: str, *shape: int) -> Array:
        if name not in self._memory:
            self._memory[name] = self._backend.xp.zeros(shape, dtype=dtype)
        return self._memory[name]
