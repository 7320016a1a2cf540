"""The speed that plain float32 BLAS allows: one pass over all matrices of a forward."""

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
"""Part of the free memory that is left alone."""

_FEW_ROWS = 16


class Roofline:
    """Times y = x W^T over a forward's matrices: each once, in order, unfused, in float32.

    No matrix is used twice in a pass, so the processor's cache helps no more than it helps the
    model. Inputs and outputs are allocated before the clock starts. A few rows go in as W x^T, in
    which order OpenBLAS is faster up to about 16 (see npllama/ops/tiles.py): a roof must not be
    lower than need be.

    Args:
        backend: whose array module multiplies.
        layers: the matrices (O, D) of as many layers as are held, in order.
        head: (V, D).
        scale: layers of the model for each one held; a pass over some layers is scaled by it.
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
        """Seconds of one pass, `n_tokens` rows through the layers and `n_logits` through the head.

        Where only some layers are held: (seconds of these) * scale + (seconds of the head).
        """
        dot = self.backend.xp.dot
        layers = [self._product(w, n_tokens) for w in self.layers]
        head = self._product(self.head, n_logits)
        threads = self.backend.threads
        with threads.blas(threads.count):  # as many as npllama would use now
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
        """(a, b, out) of a @ b: W x for one row, W x^T for a few, x W^T for more."""
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
        """Until what was queued on a device is done; nothing on the CPU."""
        self.backend.to_host(self.head[:1, :1])


def roofline_of(llama: Llama, batch: int, length: int) -> tuple[Roofline | None, str | None]:
    """The roofline of a model, and a remark where it is not over all of its layers.

    A float32 model's own matrices are used. For narrower ones float32 matrices of the same shapes
    are made: all of them, or those of as many layers as fit into memory beside the model and
    `batch` rows of `length` positions; none where not even one layer fits.
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
    """Random numbers: zeros would not be backed by memory of their own."""
    return backend.to_device(np.random.default_rng(0).random(shape, dtype="float32"))


def _room(llama: Llama, batch: int, length: int) -> int | None:
    """Bytes free beside the model's weights and what a run will take."""
    free = llama.backend.free_bytes()
    if free is None:
        return None
    c = llama.sizes
    itemsize = llama.cache_dtype.itemsize
    taken = KVCache.nbytes(c.n_layers, c.n_kv_heads, c.head_dim, batch, length, itemsize)
    chunk = min(llama.ops.prefill_chunk(), length)
    taken += workspace_nbytes(c, llama.ops, batch, length, chunk, llama.cache_dtype)
    taken += mapped_nbytes(llama.parameters)  # they count as free, and would be pushed out
    return int(free * (1 - _MARGIN)) - taken
