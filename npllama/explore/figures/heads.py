"""Section 4: query heads and the key-value heads that they share."""

from collections.abc import Mapping, Sequence

import numpy as np

from npllama.explore.axes import Scale, row_labels
from npllama.explore.heat_map import BAR_HEIGHT, colour_bar, heat_map, signed
from npllama.explore.labels import array, bytes_label, count, quantity, text_width
from npllama.explore.svg import (
    NARROW,
    Figure,
    colour,
    element,
    figure,
    group,
    number,
    rect,
    text,
)


def heads_diagram(n_heads: int, n_kv_heads: int, grouped: int | None = None) -> Figure:
    """Which query heads share which key-value head: multi-head, grouped, multi-query.

    Args:
        n_heads: H.
        n_kv_heads: K, which divides H.
        grouped: K of a grouped variant, drawn in addition for a model that has no groups; it
            divides H.

    What to see: the lower boxes are what the cache holds per token and layer. Each query head
    reads the key-value head to which its line leads.
    """
    for n in (n_kv_heads, grouped or 1):
        if n < 1 or n_heads < 1 or n_heads % n:
            raise ValueError(f"{n_heads} query heads and {n} key-value heads: expected a multiple")
    counts = sorted({n_heads, n_kv_heads, grouped or 1, 1}, reverse=True)
    parts, y = [], 0.0
    for n in counts:
        parts.append(_sharing(n_heads, n, y, n == n_kv_heads))
        y += 124
    alt = (
        f"Query heads above, key-value heads below. This model has {count(n_heads, 'query head')} "
        f"and {count(n_kv_heads, 'key-value head')}: {n_heads // n_kv_heads} to one. Multi-head "
        f"attention keeps {count(n_heads, 'key-value head')}, multi-query attention 1."
    )
    return figure(parts, NARROW, y, "Query heads and shared key-value heads", alt)


def kind_of_attention(n_heads: int, n_kv_heads: int) -> str:
    """`multi-head`, `multi-query` or `grouped`, by the counts of the heads."""
    if n_kv_heads == n_heads:
        return "multi-head"
    return "multi-query" if n_kv_heads == 1 else "grouped"


def _sharing(n_heads: int, n_kv_heads: int, y: float, own: bool) -> str:
    """One kind of attention: a title, a row of queries, a row of keys, lines between."""
    kind = kind_of_attention(n_heads, n_kv_heads)
    title = f"{kind}: {count(n_kv_heads, 'key-value head')}" + (" — this model" if own else "")
    left, width, group_size = 40.0, NARROW - 44.0, n_heads // n_kv_heads
    step, size = width / n_heads, min(width / n_heads * 0.8, 32)
    parts = [
        text(0, y + 16, title, class_="b" if own else None),
        text(0, y + 45, "q", class_="m"),
        text(0, y + 101, "k, v", class_="m"),
    ]
    keys = [left + (key + 0.5) * group_size * step for key in range(n_kv_heads)]
    queries = [left + (h + 0.5) * step for h in range(n_heads)]
    ends = "".join(
        f"M{number(x)} {number(y + 52)}L{number(keys[h // group_size])} {number(y + 84)}"
        for h, x in enumerate(queries)
    )
    kept = min(max(group_size * step * 0.7, size), 44)
    parts += [
        element("path", d=ends, fill="none", stroke=colour("line")),
        _heads(queries, y + 28, size, "q", "1"),
        _heads(keys, y + 84, kept, "k", "2"),
    ]
    return group(*parts)


def _heads(centres: Sequence[float], y: float, width: float, letter: str, hue: str) -> str:
    """A row of boxes, with their names if these fit."""
    parts = []
    for i, x in enumerate(centres):
        parts.append(rect(x - width / 2, y, width, 24, rx=3))
        if text_width(f"{letter}{i}") <= width + 2:
            name = text(x, y + 17, f"{letter}{i}", "middle", stroke="none")
            parts.append(name)
    pen = {"fill": colour("fill"), "stroke": colour(hue)}
    return group(*parts, stroke_width=2 if width > 8 else 1, **pen)


