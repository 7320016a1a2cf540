"""Which array module computes, and on which device.

This is the one place that picks CuPy. Everything above works on `backend.xp`, the array
module (`numpy` or `cupy`), and moves arrays in and out through the backend alone.
"""

import importlib
import os
import threading
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from npllama import operating_system
from npllama.cuda_device import Driver, cuda_device_count, cuda_driver, cuda_version
from npllama.errors import BackendError
from npllama.threads import Threads

Array = Any
"""An array of the backend in use: numpy.ndarray or cupy.ndarray."""

BACKENDS = ("auto", "numpy", "cupy")
__all__ = ["BACKENDS", "Array", "Backend", "CupyBackend", "cuda_device_count", "get_backend"]


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
        no_gpu: why "auto" did not take a GPU; None where it was not asked for one.
    """

    name = "numpy"
    steps_ahead = 0
    slow_dtypes: Mapping[str, str] = {
        "float16": "--dtype bfloat16 is up to twice as fast, --dtype int8 faster still, and smaller"
    }

    def __init__(
        self, xp: ModuleType = np, threads: Threads | None = None, no_gpu: str | None = None
    ) -> None:
        self.xp = xp
        self.threads = threads or Threads()
        self.no_gpu = no_gpu

    def use(self) -> None:
        """Make the device the one that this thread computes on; on the CPU there is one alone."""

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
    """CuPy on a CUDA device.

    Args:
        device: its number; None for the one that is current in this thread, by default 0.
    """

    name = "cupy"
    steps_ahead = 1
    slow_dtypes: Mapping[str, str] = {}

    def __init__(self, xp: ModuleType, device: int | None = None) -> None:
        super().__init__(xp, Threads(1))  # the device is parallel in itself
        self.device = xp.cuda.Device().id if device is None else device
        self.use()

    def use(self) -> None:
        """Make the device current; each thread has a current device of its own."""
        self.xp.cuda.Device(self.device).use()

    def to_device(self, array: Array) -> Array:
        self.use()
        return self.xp.asarray(array)

    def to_host(self, array: Array) -> np.ndarray:
        return self.xp.asnumpy(array)

    def to_host_later(self, *arrays: Array) -> Callable[[], tuple[np.ndarray, ...]]:
        copies = tuple(self._begin_copy(array) for array in arrays)
        copied = self.xp.cuda.Event(disable_timing=True)
        copied.record()
        _keep_until(copied, copies)

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
        self.use()
        free, _total = self.xp.cuda.Device().mem_info
        return free + self.xp.get_default_memory_pool().free_bytes()

    def peak_bytes(self) -> int | None:
        self.use()
        return self.xp.get_default_memory_pool().total_bytes()  # the pool gives nothing back

    def memory_name(self) -> str:
        return "GPU memory"

    def device_name(self) -> str:
        self.use()
        number, n_devices = self.xp.cuda.Device().id, self.xp.cuda.runtime.getDeviceCount()
        name = self.xp.cuda.runtime.getDeviceProperties(number)["name"].decode()
        return name if n_devices == 1 else f"{name}, device {number} of 0 to {n_devices - 1}"


_COPYING: list[tuple[Any, tuple[np.ndarray, ...]]] = []
_COPYING_LOCK = threading.Lock()


def _keep_until(copied: Any, copies: tuple[np.ndarray, ...]) -> None:
    """Keep arrays in pinned memory until an event has happened, whoever drops them before: CuPy
    would hand out their memory again while they are still written."""
    with _COPYING_LOCK:
        _COPYING[:] = [pair for pair in _COPYING if not pair[0].done]
        _COPYING.append((copied, copies))


class _UnusableError(Exception):
    """CuPy cannot compute.

    Args:
        found: why, in a few words.
        remedy: what was expected, and what to do.
    """

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(found)
        self.found = found
        self.remedy = remedy


def get_backend(
    name: str = "auto", threads: int | None = None, device: int | None = None
) -> Backend:
    """The backend called `name`; "auto" is CuPy where a CUDA device and CuPy are, else NumPy.

    Args:
        threads: of NumPy; None for as many as there are free cores.
        device: the number of a CUDA device, which "auto" then takes or fails; None for the
            first.

    Raises:
        BackendError: an unknown name, no threads, or CuPy asked for where it cannot compute.
    """
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
    if threads is not None and threads < 1:
        raise BackendError(f"threads is {threads}: expected at least 1")
    if device is not None and (type(device) is not int or device < 0):
        raise BackendError(f"device is {device!r}: expected a GPU's number, counted from 0")
    if name == "numpy":
        if device is not None:
            raise BackendError(
                f"device is {device}, a GPU's number, and backend numpy computes on the CPU: "
                "leave one of them out"
            )
        return Backend(threads=Threads(threads))
    try:
        return CupyBackend(_usable_cupy(device), device)
    except _UnusableError as error:
        if name == "auto" and device is None:
            return Backend(threads=Threads(threads), no_gpu=error.found)
        what = "backend cupy" if device is None else f"device {device}"
        raise BackendError(
            f"{what} cannot be used ({error.found}): {error.remedy}; --backend numpy runs on the "
            "CPU"
        ) from None


def _usable_cupy(device: int | None) -> ModuleType:
    """CuPy, once it has computed.

    Everything is tried that fails later otherwise: the driver at the first array, the compiler at
    the first kernel, cuBLAS at the first product.

    Raises:
        _UnusableError: what is missing, from the driver upwards.
    """
    driver = cuda_driver()
    if driver.n_devices == 0:
        raise _UnusableError(driver.found, driver.remedy)
    try:
        cupy = importlib.import_module("cupy")
    except ModuleNotFoundError as error:
        found = "CuPy is not installed" if error.name == "cupy" else _first_line(error)
        raise _UnusableError(found, _install(driver.version)) from None
    except Exception as error:
        raise _UnusableError(f"CuPy: {_first_line(error)}", _install(driver.version)) from None
    try:
        runtime = cupy.cuda.runtime
        built_for = cuda_version(runtime.runtimeGetVersion())
        n_devices = runtime.getDeviceCount()
        if device is not None and device >= n_devices:
            most = "0, the only one" if n_devices == 1 else f"0 to {n_devices - 1}"
            raise _UnusableError("there is no such GPU", f"expected {most}; nvidia-smi lists them")
        with cupy.cuda.Device(device):  # without a number the current one
            cupy.zeros(1)
    except _UnusableError:
        raise
    except Exception as error:  # CUDA has many
        if "cudaErrorInsufficientDriver" in str(error):
            raise _too_old(driver, built_for) from None
        remedy = "expected a GPU that is free and that CuPy supports; nvidia-smi shows who uses it"
        raise _UnusableError(f"CuPy: {_first_line(error)}", remedy) from None
    libraries = {
        "NVRTC": lambda: cupy.cuda.nvrtc.getVersion(),
        "cuBLAS": lambda: cupy.cuda.cublas,
    }
    for library, look in libraries.items():  # CuPy itself looks for one at its first use
        try:
            look()
        except Exception:
            remedy = f"expected CUDA {built_for[0]}'s library; {_install(built_for)} brings it"
            raise _UnusableError(f"CuPy: {library} cannot be loaded", remedy) from None
    return cupy


def _too_old(driver: Driver, built_for: tuple[int, int]) -> _UnusableError:
    """The driver supports an older CUDA than the one that CuPy was built for."""
    has, needs = (".".join(map(str, version)) for version in (driver.version, built_for))
    remedy = f"expected a driver for CUDA {built_for[0]} or newer; install one"
    if built_for[0] > driver.version[0] >= 12:
        remedy += f", or pip uninstall cupy-cuda{built_for[0]}x and {_install(driver.version)}"
    found = f"CuPy: driver too old, for CUDA {has} and not for CuPy's CUDA {needs}"
    return _UnusableError(found, remedy)


def _install(version: tuple[int, int]) -> str:
    """How to install CuPy for a driver or a CuPy of a version of CUDA."""
    return f"pip install 'npllama[cuda{13 if version[0] >= 13 else 12}]'"


def _first_line(error: Exception) -> str:
    """The first line of an error that says something; CuPy begins some with a rule."""
    lines = [line for line in str(error).splitlines() if any(map(str.isalnum, line))]
    return lines[0].strip() if lines else type(error).__name__
