"""Which products worker processes share, and those workers: started when first of use."""

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
"""Numbers of a narrow matrix from which on worker processes share its product: handing it out
takes as long as widening some 50,000."""

SMALL_WIDTH = 678
"""Width D of a model up to which worker processes share products of few rows in float32 as well.
For one row OpenBLAS uses one core where a matrix has fewer than 460,800 numbers, as those of D x D
then have: a decode step is 1.2 to 1.3 times as fast at D = 288, and as fast at 640."""

SHARED_SMALL_SIZE = 64 * 1024
"""Numbers of a float32 matrix of such a model from which on handing it out is worth it."""

CACHED_SIZE = 8 * 1024 * 1024
"""Numbers of all those matrices below which it is not: they stay in the processor's cache."""

MAX_WORKERS = 16
"""Processes at most: each takes some 35 MB, and memory's speed is used up before that many."""

_numbers = count()
"""Of matrices, none of which has that of another, whatever `ops` it belongs to."""


class SharedProducts:
    """The products that worker processes compute together with this one.

    Those with large matrices in a narrow dtype always, and those of a small float32 model, which
    can do without, as soon as the workers have started.

    Attributes:
        workers: None until they are of use.
    """

    def __init__(self, backend: Backend) -> None:
        self.workers: Workers | None = None
        self._backend = backend
        self._matrices: WeakValueDictionary[int, Matrix] = WeakValueDictionary()  # by number
        self._n_counted = 0  # of those when they were last counted; -1 where there are new ones
        self._known: dict[int, int] = {}  # number of a matrix -> its index among the workers'
        self._has_narrow = False
        self._n_wide = 0  # numbers of all float32 matrices
        self._can_work = True  # unless they cannot be started, or have ended
        self._is_helped = False  # by workers, in this forward

    def joined(self, groups: Sequence[Sequence[Matrix]], may_copy: bool) -> list[Matrix | None]:
        """Of each group of matrices (O_i, D) one matrix (sum O_i, D), where other processes can
        map it if it is worth that for them.

        Matrices that lie side by side are viewed as one. Nothing is copied but those in this
        process's own memory, which were converted while loading, and where it `may` be those
        that lie apart.

        Returns:
            For each group its matrix; None where its matrices stay apart.
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
        """The matrix with a number, by which its products are shared, where that is worth it.

        Args:
            width: D of the model.
        """
        if w.number in self._matrices or _size(w) < _least(w, width) or not _can_be_mapped(w):
            return w
        numbered = w.with_derived(number=next(_numbers))
        self._matrices[numbered.number] = numbered
        self._n_counted = -1
        return numbered

    def begin(self) -> bool:
        """Start workers where they are of use and there are none. Call it in a `Threads.turn`.

        They start while a prompt is read; only narrow matrices wait for them.

        Returns:
            Whether they help in the forward that begins now.

        Raises:
            WorkerError: a process could not be started; float32 goes on without.
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
        """Count the matrices that there are, since a model has come or gone; workers that know
        others, and would keep the memory of those that are gone, end."""
        matrices = list(self._matrices.values())
        self._n_counted = len(matrices)
        wide = [_size(w) for w in matrices if w.format.is_wide]
        self._n_wide = sum(wide)
        self._has_narrow = len(wide) < len(matrices)
        self._can_work = True
        self._end()

    def has(self, w: Matrix) -> bool:
        """Whether a product of few rows with this matrix is shared in this forward."""
        return self._is_helped and w.number in self._known

    def most_rows(self, w: Matrix) -> int:
        """Rows of x up to which that is worth it: of float32 more are cut up among threads."""
        return MANY_ROWS - 1 if w.format.is_wide else MAX_ROWS

    def product(self, x: np.ndarray, w: Matrix) -> np.ndarray:
        """y^T = W x^T, up to the factors of W's rows: x (M, D) float32 -> (O, M) float32.

        Raises:
            WorkerError: a process ended; float32 goes on without.
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
    """Numbers from which on a matrix of a model of this width is shared with workers."""
    if not w.format.is_wide:
        return SHARED_SIZE
    return SHARED_SMALL_SIZE if width <= SMALL_WIDTH else math.inf


def _can_be_mapped(w: Matrix) -> bool:
    """Whether other processes can map all that tiles are widened from."""
    return all(location_of(getattr(w, name)) is not None for name in w.format.tiled)


def _is_joinable(matrices: Sequence[Matrix]) -> bool:
    return len({(w.format, w.shape[1], len([*w.arrays()])) for w in matrices}) == 1


def _side_by_side(matrices: Sequence[Matrix]) -> Matrix | None:
    """The matrices as one, a view, where they lie one after the other in memory."""
    if len(matrices) == 1:
        return matrices[0]
    if not _is_joinable(matrices):
        return None
    tiled = {n: neighbours([getattr(w, n) for w in matrices]) for n in matrices[0].format.tiled}
    return None if any(a is None for a in tiled.values()) else _as_one(matrices, tiled)


def _as_one(matrices: Sequence[Matrix], joined: dict[str, np.ndarray]) -> Matrix:
    """The matrices as one, of arrays that are joined already and of copies of the others."""
    arrays = {}
    for name in ("values", "scale"):
        parts = [getattr(w, name) for w in matrices]
        if parts[0] is not None:
            arrays[name] = joined[name] if name in joined else np.concatenate(parts)
    return Matrix(**arrays)
