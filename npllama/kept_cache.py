"""Keeps one KV cache for reuse by the next generation."""

from collections import deque

from npllama.kv_cache import KVCache


class KeptCache:
    """Holds at most one cache that no generation uses.

    A captured step can be replayed only with the arrays with which it was captured. With a new
    cache, a generation would have to capture its steps again. This class is thread-safe.
    """

    def __init__(self) -> None:
        self._kept: deque[KVCache] = deque(maxlen=1)  # its operations are atomic

    def put(self, cache: KVCache) -> None:
        """Keep a cache whose generation has ended, instead of the one that was kept before."""
        cache.user = None
        self._kept.append(cache)

    def take(self, batch: int, context: int) -> KVCache | None:
        """Return the kept cache, cleared, if it has `batch` rows of at least `context` positions.

        Otherwise free the kept cache, so that its memory is available for a new one, and return
        None.
        """
        for cache in self._popped():
            if _serves(cache, batch, context):
                cache.clear()
                return cache
        return None

    def serves(self, batch: int, context: int) -> bool:
        """Whether `take` would return a cache."""
        return any(_serves(cache, batch, context) for cache in tuple(self._kept))

    def give_up(self) -> bool:
        """Free the kept cache. Returns False if there was none."""
        return bool(self._popped())

    def _popped(self) -> list[KVCache]:
        """Remove the kept cache, and return it in a list. The list is empty if there was none."""
        try:
            return [self._kept.pop()]
        except IndexError:
            return []


def _serves(cache: KVCache, batch: int, context: int) -> bool:
    """Whether a cache has `batch` rows of at least `context` positions."""
    return len(cache.lengths) == batch and cache.context >= context
