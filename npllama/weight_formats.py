"""What a weight matrix is stored as: one class a format, and nothing else tells them apart.

A matrix W (O, D) is `values`, in the format's dtype, and where there is one a `scale`, (O,), of a
factor a row. A format of another kind, such as one with scales of groups, is a class of its own
with other methods.
"""

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from npllama.quantization import LARGEST, dequantize, quantize

if TYPE_CHECKING:
    from npllama.backend import Array
    from npllama.parameters import Matrix

Shape = tuple[int, ...]
_FLOAT32 = np.dtype("float32")
_CHUNK = 512 * 1024  # numbers that are looked at a time: they stay in the cache


class Format:
    """Elements of a dtype, with a factor per row where a matrix has a scale.

    Attributes:
        name: as --dtype names it.
        dtype: of `values`.
        is_float: W's numbers are the values; norms may have this dtype too, and gradients exist.
        is_wide: the CPU multiplies the values as they lie; others are widened tile by tile.
        product_dtype: the dtype in which a GPU multiplies; None for that of the activations.
        operand_dtype: the 16-bit dtype in which a GPU's tensor cores multiply W, up to a factor a
            row; None for those that they do not.
        cache_dtype: the dtype in which a GPU keeps keys and values beside such weights.
        torch_dtype: what config.json says of such a model, which other programs read.
        config: its quantization_config there, or None.
        largest: the largest number that it holds, where that is less than float32's; else None.
        tiled: the arrays of a Matrix that tiles are widened from, which workers map.
        x_exponent, y_exponent: a widened tile is 2^-(x + y) of W, made good by 2^x in the
            product's other operand and 2^y in the product.
        must_be_finite: tiles read an infinity or a NaN as another number.
    """

    is_float = True
    largest: float | None = None
    config: dict[str, str] | None = None
    tiled: tuple[str, ...] = ("values",)
    x_exponent = y_exponent = 0
    must_be_finite = False

    def __init__(self, dtype: "np.dtype | type | str") -> None:
        self.dtype = np.dtype(dtype)
        self.name = self.torch_dtype = self.dtype.name
        self.is_wide = self.dtype == np.float32
        self.product_dtype = self.dtype if self.dtype.itemsize == 2 else None
        self.operand_dtype = self.product_dtype
        self.cache_dtype = self.dtype

    # -- in a file -----------------------------------------------------------------------------

    def stored(self, name: str, shape: Shape) -> dict[str, tuple[np.dtype, Shape]]:
        """What a file holds of a tensor `name` of this shape: name -> dtype, shape. The first is
        the values, then come the other arrays in the order of Matrix."""
        return {name: (self.dtype, shape)}

    def shape(self, stored: Shape) -> Shape:
        """The shape of W, or of a norm, whose values have the shape `stored`."""
        return stored

    def nbytes(self, shape: Shape) -> int:
        """Bytes of a tensor of this shape."""
        stored = self.stored("", shape).values()
        return sum(dtype.itemsize * int(np.prod(s, dtype=np.int64)) for dtype, s in stored)

    # -- from floats and back ------------------------------------------------------------------

    def from_float(self, w: np.ndarray) -> tuple[np.ndarray, ...]:
        """W in any float dtype -> the arrays of a Matrix; what is too large becomes infinite."""
        with np.errstate(over="ignore"):
            return (w.astype(self.dtype, copy=False),)

    def to_float(self, values: np.ndarray) -> np.ndarray:
        """The arrays of a Matrix -> W in a float dtype."""
        return values

    # -- equations, for any xp -----------------------------------------------------------------

    def gather_rows(self, w: "Matrix", index: "Array", dtype: "np.dtype | str") -> "Array":
        """W[index] in `dtype`: (...) integers -> (..., D)."""
        x = w.values[index].astype(dtype)  # (O, D), (...) -> (..., D)
        if w.scale is not None:
            x = x * w.scale[index][..., None].astype(dtype)  # (..., D) * (..., 1)
        return x

    def unscaled(self, w: "Matrix", dtype: np.dtype) -> "Array":
        """W in `dtype`, (O, D), up to the factor a row that `scaled` applies to a product."""
        return w.values.astype(dtype, copy=False)

    def scaled(self, w: "Matrix", y: "Array") -> "Array":
        """y (..., O), a product with `unscaled` W, times the factors of its outputs, in place."""
        if w.scale is not None:
            y *= w.scale
        return y

    # -- tiles, on the CPU ---------------------------------------------------------------------

    def widen(self, w: "Matrix", some: slice, tile: np.ndarray) -> None:
        """Write rows of `unscaled` W to tile (rows, D) float32, as 2^-(x + y) of themselves."""
        np.copyto(tile, w.values[some], casting="unsafe")

    def is_finite(self, values: np.ndarray) -> bool:
        """Whether no number is infinite or NaN."""
        return bool(np.isfinite(values).all())


