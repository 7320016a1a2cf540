"""How many threads compute: as many as a user asks for, or as many cores as are free.

More threads than free cores is a disaster: threads of BLAS wait for one another, and one that
has lost its core to another program holds up all of them (measured: 31 us become 4 ms).
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from npllama.operating_system import (
    allowed_cores,
    busy_seconds,
    process_seconds,
    running_threads,
    usable_cores,
)

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

_INTERVAL = 0.25
"""Seconds between two looks at what other programs do."""

_STALE = 1.0
"""Seconds after which the last look is too long ago."""


class Threads:
    """The number of threads to compute with, and the means to use them.

    Args:
        n: that many; None for as many as there are free cores, and no more than NumPy's BLAS
            is set to (OPENBLAS_NUM_THREADS and the like).

    Attributes:
        most: the number that `count` never exceeds.
        helpers: ids of processes that compute for this one, and so are no other programs.
    """

    def __init__(self, n: int | None = None) -> None:
        self._fixed = n
        self.helpers: list[int] = []
        self._lock = threading.Lock()
        self._owner = os.getpid()

    @cached_property
    def most(self) -> int:
        if self._fixed is not None:
            return self._fixed
        return min([usable_cores(), *_blas_limits()])

    @property
    def count(self) -> int:
        """How many to use now."""
        return self.most if self._fixed is not None else min(self.most, self._free.count())

    def turn(self) -> AbstractContextManager:
        """A context that one thread of the program is in at a time; others wait for it.

        BLAS has one number of threads for the whole process, and two forwards at once would take
        the cores from each other. Contexts of one thread nest. A fork waits for its turn as well:
        OpenBLAS hangs in both processes where one is made during another thread's product.
        """
        _guard_forks()
        return _turn

    def give_way(self) -> None:
        """Let a thread that waits for its turn have it; for nothing where none does."""
        if _turn.waiting:
            time.sleep(0.0005)  # long enough for it to wake up

    @contextlib.contextmanager
    def blas(self, n: int) -> Iterator[None]:
        """A `turn` in which products of NumPy's BLAS use n threads; it restores their number."""
        with self.turn(), _numbers_restored():
            before = _numbers_of_threads()
            try:
                _set_blas([n] * len(before))
                yield
            finally:
                _set_blas(before)

    @contextlib.contextmanager
    def blas_alone(self) -> Iterator[None]:
        """A context in which products of NumPy's BLAS use one thread, and which several threads of
        a program are in at once, each on a core of its own."""
        with _numbers_restored():
            _set_blas([1] * len(_blas_libraries()))
            yield

    def map(self, function: Callable[[Any, int], Any], items: Sequence[Any]) -> list[Any]:
        """function(item, slot) for each item, in order, `count` of them at a time; two that run
        at once have different slots below `most`, and BLAS has one thread meanwhile."""
        n = min(self.count, len(items))
        is_free = os.getpid() == self._owner  # a fork has none of this process's threads
        if n < 2 or not is_free or not self._lock.acquire(blocking=False):  # a map in a map
            return [function(item, 0) for item in items]
        try:
            with self.blas(1):
                return self._map(function, items, n)
        finally:
            self._lock.release()

    def _map(self, function: Callable[[Any, int], Any], items: Sequence[Any], n: int) -> list[Any]:
        results: list[Any] = [None] * len(items)
        left = iter(range(len(items)))  # one for all threads, which the interpreter's lock keeps

        def run(slot: int) -> None:
            for i in left:
                results[i] = function(items[i], slot)

        futures = []
        try:
            for slot in range(1, n):
                with contextlib.suppress(RuntimeError):  # no more threads to be had
                    futures.append(self._pool.submit(run, slot))
            run(0)
        finally:  # nobody writes to what the caller holds after an error or Ctrl-C
            for _ in left:
                pass
            errors = [future.exception() for future in futures]
        for error in errors:
            if error is not None:
                raise error
        return results

    @cached_property
    def _free(self) -> "_FreeCores":
        return _FreeCores(self.helpers)

    @cached_property
    def _pool(self) -> "ThreadPoolExecutor":
        from concurrent.futures import ThreadPoolExecutor  # not for --help

        return ThreadPoolExecutor(max(1, self.most - 1), thread_name_prefix="npllama")


