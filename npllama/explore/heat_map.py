"""Heat maps: a matrix as a PNG in a figure, with its values for the page's script."""

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from npllama.explore.axes import Scale, x_axis
from npllama.explore.colours import DIVERGING, VIRIDIS, data_uri, hex_colour, png
from npllama.explore.labels import quantity
from npllama.explore.svg import FONT, NARROW, colour, element, number, rect


@dataclass(frozen=True)
class Shades:
    """From values to colours, between low and high.

    Attributes:
        low, high: the values at the two ends of the colour map.
        anchors: the colour map.
        power: the exponent of the relative position between low and high.
    """

    low: float
    high: float
    anchors: tuple[str, ...]
    power: float = 1.0

    def share(self, values: np.ndarray) -> np.ndarray:
        """The positions of values on the colour map, 0 to 1."""
        scale = max(abs(self.low), abs(self.high))
        low, high = self.low / scale, self.high / scale
        return np.clip((values / scale - low) / (high - low), 0, 1) ** self.power

    def levels(self, values: np.ndarray) -> np.ndarray:
        """Levels 1 to 255 of `colours.png`."""
        return 1 + (254 * self.share(values)).round().astype(int)

    def colour(self, value: float) -> str:
        """`#rrggbb` of one value."""
        return hex_colour(self.anchors, float(self.share(np.array(value))))


def signed(values: np.ndarray) -> Shades:
    """Shades of signed values: pale at 0, with the same range on both sides."""
    largest = float(np.abs(values).max()) or 1.0
    return Shades(-largest, largest, DIVERGING)


def magnitude(values: np.ndarray, high: float | None = None) -> Shades:
    """Shades from 0 to the largest of values that are not negative, or to `high`."""
    return Shades(0.0, high or float(values.max()) or 1.0, VIRIDIS)


def heat_map(
    values: np.ndarray,
    shades: Shades,
    box: tuple[float, float, float, float],
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    causal: bool = False,
    hover: bool = True,
) -> str:
    """A matrix as an image with a frame.

    Args:
        values: (rows, columns).
        box: x, y, width, height.
        rows, columns: names that the page's script shows with a value; by default the indices.
        causal: leave the cells above the diagonal of a square transparent.
        hover: include the values. `data-values` is base64 of little-endian float16 in row order,
            divided by `data-scale`. `data-shape` is "rows columns". `data-rows` and `data-columns`
            are JSON lists of names. A causal map has `data-lower` instead of `data-values`, which
            contains only the elements 0 to i of row i.
    """
    x, y, width, height = (float(side) for side in box)
    levels = shades.levels(values)
    if causal:
        levels = np.tril(levels)
    image = element(
        "image",
        x=x,
        y=y,
        width=width,
        height=height,
        preserveAspectRatio="none",
        href=data_uri(png(levels, shades.anchors)),
        **(_hover_data(values, rows, columns, causal) if hover else {}),
    )
    return image + rect(x, y, width, height, fill="none", stroke=colour("line"))


def _hover_data(
    values: np.ndarray,
    rows: Sequence[str] | None,
    columns: Sequence[str] | None,
    causal: bool,
) -> dict[str, str]:
    scale = float(np.abs(values).max()) or 1.0
    halves = (values / scale).astype("<f2")
    if causal:
        halves = halves[np.tril_indices(len(halves))]  # (T, T) -> (T (T + 1) / 2,)
    data = {
        "data_shape": f"{values.shape[0]} {values.shape[1]}",
        "data_scale": f"{scale:.6g}",
        "data_lower" if causal else "data_values": base64.b64encode(halves.tobytes()).decode(
            "ascii"
        ),
    }
    for name, labels in (("data_rows", rows), ("data_columns", columns)):
        if labels is not None:
            data[name] = json.dumps(list(labels), ensure_ascii=False, separators=(",", ":"))
    return data


def hatching(n: int, left: float, top: float, side: float) -> str:
    """Lines along the diagonals of the masked cells of an n x n map, at most 16 lines."""
    cell, every = side / n, max(1, round(n / 16))
    steps = [
        f"M{number(left + k * cell)} {number(top)}L{number(left + side)} "
        f"{number(top + side - k * cell)}"
        for k in range(1, n, every)
    ]
    return element("path", d="".join(steps), stroke=colour("line"), stroke_opacity="0.5")


def colour_bar(
    shades: Shades,
    x: float,
    y: float,
    width: float,
    title: str,
    show: Callable[[float], str] = quantity,
    limit: float = NARROW,
) -> str:
    """A horizontal bar of the colours with ticks and a title; BAR_HEIGHT units high."""
    levels = np.arange(1, 256)[None]
    bar = element(
        "image",
        x=float(x),
        y=float(y),
        width=float(width),
        height=10,
        preserveAspectRatio="none",
        href=data_uri(png(levels, shades.anchors)),
    )
    frame = rect(x, y, width, 10, fill="none", stroke=colour("line"))
    scale = Scale(shades.low, shades.high, x, x + width, power=shades.power)
    return bar + frame + x_axis(scale, y + 10, title, show, most=5, limit=limit)


BAR_HEIGHT = 10 + 8 + 2 * FONT + 6
"""Height of a colour bar below a map."""