class Float16(Format):
    """float16, which NumPy converts number by number: tiles are widened by integer operations.

    It has 5 bits of exponent and a bias of 15, float32 8 and 127. With its exponent's bits in
    float32's place, a float16 reads as 2^-112 of itself, subnormal numbers included; the factor is
    made good partly in x and partly in y, so that no product leaves float32's range.
    """

    largest = 65504
    x_exponent, y_exponent = 48, 64
    must_be_finite = True

    _SIGN_EXPONENT_FRACTION = np.uint32(0x8FFFE000)
    # As signed integers the positive infinity and NaNs are the largest numbers; as unsigned ones
    # the negative.
    _INFINITY, _MINUS_INFINITY = 0x7C00, 0xFC00

    def __init__(self) -> None:
        super().__init__("float16")

    def widen(self, w: "Matrix", some: slice, tile: np.ndarray) -> None:
        """Three integer operations over a tile in the cache, which NumPy has vector code for, are
        five times as fast as its conversion (0.4 G numbers a second and core). Infinity and NaN
        would read as 2^16 and above."""
        bits = tile.view("int32")
        np.copyto(bits, w.values[some].view("int16"))  # the sign fills the upper half
        np.left_shift(bits, 13, out=bits)
        bits = tile.view("uint32")
        np.bitwise_and(bits, self._SIGN_EXPONENT_FRACTION, out=bits)

    def is_finite(self, values: np.ndarray) -> bool:
        """Two passes of integers over (rows, D), without a copy."""
        rows = max(1, _CHUNK // max(1, values.shape[1]))
        for begin in range(0, len(values), rows):
            some = values[begin : begin + rows]
            if some.view("int16").max(initial=0) >= self._INFINITY:
                return False
            if some.view("uint16").max(initial=0) >= self._MINUS_INFINITY:
                return False
        return True


class Int8(Format):
    """int8 with a float32 scale a row; see npllama.quantization for the scheme."""

    is_float = False

    def __init__(self) -> None:
        super().__init__("int8")
        self.torch_dtype = "float32"
        # Other programs refuse rather than misread it: transformers only warns of a quant_method
        # that it does not know, and refuses where there is none.
        self.config = {"format": "npllama-int8"}
        self.operand_dtype = self.cache_dtype = np.dtype("float16")  # holds every int8

    def stored(self, name: str, shape: Shape) -> dict[str, tuple[np.dtype, Shape]]:
        """The values, and the scales beside them."""
        return {name: (self.dtype, shape), scale_name(name): (_FLOAT32, shape[:1])}

    def from_float(self, w: np.ndarray) -> tuple[np.ndarray, ...]:
        """Values (O, D) int8, scale (O,) float32."""
        return quantize(w)

    def to_float(self, values: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """W (O, D) float32."""
        return dequantize(values, scale)

    def bound(self, values: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """(O,) numbers that no number of the row exceeds, nor do its products with LARGEST."""
        with np.errstate(over="ignore", invalid="ignore"):
            return scale * np.float32(LARGEST + 1)


def scale_name(name: str) -> str:
    """The tensor beside a matrix `name` that holds its scales."""
    return f"{name}.scale"


_CHOICES = (Format("float32"), Format(ml_dtypes.bfloat16), Float16(), Int8())
FORMATS = {format_.name: format_ for format_ in _CHOICES}
"""What --dtype offers."""
_BY_DTYPE = {format_.dtype: format_ for format_ in (*_CHOICES, Format("float64"))}


def format_of(dtype: "np.dtype | type | str") -> Format:
    """The format whose values have this dtype.

    Raises:
        KeyError: no format has.
    """
    return _BY_DTYPE[np.dtype(dtype)]
