"""Section 9: the residual stream."""

from collections.abc import Sequence

import numpy as np

from npllama.explore.axes import Scale, log_spread, x_axis, y_axis, y_labels_width
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
from npllama.explore.svg import NARROW, Figure, colour, dots, figure, legend, path, triangles


def residual_norms(norms: np.ndarray, pieces: Sequence[str]) -> Figure:
    """The length of each token's vector in the residual stream, after each layer.

    A line per token on a logarithmic axis. At most 32 tokens are drawn, evenly spaced; the first
    and the last one are thick.

    Args:
        norms: (L+1, T), not negative; row 0 is the embedding, row i the stream after layer i - 1.
        pieces: T pieces.

    What to see: each layer adds to the stream, and the stream grows.
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
            f"{'first' if t == 0 else 'last'}: {shorten(piece_label(pieces[t]), 90)}",
        )
        for t, (hue, dashes) in thick.items()
    ]
    if norms.shape[1] > 2:
        entries.append((_sample("line", None, "1"), "others"))
    marks, y = legend(4, 16, entries, NARROW - 8)
    top, base = y + 20, y + 270
    y_scale = Scale(*log_spread(drawn), base, top, log=True)
    left = y_labels_width(y_scale)
    n_layers = len(norms) - 1
    x_scale = Scale(0, max(n_layers, 1), left + 6, NARROW - 16)
    parts = [
        marks,
        x_axis(x_scale, base + 6, "after layer (emb.: after the embedding)", _after, top),
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


def _after(layers_passed: float) -> str:
    """The name of the stream after so many layers."""
    return f"{layers_passed - 1:g}" if layers_passed else "emb."


def _sample(hue: str, dashes: str | None, width: str = "2.5") -> str:
    """A piece of a line for the legend."""
    pen = {"stroke": colour(hue), "stroke_width": width, "stroke_dasharray": dashes}
    return path([(-9, 0), (9, 0)], **pen)


def block_shares(attention: np.ndarray, feed_forward: np.ndarray) -> Figure:
    """The length of what each layer adds, relative to the stream to which it is added.

    Args:
        attention, feed_forward: (L,) ratios, not negative: the length of what is added, divided
            by the length of the stream before. The axis is logarithmic; 0 is drawn at its lower
            end.

    What to see: above 100%, a layer adds more than the stream held before.
    """
    series = [array(attention, "attention", 1), array(feed_forward, "feed_forward", 1)]
    same_length(len(series[0]), feed_forward=series[1])
    if min(s.min() for s in series) < 0:
        raise ValueError("a share is negative: expected ratios of lengths")
    n, every = len(series[0]), np.concatenate(series)
    entries = [(_mark([(0, 0)], i), name) for i, name in enumerate(_PARTS)]
    marks, y = legend(4, 16, entries, NARROW - 8)
    top, base = y + 20, y + 250
    y_scale = Scale(*(log_spread(every) if every.any() else (0.1, 1.0)), base, top, log=True)
    left = y_labels_width(y_scale, percent)
    x_scale = Scale(0, max(n - 1, 1), left + 14, NARROW - 20)
    parts = [
        marks,
        x_axis(x_scale, base + 6, "layer", lambda v: f"{v:g}", top, most=min(n, 6)),
        y_axis(y_scale, left, "added, relative to the stream", percent, NARROW - 10),
    ]
    for i, (values, name) in enumerate(zip(series, _PARTS, strict=True)):
        points = [(x_scale(layer), y_scale(value)) for layer, value in enumerate(values)]
        parts.append(path(points, stroke=colour(str(i + 1)), stroke_opacity="0.5"))
        for layer, point in enumerate(points):
            parts.append(_mark([point], i, f"layer {layer}, {name}: {percent(values[layer])}"))
    alt = (
        "What each layer adds to the residual stream, relative to its length: attention "
        f"{percent(series[0][0])} in the first layer and {percent(series[0][-1])} in the last, "
        f"feed-forward {percent(series[1][0])} and {percent(series[1][-1])}."
    )
    return figure(parts, NARROW, base + 50, "What each layer adds", alt)


_PARTS = ("attention", "feed-forward")


def _mark(points: list[tuple[float, float]], series: int, tip: str | None = None) -> str:
    """Discs for the first series, triangles for the second: not by colour alone."""
    draw, size = ((dots, 4), (triangles, 5.5))[series]
    return draw(points, size, stroke=colour(str(series + 1)), tip=tip)
