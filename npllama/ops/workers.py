"""Worker processes that share a matrix product y^T = W x^T: each process computes some rows of y^T.

Threads would be slower, because they would wait for the interpreter's lock: widening a tile (some
rows of a matrix, see tiles.py) acquires the lock many times, and the conversion from bfloat16 holds
it all the time.
Worker processes also help with float32 matrices that are too small for OpenBLAS to use several
threads.

The main process starts the workers with `subprocess`. All processes map the same memory: one input,
one output, a few counters, and the matrices, which are in files or in shared memory. The main
process starts a product by incrementing a counter, and a worker reports its part as done in another
counter. These two actions need no system call. A worker that has waited for _SPIN seconds sleeps
until it can read a byte from its pipe. It exits when the pipe is closed.

The protocol requires that other processes see the stores of one process in program order. x86-64
guarantees this order, so workers exist only there.

Measurements: tools/README.md.
"""

import contextlib
import json
import os
import sys
import threading
import time
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from npllama.errors import WorkerError
from npllama.ops.tiles import product
from npllama.parameters import Matrix
from npllama.shared_arrays import Location, Mapped, can_share, empty_shared, location_of

if TYPE_CHECKING:
    from subprocess import Popen

MAX_ROWS = 127
"""The maximum number of rows of x in a shared product. For more rows, threads of the main process
are as fast."""

_SPIN = 0.005
"""Seconds for which a worker polls for the next product before it sleeps."""

_LOOK = 2000
"""The number of times that a process reads a counter before it checks anything else, such as the
clock or whether the other process still runs."""

# Indices of the int64 counters. The main process writes the first four, from _SEQUENCE through
# _N_PARTS. Each worker writes three counters of its own: _DONE, _ASLEEP and _READY are indices
# relative to the first counter of the worker. _LINE is the number of counters in a cache line. Each
# process writes to a cache line of its own.
_SEQUENCE, _MATRIX, _N_ROWS, _N_PARTS = range(4)
_DONE, _ASLEEP, _READY, _LINE = 0, 1, 2, 8


def _of_worker(rank: int, field: int) -> int:
    """The index of a worker's own counter."""
    return (1 + rank) * _LINE + field


def can_work() -> bool:
    """Whether this machine supports workers."""
    return can_share() and os.uname().machine == "x86_64"


@dataclass(frozen=True)
class _Job:
    """What a worker reads when it starts: the locations of all shared arrays."""

    rank: int
    counters: Location
    x: Location  # (MAX_ROWS * widest D,)
    y: Location  # (longest O * MAX_ROWS,)
    matrices: list[dict[str, Location]]  # per matrix, the arrays from which tiles are widened


