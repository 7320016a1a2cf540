"""Attention for one new token per row, in one kernel: RoPE, the cache update, softmax(q K^T) V."""

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
    """How the attention is divided among thread blocks and threads.

    The threads of a thread block form thread groups, and the threads of a group share each key (see
    `lanes`). These groups are not the G query heads of a key-value head.

    Attributes:
        heads: the number of query heads of one key-value head that a thread block computes (GB in
            decode_attention.cu).
        keys: the number of keys that a thread group loads at a time. It computes them one after
            another.
        groups: the number of thread groups in a thread block.
        splits: the number of parts into which a row's keys are split. A separate thread block
            computes each part.
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
    """Choose the division for a launch.

    Most of the time goes into reading keys and values, so all multiprocessors (SMs) should read.

    - splits: as many as all SMs can compute at the same time. An SM has registers for 512 threads
      of this kernel. If a row of `bucket` keys is split, each thread group of a split loads keys at
      least twice, because starting and ending a split takes time. There are at most 16 splits per
      row, because one thread block combines their results.
    - heads: two query heads per thread block halve the number of times that keys are read. Four
      would leave too few thread blocks for short contexts.

    Args:
        n_groups: G, the query heads of a key-value head.
        itemsize: bytes per element of the cache.
        bucket: an upper bound of the number of keys in the longest row.
    """
    heads, groups = 2 if n_groups % 2 == 0 else 1, 16
    keys = 4 // heads
    if itemsize == 4:  # keeps the number of bytes and registers the same as for 16 bits
        keys //= 2
    n_blocks = n_rows * n_kv_heads * n_groups // heads  # with one split per row
    at_once = n_sms * (512 // (groups * lanes(head_dim)))
    steps = -(-bucket // (groups * keys))
    splits = max(1, min(at_once // n_blocks, steps // 2, 16))
    return Division(heads, keys, groups, splits)


def fits(cache: "LayerCache") -> bool:
    """Whether `attend` supports the cache: float16, bfloat16 or float32, and a head width C that
    is a multiple of 16 and at most 256."""
    head_dim = cache.k.shape[-1]
    return cache.k.dtype.name in CACHE_DTYPES and head_dim % 16 == 0 and head_dim <= MAX_HEAD_DIM


def attend(
    kernels: Kernels,
    qkv: Array,
    cache: "LayerCache",
    positions: "Positions",
    division: Division | None = None,
) -> Array:
    """Rotate q and k, write k and v to the cache, and attend to the keys 0 .. S of each row.

    The kernel reads S only from the device, and positions.bucket is an upper bound of S + 1. In
    each row of the cache it reads only the keys and values 0 .. S - 1, and writes only those at S.

    Args:
        qkv: (B, 1, (H + 2K) C) float32, not rotated.
        division: by default the result of `divide`.

    Returns:
        o (B, 1, H*C) float32.
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
    n_blocks = n_heads // d.heads  # per row and split
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
    """The number of threads in a thread group, which share each key: a power of two, with at most 8
    columns of the key per thread."""
    return 1 << (head_dim // 8 - 1).bit_length()
