"""Section 6: attention maps."""

from collections.abc import Sequence

import numpy as np

from npllama.explore.axes import column_labels, column_labels_height, row_labels
from npllama.explore.colours import VIRIDIS, ink_on
from npllama.explore.figures.rows import labels_width, piece_labels
from npllama.explore.heat_map import BAR_HEIGHT, Shades, colour_bar, hatching, heat_map, magnitude
from npllama.explore.labels import array, count, percent, same_length, text_width, window
from npllama.explore.svg import FONT, NARROW, Figure, colour, element, figure, rect, text

MOST_MAPS = 8
"""Layers, and heads of each, that are drawn of a large model."""
# the root shows small shares too: with T tokens most of them are about 1 / T
_SHARES = Shades(0.0, 1.0, VIRIDIS, power=0.5)


def attention_maps(weights: np.ndarray, pieces: Sequence[str]) -> Figure:
    """The attention of all heads as small maps, a row of maps per layer.

    Row i of a map is the shares that token i gives to the tokens 0 to i. All maps have one scale of
    colours, which follows the square root of the share. At most 8 layers and 8 heads are drawn,
    evenly spaced.

    Args:
        weights: (L, H, T, T).
        pieces: T pieces.

    What to see: some heads read the token before (a line beside the diagonal), some the first
    token (a column at the left), some particular words.
    """
    weights = array(weights, "weights", 4)
    same_length(weights.shape[2], pieces=pieces)
    _check_square(weights)
    layers, heads = (window(n, MOST_MAPS) for n in weights.shape[:2])
    left, top, gap = 46.0, 24.0, 5.0
    step = (NARROW - left) / len(heads)
    side = min(step - gap, 120)
    step = side + gap
    every = 1 if step >= text_width("h00") else 2
    parts = [
        text(left + i * step + side / 2, 16, f"h{h}", "middle", class_="s")
        for i, h in enumerate(heads)
        if i % every == 0
    ]
    for row, layer in enumerate(layers):
        y = top + row * step
        parts.append(text(left - 8, y + side / 2 + 5, f"L{layer}", "end", class_="s"))
        for column, head in enumerate(heads):
            box = (left + column * step, y, side, side)
            small = heat_map(weights[layer, head], _SHARES, box, causal=True, hover=False)
            tip = f"layer {layer}, head {head}"
            parts.append(element("g", small, tip=tip, data_layer=layer, data_head=head))
    y = top + len(layers) * step + 6
    parts.append(colour_bar(_SHARES, left, y, NARROW - left - 14, "share of attention"))
    later = weights[:, :, 1:, 0] if len(pieces) > 1 else weights[..., 0]
    alt = (
        f"{count(len(layers), 'layer')} by {count(len(heads), 'head')}, each a map of "
        f"{len(pieces)} by {count(len(pieces), 'token')}. On average a later token gives "
        f"{percent(float(later.mean()))} of its attention to the first token shown."
    )
    if len(layers) * len(heads) < weights.shape[0] * weights.shape[1]:
        alt += f" Of {weights.shape[0]} layers and {weights.shape[1]} heads, a part is drawn."
    return figure(parts, NARROW, y + BAR_HEIGHT, "Attention of all heads", alt)