class Workers:
    """`n - 1` worker processes that help this process to compute products with `matrices`.

    Args:
        n: the number of processes, including this one.
        matrices: each (O, D), with arrays in a file or in shared memory.

    Raises:
        WorkerError: a process could not be started. `product` raises it if a worker has ended.
    """

    def __init__(self, n: int, matrices: list[Matrix]) -> None:
        self._finished = 0  # the sequence number of the last product that is complete
        self._are_ready = False
        self._lock = threading.Lock()
        self._owner = os.getpid()
        widest = max(w.shape[1] for w in matrices)
        longest = max(w.shape[0] for w in matrices)
        self._processes: list[Popen] = []
        _living.add(self)
        self._stderrs: list = []
        self._close = weakref.finalize(self, _close, self._processes, self._stderrs, self._owner)
        try:
            counters, self._x, self._y = (
                empty_shared((1 + n) * _LINE, "int64"),
                empty_shared(MAX_ROWS * widest, "float32"),
                empty_shared(longest * MAX_ROWS, "float32"),
            )
            self._counters = memoryview(counters)
            locations = [location_of(array) for array in (counters, self._x, self._y)]
            of_matrices = [
                {name: location_of(getattr(w, name)) for name in w.format.tiled} for w in matrices
            ]
            for rank in range(1, n):
                self._start(_Job(rank, *locations, of_matrices))
        except OSError as error:
            raise WorkerError(
                f"a worker process could not be started ({error.strerror}): use --threads 1"
            ) from None

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers."""
        return [process.pid for process in self._processes]

    @property
    def are_ready(self) -> bool:
        """Whether all workers have started, so that a product does not wait for the start. It is
        always False in a forked process."""
        if os.getpid() != self._owner:
            return False
        if not self._are_ready:
            ranks = range(1, 1 + len(self._processes))
            self._are_ready = all(self._counters[_of_worker(rank, _READY)] for rank in ranks)
        return self._are_ready

    def product(self, x: np.ndarray, w: Matrix, index: int, n_parts: int) -> np.ndarray:
        """y^T = W x^T, without the scale of W's rows.

        Args:
            x: (M, D) float32, M <= MAX_ROWS.
            w: (O, D), the matrix that was `matrices[index]` when the workers were started.
                `Workers` keeps no reference to its matrices, so that they can be freed with their
                model.
            n_parts: the number of processes that compute, including this one.

        Returns:
            (O, M) float32.
        """
        n_rows, n_out = len(x), w.shape[0]
        n_parts = min(n_parts, 1 + len(self._processes))
        if n_parts == 1 or os.getpid() != self._owner:  # a forked process has no workers
            return product(x, w)
        with self._lock:
            counters = self._counters
            if counters[_SEQUENCE] != self._finished:  # an exception interrupted the last product
                for rank in range(1, counters[_N_PARTS]):
                    self._wait(rank, counters[_SEQUENCE])
            self._x[: x.size] = x.reshape(-1)
            counters[_MATRIX], counters[_N_ROWS], counters[_N_PARTS] = index, n_rows, n_parts
            sequence = counters[_SEQUENCE] + 1
            counters[_SEQUENCE] = sequence  # must come last, because it starts the workers
            for rank in range(1, n_parts):
                if counters[_of_worker(rank, _ASLEEP)]:
                    self._wake(rank)
            _compute(self._x, self._y, w, n_rows, 0, n_parts)
            for rank in range(1, n_parts):
                self._wait(rank, sequence)
            self._finished = sequence
            y = self._y[: n_out * n_rows].copy()  # the next product overwrites the shared output
            return y.reshape(n_out, n_rows)

    def close(self) -> None:
        """Stop the worker processes."""
        self._close()

    def _start(self, job: _Job) -> None:
        import subprocess  # imported here so that --help starts fast

        path = [*map(os.path.abspath, sys.path), str(Path(__file__).parents[2])]
        code = f"import sys; sys.path[:] = {path!r}; from {__name__} import serve; serve()"
        stderr = os.fdopen(os.memfd_create("npllama-stderr"), "w+b")  # a file in memory
        self._stderrs.append(stderr)
        locations = [job.counters, job.x, job.y]
        locations += [location for matrix in job.matrices for location in matrix.values()]
        handed = {int(location.path.removeprefix("/dev/fd/")) for location in locations}
        threads = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
        process = subprocess.Popen(
            [sys.executable or "python3", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            bufsize=0,
            pass_fds=tuple(handed),
            start_new_session=True,  # only the main process should receive Ctrl-C
            env=dict(os.environ) | dict.fromkeys(threads, "1"),
        )
        self._processes.append(process)
        with contextlib.suppress(BrokenPipeError):  # the worker has ended; _wait will report it
            process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")

    def _wake(self, rank: int) -> None:
        # BrokenPipeError: the worker has ended; ValueError: `close` has closed the pipe
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._processes[rank - 1].stdin.write(b"\n")

    def _wait(self, rank: int, sequence: int) -> None:
        counters, done = self._counters, _of_worker(rank, _DONE)
        reads, is_woken = 0, False
        while counters[done] != sequence:
            reads += 1
            if reads % _LOOK == 0:
                process = self._processes[rank - 1]
                if process.poll() is not None:
                    raise self._ended(rank, process.returncode)
                if counters[_of_worker(rank, _ASLEEP)] and not is_woken:
                    self._wake(rank)  # an exception may have prevented `product` from waking it
                    is_woken = True  # one byte is enough, and writing to a full pipe would block
                time.sleep(0)  # yield the core, because the worker may need it

    def _ended(self, rank: int, code: int) -> WorkerError:
        stderr = self._stderrs[rank - 1]
        stderr.seek(0)
        said = stderr.read().decode(errors="replace").split("\n")
        reason = next((line for line in reversed(said) if line), f"exit code {code}")
        if code < 0:
            reason = f"killed by signal {-code}, which can happen when memory runs out"
        return WorkerError(
            f"a worker process ended ({reason}): load the model again, or use --threads 1, which "
            "needs no workers"
        )


_living: "weakref.WeakSet[Workers]" = weakref.WeakSet()


def _leave_to_the_parent() -> None:
    """Close the workers' pipes in a forked process. Otherwise the workers would not exit when the
    parent exits, because this process would keep their pipes open."""
    for workers in _living:
        for process in workers._processes:
            process.stdin.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)


def _close(processes: "list[Popen]", stderrs: list, owner: int) -> None:
    if os.getpid() != owner:  # a forked process must not stop the workers of its parent
        return
    for process in processes:
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.kill()  # a suspended worker does not notice that its pipe is closed
    for process in processes:
        process.wait()
    for stderr in stderrs:
        stderr.close()


def _compute(
    x: np.ndarray,
    y: np.ndarray,
    w: Matrix,
    n_rows: int,
    part: int,
    n_parts: int,
) -> None:
    """Compute this part's rows of y^T (O, M), which begin at about O * part / n_parts.

    Each part begins at a multiple of 16. BLAS processes rows in groups, and the rounding is
    different in an incomplete group. Other bounds would make the result depend on n_parts.
    """
    n_out, width = w.shape
    begin = n_out * part // n_parts // 16 * 16
    end = n_out if part + 1 == n_parts else n_out * (part + 1) // n_parts // 16 * 16
    x = x[: n_rows * width].reshape(n_rows, width)
    out = y[begin * n_rows : end * n_rows].reshape(end - begin, n_rows)
    product(x, w, slice(begin, end), out)


def serve() -> None:
    """The main function of a worker: read the job from standard input, then compute until standard
    input is closed."""
    job = json.loads(sys.stdin.buffer.raw.readline())
    mapped = Mapped()
    locations = [Location(**job[name]) for name in ("counters", "x", "y")]
    counters, x, y = (mapped.array(location, writable=True) for location in locations)
    counters = memoryview(counters)
    matrices = [
        Matrix(**{name: mapped.array(Location(**location)) for name, location in locations.items()})
        for locations in job["matrices"]
    ]
    rank = job["rank"]
    done, asleep = _of_worker(rank, _DONE), _of_worker(rank, _ASLEEP)
    counters[_of_worker(rank, _READY)] = 1
    sequence, since = 0, time.perf_counter()
    while True:
        reads = 0
        while counters[_SEQUENCE] == sequence:
            reads += 1
            if reads % _LOOK == 0 and time.perf_counter() - since > _SPIN:
                counters[asleep] = 1
                # The main process sees the new value of this counter after a short delay. Until
                # then it may start a product and send no byte. The pause is longer than the delay,
                # so the condition of the loop below sees such a product.
                time.sleep(0.0001)
                while counters[_SEQUENCE] == sequence:  # a byte may be from an earlier product
                    if not os.read(0, 4096):
                        return
                counters[asleep] = 0
                since = time.perf_counter()
        sequence = counters[_SEQUENCE]
        n_parts = counters[_N_PARTS]
        if rank < n_parts:
            w = matrices[counters[_MATRIX]]
            _compute(x, y, w, counters[_N_ROWS], rank, n_parts)
            counters[done] = sequence
            since = time.perf_counter()
