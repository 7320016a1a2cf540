"""Measures how much of a decode step each method of the ops object takes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarking.measure import GREEDY, Task
from npllama.llama import Llama
from npllama.ops import Ops
from npllama.parameters import Matrix

OUTSIDE = "outside of ops"


@dataclass(frozen=True)
class OpTime:
    """One line of a profile: means over the decode steps.

    Attributes:
        op: the method, with the shape of its matrix argument if it has one. OUTSIDE stands for
            the loop, the cache's bookkeeping and the tokenizer.
        calls: calls per step.
        seconds: seconds per step, without the time of ops that it calls.
        share: fraction of the step.
    """

    op: str
    calls: float
    seconds: float
    share: float


class _Watch:
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
def watched(ops: Ops, wait: Callable[[], object]) -> Iterator[_Watch]:
    """Time every public method of `ops` while the block runs.

    The timed methods are set on the object itself, so calls between methods are timed too.
    """
    watch = _Watch(wait)
    names = [n for n in dir(type(ops)) if not n.startswith("_") and callable(getattr(ops, n))]
    try:
        for name in names:
            setattr(ops, name, watch.wrapped(name, getattr(ops, name)))
        yield watch
    finally:
        for name in names:
            vars(ops).pop(name, None)


def profile(llama: Llama, task: Task) -> list[OpTime]:
    """Profile the decode steps of one generation by op, slowest first. Shares sum to 1.

    Timing a call takes time itself, which is attributed to the op that made the call. On a device,
    each op is waited for, so steps are not queued ahead as they usually are.
    """
    backend = llama.backend
    generation = llama.new_generation(
        task.prompts, max_new_tokens=task.new_tokens, sampling=GREEDY, seed=0, ignore_eos=True
    )
    marker = backend.xp.zeros(1)
    with watched(llama.ops, lambda: backend.to_host(marker)) as watch:
        steps_before = None
        for _ in generation:
            if steps_before is None:  # discard the prompts and the steps queued during them
                watch.clear()
                steps_before = generation.timings.decode_steps
    n_steps = generation.timings.decode_steps - steps_before
    total = generation.timings.decode_seconds
    lines = [
        OpTime(op, watch.calls[op] / n_steps, seconds / n_steps, seconds / total)
        for op, seconds in watch.seconds.items()
    ]
    lines.sort(key=lambda line: -line.seconds)
    rest = total - sum(watch.seconds.values())
    return [*lines, OpTime(OUTSIDE, 1.0, rest / n_steps, rest / total)]
