"""What NumPy does better than the reference: fewer bytes moved, fewer calls, all cores.

A decode step is bound by reading the weights, and then by the number of NumPy calls: after each
pass over gigabytes of weights the interpreter's own code and data are out of the cache, and a
call on a few hundred numbers takes 5 to 10 us. A prompt is bound by the products, and then by
everything else, which NumPy computes on one core: here it is cut up for all of them.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from npllama.backend import Array, Backend
from npllama.errors import WorkerError
from npllama.ops.blocks import Ops, Part, last
from npllama.ops.tiles import product
from npllama.ops.workers import MAX_ROWS, Workers, can_work
from npllama.parameters import Head, Layer, Matrix
from npllama.shared_arrays import neighbours, place_of, share

if TYPE_CHECKING:
    from npllama.kv_cache import LayerCache, Positions

Item = TypeVar("Item")

PIECE = 64 * 1024
"""Numbers of an elementwise operation that are computed at a time, since several ufuncs go over
them: they stay in a core's own cache, and are worth a thread's waking up."""

MANY_ROWS = 64
"""Rows from which on a product is cut up among threads that each use BLAS on one core, and all
else among the same: 1.2 times as fast at 512 rows of 768 as BLAS with two threads, which go on
spinning for a while and disturb what follows. With fewer rows waking threads up takes longer."""

QUERIES = 128
"""Queries of a key head that are computed together, G for each token: fewer are too few for a
product, and of more tokens' keys more are computed in vain, since the first do not see them."""

IN_CACHE = 256 * 1024
"""Attention scores that are computed at a time: they go through six operations, from the cache."""

SHARED_SIZE = 512 * 1024
"""Numbers of a narrow matrix from which on worker processes share its product: handing it out
takes as long as widening some 50,000."""

SMALL_WIDTH = 678
"""Width D of a model up to which worker processes share products of few rows in float32 as well.
For one row OpenBLAS uses one core where a matrix has fewer than 460,800 numbers, as those of D x D
then have: a decode step is 1.2 to 1.3 times as fast at D = 288, and as fast at 640."""

SHARED_SMALL_SIZE = 64 * 1024
"""Numbers of a float32 matrix of such a model from which on handing it out is worth it."""

CACHED_SIZE = 8 * 1024 * 1024
"""Numbers of all those matrices below which it is not: they stay in the processor's cache."""

MAX_WORKERS = 16
"""Processes at most: each takes some 35 MB, and memory's speed is used up before that many."""


