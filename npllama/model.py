"""The transformer: embedding, L layers and head, with one forward pass for prefill and decode."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from npllama.backend import Array
from npllama.config import LlamaConfig
from npllama.errors import InputError, OutOfMemoryError
from npllama.kept_cache import KeptCache
from npllama.kv_cache import KVCache, Place, whole_buckets
from npllama.memory import mapped_nbytes, require_free_memory
from npllama.ops import Ops
from npllama.parameters import Layer, Parameters
from npllama.progress import Work, advance, work
from npllama.sampling_options import is_integer


@dataclass(frozen=True)
class Trace:
    """The hidden states and attention weights of all layers.

    Attributes:
        hidden: (L+1, T, D) float32. hidden[0] is the embedding, and hidden[i] is the output of
            layer i-1.
        attention: (L, H, T, T) float32. attention[i, h, t] contains the attention weights of token
            t in head h of layer i. They are 0 for later tokens.
    """

    hidden: np.ndarray
    attention: np.ndarray


class Transformer:
    """LLaMA-2 as a function of its parameters.

    Args:
        config: the model's configuration.
        parameters: the weights, on the backend's device.
        ops: the mathematics.
        context: the maximum number of positions per row of a cache; by default the config's
            context length.
        cache_dtype: the dtype of cached keys and values; by default the choice of `ops`.

    Attributes:
        rotation: the rotary frequencies, for inference and training.
        rope_table: the cosines and sines of these frequencies.
        sizes: the config, but with H, K and F of these parameters, which may be one shard's.
    """

    def __init__(
        self,
        config: LlamaConfig,
        parameters: Parameters,
        ops: Ops,
        context: int | None = None,
        cache_dtype: np.dtype | str | None = None,
    ) -> None:
        self.config = config
        self.sizes = _sizes(config, parameters.layers[0])
        self.parameters = parameters
        self.ops = ops
        self.backend = ops.backend
        self.context = context or config.context_length
        if cache_dtype is None:
            cache_dtype = ops.cache_dtype(parameters.layers[0].wq.values.dtype)
        self.cache_dtype = np.dtype(cache_dtype)
        self.rotation = ops.rope_frequencies(config, self.context)
        self.rope_table = ops.rope_table(self.context, self.rotation)
        self._kept_cache = KeptCache()

    def new_cache(self, batch: int = 1, context: int | None = None) -> KVCache:
        """Allocate an empty cache.

        Args:
            batch: the number of rows.
            context: positions per row; by default the model's context.

        Raises:
            InputError: batch is not an integer from 1, or context is not an integer from 1 to the
                model's context.
        """
        sizes = self.sizes
        context = self.context if context is None else context
        are_whole = is_integer(context) and is_integer(batch)
        if not are_whole or not 1 <= context <= self.context or batch < 1:
            raise InputError(
                f"a cache of {batch!r:.60} rows and {context!r:.60} positions: expected at least 1 "
                f"row, and 1 to {self.context} positions"
            )
        batch, context = int(batch), int(context)  # not NumPy's, which may be narrow
        chunk = min(self.ops.prefill_chunk(), context)
        self.backend.use()
        return KVCache(
            self.backend,
            self.rope_table,
            n_layers=sizes.n_layers,
            n_kv_heads=sizes.n_kv_heads,
            head_dim=sizes.head_dim,
            batch=batch,
            context=context,
            dtype=self.cache_dtype,
            scratch_size=self.ops.scratch_size(sizes.n_heads, sizes.n_kv_heads, chunk, context),
        )

    def check_own_cache(self, cache: KVCache) -> None:
        """Raise InputError if the cache is not from `new_cache` of this model."""
        if not isinstance(cache, KVCache) or cache.rope_table is not self.rope_table:
            raise InputError("the cache is not this model's: expected one from its new_cache")

    def take_cache(self, batch: int, n_positions: int) -> KVCache:
        """An empty cache for a generation whose caller provides none.

        It has `batch` rows of at least n_positions positions. It is the cache of the last
        generation if `give_cache_back` kept one that fits.
        """
        context = self._own_context(n_positions)
        return self._kept_cache.take(batch, context) or self.new_cache(batch, context)

    def give_cache_back(self, cache: KVCache) -> None:
        """Return a cache, which is kept for the next generation if `ops.keeps_caches` is true."""
        if self.ops.keeps_caches:
            self._kept_cache.put(cache)

    def _own_context(self, n_positions: int) -> int:
        """The positions per row that `take_cache` allocates. A cache that may be kept gets whole
        buckets, because the next prompt may be longer."""
        if self.ops.keeps_caches:
            return min(whole_buckets(n_positions), self.context)
        return n_positions

    def check_memory(self, batch: int, context: int, more: int = 0) -> None:
        """Check that the free memory can hold a cache of `batch` rows of `context` positions and
        `more` bytes, besides the weights. If it cannot, the kept cache is freed and the check is
        repeated.

        Raises:
            OutOfMemoryError: the memory is not sufficient.
        """
        self._check_memory(batch, context, more)

    def check_own_memory(self, batch: int, n_positions: int) -> None:
        """`check_memory` for the cache that `take_cache` would return."""
        context = self._own_context(n_positions)
        self._check_memory(batch, context, has_cache=self._kept_cache.serves(batch, context))

    def rows_that_fit(self, most: int, n_positions: int) -> int:
        """The maximum number of rows, up to `most`, that fit the free memory in `take_cache`.

        Raises:
            OutOfMemoryError: one row does not fit.
        """
        fits, too_many = 0, most + 1
        rows = most  # tries all rows first, and then bisects
        while too_many - fits > 1:
            try:
                self.check_own_memory(rows, n_positions)
                fits = rows
            except OutOfMemoryError:
                if rows == 1:
                    raise
                too_many = rows
            rows = (fits + too_many) // 2
        return fits

    def _check_memory(
        self, batch: int, context: int, more: int = 0, has_cache: bool = False
    ) -> None:
        check = partial(
            require_free_memory,
            self.sizes,
            self.ops,
            self.cache_dtype,
            batch,
            context,
            min(self.ops.prefill_chunk(), context),
            # the system counts the memory of mapped weights as free, but using it evicts them
            weights=mapped_nbytes(self.parameters),
            more=more,
        )
        try:
            check(has_cache=has_cache)
        except OutOfMemoryError:
            if not self._kept_cache.give_up():
                raise
            check()

    def forward(
        self,
        tokens: Array,
        cache: KVCache,
        rows: tuple[int, ...] | None = None,
        n_last: int = 1,
    ) -> Array:
        """Compute the logits of the next token, and append the new tokens to the cache.

        Args:
            tokens: (B, T) integers on the device. Row b continues row rows[b] of the cache.
            rows: B rows of the cache, which may be at different positions; None for all rows.
            n_last: compute logits only for the last n_last of the T positions.

        Returns:
            (B, n_last, V) float32.

        Raises:
            InputError: T more positions do not fit the cache, or n_last is not between 0 and T.
        """
        if not 0 <= n_last <= tokens.shape[1]:
            raise InputError(f"n_last is {n_last}: expected 0 to the {tokens.shape[1]} new tokens")
        place = cache.place(tokens.shape[1], rows)
        logits = self.compute(tokens, cache, place, n_last)
        cache.advance(place.rows, [place.n_new] * len(place.rows))
        return logits

    def compute(self, tokens: Array, cache: KVCache, place: Place, n_last: int = 1) -> Array:
        """The part of `forward` that runs on the device, and that a CUDA graph can capture.

        It does not advance the cache's lengths on the host. For the positions that need no logits,
        the last layer computes only keys and values.

        Args:
            tokens, n_last: as in `forward`.
            place: the rows and positions of the tokens, from `cache.place`.

        Returns:
            (B, n_last, V) float32.
        """
        ops, parameters = self.ops, self.parameters
        last = len(parameters.layers) - 1
        with ops.forward_context(tokens.size):
            positions = cache.on_device(place)
            x = ops.embed(tokens, parameters.embedding)  # (B, T) -> (B, T, D)
            for i, (layer, layer_cache) in enumerate(
                zip(parameters.layers, cache.layers, strict=True)
            ):
                n = max(n_last, 1) if i == last else None  # at least 1, to avoid empty arrays
                x = ops.attention_block(x, layer, layer_cache, positions, n)  # -> (B, n, D)
                x = ops.feed_forward(x, layer)
                advance(tokens.size)
            if n_last == 0:
                shape = (len(x), 0, self.config.vocab_size)
                logits = self.backend.xp.zeros(shape, dtype="float32")
            else:
                logits = ops.head(x, parameters.head)  # (B, n, D) -> (B, n, V)
            cache.advance_on_device(place)  # comes last, so an error leaves the cache unchanged
            return logits

    def prefill(
        self, ids: Sequence[int], cache: KVCache, row: int = 0, chunk: int | None = None
    ) -> Array:
        """Append a prompt, or the rest of one, to a row of the cache, in chunks.

        The head runs only for the last position.

        Args:
            ids: the token ids.
            row: the row of the cache.
            chunk: tokens per forward pass, by default `ops.prefill_chunk()`. The logits do not
                depend on it.

        Returns:
            The logits of the next token, (1, V) float32.
        """
        chunk = chunk or self.ops.prefill_chunk()
        tokens = self.to_tokens(ids)
        with self.reading(len(ids)):
            for begin in range(0, len(ids), chunk):
                is_last = begin + chunk >= len(ids)
                part = tokens[None, begin : begin + chunk]  # (T,) -> (1, chunk)
                is_known = len(cache.ids[row]) == cache.lengths[row]
                logits = self.forward(part, cache, (row,), n_last=1 if is_last else 0)
                if is_known:
                    cache.ids[row] += map(int, ids[begin : begin + chunk])
        return logits[:, 0]  # (1, 1, V) -> (1, V)

    def reading(
        self, n_tokens: int, what: str = "reading the prompt"
    ) -> AbstractContextManager[Work]:
        """A context manager that reports the progress of forward passes over `n_tokens` tokens. The
        unit of progress is one layer of one token."""
        return work(what, n_tokens * self.config.n_layers)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Teacher-forced logits: row t contains the logits of the token after ids[0], ..., ids[t].

        Returns:
            (T, V) float32 NumPy array.

        Raises:
            InputError: no ids, ids outside the vocabulary, or more ids than the context.

        >>> import npllama
        >>> logits = npllama.load().logits([1, 100, 101])
        >>> logits.shape, logits.dtype.name
        ((3, 1024), 'float32')
        """
        tokens = self.to_tokens(ids)
        chunk = self.ops.prefill_chunk()
        n_rows = len(ids) + min(len(ids), chunk)  # the result, and the logits of one chunk
        self.check_memory(1, len(ids), more=4 * n_rows * self.config.vocab_size)
        cache = self.new_cache(context=len(ids))
        out = np.empty((len(ids), self.config.vocab_size), dtype="float32")
        with self.reading(len(ids)):
            for begin in range(0, len(ids), chunk):
                part = tokens[None, begin : begin + chunk]
                logits = self.forward(part, cache, n_last=part.shape[1])  # (1, chunk, V)
                out[begin : begin + chunk] = self.backend.to_host(logits[0])
        return out

    def trace(self, ids: Sequence[int]) -> Trace:
        """The hidden states and attention weights of every layer for `ids`; see Trace.

        `attention_map` recomputes the attention weights from the input of each layer. The result
        has about L * H * T^2 elements.

        Raises:
            InputError: as in `logits`.

        >>> import npllama
        >>> trace = npllama.load().trace([1, 100, 101])
        >>> trace.hidden.shape, trace.attention.shape  # (L+1, T, D), (L, H, T, T)
        ((7, 3, 192), (6, 6, 3, 3))
        """
        ops, to_host = self.ops, self.backend.to_host
        tokens = self.to_tokens(ids)
        c, n = self.sizes, len(ids)
        maps = (c.n_layers * 2 + 4) * c.n_heads * n * n  # separate, stacked and intermediate maps
        self.check_memory(1, n, more=4 * (maps + 2 * (c.n_layers + 1) * n * c.dim))
        cache = self.new_cache(context=len(ids))
        positions = cache.positions(len(ids))
        with ops.forward_context(len(ids)):
            x = ops.embed(tokens[None], self.parameters.embedding)  # (T,) -> (1, T, D)
            hidden, attention = [to_host(x[0]).copy()], []
            for layer, layer_cache in zip(self.parameters.layers, cache.layers, strict=True):
                attention.append(to_host(ops.attention_map(x, layer, positions)))  # (H, T, T)
                x = ops.attention_block(x, layer, layer_cache, positions)
                x = ops.feed_forward(x, layer)
                hidden.append(to_host(x[0]).copy())
        return Trace(np.stack(hidden), np.stack(attention))

    def to_tokens(self, ids: Sequence[int]) -> Array:
        """Check token ids, and copy them to the device: T ids -> (T,) int32.

        Raises:
            InputError: no ids, ids outside the vocabulary, or more ids than the context.
        """
        if isinstance(ids, str | bytes):
            raise InputError("found a text: expected token ids, which llama.encode(text) returns")
        try:
            n = len(ids)
        except TypeError:
            raise InputError(f"found {ids!r:.60}: expected a list of token ids") from None
        if n == 0:
            raise InputError("there are no token ids: expected at least one, such as BOS")
        for i, id_ in enumerate(ids):
            if isinstance(id_, bool) or not isinstance(id_, int | np.integer):
                raise InputError(f"token id {id_!r} at position {i} is not an integer")
            if not 0 <= id_ < self.config.vocab_size:
                raise InputError(
                    f"token id {id_} at position {i} is outside the vocabulary of "
                    f"{self.config.vocab_size}"
                )
        if n > self.context:
            most = self.config.longest_context
            what = f"shorten the prompt; the model was trained for {most} positions"
            if n <= most:
                what = f"shorten the prompt, or give --context (context= in Python) up to {most}"
            raise InputError(f"{n} tokens do not fit the context of {self.context}: {what}")
        return self.backend.to_device(np.asarray(ids, dtype="int32"))


def _sizes(config: LlamaConfig, layer: Layer) -> LlamaConfig:
    """`config` with the numbers of heads and the ffn width of a layer's weights."""
    n_heads, n_kv_heads = (w.shape[0] // config.head_dim for w in (layer.wq, layer.wk))
    return replace(config, n_heads=n_heads, n_kv_heads=n_kv_heads, ffn_dim=layer.w_gate.shape[0])
