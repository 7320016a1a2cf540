"""The decode step, captured as CUDA graphs and replayed.

Launching a kernel from Python takes longer than a small kernel runs. A graph holds all launches of
a step, with their arguments, and is launched by one call.

A graph holds addresses. So it lives with the cache whose arrays it was captured on, and what the
step allocates comes from a memory pool that lives as long.
"""

import logging
import weakref
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from npllama.backend import Array
from npllama.decode_step import StepState
from npllama.ops.cuda.kernels import Kernels

if TYPE_CHECKING:
    from npllama.kv_cache import KVCache, Place

MOST_GRAPHS = 64
"""Of one cache. There is one for each number of rows, bucket and sampling: the oldest goes."""
LOG = logging.getLogger(__name__)

Results = tuple[Array, ...]
Step = Callable[[StepState, "KVCache", "Place"], Results]


@dataclass
class Capture:
    """A step for one state, bucket and set of frozen values.

    Attributes:
        reads: what the graph has the addresses of, besides the constants and the cache's arrays.
        eager_because: why it stays a step of single launches, if it does.
        graph: None until the second call.
        results: what the graph writes at each launch.
    """

    reads: tuple[object, ...]
    eager_because: str | None
    graph: object = None
    results: Results | None = None


class Captures:
    """The captures of one cache, all of steps with the same constants."""

    def __init__(self, cupy: object, constants: tuple[object, ...]) -> None:
        self.constants = constants
        self._cupy = cupy
        self._pool = self._stream = None  # made for the first capture
        self._captures: dict[Hashable, Capture] = {}

    def get(self, key: Hashable) -> Capture | None:
        """The capture of a key, if its step has run."""
        return self._captures.get(key)

    def put(self, key: Hashable, capture: Capture) -> None:
        """Remember a capture; the oldest makes room."""
        while len(self._captures) >= MOST_GRAPHS:
            del self._captures[next(iter(self._captures))]
        self._captures[key] = capture

    def record(self, launch: Callable[[], Results]) -> tuple[object, Results]:
        """The graph of what `launch` queues, none of which runs, and what `launch` returns.

        The stream is one of its own, since the default stream cannot be captured. The graph is
        launched on any. Memory is allocated from a pool of its own: in CuPy's pool, what is freed
        inside the step would be given to others, while the graph still writes it.
        """
        if self._pool is None:
            cuda = self._cupy.cuda
            self._pool = cuda.MemoryPool()
            free = weakref.finalize(self, _free, self._captures, self._pool, cuda.Device())
            free.atexit = False
        if self._stream is None:
            self._stream = self._cupy.cuda.Stream(non_blocking=True)
        stream = self._stream
        with stream, self._cupy.cuda.using_allocator(self._pool.malloc):
            stream.begin_capture()
            try:
                results = launch()
                return stream.end_capture(), results
            except BaseException:
                self._stream = None  # of no more use
                with suppress(Exception):  # the first error counts
                    stream.end_capture()
                raise


def _free(captures: dict[Hashable, Capture], pool: object, device: object) -> None:
    """Give a pool's memory back: one that CuPy drops with blocks in it may leak them.

    The pool frees what it has on the current device, which may be another by then.
    """
    captures.clear()
    with device:
        pool.free_all_blocks()


class DecodeSteps:
    """A decode step that is captured at the second call of a key, and replayed from then on.

    The first call runs eagerly, which compiles kernels and allocates what they keep. All of it
    runs on the current stream, as the work before and after it does.

    Args:
        kernels: those of the step; it counts the products of cuBLAS, which cannot be captured.
        step, frozen, constants: see `Ops.compile`.
        is_on: False where no step is to be captured.

    Attributes:
        n_eager, n_captured, n_replayed: calls that ran eagerly, captures, and launches of graphs.
        eager_because: why steps stay eager; None where none does.
    """

    def __init__(
        self,
        kernels: Kernels,
        step: Step,
        frozen: Hashable,
        constants: tuple[object, ...],
        is_on: bool,
    ) -> None:
        self._kernels = kernels
        self._step = step
        self._frozen = frozen
        self._constants = constants
        self._captures: Captures | None = None
        self._is_on = is_on
        self.n_eager = self.n_captured = self.n_replayed = 0
        self.eager_because = None if is_on else "graphs are off"

    def __call__(self, state: StepState, cache: "KVCache", place: "Place") -> Results:
        self._kernels.backend.use()  # a replay runs nothing else that does
        if not self._is_on:
            return self._run(state, cache, place)
        captures = self._captures
        if captures is None or captures is not cache.captured:
            captures = self._captures = self._captures_of(cache)
        key = id(state), id(place.device_rows), place.bucket, self._frozen
        capture = captures.get(key)
        if capture is None:
            cublas = self._kernels.cublas
            n_calls = cublas.n_calls
            results = self._run(state, cache, place)
            because = None
            if cublas.n_calls > n_calls:
                because = self.eager_because = "cuBLAS computes a product, which no graph can hold"
            captures.put(key, Capture((state, place.device_rows), because))
            return results
        if capture.graph is None and capture.eager_because is None:
            self._capture(captures, capture, lambda: self._step(state, cache, place))
        if capture.graph is None:
            self.eager_because = capture.eager_because
            return self._run(state, cache, place)
        capture.graph.launch()
        self.n_replayed += 1
        return capture.results

    def report(self) -> str:
        """How the steps ran, in a few words."""
        counts = {"replayed": self.n_replayed, "eager": self.n_eager}
        told = ", ".join(f"{n} {name}" for name, n in counts.items() if n) or "none"
        told += f"; {self.n_captured} graph{'' if self.n_captured == 1 else 's'} captured"
        return told if self.eager_because is None else f"{told}: {self.eager_because}"

    def _captures_of(self, cache: "KVCache") -> Captures:
        """The cache's captures, unless they are of other constants, which they would keep alive."""
        captures = cache.captured
        if captures is None or [*map(id, captures.constants)] != [*map(id, self._constants)]:
            captures = cache.captured = Captures(self._kernels.xp, self._constants)
        return captures

    def _run(self, state: StepState, cache: "KVCache", place: "Place") -> Results:
        self.n_eager += 1
        return self._step(state, cache, place)

    def _capture(self, captures: Captures, capture: Capture, launch: Callable[[], Results]) -> None:
        try:
            capture.graph, capture.results = captures.record(launch)
            self.n_captured += 1
        except Exception as error:  # one of many of CUDA's; an eager step that fails too raises
            reason = " ".join(str(error).split()) or type(error).__name__
            capture.eager_because = f"the capture failed: {reason}"
            LOG.warning("decode steps are not captured: %s", reason)
