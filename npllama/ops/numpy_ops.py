"""What NumPy does better than the reference: fewer bytes moved, fewer calls, all cores.

A decode step is bound by reading the weights, and then by the number of NumPy calls: after each
pass over gigabytes of weights the interpreter's own code and data are out of the cache, and a
call on a few hundred numbers takes 5 to 10 us. A prompt is bound by the products, and then by
everything elementwise, which NumPy computes on one core: its tokens go through a block in parts,
on all cores at once.
"""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from npllama.backend import Array, Backend
from npllama.ops.blocks import Ops, Part
from npllama.ops.tiles import product
from npllama.ops.workers import MAX_ROWS, Workers, can_work
from npllama.parameters import Head, Layer, Matrix
from npllama.shared_arrays import neighbours, place_of, share

if TYPE_CHECKING:
    from npllama.kv_cache import LayerCache, Positions

SMALLEST_PART = 64
"""Tokens that are worth a core of their own: with fewer, a product on one core is slower than
half of one on two."""

SHARED_SIZE = 512 * 1024
"""Numbers of a narrow matrix from which on worker processes share its product: handing it out
takes as long as widening some 50,000."""

QUERIES = 64
"""Tokens whose attention is computed together: what they cannot see, on average half as many
keys, is computed in vain."""

IN_CACHE = 128 * 1024
"""Attention scores that are computed at a time: they go through six operations, from the cache."""


@dataclass(frozen=True)
class _Joined:
    """Matrices of a layer that lie side by side, each group as one; None where they do not."""

    layer: Layer | None
    qkv: Matrix | None  # (H*C + 2*K*C, D)
    gate_up: Matrix | None  # (2*F, D)


_APART = _Joined(layer=None, qkv=None, gate_up=None)


