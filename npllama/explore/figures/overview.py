"""The whole model in one picture."""

from npllama.explore.labels import count, shorten
from npllama.explore.svg import (
    NARROW,
    Figure,
    arrow,
    circle,
    colour,
    element,
    figure,
    group,
    line,
    rect,
    text,
)

_STEM, _LEFT, _RIGHT, _LINE = 40.0, 84.0, 312.0, 19.0
_LOOP = NARROW - 6


def pipeline(
    *,
    vocab_size: int,
    dim: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    ffn_dim: int,
    n_tokens: int,
    name: str = "",
) -> Figure:
    """The path of a text through the model, with the shapes of this run.

    Text becomes ids, and ids become rows of the embedding. L layers add to these rows; the vertical
    line is the residual stream. The last row becomes the logits, from which one token is sampled.
    The token is appended to the ids, and the next step computes its row.

    Args:
        vocab_size, dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim: V, D, L, H, K, C, F.
        n_tokens: T.
        name: of the model, for the title.
    """
    t, d = n_tokens, dim
    drawing = _Drawing()
    drawing.box("tokenizer", f"text → {t:,} ids", full=True)
    drawing.down()
    drawing.box("embedding", f"{vocab_size:,} rows → {t:,} × {d:,}", full=True)
    embedding = drawing.middle
    drawing.down()
    drawing.open_frame(count(n_layers, "layer"))
    drawing.branch()
    drawing.box("RMSNorm", f"{t:,} × {d:,}")
    drawing.down()
    qkv = [f"q: {n_heads} × {t:,} × {head_dim}", f"k and v: {n_kv_heads} × {t:,} × {head_dim}"]
    drawing.box("project, rotate (RoPE)", *qkv)
    kept_from = drawing.middle
    drawing.down("q")
    drawing.box("attention", f"{n_heads} maps of {t:,} × {t:,}", f"→ {t:,} × {d:,}")
    drawing.cache(kept_from, ["k and v:", f"{n_kv_heads} × {t:,}", f"× {head_dim}"])
    drawing.add()
    drawing.branch()
    drawing.box("RMSNorm", f"{t:,} × {d:,}")
    drawing.down()
    drawing.box("SwiGLU", f"{d:,} → {ffn_dim:,} → {d:,}")
    drawing.add()
    drawing.close_frame()
    drawing.box("RMSNorm, head", f"last row: {d:,} → {vocab_size:,} logits", full=True)
    drawing.down()
    drawing.box("sampling", "logits → the next id", full=True)
    drawing.loop(embedding)
    model = name or "The model"
    alt = (
        f"{model}: {count(t, 'token')} become {t} by {d} elements, pass "
        f"{count(n_layers, 'layer')} of attention ({n_heads} query heads, {n_kv_heads} key-value "
        f"heads of {head_dim}) and SwiGLU ({ffn_dim} wide), and become {vocab_size} logits, from "
        "which the next token is sampled."
    )
    title = f"{name}: from text to the next token" if name else "From text to the next token"
    return figure(drawing.parts, NARROW, drawing.y + 4, title, alt)


