"""The decode attention's kernel, executed on the CPU, against float64."""

import functools
import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

from cuda_simulator import ORDERS, Module, compiler
from npllama.kv_cache import LayerCache, Positions
from npllama.ops.cuda import decode_attention
from npllama.ops.cuda.decode_attention import Division, attend, divide
from npllama.ops.cuda.kernels import SOURCES, _as_c

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++ 12 or later")

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ARGUMENTS = (
    "qkv", "cos", "sin", "k_cache", "v_cache", "rows", "starts", "partials", "counters", "o",
)  # fmt: skip
SPACING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-23}
"""The largest error of a number's rounding to the dtype, as a fraction of it; for float32 that of
the rotation's two products and their sum as well."""


PRODUCER = """
extern "C" __global__ void produce(const float* from, float* to, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) to[i] = from[i];
}
"""


def source() -> str:
    return "".join((SOURCES / f"{part}.cu").read_text() for part in ("common", "decode_attention"))


@functools.cache
def module(code: str, *names: str) -> Module:
    return Module(code, names, "decode_attention.cu")


class SimulatedKernels:
    """`Kernels` on NumPy arrays; launches are executed at once.

    The kernel before the attention is one that writes qkv, and may still run.

    Attributes:
        launched: the names of the kernels.
        read, written: bytes of each argument in the last launch, by all threads.
    """

    xp = np

    def __init__(self, order: str = "forward", n_sms: int = 12, code: str | None = None) -> None:
        self.n_sms = n_sms
        self.launched: list[str] = []
        self._order = order
        self._code = code or source()
        self._counters: dict[int, np.ndarray] = {}

    def counters(self, n: int) -> np.ndarray:
        return self._counters.setdefault(n, np.zeros(n, "uint32"))

    def launch(self, file, name, grid, block, args, shared=0):
        assert file == "decode_attention"
        self.launched.append(name)
        qkv, size = args[0], np.int32(args[0].size)
        produce = module(PRODUCER)
        produced = produce.launch("produce", (-(-size // 256),), (256,), (qkv.copy(), qkv, size))
        launch = module(self._code, name).launch(
            name,
            grid,
            block,
            tuple(_as_c(value) for value in args),
            shared,
            order=self._order,
            previous=produced.number,
        )
        self.read = dict(zip(ARGUMENTS, launch.read, strict=False))
        self.written = dict(zip(ARGUMENTS, launch.written, strict=False))

    def check_counters(self):
        assert not any(counter.any() for counter in self._counters.values())


@dataclass
class Case:
    """Inputs of the attention, drawn at random; keys and values from S on are NaN.

    Attributes:
        starts: S of each row; rows: its row of the cache, which has `n_cache_rows`.
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
        self.cache = LayerCache(k, v)
        width = (self.n_heads + 2 * self.n_kv_heads) * c
        self.qkv = rng.standard_normal((b, 1, width), dtype="float32")
        angle = rng.random((b, 1, c // 2)) * 6
        self.positions = Positions(
            self.rows,
            self.starts,
            1,
            min(-(-(max(self.starts) + 1) // 64) * 64, self.context),
            np.array(self.rows, "int32"),
            np.array(self.starts, "int32"),
            np.cos(angle).astype("float32"),
            np.sin(angle).astype("float32"),
        )

    def check(self, kernels, division=None):
        """Attend, and compare o and the cache with float64."""
        k, v = self.cache.k.copy(), self.cache.v.copy()
        o = attend(kernels, self.qkv, self.cache, self.positions, division)
        assert o.shape == (len(self.starts), 1, self.n_heads * self.head_dim)
        assert o.dtype == "float32"
        q_new, k_new, v_new = self.rotated()
        for b, (row, s) in enumerate(zip(self.rows, self.starts, strict=True)):
            for cache, new in ((self.cache.k, k_new), (self.cache.v, v_new)):
                written = cache[row, :, s].astype("float64")
                difference = np.abs(written - new[b])
                assert (difference <= SPACING[self.dtype] * np.abs(new).max()).all()
            # the truth's new key and value are those of the cache, as rounded
            k[row, :, s], v[row, :, s] = self.cache.k[row, :, s], self.cache.v[row, :, s]
            truth = self.attention(q_new[b], k[row, :, : s + 1], v[row, :, : s + 1])
            difference = np.abs(o[b].reshape(truth.shape) - truth).max()
            assert difference <= 1e-6 * np.abs(truth).max(), (b, difference)
        for cache, expected in ((self.cache.k, k), (self.cache.v, v)):  # NaN included
            assert cache.tobytes() == expected.tobytes()
        kernels.check_counters()

    def rotated(self):
        """q (B, H, C), k and v (B, K, C) of the tokens in float64."""
        heads = self.qkv.reshape(len(self.starts), -1, self.head_dim).astype("float64")
        turning = heads[:, : self.n_heads + self.n_kv_heads]
        first, second = np.split(turning, 2, axis=-1)
        cos, sin = self.positions.cos, self.positions.sin  # (B, 1, C/2)
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


@pytest.mark.parametrize("ragged", RAGGED)
@pytest.mark.parametrize("width", WIDTHS, ids=lambda w: "{}-C{}-K{}-G{}".format(*w))
def test_attention_equals_float64_in_three_orders_of_the_threads(width, ragged):
    for order in ORDERS:
        kernels = SimulatedKernels(order)
        Case(*width, **RAGGED[ragged]).check(kernels)
        assert len(kernels.launched) == 1


DIVISIONS = [
    Division(1, 1, 8, 5),
    Division(2, 2, 16, 3),
    Division(4, 1, 32, 2),
    Division(4, 2, 4, 7),
]


@pytest.mark.parametrize("division", DIVISIONS, ids=str)
def test_any_division_computes_the_same(division):
    for order in ORDERS:
        kernels = SimulatedKernels(order)
        Case("float16", 64, 2, 4, (0, 133, 16), (1, 2, 0), 3).check(kernels, division)


def test_a_row_whose_keys_end_where_a_split_does():
    """16 groups with 2 keys each: 32 keys a step, 64 a split."""
    for start in (31, 32, 63, 64, 127, 128, 191):
        Case("float16", 64, 1, 2, (start,)).check(SimulatedKernels(), Division(2, 2, 16, 3))


def test_far_apart_scores_neither_overflow_nor_vanish():
    case = Case("float32", 32, 1, 2, (150, 40))
    case.qkv *= 60
    case.check(SimulatedKernels())


def test_a_second_step_attends_to_the_first():
    """The counters and the cache are as the next launch needs them."""
    kernels = SimulatedKernels()
    case = Case("bfloat16", 64, 2, 2, (126, 7))
    for step in range(3):
        case.check(kernels)
        case.starts = tuple(start + 1 for start in case.starts)
        case.positions.device_starts[:] = case.starts
        case.qkv = case.qkv[:, :, ::-1].copy() * np.float32(1 + step)
    assert len(set(kernels.launched)) == 1


def test_more_than_two_to_the_31_numbers():
    check_many_numbers(SimulatedKernels())


def check_many_numbers(kernels):
    """Offsets into the cache are 64 bits wide. The zeros are in memory only where touched."""
    head_dim, start = 48, 3
    shape = (3, 10, 1_600_000, head_dim)
    k, v = np.zeros(shape, "float16"), np.zeros(shape, "float16")
    assert k.size > 2**31
    rng = np.random.default_rng(0)
    k[2, 9, :start], v[2, 9, :start] = rng.standard_normal((2, start, head_dim))
    case = Case("float16", head_dim, 10, 2, (start,), context=8)
    case.cache = LayerCache(k, v)
    case.positions.device_rows[:] = 2
    o = attend(kernels, case.qkv, case.cache, case.positions)
    q_new, k_new, v_new = case.rotated()
    assert np.abs(k[2, :, start] - k_new[0]).max() < 4e-3
    assert np.abs(v[2, :, start] - v_new[0]).max() < 4e-3
    truth = case.attention(q_new[0], k[2, :, : start + 1], v[2, :, : start + 1])
    assert np.abs(o.reshape(truth.shape) - truth).max() < 1e-6 * np.abs(truth).max()


def test_the_live_part_of_the_cache_is_read_once_and_one_position_written():
    for width in WIDTHS:
        for ragged in RAGGED.values():
            case, kernels = Case(*width, **ragged), SimulatedKernels()
            case.check(kernels)
            c, itemsize, n_rows = case.head_dim, case.cache.k.itemsize, len(case.starts)
            slices = -(-case.n_groups // 2) if case.n_groups % 2 == 0 else case.n_groups
            position = case.n_kv_heads * c * itemsize
            for name in ("k_cache", "v_cache"):
                assert kernels.read[name] == slices * sum(case.starts) * position
                assert kernels.written[name] == n_rows * position
            assert kernels.written["o"] == n_rows * case.n_heads * c * 4
            assert kernels.read["o"] == 0


def test_what_a_block_reads_beside_the_cache_is_bounded():
    """A group of lanes reads its query heads, the new key and value, and the angles; empty splits
    read no token. A split's result is written once, and read once a column by the last block."""
    case, kernels = Case("float16", 64, 2, 4, (37, 0, 200)), SimulatedKernels()
    division = Division(2, 2, 16, 7)
    case.check(kernels, division)
    steps = [-(-(start + 1) // 32) for start in case.starts]
    used = [-(-n // -(-n // division.splits)) for n in steps]
    blocks, groups = sum(used) * case.n_heads // division.heads, division.groups
    assert used == [2, 1, 7]
    # q twice (each column and its partner) in every block, k twice and v in the last of a row
    head, last = 64 * 4, len(case.starts) * case.n_heads // division.heads
    assert kernels.read["qkv"] == groups * head * (2 * division.heads * blocks + 3 * last)
    splits = sum(n for n in used if n > 1) * case.n_heads
    assert kernels.written["partials"] == splits * (64 + 2) * 4
    assert kernels.read["partials"] == splits * 3 * 64 * 4
    assert kernels.written["counters"] <= 4 * 2 * blocks


def test_the_division_that_was_measured_best():
    """An H200 has 132 SMs."""
    assert divide(1, 32, 1, 2, 512, 132) == Division(heads=1, keys=4, groups=16, splits=4)  # 7B
    assert divide(1, 32, 1, 2, 3584, 132) == Division(heads=1, keys=4, groups=16, splits=4)
    assert divide(1, 4, 8, 2, 512, 132) == Division(heads=2, keys=2, groups=16, splits=16)  # 1.1B


def test_no_division_has_more_splits_than_steps_or_more_blocks_than_a_wave():
    for n_rows, n_kv_heads, n_groups, itemsize, bucket in (
        (1, 1, 1, 2, 1), (8, 32, 1, 2, 512), (8, 4, 8, 2, 4096),
        (1, 2, 7, 4, 256), (3, 6, 1, 4, 32),
    ):  # fmt: skip
        d = divide(n_rows, n_kv_heads, n_groups, itemsize, bucket, 132)
        assert n_groups % d.heads == 0
        assert 1 <= d.splits <= -(-bucket // (d.groups * d.keys))
        blocks = n_rows * n_kv_heads * n_groups // d.heads * d.splits
        assert d.splits == 1 or blocks <= 132 * 4 // (d.keys * itemsize // 2)


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


def find_mistakes(code: str) -> None:
    """The launches that must fail when `code` has a mistake."""
    for order in ORDERS:
        kernels = SimulatedKernels(order, code=code)
        Case("float16", 48, 2, 4, (37, 0, 200), (2, 0, 3), 5).check(kernels)
        Case("float16", 48, 2, 4, (70,)).check(kernels, Division(2, 2, 16, 4))
        if order == "forward":
            check_many_numbers(kernels)
