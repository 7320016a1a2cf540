"""Compiles CUDA C++ with g++, runs its kernels on NumPy arrays, and checks every memory access.

    module = Module(code, ("scale<float>",))
    module.launch("scale<float>", (4,), (32,), (x, y, np.int32(len(x))))

An error in a kernel raises a KernelError with one line: the error, the file and line, and the block
and thread. The comments of the runtime in cuda_sim/ explain the checks.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent / "cuda_sim"
COMMON = ("-std=c++17", "-fPIC", "-g1", "-gdwarf-4", "-w", f"-I{HERE}")
KERNEL = (
    "-O1",
    "-fsanitize=thread",  # linked without libtsan: cuda_sim.cpp defines its functions
    "-fno-sanitize-recover=all",
    "-fsanitize=alignment,bounds,null,signed-integer-overflow,shift,integer-divide-by-zero",
    "-fvisibility=hidden",  # each library needs its own copies of __shared__ variables
    "-fno-gnu-unique",
)
MAX_STATIC_SHARED = 48 * 1024
MAX_SHARED = 227 * 1024
ORDERS = ("forward", "backward", "random")
"""The orders in which to run the blocks of a grid and the threads of a block."""

_DYNAMIC = re.compile(
    r"extern\s+__shared__\s+(?:(?:__align__|alignas)\(\d+\)\s+)?([\w ]+?)\s+(\w+)\[\]\s*;"
)
_PLAIN = re.compile(
    r'^\s*extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)', re.MULTILINE
)
_OVERLAP = ("cuda_sim::wait_for_previous_kernel", "cuda_sim::let_next_kernel_start")


class KernelError(Exception):
    """An error in a kernel or in its arguments, with its place in the source."""


class CompilationError(Exception):
    """The error messages of g++."""


@functools.cache
def compiler() -> str | None:
    """The path of g++ 12 or later, which supports _Float16; None if it is missing or not on
    Linux."""
    path = shutil.which("g++")
    if path is None or sys.platform != "linux":
        return None
    about, version = (
        subprocess.run([path, option], capture_output=True, text=True).stdout
        for option in ("--version", "-dumpversion")
    )
    is_gcc = "Free Software Foundation" in about  # clang can also be installed as g++
    return path if is_gcc and int(version.split(".")[0]) >= 12 else None


@dataclass(frozen=True)
class Launch:
    """A launch that finished without errors.

    Attributes:
        read, written: bytes accessed in each argument, summed over all threads; 0 for scalars and
            null pointers.
        number: the number of this launch, which later launches may refer to.
    """

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    read: tuple[int, ...]
    written: tuple[int, ...]
    number: int


class _Parameter(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_char_p),
        ("is_pointer", ctypes.c_int),
        ("is_const", ctypes.c_int),
        ("size", ctypes.c_int),
    ]


class _Kernel(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("parameters", ctypes.POINTER(_Parameter)),
        ("n_parameters", ctypes.c_int),
        ("call", ctypes.c_void_p),
    ]


class _Extent(ctypes.Structure):
    _fields_ = [
        ("begin", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("granule", ctypes.c_uint32),
        ("writable", ctypes.c_uint32),
        ("argument", ctypes.c_uint32),
        ("unused", ctypes.c_uint32),
        ("read", ctypes.c_uint64),
        ("written", ctypes.c_uint64),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint64),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("extents", ctypes.POINTER(_Extent)),
        ("max_accesses", ctypes.c_uint64),
        ("n_extents", ctypes.c_uint32),
        ("order", ctypes.c_uint32),
        ("seed", ctypes.c_uint32),
        ("overlapped", ctypes.c_uint32),
        ("first_running", ctypes.c_uint32),
        ("number", ctypes.c_uint32),
        ("before", ctypes.POINTER(ctypes.c_uint64)),
        ("n_before", ctypes.c_uint32),
    ]


class Module:
    """The kernels of one source file.

    If the source contains one of the calls in _OVERLAP, its kernels may start before earlier
    kernels have ended. The simulator then also checks the rules in npllama/ops/kernels/common.cu.

    Attributes:
        names: the names of the kernels: the given names, and those of all extern "C" kernels.
    """

    def __init__(self, code: str, names: Sequence[str] = (), filename: str = "kernel.cu") -> None:
        self.names = (*names, *_PLAIN.findall(code))
        self._overlapped = any(call in code for call in _OVERLAP)
        code = _DYNAMIC.sub(r"\1* \2 = (\1*)cuda_sim::dynamic_shared();", code)
        adders = "\n".join(f"CUDA_SIM_KERNEL({i}, {name})" for i, name in enumerate(self.names))
        text = f'#include "cuda_sim.h"\n#line 1 "{filename}"\n{code}\n{adders}\n'
        self._path = _library(Path(filename).stem, text, KERNEL, (str(_runtime_path()),))
        self._kernels = dict(zip(self.names, _registered(self._path), strict=True))

    def check(self, name: str, args: Sequence) -> None:
        """Raise KernelError if the arguments do not match the parameters of the kernel."""
        self._arguments(name, args)

    def launch(
        self,
        name: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: Sequence,
        shared: int = 0,
        *,
        order: str = "forward",
        seed: int = 0,
        first_running: int = 0,
        before: Sequence[tuple[int, int]] = (),
        max_accesses: int = 1 << 26,
    ) -> Launch:
        """Run a kernel.

        Args:
            args: NumPy arrays for device memory, NumPy scalars of exactly the parameter's type, or
                None for a null pointer.
            shared: bytes of dynamic shared memory.
            order: the order in which threads run, one of ORDERS.
            first_running: the number of the oldest launch that may still be running; 0 if none is.
            before: (begin, end) of memory that work other than kernels wrote before that launch.
            max_accesses: a limit on memory accesses and barriers. A kernel that exceeds it is
                assumed not to terminate.

        Raises:
            KernelError: the arguments do not match, or the kernel has an error.
        """
        values, extents = self._arguments(name, args)
        grid, block = ((*size, 1, 1)[:3] for size in (grid, block))
        if min(block) < 1 or np.prod(block) > 1024 or min(grid) < 1 or max(grid[1:]) > 65535:
            raise KernelError(f"{name}: {grid} blocks of {block} threads cannot be launched")
        array = (_Extent * len(extents))(*extents)
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        given = _Launch(
            grid=grid,
            block=block,
            shared=shared,
            arguments=pointers,
            extents=array,
            max_accesses=max_accesses,
            n_extents=len(extents),
            order=ORDERS.index(order),
            seed=seed,
            overlapped=self._overlapped,
            first_running=first_running,
            before=(ctypes.c_uint64 * (2 * len(before)))(*itertools.chain(*before)),
            n_before=len(before),
        )
        error = _runtime().cuda_sim_launch(self._kernels[name], ctypes.byref(given))
        if error:
            raise KernelError(f"{name}: {self._located(error.decode())}")
        read, written = [0] * len(args), [0] * len(args)
        for extent in array:
            read[extent.argument], written[extent.argument] = extent.read, extent.written
        return Launch(name, grid, block, shared, tuple(read), tuple(written), given.number)

    def _arguments(self, name, args):
        """The bytes of each parameter, and the address ranges of the arrays."""
        kernel = self._kernels[name].contents
        if len(args) != kernel.n_parameters:
            raise KernelError(f"{name} takes {kernel.n_parameters} arguments, not {len(args)}")
        values, extents = [], []
        for i, argument in enumerate(args):
            parameter = kernel.parameters[i]
            values.append(_value(f"{name}, argument {i}", argument, parameter))
            if isinstance(argument, np.ndarray):
                begin = argument.ctypes.data
                end, writable = begin + argument.nbytes, int(not parameter.is_const)
                extents.append(_Extent(begin, end, argument.itemsize, writable, i))
        for i, a in enumerate(extents):
            for b in extents[:i]:
                if a.begin < b.end and b.begin < a.end and (a.writable or b.writable):
                    raise KernelError(
                        f"{name}: argument {b.argument} overlaps argument {a.argument}, and one "
                        "of them may be written"
                    )
        return values, extents

    def _located(self, message):
        text, _, offset = message.partition(" @")
        if not offset:
            return message
        command = ["addr2line", "-e", self._path, "-i", offset]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        lines = [line for line in lines if f"{HERE}/" not in line] or lines
        return f"{text}, {Path(lines[0].split(' ')[0]).name}"


def _value(where, argument, parameter):
    """The bytes that the kernel receives for one argument."""
    type_ = parameter.type.decode()
    if not parameter.is_pointer:
        dtype = getattr(argument, "dtype", None)
        if isinstance(argument, np.ndarray) or dtype is None:
            raise KernelError(f"{where}: a {type(argument).__name__}, expected numpy.{type_}")
        if dtype.name != type_:
            raise KernelError(f"{where}: {dtype.name}, expected {type_}")
        return ctypes.create_string_buffer(argument.tobytes(), parameter.size)
    if argument is None:
        return ctypes.c_void_p(0)
    if not isinstance(argument, np.ndarray):
        raise KernelError(f"{where}: a {type(argument).__name__}, expected an array or None")
    if type_ and argument.dtype.name != type_:
        raise KernelError(f"{where}: an array of {argument.dtype.name}, expected {type_}")
    if not argument.flags.c_contiguous:
        raise KernelError(f"{where}: the array is not contiguous; a kernel ignores strides")
    return ctypes.c_void_p(argument.ctypes.data)


# -- compiled libraries, kept in a temporary directory


def _cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"npllama-cuda-sim-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@functools.cache
def _headers() -> str:
    return "".join(path.read_text() for path in sorted(HERE.glob("*.h")))


def _library(stem, text, flags, parts=()) -> Path:
    """The path of the shared library of a source. Compiles it unless the cache contains it."""
    key = hashlib.sha256("\0".join((text, _headers(), *COMMON, *flags, *parts)).encode())
    target = _cache() / f"lib{stem}-{key.hexdigest()[:24]}.so"
    if target.exists():
        return target
    with _locked(target), tempfile.TemporaryDirectory(dir=_cache()) as folder:
        if target.exists():  # another process has compiled it
            return target
        source, partial = Path(folder) / f"{stem}.cpp", Path(folder) / "partial.so"
        source.write_text(text)
        part = Path(folder) / "part.o"
        read_first = f"-I{_precompiled(flags)}"
        _run([compiler(), read_first, *COMMON, *flags, "-c", source, "-o", part])
        # without `flags`: -fsanitize=thread would link libtsan
        _run([compiler(), "-shared", part, *parts, "-o", partial, "-ldl"])
        partial.replace(target)  # atomic, because another process may write the same file
    return target


@contextlib.contextmanager
def _locked(target):
    """Let only one process write a file. The others wait for it instead of compiling it again."""
    with open(target.with_name(f"{target.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a process that ends releases its locks
        yield


@functools.cache
def _precompiled(flags) -> Path:
    """A folder with the precompiled header of cuda_sim.h for these flags, which speeds up
    compilation."""
    key = hashlib.sha256("\0".join((_headers(), *COMMON, *flags)).encode())
    target = _cache() / f"headers-{key.hexdigest()[:24]}"
    with _locked(target), tempfile.TemporaryDirectory(dir=_cache()) as folder:
        if not target.exists():
            header = Path(folder) / "complete" / "cuda_sim.h.gch"
            header.parent.mkdir()
            command = [compiler(), *COMMON, *flags, "-x", "c++-header", HERE / "cuda_sim.h"]
            _run([*command, "-o", header])
            header.parent.rename(target)
    return target


def _run(command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise CompilationError(result.stderr)


@functools.cache
def _runtime_path() -> Path:
    return _library("cuda_sim", (HERE / "cuda_sim.cpp").read_text(), ("-O2",))


@functools.cache
def _runtime() -> ctypes.PyDLL:
    # PyDLL keeps the interpreter's lock, so only one launch runs at a time
    library = ctypes.PyDLL(str(_runtime_path()), mode=ctypes.RTLD_GLOBAL)
    library.cuda_sim_kernel.restype = ctypes.POINTER(_Kernel)
    library.cuda_sim_launch.restype = ctypes.c_char_p
    return library


_LOADING = threading.Lock()
_KERNELS: dict[Path, list] = {}


def _registered(path):
    """The kernels of a library. A library registers its kernels when it is loaded, so it is loaded
    only once."""
    with _LOADING:
        if path not in _KERNELS:
            runtime = _runtime()
            before = runtime.cuda_sim_n_kernels()
            ctypes.CDLL(str(path))
            numbers = range(before, runtime.cuda_sim_n_kernels())
            _KERNELS[path] = [runtime.cuda_sim_kernel(i) for i in numbers]
        return _KERNELS[path]
