"""The cache of the last generation that was given none, kept for the next."""

from collections import deque

from npllama.kv_cache import KVCache


class KeptCache:
    """One cache at most, while no generation uses it.

    Allocating another would do. But a captured step is replayed on the arrays that it was captured
    with, so each generation would capture its steps anew. Several threads may use this.
    """

    def __init__(self) -> None:
        self._kept: deque[KVCache] = deque(maxlen=1)  # its operations are atomic

    def put(self, cache: KVCache) -> None:
        """Keep a cache whose generation has ended, and no other."""
        cache.user = None
        self._kept.append(cache)

    def take(self, batch: int, context: int) -> KVCache | None:
        """An empty cache of `batch` rows with room for `context` positions.

        None where there is none; one that is too small is given up, before a larger one is made.
        """
        for cache in self._popped():
            if _serves(cache, batch, context):
                cache.clear()
                return cache
        return None

    def serves(self, batch: int, context: int) -> bool:
        """Whether `take` has such a cache."""
        return any(_serves(cache, batch, context) for cache in tuple(self._kept))

    def give_up(self) -> bool:
        """Free its memory; whether there was any."""
        return bool(self._popped())

    def _popped(self) -> list[KVCache]:
        try:
            return [self._kept.pop()]
        except IndexError:
            return []


def _serves(cache: KVCache, batch: int, context: int) -> bool:
    return len(cache.lengths) == batch and cache.context >= context
