"""Split one operation on many tokens into chunks that fit a core's cache, and use all cores.

Measurements: tools/README.md.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from npllama.threads import Threads

Item = TypeVar("Item")

CHUNK = 64 * 1024
"""The number of elements per chunk of an elementwise operation. Several ufuncs read a chunk one
after another, so it should fit a core's private cache. It should also be so large that waking a
thread for it saves time."""

MANY_ROWS = 64
"""The minimum number of rows for which operations are split over our own threads.

For a matrix product, each of our threads calls BLAS, which then uses one thread per call. One call
of BLAS with several threads would be slower, because BLAS's threads keep spinning after a product
and slow down the next operation. For fewer rows, waking our threads costs more time than it
saves."""


def for_each(
    threads: Threads, function: Callable[[Item, int], None], items: Sequence[Item], n_rows: int
) -> None:
    """Call function(item, slot) for each item, on all cores if n_rows is at least MANY_ROWS.

    Calls that run at the same time have different slots. Every thread uses the caller's NumPy error
    state.
    """
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
    """Call function(slice) for slices that cover all columns.

    If n_rows is at least MANY_ROWS, a slice has about CHUNK elements and the calls use all cores.
    Otherwise there is one call for all columns.

    Args:
        n_columns: columns to split, such as heads or ffn elements.
        n_rows: tokens.
        width: the number of elements of one token in one column, such as the head width.
    """
    if n_rows < MANY_ROWS:
        function(slice(None))
    else:
        at_once = max(1, CHUNK // (width * n_rows))
        begins = range(0, n_columns, at_once)
        chunks = [slice(begin, min(begin + at_once, n_columns)) for begin in begins]
        for_each(threads, lambda chunk, _slot: function(chunk), chunks, n_rows)
