"""What NumPy does better than equations.py: fewer bytes moved, fewer calls, all cores.

A decode step is bound by reading the weights, and then by the number of NumPy calls: after each
pass over gigabytes of weights the interpreter's own code and data are out of the cache, and a
call on a few hundred numbers takes 5 to 10 us. A prompt is bound by the products, and then by
everything else, which NumPy computes on one core: what takes a millisecond or more is cut up for
all of them, since waking a thread takes a quarter of that.
"""

import math
from weakref import WeakKeyDictionary

import numpy as np

from npllama.backend import Array, Backend
from npllama.ops.chunks import MANY_ROWS, for_each, in_chunks
from npllama.ops.equations import Equations
from npllama.ops.shared_products import SharedProducts
from npllama.ops.tiles import product
from npllama.parameters import Matrix

QUERIES = 128
"""Queries of a key head that are computed together, G for each token: fewer are too few for a
product, and of more tokens' keys more are computed in vain, since the first do not see them."""

IN_CACHE = 256 * 1024
"""Attention scores that are computed at a time: they go through six operations, from the cache."""

_KEPT, _KEPT_SIZE = 32, 2**20
"""Masks that are kept for the next heads and layers, and the most numbers of one."""

_SIGNS = np.array([[-1], [1]], dtype="float32")
"""Of the two halves of a head: what sin is multiplied by in RoPE."""


