"""Attention of one new token in each row: RoPE, the write to the cache, softmax(q K^T) V."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from npllama.backend import Array
from npllama.ops.cuda.kernels import Kernels, instance

if TYPE_CHECKING:
    from npllama.kv_cache import LayerCache, Positions

CACHE_DTYPES = ("float16", "bfloat16", "float32")
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Division:
    """How the attention is divided.

    Attributes:
        heads: GB, query heads of a key-value head that a block computes with.
        keys: keys whose loads a thread has in flight.
        groups: of lanes in a block; each computes with a key at a time.
        splits: parts of a row's keys, each computed by a block of its own.
    """

    heads: int
    keys: int
    groups: int
    splits: int


def divide(
    n_rows: int,
    n_kv_heads: int,
    n_groups: int,
    head_dim: int,
    itemsize: int,
    bucket: int,
    n_sms: int,
) -> Division:
    """The division that was measured best, as a rule (tools/README.md).

    Reading keys and values takes the time. Splits are as many as fill the SMs once, each of which
    has registers for 512 threads. A split has at least two steps, since each has a beginning and
    an end, and there are at most 16, since one block combines them. Two query heads a block read
    the keys half as often; four leave too few blocks where the context is short.

    Args:
        n_groups: G, query heads of a key-value head.
        itemsize: bytes of a number in the cache.
        bucket: keys of the longest row, at most.
    """
    heads, groups = 2 if n_groups % 2 == 0 else 1, 16
    keys = 4 // heads
    if itemsize == 4:  # as many bytes, and as many registers
        keys //= 2
    n_blocks = n_rows * n_kv_heads * n_groups // heads  # of one split each
    at_once = n_sms * (512 // (groups * lanes(head_dim)))
    steps = -(-bucket // (groups * keys))
    splits = max(1, min(at_once // n_blocks, steps // 2, 16))
    return Division(heads, keys, groups, splits)


def fits(cache: "LayerCache") -> bool:
    """Whether `attend` takes a cache of this head width and dtype: float16, bfloat16 or float32,
    C a multiple of 16 up to 256."""
    head_dim = cache.k.shape[-1]
    return cache.k.dtype.name in CACHE_DTYPES and head_dim % 16 == 0 and head_dim <= MAX_HEAD_DIM


def attend(
    kernels: Kernels,
    qkv: Array,
    cache: "LayerCache",
    positions: "Positions",
    division: Division | None = None,
) -> Array:
    """Rotates q and k, writes k and v to the cache, and attends to each row's keys 0 .. S.

    The kernel reads positions from the device alone; `positions.bucket` bounds them. It reads of
    the cache what is live, and writes position S of each row alone.

    Args:
        qkv: (B, 1, (H + 2K) C) float32, not rotated.
        division: by default `divide`'s.

    Returns:
        o, (B, 1, H*C) float32.
    """
    n_rows, _, width = qkv.shape
    _, n_kv_heads, context, head_dim = cache.k.shape
    n_heads = width // head_dim - 2 * n_kv_heads
    d = division or divide(
        n_rows,
        n_kv_heads,
        n_heads // n_kv_heads,
        head_dim,
        cache.k.dtype.itemsize,
        positions.bucket,
        kernels.n_sms,
    )
    xp = kernels.xp
    n_blocks = n_heads // d.heads  # of a row and a split
    threads = d.groups * lanes(head_dim)
    o = xp.empty((n_rows, 1, n_heads * head_dim), dtype="float32")
    partials = xp.empty((n_rows, n_heads, d.splits, head_dim + 2), dtype="float32")
    kernels.launch(
        "decode_attention",
        instance("attend", cache.k.dtype, head_dim, d.heads, d.keys, threads),
        (d.splits, n_blocks, n_rows),
        (threads,),
        (
            qkv,
            positions.cos,
            positions.sin,
            cache.k,
            cache.v,
            positions.device_rows,
            positions.device_starts,
            partials,
            kernels.counters(n_rows * n_blocks),
            o,
            n_kv_heads,
            n_blocks // n_kv_heads,
            context,
            1 / math.sqrt(head_dim),
        ),
    )
    return o


def lanes(head_dim: int) -> int:
    """Threads that share a key: 8 columns each, and a power of two."""
    return 1 << (head_dim // 8 - 1).bit_length()
