"""The model's parameters as plain data.

Shapes: D width, H query heads, K key-value heads, C head width, F ffn width, V vocabulary,
O outputs of any matrix. Every matrix has the shape (outputs, inputs), as in Hugging Face's files.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, pairwise
from typing import TypeVar

from npllama.backend import Array
from npllama.weight_formats import Format, format_of

Part = TypeVar("Part", bound="_Mapped")


class _Mapped:
    """A frozen dataclass of arrays and of other parts.

    Derived fields are not arguments of the constructor. `ops.prepare` sets some of them. These are
    None until then, and None again in the results of `map` and `dataclasses.replace`.
    """

    def map(self: Part, move: Callable[[Array], Array]) -> Part:
        """A copy of the part with `move` applied to each array. It is the part itself if `move`
        returns every array unchanged."""
        changed = {}
        for name in self._own_fields():
            value = getattr(self, name)
            if isinstance(value, _Mapped):
                new = value.map(move)
            elif hasattr(value, "shape"):
                new = move(value)
            else:
                continue
            if new is not value:
                changed[name] = new
        return replace(self, **changed) if changed else self  # type: ignore[type-var]

    def arrays(self) -> Iterator[Array]:
        """All arrays of the part, in the order of `map`."""
        for name in self._own_fields():
            value = getattr(self, name)
            if isinstance(value, _Mapped):
                yield from value.arrays()
            elif hasattr(value, "shape"):
                yield value

    def with_derived(self: Part, **derived: object) -> Part:
        """A copy of the part with these values of derived fields."""
        made = replace(self)  # type: ignore[type-var]
        for name, value in derived.items():
            object.__setattr__(made, name, value)
        return made

    def _own_fields(self) -> list[str]:
        return [f.name for f in fields(self) if f.init]  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Matrix(_Mapped):
    """A weight matrix W (O, D) in its storage format.

    Attributes:
        values: (O, D) in the format's dtype.
        scale: (O,) float32, one factor per row of W; None means 1.
        format: the format, which follows from the dtype of the values.
        shape: the shape (O, D) of W.
        number: a number that identifies the matrix if worker processes share its products, else
            None.
    """

    values: Array
    scale: Array | None = None
    format: Format = field(init=False)
    shape: tuple[int, ...] = field(init=False)
    number: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", format_of(self.values.dtype))
        object.__setattr__(self, "shape", self.format.shape(self.values.shape))

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays())

    def split(self, n_rows: Iterable[int]) -> "list[Matrix]":
        """Views of n_rows[0], n_rows[1], ... consecutive rows: (sum O_i, D) -> (O_i, D) each."""
        ends = [0, *accumulate(n_rows)]
        return [self.slice_rows(slice(a, b)) for a, b in pairwise(ends)]

    def slice_rows(self, some: slice) -> "Matrix":
        """A view of some rows."""
        return self.map(lambda array: array[some])


@dataclass(frozen=True, eq=False)
class Layer(_Mapped):
    """The parameters of one transformer layer. In a sharded model, H, K and F are those of a shard.

    Attributes:
        qkv: wq, wk and wv as one matrix, of which they are views; None if they are not contiguous.
        gate_up: the same for w_gate and w_up.
    """

    attention_norm: Array  # (D,) float32
    wq: Matrix  # (H*C, D)
    wk: Matrix  # (K*C, D)
    wv: Matrix  # (K*C, D)
    wo: Matrix  # (D, H*C)
    ffn_norm: Array  # (D,) float32
    w_gate: Matrix  # (F, D)
    w_up: Matrix  # (F, D)
    w_down: Matrix  # (D, F)
    norm_eps: float
    qkv: Matrix | None = field(default=None, init=False)  # (H*C + 2*K*C, D)
    gate_up: Matrix | None = field(default=None, init=False)  # (2*F, D)


@dataclass(frozen=True, eq=False)
class Head(_Mapped):
    """The parameters that compute logits from the last hidden state."""

    norm: Array  # (D,) float32
    lm_head: Matrix  # (V, D); the embedding itself if the two are tied
    norm_eps: float


@dataclass(frozen=True)
class Parameters:
    """All parameters of a model: the embedding (V, D), L layers and the head."""

    embedding: Matrix
    layers: tuple[Layer, ...]
    head: Head

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors in their storage dtype. A tied head counts once."""
        parts = (self.embedding, *self.layers, self.head)
        nbytes = {id(array): array.nbytes for part in parts for array in part.arrays()}
        return sum(nbytes.values())
