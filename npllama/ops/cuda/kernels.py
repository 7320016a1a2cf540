"""Compiles the .cu files for the device, and launches their kernels."""

import ctypes
from functools import cached_property
from pathlib import Path

import numpy as np

from npllama.backend import Array, Backend

SOURCES = Path(__file__).parent.parent / "kernels"
C_TYPES = {
    "float32": "float",
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "int8": "signed char",
}
"""What a dtype is called in a template's argument."""
STATIC_LIMIT = 48 * 1024  # bytes of shared memory that a kernel has without asking

Argument = Array | np.generic | int | float | None


class Kernels:
    """The kernels of npllama/ops/kernels, each compiled at its first launch.

    CuPy keeps compiled kernels on disk, by source, options and device.
    """

    def __init__(self, backend: Backend) -> None:
        self.xp = self._cupy = backend.xp
        self._kernels: dict[tuple[str, str], object] = {}

    @cached_property
    def n_sms(self) -> int:
        """Streaming multiprocessors of the device."""
        return self._cupy.cuda.Device().attributes["MultiProcessorCount"]

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
            name: a template's with its arguments, as "gemv<__half, 1>".
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

    def _kernel(self, file: str, name: str) -> object:
        if (file, name) not in self._kernels:
            code = "".join((SOURCES / f"{part}.cu").read_text() for part in ("common", file))
            module = self._cupy.RawModule(
                code=code, options=("--std=c++17",), name_expressions=(name,)
            )
            kernel = module.get_function(name)
            # all of the shared memory: two kernels that overlap have their queues there
            kernel.preferred_shared_memory_carveout = 100
            self._kernels[file, name] = kernel
        return self._kernels[file, name]

    @cached_property
    def _overlap(self) -> "_Overlap | None":
        """How kernels are launched that may start early; None where the device cannot."""
        if int(self._cupy.cuda.Device().compute_capability) < 90:
            return None
        try:
            return _Overlap(self._cupy)
        except OSError:
            return None


def _as_c(value: Argument) -> Argument:
    if isinstance(value, bool) or value is None:
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

    def __init__(self, cupy: object) -> None:
        self._cupy = cupy
        self._driver = ctypes.CDLL("libcuda.so.1")
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
            raise RuntimeError(f"cuLaunchKernelEx failed with CUDA error {error}")


def _bytes(value: Argument) -> ctypes.Array:
    """An argument as the driver reads it."""
    if value is None:
        value = np.int64(0)
    elif not isinstance(value, np.generic):
        value = np.int64(value.data.ptr)
    return ctypes.create_string_buffer(value.tobytes())
