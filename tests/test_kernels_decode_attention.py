"""The kernel of decode attention, executed on the CPU, against float64."""

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

from cuda_simulator import ORDERS, compiler
from npllama.kv_cache import LayerCache, Positions
from npllama.ops.cuda import decode_attention
from npllama.ops.cuda.decode_attention import Division, attend, divide
from npllama.ops.cuda.kernels import Kernels
from strict_cupy import DEVICE, StrictCupyBackend

pytestmark = pytest.mark.skipif(compiler() is None, reason="no g++ 12 on this machine")

BACKEND = StrictCupyBackend()
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ARGUMENTS = (
    "qkv", "cos", "sin", "k_cache", "v_cache", "rows", "starts", "partials", "counters", "o",
)  # fmt: skip
SPACING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-23}
"""The largest relative error of rounding to the dtype. For float32, it includes the rounding errors
of the rotation, which computes two products and their sum."""
PRODUCER = """
extern "C" __global__ void produce(const float* from, float* to, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) to[i] = from[i];
}
"""


def make_kernels(n_sms=12):
    kernels = Kernels(BACKEND)
    kernels.n_sms = n_sms
    return kernels


def replayed(kernels, qkv, cache, positions, division):
    """`attend` in a graph, after a kernel that writes qkv and may still be running."""
    cuda = BACKEND.xp.cuda
    attend(kernels, qkv, LayerCache(cache.k.copy(), cache.v.copy()), positions, division)
    produce = BACKEND.xp.RawModule(code=PRODUCER).get_function("produce")
    stream, pool = cuda.Stream(non_blocking=True), cuda.MemoryPool()
    cuda.Device().synchronize()
    with stream, cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        produced = BACKEND.xp.empty(qkv.shape, dtype="float32")
        grid = (-(-qkv.size // 256),)
        produce(grid, (256,), (qkv, produced, np.int32(qkv.size)))
        o = attend(kernels, produced, cache, positions, division)
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
    return o


@dataclass
class Case:
    """Random inputs of attention. Keys and values from position S on are NaN.

    Attributes:
        starts: S of each row.
        rows: the row of the cache for each row; the cache has `n_cache_rows`.
    """

    dtype: str
    head_dim: int
    n_kv_heads: int
    n_groups: int  # G
    starts: tuple[int, ...]
    rows: tuple[int, ...] | None = None
    n_cache_rows: int | None = None
    context: int = 320

    def __post_init__(self):
        rng = np.random.default_rng(0)
        self.rows = self.rows or tuple(range(len(self.starts)))
        self.n_cache_rows = self.n_cache_rows or len(self.starts)
        self.n_heads = self.n_kv_heads * self.n_groups
        b, c = len(self.starts), self.head_dim
        shape = (self.n_cache_rows, self.n_kv_heads, self.context, c)
        dtype = BFLOAT16 if self.dtype == "bfloat16" else self.dtype
        k, v = rng.standard_normal((2, *shape), dtype="float32").astype(dtype)
        for row in range(self.n_cache_rows):
            live = dict(zip(self.rows, self.starts, strict=True)).get(row, 0)
            k[row, :, live:] = v[row, :, live:] = np.nan
        self.k, self.v = k, v
        width = (self.n_heads + 2 * self.n_kv_heads) * c
        self.qkv = rng.standard_normal((b, 1, width), dtype="float32")
        angle = rng.random((b, 1, c // 2)) * 6
        self.cos, self.sin = np.cos(angle).astype("float32"), np.sin(angle).astype("float32")

    def positions(self):
        bucket = min(-(-(max(self.starts) + 1) // 64) * 64, self.context)
        arrays = (np.array(self.rows, "int32"), np.array(self.starts, "int32"), self.cos, self.sin)
        rows, *others = map(BACKEND.to_device, arrays)
        return Positions(self.rows, self.starts, 1, bucket, rows, *others)

    def check(self, kernels, division=None, function=attend):
        """Run attention, and compare o and the cache with float64."""
        k, v = self.k, self.v
        cache = LayerCache(BACKEND.to_device(k), BACKEND.to_device(v))
        qkv = BACKEND.to_device(self.qkv)
        o = BACKEND.to_host(function(kernels, qkv, cache, self.positions(), division))
        assert o.shape == (len(self.starts), 1, self.n_heads * self.head_dim)
        assert o.dtype == "float32"
        written_k, written_v = BACKEND.to_host(cache.k), BACKEND.to_host(cache.v)
        q_new, k_new, v_new = self.rotated()
        for b, (row, s) in enumerate(zip(self.rows, self.starts, strict=True)):
            for cache, written, new in ((k, written_k, k_new), (v, written_v, v_new)):
                difference = np.abs(written[row, :, s].astype("float64") - new[b])
                assert (difference <= SPACING[self.dtype] * np.abs(new).max()).all()
                cache[row, :, s] = written[row, :, s]  # the float64 result uses the rounded value
            truth = self.attention(q_new[b], k[row, :, : s + 1], v[row, :, : s + 1])
            difference = np.abs(o[b].reshape(truth.shape) - truth).max()
            assert difference <= 1e-6 * np.abs(truth).max(), (b, difference)
        assert written_k.tobytes() == k.tobytes()  # nothing else was written; compares NaN too
        assert written_v.tobytes() == v.tobytes()

    def rotated(self):
        """q (B, H, C), k and v (B, K, C) of the new tokens in float64."""
        heads = self.qkv.reshape(len(self.starts), -1, self.head_dim).astype("float64")
        turning = heads[:, : self.n_heads + self.n_kv_heads]
        first, second = np.split(turning, 2, axis=-1)
        cos, sin = self.cos, self.sin  # (B, 1, C/2)
        turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return turned[:, : self.n_heads], turned[:, self.n_heads :], heads[:, -self.n_kv_heads :]

    def attention(self, q, k, v):
        """softmax(q k^T / sqrt(C)) v in float64: q (H, C), k and v (K, N, C) -> (K, G, C)."""
        grouped = q.reshape(self.n_kv_heads, self.n_groups, self.head_dim)
        scores = grouped @ k.astype("float64").swapaxes(1, 2) / math.sqrt(self.head_dim)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        return p / p.sum(-1, keepdims=True) @ v.astype("float64")


RAGGED = {
    "S 0": {"starts": (0,)},
    "S 1": {"starts": (1,)},
    "past every split": {"starts": (319,)},
    "ragged, other rows": {"starts": (37, 0, 200), "rows": (2, 0, 3), "n_cache_rows": 5},
    "eight rows": {"starts": (64, 1, 63, 0, 65, 128, 5, 127), "rows": (7, 3, 1, 0, 2, 6, 4, 5)},
}
WIDTHS = [  # dtype, C, K, G
    ("float16", 16, 2, 1),
    ("float32", 16, 1, 8),
    ("bfloat16", 32, 2, 2),
    ("float32", 48, 1, 7),
    ("float16", 48, 2, 1),
    ("float16", 64, 2, 4),
    ("bfloat16", 64, 1, 7),
    ("float16", 80, 1, 2),
    ("bfloat16", 96, 1, 1),
    ("float16", 128, 2, 1),
    ("bfloat16", 128, 1, 8),
    ("float32", 128, 1, 1),
    ("float16", 256, 1, 2),
]


def in_orders(check):
    """Run check() with each thread order, and return the launches."""
    with DEVICE.recording() as launches:
        for order in ORDERS:
            with DEVICE.thread_order(order):
                check()
    return launches


@pytest.mark.parametrize("ragged", RAGGED)
@pytest.mark.parametrize("width", WIDTHS, ids=lambda w: "{}-C{}-K{}-G{}".format(*w))
def test_attention_equals_float64_in_three_orders_of_the_threads(width, ragged):
    kernels = make_kernels()
    launches = in_orders(lambda: Case(*width, **RAGGED[ragged]).check(kernels))
    assert len({launch.name for launch in launches}) == 1
    assert len(launches) == len(ORDERS)


DIVISIONS = [
    Division(1, 1, 8, 5),
    Division(2, 2, 16, 3),
    Division(4, 1, 32, 2),
    Division(4, 2, 4, 7),
]


@pytest.mark.parametrize("division", DIVISIONS, ids=str)
def test_any_division_computes_the_same(division):
    case = ("float16", 64, 2, 4, (0, 133, 16), (1, 2, 0), 3)
    in_orders(lambda: Case(*case).check(make_kernels(), division))


def test_a_row_whose_keys_end_where_a_split_does():
    """16 groups with 2 keys each process 32 keys per step. Splits end with one key, or between
    two."""
    for start in (31, 32, 63, 64, 95, 96, 97, 127, 128, 143, 144, 191):
        Case("float16", 64, 1, 2, (start,)).check(make_kernels(), Division(2, 2, 16, 3))


def test_far_apart_scores_neither_overflow_nor_vanish():
    case = Case("float32", 32, 1, 2, (150, 40))
    case.qkv *= 60
    case.check(make_kernels())


def test_a_second_step_attends_to_the_first():
    """The first step leaves the counters and the cache in the state that the next step needs."""
    kernels = make_kernels()
    case = Case("bfloat16", 64, 2, 2, (126, 7))
    for step in range(3):
        case.check(kernels)
        case.starts = tuple(start + 1 for start in case.starts)
        case.qkv = case.qkv[:, :, ::-1].copy() * np.float32(1 + step)


def test_in_a_graph_behind_a_kernel_that_may_still_run():
    """The kernel reads nothing that the previous kernel writes before that kernel ends; see
    common.cu."""
    case = ("float16", 64, 2, 4, (37, 0, 200), (2, 0, 3), 5)
    in_orders(lambda: Case(*case).check(make_kernels(), function=replayed))


def test_more_than_two_to_the_31_numbers():
    check_many_numbers(make_kernels())


def check_many_numbers(kernels):
    """Offsets into the cache need 64 bits. The zeros use physical memory only where accessed."""
    head_dim, start, xp = 48, 3, BACKEND.xp
    shape = (3, 10, 1_600_000, head_dim)
    assert math.prod(shape) > 2**31
    cache = LayerCache(xp.zeros(shape, dtype="float16"), xp.zeros(shape, dtype="float16"))
    case = Case("float16", head_dim, 10, 2, (start,), context=start + 1)
    case.rows = (2,)
    for part, values in ((cache.k, case.k), (cache.v, case.v)):
        part[2, :, :start] = BACKEND.to_device(values[0, :, :start])
    qkv = BACKEND.to_device(case.qkv)
    o = BACKEND.to_host(attend(kernels, qkv, cache, case.positions()))
    k, v = (BACKEND.to_host(part[2, :, : start + 1]) for part in (cache.k, cache.v))
    q_new, k_new, v_new = case.rotated()
    assert np.abs(k[:, start] - k_new[0]).max() < 4e-3
    assert np.abs(v[:, start] - v_new[0]).max() < 4e-3
    truth = case.attention(q_new[0], k, v)
    assert np.abs(o.reshape(truth.shape) - truth).max() < 1e-6 * np.abs(truth).max()


def moved(launch):
    """Bytes read and written per array, summed over all threads."""
    pairs = zip(launch.read, launch.written, strict=True)
    return dict(zip(ARGUMENTS, pairs, strict=False))


def test_the_live_part_of_the_cache_is_read_once_and_one_position_written():
    for width in WIDTHS:
        for ragged in RAGGED.values():
            case = Case(*width, **ragged)
            with DEVICE.recording() as launches:
                case.check(make_kernels())
            (launch,) = launches
            c, n_rows, g = case.head_dim, len(case.starts), case.n_groups
            slices = g if g % 2 else g // 2  # each reads the keys of its head
            position = case.n_kv_heads * c * case.k.itemsize
            bytes_ = (slices * sum(case.starts) * position, n_rows * position)
            assert moved(launch)["k_cache"] == moved(launch)["v_cache"] == bytes_
            assert moved(launch)["o"] == (0, n_rows * case.n_heads * c * 4)


def test_what_is_read_beside_the_cache_is_bounded():
    """Limits the reads of other arrays than the cache.

    A group of lanes reads its query heads and the new key and value. Empty splits do not read the
    token. The result of a split is written once, and its maximum and sum are read once per column.
    """
    case = Case("float16", 64, 2, 4, (37, 0, 200))
    division = Division(heads=2, keys=2, groups=16, splits=7)
    with DEVICE.recording() as launches:
        case.check(make_kernels(), division)
    found = moved(launches[0])
    used = [2, 1, 7]  # splits with keys: 38, 1 and 201 keys, 32 per split
    parts = case.n_heads // division.heads
    # all blocks read both halves of each pair of q, and the last split of a row also k and v
    heads = 2 * division.heads * sum(used) * parts + 3 * len(used) * parts
    assert found["qkv"] == (division.groups * heads * case.head_dim * 4, 0)
    combined = sum(n for n in used if n > 1) * case.n_heads
    bytes_ = (combined * 3 * case.head_dim * 4, combined * (case.head_dim + 2) * 4)
    assert found["partials"] == bytes_
    blocks = math.prod(launches[0].grid) * launches[0].block[0]
    assert found["rows"] == found["starts"] == (4 * blocks, 0)


def test_the_division_that_was_measured_best():
    """An H100 and an H200 have 132 SMs."""
    assert divide(1, 32, 1, 128, 2, 512, 132) == Division(1, 4, 16, splits=4)  # 7B
    assert divide(1, 32, 1, 128, 2, 3584, 132) == Division(1, 4, 16, splits=8)
    assert divide(1, 4, 8, 64, 2, 512, 132) == Division(2, 2, 16, splits=8)  # 1.1B
    assert divide(8, 4, 8, 64, 2, 2048, 132) == Division(2, 2, 16, splits=4)


def test_no_division_has_more_splits_than_steps_or_more_blocks_than_a_wave():
    for n_rows, n_kv_heads, n_groups, itemsize, bucket in (
        (1, 1, 1, 2, 1), (8, 32, 1, 2, 512), (8, 4, 8, 2, 4096),
        (1, 2, 7, 4, 256), (3, 6, 1, 4, 32),
    ):  # fmt: skip
        d = divide(n_rows, n_kv_heads, n_groups, 128, itemsize, bucket, 132)
        assert n_groups % d.heads == 0
        assert 1 <= d.splits <= -(-bucket // (d.groups * d.keys))
        blocks = n_rows * n_kv_heads * n_groups // d.heads * d.splits
        assert d.splits == 1 or blocks <= 132 * 2  # of 256 threads


def test_what_fits():
    def cache(head_dim, dtype):
        k = np.zeros((1, 1, 1, head_dim), dtype)
        return LayerCache(k, k)

    for dtype in ("float16", BFLOAT16, "float32"):
        for head_dim in (16, 48, 64, 80, 96, 128, 256):
            assert decode_attention.fits(cache(head_dim, dtype))
        for head_dim in (6, 8, 20, 72, 272):
            assert not decode_attention.fits(cache(head_dim, dtype))
    for dtype in ("float64", "int8"):
        assert not decode_attention.fits(cache(64, dtype))
