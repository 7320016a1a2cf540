"""Compile the .cu files for the device, and launch their kernels."""

import ctypes
import hashlib
import logging
import os
import threading
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import ModuleType

import numpy as np

from npllama.backend import Array, Backend
from npllama.cuda_device import driver_library

SOURCES = Path(__file__).parent.parent / "kernels"
C_TYPES = {
    "float64": "double",
    "float32": "float",
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "int8": "signed char",
}
"""The C++ types of the dtypes."""
STATIC_LIMIT = 48 * 1024  # bytes of shared memory per thread block that a kernel may use by default

OPTIONS = ("--std=c++17",)
LOG = logging.getLogger(__name__)

Argument = Array | np.generic | int | float | None


def instance(template: str, *arguments: np.dtype | str | int) -> str:
    """The C++ name of an instance of a kernel template.

    Args:
        arguments: the template arguments: dtypes or their names, integers and bools.

    >>> instance("gemv", "float16", 1, True)
    'gemv<__half, 1, true>'
    """
    return f"{template}<{', '.join(map(_in_cpp, arguments))}>"


def _in_cpp(argument: np.dtype | str | int) -> str:
    if isinstance(argument, int):  # includes bool
        return str(argument).lower()
    return C_TYPES[str(argument)]


class CublasCalls(threading.local):
    """The number of cuBLAS calls of each thread. CuPy cannot capture a step with such a call."""

    n_calls = 0


class Kernels:
    """The kernels of npllama/ops/kernels, each compiled at its first launch.

    CuPy caches compiled kernels on disk by source, options and device. Several threads may launch
    kernels on CuPy's default stream. They must not use different streams, because kernels that run
    at the same time would use the same counters.

    Attributes:
        cublas: counts the calls to cuBLAS. Each caller of cuBLAS increments it.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.xp = backend.xp
        self._kernels: dict[tuple[str, str], object] = {}
        self._counters: dict[int, Array] = {}
        self.cublas = CublasCalls()
        self._has_told = False  # whether the log already has the message about compilation

    @cached_property
    def n_sms(self) -> int:
        """The number of streaming multiprocessors of the device."""
        return self.xp.cuda.Device().attributes["MultiProcessorCount"]

    @cached_property
    def max_shared(self) -> int:
        """The maximum number of bytes of shared memory per thread block."""
        return self.xp.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]

    def counters(self, n: int) -> Array:
        """(n,) uint32 counters, which are 0 before and after each kernel that uses them.

        They are allocated at the first call and kept, because captured steps contain their address.
        """
        if n not in self._counters:
            self._counters[n] = self.xp.zeros(n, dtype="uint32")
        return self._counters[n]

    def launch(
        self,
        file: str,
        name: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple[Argument, ...],
        shared: int = 0,
    ) -> None:
        """Queue a kernel on the current stream.

        Args:
            file: a file name in npllama/ops/kernels, without .cu.
            name: the kernel's name. `instance` returns that of a template's instance.
            args: contiguous arrays, None for a null pointer, and numbers. An int is passed as
                int32 and a float as float32. NumPy scalars keep their types.
            grid: the number of thread blocks along each axis.
            block: the number of threads of a thread block along each axis.
            shared: bytes of dynamic shared memory per thread block.
        """
        kernel = self._kernel(file, name)
        if shared > STATIC_LIMIT and kernel.max_dynamic_shared_size_bytes < shared:
            kernel.max_dynamic_shared_size_bytes = shared
        args = tuple(_as_c(value) for value in args)
        if self._overlap is None:
            kernel(grid, block, args, shared_mem=shared)
        else:
            self._overlap.launch(kernel, grid, block, args, shared)

    def source(self, file: str) -> str:
        """The source of a file with common.cu before it. Compiler messages refer to the lines of
        the two files."""
        return "".join(
            f'#line 1 "{part}.cu"\n' + (SOURCES / f"{part}.cu").read_text()
            for part in ("common", file)
        )

    def _kernel(self, file: str, name: str) -> object:
        if (file, name) not in self._kernels:
            code = self.source(file)
            marker = self._marker(code, name)
            if not self._has_told and not marker.exists():
                self._has_told = True
                LOG.info("compiling kernels for this GPU (some seconds, at the first run only)")
            module = self.xp.RawModule(code=code, options=OPTIONS, name_expressions=(name,))
            kernel = module.get_function(name)
            # if the folder is not writable, CuPy cannot cache the kernel there either
            with suppress(OSError):
                marker.touch()
            # as much shared memory as possible, because two overlapping kernels need space for both
            kernel.preferred_shared_memory_carveout = 100
            self._kernels[file, name] = kernel
        return self._kernels[file, name]

    def _marker(self, code: str, name: str) -> Path:
        """The path of an empty file which records that CuPy has compiled this kernel and cached it.

        CuPy cannot report whether its cache contains a kernel. The file is in the cache's folder.
        """
        what = repr((code, name, OPTIONS, self.xp.__version__, self._compute_capability))
        folder = os.environ.get("CUPY_CACHE_DIR") or "~/.cupy/kernel_cache"
        digest = hashlib.sha256(what.encode()).hexdigest()[:32]
        return Path(folder).expanduser() / f"npllama-{digest}"

    @cached_property
    def _compute_capability(self) -> str:
        return self.xp.cuda.Device().compute_capability

    @cached_property
    def _overlap(self) -> "_Overlap | None":
        """The launcher that lets consecutive kernels overlap; None if the device cannot do so."""
        library = driver_library()
        if library is None or int(self._compute_capability) < 90:
            return None
        return _Overlap(self.xp, library)


def _as_c(value: Argument) -> Argument:
    # these types come first, because bool is a subclass of int, and np.float64 of float
    if isinstance(value, bool | np.generic) or value is None:
        return value
    if isinstance(value, int):
        return np.int32(value)
    return np.float32(value) if isinstance(value, float) else value


class _Attribute(ctypes.Structure):
    """The driver's struct CUlaunchAttribute, of 72 bytes."""

    _fields_ = [
        ("id", ctypes.c_uint),
        ("_padding", ctypes.c_uint),
        ("value", ctypes.c_int),
        ("_rest", ctypes.c_byte * 60),
    ]


