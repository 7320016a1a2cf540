"""Section 5: rotary position embedding."""

import math
from collections.abc import Sequence

import numpy as np

from npllama.explore.axes import Scale, log_spread, x_axis, y_axis, y_labels_width
from npllama.explore.colours import VIRIDIS
from npllama.explore.heat_map import (
    BAR_HEIGHT,
    Shades,
    colour_bar,
    hatching,
    heat_map,
    signed,
)
from npllama.explore.labels import array, count, quantity, same_length
from npllama.explore.svg import (
    NARROW,
    Figure,
    arrow,
    circle,
    colour,
    dots,
    figure,
    group,
    legend,
    line,
    path,
    rect,
    text,
    triangles,
)


def rope_clock(theta: np.ndarray, pair: int, turned: np.ndarray) -> Figure:
    """One pair of a query's elements as a hand that turns with the position.

    Args:
        theta: (C/2,), the angle in radians by which each pair turns per position.
        pair: the pair that is drawn.
        turned: (n, 2), the two elements of the pair after RoPE, at the positions 0 to n - 1.

    What to see: the hand keeps its length, and from each position to the next it turns by the
    same angle.
    """
    theta, turned = array(theta, "theta", 1), array(turned, "turned", 2)
    same_length(2, **{"a row of turned": turned[0]})
    if not 0 <= pair < len(theta):
        raise ValueError(f"pair {pair}: expected 0 to {len(theta) - 1}")
    angle = float(theta[pair])
    cx, cy, radius = NARROW / 2, 176.0, 128.0
    parts = [
        circle(cx, cy, radius, fill="none", stroke=colour("line")),
        line(cx - radius - 8, cy, cx + radius + 8, cy, stroke_opacity="0.5"),
        line(cx, cy - radius - 8, cx, cy + radius + 8, stroke_opacity="0.5"),
    ]
    taken: list[tuple[float, float]] = []
    for p, (first, second) in enumerate(turned):
        length = math.hypot(first, second) or 1.0
        x, y = first / length, -second / length  # y of the drawing points down
        tip = f"position {p}: turned by {math.degrees(p * angle):.4g}°"
        hue = colour("2") if p == 0 else colour("1")
        hand = arrow(cx, cy, cx + radius * x, cy + radius * y, 9, stroke=hue, stroke_width="1.6")
        at = (cx + (radius + 16) * x, cy + (radius + 16) * y)
        far = all(math.hypot(at[0] - tx, at[1] - ty) > 17 for tx, ty in taken)
        label = ""
        if far:
            taken.append(at)
            label = text(at[0], at[1] + 5, str(p), "middle", class_="b" if p == 0 else None)
        parts.append(group(hand, label, tip=tip))
    wavelength = 2 * math.pi / angle if angle else math.inf
    lines = [
        f"pair {pair} of {len(theta)}: {math.degrees(angle):.4g}° per position,",
        f"a full turn every {quantity(wavelength)} positions" if angle else "it does not turn",
        "labels are positions; the first hand is orange",
    ]
    parts += [
        text(NARROW / 2, 344 + 18 * i, content, "middle", class_="s" if i == 2 else None)
        for i, content in enumerate(lines)
    ]
    alt = (
        f"Pair {pair} of {len(theta)} of a query, drawn at {count(len(turned), 'position')} as "
        f"a hand of length {quantity(float(np.hypot(*turned[0])))}. It turns by "
        f"{math.degrees(angle):.4g} degrees per position."
    )
    return figure(parts, NARROW, 344 + 46, "One pair turns with the position", alt)


