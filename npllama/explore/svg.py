"""Figures: SVG text made by short functions. It follows the page's light or dark colours.

Sizes. A figure is drawn in units of its viewBox and scales to the width of its container. Labels
have a size of `FONT` units. In a `NARROW` figure this is 11 px on a screen of 400 px. A wider
figure has a minimum width, at which its labels have 11 px; its container scrolls (`overflow-x:
auto`).

Colours. Each is a CSS custom property of the page with a default of its own for light and dark
(`STYLE`): `--fig-ink`, `--fig-soft`, `--fig-line`, `--fig-paper`, `--fig-fill`, `--fig-1` to
`--fig-5`. The defaults follow the system's setting; a figure alone in a file is complete.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from npllama.explore.colours import DARK, LIGHT
from npllama.explore.labels import escape, text_width

FONT = 14
"""Size of the labels in units of the viewBox."""
NARROW = 460
"""Width of a figure that fits a screen of 400 px."""
_LEAST_PIXELS = 11

_VARIABLES = "".join(f"--{name}:var(--fig-{name},{colour});" for name, colour in LIGHT.items())
_DARK_VARIABLES = "".join(f"--{name}:var(--fig-{name},{colour});" for name, colour in DARK.items())
STYLE = (
    f".nf{{{_VARIABLES}}}"
    f"@media screen and (prefers-color-scheme:dark){{.nf{{{_DARK_VARIABLES}}}}}"
    f".nf text{{font-size:{FONT}px}}"
    ".nf text{font-family:system-ui,'DejaVu Sans',sans-serif;fill:var(--ink);direction:ltr;"
    "white-space:pre}"
    ".nf .m{font-family:ui-monospace,'DejaVu Sans Mono',Menlo,Consolas,monospace}"
    ".nf .s{fill:var(--soft)}.nf .b{font-weight:bold}"
    ".nf image{image-rendering:pixelated}"
)
STYLE_ELEMENT = f"<style>{STYLE}</style>"
"""The style of each figure, which makes it complete without a page."""


@dataclass(frozen=True)
class Figure:
    """A picture of one run.

    Attributes:
        svg: a complete <svg> element.
        alt: a description in words, with numbers of this run.
        width, height: of the viewBox.
    """

    svg: str = field(repr=False)
    alt: str
    width: float
    height: float

    def _repr_svg_(self) -> str:
        """The element, for a notebook."""
        return self.svg


def number(x: float) -> str:
    """A coordinate with at most two decimals."""
    return f"{x:.2f}".rstrip("0").rstrip(".").replace("-0", "0", 1 if x == 0 else 0)


def attributes(**values: object) -> str:
    """` name="value"` for each value that is not None.

    A final `_` of a name is dropped, and other `_` become `-`.
    """
    parts = []
    for name, value in values.items():
        if value is not None:
            shown = number(value) if isinstance(value, float) else escape(str(value))
            parts.append(f' {name.rstrip("_").replace("_", "-")}="{shown}"')
    return "".join(parts)


def element(name: str, *inside: str, **values: object) -> str:
    """An element; a keyword `tip` becomes its <title>, which a browser shows on hover."""
    tip = values.pop("tip", None)
    title = "" if tip is None else f"<title>{escape(str(tip))}</title>"
    content = title + "".join(inside)
    return f"<{name}{attributes(**values)}" + (f">{content}</{name}>" if content else "/>")


def colour(name: str) -> str:
    """The value of a property of STYLE: `ink`, `soft`, `line`, `paper`, `fill`, `1` to `5`."""
    return f"var(--{name})"


def text(x: float, y: float, content: str, anchor: str = "start", **values: object) -> str:
    """A label whose baseline is at y; `anchor` is start, middle or end. `class_`: "m" is
    monospaced, "s" soft, "b" bold."""
    anchor_value = None if anchor == "start" else anchor
    place = {} if "transform" in values else {"x": float(x), "y": float(y)}
    return element("text", escape(content), **place, text_anchor=anchor_value, **values)


def rect(x: float, y: float, width: float, height: float, **values: object) -> str:
    """A rectangle."""
    sides = {"width": float(max(width, 0)), "height": float(max(height, 0))}
    return element("rect", x=float(x), y=float(y), **sides, **values)


def line(x1: float, y1: float, x2: float, y2: float, **values: object) -> str:
    """A line, by default thin and of the colour of axes."""
    ends = {"x1": float(x1), "y1": float(y1), "x2": float(x2), "y2": float(y2)}
    return element("line", **ends, **({"stroke": colour("line")} | values))


def circle(x: float, y: float, radius: float, **values: object) -> str:
    """A circle."""
    return element("circle", cx=float(x), cy=float(y), r=float(radius), **values)


def path(points: Iterable[tuple[float, float]], closed: bool = False, **values: object) -> str:
    """A line through points, not filled by default."""
    steps = "L".join(f"{number(x)} {number(y)}" for x, y in points)
    drawn = f"M{steps}" + ("Z" if closed else "")
    return element("path", d=drawn, **({"fill": "none", "stroke": colour("ink")} | values))


def dots(points: Iterable[tuple[float, float]], radius: float, **values: object) -> str:
    """Many equal discs as one short path."""
    steps = "".join(f"M{number(x)} {number(y)}h0" for x, y in points)
    pen = {"stroke_linecap": "round", "stroke_width": number(2 * radius), "fill": "none"}
    return element("path", d=steps, **(pen | values))


def triangles(points: Iterable[tuple[float, float]], radius: float, **values: object) -> str:
    """Many equal triangles, outlined, as one path."""
    half = number(0.87 * radius)
    steps = "".join(
        f"M{number(x)} {number(y - radius)}l{half} {number(1.5 * radius)}h-{number(1.74 * radius)}z"
        for x, y in points
    )
    return element("path", d=steps, **({"fill": "none", "stroke_width": "1.2"} | values))


def arrow(x1: float, y1: float, x2: float, y2: float, head: float = 5, **values: object) -> str:
    """A line with a filled head at its second end."""
    length = max(((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5, 1e-9)
    ux, uy = (x2 - x1) / length, (y2 - y1) / length
    bx, by = x2 - head * ux, y2 - head * uy
    stroke = values.get("stroke", colour("ink"))
    tip = [
        (x2, y2),
        (bx - head / 2 * uy, by + head / 2 * ux),
        (bx + head / 2 * uy, by - head / 2 * ux),
    ]
    shaft = line(x1, y1, bx, by, **({"stroke": stroke} | values))
    return shaft + path(tip, closed=True, fill=stroke, stroke="none")


def group(*inside: str, **values: object) -> str:
    """A <g> around elements."""
    return element("g", *inside, **values)


def legend(x: float, y: float, entries: list[tuple[str, str]], width: float) -> tuple[str, float]:
    """Marks with their labels, wrapped to a width.

    Args:
        entries: (an element drawn around the point 0, 0; its label).

    Returns:
        The elements, and the y below them.
    """
    parts, left = [], x
    for mark, label in entries:
        needed = 26 + text_width(label)
        if left > x and left + needed > x + width:
            left, y = x, y + FONT + 6
        parts.append(group(mark, transform=f"translate({number(left + 9)} {number(y - 5)})"))
        parts.append(text(left + 22, y, label))
        left += needed + 12
    return "".join(parts), y + FONT + 6


def figure(parts: Iterable[str], width: float, height: float, title: str, alt: str) -> Figure:
    """The elements as a complete picture with a background."""
    least = min(width * _LEAST_PIXELS / FONT, width)
    style = f"width:100%;max-width:{number(width * 1.2)}px;min-width:{number(least)}px;height:auto"
    svg = element(
        "svg",
        f"<title>{escape(title)}</title><desc>{escape(alt)}</desc>{STYLE_ELEMENT}",
        rect(0, 0, width, height, fill=colour("paper")),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {number(width)} {number(height)}",
        role="img",
        class_="nf",
        style=style,
    )
    return Figure(svg, alt, width, height)
