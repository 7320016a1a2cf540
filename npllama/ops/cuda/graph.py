"""Capture decode steps as CUDA graphs, and replay the graphs.

Launching a small kernel from Python takes longer than running it. A graph contains all launches of
a step with their arguments, and one call launches the whole graph.

A graph contains addresses. It is therefore kept with the cache whose arrays it was captured on. The
memory that the step allocates comes from a memory pool that is kept as long as the graph.
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
"""The maximum number of graphs per cache, above which a new graph replaces the oldest one. Each
combination of number of rows, bucket and sampling options has its own graph."""
LOG = logging.getLogger(__name__)

Results = tuple[Array, ...]
Step = Callable[[StepState, "KVCache", "Place"], Results]


@dataclass
class Capture:
    """A step for one state, bucket (see `Ops.compile`) and set of frozen values.

    Attributes:
        reads: objects that must live as long as the graph, because it contains the addresses of
            their arrays. Other objects keep the constants and the cache's arrays alive.
        eager_because: why the step is not captured; None if it is.
        graph: the graph; None until the second call.
        results: the arrays that each launch of the graph writes.
    """

    reads: tuple[object, ...]
    eager_because: str | None
    graph: object = None
    results: Results | None = None


class Captures:
    """The captures of one cache. All of their steps have the same constants."""

    def __init__(self, cupy: object, constants: tuple[object, ...]) -> None:
        self.constants = constants
        self._cupy = cupy
        self._pool = self._stream = None  # created for the first capture
        self._captures: dict[Hashable, Capture] = {}

    def get(self, key: Hashable) -> Capture | None:
        """The capture of a key, or None before the first call of its step."""
        return self._captures.get(key)

    def put(self, key: Hashable, capture: Capture) -> None:
        """Store a capture, and delete the oldest if there are too many."""
        while len(self._captures) >= MOST_GRAPHS:
            del self._captures[next(iter(self._captures))]
        self._captures[key] = capture

    def record(self, launch: Callable[[], Results]) -> tuple[object, Results]:
        """Capture the launches of `launch` as a graph, without running them.

        The capture needs a stream of its own, because the default stream cannot be captured. The
        graph can be launched on any stream. The captured arrays need a memory pool of their own.
        CuPy's default pool would reuse the memory of arrays that the step frees, while the graph
        still writes to that memory.

        Returns:
            The graph, and the return value of `launch`.
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
                self._stream = None  # a failed capture makes the stream unusable
                with suppress(Exception):  # raise the first error, not one that follows from it
                    stream.end_capture()
                raise


def _free(captures: dict[Hashable, Capture], pool: object, device: object) -> None:
    """Free a pool's memory, which CuPy may leak if it deletes a pool that still has memory.

    The pool frees only memory of the current device, so the capture's device is selected first.
    """
    captures.clear()
    with device:
        pool.free_all_blocks()


class DecodeSteps:
    """A decode step that is captured at the second call with a key, and replayed from then on.

    The first call runs eagerly. It compiles the kernels and allocates their permanent memory. All
    calls run on the current stream, like the work before and after them.

    Args:
        kernels: the kernels that the step launches. The object also counts the calls to cuBLAS,
            because CuPy cannot capture a step with such calls.
        step, frozen, constants: as in `Ops.compile`.
        is_on: whether steps are captured at all.

    Attributes:
        n_eager: calls that ran eagerly.
        n_captured: captured graphs.
        n_replayed: launches of graphs.
        eager_because: why steps run eagerly; None if all are captured.
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
        self._kernels.backend.use()  # a replayed step selects no device
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
                because = self.eager_because = "cuBLAS computes a product that CuPy cannot capture"
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
        """Describe in one line how the steps ran."""
        counts = {"replayed": self.n_replayed, "eager": self.n_eager}
        told = ", ".join(f"{n} {name}" for name, n in counts.items() if n) or "none"
        told += f"; {self.n_captured} graph{'' if self.n_captured == 1 else 's'} captured"
        return told if self.eager_because is None else f"{told}: {self.eager_because}"

    def _captures_of(self, cache: "KVCache") -> Captures:
        """The captures of a cache. Captures with other constants are deleted, because they would
        keep those other constants alive."""
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
        # CUDA has many error types, so all are caught; an error of the step itself is raised again
        # when the step runs eagerly
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            capture.eager_because = f"the capture failed: {reason}"
            LOG.warning("decode steps are not captured: %s", reason)
