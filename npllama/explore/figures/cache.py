"""Section 7: the cost of a token with and without the cache."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from npllama.explore.axes import Scale, log_spread, x_axis, y_axis, y_labels_width
from npllama.explore.labels import array, bytes_label, quantity, same_length, seconds_label
from npllama.explore.svg import (
    NARROW,
    Figure,
    circle,
    colour,
    element,
    figure,
    legend,
    number,
)

_SHOW: dict[str, Callable[[float], str]] = {"bytes": bytes_label, "seconds": seconds_label}


def cost_growth(
    n: np.ndarray,
    with_cache: np.ndarray,
    without: np.ndarray,
    unit: str,
    measured_with: np.ndarray | None = None,
    measured_without: np.ndarray | None = None,
) -> Figure:
    """The cost of the next token as the text grows, with the cache and without it.

    Args:
        n: (points,) tokens of text, the new token included, rising.
        with_cache, without: (points,) costs, positive.
        unit: "FLOPs", "bytes" or "seconds". The axis of bytes is linear from 0; the other axes
            are logarithmic.
        measured_with, measured_without: (points,) bool. A point that is not measured is
            extrapolated, and drawn hollow with a dashed line. None: no point is extrapolated.

    What to see: without the cache a token costs as much as the whole text before it. With the
    cache the cost grows slowly.
    """
    n = array(n, "n", 1)
    costs = [array(with_cache, "with_cache", 1), array(without, "without", 1)]
    known = [
        np.ones(len(n), bool) if m is None else np.asarray(m, bool)
        for m in (measured_with, measured_without)
    ]
    same_length(len(n), with_cache=costs[0], without=costs[1])
    same_length(len(n), measured_with=known[0], measured_without=known[1])
    if min(n.min(), costs[0].min(), costs[1].min()) <= 0:
        raise ValueError("n and the costs must be positive: the axes are logarithmic")
    show = _SHOW.get(unit, quantity)
    series = [("with the cache", costs[0], known[0], "1"), ("without it", costs[1], known[1], "2")]
    entries = [(_mark(0, 0, hue, True), name) for name, _, _, hue in series]
    if not (known[0].all() and known[1].all()):
        ring = circle(0, 0, 4, fill=colour("paper"), stroke=colour("ink"), stroke_width="1.5")
        entries.append((ring, "hollow: extrapolated"))
    marks, y = legend(4, 16, entries, NARROW - 8)
    top, base = y + 20, y + 250
    if unit == "bytes":
        y_scale = Scale(0, 1.08 * float(np.concatenate(costs).max()), base, top)
    else:
        y_scale = Scale(*log_spread(np.concatenate(costs)), base, top, log=True)
    left = y_labels_width(y_scale, show)
    x_scale = Scale(*log_spread(n), left, NARROW - 20, log=True)
    parts = [
        marks,
        x_axis(x_scale, base, "tokens of text", lambda v: f"{v:,.0f}", top),
        y_axis(y_scale, left, f"{unit} for the next token", show, NARROW - 20),
    ]
    for name, cost, is_known, hue in series:
        points = [(x_scale(a), y_scale(b)) for a, b in zip(n, cost, strict=True)]
        parts.append(_curve(points, is_known, hue))
        for point, a, b, sure in zip(points, n, cost, is_known, strict=True):
            tip = f"{name}, {a:,.0f} tokens: {show(b)}" + ("" if sure else ", extrapolated")
            parts.append(_mark(*point, hue, bool(sure), tip))
    ratio = costs[1][-1] / costs[0][-1]
    alt = (
        f"The {unit} of the next token as the text grows. In a text of {n[-1]:,.0f} tokens: "
        f"{show(costs[0][-1])} with the cache and {show(costs[1][-1])} without it, "
        f"{quantity(float(ratio))} times as much."
    )
    return figure(parts, NARROW, base + 44, f"{unit} per token with and without the cache", alt)


def _curve(points: list[tuple[float, float]], known: np.ndarray, hue: str) -> str:
    """Segments between points; dashed if one of the two ends is extrapolated."""
    parts = []
    for sure in (True, False):
        steps = "".join(
            f"M{number(a[0])} {number(a[1])}L{number(b[0])} {number(b[1])}"
            for i, (a, b) in enumerate(pairwise(points))
            if bool(known[i] and known[i + 1]) is sure
        )
        dashes = None if sure else "5 4"
        if steps:
            pen = {"stroke": colour(hue), "stroke_width": 2, "stroke_dasharray": dashes}
            parts.append(element("path", d=steps, fill="none", **pen))
    return "".join(parts)


def _mark(x: float, y: float, hue: str, sure: bool, tip: str | None = None) -> str:
    """A disc for the first series, a square for the second; hollow if extrapolated."""
    pen = {
        "fill": colour(hue) if sure else colour("paper"),
        "stroke": colour(hue),
        "stroke_width": "1.5",
        "tip": tip,
    }
    if hue == "1":
        return circle(x, y, 4, **pen)
    return element("rect", x=float(x - 4), y=float(y - 4), width=8, height=8, **pen)
