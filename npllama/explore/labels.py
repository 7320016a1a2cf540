"""Text for pictures: printable, escaped, measured, shortened."""

import html
import textwrap
import unicodedata

import numpy as np

SPACE = "▁"
"""Sentencepiece's visible mark of a space."""

_NARROW = set("iljtfrI.,:;'|!()[]/- `")
_WIDE = set("mwMW@%")


def printable(text: str) -> str:
    """The text, with invisible characters and those that XML forbids spelled out.

    Control characters become hexadecimal, as sentencepiece writes bytes: `<0x0A>`. Formatting
    characters (joiners, marks of direction), lone surrogates and unassigned code points become
    `<U+200E>`. If the text begins with a combining character, a dotted circle precedes it.
    """
    shown = "".join(_printable_character(c) for c in text)
    if shown and unicodedata.category(shown[0]).startswith("M"):
        return "◌" + shown
    return shown


def _printable_character(c: str) -> str:
    category = unicodedata.category(c)
    if category == "Cc":
        return f"<0x{ord(c):02X}>"
    if category in {"Cf", "Cs", "Co", "Cn", "Zl", "Zp"}:
        return f"<U+{ord(c):04X}>"
    return c


def piece_label(piece: str) -> str:
    """A piece of the tokenizer as a label: each space is the visible `▁`."""
    return printable(piece.replace(" ", SPACE)) or "∅"


def escape(text: str) -> str:
    """Text for an element or a quoted attribute of SVG."""
    return html.escape(printable(text), quote=True)


def text_width(text: str, size: float = 14, mono: bool = False) -> float:
    """An upper estimate of the width of a text, in the units of the font size.

    The widths are those of DejaVu Sans, the widest of the usual fonts, in five classes.
    """
    return size * sum(_character_width(c, mono) for c in text)


def _character_width(c: str, mono: bool) -> float:
    if unicodedata.combining(c):
        return 0.0
    if unicodedata.east_asian_width(c) in "WF":
        return 1.25 if ord(c) > 0xFFFF else 1.05
    if mono:
        return 0.61
    if c in _NARROW:
        return 0.4
    if c in _WIDE:
        return 0.98
    return 0.74 if c.isupper() else 0.63


def shorten(text: str, width: float, size: float = 14, mono: bool = False) -> str:
    """The longest beginning of a text that fits the width; `…` marks the cut."""
    if text_width(text, size, mono) <= width:
        return text
    while text and text_width(text + "…", size, mono) > width:
        text = text[:-1]
    return text + "…"


def quantity(value: float, digits: int = 3) -> str:
    """A number in few characters: 0.0123, −1,234, 5.67M, 1.2e−7."""
    size, sign = abs(value), "−" if value < 0 else ""
    for power, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if 0.9995 * power <= size < 999.5 * power:
            return f"{sign}{size / power:.{digits}g}{suffix}"
    if size >= 1e15 or 0 < size < 1e-4:
        mantissa, exponent = f"{size:.{max(digits - 1, 0)}e}".split("e")
        short = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{sign}{short}e{int(exponent)}".replace("e-", "e−")
    if size >= 999.5:
        return f"{sign}{size:,.0f}"
    return f"{sign}{size:.{digits}g}"


def wrapped(text: str, width: float, most: int, size: float = 14) -> list[str]:
    """Monospaced text in at most `most` lines of a width; the last one is shortened."""
    characters = max(int(width / text_width("x", size, mono=True)), 1)
    lines = textwrap.wrap(text, characters, break_on_hyphens=False) or [""]
    if len(lines) > most:
        lines = lines[: most - 1] + [" ".join(lines[most - 1 :])]
    return [shorten(line, width, size, mono=True) for line in lines]


def bytes_label(n_bytes: float) -> str:
    """A number of bytes with a decimal prefix: 12.3 kB, 4.56 GB."""
    for power, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n_bytes >= 0.9995 * power:
            return f"{n_bytes / power:.3g} {unit}"
    return f"{n_bytes:.3g} B"


def seconds_label(seconds: float) -> str:
    """A duration in the unit that suits it: 1.2 s, 3.4 ms, 56 µs."""
    for power, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= 0.9995 * power:
            return f"{seconds / power:.3g} {unit}"
    return "0 s" if seconds == 0 else f"{seconds / 1e-9:.3g} ns"


def percent(share: float) -> str:
    """A share of 1 in percent: 12.3%."""
    value = 100 * share
    return f"{value:,.0f}%" if abs(value) >= 999.5 else f"{value:.3g}%"


def count(n: int, one: str, many: str = "") -> str:
    """A number with its noun: 1 token, 1,024 tokens."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def array(values: object, name: str, n_dims: int) -> np.ndarray:
    """The argument as a finite float64 array of `n_dims` axes, none of them empty.

    Raises:
        ValueError: another number of axes, no elements, or NaN or infinity among them.
    """
    result = np.asarray(values, dtype=np.float64)
    if result.ndim != n_dims or result.size == 0:
        raise ValueError(
            f"{name} has the shape {result.shape}: expected {n_dims} axes, none of length 0"
        )
    if not np.isfinite(result).all():
        bad = int((~np.isfinite(result)).sum())
        raise ValueError(
            f"{name} has {bad} elements of {result.size} that are NaN or infinite: a picture "
            "needs finite values"
        )
    return result


def same_length(expected: int, **sequences: object) -> None:
    """Raise ValueError if one of the sequences has another length."""
    for name, sequence in sequences.items():
        if len(sequence) != expected:  # type: ignore[arg-type]
            raise ValueError(f"{name} has {len(sequence)} entries: expected {expected}")  # type: ignore[arg-type]


def window(n: int, most: int) -> np.ndarray:
    """At most `most` of the indices 0 to n - 1, evenly spaced, including the first and the last."""
    if n <= most:
        return np.arange(n)
    return np.unique(np.linspace(0, n - 1, most).round().astype(int))
