"""Section 3: RMSNorm before and after, and LayerNorm beside it."""

from collections.abc import Sequence

import numpy as np

from npllama.explore.axes import Scale, row_labels, spread, x_axis, y_axis, y_labels_width
from npllama.explore.figures.rows import labels_width, piece_labels, rows_height
from npllama.explore.labels import array, count, quantity, same_length, window
from npllama.explore.svg import (
    NARROW,
    Figure,
    colour,
    dots,
    figure,
    group,
    legend,
    line,
    rect,
    text,
    triangles,
)


def norm_before_after(
    pieces: Sequence[str], before: np.ndarray, after: np.ndarray, rms: np.ndarray
) -> Figure:
    """How widely each token's elements spread before and after RMSNorm.

    A row per token: a thin line from the least to the greatest element, a thick one that holds
    the middle half of the elements, and each token's root mean square before the norm.

    Args:
        pieces: T pieces.
        before, after: (T, D).
        rms: (T,), the root mean square of each row of `before`.

    What to see: tokens of very different size come out with the same one.
    """
    before, after = array(before, "before", 2), array(after, "after", 2)
    rms = array(rms, "rms", 1)
    same_length(len(before), pieces=pieces, after=after, rms=rms)
    labels, height, top = piece_labels(pieces), rows_height(len(pieces)), 30.0
    left, right = labels_width(labels), NARROW - 62.0
    middle = (left + right) / 2
    parts = [text(NARROW - 2, 16, "rms", "end")]
    for values, x, end, name in (
        (before, left, middle - 8, "before"),
        (after, middle + 8, right, "after"),
    ):
        scale = Scale(*spread(values), x + 4, end - 4)
        parts.append(text((x + end) / 2, 16, name, "middle", class_="b"))
        parts.append(_spreads(values, scale, top, height, labels))
        parts.append(x_axis(scale, top + height, "elements", grid_to=top, most=4))
    parts.append(row_labels(labels, left - 6, top, height, "m"))
    parts.append(row_labels([quantity(r) for r in rms], NARROW - 2, top, height, "s"))
    alt = (
        f"The spread of {count(before.shape[1], 'element')} of {count(len(pieces), 'token')} "
        f"before and after RMSNorm. Before, the root mean square is {quantity(rms.min())} to "
        f"{quantity(rms.max())}; after, the elements lie between {quantity(after.min())} and "
        f"{quantity(after.max())}."
    )
    return figure(parts, NARROW, top + height + 46, "Before and after RMSNorm", alt)


def _spreads(
    values: np.ndarray, scale: Scale, top: float, height: float, labels: Sequence[str]
) -> str:
    """A thin and a thick line per row of values (T, D)."""
    marks = np.quantile(values, [0, 0.25, 0.5, 0.75, 1], axis=1).T  # (T, D) -> (T, 5)
    step, parts = height / len(values), []
    for i, (least, low, median, high, most) in enumerate(marks):
        y = top + (i + 0.5) * step
        thick = max(min(step - 4, 8), 3)
        tip = (
            f"{labels[i]}: {quantity(least)} to {quantity(most)}, the middle half "
            f"{quantity(low)} to {quantity(high)}, the median {quantity(median)}"
        )
        box = rect(
            scale(low), y - thick / 2, max(scale(high) - scale(low), 2), thick, fill=colour("1")
        )
        thin = line(scale(least), y, scale(most), y, stroke=colour("1"), stroke_width="1.5")
        parts.append(group(thin, box, tip=tip))
    return "".join(parts)


def norm_kinds(x: np.ndarray, rms_normed: np.ndarray, layer_normed: np.ndarray) -> Figure:
    """One token's elements under RMSNorm and under LayerNorm, against their value before.

    Args:
        x, rms_normed, layer_normed: (D,); at most 200 elements are drawn.

    What to see: RMSNorm multiplies all elements by one number, a line through 0; LayerNorm
    subtracts the mean before, the same line moved by the mean. Where the mean is small beside the
    root mean square, the two agree, and RMSNorm saves a pass over the elements.
    """
    x = array(x, "x", 1)
    normed = [array(rms_normed, "rms_normed", 1), array(layer_normed, "layer_normed", 1)]
    same_length(len(x), rms_normed=normed[0], layer_normed=normed[1])
    picked = np.argsort(x, kind="stable")[window(len(x), 200)]
    marks = [
        dots([(0, 0)], 3, stroke=colour("1")),
        triangles([(0, 0)], 5, stroke=colour("2")),
    ]
    names = ("RMSNorm", "LayerNorm")
    entries, y = legend(4, 16, list(zip(marks, names, strict=True)), NARROW - 8)
    top, base = y + 20, y + 280
    y_scale = Scale(*spread(np.concatenate(normed)), base, top)
    left = max(y_labels_width(y_scale), 30)
    x_scale = Scale(*spread(x), left + 6, NARROW - 16)
    parts = [
        entries,
        x_axis(x_scale, base + 6, "element before the norm", grid_to=top),
        y_axis(y_scale, left, "after the norm", grid_to=NARROW - 10),
    ]
    x_at = [x_scale(x[i]) for i in picked]
    rms_at, layer_at = ([y_scale(values[i]) for i in picked] for values in normed)
    parts.append(triangles(list(zip(x_at, layer_at, strict=True)), 4, stroke=colour("2")))
    parts.append(dots(list(zip(x_at, rms_at, strict=True)), 2, stroke=colour("1")))
    mean, rms = float(x.mean()), float(np.sqrt(np.mean(x**2)))
    difference = float(np.abs(normed[0] - normed[1]).max())
    alt = (
        f"{len(x)} elements of one token under RMSNorm and LayerNorm. Their mean is "
        f"{quantity(mean)}, their root mean square {quantity(rms)}; the two results differ by at "
        f"most {quantity(difference)}."
    )
    return figure(parts, NARROW, base + 50, "RMSNorm and LayerNorm", alt)
