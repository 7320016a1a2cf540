"""The logit lens: the model's head applied to the residual stream after each layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from npllama.backend import Array
from npllama.ops import Ops
from npllama.parameters import Head


@dataclass(frozen=True)
class Lens:
    """The predictions of the head from the stream after the embedding and after each layer.

    Attributes:
        ids, probability: (L+1, T, n), the n likeliest tokens in order of decreasing probability.
        entropy: (L+1, T), the entropy of each distribution in bits.

    Source: nostalgebraist 2020 (interpreting GPT: the logit lens).
    """

    ids: np.ndarray
    probability: np.ndarray
    entropy: np.ndarray


def entropy(ops: Ops, logits: Array) -> Array:
    """The entropy of softmax(logits) over the last axis, in bits: (..., V) -> (...).

    Source: Shannon 1948, section 6.
    """
    return -(ops.softmax(logits) * ops.log_softmax(logits)).sum(axis=-1) / math.log(2)


def look_through(ops: Ops, hidden: Sequence[np.ndarray], head: Head, n: int) -> Lens:
    """Apply the head to the L+1 streams `hidden`, (T, D) each, and keep the n likeliest tokens."""
    xp, to_host = ops.backend.xp, ops.backend.to_host
    looks = []
    for x in hidden:
        logits = ops.head(ops.backend.to_device(x)[None], head)[0]  # (1, T, D) -> (T, V)
        ids, log_p = ops.likeliest(logits, min(n, logits.shape[-1]))  # (T, n)
        looks.append(tuple(map(to_host, (ids, xp.exp(log_p), entropy(ops, logits)))))
    return Lens(*(np.stack(part) for part in zip(*looks, strict=True)))
