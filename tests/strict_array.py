"""A stand-in for CuPy that runs on the CPU and refuses what CuPy refuses.

Its arrays do not mix with NumPy's, are not converted to them silently, have only the methods
and keywords of CuPy's, and cannot be read as Python numbers: on a GPU that waits for the
device, and while a graph is captured it raises.
"""

import json
from pathlib import Path

import numpy as np

from npllama.backend import Backend

_ARITHMETIC = (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
)
_UNARY_AND_COMPARING = ("neg", "pos", "abs", "invert", "lt", "le", "gt", "ge", "eq", "ne")
API = json.loads((Path(__file__).parent / "cupy_api.json").read_text())


def _unwrap(value):
    if isinstance(value, StrictArray):
        return value.array
    if isinstance(value, np.ndarray):
        raise TypeError("a NumPy array among device arrays: move it with backend.to_device")
    if isinstance(value, tuple | list):
        return type(value)(_unwrap(item) for item in value)
    return value


def _wrap(value):
    if isinstance(value, np.ndarray | np.generic):
        return StrictArray(np.asarray(value))
    if isinstance(value, tuple):
        return tuple(_wrap(item) for item in value)
    return value


def _checked_call(name, function, allowed, args, kwargs):
    unknown = set(kwargs) - set(allowed)
    if unknown:
        raise TypeError(f"CuPy's {name} has no keyword {', '.join(sorted(unknown))}")
    result = function(*_unwrap(args), **{key: _unwrap(value) for key, value in kwargs.items()})
    return _wrap(result)


class StrictArray:
    """A device array."""

    __array_ufunc__ = None  # NumPy arrays then leave operators to this class, which refuses
    __hash__ = None

    def __init__(self, array):
        self.array = array

    def __array__(self, *args, **kwargs):
        raise TypeError("implicit conversion to a NumPy array: use backend.to_host")

    def __getattr__(self, name):
        if name not in API["ndarray"]:
            raise AttributeError(f"CuPy's arrays have no {name}")
        value = getattr(self.array, name)
        if not callable(value):
            return _wrap(value)
        allowed = API["ndarray"][name]
        return lambda *args, **kwargs: _checked_call(name, value, allowed, args, kwargs)

    def __len__(self):
        return len(self.array)

    def __getitem__(self, key):
        return _wrap(self.array[_unwrap(key)])

    def __setitem__(self, key, value):
        self.array[_unwrap(key)] = _unwrap(value)

    def __repr__(self):
        return f"StrictArray({self.array!r})"

    def _synchronizes(self, *args):
        raise TypeError("reading a device array as a number waits for the device: use to_host")

    __bool__ = __int__ = __float__ = __index__ = _synchronizes


def _operator(name):
    def method(self, *others):
        return _wrap(getattr(np.ndarray, name)(self.array, *(_unwrap(other) for other in others)))

    return method


def _in_place(name):
    def method(self, other):
        getattr(np.ndarray, name)(self.array, _unwrap(other))
        return self

    return method


for _name in _ARITHMETIC:
    for _prefix in ("", "r"):
        setattr(StrictArray, f"__{_prefix}{_name}__", _operator(f"__{_prefix}{_name}__"))
    if _name != "matmul":
        setattr(StrictArray, f"__i{_name}__", _in_place(f"__i{_name}__"))
for _name in _UNARY_AND_COMPARING:
    setattr(StrictArray, f"__{_name}__", _operator(f"__{_name}__"))


def _cumsum(array, axis=None, dtype=None):
    """A sum in another order, as a device's parallel scan: blocks, and then the sums of the blocks
    before each. Where a token of probability 0 follows, the sum may still grow by a rounding."""
    x = np.asarray(array, dtype=dtype)
    if axis is None:
        x, axis = x.reshape(-1), -1
    x = np.moveaxis(x, axis, -1)
    begins = range(0, x.shape[-1], 64)
    blocks = [x[..., begin : begin + 64] for begin in begins]
    sums = [block.sum(axis=-1, keepdims=True) for block in blocks]
    before = [sum(reversed(sums[:i]), 0 * block[..., :1]) for i, block in enumerate(blocks)]
    parts = [start + block.cumsum(axis=-1) for start, block in zip(before, blocks, strict=True)]
    return np.moveaxis(np.concatenate(parts, axis=-1), -1, axis)


def _partition(array, kth, axis=-1):
    if isinstance(kth, np.generic):
        raise TypeError(f"{type(kth).__name__!r} object is not iterable")  # in CuPy's words
    return np.partition(array, kth, axis=axis)


_OWN = {"cumsum": _cumsum, "partition": _partition}
"""Functions of NumPy that do what CuPy's do not."""


class StrictModule:
    """An `xp` with CuPy's functions and keywords, and no others."""

    __version__ = API["version"]

    def __getattr__(self, name):
        if name not in API["functions"]:
            raise AttributeError(f"CuPy has no {name}")
        function = _OWN.get(name) or getattr(np, name)
        if not callable(function) or isinstance(function, type):
            return function
        allowed = API["functions"][name]
        return lambda *args, **kwargs: _checked_call(name, function, allowed, args, kwargs)


class StrictBackend(Backend):
    """A device that is none: its arrays are StrictArrays, and its steps run ahead."""

    name = "strict"
    steps_ahead = 1

    def __init__(self):
        super().__init__(StrictModule())

    def to_device(self, array):
        return array if isinstance(array, StrictArray) else StrictArray(np.array(array))

    def to_host(self, array):
        if not isinstance(array, StrictArray):
            raise TypeError(f"to_host was given a {type(array).__name__}: expected a device array")
        return array.array.copy()

    def to_host_later(self, *arrays):
        copies = tuple(map(self.to_host, arrays))  # now: the next step may overwrite the arrays
        return lambda: copies
