"""Section 11: from probabilities to the next token."""

import math
from collections.abc import Sequence

import numpy as np

from npllama.explore.axes import Scale, x_axis
from npllama.explore.labels import (
    array,
    count,
    percent,
    piece_label,
    same_length,
    shorten,
    text_width,
)
from npllama.explore.svg import FONT, NARROW, Figure, arrow, colour, figure, group, line, rect, text

_LABEL, _ROW, _PER_LINE = 104.0, 18.0, 3


def sampling_stages(
    labels: Sequence[str],
    stages: Sequence[tuple[str, np.ndarray]],
    uniform: float | None = None,
    chosen: int | None = None,
) -> Figure:
    """The probabilities of the same tokens after each stage of sampling, three stages in a line.

    Args:
        labels: n tokens, the likeliest first.
        stages: (name, probabilities (n,)), in order of application; a token that a filter removed
            has 0.
        uniform: the random number of this step; None if no number is shown.
        chosen: the index of the chosen label; None if it is not among them.

    What to see: temperature changes the shape, and each filter removes the tail. The remaining
    probabilities are scaled to the sum 1.
    """
    named = [(name, array(p, name, 1)) for name, p in stages]
    if not named:
        raise ValueError("no stages to show: expected at least 1")
    _check_choice(len(labels), uniform, chosen)
    for name, p in named:
        same_length(len(labels), **{name: p})
        _check_probabilities(name, p)
    per_line = min(len(named), _PER_LINE)
    width = (NARROW - _LABEL) / per_line
    largest = max(float(p.max()) for _, p in named) or 1.0
    shown = [shorten(piece_label(label), _LABEL - 20, mono=True) for label in labels]
    parts, y = [], 0.0
    for first in range(0, len(named), per_line):
        on_line = named[first : first + per_line]
        titles = [_title(name, width) for name, _ in on_line]
        top = y + 8 + _ROW * max(map(len, titles))
        parts.append(_labels(shown, top, chosen))
        for i, (name, p) in enumerate(on_line):
            x = _LABEL + i * width
            parts += [
                text(x + 2, top - 10 - _ROW * (len(titles[i]) - 1 - j), content, class_="b")
                for j, content in enumerate(titles[i])
            ]
            parts.append(_bars(shown, name, p, x, top, width - 8, largest, chosen))
        y = top + _ROW * len(shown) + 14
    if uniform is not None:
        parts.append(
            text(0, y + FONT, f"uniform random number: {_rounded_down(uniform)}", class_="s")
        )
        y += FONT + 8
    alt = (
        f"The probabilities of {count(len(labels), 'token')} after "
        f"{', '.join(n for n, _ in named)}. The likeliest, {piece_label(labels[0])}, goes from "
        f"{percent(float(named[0][1][0]))} to {percent(float(named[-1][1][0]))}; "
        f"{int((named[-1][1] > 0).sum())} of the tokens shown are left at the end."
    )
    if chosen is not None:
        alt += f" {piece_label(labels[chosen])} was chosen."
    return figure(parts, NARROW, y, "Stages of sampling", alt)


def _title(name: str, width: float) -> list[str]:
    """A stage's name in one line, or in two where it does not fit one."""
    if 1.15 * text_width(name) <= width - 8:  # bold
        return [name]
    first, _, rest = name.partition(" ")
    return [shorten(part, (width - 8) / 1.15) for part in (first, rest) if part]


def _labels(shown: Sequence[str], y: float, chosen: int | None) -> str:
    """The tokens at the left; an arrow marks the chosen one."""
    parts = []
    for i, label in enumerate(shown):
        class_ = "m b" if i == chosen else "m"
        mark = "▶" if i == chosen else ""
        middle = y + (i + 0.5) * _ROW + 5
        parts.append(text(_LABEL - 8, middle, label, "end", class_=class_))
        parts.append(text(0, middle, mark) if mark else "")
    return "".join(parts)


def _bars(
    shown: Sequence[str],
    name: str,
    p: np.ndarray,
    x: float,
    y: float,
    width: float,
    largest: float,
    chosen: int | None,
) -> str:
    """One stage: a bar per token with its percentage; `cut` if a filter removed it."""
    parts = [line(x, y, x, y + _ROW * len(p))]
    room = text_width("0.47%") + 4
    for i, share in enumerate(p):
        top, size = y + i * _ROW, float(share) / largest * (width - room)
        hue = colour("2" if i == chosen else "1")
        bar = rect(x, top + 3, size, _ROW - 6, fill=hue)
        number = text(x + size + 4, top + _ROW / 2 + 5, _share(share), class_="s")
        parts.append(group(bar, number, tip=f"{name}: {shown[i]} {percent(share)}"))
    return "".join(parts)


