"""Decide which matrix products are shared with worker processes, and start these workers.

A narrow matrix is one with elements smaller than float32, such as bfloat16 or int8.

Measurements: tools/README.md.
"""

import math
from collections.abc import Sequence
from itertools import count
from weakref import WeakValueDictionary

import numpy as np

from npllama.backend import Backend
from npllama.errors import WorkerError
from npllama.ops.chunks import MANY_ROWS
from npllama.ops.tiles import product
from npllama.ops.workers import MAX_ROWS, Workers, can_work
from npllama.parameters import Matrix
from npllama.shared_arrays import location_of, neighbours, share_joined

SHARED_SIZE = 512 * 1024
"""The minimum number of elements of a narrow matrix whose products are shared. Starting a shared
product takes little time compared with widening so many elements."""

SMALL_WIDTH = 678
"""The largest model width D for which float32 products of few rows are shared.

OpenBLAS uses only one core to multiply one row by a matrix of fewer than 460,800 elements. In
models of this width or less, the D x D matrices have fewer elements, and workers multiply them on
all cores. The workers of such a model multiply its larger matrices too, because BLAS uses only one
thread while workers compute (see NumpyOps.forward_context)."""

SHARED_SMALL_SIZE = 64 * 1024
"""The minimum number of elements of a float32 matrix whose products are shared, in a model of width
SMALL_WIDTH or less."""

CACHED_SIZE = 8 * 1024 * 1024
"""If no registered matrix is narrow, workers are started only if all registered float32 matrices
together have at least this number of elements. Fewer elements stay in the processor's cache, and
sharing then gains nothing."""

MAX_WORKERS = 16
"""The maximum number of processes, including this one. So many processes already use the whole
memory bandwidth, and each further process costs memory."""

_numbers = count()
"""Numbers that identify matrices uniquely within the process, also across `Ops` objects."""


