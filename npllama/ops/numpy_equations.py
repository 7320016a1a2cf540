"""Faster equations for NumPy: fewer bytes moved, fewer calls, all cores.

A decode step spends most of its time reading the weights. The overhead of NumPy calls comes second:
reading the weights evicts the interpreter's code and data from the processor's cache, so every call
on a small array is slow. The overrides therefore make fewer calls.

Prefilling a prompt spends most of its time in matrix products. The other operations come second,
because NumPy computes them on one core. The overrides therefore split the longer of these
operations over all cores. For the shorter ones, waking threads costs more time than it saves.

Measurements: tools/README.md.
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
"""The number of queries of one key head in one attention product. A token has G queries per key
head, so a product has QUERIES / G tokens.

A product with fewer queries is inefficient. More queries waste work: a product computes the score
of each of its queries for all keys up to the position of its last query, and the mask then discards
the scores of later keys."""

IN_CACHE = 256 * 1024
"""The maximum number of attention scores per product, unless one key head alone has more. Several
operations read the scores one after another, so the scores should fit the processor's cache."""

_KEPT, _KEPT_SIZE = 32, 2**20
"""The maximum number of masks that are cached, and the maximum number of elements of a cached
mask."""

_SIGNS = np.array([[-1], [1]], dtype="float32")
"""The factors of sin in RoPE, for the first and the second half of a head."""


