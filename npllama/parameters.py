"""The model's parameters as plain data: what the equations are given, and nothing that acts.

Shapes: D width, H query heads, K key-value heads, C head width, F ffn width, V vocabulary,
O outputs of any matrix. Every matrix maps its last axis to its first, (O, D), as Hugging Face
stores it.
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

    Fields that follow from the others are not given when a part is made. Those that `ops.prepare`
    sets are None until then, and again in what `map` or `dataclasses.replace` makes.
    """

    def map(self: Part, move: Callable[[Array], Array]) -> Part:
        """The part with `move` applied to each of its arrays, one after the other; itself where
        that changes none."""
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
        """Each of its arrays, in the same order."""
        for name in self._own_fields():
            value = getattr(self, name)
            if isinstance(value, _Mapped):
                yield from value.arrays()
            elif hasattr(value, "shape"):
                yield value

    def with_derived(self: Part, **derived: object) -> Part:
        """The same part with these derived fields."""
        made = replace(self)  # type: ignore[type-var]
        for name, value in derived.items():
            object.__setattr__(made, name, value)
        return made

    def _own_fields(self) -> list[str]:
        return [f.name for f in fields(self) if f.init]  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Matrix(_Mapped):
    """A weight W (O, D) as it is stored; its format knows how that is read.

    Attributes:
        values: (O, D) in the format's dtype.
        scale: (O,) float32, one factor an output row; None means 1.
        format: which one it is, by the dtype of the values.
        shape: (O, D), that of W.
        number: by which an `ops` that has prepared it knows it; None where it does not.
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
        """Views of its rows, so many and then so many: (sum O_i, D) -> (O_i, D) each."""
        ends = [0, *accumulate(n_rows)]
        return [self.slice_rows(slice(a, b)) for a, b in pairwise(ends)]

    def slice_rows(self, some: slice) -> "Matrix":
        """A view of some of its rows."""
        return self.map(lambda array: array[some])


@dataclass(frozen=True, eq=False)
class Layer(_Mapped):
    """One transformer block. Under sharding H, K and F are the counts of this shard.

    Attributes:
        qkv, gate_up: the matrices of one input as one, of which they are views; None where they
            are not contiguous in memory.
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
    """What turns the last hidden state into logits."""

    norm: Array  # (D,) float32
    lm_head: Matrix  # (V, D); the embedding itself where the checkpoint ties them
    norm_eps: float


@dataclass(frozen=True)
class Parameters:
    """All of a model: embedding (V, D), L layers, head."""

    embedding: Matrix
    layers: tuple[Layer, ...]
    head: Head

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in their storage dtype; a tied head counts once."""
        parts = (self.embedding, *self.layers, self.head)
        nbytes = {id(array): array.nbytes for part in parts for array in part.arrays()}
        return sum(nbytes.values())
