"""Section 9: the residual stream."""

from collections.abc import Sequence

import numpy as np

from npllama.explore.axes import Scale, log_spread, spread, x_axis, y_axis, y_labels_width
from npllama.explore.labels import (
    array,
    count,
    percent,
    piece_label,
    quantity,
    same_length,
    shorten,
    window,
)
from npllama.explore.svg import NARROW, Figure, colour, figure, legend, path, rect, text


def residual_norms(norms: np.ndarray, pieces: Sequence[str]) -> Figure:
    """The size of each token's vector in the residual stream, from the embedding to the end.

    A line per token on a logarithmic axis, of at most 32 tokens that are evenly spread; the first
    and the last one are drawn thick.

    Args:
        norms: (L+1, T), not negative; row 0 is the embedding, row i what layer i - 1 left.
        pieces: T pieces.

    What to see: each layer adds to the stream and overwrites nothing, and the stream grows.
    """
    norms = array(norms, "norms", 2)
    same_length(norms.shape[1], pieces=pieces)
    if norms.min() < 0:
        raise ValueError(f"norms has {norms.min()}: expected no negative element")
    least = float(norms[norms > 0].min(initial=np.inf))
    drawn = np.maximum(norms, least if np.isfinite(least) else 1.0)
    thick = {0: ("2", "7 3"), norms.shape[1] - 1: ("1", None)}
    entries = [
        (
            _sample(hue, dashes),
            f"{'first' if t == 0 else 'last'}: {shorten(piece_label(pieces[t]), 110)}",
        )
        for t, (hue, dashes) in thick.items()
    ]
    marks, y = legend(4, 16, entries, NARROW - 8)
    top, base = y + 20, y + 270
    y_scale = Scale(*log_spread(drawn), base, top, log=True)
    left = y_labels_width(y_scale)
    n_layers = len(norms) - 1
    x_scale = Scale(0, max(n_layers, 1), left + 6, NARROW - 16)
    parts = [
        marks,
        x_axis(x_scale, base + 6, "layers passed (0: the embedding)", lambda v: f"{v:g}", top),
        y_axis(y_scale, left, "length of the vector", grid_to=NARROW - 10),
    ]
    order = [t for t in window(norms.shape[1], 32) if t not in thick] + list(thick)
    for t in order:
        hue, dashes = thick.get(t, ("line", None))
        points = [(x_scale(i), y_scale(value)) for i, value in enumerate(drawn[:, t])]
        if len(points) == 1:
            points.append((points[0][0] + 6, points[0][1]))
        pen = {"stroke": colour(hue), "stroke_width": "2.5" if t in thick else "1"}
        tip = f"position {t}, {piece_label(pieces[t])}"
        parts.append(path(points, stroke_dasharray=dashes, tip=tip, **pen))
    alt = (
        f"The length of {count(norms.shape[1], 'vector')} through {count(n_layers, 'layer')}. "
        f"The median grows from {quantity(float(np.median(norms[0])))} to "
        f"{quantity(float(np.median(norms[-1])))}, the first token's ends at "
        f"{quantity(float(norms[-1, 0]))}."
    )
    return figure(parts, NARROW, base + 50, "The residual stream", alt)


def _sample(hue: str, dashes: str | None) -> str:
    """A piece of a line for the legend."""
    pen = {"stroke": colour(hue), "stroke_width": "2.5", "stroke_dasharray": dashes}
    return path([(-9, 0), (9, 0)], **pen)


def block_shares(attention: np.ndarray, feed_forward: np.ndarray) -> Figure:
    """How large what each layer adds is, relative to the stream that it is added to.

    Args:
        attention, feed_forward: (L,) ratios, not negative: the length of what is added, divided
            by the length of the stream before.

    What to see: above 100 %, a layer adds more than there was; later layers mostly make small
    corrections.
    """
    series = [array(attention, "attention", 1), array(feed_forward, "feed_forward", 1)]
    same_length(len(series[0]), feed_forward=series[1])
    if min(s.min() for s in series) < 0:
        raise ValueError("a share is negative: expected ratios of lengths")
    n = len(series[0])
    entries = [(_bar(-8, -7, 16, 14, i), name) for i, name in enumerate(_PARTS)]
    marks, y = legend(4, 16, entries, NARROW - 8)
    top, base = y + 20, y + 250
    y_scale = Scale(*spread(np.concatenate(series), zero=True), base, top)
    left = y_labels_width(y_scale, percent)
    step = (NARROW - left - 12) / n
    wide = min(step * 0.4, 26)
    parts = [marks, y_axis(y_scale, left, "added, relative to the stream", percent, NARROW - 10)]
    for i in range(n):
        for series_index, (values, name) in enumerate(zip(series, _PARTS, strict=True)):
            x = left + (i + 0.5) * step + (series_index - 1) * wide
            y = y_scale(values[i])
            tip = f"layer {i}, {name}: {percent(values[i])}"
            parts.append(_bar(x, y, wide, base - y, series_index, tip))
    half = step / 2
    if n > 1:
        scale = Scale(0, n - 1, left + half, left + half + (n - 1) * step)
        parts.append(x_axis(scale, base, "layer", lambda v: f"{v:g}"))
    else:
        parts.append(text(left + half, base + 18, "layer 0", "middle", class_="s"))
    alt = (
        "What each layer adds to the residual stream, relative to its length: attention "
        f"{percent(series[0][0])} in the first layer and {percent(series[0][-1])} in the last, "
        f"feed-forward {percent(series[1][0])} and {percent(series[1][-1])}."
    )
    return figure(parts, NARROW, base + 44, "What each layer adds", alt)


_PARTS = ("attention", "feed-forward")


def _bar(
    x: float, y: float, width: float, height: float, series: int, tip: str | None = None
) -> str:
    """Filled for the first series, outlined and pale for the second: not by colour alone."""
    hue = colour(str(series + 1))
    opacity = None if series == 0 else "0.35"
    return rect(x, y, width, height, fill=hue, fill_opacity=opacity, stroke=hue, tip=tip)
