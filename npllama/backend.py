"""Which array module computes, and on which device.

This is the one place that picks CuPy. Everything above works on `backend.xp`, the array
module (`numpy` or `cupy`), and moves arrays in and out through the backend alone.
"""

import ctypes
import importlib
import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from npllama import operating_system
from npllama.errors import BackendError
from npllama.threads import Threads

Array = Any
"""An array of the backend in use: numpy.ndarray or cupy.ndarray."""

BACKENDS = ("auto", "numpy", "cupy")


class Backend:
    """NumPy on the CPU, and the interface that every backend serves.

    Attributes:
        name: "numpy" or "cupy".
        xp: the array module that all mathematics is written against.
        steps_ahead: how many decode steps are queued before the first one's token is read.
            0 where an operation is done when its call returns; 1 where work is queued on a
            device, which then never waits for the text.
        threads: how many threads compute on the host; one where a device does.
        slow_dtypes: storage dtypes that it computes with slowly, and what is faster.
    """

    name = "numpy"
    steps_ahead = 0
    slow_dtypes: Mapping[str, str] = {
        "float16": "--dtype bfloat16 is up to twice as fast, --dtype int8 faster still, and smaller"
    }

    def __init__(self, xp: ModuleType = np, threads: Threads | None = None) -> None:
        self.xp = xp
        self.threads = threads or Threads()

    def to_device(self, array: Array) -> Array:
        """Host array -> device array. On the CPU the array itself, memory-mapped or not."""
        return array

    def to_host(self, array: Array) -> np.ndarray:
        """Device array -> NumPy array; waits for the work that computes it."""
        return np.asarray(array)

    def to_host_later(self, *arrays: Array) -> Callable[[], tuple[np.ndarray, ...]]:
        """Begin to copy device arrays to the host, as they are once the work queued so far is done.

        Returns:
            a function that waits for the copies alone, not for work queued later, and returns
            them. On the CPU the arrays themselves, which are not to be overwritten before.
        """
        return lambda: arrays

    def free_bytes(self) -> int | None:
        """Bytes that a new allocation may take without swapping, or None where unknown."""
        return operating_system.free_bytes()

    def peak_bytes(self) -> int | None:
        """The most memory held, worker processes included, or None where unknown."""
        return operating_system.peak_bytes()

    def memory_name(self) -> str:
        """What free_bytes counts, in the words of an error message."""
        return "memory"

    def device_name(self) -> str:
        """The device, for --stats."""
        return f"CPU, {os.cpu_count()} cores"


class CupyBackend(Backend):
    """CuPy on the current CUDA device."""

    name = "cupy"
    steps_ahead = 1
    slow_dtypes: Mapping[str, str] = {}

    def __init__(self, xp: ModuleType) -> None:
        super().__init__(xp, Threads(1))  # the device is parallel in itself

    def to_device(self, array: Array) -> Array:
        return self.xp.asarray(array)

    def to_host(self, array: Array) -> np.ndarray:
        return self.xp.asnumpy(array)

    def to_host_later(self, *arrays: Array) -> Callable[[], tuple[np.ndarray, ...]]:
        copies = tuple(self._begin_copy(array) for array in arrays)
        copied = self.xp.cuda.Event(disable_timing=True)
        copied.record()

        def wait() -> tuple[np.ndarray, ...]:
            copied.synchronize()
            return copies

        return wait

    def _begin_copy(self, array: Array) -> np.ndarray:
        """A copy in pinned memory, which alone is written while the host goes on."""
        memory = self.xp.cuda.alloc_pinned_memory(array.nbytes)
        copy = np.ndarray(array.shape, array.dtype, memory)
        return array.get(out=copy, blocking=False)

    def free_bytes(self) -> int | None:
        free, _total = self.xp.cuda.Device().mem_info
        return free + self.xp.get_default_memory_pool().free_bytes()

    def peak_bytes(self) -> int | None:
        return self.xp.get_default_memory_pool().total_bytes()  # the pool gives nothing back

    def memory_name(self) -> str:
        return "GPU memory"

    def device_name(self) -> str:
        properties = self.xp.cuda.runtime.getDeviceProperties(self.xp.cuda.Device().id)
        return properties["name"].decode()


def get_backend(name: str = "auto", threads: int | None = None) -> Backend:
    """The backend called `name`; "auto" is CuPy where a CUDA device and CuPy are, else NumPy.

    Args:
        threads: of NumPy; None for as many as there are free cores.

    Raises:
        BackendError: an unknown name, no threads, or CuPy asked for where it cannot compute.
    """
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
    if threads is not None and threads < 1:
        raise BackendError(f"threads is {threads}: expected at least 1")
    if name == "numpy" or (name == "auto" and cuda_device_count() == 0):
        return Backend(threads=Threads(threads))
    try:
        cupy = importlib.import_module("cupy")
        cupy.zeros(1)  # CuPy imports without a GPU and fails at the first array
    except Exception as error:  # ImportError, or one of many CUDA errors
        if name == "auto":
            return Backend(threads=Threads(threads))
        lines = [line for line in str(error).splitlines() if any(map(str.isalnum, line))]
        reason = lines[0].strip() if lines else type(error).__name__
        raise BackendError(
            f"backend cupy cannot be used ({reason}): it needs an NVIDIA GPU and "
            "pip install 'npllama[cuda12]' (or cuda13); --backend numpy runs on the CPU"
        ) from None
    return CupyBackend(cupy)


def cuda_device_count() -> int:
    """CUDA devices that the driver reports; 0 without a driver. Imports nothing."""
    for library in ("libcuda.so.1", "libcuda.so", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(library)
        except OSError:
            continue
        count = ctypes.c_int(0)
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
            return count.value
    return 0
