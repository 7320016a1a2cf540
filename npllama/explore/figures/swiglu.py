"""Section 8: the gate of SwiGLU."""

from collections.abc import Sequence

import numpy as np

from npllama.explore.axes import Scale, spread, x_axis, y_axis, y_labels_width
from npllama.explore.figures.rows import rows_map
from npllama.explore.heat_map import signed
from npllama.explore.labels import array, count, percent, piece_label, quantity, same_length, window
from npllama.explore.svg import NARROW, Figure, colour, dots, figure, legend, path, rect, text

_BINS = 48
_DASHED = {"stroke": colour("2"), "stroke_width": 2, "stroke_dasharray": "6 4"}


def gate_on_silu(
    gate: np.ndarray,
    gated: np.ndarray,
    curve_x: np.ndarray,
    curve_silu: np.ndarray,
    curve_relu: np.ndarray,
    piece: str,
) -> Figure:
    """One token's gate values on the curve of SiLU, with ReLU for comparison and a histogram.

    Args:
        gate: (F,), before SiLU.
        gated: (F,), SiLU(gate). At most 300 are drawn; the histogram counts all.
        curve_x, curve_silu, curve_relu: (n,), the two functions at curve_x.
        piece: the token.

    What to see: many gates lie near 0, where SiLU is smooth. Below 0, ReLU and its slope are 0.
    """
    gate, gated = array(gate, "gate", 1), array(gated, "gated", 1)
    x, silu, relu = (
        array(curve_x, "curve_x", 1),
        array(curve_silu, "curve_silu", 1),
        array(curve_relu, "curve_relu", 1),
    )
    same_length(len(gate), gated=gated)
    same_length(len(x), curve_silu=silu, curve_relu=relu)
    entries = [
        (path([(-9, 0), (9, 0)], stroke=colour("1"), stroke_width=2), "SiLU"),
        (
            path([(-9, 0), (9, 0)], **_DASHED),
            "ReLU",
        ),
        (dots([(0, 0)], 4, stroke=colour("ink")), "this token's gates"),
    ]
    marks, y = legend(4, 16, entries, NARROW - 8)
    top, base, floor = y + 20, y + 210, y + 290
    x_range = spread(np.concatenate([gate, x]), margin=0.01)
    y_scale = Scale(*spread(np.concatenate([gated, silu, relu])), base, top)
    left = y_labels_width(y_scale)
    x_scale = Scale(*x_range, left + 4, NARROW - 14)
    drawn = np.argsort(gate, kind="stable")[window(len(gate), 300)]
    points = [(x_scale(gate[i]), y_scale(gated[i])) for i in drawn]
    curve = [(x_scale(a), y_scale(b)) for a, b in zip(x, silu, strict=True)]
    straight = [(x_scale(a), y_scale(b)) for a, b in zip(x, relu, strict=True)]
    parts = [
        marks,
        x_axis(x_scale, floor, f"gate before SiLU, token {piece_label(piece)}"[:48], grid_to=top),
        y_axis(y_scale, left, "after SiLU", grid_to=NARROW - 10),
        path(straight, **_DASHED),
        path(curve, stroke=colour("1"), stroke_width=2),
        dots(points, 2.2, stroke=colour("ink"), stroke_opacity="0.6"),
        _histogram(gate, x_scale, floor, floor - base - 16),
        text(left + 8, base + 26, "how many", class_="s"),
    ]
    negative = float((gate < 0).mean())
    alt = (
        f"{len(gate)} gate values of the token {piece_label(piece)} on the curve of SiLU, from "
        f"{quantity(float(gate.min()))} to {quantity(float(gate.max()))}. {percent(negative)} are "
        "negative: ReLU makes them 0, SiLU small values down to −0.278."
    )
    return figure(parts, NARROW, floor + 44, "Gates on the curve of SiLU", alt)


def _histogram(values: np.ndarray, scale: Scale, floor: float, height: float) -> str:
    """Bars that stand on `floor`, one per bin, the highest `height` high."""
    counts, edges = np.histogram(values, bins=_BINS, range=(scale.low, scale.high))
    return "".join(
        rect(
            scale(a),
            floor - height * count / counts.max(),
            scale(b) - scale(a) - 0.5,
            height * count / counts.max(),
            fill=colour("1"),
            fill_opacity="0.6",
            tip=f"{count} gates from {quantity(a)} to {quantity(b)}",
        )
        for count, a, b in zip(counts, edges, edges[1:], strict=False)
        if count
    )


def gate_rows(pieces: Sequence[str], gate: np.ndarray) -> Figure:
    """The gate values of all tokens, one row per token; at most 512 columns.

    Args:
        pieces: T pieces.
        gate: (T, F), before SiLU.

    What to see: each token opens gates of its own (orange) and closes others (blue).
    """
    gate = array(gate, "gate", 2)
    same_length(len(gate), pieces=pieces)
    alt = (
        f"A heat map of the gate values of {count(gate.shape[0], 'token')}, {gate.shape[1]} each, "
        f"from {quantity(float(gate.min()))} to {quantity(float(gate.max()))}; "
        f"{percent(float((gate > 0).mean()))} are above 0."
    )
    shades, title = signed(gate), "Gates of all tokens"
    return rows_map(pieces, gate, shades, "gate", "value before SiLU", title, alt)