class NumpyOps(Ops):
    """Overrides for the CPU; each computes what the method of the same name in Ops does."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self._joined: dict[int, _Joined] = {}  # by the id of the layer
        self._shared: dict[int, int] = {}  # id of a matrix's values -> its number
        self._shared_values: list[np.ndarray] = []
        self._workers: Workers | None = None

    # -- hooks ---------------------------------------------------------------------------------

    def prepare(self, part: Part) -> Part:
        """Matrices that lie side by side are joined; large narrow ones are shared with workers.

        Nothing is copied but narrow matrices that lie in this process's own memory (those that
        were converted while loading), which move to shared memory.
        """
        part = part.map(self.backend.to_device)
        if can_work() and self.backend.threads.most > 1:
            part = _shareable(part)
        matrices: list[Matrix] = []
        if isinstance(part, Layer):
            qkv = _side_by_side(part.wq, part.wk, part.wv)
            gate_up = _side_by_side(part.w_gate, part.w_up)
            self._joined[id(part)] = _Joined(part, qkv, gate_up)
            matrices += [qkv] if qkv else [part.wq, part.wk, part.wv]
            matrices += [gate_up] if gate_up else [part.w_gate, part.w_up]
            matrices += [part.wo, part.w_down]
        elif isinstance(part, Head):
            matrices.append(part.lm_head)
        for w in matrices:
            is_narrow = w.values.dtype != np.float32
            if is_narrow and w.values.size >= SHARED_SIZE and place_of(w.values) is not None:
                self._shared[id(w.values)] = len(self._shared_values)
                self._shared_values.append(w.values)
        return part

    def computing(self) -> AbstractContextManager:
        """BLAS has as many threads as there are free cores, or one beside workers, which are
        started here if there are none yet: they do so while a prompt is read."""
        threads = self.backend.threads
        if not self._shared_values or threads.most == 1:
            return threads.blas(threads.count)
        if self._workers is None:
            self._workers = Workers(threads.most, self._shared_values)
            threads.helpers += self._workers.pids
        return threads.blas(1)

    # -- products ------------------------------------------------------------------------------

    def linear(self, x: Array, w: Matrix) -> Array:
        """y = x W^T; a narrow W is widened tile by tile, by all worker processes for few rows."""
        if x.dtype != np.float32:
            return super().linear(x, w)
        values = w.values
        n_out, width = values.shape
        if x.size == width and values.dtype == np.float32:
            return np.dot(values, x.reshape(width)).reshape(*x.shape[:-1], n_out)
        flat = x.reshape(-1, width)  # (..., D) -> (M, D)
        number = self._shared.get(id(values)) if len(flat) <= MAX_ROWS else None
        if number is None or self._workers is None:
            y = product(flat, values)
        else:
            with self.backend.threads.blas(1):
                y = self._workers.product(flat, number, self.backend.threads.count)
        if w.scale is not None:
            y *= w.scale
        return y.reshape(*x.shape[:-1], n_out)  # (M, N) -> (..., N)

    # -- blocks --------------------------------------------------------------------------------

    def attention_block(
        self, x: Array, layer: Layer, cache: "LayerCache", positions: "Positions"
    ) -> Array:
        """The tokens of a prompt in parts, on all cores."""
        parts = self._parts(x.shape[1])
        if x.dtype != np.float32 or len(parts) == 1:
            return super().attention_block(x, layer, cache, positions)
        y = np.empty_like(x)
        for b in range(len(x)):
            places = _positions_of(positions, b, slice(0, x.shape[1]))
            self._attend_in_parts(x[b : b + 1], layer, cache, places, parts, y[b])
        y = self.all_reduce(y)
        y += x
        return y

    def _attend_in_parts(
        self,
        x: Array,
        layer: Layer,
        cache: "LayerCache",
        positions: "Positions",
        parts: list[slice],
        out: Array,
    ) -> None:
        """Attention(RMSNorm(x)) W_o^T of one row x (1, T, D) -> out (T, D): first the keys and
        values of all tokens, then all queries, a few at a time, then the projections."""
        row, start = positions.rows[0], positions.starts[0]
        n_new, width = x.shape[1], layer.wq.shape[0]
        queries: dict[int, Array] = {}
        heads = np.empty((n_new, width), dtype="float32")  # (T, H*C)

        def write_keys_values(part: slice, _slot: int) -> None:
            h = self.rms_norm(x[:, part], layer.attention_norm, layer.norm_eps)
            places = _positions_of(positions, 0, part)
            queries[part.start], k, v = self.queries_keys_values(h, layer, places)
            cache.write(k, v, places)

        def attend(some: tuple[slice, slice], slot: int) -> None:
            part, few = some
            q = queries[part.start][0, few].swapaxes(0, 1)  # (1, T, H, C) -> (H, few, C)
            begin, end = part.start + few.start, part.start + few.stop
            k, v = (a[row, :, : start + end] for a in (cache.k, cache.v))  # (K, N, C)
            o = self.attention(q, k, v, self._piece_of(cache.scratch, slot))
            o = o.swapaxes(0, 1)  # (H, few, C) -> (few, H, C)
            heads[begin:end] = o.reshape(len(o), width)

        def project(part: slice, _slot: int) -> None:
            out[part] = self.linear(heads[part], layer.wo)

        few_at_a_time = [(part, few) for part in parts for few in _queries_of(part)]
        self.backend.threads.map(write_keys_values, parts)
        self.backend.threads.map(attend, few_at_a_time[::-1])  # the last see the most keys
        self.backend.threads.map(project, parts)

    def feed_forward(self, x: Array, layer: Layer) -> Array:
        """The tokens of a prompt in parts, on all cores; gate and up in one product."""
        flat = x.reshape(-1, x.shape[-1])  # (B, T, D) -> (B*T, D)
        parts = self._parts(len(flat))
        if x.dtype != np.float32:
            return super().feed_forward(x, layer)
        if len(parts) == 1:
            return x + self.all_reduce(self._ffn(x, layer))
        y = np.empty_like(flat)

        def compute(part: slice, _slot: int) -> None:
            y[part] = self._ffn(flat[part], layer)

        self.backend.threads.map(compute, parts)
        y = self.all_reduce(y)
        y += flat
        return y.reshape(x.shape)

    def _ffn(self, x: Array, layer: Layer) -> Array:
        """SwiGLU(RMSNorm(x)) W_down^T; (..., D) -> (..., D)."""
        h = self.rms_norm(x, layer.ffn_norm, layer.norm_eps)
        joined = self._joined_of(layer).gate_up
        if joined is None:
            gate, up = self.linear(h, layer.w_gate), self.linear(h, layer.w_up)  # (..., F)
        else:
            both = self.linear(h, joined)  # (..., 2 F)
            n = both.shape[-1] // 2
            gate, up = both[..., :n], both[..., n:]
        return self.linear(self.swiglu(gate, up), layer.w_down)

    def queries_keys_values(
        self, h: Array, layer: Layer, positions: "Positions"
    ) -> tuple[Array, Array, Array]:
        """One product for q, k and v, of which q and k are rotated together."""
        joined = self._joined_of(layer).qkv
        if joined is None or h.dtype != np.float32:
            return super().queries_keys_values(h, layer, positions)
        head_dim = 2 * positions.cos.shape[-1]
        n_q, n_k = layer.wq.shape[0] // head_dim, layer.wk.shape[0] // head_dim
        y = self.linear(h, joined).reshape(*h.shape[:2], -1, head_dim)  # (B, T, H + 2K, C)
        qk = self.rope(y[:, :, : n_q + n_k], positions.cos, positions.sin)
        return qk[:, :, :n_q], qk[:, :, n_q:], y[:, :, n_q + n_k :]

    def _joined_of(self, layer: Layer) -> _Joined:
        found = self._joined.get(id(layer))
        return _APART if found is None or found.layer is not layer else found

    def _parts(self, n_tokens: int) -> list[slice]:
        """0 .. n_tokens cut up for all threads that there may be, whether they are free now or
        not: the products' last bits depend on the cut, and then not on what else runs."""
        most = self.backend.threads.most
        n = max(1, min(most, n_tokens // SMALLEST_PART))
        return [slice(n_tokens * i // n, n_tokens * (i + 1) // n) for i in range(n)]

    def _piece_of(self, scratch: Array | None, slot: int) -> Array | None:
        """A thread's own part of the scratch."""
        if scratch is None:
            return None
        size = scratch.size // self.backend.threads.most
        return scratch[slot * size : slot * size + size]

    # -- equations -----------------------------------------------------------------------------

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """x / sqrt(mean(x^2) + eps) * weight, in 3 calls for one row and 7 for several; the
        reference has 8, one of them (mean) written in Python."""
        if x.dtype != np.float32:
            return super().rms_norm(x, weight, eps)
        width = x.shape[-1]
        if x.size == width:
            flat = x.reshape(-1)
            y = x * np.float32(1 / math.sqrt(float(flat @ flat) / width + eps))
        else:
            size = np.vecdot(x, x)[..., None]  # (..., D) -> (..., 1)
            size *= np.float32(1 / width)
            size += np.float32(eps)
            y = x / np.sqrt(size, out=size)
        y *= weight
        return y

    def rope(self, x: Array, cos: Array, sin: Array) -> Array:
        """Each pair turned, both halves of a head in one call; the reference has 12."""
        if x.dtype != np.float32:
            return super().rope(x, cos, sin)
        half = x.shape[-1] // 2
        halves = x.reshape(*x.shape[:-1], 2, half)  # (B, T, heads, C) -> (B, T, heads, 2, C/2)
        y = halves * cos[:, :, None, None]  # (B, T, C/2) -> (B, T, 1, 1, C/2)
        crossed = halves[..., ::-1, :] * sin[:, :, None, None]
        y[..., 0, :] -= crossed[..., 0, :]
        y[..., 1, :] += crossed[..., 1, :]
        return y.reshape(x.shape)

    def swiglu(self, gate: Array, up: Array) -> Array:
        """gate / (1 + e^-gate) * up in one new array: where e^-gate overflows to infinity, the
        result is its 0."""
        y = np.negative(gate)
        with np.errstate(over="ignore"):
            np.exp(y, out=y)
        y += 1
        np.divide(gate, y, out=y)
        y *= up
        return y

    def scratch_size(self, n_heads: int, n_kv_heads: int, chunk: int, context: int) -> int:
        """Scores of one key head's queries for each thread; and of all heads for one token."""
        at_once = chunk if len(self._parts(chunk)) == 1 else QUERIES
        queries = n_heads // n_kv_heads * at_once
        return max(n_heads, self.backend.threads.most * queries) * context

    def attention_nbytes(
        self, n_heads: int, n_kv_heads: int, head_dim: int, chunk: int, context: int
    ) -> int:
        """The scratch, and queries and outputs of one chunk."""
        scores = self.scratch_size(n_heads, n_kv_heads, chunk, context)
        return 4 * (scores + 3 * n_heads * chunk * head_dim)

    def attention_weights(self, q: Array, k: Array) -> Array:
        """softmax(q k^T / sqrt(C) + mask), in one array of all scores; the reference has four."""
        n_heads, n_new, head_dim = q.shape
        n_kv_heads, n_keys, _ = k.shape
        k = k.astype(q.dtype, copy=False)
        grouped = q.reshape(n_kv_heads, -1, head_dim)  # (H, T, C) -> (K, G*T, C)
        scores = grouped @ k.swapaxes(1, 2)  # (K, G*T, C) @ (K, C, N) -> (K, G*T, N)
        p = scores.reshape(n_heads, n_new, n_keys)  # -> (H, T, N)
        p *= p.dtype.type(1 / math.sqrt(head_dim))
        _hide_future(p)
        p -= p.max(axis=-1, keepdims=True)
        np.exp(p, out=p)
        p /= p.sum(axis=-1, keepdims=True)
        return p

    def attention(self, q: Array, k: Array, v: Array, scratch: Array | None = None) -> Array:
        """softmax(q k^T / sqrt(C) + mask) v, in place in `scratch`, as many heads at a time as
        it and the processor's cache have room for; the reference would allocate four arrays of
        all scores.
        """
        if scratch is None or q.dtype != np.float32 or k.dtype != np.float32:
            return super().attention(q, k, v)
        n_heads, n_new, head_dim = q.shape
        n_kv_heads, n_keys, _ = k.shape
        queries = n_heads // n_kv_heads * n_new  # G*T
        grouped = q.reshape(n_kv_heads, queries, head_dim)  # (H, T, C) -> (K, G*T, C)
        grouped = grouped * np.float32(1 / math.sqrt(head_dim))
        o = np.empty_like(grouped)
        room = min(scratch.size, IN_CACHE)
        at_once = max(1, min(n_kv_heads, room // (queries * n_keys)))
        if scratch.size < queries * n_keys:
            scratch = np.empty(queries * n_keys, dtype="float32")
        for begin in range(0, n_kv_heads, at_once):
            some = slice(begin, min(begin + at_once, n_kv_heads))
            n = some.stop - some.start
            scores = scratch[: n * queries * n_keys].reshape(n, queries, n_keys)
            np.matmul(grouped[some], k[some].swapaxes(1, 2), out=scores)
            if n_new > 1:
                _hide_future(scores.reshape(-1, n_new, n_keys))  # (n, G*T, N) -> (n*G, T, N)
            scores -= np.maximum.reduce(scores, axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            total = np.add.reduce(scores, axis=-1, keepdims=True)
            np.matmul(scores, v[some], out=o[some])  # (n, G*T, N) @ (n, N, C) -> (n, G*T, C)
            o[some] /= total
        return o.reshape(q.shape)  # (K, G*T, C) -> (H, T, C)

    def sigmoid(self, x: Array) -> Array:
        """1 / (1 + e^-x) in one array: where e^-x overflows to infinity, the result is its 0.

        Measured at 800 x 512 in float32 on one core: 0.2 of the reference's time, most of which
        is its `where`.
        """
        s = np.negative(x, out=np.empty_like(x))
        with np.errstate(over="ignore"):
            np.exp(s, out=s)
        s += 1
        return np.reciprocal(s, out=s)

    # -- backwards -----------------------------------------------------------------------------

    def embedding_backward(self, dx: Array, tokens: Array, w: Matrix) -> Array:
        """Places sorted by their token, and the rows of each token summed: B*T*D additions
        where the reference multiplies by a matrix of V x B*T."""
        order = np.argsort(tokens, axis=None, kind="stable")
        present, begins = np.unique(tokens.reshape(-1)[order], return_index=True)
        rows = dx.reshape(-1, w.shape[1])[order]  # (B, T, D) -> (B*T, D), one token after another
        dw = np.zeros(w.shape, dtype=dx.dtype)
        dw[present] = np.add.reduceat(rows, begins, axis=0)
        return dw

    def softmax_backward(self, dp: Array, p: Array) -> Array:
        """p * (dp - sum dp p), with one new array and the sum in one pass."""
        dx = dp - np.vecdot(dp, p)[..., None]
        dx *= p
        return dx

    def swiglu_backward(self, dy: Array, gate: Array, up: Array) -> tuple[Array, Array]:
        """Both gradients from one sigmoid, s: SiLU = gate s and SiLU' = s + SiLU (1 - s).

        Measured at 800 x 512 in float32 on one core: 0.3 of the reference's time.
        """
        s = self.sigmoid(gate)
        silu = gate * s
        dgate = 1 - s
        dgate *= silu
        dgate += s
        dgate *= dy
        dgate *= up
        silu *= dy
        return dgate, silu


def _hide_future(scores: np.ndarray) -> None:
    """Put -inf, in place, where a query of scores (heads, T, N) would see a later key: only the
    T x T corner of new keys has any."""
    n_new, n_keys = scores.shape[1:]
    if n_new > 1:
        np.copyto(scores[..., n_keys - n_new :], -np.inf, where=_later(n_new))


@lru_cache(maxsize=8)
def _later(n: int) -> np.ndarray:
    """(n, n) bool: whether key j comes after query i."""
    return np.triu(np.ones((n, n), dtype=bool), k=1)


def _queries_of(part: slice) -> list[slice]:
    """Of a part, from its own beginning, QUERIES tokens at a time."""
    n = part.stop - part.start
    return [slice(i, min(i + QUERIES, n)) for i in range(0, n, QUERIES)]


def _side_by_side(*matrices: Matrix) -> Matrix | None:
    """The matrices as one, a view, where they lie one after the other in memory."""
    values = neighbours([w.values for w in matrices])
    if values is None:
        return None
    scales = [w.scale for w in matrices if w.scale is not None]
    return Matrix(values, np.concatenate(scales) if scales else None)


def _positions_of(positions: "Positions", b: int, some: slice) -> "Positions":
    """The places of some of the new tokens of one row."""
    return replace(
        positions,
        rows=positions.rows[b : b + 1],
        starts=(positions.starts[b] + some.start,),
        device_starts=positions.device_starts[b : b + 1] + some.start,
        n_new=some.stop - some.start,
        cos=positions.cos[b : b + 1, some],
        sin=positions.sin[b : b + 1, some],
    )


def _shareable(part: Part) -> Part:
    """The part with its narrow matrices where other processes can map them, side by side."""
    moving: list[np.ndarray] = []

    def look(array: Array) -> Array:
        if array.ndim == 2 and array.dtype != np.float32 and place_of(array) is None:
            moving.append(array)
        return array

    part.map(look)
    if sum(array.size for array in moving) < SHARED_SIZE:
        return part
    shared = dict(zip(map(id, moving), share(moving), strict=True))
    return part.map(lambda array: shared.get(id(array), array))
