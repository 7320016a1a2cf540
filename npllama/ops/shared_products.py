"""Which products worker processes share, and those workers: started when first of use."""

import math
import threading

import numpy as np

from npllama.backend import Array
from npllama.errors import WorkerError
from npllama.ops.pieces import MANY_ROWS
from npllama.ops.workers import MAX_ROWS, Workers, can_work
from npllama.parameters import Head, Layer, Matrix
from npllama.shared_arrays import place_of, share
from npllama.threads import Threads

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

    def __init__(self, threads: Threads) -> None:
        self.workers: Workers | None = None
        self._threads = threads
        # id of a matrix's values -> its number, and the values
        self._matrices: dict[int, tuple[int, np.ndarray]] = {}
        self._has_narrow = False
        self._n_wide = 0  # numbers of all float32 matrices
        self._can_start = True
        self._is_helped = False  # by workers, in this forward
        self._lock = threading.Lock()

    def movable(self, part: Matrix | Layer | Head) -> Matrix | Layer | Head:
        """The part with its matrices where other processes can map them, side by side.

        Nothing is copied but matrices in this process's own memory, those that were converted
        while loading.
        """
        width, moving = _width(part), []
        if not can_work() or self._threads.most == 1:
            return part

        def look(array: Array) -> Array:
            if array.ndim == 2 and place_of(array) is None:
                moving.append(array)
            return array

        part.map(look)
        least = max((_least(array, width) for array in moving), default=math.inf)
        if sum(array.size for array in moving) < least:
            return part
        shared = dict(zip(map(id, moving), share(moving), strict=True))
        return part.map(lambda array: shared.get(id(array), array))

    def add(self, matrices: list[Matrix], part: Layer | Head) -> None:
        """Share the products with these matrices of a part, where that is worth it."""
        for values in (w.values for w in matrices):
            if values.size < _least(values, _width(part)) or place_of(values) is None:
                continue
            self._matrices[id(values)] = len(self._matrices), values
            if values.dtype == np.float32:
                self._n_wide += values.size
            else:
                self._has_narrow = True
            self._can_start = True
            self._end()  # those workers that there are do not know of it

    def begin(self) -> bool:
        """Start workers where they are of use and there are none; whether they help in the
        forward that begins now. They start while a prompt is read; only for narrow matrices are
        they waited for.

        Raises:
            WorkerError: a process could not be started; float32 goes on without.
        """
        is_of_use = self._has_narrow or self._n_wide >= CACHED_SIZE
        with self._lock:  # one of several threads starts them
            if is_of_use and self._can_start and self.workers is None and self._threads.most > 1:
                self._start()
            workers = self.workers
        self._is_helped = workers is not None and (self._has_narrow or workers.are_ready)
        return self._is_helped

    def has(self, values: np.ndarray) -> bool:
        """Whether a product of few rows with these values is shared in this forward."""
        return self._is_helped and id(values) in self._matrices

    def most_rows(self, values: np.ndarray) -> int:
        """Rows of x up to which that is worth it: of float32 more are cut up among threads."""
        return MANY_ROWS - 1 if values.dtype == np.float32 else MAX_ROWS

    def product(self, x: np.ndarray, values: np.ndarray) -> np.ndarray:
        """y^T = W x^T: x (M, D) float32 -> (N, M) float32, for values W that it `has`."""
        number, _values = self._matrices[id(values)]
        return self.workers.product(x, number, self._threads.count)

    def _start(self) -> None:
        values = [values for _number, values in self._matrices.values()]
        try:
            self.workers = Workers(min(self._threads.most, MAX_WORKERS), values)
        except WorkerError:
            if self._has_narrow:
                raise
            self._can_start = False
        else:
            self._threads.helpers += self.workers.pids

    def _end(self) -> None:
        if self.workers is not None:
            self._threads.helpers.clear()
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
