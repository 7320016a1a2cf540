"""A heat map with one row per token, which several sections use."""

from collections.abc import Sequence

import numpy as np

from npllama.explore.axes import Scale, row_labels, x_axis
from npllama.explore.heat_map import BAR_HEIGHT, Shades, colour_bar, heat_map
from npllama.explore.labels import piece_label, shorten, text_width
from npllama.explore.svg import FONT, NARROW, Figure, figure, text

_MOST_COLUMNS = 512
_LABEL = 90


def piece_labels(pieces: Sequence[str], width: float = _LABEL) -> list[str]:
    """Pieces as labels of at most this width."""
    return [shorten(piece_label(piece), width, mono=True) for piece in pieces]


def labels_width(labels: Sequence[str]) -> float:
    """Width of row labels at the left of a picture."""
    return max(text_width(label, mono=True) for label in labels) + 8


def rows_height(n: int) -> float:
    """Height of n rows: 20 units each for few rows, down to 10 for 64."""
    return n * min(max(640 / n, 10), 20)


def rows_map(
    pieces: Sequence[str],
    values: np.ndarray,
    shades: Shades,
    column_title: str,
    value_title: str,
    title: str,
    alt: str,
) -> Figure:
    """A heat map of values (T, columns): a row per piece, at most the first 512 columns."""
    n_columns = values.shape[1]
    values = values[:, :_MOST_COLUMNS]
    if n_columns > _MOST_COLUMNS:
        column_title = f"{column_title}: the first {_MOST_COLUMNS:,} of {n_columns:,}"
        alt += f" Only the first {_MOST_COLUMNS} columns are drawn."
    labels = piece_labels(pieces)
    left, height = labels_width(labels), rows_height(len(pieces))
    width = NARROW - left - 12
    parts = [
        row_labels(labels, left - 6, 4, height),
        heat_map(values, shades, (left, 4, width, height), rows=labels),
        _column_axis(values.shape[1], left, 4 + height, width),
        text(left + width / 2, 4 + height + 8 + 2 * FONT, column_title, "middle"),
        colour_bar(shades, left, height + 56, width, value_title),
    ]
    return figure(parts, NARROW, height + 56 + BAR_HEIGHT, title, alt)


def _column_axis(n: int, x: float, y: float, width: float) -> str:
    """Ticks at the middles of the columns 0 to n - 1."""
    if n == 1:
        return text(x + width / 2, y + 4 + FONT, "0", "middle", class_="s")
    half = width / n / 2
    return x_axis(Scale(0, n - 1, x + half, x + width - half), y, show=lambda v: f"{v:,.0f}")
