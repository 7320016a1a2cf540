"""Limits of the GPU: read bandwidth, and speed of float16 products."""

import time
from collections.abc import Callable

from npllama.backend import Backend

READ_BYTES = 2**32
MATMUL_WIDTH = 8192


def read_bandwidth(backend: Backend, nbytes: int = READ_BYTES) -> float:
    """Bytes per second of a reduction that reads `nbytes` and writes almost nothing."""
    xp = backend.xp
    x = xp.ones(nbytes // 4, dtype="float32")
    found = [seconds(backend, lambda f=f: f(x)) for f in (xp.sum, xp.max)]
    return nbytes / min(found)


def matmul_rate(backend: Backend, width: int = MATMUL_WIDTH) -> float:
    """Floating point operations per second of a product of square float16 matrices."""
    xp = backend.xp
    x = xp.arange(width * width, dtype="float32").reshape(width, width)
    a = xp.sin(x).astype("float16")  # zeros would need less power and run at a higher clock
    b = xp.cos(x).astype("float16")
    return 2 * width**3 / seconds(backend, lambda: a @ b)


def seconds(backend: Backend, work: Callable[[], object], n: int = 10, runs: int = 5) -> float:
    """Seconds per call: the minimum over runs of the mean of n calls queued at once."""
    synchronize = backend.xp.cuda.get_current_stream().synchronize
    found = []
    for run in range(runs + 1):
        synchronize()
        begin = time.perf_counter()
        for _ in range(n if run else 1):  # the first run warms up
            work()
        synchronize()
        found.append((time.perf_counter() - begin) / n)
    return min(found[1:])
