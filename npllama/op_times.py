"""Measures the time that each method of an ops object takes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from npllama.ops import Ops
from npllama.parameters import Matrix


class Watch:
    """Counts calls and the time of each op, excluding nested ops."""

    def __init__(self, wait: Callable[[], object]) -> None:
        self.calls: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]  # for each running op, seconds spent in ops that it called
        self._wait = wait

    def wrapped(self, name: str, method: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            begin = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self._wait()
                seconds = time.perf_counter() - begin
                own = seconds - self._inner.pop()
                self._inner[-1] += seconds
                matrix = next((a for a in args if isinstance(a, Matrix)), None)
                op = name if matrix is None else f"{name} {matrix.shape[0]} x {matrix.shape[1]}"
                self.calls[op] = self.calls.get(op, 0) + 1
                self.seconds[op] = self.seconds.get(op, 0.0) + own

        return timed

    def clear(self) -> None:
        self.calls.clear()
        self.seconds.clear()


@contextmanager
def watched(ops: Ops, wait: Callable[[], object]) -> Iterator[Watch]:
    """Time every public method of `ops` while the block runs.

    The timed methods are set on the object itself, so calls between methods are timed too.
    """
    watch = Watch(wait)
    names = [n for n in dir(type(ops)) if not n.startswith("_") and callable(getattr(ops, n))]
    try:
        for name in names:
            setattr(ops, name, watch.wrapped(name, getattr(ops, name)))
        yield watch
    finally:
        for name in names:
            vars(ops).pop(name, None)
