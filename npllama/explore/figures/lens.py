"""Section 10: the logit lens."""

from collections.abc import Sequence

import numpy as np

from npllama.explore.colours import VIRIDIS, ink_on
from npllama.explore.heat_map import BAR_HEIGHT, Shades, colour_bar
from npllama.explore.labels import (
    array,
    percent,
    piece_label,
    quantity,
    same_length,
    shorten,
    window,
)
from npllama.explore.svg import Figure, colour, figure, group, rect, text

MOST_COLUMNS = 5
"""Tokens for which a screen of 400 px has room."""
_MOST_ROWS = 33
_CELL, _ROW, _LEFT, _RIGHT = 58.0, 26.0, 92.0, 76.0


def logit_lens(
    top: Sequence[Sequence[str]],
    probability: np.ndarray,
    entropy: np.ndarray,
    pieces: Sequence[str],
) -> Figure:
    """The likeliest next token after each layer, if the model ended there.

    A row per state of the residual stream, from the embedding to the last layer; a column per
    token, at most the last 5; the colour is the probability. The rightmost column is the entropy
    in bits after the last token. At most 33 rows are drawn, evenly spaced.

    Args:
        top: (L+1) rows of T pieces.
        probability: (L+1, T), of these pieces.
        entropy: (L+1, T), in bits, of the whole distributions.
        pieces: T pieces, the text.

    What to see: the prediction settles from top to bottom, and the entropy falls.

    Source: nostalgebraist 2020 (interpreting GPT: the logit lens).
    """
    probability, entropy = array(probability, "probability", 2), array(entropy, "entropy", 2)
    same_length(len(probability), top=top, entropy=entropy)
    for row in top:
        same_length(probability.shape[1], row=row)
    same_length(probability.shape[1], pieces=pieces, entropy=entropy[0])
    rows = window(len(top), _MOST_ROWS)
    columns = range(max(0, len(pieces) - MOST_COLUMNS), len(pieces))
    shades = Shades(0.0, 1.0, VIRIDIS)
    width = _LEFT + max(_CELL * len(columns), 220) + _RIGHT
    header = [
        _fitted(_LEFT + (i + 0.5) * _CELL, 18, pieces[t], "b m") for i, t in enumerate(columns)
    ]
    parts = [text(0, 18, "after", class_="s"), *header]
    right = _LEFT + _CELL * len(columns) + 8
    parts.append(text(right, 18, "entropy", class_="s"))
    for place, row in enumerate(rows):
        y = 26 + place * _ROW
        name = "embedding" if row == 0 else f"layer {row - 1}"
        parts.append(text(_LEFT - 8, y + 18, name, "end"))
        parts.append(text(right, y + 18, f"{entropy[row, -1]:.2f} bit", class_="s"))
        for i, t in enumerate(columns):
            share = float(probability[row, t])
            tip = (
                f"{name}, after {piece_label(pieces[t])}: {piece_label(top[row][t])} "
                f"{percent(share)}, entropy {quantity(float(entropy[row, t]))} bit"
            )
            parts.append(_cell(_LEFT + i * _CELL, y, top[row][t], shades.colour(share), tip))
    y = 26 + len(rows) * _ROW + 10
    parts.append(
        colour_bar(shades, _LEFT, y, 220, "probability of the token shown", percent, limit=width)
    )
    alt = (
        f"The likeliest next token after each of {len(top) - 1} layers. After "
        f"{piece_label(pieces[-1])} the embedding alone says {piece_label(top[0][-1])} "
        f"({percent(float(probability[0, -1]))}), the last layer {piece_label(top[-1][-1])} "
        f"({percent(float(probability[-1, -1]))}); the entropy goes from "
        f"{entropy[0, -1]:.2f} to {entropy[-1, -1]:.2f} bits."
    )
    if len(pieces) > MOST_COLUMNS:
        alt += f" The last {MOST_COLUMNS} of {len(pieces)} tokens are drawn."
    return figure(parts, width, y + BAR_HEIGHT, "Logit lens", alt)


def _fitted(x: float, y: float, piece: str, class_: str, **values: object) -> str:
    """A centred piece, shortened to the width of a cell."""
    label = shorten(piece_label(piece), _CELL - 6, mono=True)
    return text(x, y, label, "middle", class_=class_, **values)


def _cell(x: float, y: float, piece: str, background: str, tip: str) -> str:
    box = rect(x, y, _CELL, _ROW, fill=background, stroke=colour("paper"))
    label = _fitted(x + _CELL / 2, y + 18, piece, "m", style=f"fill:{ink_on(background)}")
    return group(box, label, tip=tip)
