"""A replacement for CuPy that runs on the CPU and refuses what CuPy refuses.

Its arrays cannot be mixed with NumPy arrays or converted to them implicitly, and support only the
methods and keywords of CuPy arrays. Their elements cannot be read as Python numbers: on a GPU, such
a read waits for the device, and during a graph capture it raises an error. A `Device` executes the
operations; strict_cupy.py defines one with streams, graphs and kernels.
"""

import json
import operator
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


_IN_PLACE_METHODS = ("fill", "partition", "put", "sort")
_IN_PLACE_FUNCTIONS = ("copyto", "fill_diagonal", "place", "put", "put_along_axis", "putmask")


class Device:
    """Executes operations on the NumPy arrays inside of strict arrays, without delay."""

    def call(self, name, function, args, kwargs):
        """The result of an operation, which may be a view of an argument."""
        return function(*args, **kwargs)

    def change(self, name, function, target, args, kwargs):
        """Run an operation that writes to its first argument."""
        function(target, *args, **kwargs)

    def wrap(self, array):
        return StrictArray(array, self)


def _unwrap(value):
    if isinstance(value, StrictArray):
        return value.array
    if isinstance(value, np.ndarray):
        raise TypeError("a NumPy array among device arrays: move it with backend.to_device")
    if isinstance(value, tuple | list):
        return type(value)(_unwrap(item) for item in value)
    return value


def _wrap(value, device):
    if isinstance(value, np.ndarray | np.generic):
        return device.wrap(np.asarray(value))
    if isinstance(value, tuple):
        return tuple(_wrap(item, device) for item in value)
    return value


def _call(device, name, function, args, kwargs):
    kwargs = {key: _unwrap(value) for key, value in kwargs.items()}
    return _wrap(device.call(name, function, _unwrap(args), kwargs), device)


def _change(device, name, function, target, args, kwargs):
    kwargs = {key: _unwrap(value) for key, value in kwargs.items()}
    device.change(name, function, _unwrap(target), _unwrap(args), kwargs)


def _check_keywords(name, allowed, kwargs):
    unknown = set(kwargs) - set(allowed)
    if unknown:
        raise TypeError(f"CuPy's {name} has no keyword {', '.join(sorted(unknown))}")


def _item(array, key):
    """array[key]. As in CuPy, the result is a view even if it is a single element."""
    keys = key if isinstance(key, tuple) else (key,)
    if any(isinstance(k, np.ndarray | list) for k in keys) or any(k is Ellipsis for k in keys):
        return array[key]
    return array[(*keys, Ellipsis)]


class StrictArray:
    """A device array."""

    __array_ufunc__ = None  # operators with NumPy arrays then call this class, which refuses them
    __hash__ = None

    def __init__(self, array, device=None):
        self.array = array
        self._on = device or HOST

    def __array__(self, *args, **kwargs):
        raise TypeError("implicit conversion to a NumPy array: use backend.to_host")

    def __getattr__(self, name):
        if name not in API["ndarray"]:
            raise AttributeError(f"CuPy's arrays have no {name}")
        method = getattr(np.ndarray, name)
        if not callable(method):
            return _wrap(getattr(self.array, name), self._on)

        def call(*args, **kwargs):
            _check_keywords(name, API["ndarray"][name], kwargs)
            if name in _IN_PLACE_METHODS:
                return _change(self._on, name, method, self, args, kwargs)
            return _call(self._on, name, method, (self, *args), kwargs)

        return call

    def __len__(self):
        return len(self.array)

    def __getitem__(self, key):
        return _call(self._on, "__getitem__", _item, (self, key), {})

    def __setitem__(self, key, value):
        _change(self._on, "__setitem__", operator.setitem, self, (key, value), {})

    def __repr__(self):
        return f"StrictArray({self.array!r})"

    def _synchronizes(self, *args):
        raise TypeError("reading a device array as a number waits for the device: use to_host")

    __bool__ = __int__ = __float__ = __index__ = _synchronizes


HOST = Device()


def _operator(name):
    def method(self, *others):
        return _call(self._on, name, getattr(np.ndarray, name), (self, *others), {})

    return method


def _in_place(name):
    def method(self, other):
        _change(self._on, name, getattr(np.ndarray, name), self, (other,), {})
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
    """Cumulative sum in the order of a parallel scan on a device: within blocks, and then over
    blocks.

    Because of rounding, the sum may increase even at a token with probability 0.
    """
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
        raise TypeError(f"{type(kth).__name__!r} object is not iterable")  # the message of CuPy
    return np.partition(array, kth, axis=axis)


_OWN = {"cumsum": _cumsum, "partition": _partition}
"""Functions that behave differently in NumPy and CuPy, with CuPy's behaviour."""


class StrictModule:
    """An `xp` module with the functions and keywords of CuPy, and no others."""

    __version__ = API["version"]

    def __init__(self, device=HOST):
        self._on = device

    def __getattr__(self, name):
        if name not in API["functions"]:
            raise AttributeError(f"CuPy has no {name}")
        function = _OWN.get(name) or getattr(np, name)
        if not callable(function) or isinstance(function, type):
            return function

        def call(*args, **kwargs):
            _check_keywords(name, API["functions"][name], kwargs)
            if name in _IN_PLACE_FUNCTIONS:
                return _change(self._on, name, function, args[0], args[1:], kwargs)
            out = kwargs.pop("out", None)
            if out is None:
                return _call(self._on, name, function, args, kwargs)
            into = lambda target, *args, **kwargs: function(*args, out=target, **kwargs)  # noqa: E731
            _change(self._on, name, into, out, args, kwargs)
            return out

        return call


class StrictBackend(Backend):
    """A backend whose arrays are StrictArrays, and whose steps run ahead as on a device."""

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