def _share(share: float) -> str:
    """A share in at most six characters; `cut` for a token that a filter removed."""
    if share == 0:
        return "cut"
    if share < 0.001:
        return "<0.1%"
    return f"{100 * share:.0f}%" if share >= 0.0995 else f"{100 * share:.2g}%"


def cumulative_choice(
    labels: Sequence[str],
    probabilities: np.ndarray,
    uniform: float,
    chosen: int | None,
) -> Figure:
    """The tokens' probabilities end to end on the interval from 0 to 1, and the uniform.

    Args:
        labels: n tokens in the order of their ids, in which their probabilities are summed.
        probabilities: (n,), after all filters; a sum below 1 leaves a grey rest.
        uniform: the random number, in [0, 1).
        chosen: the index of the chosen label; None if it is not among them.

    What to see: the chosen token is the one whose interval contains the uniform. A token with
    twice the probability has an interval of twice the width.
    """
    p = array(probabilities, "probabilities", 1)
    same_length(len(labels), probabilities=p)
    _check_probabilities("probabilities", p)
    _check_choice(len(labels), uniform, chosen)
    ends = np.concatenate([[0.0], np.cumsum(p)])
    scale = Scale(0.0, max(1.0, float(ends[-1])), 10, NARROW - 10)
    top, height = 62.0, 44.0
    parts = [rect(10, top, scale.stop - 10, height, fill=colour("fill"), stroke=colour("line"))]
    parts += _intervals(labels, p, ends, scale, top, height, chosen)
    x = scale(uniform)
    parts.append(arrow(x, 28, x, top - 1, 9, stroke=colour("ink"), stroke_width=2))
    caption = f"uniform {_rounded_down(uniform)}"
    half = 1.15 * text_width(caption) / 2  # bold
    parts.append(text(min(max(x, half), NARROW - half), 20, caption, "middle", class_="b"))
    parts.append(x_axis(scale, top + height, "sum of the probabilities"))
    y = top + height + 44
    name = "a token that is not shown" if chosen is None else piece_label(labels[chosen])
    if chosen is not None:
        span = f"{ends[chosen]:.4f} to {ends[chosen + 1]:.4f}"
        label = shorten(name, 150, mono=True)
        parts.append(text(NARROW / 2, y + 16, f"{label} has {span}", "middle", class_="b"))
        y += 26
    alt = (
        f"The probabilities of {count(len(labels), 'token')} end to end from 0 to {ends[-1]:.3g}. "
        f"The uniform {_rounded_down(uniform)} falls on {name}."
    )
    return figure(parts, NARROW, y, "The uniform chooses a token", alt)


def _rounded_down(uniform: float) -> str:
    """Four decimals, rounded down, so that a number below 1 stays below 1."""
    return f"{math.floor(uniform * 1e4) / 1e4:.4f}"


def _intervals(
    labels: Sequence[str],
    p: np.ndarray,
    ends: np.ndarray,
    scale: Scale,
    top: float,
    height: float,
    chosen: int | None,
) -> list[str]:
    """A box for each token that is wide enough, with its label if that fits."""
    parts = []
    for i in np.flatnonzero(p):
        x, end = scale(ends[i]), scale(ends[i + 1])
        if end - x < 1 and i != chosen:
            continue
        label = piece_label(labels[i])
        own = i == chosen
        box = rect(
            x,
            top,
            max(end - x, 1.5),
            height,
            fill=colour("2" if own else "1"),
            fill_opacity="0.5" if own else ("0.3" if i % 2 else "0.18"),
            stroke=colour("2" if own else "line"),
            stroke_width=2 if own else 1,
        )
        fits = text_width(label, mono=True) <= end - x - 4
        name = text((x + end) / 2, top + 27, label, "middle", class_="m b" if own else "m")
        parts.append((own, group(box, name if fits else "", tip=f"{label}: {percent(p[i])}")))
    return [part for _, part in sorted(parts, key=lambda pair: pair[0])]  # the chosen one on top


def _check_probabilities(name: str, p: np.ndarray) -> None:
    if p.min() < 0 or p.max() > 1 + 1e-6:
        raise ValueError(f"{name} has elements from {p.min()} to {p.max()}: expected 0 to 1")


def _check_choice(n: int, uniform: float | None, chosen: int | None) -> None:
    if n == 0:
        raise ValueError("no tokens to show: expected at least 1")
    if uniform is not None and not 0 <= uniform <= 1:
        raise ValueError(f"the uniform is {uniform}: expected 0 to 1")
    if chosen is not None and not 0 <= chosen < n:
        raise ValueError(f"chosen is {chosen}: expected 0 to {n - 1}, or None")
