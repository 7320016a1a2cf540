"""Which products worker processes share, and those workers: started when first of use."""

import math

import numpy as np

from npllama.backend import Backend
from npllama.errors import WorkerError
from npllama.ops.pieces import MANY_ROWS
from npllama.ops.tiles import product
from npllama.ops.workers import MAX_ROWS, Workers, can_work
from npllama.parameters import Head, Layer, Matrix, Part
from npllama.shared_arrays import place_of, share

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
        self._matrices: dict[int, np.ndarray] = {}  # by their id, which they keep while here
        self._numbers: dict[int, int] = {}  # of those matrices that the workers know
        self._has_narrow = False
        self._n_wide = 0  # numbers of all float32 matrices
        self._can_work = True  # unless they cannot be started, or have ended
        self._is_helped = False  # by workers, in this forward

    def moved(self, part: Part) -> Part:
        """The part with its matrices where other processes can map them, side by side.

        Nothing is copied but matrices in this process's own memory, those that were converted
        while loading.
        """
        if not can_work() or self._backend.threads.most == 1:
            return part
        width = _width(part)
        matrices = [a for a in part.arrays() if a.ndim == 2 and _least(a, width) < math.inf]
        moving = [a for a in matrices if place_of(a) is None]
        if not moving or sum(a.size for a in moving) < max(_least(a, width) for a in moving):
            return part
        shared = dict(zip(map(id, moving), share(moving), strict=True))
        return part.map(lambda array: shared.get(id(array), array))

    def add(self, matrices: list[Matrix], part: Layer | Head) -> None:
        """Share the products with these matrices of a part, where that is worth it."""
        width = _width(part)
        for values in (w.values for w in matrices):
            is_known = id(values) in self._matrices
            if is_known or values.size < _least(values, width) or place_of(values) is None:
                continue
            self._matrices[id(values)] = values
            if values.dtype == np.float32:
                self._n_wide += values.size
            else:
                self._has_narrow = True
            self._can_work = True
            self._end()  # those workers that there are do not know of it

    def begin(self) -> bool:
        """Start workers where they are of use and there are none. Call it in a `Threads.turn`.

        They start while a prompt is read; only narrow matrices wait for them.

        Returns:
            Whether they help in the forward that begins now.

        Raises:
            WorkerError: a process could not be started; float32 goes on without.
        """
        is_of_use = self._has_narrow or self._n_wide >= CACHED_SIZE
        is_possible = self._can_work and self._backend.threads.most > 1
        if is_of_use and is_possible and self.workers is None:
            self._start()
        workers = self.workers
        self._is_helped = workers is not None and (self._has_narrow or workers.are_ready)
        return self._is_helped

    def has(self, values: np.ndarray) -> bool:
        """Whether a product of few rows with these values is shared in this forward."""
        return self._is_helped and id(values) in self._numbers

    def most_rows(self, values: np.ndarray) -> int:
        """Rows of x up to which that is worth it: of float32 more are cut up among threads."""
        return MANY_ROWS - 1 if values.dtype == np.float32 else MAX_ROWS

    def product(self, x: np.ndarray, values: np.ndarray) -> np.ndarray:
        """y^T = W x^T: x (M, D) float32 -> (O, M) float32, for values W that it `has`.

        Raises:
            WorkerError: a process ended; float32 goes on without.
        """
        try:
            number = self._numbers[id(values)]
            return self.workers.product(x, number, self._backend.threads.count)
        except WorkerError:
            if self._has_narrow:
                raise
            self._can_work = False
            self._end()
            return product(x, values)

    def _start(self) -> None:
        try:
            most = min(self._backend.threads.most, MAX_WORKERS)
            workers = Workers(most, list(self._matrices.values()))
        except WorkerError:
            if self._has_narrow:
                raise
            self._can_work = False
            return
        self._numbers = {key: number for number, key in enumerate(self._matrices)}
        self._backend.threads.helpers += workers.pids
        self.workers = workers

    def _end(self) -> None:
        if self.workers is not None:
            helpers, pids = self._backend.threads.helpers, self.workers.pids
            helpers[:] = [pid for pid in helpers if pid not in pids]
            self.workers.close()
            self.workers, self._is_helped = None, False


def _width(part: Matrix | Layer | Head) -> int:
    """D of the model, of which this is a part."""
    if isinstance(part, Layer):
        return part.wq.shape[1]
    return part.lm_head.shape[1] if isinstance(part, Head) else part.shape[1]


def _least(values: np.ndarray, width: int) -> float:
    """Numbers from which on a matrix of a model of this width is shared with workers."""
    if values.dtype != np.float32:
        return SHARED_SIZE
    return SHARED_SMALL_SIZE if width <= SMALL_WIDTH else math.inf
