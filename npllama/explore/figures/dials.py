"""Section 5: RoPE as clocks, one dial per pair."""

import math

import numpy as np

from npllama.explore.labels import quantity
from npllama.explore.svg import NARROW, Figure, circle, colour, element, figure, text

_PER_ROW, _HEIGHT, _RADIUS = 8, 74.0, 22.0


def rope_dials(frequencies: np.ndarray, position: int) -> Figure:
    """A dial per pair: its hand has turned by position * theta since position 0.

    Args:
        frequencies: (C/2,) radians per position.
        position: the position of the hands; the page's slider turns them to other positions.

    What to see: the first hands turn fast and distinguish near positions. The last hands hardly
    move and distinguish far positions.
    """
    step = NARROW / _PER_ROW
    parts = []
    for i, theta in enumerate(map(float, frequencies)):
        x, y = (i % _PER_ROW + 0.5) * step, (i // _PER_ROW) * _HEIGHT + _RADIUS + 4
        parts.append(circle(x, y, _RADIUS, fill=colour("fill"), stroke=colour("line")))
        hand = element(
            "line",
            x1=x,
            y1=y,
            x2=x + _RADIUS,
            y2=y,
            stroke=colour("2"),
            stroke_width="2.5",
            class_="hand",
            data_theta=f"{theta:.9g}",
            data_cx=x,
            data_cy=y,
            transform=f"rotate({-math.degrees(position * theta) % 360:.4g} {x:g} {y:g})",
            tip=f"pair {i}: {math.degrees(theta):.4g}° per position",
        )
        parts += [hand, text(x, y + _RADIUS + 16, quantity(2 * math.pi / theta), "middle")]
    n_rows = -(-len(frequencies) // _PER_ROW)
    alt = (
        f"{len(frequencies)} dials, one per pair of elements, at position {position}. The hand of "
        f"the first turns once in {quantity(2 * math.pi / float(frequencies[0]))} tokens, that of "
        f"the last once in {quantity(2 * math.pi / float(frequencies[-1]))} tokens."
    )
    return figure(parts, NARROW, n_rows * _HEIGHT, "The pairs as clocks", alt)
