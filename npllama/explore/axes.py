"""Scales, round ticks, and axes whose labels neither overlap nor are cut."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from npllama.explore.labels import quantity, text_width
from npllama.explore.svg import FONT, NARROW, line, number, text


@dataclass(frozen=True)
class Scale:
    """From data to units of the drawing, linear or logarithmic.

    Attributes:
        low, high: the ends in the data; a logarithmic scale needs low > 0.
        start, stop: the positions of low and high in the drawing.
        power: the exponent of the relative position on a linear scale; 0.5 enlarges small values.
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool = False
    power: float = 1.0

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"a scale from {self.low} to {self.high}: expected low < high")

    def __call__(self, value: float) -> float:
        """The position of a value; a value outside the ends is drawn at the nearer end."""
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:  # each term divided: the difference of two large floats may overflow
            scale = max(abs(self.low), abs(self.high))
            low, high = self.low / scale, self.high / scale
            share = ((value / scale - low) / (high - low)) ** self.power
        return self.start + share * (self.stop - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values between the ends, at most about `most`."""
        if self.power != 1:
            shares = (0, 0.2, 1) if most < 5 else (0, 0.05, 0.2, 0.5, 1)
            return [self.low + share * (self.high - self.low) for share in shares]
        rule = log_ticks if self.log else ticks
        return rule(self.low, self.high, most)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """The multiples of 1, 2 or 5 times a power of ten from low to high, at most `most` of them."""
    power = 10.0 ** math.floor(math.log10(high / most - low / most))
    for step in (m * power for m in (1, 2, 5, 10, 20, 50)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [0.0 if i == 0 else float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Powers of ten from low to high, thinned to `most`; 2 and 5 times these if they are few."""
    first = math.ceil(math.log10(low) - 1e-9)
    last = math.floor(math.log10(high) + 1e-9)
    powers = [10.0**e for e in range(first, last + 1, max(math.ceil((last - first + 1) / most), 1))]
    finer = [m * 10.0**e for e in range(first - 1, last + 1) for m in (1, 2, 5)]
    finer = [v for v in finer if low * (1 - 1e-9) <= v <= high * (1 + 1e-9)]
    if 0 < len(finer) <= most:
        return finer
    return powers or [low, high]


def spread(values: np.ndarray, zero: bool = False, margin: float = 0.05) -> tuple[float, float]:
    """Ends of a linear scale that contains the values and a margin; never an empty range."""
    low, high = float(values.min()), float(values.max())
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if zero and low == high:
        return 0.0, 1.0
    if low == high:
        half = abs(low) / 2 or 1.0
        return low - half, high + half
    pad = margin * (high / 2 - low / 2) * 2
    return (low if zero and low == 0 else low - pad), (high if zero and high == 0 else high + pad)


def log_spread(values: np.ndarray) -> tuple[float, float]:
    """Ends of a logarithmic scale that contains the positive values.

    Raises:
        ValueError: no value is positive.
    """
    positive = values[values > 0]
    if positive.size == 0:
        raise ValueError("a logarithmic axis has no positive value to show")
    low, high = float(positive.min()), float(positive.max())
    return low / 1.3, high * 1.3


def x_axis(
    scale: Scale,
    y: float,
    title: str = "",
    show: Callable[[float], str] = quantity,
    grid_to: float | None = None,
    most: int = 6,
    limit: float = NARROW,
) -> str:
    """An axis below a plot: ticks with labels, grid lines up to `grid_to`, the title below.

    A label that would be cut at the right edge `limit` of the figure is moved to the left.
    """
    parts = [line(scale.start, y, scale.stop, y)]
    for value, label in _thinned(scale, show, most):
        x = scale(value)
        if grid_to is not None:
            parts.append(line(x, y, x, grid_to, stroke_opacity="0.35"))
        parts.append(line(x, y, x, y + 4))
        centre = min(x, limit - text_width(label) / 2)
        parts.append(text(centre, y + 4 + FONT, label, "middle", class_="s"))
    if title:
        middle = (scale.start + scale.stop) / 2
        parts.append(text(middle, y + 8 + 2 * FONT, title, "middle"))
    return "".join(parts)


def _thinned(scale: Scale, show: Callable[[float], str], most: int) -> list[tuple[float, str]]:
    """Ticks with their labels; fewer if the labels would overlap."""
    for n in range(most, 0, -1):
        shown = [(v, show(v)) for v in scale.ticks(n)]
        if labels_fit([scale(v) for v, _ in shown], [label for _, label in shown]):
            break
    return shown if n > 1 else shown[:1]


def labels_fit(centres: Sequence[float], labels: Sequence[str]) -> bool:
    """Whether centred labels have a gap between them."""
    order = np.argsort(centres)
    ends = [(centres[i], text_width(labels[i]) / 2) for i in order]
    return all(
        right - right_half - (left + left_half) >= 6
        for (left, left_half), (right, right_half) in pairwise(ends)
    )


def y_axis(
    scale: Scale,
    x: float,
    title: str = "",
    show: Callable[[float], str] = quantity,
    grid_to: float | None = None,
    most: int = 6,
) -> str:
    """An axis at the left of a plot, with a horizontal title above its upper end."""
    parts = [line(x, scale.start, x, scale.stop)]
    for value in scale.ticks(most):
        y = scale(value)
        if grid_to is not None:
            parts.append(line(x, y, grid_to, y, stroke_opacity="0.35"))
        parts.append(line(x - 4, y, x, y))
        parts.append(text(x - 7, y + 0.35 * FONT, show(value), "end", class_="s"))
    if title:
        parts.append(text(2, min(scale.start, scale.stop) - 12, title))
    return "".join(parts)


def y_labels_width(scale: Scale, show: Callable[[float], str] = quantity, most: int = 6) -> float:
    """Width of the labels at the left of a y axis."""
    return max(text_width(show(v)) for v in scale.ticks(most)) + 10


def row_labels(labels: Sequence[str], x: float, y: float, height: float, class_: str = "m") -> str:
    """Labels at the left of rows of equal height; only every n-th one if they would overlap."""
    step = height / len(labels)
    every = max(math.ceil((FONT + 1) / step), 1)
    parts = [
        text(x, y + (i + 0.5) * step + 0.35 * FONT, label, "end", class_=class_)
        for i, label in enumerate(labels)
        if i % every == 0
    ]
    return "".join(parts)


def column_labels(
    labels: Sequence[str], x: float, y: float, width: float, class_: str = "m"
) -> str:
    """Labels below columns of equal width: horizontal if all fit, else rotated by 90 degrees, and
    only every n-th one if they would overlap.

    `column_labels_height` is their height.
    """
    step, is_level = width / len(labels), _are_level(labels, width)
    every = 1 if is_level else max(math.ceil((FONT + 1) / step), 1)
    parts = []
    for i in range(0, len(labels), every):
        centre = x + (i + 0.5) * step
        if is_level:
            parts.append(text(centre, y + FONT, labels[i], "middle", class_=class_))
        else:
            turned = f"translate({number(centre + 0.35 * FONT)} {number(y + 3)})rotate(-90)"
            parts.append(text(0, 0, labels[i], "end", class_=class_, transform=turned))
    return "".join(parts)


def column_labels_height(labels: Sequence[str], width: float) -> float:
    """The height of `column_labels`."""
    if _are_level(labels, width):
        return FONT + 6
    return max(text_width(label, mono=True) for label in labels) + 8


def _are_level(labels: Sequence[str], width: float) -> bool:
    widest = max(text_width(label, mono=True) for label in labels)
    return widest + 4 <= width / len(labels)