class NumpyEquations(Equations):
    """Overrides. Each computes the same result as the method of that name in Equations.

    Attributes:
        shared: the products that worker processes help to compute. NumpyOps sets it.
    """

    shared: SharedProducts

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        # matrix -> whether all its elements are finite, for the matrices checked so far
        self._checked: WeakKeyDictionary[Matrix, bool] = WeakKeyDictionary()
        self._hidden: dict[tuple[int, int], np.ndarray] = {}  # (T, N) -> mask

    def linear(self, x: Array, w: Matrix) -> Array:
        """y = x W^T: (..., D) -> (..., O).

        For many rows, y is usually a transposed view of the array y^T (O, M) that `_product`
        computes. In memory, output o of token m is then next to output o of token m + 1, and not
        next to output o + 1 of token m. The overrides of the forward pass are fast in this layout.
        If W is float32 and npllama may use only one thread, y is contiguous instead.
        """
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
        """Whether all elements of a float16 matrix are finite.

        A float16 matrix is widened in tiles of some rows (see tiles.py), by integer operations that
        give wrong results for infinities and NaNs. The reference therefore computes the products
        with a matrix that contains infinities or NaNs. The model then raises the same
        NumericalError as in other formats.

        The check runs at the first product, which has to read the matrix anyway. A check while the
        model is loaded would read the whole file.
        """
        result = self._checked.get(w)
        if result is None:
            threads = self.backend.threads
            parts = np.array_split(w.values, threads.most)
            result = all(threads.map(lambda part, _slot: w.format.is_finite(part), parts))
            self._checked[w] = result
        return result

    def _product(self, x: np.ndarray, w: Matrix) -> np.ndarray:
        """y = x W^T without the scale of W's rows: x (M, D) float32, W (O, D) -> (M, O) float32.

        y is usually computed as y^T = W x^T. Elements smaller than float32 are widened tile by
        tile. For few rows, worker processes may compute parts of the product (shared_products.py
        decides for which matrices).
        """
        n_rows, n_out = len(x), w.shape[0]
        threads = self.backend.threads
        is_cut_up = n_rows >= MANY_ROWS
        if is_cut_up and threads.most == 1 and w.format.is_wide:
            # one thread needs no parts; the outputs of a token are contiguous in this result, which
            # is the fastest layout for the derivatives in training
            return x @ w.values.T
        if self.shared.has(w) and n_rows <= self.shared.most_rows(w):
            y = self.shared.product(x, w)
        else:
            y = np.empty((n_out, n_rows), dtype="float32")
            n = threads.most if is_cut_up else 1
            parts = [slice(n_out * i // n, n_out * (i + 1) // n) for i in range(n)]
            for_each(threads, lambda some, _slot: product(x, w, some, y[some]), parts, n_rows)
        return y.T if is_cut_up else np.ascontiguousarray(y.T)  # (O, M) -> (M, O)

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """x / sqrt(mean(x^2) + eps) * weight, with fewer NumPy calls than the reference.

        It uses one core even for a prompt, because waking threads would take as long as the
        computation.
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
        """The sum of x^2 over the last axis: (B, T, D) -> (B, T).

        If the elements of a token are not contiguous in memory (see `linear`), NumPy adds them one
        after another, which accumulates rounding errors. Partial sums of 64 elements keep the error
        small.
        """
        if x.strides[-1] == x.itemsize:
            return np.vecdot(x, x)
        sums = np.empty((-(-x.shape[-1] // 64), *x.shape[:-1]), dtype="float32")
        for i in range(len(sums)):
            some = x[..., 64 * i : 64 * i + 64]
            np.einsum("...d,...d->...", some, some, out=sums[i])
        return np.add.reduce(sums, axis=0)

    def rope(self, x: Array, cos: Array, sin: Array) -> Array:
        """RoPE with both halves of a head in each NumPy call, and on all cores for many rows."""
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
        """softmax(q k^T / sqrt(C) + mask), computed in-place in one array of scores.

        The reference holds up to three arrays of that size at the same time.
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
        """The mask from `hidden_keys`, cached because other heads and layers need the same mask."""
        hidden = self._hidden.get((n_new, n_keys))
        if hidden is None:
            hidden = self.hidden_keys(n_new, n_keys)
            if hidden is not None and hidden.size <= _KEPT_SIZE:
                if len(self._hidden) >= _KEPT:
                    self._hidden.clear()
                self._hidden[n_new, n_keys] = hidden
        return hidden

    def attention(self, q: Array, k: Array, v: Array, scratch: Array | None = None) -> Array:
        """softmax(q k^T / sqrt(C) + mask) v, with the scores in `scratch`.

        The work is divided into items, which the threads compute. An item has some of the tokens,
        some of the key heads, and the keys up to the position of its last token. Its scores should
        fit one thread's part of `scratch` and the processor's cache. It therefore has as many key
        heads as fit, but at least one. The reference holds up to three arrays with the scores of
        all tokens at the same time.
        """
        n_heads, n_new, head_dim = q.shape
        n_kv_heads, n_keys, _ = k.shape
        groups = n_heads // n_kv_heads
        is_wide = q.dtype == np.float32 and k.dtype == np.float32
        if n_new == 1 or scratch is None or not is_wide:
            return super().attention(q, k, v)
        grouped = q.reshape(n_kv_heads, groups, n_new, head_dim)  # (H, T, C) -> (K, G, T, C)
        o = np.empty((n_new, n_kv_heads, groups, head_dim), dtype="float32")
        o = o.transpose(1, 2, 0, 3)  # (T, K, G, C) -> (K, G, T, C), a view
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
            scores = groups * (some.stop - begin) * n_keys  # elements per key head
            at_once = max(1, min(n_kv_heads, min(room, IN_CACHE) // scores))
            items += [(slice(i, i + at_once), some) for i in range(0, n_kv_heads, at_once)]
        # items with later tokens take longer, because they have more keys: start the longest first
        for_each(self.backend.threads, attend, items[::-1], n_new)
        return o.reshape(q.shape)  # (K, G, T, C) -> (H, T, C)

    def sigmoid(self, x: Array) -> Array:
        """1 / (1 + e^-x), computed in-place in one new array, without the reference's `where`."""
        s = _one_plus_exp_minus(x, out=np.empty_like(x))
        return np.reciprocal(s, out=s)

    def swiglu(self, gate: Array, up: Array) -> Array:
        """gate / (1 + e^-gate) * up, computed in-place in one new array, and on all cores for many
        rows."""
        y = np.empty_like(gate)

        def compute(some: slice) -> None:
            part = _one_plus_exp_minus(gate[..., some], out=y[..., some])
            np.divide(gate[..., some], part, out=part)
            part *= up[..., some]

        in_chunks(self.backend.threads, compute, gate.shape[-1], gate.size // gate.shape[-1])
        return y


def _exp(scores: np.ndarray) -> np.ndarray:
    """Replace scores (..., N) with e^(scores - max), and return the sums of these, (..., 1).

    The softmax is the new `scores` divided by the sums. A caller may instead multiply the new
    `scores` by the values and divide the product by the sums. This is faster, because the product
    usually has fewer elements than the scores.
    """
    scores -= np.maximum.reduce(scores, axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    return np.add.reduce(scores, axis=-1, keepdims=True)


def _one_plus_exp_minus(x: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Write 1 + e^-x to `out`. If e^-x overflows to infinity, the callers divide by infinity and
    get 0, the limit."""
    np.negative(x, out=out)
    with np.errstate(over="ignore"):
        np.exp(out, out=out)
    out += 1
    return out


def _hide(scores: np.ndarray, hidden: np.ndarray | None) -> None:
    """Apply the mask to scores (heads, T, N) in-place: set the scores of hidden keys to -inf.

    Args:
        hidden: the mask of the last n keys, (T, n) bool, or None, as returned by `hidden_keys`.
    """
    if hidden is not None:
        np.copyto(scores[..., scores.shape[-1] - hidden.shape[1] :], -np.inf, where=hidden)


def tokens_at_once(groups: int) -> int:
    """The number of tokens per attention product. A token has G = groups queries per key head."""
    return max(1, QUERIES // groups)


def _scratch(scratch: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array of `shape` in the memory of `scratch`, or a new array if `scratch` is too
    small."""
    size = math.prod(shape)
    flat = scratch[:size] if size <= scratch.size else np.empty(size, dtype="float32")
    return flat.reshape(shape)
