"""Mistakes in prompt.cu. Each run launches only the kernels that a mistake can affect."""

import numpy as np

from npllama.backend import Backend
from npllama.ops import Ops
from npllama.ops.cuda.kernels import SOURCES

MISTAKES = [
    # functions that several kernels use
    ("store4: a number twice", "u.numbers[3] = narrow<T>(v.w);", "u.numbers[3] = narrow<T>(v.z);"),
    ("sum: no barrier before it is read", "/ 32] = v;\n  __syncthreads();\n  float sum", "/ 32] = v;\n  float sum"),  # noqa: E501
    ("sum: a warp is left out", "for (int w = 0; w < WARPS; w++) sum", "for (int w = 1; w < WARPS; w++) sum"),  # noqa: E501
    ("sum: by every lane", "v = warp_sum(v);\n  __syncthreads();\n  if (threadIdx.x % 32 == 0) of", "v = warp_sum(v);\n  __syncthreads();\n  of"),  # noqa: E501
    ("sum: the maxima are still read", "v = warp_sum(v);\n  __syncthreads();\n", "v = warp_sum(v);\n"),  # noqa: E501
    ("maximum: a lane's alone", "mask > 0; mask >>= 1) v = fmaxf", "mask > 1; mask >>= 1) v = fmaxf"),  # noqa: E501
    ("maximum: a warp's alone", "largest = fmaxf(largest, of_warps[w]);", "largest = of_warps[w];"),
    # rms_norm_rows
    ("norm: the sum, not the mean", "block_sum(sum, of_warps) / width + eps", "block_sum(sum, of_warps) + eps"),  # noqa: E501
    ("norm: no eps", "/ width + eps", "/ width"),
    ("norm: a number is not squared", "v.z * v.z + v.w * v.w", "v.z * v.z + v.w"),
    ("norm: the sums lie in the row", "(float*)(row + width / 4)", "(float*)(row + width / 4 - 1)"),
    ("norm: the weight of another column", "load4(weight + 4 * i)", "load4(weight + i)"),
    ("norm: some columns are left out", "i < width / 4; i += THREADS)\n    store4", "i < width / 8; i += THREADS)\n    store4"),  # noqa: E501
    # rotate_and_cache
    ("rotate: pairs of neighbours", "second = load4(from + half);", "second = load4(from + 4);"),
    ("rotate: the other way", "a.x * c.x - z.x * s.x", "a.x * c.x + z.x * s.x"),
    ("rotate: a component of another pair", "z.w * c.w + a.w * s.w", "z.w * c.w + a.z * s.w"),
    ("rotate: values as well", "if (!is_value) {", "if (true) {"),
    ("rotate: one scale for both halves", "load4(scale + column + half)", "load4(scale + column)"),
    ("rotate: the angle of the row's first token", "load4(cos + (size_t)token * half", "load4(cos + (size_t)b * half"),  # noqa: E501
    ("cache: all rows at the first row's position", "starts[b] + t;", "starts[0] + t;"),
    ("cache: by the row of the batch", "(size_t)rows[b] * n_kv_heads", "(size_t)b * n_kv_heads"),
    ("cache: one position late", "position = starts[b] + t;", "position = starts[b] + t + 1;"),
    ("cache: values among the keys", "(is_value ? v_cache : k_cache)", "(is_value ? k_cache : v_cache)"),  # noqa: E501
    ("query: of those that are not asked for", "if (is_query && query < 0) continue;", ""),
    ("query: the first tokens', not the last", "t - (n_new - n_last);", "t;"),
    ("query: each tile as if it was full", "min(tile, n_last - tile_begin)", "tile"),
    ("query: heads of another tile", "(tile_row + head * tile_size", "(tile_row + head * n_last"),
    # softmax_rows
    ("softmax: a key too many", "n_seen = first + blockIdx.x % n_queries", "n_seen = first + 1 + blockIdx.x % n_queries"),  # noqa: E501
    ("softmax: the head, not the query", "blockIdx.x % n_queries", "blockIdx.x / n_queries"),
    ("softmax: a hidden key in a vector", "if (4 * i + 3 >= n_seen) v.w", "if (4 * i + 3 > n_seen) v.w"),  # noqa: E501
    ("softmax: a key's maximum is left out", "fmaxf(v.z, v.w)));", "v.z));"),
    ("softmax: no maximum", "__expf(v.y - largest)", "__expf(v.y)"),
    ("softmax: the sum without a key", "sum += v.x + v.y + v.z + v.w;", "sum += v.x + v.y + v.z;"),
    ("softmax: no zeros behind the keys", "i < stride / 4; i += THREADS)", "i < n_fours; i += THREADS)"),  # noqa: E501
    ("softmax: not divided by the sum", "times(row[i], factors) :", "row[i] :"),
    # swiglu_rows, add_scaled_rows, widen_int8
    ("swiglu: the gate as it is", "silu(gate.w));", "gate.w);"),
    ("swiglu: up beside gate", "up = load4(from + width);", "up = load4(from + 4);"),
    ("swiglu: the scale of the gate for up", "load4(scale + width + column)", "load4(scale + column)"),  # noqa: E501
    ("swiglu: rows of gate alone", "(size_t)blockIdx.x * 2 * width + column;", "(size_t)blockIdx.x * width + column;"),  # noqa: E501
    ("add: what was there is lost", "make_float4(old.x + product.x,", "make_float4(product.x,"),
    ("add: the scale of another column", "load4(y + at), load4(scale + column)", "load4(y + at), load4(scale + column / 2 / 4 * 4)"),  # noqa: E501
    ("add: before the kernel before has ended", "float* x, int width) {\n  wait_for_previous_kernel();", "float* x, int width) {"),  # noqa: E501
    ("widen: half of a vector", "*(uint4*)(to + at + 8) = u.bits[1];", ""),
    ("widen: the halves exchanged", "*(uint4*)(to + at) = u.bits[0];", "*(uint4*)(to + at) = u.bits[1];"),  # noqa: E501
    ("widen: past the end", "if (at >= n) return;", "if (at > n) return;"),
]  # fmt: skip