class _Config(ctypes.Structure):
    """The driver's struct CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("n_attributes", ctypes.c_uint),
    ]


class _Overlap:
    """Programmatic dependent launch: a kernel may start before the previous one ends.

    CuPy has no function for this, so the class calls the driver. The overlap is an attribute of the
    launch, and captured graphs preserve it.

    Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
    """

    _PROGRAMMATIC_STREAM_SERIALIZATION = 6

    def __init__(self, cupy: ModuleType, driver: ctypes.CDLL) -> None:
        self._cupy = cupy
        self._driver = driver
        self._attribute = _Attribute(id=self._PROGRAMMATIC_STREAM_SERIALIZATION, value=1)

    def launch(
        self,
        kernel: object,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple[Argument, ...],
        shared: int,
    ) -> None:
        values = [_bytes(value) for value in args]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        config = _Config(
            grid=(*grid, 1, 1)[:3],
            block=(*block, 1, 1)[:3],
            shared=shared,
            stream=self._cupy.cuda.get_current_stream().ptr,
            attributes=ctypes.pointer(self._attribute),
            n_attributes=1,
        )
        error = self._driver.cuLaunchKernelEx(
            ctypes.byref(config), ctypes.c_void_p(kernel.kernel.ptr), pointers, None
        )
        if error:
            name = ctypes.c_char_p(b"an unknown error")
            self._driver.cuGetErrorName(error, ctypes.byref(name))
            raise RuntimeError(f"cuLaunchKernelEx: {(name.value or b'').decode()} ({error})")


def _bytes(value: Argument) -> ctypes.Array:
    """The memory of an argument, which the driver reads through a pointer."""
    if value is None:
        value = np.int64(0)
    elif not isinstance(value, np.generic):
        value = np.int64(value.data.ptr)
    return ctypes.create_string_buffer(value.tobytes())
