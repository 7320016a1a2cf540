"""Section 1: a text, its pieces and their ids."""

from collections.abc import Sequence

from npllama.explore.labels import (
    count,
    piece_label,
    printable,
    same_length,
    shorten,
    text_width,
    wrapped,
)
from npllama.explore.svg import FONT, NARROW, Figure, colour, figure, group, rect, text

_GAP, _HEIGHT, _MOST = 5, 46, 128


def pieces_strip(full_text: str, pieces: Sequence[str], ids: Sequence[int]) -> Figure:
    """The text, and below it a box per piece with the piece's id.

    Args:
        full_text: the text that was tokenized.
        pieces: T pieces; spaces are shown as `▁`.
        ids: T ids.

    What to see: frequent words are one piece, and rare words several. A space belongs to the word
    after it.
    """
    same_length(len(pieces), ids=ids)
    if not pieces:
        raise ValueError("no pieces to show: expected at least 1")
    shown = printable(full_text.replace("\n", "⏎"))
    lines = wrapped(f"“{shown}”", NARROW, 4)
    parts = [text(0, 16 + 20 * i, line, class_="m") for i, line in enumerate(lines)]
    x, y = 0.0, 10.0 + 20 * len(lines)
    for i, (piece, id_) in enumerate(zip(pieces[:_MOST], ids, strict=False)):
        label = shorten(piece_label(piece), NARROW - 16, mono=True)
        width = max(text_width(label, mono=True), text_width(str(id_))) + 12
        if x and x + width > NARROW:
            x, y = 0.0, y + _HEIGHT + _GAP
        parts.append(_piece(x, y, width, label, id_, i))
        x += width + _GAP
    height = y + _HEIGHT + 4
    if len(pieces) > _MOST:
        parts.append(text(0, height + FONT, f"… and {len(pieces) - _MOST:,} more", class_="s"))
        height += FONT + 8
    alt = (
        f"The text {shorten(shown, 600)} is cut into {count(len(pieces), 'piece')}; the first is "
        f"{piece_label(pieces[0])} with id {ids[0]}, the last {piece_label(pieces[-1])} with id "
        f"{ids[len(pieces) - 1]}."
    )
    return figure(parts, NARROW, height, "Pieces and their ids", alt)


def _piece(x: float, y: float, width: float, label: str, id_: int, index: int) -> str:
    box = rect(x + 1, y, width - 2, _HEIGHT, rx=4, fill=colour("fill"), stroke=colour("line"))
    middle = x + width / 2
    piece = text(middle, y + 19, label, "middle", class_="m")
    number = text(middle, y + 38, str(id_), "middle", class_="s")
    return group(box, piece, number, tip=f"position {index}: {label}, id {id_}")
