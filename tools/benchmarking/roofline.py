"""The speed that float32 BLAS allows: one pass over all matrices of a forward pass."""

import time

import numpy as np

from npllama.backend import Array, Backend
from npllama.config import LlamaConfig
from npllama.costs import forward_matrices
from npllama.kv_cache import KVCache
from npllama.llama import Llama
from npllama.memory import mapped_nbytes, workspace_nbytes
from npllama.weights import named_arrays

_MARGIN = 0.05
"""Fraction of the free memory that is left unused."""

_FEW_ROWS = 16


class Roofline:
    """Times y = x W^T over the matrices of a forward pass: each once, in order, unfused, float32.

    No matrix is used twice in a pass, so the processor's cache helps no more than it helps the
    model. Inputs and outputs are allocated before timing. For few rows the product is W x^T, the
    order in which OpenBLAS is faster (see npllama/ops/tiles.py), because a roofline should be as
    fast as BLAS can be.

    Args:
        backend: backend whose array module multiplies.
        layers: matrices (O, D) of the layers that are held in memory, in order.
        head: (V, D).
        scale: layers of the model divided by layers held; scales the time of the layers.
    """

    def __init__(
        self, backend: Backend, layers: list[Array], head: Array, scale: float = 1.0
    ) -> None:
        self.backend = backend
        self.layers = layers
        self.head = head
        self.scale = scale
        self._operands: dict[int, tuple[dict[int, Array], dict[int, Array]]] = {}

    def seconds(self, n_tokens: int, n_logits: int) -> float:
        """Seconds of one pass of `n_tokens` rows through the layers and `n_logits` rows through
        the head.

        If only some layers are held: (seconds of these layers) * scale + (seconds of the head).
        """
        dot = self.backend.xp.dot
        layers = [self._product(w, n_tokens) for w in self.layers]
        head = self._product(self.head, n_logits)
        threads = self.backend.threads
        with threads.blas(threads.count):  # as many threads as npllama would use now
            self._wait()
            begin = time.perf_counter()
            for a, b, out in layers:
                dot(a, b, out=out)
            self._wait()
            middle = time.perf_counter()
            dot(*head[:2], out=head[2])
            self._wait()
            return (middle - begin) * self.scale + time.perf_counter() - middle

    def _product(self, w: Array, n_rows: int) -> tuple[Array, Array, Array]:
        """(a, b, out) for a @ b: W x for one row, W x^T for a few rows, x W^T for more."""
        n_out, width = w.shape
        xp = self.backend.xp
        inputs, outputs = self._operands.setdefault(n_rows, ({}, {}))
        if width not in inputs:
            x = np.random.default_rng(width).standard_normal((n_rows, width), dtype="float32")
            inputs[width] = self.backend.to_device(x)
        if n_out not in outputs:
            is_few = n_rows <= _FEW_ROWS
            outputs[n_out] = xp.zeros((n_out, n_rows) if is_few else (n_rows, n_out), "float32")
        x, out = inputs[width], outputs[n_out]
        if n_rows == 1:
            return w, x[0], out[:, 0]
        return (w, x.T, out) if n_rows <= _FEW_ROWS else (x, w.T, out)

    def _wait(self) -> None:
        """Wait until the work queued on a device is done. On the CPU there is none."""
        self.backend.to_host(self.head[:1, :1])


def roofline_of(llama: Llama, batch: int, length: int) -> tuple[Roofline | None, str | None]:
    """The roofline of a model, and a remark if it does not cover all layers.

    A float32 model's own matrices are used. For narrower dtypes, float32 matrices of the same
    shapes are made for as many layers as fit into memory together with the model and a cache of
    `batch` rows with `length` positions. If not even one layer fits, there is no roofline.
    """
    config, backend = llama.config, llama.backend
    arrays = named_arrays(llama.parameters, config)
    *layers, head = [arrays[name] for name in forward_matrices(config)]
    if all(w.dtype == np.float32 for w in (*layers, head)):
        return Roofline(backend, layers, head), None
    *shapes, head_shape = forward_matrices(config).values()
    a_layer = len(shapes) // config.n_layers
    layer_nbytes = 4 * sum(n * d for n, d in shapes[:a_layer])
    head_nbytes = 4 * head_shape[0] * head_shape[1]
    room = _room(llama, batch, length)
    held = config.n_layers
    if room is not None:
        held = min(held, (room - head_nbytes) // layer_nbytes)
    needed = (config.n_layers * layer_nbytes + head_nbytes) / 1e9
    if held < 1:
        return None, (
            f"no roofline: its float32 matrices need {needed:.1f} GB, and not even one layer of "
            f"them fits into {max(room, 0) / 1e9:.1f} GB"
        )
    made = [_random(backend, shape) for shape in (*shapes[: held * a_layer], head_shape)]
    roofline = Roofline(backend, made[:-1], made[-1], config.n_layers / held)
    if held == config.n_layers:
        return roofline, None
    return roofline, (
        f"roofline timed over {held} of {config.n_layers} layers and scaled: the float32 matrices "
        f"of all need {needed:.1f} GB, and {room / 1e9:.1f} GB are free for them"
    )


def roofline_nbytes(config: LlamaConfig) -> int:
    """Bytes that one pass over all layers reads."""
    return 4 * sum(n * d for n, d in forward_matrices(config).values())


def _random(backend: Backend, shape: tuple[int, int]) -> Array:
    """Random values. The kernel would back zeros with a single page instead of real memory."""
    return backend.to_device(np.random.default_rng(0).random(shape, dtype="float32"))


def _room(llama: Llama, batch: int, length: int) -> int | None:
    """Bytes that stay free apart from the model's weights and what a run allocates."""
    free = llama.backend.free_bytes()
    if free is None:
        return None
    c = llama.sizes
    itemsize = llama.cache_dtype.itemsize
    taken = KVCache.nbytes(c.n_layers, c.n_kv_heads, c.head_dim, batch, length, itemsize)
    chunk = min(llama.ops.prefill_chunk(), length)
    taken += workspace_nbytes(c, llama.ops, batch, length, chunk, llama.cache_dtype)
    taken += mapped_nbytes(llama.parameters)  # count as free, but would be evicted
    return int(free * (1 - _MARGIN)) - taken
