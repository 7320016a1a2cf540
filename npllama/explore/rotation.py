"""RoPE of this model: its frequencies, and one query and one key rotated to many positions."""

from dataclasses import dataclass, replace

import numpy as np

from npllama.config import LlamaConfig
from npllama.explore.layers import LayerRecord
from npllama.ops import Ops
from npllama.ops.rope_frequencies import Rotation
from npllama.parameters import Matrix


@dataclass(frozen=True)
class Rotations:
    """How RoPE rotates the pairs of a head.

    Attributes:
        frequencies: (C/2,), radians per position.
        plain: (C/2,), the frequencies without scaling; None if the model has no scaling.
        attention_scaling: the factor of the cosines and sines; 1 except for yarn.
        q, k: (n, C), the query and the key of the window's last token in the first head of the
            first layer, rotated to the positions 0 to n - 1. Position 0 leaves them unchanged.
        scores: (n, n), the dot product of this query at position i and this key at position j. It
            depends only on i - j.
        spread: the largest difference between scores with the same i - j.
    """

    frequencies: np.ndarray
    plain: np.ndarray | None
    attention_scaling: float
    q: np.ndarray
    k: np.ndarray
    scores: np.ndarray
    spread: float


def rotate(
    ops: Ops, config: LlamaConfig, rotation: Rotation, layer: LayerRecord, n: int
) -> Rotations:
    """Rotate the query and the key of the window's last token to n positions."""
    to_device, to_host = ops.backend.to_device, ops.backend.to_host
    q, k = layer.q_plain[0, -1], layer.k_plain[0, -1]  # (C,)
    cos, sin = (table[None] for table in ops.rope_table(n, rotation))  # (1, n, C/2)
    everywhere = [to_device(np.tile(x, (1, n, 1, 1))) for x in (q, k)]  # (1, n, 1, C)
    turned_q, turned_k = (ops.rope(x, cos, sin)[0, :, 0] for x in everywhere)  # (n, C)
    scores = to_host(ops.linear(turned_q, Matrix(turned_k)))  # (n, C), (n, C) -> (n, n)
    plain = None
    if config.rope_scaling is not None:
        plain = to_host(ops.rope_frequencies(replace(config, rope_scaling=None)).frequencies)
    return Rotations(
        frequencies=to_host(rotation.frequencies),
        plain=plain,
        attention_scaling=float(rotation.attention_scaling),
        q=to_host(turned_q),
        k=to_host(turned_k),
        scores=scores,
        spread=max(float(np.ptp(scores.diagonal(-d))) for d in range(1 - n, n)),
    )
