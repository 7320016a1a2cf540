"""Upload a layer to the device, and join the matrices that have the same input."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from npllama.backend import Array, Backend
from npllama.parameters import Layer, Matrix
from npllama.shared_arrays import neighbours
from npllama.weight_table import PRODUCTS


def upload(backend: Backend, layer: Layer) -> Layer:
    """The layer on the device, in which wq, wk and wv are views of `qkv`, and w_gate and w_up are
    views of `gate_up`.

    Tensors that are neighbours in the host's memory are uploaded together. Others are uploaded one
    by one, and each is copied into its rows of the joined matrix. The device therefore never holds
    more than one tensor twice. Matrices of different formats are not joined.
    """
    wholes: dict[str, Matrix] = {}
    parts: dict[str, Matrix] = {}
    for name, weights in PRODUCTS.items():
        group = [getattr(layer, weight.field) for weight in weights]
        if len(group) == 1 or len({(w.format, w.shape[1], w.scale is None) for w in group}) > 1:
            continue
        whole = wholes[name] = _joined(backend, group)
        rows = whole.split(w.shape[0] for w in group)
        parts |= {weight.field: w for weight, w in zip(weights, rows, strict=True)}
    return replace(layer, **parts).map(backend.to_device).with_derived(**wholes)


def _joined(backend: Backend, group: Sequence[Matrix]) -> Matrix:
    """Join matrices (O_i, D) to one on the device, (sum O_i, D)."""
    values = _joined_arrays(backend, [w.values for w in group])
    scale = group[0].scale
    return Matrix(
        values, None if scale is None else _joined_arrays(backend, [w.scale for w in group])
    )


def _joined_arrays(backend: Backend, arrays: Sequence[Array]) -> Array:
    if all(isinstance(array, np.ndarray) for array in arrays):
        whole = neighbours(arrays)
        if whole is not None:
            return backend.to_device(whole)
    n_rows = sum(len(array) for array in arrays)
    whole = backend.xp.empty((n_rows, *arrays[0].shape[1:]), dtype=arrays[0].dtype)
    begin = 0
    for array in arrays:
        whole[begin : begin + len(array)] = backend.to_device(array)
        begin += len(array)
    return whole
