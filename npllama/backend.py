"""The choice of the array module and of the device.

Only this module imports CuPy. All other modules compute with `backend.xp`, which is numpy or cupy,
and copy arrays between host and device with the methods of `Backend`.
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
    """NumPy on the CPU, and the interface of every backend.

    Attributes:
        name: "numpy" or "cupy".
        xp: the array module with which all mathematics computes.
        steps_ahead: how many further decode steps are queued before the token of a step is read.
            It is 0 if an operation is complete when its call returns. It is 1 if operations are
            queued on a device, so that the device does not wait for the host.
        threads: the threads that compute on the host. There is only one if a device computes.
        slow_dtypes: storage dtypes that are slow with this backend, and advice for each.
        no_gpu: the reason why "auto" did not select a GPU; None unless "auto" selected NumPy.
    """

    name = "numpy"
    steps_ahead = 0
    slow_dtypes: Mapping[str, str] = {
        "float16": "--dtype bfloat16 is up to twice as fast; --dtype int8 is faster still"
    }

    def __init__(
        self, xp: ModuleType = np, threads: Threads | None = None, no_gpu: str | None = None
    ) -> None:
        self.xp = xp
        self.threads = threads or Threads()
        self.no_gpu = no_gpu

    def use(self) -> None:
        """Select this backend's device for the current thread. On the CPU it does nothing."""

    def to_device(self, array: Array) -> Array:
        """Copy a host array to the device. On the CPU this returns the array itself, which may be
        memory-mapped."""
        return array

    def to_host(self, array: Array) -> np.ndarray:
        """Copy a device array to a NumPy array. The call waits until the array is computed."""
        return np.asarray(array)

    def to_host_later(self, *arrays: Array) -> Callable[[], tuple[np.ndarray, ...]]:
        """Start to copy device arrays to the host after the operations that are queued so far.

        Returns:
            A function that waits for the copies and returns them. It does not wait for operations
            that are queued later. On the CPU it returns the arrays themselves, so the caller must
            not overwrite them before it has used them.
        """
        return lambda: arrays

    def free_bytes(self) -> int | None:
        """The bytes that can be allocated without swapping, or None if unknown."""
        return operating_system.free_bytes()

    def peak_bytes(self) -> int | None:
        """The peak memory in bytes, including that of worker processes, or None if unknown."""
        return operating_system.peak_bytes()

    def memory_name(self) -> str:
        """The name of the memory that `free_bytes` counts, for error messages."""
        return "memory"

    def device_name(self) -> str:
        """A description of the device, for --stats."""
        return f"CPU, {os.cpu_count()} cores"


class CupyBackend(Backend):
    """CuPy on a CUDA device.

    Args:
        device: the number of the device; None selects the thread's current device, by default 0.
    """

    name = "cupy"
    steps_ahead = 1
    slow_dtypes: Mapping[str, str] = {}

    def __init__(self, xp: ModuleType, device: int | None = None) -> None:
        super().__init__(xp, Threads(1))  # the host does not compute
        self.device = xp.cuda.Device().id if device is None else device
        self.use()

    def use(self) -> None:
        """Select this backend's device for the current thread. In CUDA each thread has its own
        current device."""
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
        """Start a copy to pinned memory. A copy to other memory would block the host."""
        memory = self.xp.cuda.alloc_pinned_memory(array.nbytes)
        copy = np.ndarray(array.shape, array.dtype, memory)
        return array.get(out=copy, blocking=False)

    def free_bytes(self) -> int | None:
        self.use()
        free, _total = self.xp.cuda.Device().mem_info
        return free + self.xp.get_default_memory_pool().free_bytes()

    def peak_bytes(self) -> int | None:
        self.use()
        return self.xp.get_default_memory_pool().total_bytes()  # the pool never frees memory

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
    """Keep references to arrays in pinned memory until their copies are complete. Otherwise CuPy
    could reuse the memory of a deleted array while the device still writes to it."""
    with _COPYING_LOCK:
        _COPYING[:] = [pair for pair in _COPYING if not pair[0].done]
        _COPYING.append((copied, copies))


class _UnusableError(Exception):
    """CuPy cannot be used.

    Args:
        found: the reason, in a few words.
        remedy: what was expected, and what to do.
    """

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(found)
        self.found = found
        self.remedy = remedy


def get_backend(
    name: str = "auto", threads: int | None = None, device: int | None = None
) -> Backend:
    """Return the backend with the given name.

    Args:
        name: "numpy", "cupy" or "auto". "auto" selects CuPy if a CUDA device can be used, else
            NumPy.
        threads: the number of threads for NumPy; None for one per free core.
        device: the number of a CUDA device; None for the current one. With a number, "auto" never
            selects NumPy.

    Raises:
        BackendError: an unknown name, an invalid number of threads or device, or CuPy was requested
            and cannot be used.
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
                f"device is {device}, the number of a GPU, but backend numpy uses the CPU: "
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
    """Import CuPy and check that it works.

    The function tries everything that CuPy would load only later: the driver at the first array,
    the compiler at the first kernel and cuBLAS at the first product.

    Raises:
        _UnusableError: something is missing. The driver is checked first.
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
        with cupy.cuda.Device(device):  # None is the current device
            cupy.zeros(1)
    except _UnusableError:
        raise
    except Exception as error:  # CUDA has many types of errors
        if "cudaErrorInsufficientDriver" in str(error):
            raise _too_old(driver, built_for) from None
        remedy = "expected a free GPU that CuPy supports; nvidia-smi lists the programs that use it"
        raise _UnusableError(f"CuPy: {_first_line(error)}", remedy) from None
    libraries = {
        "NVRTC": lambda: cupy.cuda.nvrtc.getVersion(),
        "cuBLAS": lambda: cupy.cuda.cublas,
    }
    for library, look in libraries.items():  # CuPy loads each library at its first use
        try:
            look()
        except Exception:
            remedy = f"expected CUDA {built_for[0]}'s library; {_install(built_for)} installs it"
            raise _UnusableError(f"CuPy: {library} cannot be loaded", remedy) from None
    return cupy


def _too_old(driver: Driver, built_for: tuple[int, int]) -> _UnusableError:
    """The error for a driver that supports only an older CUDA than the one CuPy was built for."""
    has, needs = (".".join(map(str, version)) for version in (driver.version, built_for))
    remedy = f"expected a driver for CUDA {built_for[0]} or newer; install one"
    if built_for[0] > driver.version[0] >= 12:
        remedy += f", or pip uninstall cupy-cuda{built_for[0]}x and {_install(driver.version)}"
    found = f"CuPy: the driver supports CUDA up to {has}, but this CuPy needs CUDA {needs}"
    return _UnusableError(found, remedy)


def _install(version: tuple[int, int]) -> str:
    """The command that installs CuPy for a version of CUDA."""
    return f"pip install 'npllama[cuda{13 if version[0] >= 13 else 12}]'"


def _first_line(error: Exception) -> str:
    """The first line of an error message with letters or digits. CuPy begins some messages with a
    line of "=" signs."""
    lines = [line for line in str(error).splitlines() if any(map(str.isalnum, line))]
    return lines[0].strip() if lines else type(error).__name__
