"""The parts of a section of the page, and functions that make its text."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

import npllama
from npllama.explore.labels import piece_label
from npllama.explore.svg import Figure

NO_MARKUP = Markup()
_NARROW = 520
_ROOT = Path(npllama.__file__).parent.parent


@dataclass(frozen=True)
class Function:
    """A function whose source code in the installed package the page shows.

    Attributes:
        function: the function itself.
        tests: names of the tests that compare it with its definition, for pytest -k.
        source: the paper, for a function whose docstring has no "Source:".
    """

    function: Callable
    tests: tuple[str, ...]
    source: str = ""

    @property
    def name(self) -> str:
        return self.function.__qualname__

    @property
    def place(self) -> str:
        """The file and the line in the package."""
        path = Path(inspect.getsourcefile(self.function))  # type: ignore[arg-type]
        line = inspect.getsourcelines(self.function)[1]
        return f"{path.relative_to(_ROOT).as_posix()}:{line}"

    @property
    def code(self) -> str:
        """The source code without indentation."""
        return inspect.cleandoc("\n" + inspect.getsource(self.function)) + "\n"

    @property
    def reference(self) -> str:
        """The paper that the docstring names, or else `source`."""
        doc = inspect.getdoc(self.function) or ""
        found = re.search(r"^Source: (.*?)(?:\n\n|\Z)", doc, re.S | re.M)
        return self.source if found is None else " ".join(found.group(1).split())


@dataclass(frozen=True)
class Picture:
    """A figure with its caption.

    Attributes:
        extra: a control below the figure, such as a slider.
    """

    figure: Figure
    caption: Markup
    extra: Markup = NO_MARKUP

    @property
    def is_wide(self) -> bool:
        """Whether it needs the width of two pictures."""
        return self.figure.width > _NARROW or bool(self.extra)


@dataclass(frozen=True)
class Choices:
    """Figures of which one is shown at a time.

    Attributes:
        figures: (label, figure) each. Labels with the same part before a dot are in one line.
        shown: the index of the figure that is shown first.
    """

    name: str
    figures: tuple[tuple[str, Figure], ...]
    caption: Markup
    shown: int = 0


@dataclass(frozen=True)
class Table:
    """Rows of text. The first column names the row."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: Markup


@dataclass(frozen=True)
class Section:
    """One section of the page.

    Attributes:
        slug: the anchor, the target of links.
        idea: paragraphs that say why this part of the model exists.
        equations: LaTeX; a `qquad` separates equations of one line.
        functions: the functions that compute the equations; the first one is shown unfolded.
        shapes: (array, shape in letters, shape in this run).
        parts: pictures and tables.
        see: sentences that say what to see in the pictures.
    """

    slug: str
    title: str
    idea: tuple[Markup, ...]
    equations: tuple[str, ...]
    functions: tuple[Function, ...]
    shapes: tuple[tuple[str, str, str], ...]
    parts: tuple[Picture | Choices | Table, ...]
    see: tuple[Markup, ...]


def say(text: str, /, **values: object) -> Markup:
    """A text with HTML marks and {names}, which are replaced by the escaped values."""
    return Markup(text).format(**values)


def piece(text: str) -> Markup:
    """A piece of the vocabulary as HTML, for a sentence."""
    return Markup('<code class="piece">{}</code>').format(piece_label(text))


def shape(name: str, letters: str, *sizes: int) -> tuple[str, str, str]:
    """A row of the table of shapes: the name, the shape in letters, and the sizes."""
    return name, f"({letters})", f"({', '.join(f'{size:,}' for size in sizes)})"
