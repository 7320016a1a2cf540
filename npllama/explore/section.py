"""What a section of the page consists of, and the words that its text is made with."""

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
    """A function that the page shows as it stands in the installed package.

    Attributes:
        function: the function itself.
        tests: names of the tests that hold it to its definition, as pytest -k takes them.
        source: the paper, for a function whose docstring has no "Source:" of its own.
    """

    function: Callable
    tests: tuple[str, ...]
    source: str = ""

    @property
    def name(self) -> str:
        return self.function.__qualname__

    @property
    def place(self) -> str:
        """File and line in the package."""
        path = Path(inspect.getsourcefile(self.function))  # type: ignore[arg-type]
        line = inspect.getsourcelines(self.function)[1]
        return f"{path.relative_to(_ROOT).as_posix()}:{line}"

    @property
    def code(self) -> str:
        """The source, at the margin."""
        return inspect.cleandoc("\n" + inspect.getsource(self.function)) + "\n"

    @property
    def reference(self) -> str:
        """The paper that its docstring names, or `source`."""
        doc = inspect.getdoc(self.function) or ""
        found = re.search(r"^Source: (.*?)(?:\n\n|\Z)", doc, re.S | re.M)
        return self.source if found is None else " ".join(found.group(1).split())


@dataclass(frozen=True)
class Picture:
    """A figure and what stands below it.

    Attributes:
        extra: a control above the figure, such as a slider.
    """

    figure: Figure
    caption: Markup
    extra: Markup = NO_MARKUP

    @property
    def is_wide(self) -> bool:
        """Whether it needs the width of two."""
        return self.figure.width > _NARROW or bool(self.extra)


@dataclass(frozen=True)
class Choices:
    """Figures of which one is shown at a time: (label, figure) each; `shown` is the first one."""

    name: str
    figures: tuple[tuple[str, Figure], ...]
    caption: Markup
    shown: int = 0


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column names the row, the others hold numbers."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: Markup


@dataclass(frozen=True)
class Section:
    """One section of the page.

    Attributes:
        slug: the anchor.
        idea: paragraphs that say why the part is there.
        equations: LaTeX.
        functions: the first one is the section's; the others belong to it.
        shapes: (array, shape in letters, shape in numbers).
        parts: pictures and tables.
        see: sentences that say what to see.
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
    """A sentence with HTML marks, and values, which are escaped."""
    return Markup(text).format(**values)


def piece(text: str) -> Markup:
    """A piece of the vocabulary in a sentence."""
    return Markup('<code class="piece">{}</code>').format(piece_label(text))


def shape(name: str, letters: str, *sizes: int) -> tuple[str, str, str]:
    """A row of the table of shapes."""
    shown = ", ".join(f"{size:,}" for size in sizes)
    return name, f"({letters})", f"({shown}{',' if len(sizes) == 1 else ''})"