_SIGNS = np.array([[-1], [1]], dtype="float32")
"""Of the two halves of a head: what sin is multiplied by in RoPE."""


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
        # id of a matrix's values -> its number, and the values
        self._shared: dict[int, tuple[int, np.ndarray]] = {}
        self._shares_narrow, self._n_shared = False, 0
        self._workers: Workers | None = None
        self._is_helped = False  # by workers, in this forward

    # -- hooks ---------------------------------------------------------------------------------

    def prepare(self, part: Part) -> Part:
        """Matrices that lie side by side are joined; those that workers are to help with, large
        narrow ones and those of a small model, are shared with them.

        Nothing is copied but such matrices that lie in this process's own memory (those that
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
            matrices += [part.wo]
            matrices += [gate_up] if gate_up else [part.w_gate, part.w_up]
            matrices += [part.w_down]
        elif isinstance(part, Head):
            matrices.append(part.lm_head)
        for w in matrices:
            least = _least_shared(w.values, _width(part))
            if w.values.size >= least and place_of(w.values) is not None:
                self._shared[id(w.values)] = len(self._shared), w.values
                self._shares_narrow |= w.values.dtype != np.float32
                self._n_shared += w.values.size
                self._end_workers()  # those that there are do not know of it
        return part

    def computing(self, n_rows: int) -> AbstractContextManager:
        """BLAS has as many threads as there are free cores; or one where many rows are cut up
        among threads of our own, or beside workers: after each product its threads go on
        spinning for some 50 ms, and would take a core from those.

        Workers are started here if there are none yet: they do so while a prompt is read. For
        narrow matrices they are waited for.
        """
        threads = self.backend.threads
        is_worth_it = self._shares_narrow or self._n_shared >= CACHED_SIZE
        if is_worth_it and self._workers is None and threads.most > 1:
            values = [values for _number, values in self._shared.values()]
            try:
                self._workers = Workers(min(threads.most, MAX_WORKERS), values)
                threads.helpers += self._workers.pids
            except WorkerError:
                if self._shares_narrow:
                    raise
                self._n_shared = 0  # float32 does without them, from now on
        workers = self._workers
        self._is_helped = workers is not None and (self._shares_narrow or workers.are_ready)
        is_alone = self._is_helped or n_rows >= MANY_ROWS
        return threads.blas(1 if is_alone else threads.count)

    def _end_workers(self) -> None:
        if self._workers is not None:
            self.backend.threads.helpers.clear()
            self._workers.close()
            self._workers, self._is_helped = None, False

    # -- products ------------------------------------------------------------------------------

    def linear(self, x: Array, w: Matrix) -> Array:
        """y = x W^T, computed as y^T = W x^T: a long prompt's result has its tokens side by
        side in memory, which the following operations are fastest with.

        A narrow W is widened tile by tile: for few rows by worker processes together, who
        multiply few rows by the float32 matrices of a small model as well.
        """
        if x.dtype != np.float32:
            return super().linear(x, w)
        values = w.values
        n_out, width = values.shape
        is_wide = values.dtype == np.float32
        is_shared = self._is_helped and id(values) in self._shared
        if x.size == width and is_wide and not is_shared:
            return values.dot(x.reshape(width)).reshape(*x.shape[:-1], n_out)
        flat = x.reshape(-1, width)  # (..., D) -> (M, D)
        n_rows = len(flat)
        if n_rows >= MANY_ROWS and is_wide and self.backend.threads.most == 1:
            # as in training, whose derivatives expect rows
            return (flat @ values.T).reshape(*x.shape[:-1], n_out)
        if is_shared and n_rows <= (MANY_ROWS - 1 if is_wide else MAX_ROWS):
            number, _values = self._shared[id(values)]
            y = self._workers.product(flat, number, self.backend.threads.count)
        else:
            y = np.empty((n_out, n_rows), dtype="float32")
            if n_rows < MANY_ROWS:
                product(flat, values, y)
            else:
                most = self.backend.threads.most
                parts = [slice(n_out * i // most, n_out * (i + 1) // most) for i in range(most)]
                self._for_each(
                    lambda some, _slot: product(flat, values[some], y[some]), parts, n_rows
                )
        if w.scale is not None:
            y *= w.scale[:, None]
        y = y.T  # (N, M) -> (M, N)
        if n_rows < MANY_ROWS:
            y = np.ascontiguousarray(y)
        return y.reshape(*x.shape[:-1], n_out)  # (M, N) -> (..., N)

    def _for_each(
        self, function: Callable[[Item, int], None], items: Sequence[Item], n: int
    ) -> None:
        """function(item, slot) for each; on all cores where n, the tokens, are many."""
        if n < MANY_ROWS or len(items) == 1:
            for item in items:
                function(item, 0)
        else:
            self.backend.threads.map(function, items)

    def _in_pieces(
        self, function: Callable[[slice, int], None], n: int, n_rows: int, width: int = 1
    ) -> None:
        """function(slice of 0 .. n, slot) until all of n are done, each of `width` numbers a
        row: of many rows some at a time, on all cores."""
        if n_rows < MANY_ROWS:
            function(slice(None), 0)
        else:
            at_once = max(1, PIECE // (width * n_rows))
            pieces = [slice(i, min(i + at_once, n)) for i in range(0, n, at_once)]
            self._for_each(function, pieces, n_rows)

    def embed(self, tokens: Array, embedding: Matrix) -> Array:
        """As `linear` leaves it: a long prompt's tokens side by side in memory."""
        x = super().embed(tokens, embedding)
        if tokens.size < MANY_ROWS or self.backend.threads.most == 1:
            return x
        return np.asarray(x, order="F")

    # -- blocks --------------------------------------------------------------------------------

    def attention_block(
        self,
        x: Array,
        layer: Layer,
        cache: "LayerCache",
        positions: "Positions",
        n_last: int | None = None,
    ) -> Array:
        """Where each row has one new token in few calls; of one row's long prompt on all cores."""
        batch, n_new, _ = x.shape
        if x.dtype != np.float32 or cache.k.dtype != np.float32 or (batch > 1 and n_new > 1):
            return super().attention_block(x, layer, cache, positions, n_last)
        h = self.rms_norm(x, layer.attention_norm, layer.norm_eps)
        q, k, v = self.queries_keys_values(h, layer, positions, n_last)  # (B, n or T, heads, C)
        attend = self._attend_one if n_new == 1 else self._attend_prompt
        o = attend(q, k, v, cache, positions)  # (B, n, H*C)
        return self._plus(last(x, n_last), self.all_reduce(self.linear(o, layer.wo)))

    def _attend_one(
        self, q: Array, k: Array, v: Array, cache: "LayerCache", positions: "Positions"
    ) -> Array:
        """Each row's one new token is the last, so it sees all keys: nothing is hidden from it.

        The same equations as `attention`, each in one call on arrays that are already there.
        """
        batch, _, n_heads, head_dim = q.shape
        grouped = (batch, k.shape[2], n_heads // k.shape[2], head_dim)  # (B, K, G, C)
        q = q.reshape(grouped) * np.float32(1 / math.sqrt(head_dim))
        o = np.empty(grouped, dtype="float32")
        for b, (row, start) in enumerate(zip(positions.rows, positions.starts, strict=True)):
            keys, values = cache.k[row, :, : start + 1], cache.v[row, :, : start + 1]  # (K, N, C)
            keys[:, start], values[:, start] = k[b, 0], v[b, 0]
            p = np.matmul(q[b], keys.swapaxes(1, 2))  # (K, G, C) @ (K, C, N) -> (K, G, N)
            p -= np.maximum.reduce(p, axis=-1, keepdims=True)
            np.exp(p, out=p)
            np.matmul(p, values, out=o[b])  # (K, G, N) @ (K, N, C) -> (K, G, C)
            o[b] /= np.add.reduce(p, axis=-1, keepdims=True)
        return o.reshape(batch, 1, -1)

    def _attend_prompt(
        self, q: Array, k: Array, v: Array, cache: "LayerCache", positions: "Positions"
    ) -> Array:
        """T new tokens of one row, queries of the last n: q (1, n, H, C) -> (1, n, H*C)."""
        (row,), (start,), n_new = positions.rows, positions.starts, positions.n_new
        end = start + n_new  # N = S + T
        keys, values = cache.k[row, :, :end], cache.v[row, :, :end]  # (K, N, C)

        def write(head: int, _slot: int) -> None:
            keys[head, start:], values[head, start:] = k[0, :, head], v[0, :, head]

        self._for_each(write, range(len(keys)), n_new)
        o = self.attention(q[0].swapaxes(0, 1), keys, values, cache.scratch)  # (H, n, C)
        return o.swapaxes(0, 1).reshape(1, q.shape[1], -1)  # (H, n, C) -> (1, n, H*C)

    def _plus(self, x: Array, y: Array) -> Array:
        """x + y, in y's memory."""

        def add(some: slice, _slot: int) -> None:
            part = y[..., some]
            part += x[..., some]

        self._in_pieces(add, x.shape[-1], x.size // x.shape[-1])
        return y

    def feed_forward(self, x: Array, layer: Layer) -> Array:
        """Gate and up in one product."""
        joined = self._joined_of(layer).gate_up
        if joined is None or x.dtype != np.float32:
            return super().feed_forward(x, layer)
        h = self.rms_norm(x, layer.ffn_norm, layer.norm_eps)
        both = self.linear(h, joined)  # (B, T, 2 F)
        n = both.shape[-1] // 2
        y = self.swiglu(both[..., :n], both[..., n:])  # (B, T, F)
        return self._plus(x, self.all_reduce(self.linear(y, layer.w_down)))

    def queries_keys_values(
        self, h: Array, layer: Layer, positions: "Positions", n_last: int | None = None
    ) -> tuple[Array, Array, Array]:
        """One product for q, k and v, of which q and k are rotated together."""
        joined = self._joined_of(layer).qkv
        if joined is None or h.dtype != np.float32 or n_last not in (None, h.shape[1]):
            return super().queries_keys_values(h, layer, positions, n_last)
        head_dim = 2 * positions.cos.shape[-1]
        n_q, n_k = layer.wq.shape[0] // head_dim, layer.wk.shape[0] // head_dim
        y = self.linear(h, joined).reshape(*h.shape[:2], -1, head_dim)  # (B, T, H + 2K, C)
        qk = self.rope(y[:, :, : n_q + n_k], positions.cos, positions.sin)
        return qk[:, :, :n_q], qk[:, :, n_q:], y[:, :, n_q + n_k :]

    def _joined_of(self, layer: Layer) -> _Joined:
        found = self._joined.get(id(layer))
        return _APART if found is None or found.layer is not layer else found

    # -- equations -----------------------------------------------------------------------------

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """x / sqrt(mean(x^2) + eps) * weight, in 3 calls for one row and 7 for several; the
        reference has 8, one of them (mean) written in Python."""
        if x.dtype != np.float32:
            return super().rms_norm(x, weight, eps)
        width = x.shape[-1]
        if x.size == width:
            flat = x.reshape(-1)
            y = x * np.float32(1 / math.sqrt(float(flat.dot(flat)) / width + eps))
            y *= weight
            return y
        factor = self._sums_of_squares(x)[..., None]  # (B, T) -> (B, T, 1)
        factor *= np.float32(1 / width)
        factor += np.float32(eps)
        np.reciprocal(np.sqrt(factor, out=factor), out=factor)
        y = np.empty_like(x)

        def compute(some: slice, _slot: int) -> None:
            part = np.multiply(x[..., some], factor, out=y[..., some])
            part *= weight[some]

        self._in_pieces(compute, width, x.size // width)
        return y

    def _sums_of_squares(self, x: np.ndarray) -> np.ndarray:
        """sum over the last axis of x^2: (B, T, D) -> (B, T).

        Where tokens lie side by side, 64 numbers of each at a time and then their sums: one
        after the other they would gather more rounding.
        """
        if x.strides[-1] == x.itemsize:
            return np.vecdot(x, x)
        sums = np.empty((-(-x.shape[-1] // 64), *x.shape[:-1]), dtype="float32")

        def compute(i: int, _slot: int) -> None:
            some = x[..., 64 * i : 64 * i + 64]
            np.einsum("...d,...d->...", some, some, out=sums[i])

        self._for_each(compute, range(len(sums)), sums[0].size)
        return np.add.reduce(sums, axis=0)

    def rope(self, x: Array, cos: Array, sin: Array) -> Array:
        """Each pair turned, both halves of a head in one call; the reference has 12."""
        if x.dtype != np.float32:
            return super().rope(x, cos, sin)
        if x.strides[-1] != x.itemsize:
            cos, sin = np.asarray(cos, order="F"), np.asarray(sin, order="F")
        half = x.shape[-1] // 2
        halves = x.reshape(*x.shape[:-1], 2, half)  # (B, T, heads, C) -> (B, T, heads, 2, C/2)
        cos, sin = cos[:, :, None, None], sin[:, :, None, None]  # (B, T, C/2) -> (B, T, 1, 1, C/2)
        sin = sin * _SIGNS  # (B, T, 1, 1, C/2) -> (B, T, 1, 2, C/2)
        y = np.empty_like(halves)

        def compute(some: slice, _slot: int) -> None:
            part = np.multiply(halves[:, :, some], cos, out=y[:, :, some])
            part += halves[:, :, some, ::-1] * sin

        batch, n_tokens, n_heads, head_dim = x.shape
        self._in_pieces(compute, n_heads, batch * n_tokens, head_dim)
        return y.reshape(x.shape)

    def swiglu(self, gate: Array, up: Array) -> Array:
        """gate / (1 + e^-gate) * up in one new array: where e^-gate overflows to infinity, the
        result is its 0."""
        y = np.empty_like(gate)

        def compute(some: slice, _slot: int) -> None:
            part = y[..., some]
            np.negative(gate[..., some], out=part)
            with np.errstate(over="ignore"):
                np.exp(part, out=part)
            part += 1
            np.divide(gate[..., some], part, out=part)
            part *= up[..., some]

        self._in_pieces(compute, gate.shape[-1], gate.size // gate.shape[-1])
        return y

    def scratch_size(self, n_heads: int, n_kv_heads: int, chunk: int, context: int) -> int:
        """Scores of one key head's queries, a few tokens at a time, for each thread."""
        groups = n_heads // n_kv_heads
        queries = groups * min(chunk, _tokens_at_once(groups))
        return self.backend.threads.most * queries * context

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
        """softmax(q k^T / sqrt(C) + mask) v, in place in `scratch`: a few tokens at a time over
        the keys up to theirs, and as many heads as the processor's cache has room for; the
        reference would allocate four arrays of all scores.
        """
        if scratch is None or q.dtype != np.float32 or k.dtype != np.float32:
            return super().attention(q, k, v)
        n_heads, n_new, head_dim = q.shape
        n_kv_heads, n_keys, _ = k.shape
        groups = n_heads // n_kv_heads
        grouped = q.reshape(n_kv_heads, groups, n_new, head_dim)  # (H, T, C) -> (K, G, T, C)
        o = np.empty((n_new, n_kv_heads, groups, head_dim), dtype="float32")
        o = o.transpose(1, 2, 0, 3)  # (T, K, G, C), as the next product wants it -> (K, G, T, C)
        room = scratch.size // self.backend.threads.most

        def attend(item: tuple[slice, slice], slot: int) -> None:
            heads, some = item
            end = n_keys - n_new + some.stop
            few = grouped[heads, :, some]  # (K, G, T, C) -> (some K, G, few, C)
            shape = (few.shape[0], groups * few.shape[2], end)  # (some K, G*few, N)
            scores = _scratch(scratch[slot * room : slot * room + room], shape)
            few = few.reshape(*shape[:2], head_dim) * np.float32(1 / math.sqrt(head_dim))
            np.matmul(few, k[heads, :end].swapaxes(1, 2), out=scores)
            _hide_future(scores.reshape(-1, some.stop - some.start, end))
            scores -= np.maximum.reduce(scores, axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            total = np.add.reduce(scores, axis=-1, keepdims=True)
            part = np.matmul(scores, v[heads, :end])  # (some K, G*few, N) @ (some K, N, C)
            part /= total
            o[heads, :, some] = part.reshape(few.shape[0], groups, -1, head_dim)

        items = []
        for begin in range(0, n_new, _tokens_at_once(groups)):
            some = slice(begin, min(begin + _tokens_at_once(groups), n_new))
            scores = groups * (some.stop - begin) * n_keys  # of a key head
            at_once = max(1, min(n_kv_heads, min(room, IN_CACHE) // scores))
            items += [(slice(i, i + at_once), some) for i in range(0, n_kv_heads, at_once)]
        self._for_each(attend, items[::-1], n_new)  # the last see the most keys
        return o.reshape(q.shape)  # (K, G, T, C) -> (H, T, C)

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

    # -- sampling ------------------------------------------------------------------------------

    def keep_top_p(self, logits: Array, p: float) -> Array:
        """Only what can be among the kept is sorted: all tokens less likely than (1 - p) / V
        together are less likely than 1 - p, so those before them exceed p.

        Measured at V = 32,000, of which 1,000 can: 0.2 of the reference's time.
        """
        probability = self.softmax(logits)
        # half, since the sum of all is rounded; nothing where 1 - p is as small as that
        bound = (1 - p) / logits.shape[-1] / 2 if p < 1 - 1e-5 else 0
        kept = np.empty_like(logits)
        for row, likely, x in zip(kept, probability, logits, strict=True):
            falling = -np.sort(-likely[likely >= bound])
            before = np.cumsum(falling, dtype="float64") - falling
            least = falling[before <= p].min(initial=np.inf)  # of NaN nothing is left
            row[:] = np.where(likely < least, -np.inf, x)
        return kept

    def draw(self, logits: Array, uniform: Array) -> Array:
        """Of a row with few tokens left, among those alone."""
        ids = np.empty(len(logits), dtype="int64")
        for i, x in enumerate(logits):
            is_left, u = x != -np.inf, uniform[i : i + 1]
            if not 0 < np.count_nonzero(is_left) <= len(x) // 4:
                ids[i] = super().draw(x[None], u)[0]
            else:
                left = np.flatnonzero(is_left)
                ids[i] = left[super().draw(x[None, left], u)[0]]  # (1, few) -> (1,)
        return ids

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


def _tokens_at_once(groups: int) -> int:
    return max(1, QUERIES // groups)


def _scratch(scratch: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An array of `shape` in `scratch`, or a new one where that is too small."""
    size = math.prod(shape)
    flat = scratch[:size] if size <= scratch.size else np.empty(size, dtype="float32")
    return flat.reshape(shape)


def _side_by_side(*matrices: Matrix) -> Matrix | None:
    """The matrices as one, a view, where they lie one after the other in memory."""
    values = neighbours([w.values for w in matrices])
    if values is None:
        return None
    scales = [w.scale for w in matrices if w.scale is not None]
    return Matrix(values, np.concatenate(scales) if scales else None)


def _width(part: Part) -> int:
    """D of the model, of which this is a part."""
    if isinstance(part, Layer):
        return part.wq.shape[1]
    return part.lm_head.shape[1] if isinstance(part, Head) else part.shape[1]


def _least_shared(values: np.ndarray, width: int) -> float:
    """Numbers from which on a matrix of a model of this width is shared with workers."""
    if values.dtype != np.float32:
        return SHARED_SIZE
    return SHARED_SMALL_SIZE if width <= SMALL_WIDTH else math.inf


def _shareable(part: Part) -> Part:
    """The part with its matrices for workers where other processes can map them, side by side."""
    width, moving = _width(part), []

    def look(array: Array) -> Array:
        is_of_use = array.ndim == 2 and _least_shared(array, width) < math.inf
        if is_of_use and place_of(array) is None:
            moving.append(array)
        return array

    part.map(look)
    least = max((_least_shared(array, width) for array in moving), default=math.inf)
    if sum(array.size for array in moving) < least:
        return part
    shared = dict(zip(map(id, moving), share(moving), strict=True))
    return part.map(lambda array: shared.get(id(array), array))
