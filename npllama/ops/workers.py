"""Processes that compute a matrix product together with this one, each some of its rows.

Threads cannot: widening a tile takes the interpreter's lock again and again (and bfloat16's cast
holds it), so two of them compute 0.9 times what float32 BLAS does where two processes compute
1.3 times (int8, 1.1B, measured on two cores). Float32 matrices too small for OpenBLAS's own
threads gain as well.

The processes are started by `subprocess` and share memory with this one: the matrices, in files
or in shared memory; one input, one output; and a few counters, by which a product is handed out
and reported without a system call. A worker that has waited for a few milliseconds sleeps until
a byte comes down its pipe, and leaves when the pipe closes. Stores become visible in their
order on x86-64 alone, so there are no workers on other processors.
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
"""Rows of x at most: more of them are cut up among threads, which then do as well."""

_SPIN = 0.005
"""Seconds that a worker watches for the next product before it sleeps."""

_LOOK = 2000
"""Times that a counter is read between two looks at the clock, about 0.1 ms."""

# The counters, int64, those of different processes in different cache lines.
_SEQUENCE, _MATRIX, _N_ROWS, _N_PARTS = range(4)
_DONE, _ASLEEP, _READY, _LINE = 0, 1, 2, 8


def _of_worker(rank: int, field: int) -> int:
    """A worker's own counter."""
    return (1 + rank) * _LINE + field


def can_work() -> bool:
    """Whether workers can be had on this machine."""
    return can_share() and os.uname().machine == "x86_64"


@dataclass(frozen=True)
class _Job:
    """What a worker gets when it starts: where everything lies."""

    rank: int
    counters: Location
    x: Location  # (MAX_ROWS * widest D,)
    y: Location  # (longest O * MAX_ROWS,)
    matrices: list[dict[str, Location]]  # of each the arrays that tiles are widened from


class Workers:
    """`n - 1` processes that compute products with `matrices` beside this one.

    Args:
        n: processes, this one included.
        matrices: each (O, D), what tiles are widened from in a file or in shared memory.

    Raises:
        WorkerError: a process could not be started, or ended by itself.
    """

    def __init__(self, n: int, matrices: list[Matrix]) -> None:
        self._finished = 0  # the last product that all parts of are done
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
        """Ids of the processes, without this one."""
        return [process.pid for process in self._processes]

    @property
    def are_ready(self) -> bool:
        """Whether all of them have started: a product would not wait for that. In a fork never."""
        if os.getpid() != self._owner:
            return False
        if not self._are_ready:
            ranks = range(1, 1 + len(self._processes))
            self._are_ready = all(self._counters[_of_worker(rank, _READY)] for rank in ranks)
        return self._are_ready

    def product(self, x: np.ndarray, w: Matrix, index: int, n_parts: int) -> np.ndarray:
        """y^T = W x^T, up to the factors of W's rows: x (M, D) float32, M <= MAX_ROWS, W (O, D)
        -> (O, M) float32.

        Args:
            w: the matrix that was given as number `index`; it is not kept here, so that it lives
                no longer than its model.
            n_parts: processes that compute, this one included.
        """
        n_rows, n_out = len(x), w.shape[0]
        n_parts = min(n_parts, 1 + len(self._processes))
        if n_parts == 1 or os.getpid() != self._owner:  # a fork has no workers of its own
            return product(x, w)
        with self._lock:
            counters = self._counters
            if counters[_SEQUENCE] != self._finished:  # an exception left it to those who compute
                for rank in range(1, counters[_N_PARTS]):
                    self._wait(rank, counters[_SEQUENCE])
            self._x[: x.size] = x.reshape(-1)
            counters[_MATRIX], counters[_N_ROWS], counters[_N_PARTS] = index, n_rows, n_parts
            sequence = counters[_SEQUENCE] + 1
            counters[_SEQUENCE] = sequence  # last: from here on the workers read
            for rank in range(1, n_parts):
                if counters[_of_worker(rank, _ASLEEP)]:
                    self._wake(rank)
            _compute(self._x, self._y, w, n_rows, 0, n_parts)
            for rank in range(1, n_parts):
                self._wait(rank, sequence)
            self._finished = sequence
            y = self._y[: n_out * n_rows].copy()  # before the next product writes over it
            return y.reshape(n_out, n_rows)

    def close(self) -> None:
        """End the processes."""
        self._close()

    def _start(self, job: _Job) -> None:
        import subprocess  # not for --help

        path = [*map(os.path.abspath, sys.path), str(Path(__file__).parents[2])]
        code = f"import sys; sys.path[:] = {path!r}; from {__name__} import serve; serve()"
        stderr = os.fdopen(os.memfd_create("npllama-stderr"), "w+b")  # needs no folder
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
            start_new_session=True,  # Ctrl-C is for this process alone
            env=dict(os.environ) | dict.fromkeys(threads, "1"),
        )
        self._processes.append(process)
        with contextlib.suppress(BrokenPipeError):  # _wait finds out and reports it
            process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")

    def _wake(self, rank: int) -> None:
        with contextlib.suppress(BrokenPipeError, ValueError):  # it has ended; or all is ending
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
                    self._wake(rank)  # an exception may have come before it was woken
                    is_woken = True  # one byte is enough, and a full pipe would block
                time.sleep(0)  # the worker may be waiting for this very core

    def _ended(self, rank: int, code: int) -> WorkerError:
        stderr = self._stderrs[rank - 1]
        stderr.seek(0)
        said = stderr.read().decode(errors="replace").split("\n")
        reason = next((line for line in reversed(said) if line), f"exit code {code}")
        if code < 0:
            reason = f"killed by signal {-code}, as when memory runs out"
        return WorkerError(
            f"a worker process ended ({reason}): load the model again, or use --threads 1, which "
            "needs no workers"
        )


_living: "weakref.WeakSet[Workers]" = weakref.WeakSet()


def _leave_to_the_parent() -> None:
    """In a fork: the pipes are the parent's, whose end is to end the workers."""
    for workers in _living:
        for process in workers._processes:
            process.stdin.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)


def _close(processes: "list[Popen]", stderrs: list, owner: int) -> None:
    if os.getpid() != owner:  # a fork's end is not theirs
        return
    for process in processes:
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.kill()  # it holds nothing that could be lost, and may have been stopped
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
    """Rows of y^T (O, M) that are this part's: O * part / n_parts and on, by 16 since BLAS takes
    some rows at a time, and the rounding of those that are left over differs."""
    n_out, width = w.shape
    begin = n_out * part // n_parts // 16 * 16
    end = n_out if part + 1 == n_parts else n_out * (part + 1) // n_parts // 16 * 16
    x = x[: n_rows * width].reshape(n_rows, width)
    out = y[begin * n_rows : end * n_rows].reshape(end - begin, n_rows)
    product(x, w, slice(begin, end), out)


def serve() -> None:
    """A worker's life: read the job from standard input, then compute until it closes."""
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
                # a product handed out before that was visible is found when it has become so
                time.sleep(0.0001)
                while counters[_SEQUENCE] == sequence:  # a byte may belong to an earlier product
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
