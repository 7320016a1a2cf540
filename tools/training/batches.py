"""The batches of each training step, a pure function of (seed, step) so that a run can resume."""

from dataclasses import dataclass

import numpy as np

from npllama.errors import InputError


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass.

    Attributes:
        tokens: (B, T) int32.
        targets: (B, T) int32, the token that follows each token.
        weights: (B, T) float32, 1 / (number of targets in the whole step), or 0 after the end of
            a row.
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


class Batches:
    """Shuffles sequences in each epoch and cuts them into steps of `batch` rows.

    If not packed, each row is one sequence, or a part of one that exceeds the context. If packed,
    all sequences of an epoch are concatenated and cut into rows that fill the context. Packed rows
    need no padding, but begin and end in the middle of a story.

    Rows left at the end of an epoch that do not fill a step are skipped in that epoch.

    The rows of a step are sorted by length before they are cut into micro-batches, which reduces
    padding. All targets of a step have the same weight, whatever their micro-batch.
    """

    def __init__(
        self,
        sequences: list[np.ndarray],
        *,
        context: int,
        batch: int,
        micro_batch: int,
        packed: bool,
        seed: int,
    ) -> None:
        self.sequences = sequences
        self.context = context
        self.batch = batch
        self.micro_batch = micro_batch
        self.packed = packed
        self.seed = seed
        self._epoch: tuple[int, list[np.ndarray]] | None = None
        # the number of rows is the same in every epoch: the order affects only where packed rows
        # are cut
        self.rows_per_epoch = len(self.rows(0))
        if self.rows_per_epoch < batch:
            raise InputError(
                f"the text has {self.rows_per_epoch} rows, but a step reads {batch}: "
                "choose a smaller --batch or a longer text"
            )
        self.steps_per_epoch = self.rows_per_epoch // batch

    def rows(self, epoch: int) -> list[np.ndarray]:
        """The rows of an epoch in order, each with 2 to context + 1 ids."""
        if self._epoch is None or self._epoch[0] != epoch:
            generator = np.random.default_rng([self.seed, epoch])
            size = self.context + 1  # the last id of a row is only a target
            if self.packed:
                order = generator.permutation(len(self.sequences))
                stream = np.concatenate([self.sequences[i] for i in order])
                rows = _windows(stream, size)
                rows = [rows[i] for i in generator.permutation(len(rows))]
            else:
                rows = [row for sequence in self.sequences for row in _windows(sequence, size)]
                rows = [rows[i] for i in generator.permutation(len(rows))]
            self._epoch = epoch, [row for row in rows if len(row) > 1]  # one id has no target
        return self._epoch[1]

    def step(self, step: int) -> list[MicroBatch]:
        """The micro-batches of step 0, 1, ..., with the longest rows first."""
        epoch, i = divmod(step, self.steps_per_epoch)
        rows = self.rows(epoch)[i * self.batch : (i + 1) * self.batch]
        rows = sorted(rows, key=len, reverse=True)
        n_targets = sum(len(row) - 1 for row in rows)
        return [
            _micro_batch(rows[begin : begin + self.micro_batch], 1 / n_targets)
            for begin in range(0, len(rows), self.micro_batch)
        ]


def _windows(ids: np.ndarray, size: int) -> list[np.ndarray]:
    """Cut ids into pieces of at most `size`. Consecutive pieces share one id: the last target of
    one is the first token of the next."""
    return [ids[i : i + size] for i in range(0, max(len(ids) - 1, 1), size - 1)]


def _micro_batch(rows: list[np.ndarray], weight: float) -> MicroBatch:
    longest = max(len(row) for row in rows) - 1
    tokens, targets = np.zeros((2, len(rows), longest), dtype="int32")
    weights = np.zeros((len(rows), longest), dtype="float32")
    for b, row in enumerate(rows):
        n = len(row) - 1
        tokens[b, :n], targets[b, :n] = row[:-1], row[1:]
        weights[b, :n] = weight
    return MicroBatch(tokens, targets, weights)
