"""Mistakes in gemv.cu. Two launches detect most of them, and a third one detects the rest."""

import numpy as np

MISTAKES = [
    (
        "no barrier before the sums are read",
        "  __syncthreads();\n  write_outputs",
        "  write_outputs",
    ),
    ("a batch is read before it is there", "wait_prior(STAGES - 1);", "wait_prior(STAGES);"),
    ("the last copies are not waited for", "  __pipeline_wait_prior(0);\n", ""),
    ("x is read before the kernel before ends", "  if (tile == 0) wait_for_previous_kernel();", ""),
    (
        "a batch is overwritten before it is read",
        "      typename X::Sums",
        "      weights.copy_next(stage);\n      typename X::Sums",
    ),
    ("a chunk beyond the row", "THREADS < n_chunks;", "THREADS <= n_chunks;"),
    ("a row beyond the block's", "r < rows_left", "r <= rows_left"),
    ("a tile begins a batch late", "if (rows_left <= 0)", "if (rows_left < 0)"),
    ("the second tile is the first again", "      next += TILE * 16;\n", ""),
    ("a row of x that is not there", "if (m < n_tokens && d < width)", "if (d < width)"),
    ("squares of the last tile alone", "tile == 0 ? sum : squares[m] + sum", "sum"),
    ("sums of the last tile alone", "tile == 0 ? sum : my_sums[row] + sum", "sum"),
    ("shares are not rounded up", "(rest > 0 ? 1 : 0)", "0"),
    ("the scales of gate for up", "(i % UNIT) * n_all_units", "(i % UNIT)"),
    (
        "a warp's sums in the other order",
        "keeps_upper ? upper : lower",
        "keeps_upper ? lower : upper",
    ),
    ("digits that reach 128", "LARGEST = 127 * 65536", "LARGEST = 128 * 65536"),
    ("bytes without their sign", " ^ 0x8080;", ";"),
    (
        "outputs beyond the threads are left out",
        "unit += THREADS) {\n      float outputs",
        "unit += share.n_units) {\n      float outputs",
    ),
    ("a residual of another row", "residuals[m * pitch + unit];", "residuals[unit];"),
]


def run(launcher):
    # 3 of at most 4 rows of x; two tiles, the second of them partial; and 3 blocks with 6, 5 and 5
    # units in batches of 2, so that full and partial batches occur. The second launch does the same
    # with integer products.
    check(launcher, "signed char, 4, 32, 1, 4, 2, true, true", 3, 32, 800, 3, True, True)
    check(launcher, "signed char, 2, 32, 1, 4, 2, true, true", 2, 32, 800, 3, True, True)
    # 41 outputs per block: more than the threads, and one more than full batches contain
    check(launcher, "__half, 2, 32, 2, 2, 3, false, false", 2, 82, 512, 2, False, False)


def check(launcher, arguments, n_rows, n_out, width, grid, has_norm, swiglu):
    rng = np.random.default_rng(0)
    _, m, threads, chunks, rows, stages, *_ = arguments.split(", ")
    m, threads, chunks, rows, stages = map(int, (m, threads, chunks, rows, stages))
    w = rng.integers(-127, 128, (n_out, width)).astype("int8" if swiglu else "float16")
    scale = rng.random(n_out, dtype="float32") / 127
    x = rng.standard_normal((n_rows, width), dtype="float32")
    norm = rng.random(width, dtype="float32") + 0.5
    of_unit = 2 if swiglu else 1
    n_units = n_out // of_unit
    residual = rng.standard_normal((n_rows, n_units), dtype="float32")
    pitch = -(-n_units // grid) * of_unit
    shared = stages * rows * chunks * threads * 16
    shared += threads // 32 * m * 4 * (pitch + 1) + 4 * pitch * (m + 1)
    w, scale, x, norm, residual = map(launcher.to_device, (w, scale, x, norm, residual))
    y = launcher.xp.empty((n_rows, n_units), "float32")
    args = (w, scale, x, norm if has_norm else None, residual, y, n_out, width, n_rows, 1e-3)
    launcher.launch("gemv", f"gemv<{arguments}>", (grid,), (threads,), args, shared)
    w, scale, x, norm, residual, y = map(launcher.to_host, (w, scale, x, norm, residual, y))
    h = x.astype("float64")
    if has_norm:
        h = h / np.sqrt((h * h).mean(axis=-1, keepdims=True) + 1e-3) * norm
    truth = h @ w.astype("float64").T * scale
    if swiglu:
        gate, up = np.split(truth, 2, axis=-1)
        truth = gate / (1 + np.exp(-gate)) * up
    truth += residual
    assert np.abs(y - truth).max() <= 1e-6 * np.abs(truth).max()