def rope_difference(
    q: np.ndarray, k: np.ndarray, theta: float, places: Sequence[tuple[int, int]]
) -> Figure:
    """A pair of a query and the same pair of a key, at several pairs of positions.

    Args:
        q, k: (n, 2), the two elements after RoPE, at the positions 0 to n - 1.
        theta: the angle in radians by which the pair turns per position.
        places: (position of the query, position of the key); two fit in a row.

    What to see: both hands turn, but at the same distance the angle between them is the same.
    """
    q, k = array(q, "q", 2), array(k, "k", 2)
    same_length(2, **{"a row of q": q[0], "a row of k": k[0]})
    radius, step = 82.0, NARROW / 2
    parts, said = [], []
    for i, (m, n) in enumerate(places):
        cx, cy = (i % 2 + 0.5) * step, 104 + 230.0 * (i // 2)
        parts.append(circle(cx, cy, radius, fill="none", stroke=colour("line")))
        for x, hue, name, at in ((k[n], "2", "k", n), (q[m], "1", "q", m)):
            length = math.hypot(*x) or 1.0
            ux, uy = x[0] / length, -x[1] / length  # y of the drawing points down
            hand = arrow(
                cx, cy, cx + radius * ux, cy + radius * uy, 9, stroke=colour(hue), stroke_width="2"
            )
            label = text(cx + (radius + 13) * ux, cy + (radius + 13) * uy + 5, name, "middle")
            parts.append(group(hand, label, tip=f"{name} at position {at}"))
        said.append(f"the query at position {m} and the key at {n}")
        parts.append(text(cx, cy + radius + 36, f"q at {m}, k at {n}", "middle", class_="b"))
        parts.append(text(cx, cy + radius + 54, f"distance {m - n}", "middle"))
    alt = (
        f"One pair of a query and of a key as two hands, which turn by "
        f"{math.degrees(theta):.4g} degrees per position: {'; '.join(said)}."
    )
    height = 104 + 230.0 * ((len(places) - 1) // 2) + radius + 62
    return figure(parts, NARROW, height, "The same distance, the same angle", alt)


def rope_frequencies(theta: np.ndarray, plain_theta: np.ndarray | None = None) -> Figure:
    """The wavelength of each pair: how many positions a full turn takes, 2 pi / theta.

    Args:
        theta: (C/2,) angles per position.
        plain_theta: (C/2,) those without the scaling of RoPE, drawn beside; None: no scaling.

    What to see: the first pairs complete a turn within a few tokens and distinguish neighbours; the
    last pairs hardly turn within the context.
    """
    theta = array(theta, "theta", 1)
    series = [("this model", theta, "1")]
    if plain_theta is not None:
        plain = array(plain_theta, "plain_theta", 1)
        same_length(len(theta), plain_theta=plain)
        series.append(("without scaling", plain, "2"))
    if min(values.min() for _, values, _ in series) <= 0:
        raise ValueError("theta has an element that is not positive: expected angles above 0")
    lengths = [2 * np.pi / values for _, values, _ in series]
    draw = {"1": dots, "2": triangles}
    entries = [(draw[hue]([(0, 0)], 4, stroke=colour(hue)), name) for name, _, hue in series]
    marks, y = legend(4, 16, entries, NARROW - 8) if len(series) > 1 else ("", 14.0)
    top = y + 20
    y_scale = Scale(*log_spread(np.concatenate(lengths)), top + 240, top, log=True)
    left = max(y_labels_width(y_scale), 30)
    n = len(theta)
    x_scale = Scale(0, max(n - 1, 1), left + 8, NARROW - 16)
    parts = [
        marks,
        x_axis(x_scale, top + 246, "pair of elements", grid_to=top, show=lambda v: f"{v:g}"),
        y_axis(y_scale, left, "positions per full turn", grid_to=NARROW - 10),
    ]
    for (_, _, hue), values in zip(series, lengths, strict=True):
        points = [(x_scale(i), y_scale(value)) for i, value in enumerate(values)]
        parts.append(path(points, stroke=colour(hue), stroke_opacity="0.5"))
        parts.append(draw[hue](points, 3.5, stroke=colour(hue)))
    alt = (
        f"The positions that each of {n} pairs needs for a full turn, on a logarithmic axis: from "
        f"{quantity(float(lengths[0].min()))} to {quantity(float(lengths[0].max()))}."
    )
    if len(series) > 1:
        alt += f" Without scaling the longest is {quantity(float(lengths[1].max()))}."
    return figure(parts, NARROW, top + 246 + 44, "Wavelengths of the pairs", alt)


def rope_distance(scores: np.ndarray) -> Figure:
    """Scores of one query and one key at all pairs of positions up to the query's own.

    Args:
        scores: (n, n); scores[i, j] has the query at position i and the key at j. The scores
            with j > i are masked.

    What to see: the colour is the same along each diagonal, because the score depends only on the
    distance i - j.
    """
    scores = array(scores, "scores", 2)
    if scores.shape[0] != scores.shape[1]:
        raise ValueError(f"scores has the shape {scores.shape}: expected a square")
    n, side, left, top = len(scores), 320.0, 74.0, 8.0
    seen = scores[np.tril_indices(n)]
    low, high = float(seen.min()), float(seen.max())
    shades = Shades(low, high, VIRIDIS) if low < high else signed(scores)
    parts = [
        rect(left, top, side, side, fill=colour("fill")),
        hatching(n, left, top, side),
        heat_map(scores, shades, (left, top, side, side), causal=True),
        _positions(n, left, top, side),
        colour_bar(shades, left, top + side + 58, side, "dot product"),
    ]
    spreads = [float(np.ptp(np.diagonal(scores, -d))) for d in range(n)]
    alt = (
        f"Scores of one query and one key at {n} by {n} positions, from "
        f"{quantity(low)} to {quantity(high)}. Along a diagonal, where the distance is the same, "
        f"they differ by at most {quantity(max(spreads))}."
    )
    height = top + side + 58 + BAR_HEIGHT
    return figure(parts, NARROW, height, "Scores depend on the distance alone", alt)


def _positions(n: int, left: float, top: float, side: float) -> str:
    """Axes that count the cells of a square from 0 to n - 1."""
    half = side / n / 2
    if n == 1:
        return text(left + side / 2, top + side + 18, "0", "middle", class_="s")
    scale = Scale(0, n - 1, left + half, left + side - half)
    down = Scale(0, n - 1, top + half, top + side - half)
    marks = [
        text(left - 6, down(v) + 5, f"{v:g}", "end", class_="s") for v in down.ticks() if v % 1 == 0
    ]
    turned = f"translate({left - 44:g} {top + side / 2:g})rotate(-90)"
    title = text(0, 0, "position of the query", "middle", transform=turned)
    below = x_axis(scale, top + side, "position of the key", show=lambda v: f"{v:g}")
    return below + "".join(marks) + title
