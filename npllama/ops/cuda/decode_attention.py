"""Attention of one new token in each row: RoPE, the write to the cache, softmax(q K^T) V."""

from typing import TYPE_CHECKING

from npllama.backend import Array
from npllama.ops.cuda.kernels import Kernels

if TYPE_CHECKING:
    from npllama.kv_cache import LayerCache, Positions


def fits(cache: "LayerCache") -> bool:
    """Whether `attend` takes a cache of this head width and dtype."""
    return False


def attend(kernels: Kernels, qkv: Array, cache: "LayerCache", positions: "Positions") -> Array:
    """Rotates q and k, writes k and v to the cache, and attends to each row's keys 0 .. S.

    Args:
        qkv: (B, 1, (H + 2K) C) float32, not rotated.

    Returns:
        o, (B, 1, H*C) float32.
    """
    raise NotImplementedError
