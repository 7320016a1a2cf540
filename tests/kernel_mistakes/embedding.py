"""Mistakes in embedding.cu."""

import numpy as np

MISTAKES = [
    ("a place too many", "i < begins[blockIdx.x + 1]", "i <= begins[blockIdx.x + 1]"),
    ("the first place is left out", "i = begins[blockIdx.x];", "i = begins[blockIdx.x] + 1;"),
    ("the places of the next token", "i = begins[blockIdx.x];", "i = begins[blockIdx.x + 1];"),
    ("to the end of the next token", "begins[blockIdx.x + 1]; i++", "begins[blockIdx.x + 2]; i++"),
    ("places as they come", "dx[order[i] * width", "dx[i * width"),
    ("the last place alone", "sum += dx", "sum = dx"),
    ("one column", "* width + column];", "* width + blockIdx.y];"),
    ("rows one beside another", "dx[order[i] * width + column]", "dx[order[i] + column * 20]"),
    ("the first columns twice", "blockIdx.y * THREADS + threadIdx.x", "threadIdx.x"),
    ("past the last column", "if (column >= width) return;", ""),
    ("every second place", "begins[blockIdx.x + 1]; i++", "begins[blockIdx.x + 1]; i += 2"),
    ("a sum that begins with 1", "F sum = 0;", "F sum = 1;"),
    ("rows of dW as many as columns", "(size_t)blockIdx.x * width + column] = sum", "(size_t)column * width + blockIdx.x] = sum"),  # noqa: E501
]  # fmt: skip


def run(launcher):
    """20 positions, 4 tokens, one of which does not occur, and more columns than threads."""
    rng = np.random.default_rng(0)
    dx = rng.standard_normal((20, 300), dtype="float32")
    tokens = rng.integers(0, 3, 20)
    order = np.argsort(tokens, kind="stable")
    begins = np.searchsorted(tokens[order], np.arange(5))
    dw = launcher.xp.empty((4, 300), "float32")
    args = (*(launcher.to_device(a) for a in (dx, order, begins)), dw, 300)
    launcher.launch("embedding", "embedding_backward<float>", (4, 2), (256,), args)
    truth = np.zeros((4, 300))
    np.add.at(truth, tokens, dx)
    assert np.abs(launcher.to_host(dw) - truth).max() < 1e-5