def cache_bytes(
    rows: Sequence[tuple[str, Mapping[str, float], str]], per: str = "per token"
) -> Figure:
    """Bytes of keys and values that the cache holds, for each kind of attention.

    The bars of one model share a linear scale. The longest bar of each model has the same length.

    Args:
        rows: (name of a model, {kind of attention: bytes}, the kind that the model has); all
            bytes are positive.
        per: what the bytes are counted for, in words.

    What to see: G query heads that share one key-value head make the cache G times smaller.
    """
    if not rows:
        raise ValueError("no models to compare: expected at least 1")
    sizes = array([size for _, kinds, _ in rows for size in kinds.values()], "bytes", 1)
    if sizes.min() <= 0:
        raise ValueError(f"a cache of {sizes.min()} bytes: expected a positive number")
    parts, y = [], 8.0
    for name, kinds, own in rows:
        parts.append(text(0, y + 16, name, class_="b"))
        y += 24
        scale = Scale(0, max(kinds.values()), 160, NARROW - 84)
        for kind, size in kinds.items():
            parts.append(_byte_bar(kind, size, kind == own, scale, y))
            y += 22
        y += 8
    own_sizes = "; ".join(f"{name}: {bytes_label(kinds[own])} ({own})" for name, kinds, own in rows)
    alt = f"Bytes of the cache {per} by kind of attention. {own_sizes}."
    return figure(parts, NARROW, y, "Bytes of the cache", alt)


def _byte_bar(kind: str, size: float, own: bool, scale: Scale, y: float) -> str:
    """A bar; the kind that the model has is filled, bold and marked."""
    end = scale(size)
    label = bytes_label(size) + (" ◀" if own else "")
    return group(
        text(scale.start - 6, y + 14, kind, "end"),
        rect(
            scale.start,
            y + 2,
            end - scale.start,
            16,
            fill=colour("1"),
            fill_opacity=None if own else "0.3",
            stroke=colour("1"),
        ),
        text(end + 6, y + 14, label, class_="b" if own else None),
        tip=f"{kind}: {size:,.0f} bytes",
    )


def qkv_heads(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> Figure:
    """The queries, keys and values of one token, a strip of colours per head.

    Args:
        q: (H, C).
        k, v: (K, C).

    What to see: there are G times as many queries as keys and values. Only the keys and values
    are stored in the cache. Queries, keys and values each have their own scale of colours.
    """
    named = [(n, array(x, n, 2)) for n, x in (("q", q), ("k", k), ("v", v))]
    width_c = named[0][1].shape[1]
    for name, x in named:
        if x.shape[1] != width_c or (name == "v" and x.shape != named[1][1].shape):
            raise ValueError(f"{name} has the shape {x.shape}: expected heads of {width_c}")
    left, width, y = 52.0, NARROW - 64.0, 8.0
    parts = []
    for name, x in named:
        step = min(max(320 / len(x), 6), 18)
        height = step * len(x)
        labels = [f"{name}{h}" for h in range(len(x))]
        parts.append(row_labels(labels, left - 6, y, height))
        parts.append(heat_map(x, signed(x), (left, y, width, height), rows=labels))
        y += height + 6
        parts.append(colour_bar(signed(x), left, y, width, f"elements of {name}"))
        y += BAR_HEIGHT + 6
    largest = ", ".join(f"{n} {quantity(float(np.abs(x).max()))}" for n, x in named)
    alt = (
        f"The elements of one token's {count(len(q), 'query head')}, {count(len(k), 'key head')} "
        f"and {count(len(v), 'value head')} of {width_c} elements each. The largest magnitudes: "
        f"{largest}."
    )
    return figure(parts, NARROW, y, "Queries, keys and values of one token", alt)
