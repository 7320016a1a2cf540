"""The number of threads that compute: the number that a user requests, or that of the free cores.

More threads than free cores are very slow. The threads of BLAS wait for each other, so one thread
that has lost its core to another program delays all of them.

Measurements: tools/README.md.
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
"""Seconds between two measurements of the cores that other programs use."""

_STALE = 1.0
"""Seconds after which the last measurement is out of date."""


class Threads:
    """The number of threads to compute with, and functions that use this number of threads.

    Args:
        n: the number of threads; None for the number of free cores, limited by the settings of
            NumPy's BLAS (such as OPENBLAS_NUM_THREADS).

    Attributes:
        most: the upper bound of `count`.
        helpers: ids of this program's worker processes, which do not count as other programs.
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
        """The number of threads to use now."""
        return self.most if self._fixed is not None else min(self.most, self._free.count())

    def turn(self) -> AbstractContextManager:
        """A context manager that only one thread of the program can hold at a time.

        Other threads wait for it, because BLAS has one number of threads for the whole process, and
        two forward passes at the same time would compete for the cores. A thread may nest these
        contexts. A fork also waits: if a process forks while another thread computes a product,
        OpenBLAS hangs in both processes.
        """
        _guard_forks()
        return _turn

    def give_way(self) -> None:
        """Sleep briefly if another thread waits for its turn, so that it can start. Call this
        outside of `turn`."""
        if _turn.waiting:
            time.sleep(0.0005)  # long enough for the other thread to wake up

    @contextlib.contextmanager
    def blas(self, n: int) -> Iterator[None]:
        """A `turn` in which NumPy's BLAS uses n threads. At its end the old number is restored."""
        with self.turn(), _numbers_restored():
            before = _numbers_of_threads()
            try:
                _set_blas([n] * len(before))
                yield
            finally:
                _set_blas(before)

    @contextlib.contextmanager
    def blas_alone(self) -> Iterator[None]:
        """A context in which NumPy's BLAS uses one thread. Unlike `turn`, several threads of the
        program can hold it at the same time, and each of them computes on its own core."""
        with _numbers_restored():
            _set_blas([1] * len(_blas_libraries()))
            yield

    def map(self, function: Callable[[Any, int], Any], items: Sequence[Any]) -> list[Any]:
        """The list of function(item, slot) for all items, computed by up to `count` threads.

        Calls that run at the same time have different slots, which are integers in [0, most). BLAS
        uses one thread meanwhile.
        """
        n = min(self.count, len(items))
        is_free = os.getpid() == self._owner  # a forked process has no threads in its pool
        # the lock is taken if this is a call within another `map`
        if n < 2 or not is_free or not self._lock.acquire(blocking=False):
            return [function(item, 0) for item in items]
        try:
            with self.blas(1):
                return self._map(function, items, n)
        finally:
            self._lock.release()

    def _map(self, function: Callable[[Any, int], Any], items: Sequence[Any], n: int) -> list[Any]:
        results: list[Any] = [None] * len(items)
        left = iter(range(len(items)))  # shared by all threads; the interpreter's lock protects it

        def run(slot: int) -> None:
            for i in left:
                results[i] = function(items[i], slot)

        futures = []
        try:
            for slot in range(1, n):
                with contextlib.suppress(RuntimeError):  # the system allows no more threads
                    futures.append(self._pool.submit(run, slot))
            run(0)
        finally:  # after an error or Ctrl-C, wait until no thread writes to the caller's arrays
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
        from concurrent.futures import ThreadPoolExecutor  # imported here so --help starts fast

        return ThreadPoolExecutor(max(1, self.most - 1), thread_name_prefix="npllama")


class _Turn:
    """A reentrant lock that records which threads wait for it."""

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
_n_inside = 0  # the number of `_numbers_restored` contexts that are active
_original: list[int] = []  # threads of each BLAS library before the first of these contexts


@contextlib.contextmanager
def _numbers_restored() -> Iterator[None]:
    """Restore BLAS's numbers of threads when the last active context of this kind ends.

    They are restored to their values before the first of these contexts. Contexts of several
    threads may overlap, so one context alone cannot restore them.
    """
    global _n_inside
    with _lock:
        if _n_inside == 0:
            _original[:] = _numbers_of_threads()
        _n_inside += 1
    try:
        yield
    finally:
        with _lock:
            _n_inside = max(0, _n_inside - 1)  # `_new_locks` sets it to 0 in a forked process
            if _n_inside == 0:
                _set_blas(_original)


@lru_cache(maxsize=1)
def _guard_forks() -> None:
    """Make every later fork wait for its turn."""
    import concurrent.futures.thread  # noqa: F401 (registers a handler that must run after ours)

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=lambda: _turn.acquire(),
            after_in_parent=lambda: _turn.release(),
            after_in_child=_new_locks,
        )


def _new_locks() -> None:
    """Replace the locks in a forked process, where the threads that held them do not exist."""
    global _turn, _lock, _n_inside
    _turn, _lock, _n_inside = _Turn(), threading.Lock(), 0


def _numbers_of_threads() -> list[int]:
    """The current number of threads of each BLAS library."""
    _blas_limits()  # stores the environment's settings before they are changed
    return [library.get_num_threads() for library in _blas_libraries()]


def _set_blas(numbers: Sequence[int]) -> None:
    """Set the number of threads of each BLAS library. Any thread may call this function.

    From version 3.8 on, threadpoolctl gives control of OpenBLAS to the first thread that sets the
    number, and silently ignores other threads. Our threads take turns, so each call takes control
    first. It then releases control, because the program may use threadpoolctl itself.
    """
    for library, number in zip(_blas_libraries(), numbers, strict=True):
        if library.get_num_threads() != number:
            give_up_control = getattr(library, "clear_controlling_thread", lambda force: None)
            give_up_control(force=True)
            library.set_num_threads(number)
            give_up_control(force=True)


@lru_cache(maxsize=1)
def _blas_libraries() -> list[Any]:
    from threadpoolctl import ThreadpoolController  # imported here so --help starts fast

    return ThreadpoolController().select(user_api="blas").lib_controllers


@lru_cache(maxsize=1)
def _blas_limits() -> list[int]:
    """The numbers of threads at the first call, which are those of the user's environment."""
    return [library.get_num_threads() for library in _blas_libraries()]


class _FreeCores:
    """The number of cores that this process may use and that other programs leave free."""

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
            if elapsed > _STALE:  # an average over a long time says nothing about the present
                self._count = self._left(os.cpu_count(), _others_running(self._helpers))
            elif others is not None and self._others is not None:
                busy = max(0, round((others - self._others) / elapsed))
                self._count = self._left(len(allowed_cores()), busy)
            self._time, self._others = now, others
        return self._count

    def _left(self, n_looked_at: int | None, busy: int) -> int:
        """The free cores for this process, if `busy` of n_looked_at cores are in use."""
        return max(1, min(self._cores, (n_looked_at or self._cores) - busy))

    def _seconds_of_others(self) -> float | None:
        """The CPU seconds of other programs so far, on the cores that this process may use."""
        busy = busy_seconds()
        if busy is None:
            return None
        return busy - time.process_time() - sum(map(process_seconds, self._helpers))


def _others_running(helpers: Sequence[int]) -> int:
    """The number of running threads of other programs; 0 on systems other than Linux.

    The result is the minimum of ten samples in 20 ms, which ignores threads that run only briefly.
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
