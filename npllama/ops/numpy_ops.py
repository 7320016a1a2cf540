"""Faster blocks for NumPy: one product for matrices with the same input, and all cores for a
prompt.

Measurements: tools/README.md.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from npllama.backend import Array, Backend
from npllama.ops.blocks import Ops, Part, last
from npllama.ops.chunks import MANY_ROWS
from npllama.ops.numpy_derivatives import NumpyDerivatives
from npllama.ops.numpy_equations import NumpyEquations, tokens_at_once
from npllama.ops.numpy_sampling import NumpySampling
from npllama.ops.shared_products import SharedProducts
from npllama.parameters import Head, Layer, Matrix
from npllama.weight_table import PRODUCTS

if TYPE_CHECKING:
    from npllama.kv_cache import Positions


class NumpyOps(NumpySampling, NumpyDerivatives, NumpyEquations, Ops):
    """Overrides for the CPU. Each computes the same result as the method of that name in Ops.

    The other base classes precede Ops in the method resolution order. The methods of Ops therefore
    call the overrides, and `super()` in an override is the reference.
    """

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.shared = SharedProducts(backend)

    # -- blocks --------------------------------------------------------------------------------

    def feed_forward(self, x: Array, layer: Layer) -> Array:
        """`feed_forward` with one product for gate and up, and an in-place residual."""
        if layer.gate_up is None or x.dtype != np.float32:
            return super().feed_forward(x, layer)
        h = self.rms_norm(x, layer.ffn_norm, layer.norm_eps)
        both = self.linear(h, layer.gate_up)  # (B, T, 2 F)
        n = both.shape[-1] // 2
        gate, up = both[..., :n], both[..., n:]  # (B, T, 2 F) -> (B, T, F) each
        y = self.swiglu(gate, up)
        y = self.all_reduce(self.linear(y, layer.w_down))
        y += x
        return y

    def queries_keys_values(
        self, h: Array, layer: Layer, positions: "Positions", n_last: int | None = None
    ) -> tuple[Array, Array, Array]:
        """`queries_keys_values` with one product for q, k and v, and one rotation for q and k.

        For few rows, q is computed for all T tokens even if only the last n are needed. The product
        then takes as long as reading the matrix, and this time does not depend on the number of
        rows.
        """
        batch, n_new, _ = h.shape
        is_all = n_last in (None, n_new) or batch * n_new < MANY_ROWS
        if layer.qkv is None or h.dtype != np.float32 or not is_all:
            return super().queries_keys_values(h, layer, positions, n_last)
        head_dim = 2 * positions.cos.shape[-1]
        n_q, n_k = layer.wq.shape[0] // head_dim, layer.wk.shape[0] // head_dim
        y = self.linear(h, layer.qkv).reshape(batch, n_new, -1, head_dim)  # (B, T, H + 2K, C)
        qk = self.rope(y[:, :, : n_q + n_k], positions.cos, positions.sin)
        return last(qk[:, :, :n_q], n_last), qk[:, :, n_q:], y[:, :, n_q + n_k :]

    # -- hooks ---------------------------------------------------------------------------------

    def prepare(self, part: Part, may_copy: bool = False) -> Part:
        """Join matrices that have the same input, and register large matrices for the products that
        worker processes help to compute.

        `SharedProducts` decides which matrices are joined, registered, or moved to shared memory.
        """
        part = part.map(self.backend.to_device)
        if isinstance(part, Layer):
            return self._prepared_layer(part, may_copy)
        if isinstance(part, Head):
            (w,) = self.shared.joined([[part.lm_head]], may_copy=False)
            return replace(part, lm_head=self.shared.numbered(w, w.shape[1]))
        (w,) = self.shared.joined([[part]], may_copy=False)
        return w

    def _prepared_layer(self, layer: Layer, may_copy: bool) -> Layer:
        """The layer with the joined matrices added. The matrices that were joined, such as wq, are
        then views of rows of the joined matrix."""
        width = layer.wq.shape[1]
        groups = [[getattr(layer, weight.field) for weight in ws] for ws in PRODUCTS.values()]
        changed: dict[str, Matrix] = {}
        joined: dict[str, Matrix] = {}
        for (name, weights), group, whole in zip(
            PRODUCTS.items(), groups, self.shared.joined(groups, may_copy), strict=True
        ):
            multiplied = group if whole is None else [whole]
            parts = [self.shared.numbered(w, width) for w in multiplied]
            if len(parts) < len(weights):
                joined[name] = parts[0]
                parts = parts[0].split(w.shape[0] for w in group)
            changed |= {weight.field: w for weight, w in zip(weights, parts, strict=True)}
        return replace(layer, **changed).with_derived(**joined)

    def forward_context(self, n_rows: int) -> AbstractContextManager:
        """A context that sets BLAS's number of threads for a forward pass.

        BLAS uses `Threads.count` threads, by default one per free core. It uses one
        thread if the forward pass splits many rows over our own threads, or if worker processes
        compute: BLAS's threads keep spinning after a product, and would occupy the cores of our
        threads and of the processes.

        Only one thread of the caller can be in this context at a time, with one exception: if
        npllama may use only one thread per forward pass, forward passes in several threads of the
        caller may run at the same time.
        """
        return self._forward_context(n_rows)

    def turn(self) -> AbstractContextManager:
        """A context for several consecutive steps of one generation. The forward passes of other
        threads wait until the context ends, unless npllama may use only one thread per forward
        pass."""
        threads = self.backend.threads
        return threads.turn() if threads.most > 1 else nullcontext()

    @contextmanager
    def _forward_context(self, n_rows: int) -> Iterator[None]:
        threads = self.backend.threads
        if threads.most == 1:
            with threads.blas_alone():
                yield
            return
        with threads.turn():
            is_helped = self.shared.begin()
            with threads.blas(1 if is_helped or n_rows >= MANY_ROWS else threads.count):
                yield

    def scratch_size(self, n_heads: int, n_kv_heads: int, chunk: int, context: int) -> int:
        """The number of float32 elements for the scores that all threads compute at the same time.

        Each thread has memory for the scores of one key head, for `tokens_at_once` tokens and all
        positions of the context. While a row has fewer positions than the context, the scores of
        several key heads fit in this memory.
        """
        groups = n_heads // n_kv_heads
        queries = groups * min(chunk, tokens_at_once(groups))
        return self.backend.threads.most * queries * context

    def attention_nbytes(
        self,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        chunk: int,
        context: int,
        cache_dtype: np.dtype,
    ) -> int:
        """The number of bytes of the scratch memory, and of three arrays (H, T, C) for one chunk:
        the outputs, the scaled queries, and a temporary copy of queries or outputs.

        If the KV cache is not float32, the scores of the whole chunk and the widened keys and
        values of one row are added.
        """
        numbers = self.scratch_size(n_heads, n_kv_heads, chunk, context)
        if cache_dtype != np.float32:
            numbers += n_heads * chunk * context + 2 * n_kv_heads * context * head_dim
        return 4 * (numbers + 3 * n_heads * chunk * head_dim)
