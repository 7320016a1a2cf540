"""Short texts that identify what keys and values depend on besides the token ids.

A prompt cache stores these texts, and is valid for a model with the same texts. Sampling, seed,
threads, tokenizer and the size of the context have no influence on keys and values. The head has
none either, because it comes after the last layer.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from npllama.backend import Array, Backend
from npllama.model import Transformer

_ROWS = 16
"""The least number of rows that are read from each matrix."""

SHAPE = "shape"
DIGESTS = ("RoPE frequencies", "weights", "embedding rows")
"""The names of digests, which messages do not show."""


def shape_of(model: Transformer) -> str:
    """The sizes that keys and values depend on. They determine the shape of each tensor."""
    c = model.sizes
    return (
        f"L {c.n_layers}, D {c.dim}, H {c.n_heads}, K {c.n_kv_heads}, C {c.head_dim}, "
        f"F {c.ffn_dim}, epsilon {c.norm_eps:g}"
    )


def fingerprint(model: Transformer, ids: Sequence[int]) -> dict[str, str]:
    """The texts for the keys and values of `ids`, by their names in messages.

    The digest of the weights covers every norm, every scale of int8, and at least 16 evenly spaced
    rows of each matrix of the layers. It does not cover all weights, because reading all weights of
    a large model takes seconds. Training and a merged LoRA adapter change all rows of a matrix, and
    therefore the digest. A manual change of only a few rows may not change it.

    The digest of the embedding covers the rows of `ids`. The keys and values depend on no other
    rows.
    """
    backend, parameters, embedding = model.backend, model.parameters, model.parameters.embedding
    frequencies, scaling = model.rotation
    # float32, because versions of NumPy may differ in the last bit of float64
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