THREADS = (256,)


def run(launcher):
    for name in concerned(getattr(launcher, "_before", "")):
        globals()[name](launcher)


def concerned(text):
    """The kernels whose source contains a text; all kernels if the shared source contains it."""
    shared, *kernels = (SOURCES / "prompt.cu").read_text().split("__global__ void")
    names = [name for name in KERNELS if text and text in text_of(name, kernels)]
    return names if text and text not in shared else KERNELS


def text_of(name, kernels):
    return next(kernel for kernel in kernels if f"{name}(" in kernel.partition("{")[0])


def close(launcher, got, truth, bound=6e-4):
    got = launcher.to_host(got).astype("float64")
    assert np.abs(got - truth).max() <= bound * np.abs(truth).max()


def numbers(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype("float32")


def rms_norm_rows(launcher):
    x, weight = numbers(2, 1040), numbers(1040) + 3
    x[1] *= 1e-3
    h = launcher.xp.empty((2, 1040), "float16")
    args = (launcher.to_device(x), launcher.to_device(weight), h, 1040, 1e-5)
    launcher.launch("prompt", "rms_norm_rows<__half>", (2,), THREADS, args, 4 * 1040 + 32)
    wide = x.astype("float64")
    truth = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    for row in range(2):
        close(launcher, h[row], truth[row])


def rotate_and_cache(launcher):
    """Rows 2 and 0 of a cache with 3 rows, and the last 3 of 4 tokens in tiles of 2; H 2, K 1, C
    16."""
    move, reference = launcher.to_device, Ops(Backend())
    qkv, scale, (cos, sin) = numbers(2, 4, 4, 16), numbers(4, 16), numbers(2, 2, 4, 8)
    rows, starts = np.array([2, 0], "int32"), np.array([1, 3], "int32")
    q = launcher.xp.empty((2, 3, 32), "float16")
    k, v = (move(np.full((3, 1, 7, 16), 7, "float16")) for _ in range(2))
    args = (move(qkv), move(scale), move(cos), move(sin), move(rows), move(starts), q, k, v)
    sizes = (2, 1, 16, 7, 4, 3, 2)
    launcher.launch("prompt", "rotate_and_cache<__half>", (8,), THREADS, (*args, *sizes))
    wide = qkv.astype("float64") * scale
    turned = reference.rope(wide[:, :, :3], cos.astype("float64"), sin.astype("float64"))
    tiles = [turned[:, 1:3, :2], turned[:, 3:, :2]]  # (B, t, H, C)
    truth = [tile.swapaxes(1, 2).reshape(2, -1, 32) for tile in tiles]
    close(launcher, q, np.concatenate(truth, axis=1))
    for got, new in ((k, turned[:, :, 2]), (v, wide[:, :, 3])):
        truth = np.full((3, 1, 7, 16), 7.0)
        truth[2, 0, 1:5], truth[0, 0, 3:7] = new
        close(launcher, got, truth)


def softmax_rows(launcher):
    """Two heads with three queries, the first of which sees 1,027 keys.

    In the first head, the first hidden key has a large score, so reading it changes the result. In
    the second head, each query has one score whose exp is infinite.
    """
    scores = numbers(6, 1032)
    scores[[0, 1, 2], [1027, 1028, 1029]] = 9
    scores[[3, 4, 5], [7, 500, 1026]] = 200
    p = launcher.xp.empty((6, 1032), "float16")
    args = (launcher.to_device(scores), p, 3, 1032, 1027)
    launcher.launch("prompt", "softmax_rows<__half>", (6,), THREADS, args, 4 * 1032 + 32)
    truth = scores.astype("float64")
    for row in range(6):
        truth[row, 1027 + row % 3 :] = -np.inf
    truth = np.exp(truth - truth.max(axis=1, keepdims=True))
    truth /= truth.sum(axis=1, keepdims=True)
    for row in range(6):
        close(launcher, p[row], truth[row])


def swiglu_rows(launcher):
    gate_up, scale = numbers(2, 32), numbers(32) + 3
    y = launcher.xp.empty((2, 16), "float16")
    args = (launcher.to_device(gate_up), launcher.to_device(scale), y, 16)
    launcher.launch("prompt", "swiglu_rows<__half>", (2, 1), THREADS, args)
    wide = gate_up.astype("float64") * scale
    close(launcher, y, Ops(Backend()).swiglu(wide[:, :16], wide[:, 16:]))


def add_scaled_rows(launcher):
    """Run after a kernel that writes y."""
    x, scale = numbers(2, 16), numbers(16) + 3
    y, moved = launcher.xp.empty((2, 16), "float32"), launcher.to_device(x)
    zeros, ones = np.zeros((2, 16), "float32"), np.ones(16, "float32")
    y[...] = launcher.to_device(zeros)
    for args in (
        (moved, launcher.to_device(ones), y, 16),  # y = x
        (y, launcher.to_device(scale), moved, 16),  # x += y scale
    ):
        launcher.launch("prompt", "add_scaled_rows", (2, 1), THREADS, args)
    close(launcher, moved, x * (1.0 + scale.astype("float64")), 1e-6)


def widen_int8(launcher):
    w = np.random.default_rng(0).integers(-128, 128, (3, 16)).astype("int8")
    wide = launcher.xp.empty((3, 16), "float16")
    args = (launcher.to_device(w), wide, w.size)
    launcher.launch("prompt", "widen_int8<__half>", (1,), THREADS, args)
    assert np.array_equal(launcher.to_host(wide), w)


KERNELS = (
    "add_scaled_rows",
    "widen_int8",
    "swiglu_rows",
    "rms_norm_rows",
    "rotate_and_cache",
    "softmax_rows",
)