def attention_map(weights: np.ndarray, pieces: Sequence[str], layer: int, head: int) -> Figure:
    """The attention of one head, large: a row per token that reads, a column per token read.

    Args:
        weights: (T, T); row i is the attention of token i.
        pieces: T pieces.
        layer, head: of the weights, for the labels.

    What to see: each row sums to 1. The hatched half is the mask: a token sees no later token.
    """
    weights = array(weights, "weights", 2)
    same_length(len(weights), pieces=pieces)
    _check_square(weights)
    labels = piece_labels(pieces)
    left = labels_width(labels)
    side = NARROW - left - 8
    top = 26.0
    parts = [
        text(left, 16, f"layer {layer}, head {head}", class_="b"),
        rect(left, top, side, side, fill=colour("fill")),
        hatching(len(pieces), left, top, side),
        heat_map(weights, _SHARES, (left, top, side, side), labels, labels, causal=True),
        row_labels(labels, left - 6, top, side),
        column_labels(labels, left, top + side, side),
    ]
    if len(pieces) > 3:
        parts.append(_mask_label(left, top, side))
    y = top + side + column_labels_height(labels, side) + 6
    parts.append(colour_bar(_SHARES, left, y, side - 10, "share of the row's attention"))
    seen = np.unravel_index(int(np.argmax(np.tril(weights, -1))), weights.shape)
    alt = (
        f"Attention of layer {layer}, head {head}, over {count(len(pieces), 'token')}. The last "
        f"token gives {percent(float(weights[-1, 0]))} to the first token and "
        f"{percent(float(weights[-1, -1]))} to itself."
    )
    if len(pieces) > 1:
        alt += (
            f" The largest share that goes to an earlier token is "
            f"{percent(float(weights[seen]))}, from {labels[seen[0]]} to {labels[seen[1]]}."
        )
    return figure(parts, NARROW, y + BAR_HEIGHT, "Attention of one head", alt)


def first_token_share(shares: np.ndarray) -> Figure:
    """The share of attention that goes to the first token, per layer and head.

    Args:
        shares: (L, H), 0 to 1, averaged over the tokens except the first, which sees only itself.

    What to see: which heads give a large share to the first token (an "attention sink", Xiao et
    al. 2023).
    """
    shares = array(shares, "shares", 2)
    if shares.min() < 0 or shares.max() > 1 + 1e-6:
        raise ValueError(f"shares are {shares.min()} to {shares.max()}: expected 0 to 1")
    n_layers, n_heads = shares.shape
    left, top, width = 46.0, 4.0, NARROW - 60.0
    step = min(max(600 / n_layers, 8), 30)
    height = step * n_layers
    shades = magnitude(shares)
    rows, columns = [f"L{i}" for i in range(n_layers)], [f"h{h}" for h in range(n_heads)]
    parts = [
        row_labels(rows, left - 6, top, height, "s"),
        heat_map(shares, shades, (left, top, width, height), rows, columns),
        column_labels(columns, left, top + height, width, "s"),
    ]
    if step >= FONT + 4 and width / n_heads >= text_width("100"):
        parts.append(_percent_in_cells(shares, shades, left, top, width / n_heads, step))
    y = top + height + column_labels_height(columns, width) + 8
    title = "share of attention on the first token"
    parts.append(colour_bar(shades, left, y, width, title, percent))
    high = np.unravel_index(int(shares.argmax()), shares.shape)
    alt = (
        f"The share of attention on the first token, for {count(n_layers, 'layer')} and "
        f"{count(n_heads, 'head')}: {percent(float(shares.mean()))} on average, at most "
        f"{percent(float(shares.max()))} in layer {high[0]}, head {high[1]}."
    )
    return figure(parts, NARROW, y + BAR_HEIGHT, "Attention on the first token", alt)


def _percent_in_cells(
    shares: np.ndarray, shades: Shades, left: float, top: float, width: float, height: float
) -> str:
    """Percentages in the cells of a map, in black or white, whichever is easier to read."""
    parts = []
    for (row, column), share in np.ndenumerate(shares):
        ink = ink_on(shades.colour(float(share)))
        x, y = left + (column + 0.5) * width, top + (row + 0.5) * height + 5
        parts.append(
            text(x, y, f"{100 * share:.0f}", "middle", style=f"fill:{ink}", pointer_events="none")
        )
    return "".join(parts)


def _check_square(weights: np.ndarray) -> None:
    if weights.shape[-1] != weights.shape[-2]:
        raise ValueError(f"weights has the shape {weights.shape}: expected T by T at the end")


def _mask_label(left: float, top: float, side: float) -> str:
    """The name of the hatched half, on a background that keeps it readable."""
    width = text_width("masked") + 12
    x = left + side - width - 8
    plate = rect(x, top + 8, width, 22, rx=3, fill=colour("paper"))
    return plate + text(x + width / 2, top + 24, "masked", "middle", class_="s")
