"""Section 12: the family of models, and where the time of a run went."""

from collections.abc import Mapping, Sequence

import numpy as np

from npllama.explore.labels import (
    array,
    percent,
    quantity,
    same_length,
    seconds_label,
    shorten,
    text_width,
)
from npllama.explore.svg import (
    NARROW,
    Figure,
    colour,
    element,
    figure,
    group,
    legend,
    number,
    rect,
    text,
)

_MOST_BARS = 16


def parameters_by_part(models: Sequence[tuple[str, Mapping[str, int]]]) -> Figure:
    """The share of each part in the parameters of each model, as stacked bars.

    Args:
        models: (name, {part: parameters}); the parts in the order of the first model.

    What to see: the larger the model, the smaller the share of its embedding. Two thirds or more
    of a layer are feed-forward.
    """
    if not models:
        raise ValueError("no models to compare: expected at least 1")
    parts_named = list(models[0][1])
    for name, counts in models:
        values = array(list(counts.values()), f"the parameters of {name}", 1)
        if list(counts) != parts_named or values.min() < 0 or values.sum() == 0:
            raise ValueError(
                f"the parameters of {name} are {dict(counts)}: expected counts of {parts_named}"
            )
    left = min(max(text_width(name) for name, _ in models) + 10, 130)
    right = NARROW - max(text_width(quantity(sum(c.values()))) for _, c in models) - 14
    marks = [_segment(-8, -7, 16, 14, i) for i in range(len(parts_named))]
    entries, y = legend(4, 16, list(zip(marks, parts_named, strict=True)), NARROW - 8)
    drawn = [entries]
    for name, counts in models:
        total = sum(counts.values())
        drawn.append(text(left - 8, y + 18, shorten(name, left - 8), "end"))
        drawn.append(_stack(counts, total, left, y, right - left))
        drawn.append(text(right + 8, y + 18, quantity(total), class_="b"))
        y += 34
    first, counts = models[0]
    shares = ", ".join(f"{part} {percent(n / sum(counts.values()))}" for part, n in counts.items())
    sizes = ", ".join(f"{name} {quantity(sum(c.values()))}" for name, c in models)
    alt = f"Parameters by part. {first}: {shares}. In all: {sizes}."
    return figure(drawn, NARROW, y + 2, "Parameters by part", alt)


def _stack(counts: Mapping[str, int], total: int, x: float, y: float, width: float) -> str:
    """One model's bar: a segment per part, with its percentage where that fits."""
    parts = []
    for i, (part, count) in enumerate(counts.items()):
        size = width * count / total
        label = f"{100 * count / total:.0f}%"
        fits = text_width(label) + 4 <= size
        # on the page's background the label has the contrast of ordinary text
        plate = rect(x + size / 2 - 22, y + 5, 44, 17, rx=3, fill=colour("paper")) if fits else ""
        name = text(x + size / 2, y + 18.5, label, "middle") if fits else ""
        tip = f"{part}: {quantity(count)}, {percent(count / total)}"
        parts.append(group(_segment(x, y, size, 27, i), plate, name, tip=tip))
        x += size
    return "".join(parts)


def _segment(x: float, y: float, width: float, height: float, index: int) -> str:
    """A filled rectangle with a pattern of strokes, so that parts differ by more than colour."""
    hue = colour(str(index % 5 + 1))
    box = rect(x, y, width, height, fill=hue, stroke=colour("paper"))
    every = (0, 7, 0, 5, 9)[index % 5]
    if not every or width < 3:
        return box
    steps = "".join(
        f"M{number(x + at)} {number(y + 1)}v{number(height - 2)}"
        for at in np.arange(every / 2, width - 1, every)
    )
    return box + element("path", d=steps, stroke=colour("paper"), stroke_opacity="0.55")


def time_by_operation(names: Sequence[str], seconds: np.ndarray) -> Figure:
    """The time of each operation of a run: a bar per operation, the longest first.

    Args:
        names: n operations; all but the 15 longest are one bar.
        seconds: (n,), not negative.

    What to see: which operations take the most time; in large models these are matrix products.
    """
    seconds = array(seconds, "seconds", 1)
    same_length(len(seconds), names=names)
    if seconds.min() < 0:
        raise ValueError(f"seconds has {seconds.min()}: expected no negative element")
    order = np.argsort(-seconds, kind="stable")
    bars = [(names[i], float(seconds[i])) for i in order]
    if len(bars) > _MOST_BARS:
        rest = bars[_MOST_BARS - 1 :]
        bars = bars[: _MOST_BARS - 1] + [(f"{len(rest)} others", sum(s for _, s in rest))]
    total, largest = float(seconds.sum()) or 1.0, max(s for _, s in bars) or 1.0
    left = min(max(text_width(name, mono=True) for name, _ in bars) + 10, 200)
    room = text_width("99.9 %  999 ms") + 6
    parts, y = [], 2.0
    for name, duration in bars:
        size = duration / largest * (NARROW - left - room)
        share = percent(duration / total) if duration >= 0.001 * total else "<0.1%"
        label = f"{share}  {seconds_label(duration)}"
        parts.append(
            group(
                text(left - 8, y + 16, shorten(name, left - 8, mono=True), "end", class_="m"),
                rect(left, y + 3, size, 16, fill=colour("1")),
                text(left + size + 6, y + 16, label, class_="s"),
                tip=f"{name}: {seconds_label(duration)}, {percent(duration / total)}",
            )
        )
        y += 24
    alt = (
        f"The time of {len(seconds)} operations, {seconds_label(float(seconds.sum()))} in all. "
        f"{bars[0][0]} took most: {percent(bars[0][1] / total)}."
    )
    return figure(parts, NARROW, y + 2, "Time by operation", alt)
