"""The figures as plain text for a terminal of 80 columns."""

import textwrap
from collections.abc import Sequence

from benchmarking.figures import Program
from benchmarking.step_profile import OpTime
from benchmarking.table import COLUMNS, PROFILE_TITLES, UNKNOWN, profile_rows

WIDTH = 80
_GAP = 2
_NARROWEST = 24
"""Smallest width to which a program's name is wrapped."""


def programs_text(programs: Sequence[Program]) -> str:
    """One line per figure and one column per program, in several blocks if necessary."""
    titles = [title for title, _ in COLUMNS]
    left = max(map(len, titles))
    blocks: list[list[list[str]]] = [[]]
    filled = left
    for program in programs:
        column = _column(program)
        width = _GAP + max(map(len, column))
        if blocks[-1] and filled + width > WIDTH:
            blocks.append([])
            filled = left
        blocks[-1].append(column)
        filled += width
    return "\n\n".join(_block(titles, columns) for columns in blocks)


def profile_text(lines: Sequence[OpTime]) -> str:
    """One line per op of a decode step, and their sum."""
    rows = [list(PROFILE_TITLES), *profile_rows(lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    )


def paragraph(text: str) -> str:
    """Wrap text to 80 columns. Longer words, such as paths, are not broken."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _column(program: Program) -> list[str]:
    """A program's figures below its name, which may be wrapped."""
    cells = [cell(program).replace(UNKNOWN, "-") for _, cell in COLUMNS]
    width = max(_NARROWEST, *map(len, cells))
    return textwrap.wrap(program.name, width, break_on_hyphens=False) + cells


def _block(titles: list[str], columns: list[list[str]]) -> str:
    height = max(map(len, columns))
    columns = [[""] * (height - len(column)) + column for column in columns]
    columns = [[""] * (height - len(titles)) + titles, *columns]
    widths = [max(map(len, column)) + _GAP for column in columns]
    return "\n".join(
        "".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in zip(*columns, strict=True)
    )
