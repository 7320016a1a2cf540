"""The KV cache: keys and values of all past positions, in buffers that are allocated once.

A generation step reads all past keys and values, and computes only the new ones. The buffers are
allocated for the whole context and are then written in place.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from npllama.backend import Array, Backend
from npllama.decode_step import StepBuffers
from npllama.errors import InputError

BUCKET = 256
"""An operation whose shape depends on the length of a row rounds this length up to a multiple of
BUCKET. A step that is captured for one bucket can then be replayed for all lengths in it."""


def whole_buckets(length: int) -> int:
    """A length, rounded up to a multiple of BUCKET."""
    return -(-length // BUCKET) * BUCKET


def common_length(held: Sequence[int], ids: Sequence[int]) -> int:
    """The length of the common prefix of a list of ids and a prompt.

    The last id of the prompt does not count: the model reads it in any case, since it predicts the
    next token.
    """
    most = min(len(held), max(len(ids) - 1, 0))
    pairs = enumerate(zip(held[:most], ids, strict=False))
    return next((i for i, (one, other) in pairs if one != other), most)


@dataclass(frozen=True)
class Place:
    """Where the T new tokens of each of B rows go, as the host knows it.

    Attributes:
        rows: B rows of the cache.
        starts: S of each row, the position of its first new token, as host integers.
        n_new: T.
        bucket: N of the longest row, rounded up to a multiple of BUCKET and at most the context.
        device_rows: (B,) int32, `rows` on the device.
    """

    rows: tuple[int, ...]
    starts: tuple[int, ...]
    n_new: int
    bucket: int
    device_rows: Array


@dataclass(frozen=True)
class Positions(Place):
    """A place, and the same positions on the device.

    NumPy slices by the host's integers. A replayed step reads only the arrays, because the host's
    integers are still those of the step that was captured.

    Attributes:
        device_starts: (B,) int32, `starts` on the device.
        cos, sin: (B, T, C/2), the rotation of each new token.
    """

    device_starts: Array
    cos: Array
    sin: Array


@dataclass(frozen=True)
class LayerCache:
    """One layer's part of the cache: k and v (B, K, context, C), and the shared scratch."""

    k: Array
    v: Array
    scratch: Array | None = None

    def write(self, k: Array, v: Array, positions: Positions) -> None:
        """Put k and v (B, T, K, C) at their rows' positions S .. S+T-1, in place."""
        for b, (row, start) in enumerate(zip(positions.rows, positions.starts, strict=True)):
            new = slice(start, start + positions.n_new)
            self.k[row, :, new] = k[b].swapaxes(0, 1)  # (T, K, C) -> (K, T, C)
            self.v[row, :, new] = v[b].swapaxes(0, 1)


