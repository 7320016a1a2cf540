"""Section 3: RMSNorm before and after, and LayerNorm beside it."""

import numpy as np

from npllama.explore.axes import (
    Scale,
    log_spread,
    row_labels,
    spread,
    x_axis,
    y_axis,
    y_labels_width,
)
from npllama.explore.labels import array, count, quantity, same_length, text_width, window
from npllama.explore.svg import (
    NARROW,
    Figure,
    colour,
    dots,
    figure,
    group,
    legend,
    triangles,
)


def norm_sizes(before: np.ndarray, after: np.ndarray) -> Figure:
    """The root mean square of each token's elements before and after the RMSNorm of each layer.

    A row per layer on a logarithmic axis, with a mark per token. At most 33 layers are drawn,
    evenly spaced.

    Args:
        before, after: (L, T), positive.

    What to see: before the norm the sizes differ between tokens and grow from layer to layer;
    after it they are nearly equal.
    """
    before, after = array(before, "before", 2), array(after, "after", 2)
    same_length(len(before), after=after)
    drawn = window(len(before), 33)
    marks = [
        triangles([(0, 0)], 5, stroke=colour("2")),
        dots([(0, 0)], 3, stroke=colour("1")),
    ]
    entries = list(zip(marks, ("before", "after"), strict=True))
    legend_marks, y = legend(4, 16, entries, NARROW - 8)
    top, height = y + 4, min(max(22 * len(drawn), 44), 480)
    labels = [f"layer {i}" for i in drawn]
    left = max(text_width(label, mono=True) for label in labels) + 8
    scale = Scale(*log_spread(np.concatenate([before, after])), left + 8, NARROW - 12, log=True)
    parts = [
        legend_marks,
        x_axis(scale, top + height, "root mean square (logarithmic)", grid_to=top),
        row_labels(labels, left, top, height),
    ]
    step = height / len(drawn)
    for row, layer in enumerate(drawn):
        y = top + (row + 0.5) * step
        sizes = [[(scale(size), y) for size in values[layer]] for values in (before, after)]
        tip = f"layer {layer}: before {_range(before[layer])}, after {_range(after[layer])}"
        marks = [
            triangles(sizes[0], 5, stroke=colour("2")),
            dots(sizes[1], 3, stroke=colour("1"), stroke_opacity="0.7"),
        ]
        parts.append(group(*marks, tip=tip))
    alt = (
        f"The root mean square of {count(before.shape[1], 'token')} in "
        f"{count(len(before), 'layer')} before RMSNorm, {_range(before)}, and after it, "
        f"{_range(after)}."
    )
    return figure(parts, NARROW, top + height + 46, "Before and after RMSNorm", alt)


def _range(values: np.ndarray) -> str:
    return f"{quantity(float(values.min()))} to {quantity(float(values.max()))}"


def norm_kinds(x: np.ndarray, rms_normed: np.ndarray, layer_normed: np.ndarray) -> Figure:
    """One token's elements under RMSNorm and under LayerNorm, against their value before.

    Args:
        x, rms_normed, layer_normed: (D,); at most 200 elements are drawn.

    What to see: both norms multiply the elements by one factor and by a weight per element.
    LayerNorm first subtracts the mean. If the mean is small relative to the root mean square, the
    results are nearly equal, and RMSNorm needs one sum over the elements less.
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
    mean = float(x.mean())
    difference = float(np.abs(normed[0] - normed[1]).max())
    alt = (
        f"{len(x)} elements of one token under RMSNorm and LayerNorm. Their mean is "
        f"{quantity(mean)}; the two results differ by at most {quantity(difference)}."
    )
    return figure(parts, NARROW, base + 50, "RMSNorm and LayerNorm", alt)
