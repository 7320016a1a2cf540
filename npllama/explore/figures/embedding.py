"""Section 2: the rows of the embedding."""

from collections.abc import Sequence

import numpy as np

from npllama.explore.figures.rows import rows_map
from npllama.explore.heat_map import signed
from npllama.explore.labels import array, count, quantity, same_length
from npllama.explore.svg import Figure


def embedding_rows(pieces: Sequence[str], rows: np.ndarray) -> Figure:
    """The embedding of each piece as a row of colours, blue below 0 and orange above.

    Args:
        pieces: T pieces.
        rows: (T, D).

    What to see: a piece that occurs twice has the same row twice, because a row depends neither on
    the position nor on the neighbours.
    """
    rows = array(rows, "rows", 2)
    same_length(len(rows), pieces=pieces)
    alt = (
        f"A heat map of {count(rows.shape[0], 'embedding row')} of "
        f"{count(rows.shape[1], 'element')}, from {quantity(rows.min())} to "
        f"{quantity(rows.max())}."
    )
    return rows_map(pieces, rows, signed(rows), "element", "value", "Rows of the embedding", alt)