class KVCache:
    """Keys and values of `batch` rows, each with room for `context` positions.

    Memory: 2 * L * B * K * context * C elements of `dtype`, and `scratch_size` of float32.
    Rows are ragged: they may have different lengths, and there is no padding.

    Attributes:
        layers: a LayerCache per layer.
        lengths: number of filled positions per row, as host integers.
        device_lengths: (batch,) int32, the same on the device.
        ids: the token ids of each row, if `Transformer.prefill` or a generation wrote them. A row
            may have more positions than known ids.
        user: the generation that writes to the cache now, or None.
        step_buffers: the other arrays that a decode step reads and writes.
        captured: the steps that `Ops.compile` has captured with the addresses of these arrays.
    """

    def __init__(
        self,
        backend: Backend,
        rope_table: tuple[Array, Array],
        *,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        batch: int,
        context: int,
        dtype: np.dtype | str,
        scratch_size: int = 0,
    ) -> None:
        xp = backend.xp
        self.backend = backend
        self.rope_table = rope_table
        self.context = context
        shape = (n_layers, batch, n_kv_heads, context, head_dim)
        scratch = xp.empty(scratch_size, dtype="float32") if scratch_size else None
        k, v = self._all = xp.zeros(shape, dtype=dtype), xp.zeros(shape, dtype=dtype)
        self.layers = tuple(LayerCache(k[i], v[i], scratch) for i in range(n_layers))
        self.lengths = [0] * batch
        self.ids: list[list[int]] = [[] for _ in range(batch)]
        self.user: object = None
        self.step_buffers = StepBuffers(backend, batch, context)
        self.captured: object = None
        self.device_lengths = xp.zeros(batch, dtype="int32")
        self._new = xp.arange(context, dtype="int32")
        self._device_rows = {tuple(range(batch)): xp.arange(batch, dtype="int32")}

    @property
    def dtype(self) -> np.dtype:
        """The dtype of keys and values."""
        return self._all[0].dtype

    def __repr__(self) -> str:
        least, most = min(self.lengths), max(self.lengths)
        filled = f"{least}" if least == most else f"{least} to {most}"
        size = sum(buffer.nbytes for buffer in self._all) / 1e6
        return (
            f"<KVCache of {len(self.lengths)} x {self.context} positions, {filled} filled in each "
            f"row, {self._all[0].dtype.name}, {size:.1f} MB>"
        )

    @staticmethod
    def nbytes(
        n_layers: int, n_kv_heads: int, head_dim: int, batch: int, context: int, itemsize: int
    ) -> int:
        """Bytes of keys and values in a cache of these sizes, without its scratch."""
        return 2 * n_layers * batch * n_kv_heads * context * head_dim * itemsize

    def place(
        self, n_new: int, rows: tuple[int, ...] | None = None, device_rows: Array | None = None
    ) -> Place:
        """Where the next `n_new` tokens of `rows` (default: all) go, computed on the host.

        Args:
            device_rows: (B,) int32, `rows` on the device, if the caller has them there.

        Raises:
            InputError: they do not fit; the cache is unchanged.
        """
        rows = tuple(range(len(self.lengths))) if rows is None else tuple(rows)
        starts = tuple(self.lengths[row] for row in rows)
        end = max(starts) + n_new
        if end > self.context:
            raise InputError(
                f"{max(starts)} positions are filled and {n_new} more do not fit: "
                f"the cache has room for {self.context}"
            )
        if device_rows is None:
            if rows not in self._device_rows:
                self._device_rows[rows] = self.backend.to_device(np.asarray(rows, dtype="int32"))
            device_rows = self._device_rows[rows]
        return Place(rows, starts, n_new, min(whole_buckets(end), self.context), device_rows)

    def on_device(self, place: Place) -> Positions:
        """The positions of a place, gathered on the device without reading `starts`."""
        device_starts = self.device_lengths[place.device_rows]  # (batch,) -> (B,), a copy
        at = device_starts[:, None] + self._new[: place.n_new]  # (B, 1) + (T,) -> (B, T)
        cos, sin = (table[at] for table in self.rope_table)  # (context, C/2) -> (B, T, C/2)
        return Positions(**vars(place), device_starts=device_starts, cos=cos, sin=sin)

    def positions(self, n_new: int, rows: tuple[int, ...] | None = None) -> Positions:
        """`place`, then `on_device`."""
        return self.on_device(self.place(n_new, rows))

    def advance_on_device(self, place: Place) -> None:
        """Add the new tokens of a place to `device_lengths`."""
        if len(place.device_rows) == len(self.device_lengths):
            self.device_lengths += place.n_new
        else:
            self.device_lengths[place.device_rows] += place.n_new

    def advance(self, rows: Sequence[int], n_new: Sequence[int]) -> None:
        """Add n_new[i] to the length of row rows[i], on the host."""
        for row, n in zip(rows, n_new, strict=True):
            self.lengths[row] += n

    def truncate(self, row: int, length: int) -> None:
        """Remove all but the first `length` positions of a row.

        Raises:
            InputError: there is no such row, or it has fewer positions.
        """
        self.check_row(row)
        if not 0 <= length <= self.lengths[row]:
            raise InputError(
                f"row {row} of the cache holds {self.lengths[row]} positions: "
                f"it cannot be truncated to {length}"
            )
        self.backend.use()
        self.lengths[row] = length
        self.device_lengths[row] = length
        del self.ids[row][length:]

    def check_row(self, row: int) -> None:
        """Raise InputError if the cache has no such row."""
        if not 0 <= row < len(self.lengths):
            raise InputError(f"the cache has {len(self.lengths)} rows: there is no row {row}")

    def buffers(self, row: int) -> Iterator[Array]:
        """Views of a row: k and v, (K, context, C) each, layer by layer."""
        return (buffer[row] for layer in self.layers for buffer in (layer.k, layer.v))

    def fill(self, row: int, ids: Sequence[int], arrays: Iterable[Array]) -> None:
        """Replace the content of a row.

        Args:
            ids: the new token ids.
            arrays: their keys and values (K, len(ids), C), in the order of `buffers`, on the
                device and finite. If the iteration raises an error, the row is empty.
        """
        self.truncate(row, 0)
        for buffer, array in zip(self.buffers(row), arrays, strict=True):
            buffer[:, : len(ids)] = array
        self.lengths[row] = len(ids)
        self.device_lengths[row] = len(ids)
        self.ids[row] = list(ids)

    def clear_row(self, row: int) -> None:
        """Remove all positions of a row and fill its buffers with 0; see `clear`."""
        for buffer in self._all:  # (L, B, K, context, C)
            buffer[:, row] = 0
        self.truncate(row, 0)

    def clear(self) -> None:
        """Remove all positions and fill the buffers with 0.

        Attention multiplies masked positions by 0, so an element there that is not finite would
        change the result.
        """
        self.backend.use()
        for buffer in self._all:
            buffer[...] = 0
        self.device_lengths[...] = 0
        self.lengths = [0] * len(self.lengths)
        self.ids = [[] for _ in self.ids]

    def keep(self, row: int, ids: Sequence[int]) -> int:
        """Truncate a row to the first ids that it has in common with a prompt.

        The last id of the prompt is never kept (see `common_length`). A generation then accepts
        the prompt with this cache.

        Returns:
            The number of positions that the row keeps.

        Raises:
            InputError: there is no such row, or the prompt has no ids.

        >>> from npllama import load
        >>> llama = load()
        >>> cache = llama.new_cache()
        >>> _ = llama.prefill([1, 5, 6, 7], cache)
        >>> cache.keep(0, [1, 5, 8, 9])
        2
        """
        self.check_row(row)
        if len(ids) == 0:
            raise InputError("the prompt has no ids: expected at least one")
        kept = self._common_length(row, ids)
        self.truncate(row, kept)
        return kept

    def _common_length(self, row: int, ids: Sequence[int]) -> int:
        """`common_length` of the row's ids and a prompt."""
        return common_length(self.ids[row][: self.lengths[row]], ids)

    def check_prefix(self, row: int, ids: Sequence[int]) -> None:
        """Raise InputError unless the ids of a row are a prefix of the prompt, without the
        prompt's last id; see `common_length`."""
        n_known, length = len(self.ids[row]), self.lengths[row]
        if len(ids) > self.context:
            raise InputError(f"{len(ids)} tokens do not fit the cache of {self.context} positions")
        if n_known != length:
            raise InputError(
                f"row {row} of the cache holds {length} positions, of which the ids of "
                f"{n_known} are known: cache.truncate({row}, {n_known}) keeps those"
            )
        keep = self._common_length(row, ids)
        if keep < length:
            raise InputError(
                f"row {row} of the cache holds {length} ids, of which the prompt can reuse the "
                f"first {keep}: call cache.truncate({row}, {keep}) first"
            )