class NumpyEquations(Equations):
    """Overrides; each computes what the method of the same name in Equations does.

    Attributes:
        shared: the products that worker processes share (NumpyOps says which, and when).
    """

    shared: SharedProducts

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        # matrices that have been checked for infinities and NaNs, and what came of it
        self._checked: WeakKeyDictionary[Matrix, bool] = WeakKeyDictionary()
        self._hidden: dict[tuple[int, int], np.ndarray] = {}  # by T and N

    def linear(self, x: Array, w: Matrix) -> Array:
        """y = x W^T: (..., D) -> (..., O). A long prompt's result is token-contiguous, which the
        following operations are fastest with."""
        format_ = w.format
        n_out, width = w.shape
        is_one_wide_row = x.size == width and format_.is_wide and not self.shared.has(w)
        if x.dtype != np.float32 or is_one_wide_row:
            return super().linear(x, w)
        if format_.must_be_finite and not self._is_finite(w):
            return super().linear(x, w)
        y = self._product(x.reshape(-1, width), w)  # (..., D) -> (M, D) -> (M, O)
        y = format_.scaled(w, y)
        return y.reshape(*x.shape[:-1], n_out)  # (M, O) -> (..., O)

    def _is_finite(self, w: Matrix) -> bool:
        """Whether tiles widen this matrix right: a float16 matrix with an infinity or a NaN is
        left to the reference, so that it ends in the same NumericalError as in other formats.

        Checked at the first product, not while loading, which would read the whole file: that
        product reads the matrix anyway.
        """
        result = self._checked.get(w)
        if result is None:
            threads = self.backend.threads
            parts = np.array_split(w.values, threads.most)
            result = all(threads.map(lambda part, _slot: w.format.is_finite(part), parts))
            self._checked[w] = result
        return result

    def _product(self, x: np.ndarray, w: Matrix) -> np.ndarray:
        """x (M, D) float32, W (O, D) up to the factors of its rows -> (M, O) float32.

        Computed as y^T = W x^T. Narrow values are widened tile by tile: for few rows by worker
        processes together, who multiply few rows by a small model's float32 matrices as well.
        """
        n_rows, n_out = len(x), w.shape[0]
        threads = self.backend.threads
        is_cut_up = n_rows >= MANY_ROWS
        if is_cut_up and threads.most == 1 and w.format.is_wide:
            return x @ w.values.T  # rows as training's derivatives, which follow, are fastest with
        if self.shared.has(w) and n_rows <= self.shared.most_rows(w):
            y = self.shared.product(x, w)
        else:
            y = np.empty((n_out, n_rows), dtype="float32")
            n = threads.most if is_cut_up else 1
            parts = [slice(n_out * i // n, n_out * (i + 1) // n) for i in range(n)]
            for_each(threads, lambda some, _slot: product(x, w, some, y[some]), parts, n_rows)
        return y.T if is_cut_up else np.ascontiguousarray(y.T)  # (O, M) -> (M, O)

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """x / sqrt(mean(x^2) + eps) * weight, in 3 calls for one row and 7 for several; the
        reference has 8, one of them (mean) written in Python.

        Measured at D = 768, one row: 0.6 of the reference's time. On one core also for a prompt:
        waking threads up takes as long as it does.
        """
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
        y = x * factor
        y *= weight
        return y

    def _sums_of_squares(self, x: np.ndarray) -> np.ndarray:
        """sum over the last axis of x^2: (B, T, D) -> (B, T).

        Where tokens lie side by side, 64 numbers of each at a time and then their sums: one
        after the other they would gather more rounding.
        """
        if x.strides[-1] == x.itemsize:
            return np.vecdot(x, x)
        sums = np.empty((-(-x.shape[-1] // 64), *x.shape[:-1]), dtype="float32")
        for i in range(len(sums)):
            some = x[..., 64 * i : 64 * i + 64]
            np.einsum("...d,...d->...", some, some, out=sums[i])
        return np.add.reduce(sums, axis=0)

    def rope(self, x: Array, cos: Array, sin: Array) -> Array:
        """Each pair turned, both halves of a head in one call; the reference has 12.

        Measured at 512 tokens of 12 heads on two cores: 0.33 of the reference's time.
        """
        if x.dtype != np.float32:
            return super().rope(x, cos, sin)
        if x.strides[-1] != x.itemsize:
            cos, sin = np.asarray(cos, order="F"), np.asarray(sin, order="F")
        half = x.shape[-1] // 2
        halves = x.reshape(*x.shape[:-1], 2, half)  # (B, T, heads, C) -> (B, T, heads, 2, C/2)
        cos, sin = cos[:, :, None, None], sin[:, :, None, None]  # (B, T, C/2) -> (B, T, 1, 1, C/2)
        sin = sin * _SIGNS  # (B, T, 1, 1, C/2) -> (B, T, 1, 2, C/2)
        y = np.empty_like(halves)

        def compute(some: slice) -> None:
            part = np.multiply(halves[:, :, some], cos, out=y[:, :, some])
            part += halves[:, :, some, ::-1] * sin

        batch, n_tokens, n_heads, head_dim = x.shape
        in_chunks(self.backend.threads, compute, n_heads, batch * n_tokens, head_dim)
        return y.reshape(x.shape)

    def attention_weights(self, q: Array, k: Array) -> Array:
        """softmax(q k^T / sqrt(C) + mask), in one array of all scores; the reference has four.

        Measured at 512 tokens of 12 heads: 0.7 of the reference's time.
        """
        n_heads, n_new, head_dim = q.shape
        n_kv_heads, n_keys, _ = k.shape
        k = k.astype(q.dtype, copy=False)
        grouped = q.reshape(n_kv_heads, -1, head_dim)  # (H, T, C) -> (K, G*T, C)
        scores = grouped @ k.swapaxes(1, 2)  # (K, G*T, C) @ (K, C, N) -> (K, G*T, N)
        p = scores.reshape(n_heads, n_new, n_keys)  # -> (H, T, N)
        p *= p.dtype.type(1 / math.sqrt(head_dim))
        _hide(p, self._hidden_keys(n_new, n_keys))
        p /= _exp(p)
        return p

    def _hidden_keys(self, n_new: int, n_keys: int) -> np.ndarray | None:
        """`hidden_keys`, made once for all heads and layers."""
        hidden = self._hidden.get((n_new, n_keys))
        if hidden is None:
            hidden = self.hidden_keys(n_new, n_keys)
            if hidden is not None and hidden.size <= _KEPT_SIZE:
                if len(self._hidden) >= _KEPT:
                    self._hidden.clear()
                self._hidden[n_new, n_keys] = hidden
        return hidden

    def attention(self, q: Array, k: Array, v: Array, scratch: Array | None = None) -> Array:
        """softmax(q k^T / sqrt(C) + mask) v, in place in `scratch`: a few tokens at a time over
        the keys up to theirs, and as many heads as the processor's cache has room for; the
        reference would allocate four arrays of all scores.

        Measured at 512 tokens of 12 heads on two cores: 0.35 of the reference's time.
        """
        n_heads, n_new, head_dim = q.shape
        n_kv_heads, n_keys, _ = k.shape
        groups = n_heads // n_kv_heads
        is_wide = q.dtype == np.float32 and k.dtype == np.float32
        if n_new == 1 or scratch is None or not is_wide:
            return super().attention(q, k, v)
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
            n_some = some.stop - some.start
            _hide(scores.reshape(-1, n_some, end), self._hidden_keys(n_some, end))
            total = _exp(scores)
            part = np.matmul(scores, v[heads, :end])  # (some K, G*few, N) @ (some K, N, C)
            part /= total
            o[heads, :, some] = part.reshape(few.shape[0], groups, -1, head_dim)

        items = []
        for begin in range(0, n_new, tokens_at_once(groups)):
            some = slice(begin, min(begin + tokens_at_once(groups), n_new))
            scores = groups * (some.stop - begin) * n_keys  # of a key head
            at_once = max(1, min(n_kv_heads, min(room, IN_CACHE) // scores))
            items += [(slice(i, i + at_once), some) for i in range(0, n_kv_heads, at_once)]
        for_each(self.backend.threads, attend, items[::-1], n_new)  # the last see the most keys
        return o.reshape(q.shape)  # (K, G, T, C) -> (H, T, C)

    def sigmoid(self, x: Array) -> Array:
        """1 / (1 + e^-x) in one array.

        Measured at 800 x 512 in float32 on one core: 0.2 of the reference's time, most of which
        is its `where`.
        """
        s = _one_plus_exp_minus(x, out=np.empty_like(x))
        return np.reciprocal(s, out=s)

    def swiglu(self, gate: Array, up: Array) -> Array:
        """gate / (1 + e^-gate) * up in one new array.

        Measured at 512 x 2048 on two cores: 0.25 to 0.4 of the reference's time.
        """
        y = np.empty_like(gate)

        def compute(some: slice) -> None:
            part = _one_plus_exp_minus(gate[..., some], out=y[..., some])
            np.divide(gate[..., some], part, out=part)
            part *= up[..., some]

        in_chunks(self.backend.threads, compute, gate.shape[-1], gate.size // gate.shape[-1])
        return y


def _exp(scores: np.ndarray) -> np.ndarray:
    """Put e^(scores - max) in place, (..., N), and return its sums, (..., 1): the softmax is their
    quotient, which a caller may take after the next product, of fewer numbers."""
    scores -= np.maximum.reduce(scores, axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    return np.add.reduce(scores, axis=-1, keepdims=True)


def _one_plus_exp_minus(x: np.ndarray, out: np.ndarray) -> np.ndarray:
    """1 + e^-x in `out`: where e^-x overflows to infinity, what is divided by it becomes 0."""
    np.negative(x, out=out)
    with np.errstate(over="ignore"):
        np.exp(out, out=out)
    out += 1
    return out


def _hide(scores: np.ndarray, hidden: np.ndarray | None) -> None:
    """Put -inf, in place, in scores (heads, T, N) where `hidden`, (T, M) from `hidden_keys`, says
    that a query does not see one of the last M keys."""
    if hidden is not None:
        np.copyto(scores[..., scores.shape[-1] - hidden.shape[1] :], -np.inf, where=hidden)


def tokens_at_once(groups: int) -> int:
    """Tokens whose queries of one key head, G of each, are computed together."""
    return max(1, QUERIES // groups)


def _scratch(scratch: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An array of `shape` in `scratch`, or a new one where that is too small."""
    size = math.prod(shape)
    flat = scratch[:size] if size <= scratch.size else np.empty(size, dtype="float32")
    return flat.reshape(shape)