class SharedProducts:
    """The matrix products that worker processes help this process to compute.

    Only products of few rows are shared (see `most_rows`). In a model with large narrow matrices,
    products are shared from the first one on, and the first one waits until the workers have
    started. In a small float32 model (see SMALL_WIDTH), products are shared once the workers have
    started, and this process computes alone before that.

    Attributes:
        workers: the worker processes; None before they are started.
    """

    def __init__(self, backend: Backend) -> None:
        self.workers: Workers | None = None
        self._backend = backend
        self._matrices: WeakValueDictionary[int, Matrix] = WeakValueDictionary()  # by number
        self._n_counted = 0  # len(_matrices) at the last `_count`; -1 after a matrix was added
        self._known: dict[int, int] = {}  # number of a matrix -> its index in the workers' list
        self._has_narrow = False
        self._n_wide = 0  # elements of all float32 matrices
        self._can_work = True  # False after workers failed to start, or ended unexpectedly
        self._is_helped = False  # whether workers help in the current forward pass

    def joined(self, groups: Sequence[Sequence[Matrix]], may_copy: bool) -> list[Matrix | None]:
        """Join each group of matrices (O_i, D) to one matrix (sum O_i, D).

        Matrices that are neighbours in memory are joined as a view. Other groups are joined by a
        copy if may_copy is true.

        Workers can map a copy only if it is in shared memory. If workers may help with the products
        of a group (see `_least`), two kinds of groups are copied there: groups that need a copy,
        and groups whose matrices other processes cannot map, for example because their dtype was
        converted while loading. The second kind is copied even if may_copy is false. Nothing is
        copied to shared memory if all these groups together have too few elements to be worth
        sharing.

        Returns:
            The joined matrix of each group, or None for a group whose matrices remain separate.
        """
        wholes = [_side_by_side(group) for group in groups]
        width = groups[0][0].shape[1]
        moving = [
            i
            for i, (group, whole) in enumerate(zip(groups, wholes, strict=True))
            if self._is_worth_moving(group, whole, width, may_copy)
        ]
        size = sum(_size(w) for i in moving for w in groups[i])
        if moving and size >= max(_least(groups[i][0], width) for i in moving):
            tiled = [(i, name) for i in moving for name in groups[i][0].format.tiled]
            shared = share_joined([[getattr(w, name) for w in groups[i]] for i, name in tiled])
            for i in moving:
                arrays = {name: a for (j, name), a in zip(tiled, shared, strict=True) if j == i}
                wholes[i] = _as_one(groups[i], arrays)
        for i, group in enumerate(groups):
            if wholes[i] is None and may_copy and _is_joinable(group):
                wholes[i] = _as_one(group, {})
        return wholes

    def _is_worth_moving(
        self, group: Sequence[Matrix], whole: Matrix | None, width: int, may_copy: bool
    ) -> bool:
        if not can_work() or self._backend.threads.most == 1 or not _is_joinable(group):
            return False
        if _least(group[0], width) == math.inf:
            return False
        return (whole is None and may_copy) or not all(_can_be_mapped(w) for w in group)

    def numbered(self, w: Matrix, width: int) -> Matrix:
        """Register a matrix for shared products, if it is large and other processes can map it.

        Args:
            width: the width D of the model.

        Returns:
            The matrix with a number that identifies it, or the unchanged matrix.
        """
        if w.number in self._matrices or _size(w) < _least(w, width) or not _can_be_mapped(w):
            return w
        numbered = w.with_derived(number=next(_numbers))
        self._matrices[numbered.number] = numbered
        self._n_counted = -1
        return numbered

    def begin(self) -> bool:
        """Begin a forward pass: start the workers if they are needed and not yet running.

        Call this method within `Threads.turn`. Workers start in the background. If a matrix is
        narrow, the first shared product waits for the workers. If all matrices are float32, this
        process computes without the workers until they are ready.

        Returns:
            Whether workers help in this forward pass.

        Raises:
            WorkerError: a process could not be started, and a matrix is narrow. If all matrices
                are float32, this process computes without workers instead.
        """
        if len(self._matrices) != self._n_counted:
            self._count()
        is_of_use = self._has_narrow or self._n_wide >= CACHED_SIZE
        is_possible = self._can_work and self._backend.threads.most > 1
        if is_of_use and is_possible and self.workers is None:
            self._start()
        workers = self.workers
        self._is_helped = workers is not None and (self._has_narrow or workers.are_ready)
        return self._is_helped

    def _count(self) -> None:
        """Count the registered matrices again, after a model was loaded or freed.

        The workers are stopped, because they map the old set of matrices, and would keep the memory
        of freed matrices in use. `begin` starts new workers.
        """
        matrices = list(self._matrices.values())
        self._n_counted = len(matrices)
        wide = [_size(w) for w in matrices if w.format.is_wide]
        self._n_wide = sum(wide)
        self._has_narrow = len(wide) < len(matrices)
        self._can_work = True
        self._end()

    def has(self, w: Matrix) -> bool:
        """Whether workers help to multiply few rows by this matrix in this forward pass."""
        return self._is_helped and w.number in self._known

    def most_rows(self, w: Matrix) -> int:
        """The maximum number of rows of x in a shared product with this matrix. Threads of this
        process compute products of more rows."""
        return MANY_ROWS - 1 if w.format.is_wide else MAX_ROWS

    def product(self, x: np.ndarray, w: Matrix) -> np.ndarray:
        """y^T = W x^T, without the scale of W's rows: x (M, D) float32 -> (O, M) float32.

        Raises:
            WorkerError: a worker ended, and a matrix is narrow. If all matrices are float32, this
                process computes without workers instead.
        """
        try:
            index = self._known[w.number]
            return self.workers.product(x, w, index, self._backend.threads.count)
        except WorkerError:
            if self._has_narrow:
                raise
            self._can_work = False
            self._end()
            return product(x, w)

    def _start(self) -> None:
        try:
            most = min(self._backend.threads.most, MAX_WORKERS)
            matrices = dict(self._matrices)
            workers = Workers(most, list(matrices.values()))
        except WorkerError:
            if self._has_narrow:
                raise
            self._can_work = False
            return
        self._known = {number: index for index, number in enumerate(matrices)}
        self._backend.threads.helpers += workers.pids
        self.workers = workers

    def _end(self) -> None:
        if self.workers is not None:
            helpers, pids = self._backend.threads.helpers, self.workers.pids
            helpers[:] = [pid for pid in helpers if pid not in pids]
            self.workers.close()
            self.workers, self._is_helped = None, False


def _size(w: Matrix) -> int:
    return math.prod(w.shape)


def _least(w: Matrix, width: int) -> float:
    """The minimum number of elements of a matrix in w's format whose products are shared, in a
    model of this width. It is inf if such products are never shared."""
    if not w.format.is_wide:
        return SHARED_SIZE
    return SHARED_SMALL_SIZE if width <= SMALL_WIDTH else math.inf


def _can_be_mapped(w: Matrix) -> bool:
    """Whether other processes can map the arrays of this matrix from which tiles are widened (see
    tiles.py)."""
    return all(location_of(getattr(w, name)) is not None for name in w.format.tiled)


def _is_joinable(matrices: Sequence[Matrix]) -> bool:
    return len({(w.format, w.shape[1], len([*w.arrays()])) for w in matrices}) == 1


def _side_by_side(matrices: Sequence[Matrix]) -> Matrix | None:
    """All matrices as one view, if they are neighbours in memory; else None."""
    if len(matrices) == 1:
        return matrices[0]
    if not _is_joinable(matrices):
        return None
    tiled = {n: neighbours([getattr(w, n) for w in matrices]) for n in matrices[0].format.tiled}
    return None if any(a is None for a in tiled.values()) else _as_one(matrices, tiled)


def _as_one(matrices: Sequence[Matrix], joined: dict[str, np.ndarray]) -> Matrix:
    """Join the matrices. An array in `joined` is used as it is. Other arrays are concatenated, so
    they are copied."""
    arrays = {}
    for name in ("values", "scale"):
        parts = [getattr(w, name) for w in matrices]
        if parts[0] is not None:
            arrays[name] = joined[name] if name in joined else np.concatenate(parts)
    return Matrix(**arrays)