class _Turn:
    """A reentrant lock that knows which threads wait for it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.waiting: set[int] = set()

    def acquire(self) -> None:
        if not self._lock.acquire(blocking=False):
            self.waiting.add(threading.get_ident())
            try:
                self._lock.acquire()
            finally:
                self.waiting.discard(threading.get_ident())

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


_turn = _Turn()
_lock = threading.Lock()
_n_inside = 0  # contexts that have been entered and not left
_original: list[int] = []  # threads of each library before the first of them


@contextlib.contextmanager
def _numbers_restored() -> Iterator[None]:
    """BLAS has the numbers of threads from before the first such context once the last is left,
    whatever contexts of several threads did to each other's."""
    global _n_inside
    with _lock:
        if _n_inside == 0:
            _original[:] = _numbers_of_threads()
        _n_inside += 1
    try:
        yield
    finally:
        with _lock:
            _n_inside = max(0, _n_inside - 1)  # in a fork it begins anew
            if _n_inside == 0:
                _set_blas(_original)


@lru_cache(maxsize=1)
def _guard_forks() -> None:
    """Let forks wait for their turn from now on."""
    import concurrent.futures.thread  # noqa: F401 (its handler, which takes a lock, must run after)

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=lambda: _turn.acquire(),
            after_in_parent=lambda: _turn.release(),
            after_in_child=_new_locks,
        )


def _new_locks() -> None:
    """In a fork: the threads that held them do not exist here."""
    global _turn, _lock, _n_inside
    _turn, _lock, _n_inside = _Turn(), threading.Lock(), 0


def _numbers_of_threads() -> list[int]:
    """Of each BLAS library; what the environment asks for is read before anything is changed."""
    _blas_limits()
    return [library.get_num_threads() for library in _blas_libraries()]


def _set_blas(numbers: Sequence[int]) -> None:
    """Set each library's threads, from whichever thread calls.

    threadpoolctl (3.8 and later) lets the first thread that sets the number of OpenBLAS control
    it, and ignores all others without a word. Our threads take turns, so each takes control, and
    gives it up for those who use threadpoolctl themselves.
    """
    for library, number in zip(_blas_libraries(), numbers, strict=True):
        if library.get_num_threads() != number:
            give_up_control = getattr(library, "clear_controlling_thread", lambda force: None)
            give_up_control(force=True)
            library.set_num_threads(number)
            give_up_control(force=True)


@lru_cache(maxsize=1)
def _blas_libraries() -> list[Any]:
    from threadpoolctl import ThreadpoolController  # when first computing, not at --help

    return ThreadpoolController().select(user_api="blas").lib_controllers


@lru_cache(maxsize=1)
def _blas_limits() -> list[int]:
    """As they were when first looked at: what the user's environment asks for."""
    return [library.get_num_threads() for library in _blas_libraries()]


class _FreeCores:
    """The cores that this process may use, less those that other programs keep busy."""

    def __init__(self, helpers: Sequence[int]) -> None:
        self._helpers = helpers
        self._cores = usable_cores()
        self._count = self._left(os.cpu_count(), _others_running(helpers))
        self._time = time.monotonic()
        self._others = self._seconds_of_others()

    def count(self) -> int:
        now = time.monotonic()
        elapsed = now - self._time
        if elapsed >= _INTERVAL:
            others = self._seconds_of_others()
            if elapsed > _STALE:  # what ran then says nothing of now
                self._count = self._left(os.cpu_count(), _others_running(self._helpers))
            elif others is not None and self._others is not None:
                busy = max(0, round((others - self._others) / elapsed))
                self._count = self._left(len(allowed_cores()), busy)
            self._time, self._others = now, others
        return self._count

    def _left(self, n_looked_at: int | None, busy: int) -> int:
        """Of the cores that were looked at, which may be more than this process may use."""
        return max(1, min(self._cores, (n_looked_at or self._cores) - busy))

    def _seconds_of_others(self) -> float | None:
        """Seconds of computing by other programs so far, on the cores that this one may use."""
        busy = busy_seconds()
        if busy is None:
            return None
        return busy - time.process_time() - sum(map(process_seconds, self._helpers))


def _others_running(helpers: Sequence[int]) -> int:
    """Threads of other programs that compute now; 0 off Linux.

    The least of ten looks in 20 ms: what only wakes up for a moment does not count.
    """
    least = sys.maxsize
    for _ in range(10):
        anywhere = running_threads()
        ours = sum(map(running_threads, (os.getpid(), *helpers)))
        least = min(least, anywhere - ours)
        if least <= 0:
            return 0
        time.sleep(0.002)
    return least
