"""Compiles the .cu files for the device, and launches their kernels."""

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
"""What a dtype is called in C++."""
STATIC_LIMIT = 48 * 1024  # bytes of shared memory that a kernel has without asking

OPTIONS = ("--std=c++17",)
LOG = logging.getLogger(__name__)

Argument = Array | np.generic | int | float | None


def instance(template: str, *arguments: np.dtype | str | int) -> str:
    """The name of a template's kernel, as C++ writes it: dtypes, or their names, and numbers.

    >>> instance("gemv", "float16", 1, True)
    'gemv<__half, 1, true>'
    """
    return f"{template}<{', '.join(map(_in_cpp, arguments))}>"


def _in_cpp(argument: np.dtype | str | int) -> str:
    if isinstance(argument, int):  # a bool too
        return str(argument).lower()
    return C_TYPES[str(argument)]


class CublasCalls(threading.local):
    """How many products a thread has left to cuBLAS: a step that does cannot be captured."""

    n_calls = 0


class Kernels:
    """The kernels of npllama/ops/kernels, each compiled at its first launch.

    CuPy keeps compiled kernels on disk, by source, options and device. Several threads may launch
    on one stream, CuPy's default; on streams of their own they would share the counters.

    Attributes:
        cublas: whoever calls cuBLAS counts it here.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.xp = backend.xp
        self._kernels: dict[tuple[str, str], object] = {}
        self._counters: dict[int, Array] = {}
        self.cublas = CublasCalls()
        self._has_told = False  # that kernels are being compiled

    @cached_property
    def n_sms(self) -> int:
        """Streaming multiprocessors of the device."""
        return self.xp.cuda.Device().attributes["MultiProcessorCount"]

    @cached_property
    def max_shared(self) -> int:
        """Bytes of shared memory that a block may ask for."""
        return self.xp.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]

    def counters(self, n: int) -> Array:
        """(n,) uint32, zeros, which a kernel that counts in them leaves as zeros.

        They are made at the first call and kept: a captured step finds them at their address.
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
            file: of npllama/ops/kernels, without .cu.
            name: a template's as `instance` writes it.
            args: contiguous arrays, None for a null pointer; an int is passed as int32, a float
                as float32. Other numbers are given as NumPy's.
            shared: bytes of dynamic shared memory.
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
        """What is compiled for a file, common.cu in front; messages name the file and its line."""
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
                LOG.info("compiling kernels for this GPU: some seconds, at the first start alone")
            module = self.xp.RawModule(code=code, options=OPTIONS, name_expressions=(name,))
            kernel = module.get_function(name)
            with suppress(OSError):  # CuPy could not write there either, and compiles again
                marker.touch()
            # all of the shared memory: two kernels that overlap have their queues there
            kernel.preferred_shared_memory_carveout = 100
            self._kernels[file, name] = kernel
        return self._kernels[file, name]

    def _marker(self, code: str, name: str) -> Path:
        """A file beside CuPy's compiled kernels that is there once CuPy has compiled this one: CuPy
        does not tell whether it will find it."""
        what = repr((code, name, OPTIONS, self.xp.__version__, self._compute_capability))
        folder = os.environ.get("CUPY_CACHE_DIR") or "~/.cupy/kernel_cache"
        digest = hashlib.sha256(what.encode()).hexdigest()[:32]
        return Path(folder).expanduser() / f"npllama-{digest}"

    @cached_property
    def _compute_capability(self) -> str:
        return self.xp.cuda.Device().compute_capability

    @cached_property
    def _overlap(self) -> "_Overlap | None":
        """How kernels are launched that may start early; None where the device cannot."""
        library = driver_library()  # CuPy found it already
        if library is None or int(self._compute_capability) < 90:
            return None
        return _Overlap(self.xp, library)


def _as_c(value: Argument) -> Argument:
    if isinstance(value, bool | np.generic) or value is None:  # a np.float64 is a float too
        return value
    if isinstance(value, int):
        return np.int32(value)
    return np.float32(value) if isinstance(value, float) else value


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: 72 bytes."""

    _fields_ = [
        ("id", ctypes.c_uint),
        ("_padding", ctypes.c_uint),
        ("value", ctypes.c_int),
        ("_rest", ctypes.c_byte * 60),
    ]


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("n_attributes", ctypes.c_uint),
    ]


class _Overlap:
    """Programmatic dependent launch, which CuPy has no call for; captured graphs keep it.

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
    """An argument as the driver reads it."""
    if value is None:
        value = np.int64(0)
    elif not isinstance(value, np.generic):
        value = np.int64(value.data.ptr)
    return ctypes.create_string_buffer(value.tobytes())