class _Drawing:
    """A column of boxes beside the stem; the next box begins at y."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.y = 4.0
        self.middle = 0.0
        self._frame = (0.0, "")
        self._last_box = (0.0, 0.0)
        self._branched_at = 0.0

    def box(self, title: str, *lines: str, full: bool = False) -> None:
        """A box with a title and lines below it; a `full` one covers the stem."""
        left = 8.0 if full else _LEFT
        height = 12 + _LINE * (1 + len(lines))
        self.parts.append(
            rect(left, self.y, _RIGHT - left, height, rx=5, fill=colour("fill"), stroke=colour("1"))
        )
        centre, room = (left + _RIGHT) / 2, _RIGHT - left - 8
        for i, content in enumerate((title, *lines)):
            class_ = "b" if i == 0 else None
            y = self.y + 20 + _LINE * i
            self.parts.append(text(centre, y, shorten(content, room), "middle", class_=class_))
        self.middle = self.y + height / 2
        self._last_box = (self.y, self.y + height)
        self.y += height

    def down(self, label: str = "") -> None:
        """An arrow from the last box to the next."""
        x = (_LEFT + _RIGHT) / 2
        if label:
            self.parts.append(text(x + 7, self.y + 13, label))
        self.parts.append(arrow(x, self.y, x, self.y + 18))
        self.y += 18

    def open_frame(self, title: str) -> None:
        """Begin the frame of one layer, which the stem enters."""
        self._frame = (self.y, title)
        self._stem_from = self.y - 18
        self.parts.pop()  # the stem replaces the arrow of `down`
        self.y += 8

    def branch(self) -> None:
        """A branch from the stem to the next box."""
        y = self.y + 26
        self.parts.append(arrow(_STEM, y, _LEFT, y))
        self.y += 4

    def add(self) -> None:
        """Add the last box's result to the stem."""
        y = (self._last_box[0] + self._last_box[1]) / 2
        self.parts.append(arrow(_LEFT, y, _STEM + 9, y))
        self.parts.append(_Drawing._plus(y))
        self.y += 14

    @staticmethod
    def _plus(y: float) -> str:
        pen = {"stroke": colour("ink"), "stroke_width": "1.5"}
        ring = circle(_STEM, y, 9, fill=colour("paper"), **pen)
        cross = line(_STEM - 5, y, _STEM + 5, y, **pen) + line(_STEM, y - 5, _STEM, y + 5, **pen)
        return group(ring, cross, tip="added to the residual stream")

    def cache(self, kept_from: float, lines: list[str]) -> None:
        """The cache beside the last box: keys and values go in, attention reads them."""
        left, right = _RIGHT + 24, NARROW - 26
        top = kept_from + 16
        bottom = top + 14 + _LINE * (1 + len(lines))
        centre = (left + right) / 2
        self.parts.append(
            rect(left, top, right - left, bottom - top, rx=5, fill="none", stroke=colour("2"))
        )
        for i, content in enumerate(["KV cache", *lines]):
            class_ = "b" if i == 0 else None
            label = shorten(content, right - left - 4)
            self.parts.append(text(centre, top + 20 + _LINE * i, label, "middle", class_=class_))
        pen = {"stroke": colour("2"), "stroke_width": "1.5"}
        self.parts.append(line(_RIGHT, kept_from, centre, kept_from, **pen))
        self.parts.append(arrow(centre, kept_from, centre, top, **pen))
        self.parts.append(arrow(left, self.middle, _RIGHT, self.middle, **pen))

    def close_frame(self) -> None:
        """Close the layer: the frame and the stem are drawn behind the boxes."""
        top, title = self._frame
        width = _LOOP - 14 - 8
        frame = rect(
            8, top, width, self.y - top, rx=8, fill="none", stroke=colour("line"),
            stroke_dasharray="5 4",
        )  # fmt: skip
        stem = arrow(_STEM, self._stem_from, _STEM, self.y + 18, 9, stroke_width="2.5")
        label = text(_LOOP - 22, top + 20, title, "end", class_="b")
        self.parts = [frame, stem, *self.parts, label]
        self.y += 18

    def loop(self, to: float) -> None:
        """The path back: the sampled id becomes the last of the ids."""
        y, pen = self.middle, {"fill": "none", "stroke": colour("3"), "stroke_width": "1.5"}
        drawn = f"M{_RIGHT} {y}H{_LOOP}V{to}H{_RIGHT + 8}"
        self.parts.append(element("path", d=drawn, **pen))
        self.parts.append(arrow(_RIGHT + 10, to, _RIGHT, to, 9, stroke=colour("3")))
        self.parts.append(text(_RIGHT + 12, y - 7, "one more id"))
