"""What the keys and values of a cache depend on besides the token ids, as short texts.

A prompt cache stores these texts. Its contents are valid for a model that has the same ones.
Sampling, seed, threads, the tokenizer and the size of the context are not among them, nor is the
head, which keys and values do not pass through.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from npllama.backend import Array, Backend
from npllama.model import Transformer

_ROWS = 16
"""Rows of each matrix that are read, at least."""

SHAPE = "shape"
DIGESTS = ("RoPE frequencies", "weights", "embedding rows")
"""Names whose values say nothing to a reader."""


def shape_of(model: Transformer) -> str:
    """The sizes that keys and values depend on, as the shape of each tensor follows from them."""
    c = model.sizes
    return (
        f"L {c.n_layers}, D {c.dim}, H {c.n_heads}, K {c.n_kv_heads}, C {c.head_dim}, "
        f"F {c.ffn_dim}, epsilon {c.norm_eps:g}"
    )


def fingerprint(model: Transformer, ids: Sequence[int]) -> dict[str, str]:
    """Each thing that the keys and values of `ids` depend on: its name in a message -> its value.

    The weights are represented by a digest of a part of them, since reading all of a large model
    takes seconds. The part has every norm, every scale of int8, and at least 16 evenly spaced rows
    of each matrix of the layers. Training changes all rows of a matrix, and so does a merged LoRA
    adapter. A change by hand to a few rows of one matrix may go unnoticed. Of the embedding, the
    rows of `ids` are read; no other row counts.
    """
    backend, parameters, embedding = model.backend, model.parameters, model.parameters.embedding
    frequencies, scaling = model.rotation
    # float32, since another NumPy may compute a last bit of float64 otherwise
    rotation = [backend.to_host(frequencies).astype("float32"), np.float32([scaling])]
    rows = backend.to_device(np.unique(np.asarray(ids, dtype="int64")))
    rope, weights, of_ids = DIGESTS
    return {
        SHAPE: shape_of(model),
        "storage dtype": parameters.layers[0].wq.format.name,
        rope: _digest(rotation),
        weights: _digest(
            _part(array, backend) for layer in parameters.layers for array in layer.arrays()
        ),
        of_ids: _digest(backend.to_host(array[rows]) for array in embedding.arrays()),
    }


def _part(array: Array, backend: Backend) -> np.ndarray:
    """A vector, or at least _ROWS rows of a matrix (all of them if it has fewer)."""
    if array.ndim == 1:
        return backend.to_host(array)
    return backend.to_host(array[:: max(1, len(array) // _ROWS)])


def _digest(arrays: Iterable[np.ndarray]) -> str:
    """A digest of dtypes, shapes and elements."""
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(f"{array.dtype.name}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view("uint8"))
    return digest.hexdigest()
