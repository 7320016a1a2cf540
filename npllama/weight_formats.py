"""The storage formats of weight matrices, one class per format.

A matrix W (O, D) is stored as `values` in the format's dtype and, for some formats, a `scale` (O,)
with one factor per row. No code outside this module distinguishes formats by dtype. A format of
another kind, for example with one scale per group of elements, is another class with its own
methods.

Measurements: tools/README.md.
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
_CHUNK = 512 * 1024  # elements checked at a time, few enough to stay in the cache


class Format:
    """Elements of one dtype, with a factor per row if the matrix has a scale.

    Attributes:
        name: the name that --dtype accepts.
        dtype: dtype of `values`.
        is_float: whether `values` is W itself. Only such dtypes are allowed for norms and have
            gradients.
        is_wide: whether the CPU multiplies by `values` directly. Other formats are widened to
            float32 tile by tile.
        product_dtype: the dtype in which a GPU multiplies; None for the activations' dtype.
        operand_dtype: the 16-bit dtype in which a GPU's tensor cores multiply by `values`; None if
            they do not multiply by this format.
        cache_dtype: the dtype in which a GPU stores keys and values of a model in this format.
        torch_dtype: the torch_dtype that config.json states, for other programs.
        config: the quantization_config that config.json states, or None.
        largest: the largest finite value of the dtype if it is below float32's, else None.
        tiled: the arrays of a Matrix from which tiles are widened. Worker processes map them.
        x_exponent, y_exponent: `widen` writes tiles multiplied by 2^-(x + y). The other operand is
            multiplied by 2^x and the product by 2^y to compensate.
        must_be_finite: whether `widen` would turn an infinity or a NaN into a finite value.
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
        """The arrays that a file holds for a tensor `name` of this shape: name -> dtype and
        shape. The values come first, then the other arrays in the order of Matrix."""
        return {name: (self.dtype, shape)}

    def shape(self, stored: Shape) -> Shape:
        """The shape of W, or of a norm, whose values are stored with the shape `stored`."""
        return stored

    def nbytes(self, shape: Shape) -> int:
        """Bytes of a tensor of this shape."""
        stored = self.stored("", shape).values()
        return sum(dtype.itemsize * int(np.prod(s, dtype=np.int64)) for dtype, s in stored)

    # -- from floats and back ------------------------------------------------------------------

    def from_float(self, w: np.ndarray) -> tuple[np.ndarray, ...]:
        """W in any float dtype -> the arrays of a Matrix. Values out of range become infinite."""
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
        """W (O, D) in `dtype`, without the factor per row, which `scaled` applies to a product."""
        return w.values.astype(dtype, copy=False)

    def scaled(self, w: "Matrix", y: "Array") -> "Array":
        """Multiply y (..., O), a product with `unscaled` W, by the factor per output, in-place."""
        if w.scale is not None:
            y *= w.scale
        return y

    # -- tiles, on the CPU ---------------------------------------------------------------------

    def widen(self, w: "Matrix", some: slice, tile: np.ndarray) -> None:
        """Write the rows `some` of `unscaled` W, multiplied by 2^-(x + y), to tile (rows, D)
        float32."""
        np.copyto(tile, w.values[some], casting="unsafe")

    def is_finite(self, values: np.ndarray) -> bool:
        """Whether no element is infinite or NaN."""
        return bool(np.isfinite(values).all())


class Float16(Format):
    """float16. Integer operations widen its tiles, because NumPy converts it element by element.

    float16 has 5 exponent bits and a bias of 15; float32 has 8 and 127. A float16 whose bits are
    moved to the positions of a float32 reads as 2^-112 times its value; this holds for subnormal
    values too. One part of the factor 2^112 goes into x and the rest into y, so that no product
    leaves float32's range.
    """

    largest = 65504
    x_exponent, y_exponent = 48, 64
    must_be_finite = True

    _SIGN_EXPONENT_FRACTION = np.uint32(0x8FFFE000)
    # Read as int16, positive infinity and positive NaNs are the largest values. Read as uint16,
    # negative infinity and negative NaNs are.
    _INFINITY, _MINUS_INFINITY = 0x7C00, 0xFC00

    def __init__(self) -> None:
        super().__init__("float16")

    def widen(self, w: "Matrix", some: slice, tile: np.ndarray) -> None:
        """Widen by three integer operations on a tile in the cache. NumPy has vector code for
        these operations, so they are faster than its conversion from float16. They would turn an
        infinity or a NaN into 2^16 or more."""
        bits = tile.view("int32")
        np.copyto(bits, w.values[some].view("int16"))  # sign extension fills the upper half
        np.left_shift(bits, 13, out=bits)
        bits = tile.view("uint32")
        np.bitwise_and(bits, self._SIGN_EXPONENT_FRACTION, out=bits)

    def is_finite(self, values: np.ndarray) -> bool:
        """Two integer passes over (rows, D), without a copy."""
        rows = max(1, _CHUNK // max(1, values.shape[1]))
        for begin in range(0, len(values), rows):
            some = values[begin : begin + rows]
            if some.view("int16").max(initial=0) >= self._INFINITY:
                return False
            if some.view("uint16").max(initial=0) >= self._MINUS_INFINITY:
                return False
        return True


class Int8(Format):
    """int8 with one float32 scale per row; npllama.quantization describes the scheme."""

    is_float = False

    def __init__(self) -> None:
        super().__init__("int8")
        self.torch_dtype = "float32"
        # There is no quant_method on purpose. Without one, transformers refuses the model; with one
        # that it does not know, it only warns, and misreads the weights.
        self.config = {"format": "npllama-int8"}
        self.operand_dtype = self.cache_dtype = np.dtype("float16")  # represents every int8 value

    def stored(self, name: str, shape: Shape) -> dict[str, tuple[np.dtype, Shape]]:
        """The values, followed by the scales."""
        return {name: (self.dtype, shape), scale_name(name): (_FLOAT32, shape[:1])}

    def from_float(self, w: np.ndarray) -> tuple[np.ndarray, ...]:
        """Values (O, D) int8, scale (O,) float32."""
        return quantize(w)

    def to_float(self, values: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """W (O, D) float32."""
        return dequantize(values, scale)

    def bound(self, values: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """An upper bound of |W| for each row, (O,). It is not finite if W or a scale is not."""
        with np.errstate(over="ignore", invalid="ignore"):
            return scale * np.float32(LARGEST + 1)


def scale_name(name: str) -> str:
    """The name of the tensor that holds the scales of the matrix `name`."""
    return f"{name}.scale"


_CHOICES = (Format("float32"), Format(ml_dtypes.bfloat16), Float16(), Int8())
FORMATS = {format_.name: format_ for format_ in _CHOICES}
"""The formats that --dtype offers, by name."""
_BY_DTYPE = {format_.dtype: format_ for format_ in (*_CHOICES, Format("float64"))}


def format_of(dtype: "np.dtype | type | str") -> Format:
    """The format whose values have this dtype.

    Raises:
        KeyError: no format has this dtype.
    """
    return _BY_DTYPE[np.dtype(dtype)]
