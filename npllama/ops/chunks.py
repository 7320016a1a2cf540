"""One operation on many tokens, cut up: in chunks that stay in a core's cache, on all cores."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from npllama.threads import Threads

Item = TypeVar("Item")

CHUNK = 64 * 1024
"""Numbers of an elementwise operation that are computed at a time, since several ufuncs go over
them: they stay in a core's own cache, and are worth a thread's waking up."""

MANY_ROWS = 64
"""Rows from which on a product is cut up among threads that each use BLAS on one core, and all
else among the same: 1.2 times as fast at 512 rows of 768 as BLAS with two threads, which go on
spinning for a while and disturb what follows. With fewer rows waking threads up takes longer."""


def for_each(
    threads: Threads, function: Callable[[Item, int], None], items: Sequence[Item], n_rows: int
) -> None:
    """function(item, slot) for each; on all cores where the rows, tokens, are many. NumPy's error
    state is the caller's in every thread."""
    if n_rows < MANY_ROWS or len(items) == 1:
        for item in items:
            function(item, 0)
    else:
        state = np.geterr()

        def compute(item: Item, slot: int) -> None:
            with np.errstate(**state):
                function(item, slot)

        threads.map(compute, items)


def in_chunks(
    threads: Threads,
    function: Callable[[slice], None],
    n_columns: int,
    n_rows: int,
    width: int = 1,
) -> None:
    """function(slice of columns) until all are done, where a column has `width` numbers in each
    row, a token: of many rows some columns at a time, on all cores."""
    if n_rows < MANY_ROWS:
        function(slice(None))
    else:
        at_once = max(1, CHUNK // (width * n_rows))
        begins = range(0, n_columns, at_once)
        chunks = [slice(begin, min(begin + at_once, n_columns)) for begin in begins]
        for_each(threads, lambda chunk, _slot: function(chunk), chunks, n_rows)
