"""A CuPy for tests on machines without a GPU.

It provides strict arrays with CuPy's streams, events, graphs and RawModule; cuda_simulator.py runs
the kernels. It refuses what CuPy refuses, and also these errors, which CuPy does not detect: a
Python float for a `float` parameter, a strided view as an argument of a kernel, memory that a graph
no longer owns, an array that two streams use without synchronization, and a host copy that is read
before it is complete. The semantics are those of CuPy 14.2 (raw.pyx, function.pyx, stream.pyx,
graph.pyx).

    backend = StrictCupyBackend()
    with DEVICE.recording() as launches, DEVICE.thread_order("backward"):
        CupyOps(backend).head(x, head)
    assert launches[0].name == "gemv<float, 1>" and launches[0].read[0] == w.nbytes
"""

import functools
import threading
import types
import weakref
from contextlib import contextmanager

import numpy as np

import strict_array
from cuda_simulator import MAX_SHARED, MAX_STATIC_SHARED, KernelError, Module
from npllama.backend import CupyBackend
from strict_array import StrictArray, StrictModule
from strict_cublas import HANDLE, TYPES, Memory, StrictCublas
from strict_memory import CUDARuntimeError, MemoryPool, PinnedMemory, owner_of, poison
from strict_streams import Event, Graph, Node, Stream, arrays_in, map_arrays

CUBLAS = {"__matmul__", "__rmatmul__", "dot", "einsum", "inner", "matmul", "outer", "tensordot"}
CUBLAS |= {"kron", "vdot"}
UPLOADS = {"array", "asanyarray", "asarray", "ascontiguousarray"}
CAPTURABLE = {
    *(name for name in strict_array.API["functions"] if isinstance(getattr(np, name, 0), np.ufunc)),
    *(f"__{prefix}{name}__" for name in strict_array._ARITHMETIC for prefix in ("", "r", "i")),
    *(f"__{name}__" for name in strict_array._UNARY_AND_COMPARING),
    *("__getitem__", "__setitem__", "astype", "copy", "copyto", "fill", "flatten", "ravel"),
    *("arange", "empty", "empty_like", "full", "full_like", "ones", "ones_like", "zeros"),
    *("zeros_like", "broadcast_to", "expand_dims", "moveaxis", "reshape", "squeeze", "swapaxes"),
    *("transpose", "view", "concatenate", "stack", "where", "clip", "take", "take_along_axis"),
    *("all", "any", "argmax", "argmin", "cumsum", "max", "mean", "min", "prod", "sum", "amax"),
    *("argsort", "partition", "argpartition", "sort", "put_along_axis", *UPLOADS),
}
"""The operations that CuPy 14.2 can capture: one launch, and a result shape known to the host."""


class CupyArray(StrictArray):
    """An array on the device."""

    @property
    def data(self):
        return Memory(self.array)

    def get(self, stream=None, order="C", out=None, blocking=True):
        """Copy to the host. If `blocking` is false, the copy is complete only after a
        synchronization."""
        stream = stream or self._on.stream
        if blocking:
            values = self._on.download(self.array, stream)
            if out is None:
                return values
            out[...] = values
            return out
        self._on.refuse_transfer("D2H", stream)
        stream.copy_to_host(self.array, out)
        return out


class Uses:
    """The last use of each allocation. A use on another stream requires a synchronization in
    between."""

    def __init__(self, pool):
        self._last, self._pool = {}, pool  # id of the owner -> (stream, clock of the stream)
        self._alive = {}  # id of the owner -> a weak reference to it

    def _forget(self, key, _):
        self._last.pop(key, None)
        self._alive.pop(key, None)

    def touch(self, array, stream):
        owner = owner_of(array)
        key = id(owner)
        if key not in self._last:
            self._alive[key] = weakref.ref(owner, functools.partial(self._forget, key))
            self._pool.count(owner, owner.nbytes)
        elif not stream.is_after(*self._last[key]):
            raise CUDARuntimeError(
                f"memory last used on {self._last[key][0]} is used on {stream} without a "
                "synchronization between"
            )
        self._last[key] = (stream, stream.clock)


class CupyDevice(strict_array.Device):
    """The only device of the machine.

    Attributes:
        n_sms: the number of multiprocessors, which grid sizes depend on.
        max_shared: the largest number of bytes of shared memory per block.
        n_captures: the number of graphs captured so far.
    """

    def __init__(self):
        self.pool = MemoryPool()
        self.uses = Uses(self.pool)
        self.n_sms, self.max_shared, self.n_captures = 4, MAX_SHARED, 0
        self.Stream = type("Stream", (Stream,), {"device": self})
        self.Event = type("Event", (Event,), {"device": self})
        self.Stream.null = self.Stream(null=True)
        self._local = threading.local()
        self._launches = None

    # -- state of a thread

    @property
    def stack(self) -> list[Stream]:
        """The stack of current streams of this thread, innermost last."""
        if not hasattr(self._local, "stack"):
            self._local.stack = [self.Stream.null]
        return self._local.stack

    @property
    def stream(self) -> Stream:
        return self.stack[-1]

    @property
    def current(self) -> int:
        """The index of this thread's current device, as if there were several."""
        return getattr(self._local, "device", 0)

    @current.setter
    def current(self, number: int) -> None:
        self._local.device = number

    @property
    def _private_pool(self) -> MemoryPool | None:
        return getattr(self._local, "pool", None)

    @property
    def _order(self) -> str:
        return getattr(self._local, "order", "forward")

    @contextmanager
    def using_allocator(self, malloc):
        pool = getattr(malloc, "__self__", None)
        if not isinstance(pool, MemoryPool):
            raise TypeError("expected the malloc of a MemoryPool")
        before, self._local.pool = self._private_pool, None if pool is self.pool else pool
        try:
            yield
        finally:
            self._local.pool = before

    # -- operations on arrays

    def wrap(self, array):
        return CupyArray(array, self)

    def call(self, name, function, args, kwargs):
        stream = self.stream
        if stream.capture is not None:
            return self._capture(stream, name, function, args, kwargs)
        result = _as_arrays(function(*args, **kwargs))
        inputs, outputs = arrays_in((args, kwargs)), arrays_in(result)
        if not outputs or _are_views(outputs, inputs):
            return result
        if self._private_pool:
            result = map_arrays(self._moved, result)
        if name in ("empty", "empty_like"):
            self.uses.touch(poison(result), stream)  # needs no work on the device
        else:
            outputs = arrays_in(result)
            stream.touch(inputs + outputs, outputs)
        return result

    def change(self, name, function, target, args, kwargs):
        stream = self.stream
        if stream.capture is None:
            stream.touch([target, *arrays_in((args, kwargs))], [target])
            function(target, *args, **kwargs)
            return
        _check_capturable(name, (target, *args), kwargs)
        _trial(function, (target, *args), kwargs)  # raises errors at the caller's line

        def run(_, __, target, args, kwargs):
            function(target, *args, **kwargs)

        stream.queue(Node(run, (target, args, kwargs), written=0))

    def _capture(self, stream, name, function, args, kwargs):
        """Record an operation. Its result is new memory, or a view of an argument."""
        _check_capturable(name, args, kwargs)
        trial, is_view = _trial(function, args, kwargs)
        if is_view:
            return function(*args, **kwargs)
        outputs = map_arrays(lambda array: self._allocated(name, array), trial)
        if name in ("empty", "empty_like"):
            return outputs

        def run(_, __, args, kwargs, outputs):
            results = _as_arrays(function(*args, **kwargs))
            for out, result in zip(arrays_in(outputs), arrays_in(results), strict=True):
                out[...] = result

        stream.queue(Node(run, (args, kwargs, outputs), written=2))
        return outputs

    def _allocated(self, name, like):
        if self._private_pool is None:
            raise CUDARuntimeError(
                f"{name} allocates from the default pool while its stream is capturing: use the "
                "allocator of a private pool that lives as long as the graph"
            )
        return self._private_pool.empty(like.shape, like.dtype)

    def _moved(self, array):
        new = self._private_pool.empty(array.shape, array.dtype)
        new[...] = array
        return new

    # -- the host

    def refuse_transfer(self, kind, stream):
        if stream.capture is not None:
            raise RuntimeError(
                f"the current stream is capturing, so synchronous {kind} transfers are disallowed"
            )

    def upload(self, array) -> CupyArray:
        self.refuse_transfer("H2D", self.stream)
        copy = np.array(array)
        copy = self._moved(copy) if self._private_pool else copy
        self.stream.touch([copy])
        return self.wrap(copy)

    def download(self, array, stream=None) -> np.ndarray:
        stream = stream or self.stream
        self.refuse_transfer("D2H", stream)
        stream.touch([array])
        stream.synchronize()
        return array.copy()

    # -- kernels

    @contextmanager
    def thread_order(self, order):
        """A context manager that sets the order of threads and blocks to one of
        cuda_simulator.ORDERS."""
        before, self._local.order = self._order, order
        try:
            yield
        finally:
            self._local.order = before

    @contextmanager
    def recording(self):
        """A context manager that collects all launches in a list of cuda_simulator.Launch,
        including launches of replayed graphs."""
        before, self._launches = self._launches, []
        try:
            yield self._launches
        finally:
            self._launches = before

    def launch(self, module, name, grid, block, values, shared):
        def run(first_running, before, *values):
            how = {"order": self._order, "first_running": first_running, "before": before}
            launch = module.launch(name, grid, block, values, shared, **how)
            if self._launches is not None:
                self._launches.append(launch)
            return launch.number

        self.stream.queue(Node(run, values))


def _as_arrays(result):
    if isinstance(result, np.ndarray):
        return result
    return map_arrays(np.asarray, result, np.generic)


def _are_views(outputs, inputs):
    owners = {id(owner_of(array)) for array in inputs}
    return all(id(owner_of(array)) in owners for array in outputs)


def _trial(function, args, kwargs):
    """Run an operation on zeros. Returns the result, which has the right shape and dtype, and
    whether it is a view of an argument."""
    zeros = {}

    def stand_in(array):
        return zeros.setdefault(id(array), _zeros_like(array))

    with np.errstate(all="ignore"):
        result = function(*map_arrays(stand_in, args), **map_arrays(stand_in, kwargs))
    result = _as_arrays(result)
    return result, _are_views(arrays_in(result), zeros.values())


def _zeros_like(array):
    """Zeros with the shape, dtype and strides of `array`, in separate memory."""
    begin, end = np.lib.array_utils.byte_bounds(array)
    memory = np.zeros(max(end - begin, 1), "uint8")
    return np.ndarray(array.shape, array.dtype, memory, array.ctypes.data - begin, array.strides)


def _check_capturable(name, args, kwargs):
    if name in CUBLAS:
        raise NotImplementedError(f"{name}: cuBLAS cannot be used while a stream is capturing")
    if name not in CAPTURABLE:
        raise CUDARuntimeError(f"{name} is not known to be captured: add it when it was tried")
    if name in UPLOADS and not arrays_in((args, kwargs)):
        raise RuntimeError(f"{name} uploads from the host while the current stream is capturing")
    if any(not arrays_in(value) and value for value in _lists_in((args, kwargs))):
        raise RuntimeError(f"{name} uploads a list while the current stream is capturing")
    if name in ("__getitem__", "__setitem__"):
        keys = args[1] if isinstance(args[1], tuple) else (args[1],)
        if any(isinstance(key, np.ndarray) and key.dtype == bool for key in keys) and (
            name == "__getitem__" or np.ndim(args[2]) > 0
        ):
            raise CUDARuntimeError(f"{name} by a mask counts on the host while capturing")


def _lists_in(value):
    found = []
    map_arrays(found.append, value, list)
    return found


# -- kernels


class RawKernel:
    """A kernel with the launch semantics of CuPy."""

    def __init__(self, device, module, name):
        self._device, self._module, self.name = device, module, name
        self.max_dynamic_shared_size_bytes = MAX_STATIC_SHARED
        self.preferred_shared_memory_carveout = -1

    def __call__(self, grid, block, args, *, shared_mem=0):
        if not all(isinstance(value, tuple) for value in (grid, block, args)):
            raise TypeError("CuPy takes grid, block and args as tuples")
        limit = self.max_dynamic_shared_size_bytes
        if shared_mem > limit or limit > self._device.max_shared:
            raise CUDARuntimeError(
                f"CUDA_ERROR_INVALID_VALUE: {shared_mem} bytes of dynamic shared memory, "
                f"max_dynamic_shared_size_bytes {limit}, of at most {self._device.max_shared}"
            )
        values = tuple(_kernel_argument(value) for value in args)
        self._module.check(self.name, values)  # raises at the caller's line
        self._device.launch(self._module, self.name, grid, block, values, shared_mem)


def _kernel_argument(value):
    if isinstance(value, StrictArray):
        return value.array
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, int):
        return np.int64(value)  # 8 bytes, as in CuPy
    if isinstance(value, float):
        return np.float64(value)  # 8 bytes, as in CuPy; a `float` parameter would read 4 of them
    if value is None or isinstance(value, np.generic):
        return value
    raise TypeError(f"a kernel's argument is a {type(value).__name__}: expected a device array")


class RawModule:
    """The kernels of a source, compiled by the simulator."""

    def __init__(self, device, code, names):
        self._device = device
        self._module = _module(code, names)

    def get_function(self, name):
        if name not in self._module.names:
            raise CUDARuntimeError(f"CUDA_ERROR_NOT_FOUND: named symbol not found: {name}")
        return RawKernel(self._device, self._module, name)


_module = functools.cache(Module)


# -- the module, and the backend on it


class DeviceOfANumber:
    """cupy.cuda.Device with an index, by default that of the current device."""

    compute_capability, mem_info, cublas_handle = "80", (64 << 30, 80 << 30), HANDLE

    def __init__(self, device, number=None):
        self._device = device
        self.id = device.current if number is None else number
        self.attributes = {
            "MultiProcessorCount": device.n_sms,
            "MaxSharedMemoryPerBlockOptin": device.max_shared,
        }

    def use(self):
        self._device.current = self.id

    def __enter__(self):
        self._before, self._device.current = self._device.current, self.id
        return self

    def __exit__(self, *_):
        self._device.current = self._before

    def synchronize(self):
        self._device.stream.synchronize()


class StrictCupy(StrictModule):
    """The functions of CuPy, and the parts of cupy.cuda that the package uses."""

    def __init__(self, device):
        super().__init__(device)
        runtime = types.SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            getDeviceProperties=lambda device_id: {"name": b"a GPU of the tests"},
            getDeviceCount=lambda: 1,
            **TYPES,
        )
        self.cuda = types.SimpleNamespace(
            cublas=StrictCublas(device),
            Stream=device.Stream,
            Event=device.Event,
            Graph=Graph,
            MemoryPool=MemoryPool,
            using_allocator=device.using_allocator,
            alloc_pinned_memory=PinnedMemory,
            get_current_stream=lambda device_id=-1: device.stream,
            Device=functools.partial(DeviceOfANumber, device),
            runtime=runtime,
        )

    def RawModule(self, *, code, options=(), name_expressions=None):
        if not isinstance(options, tuple):
            raise TypeError("options is a tuple of strings")
        return RawModule(self._on, code, tuple(name_expressions or ()))

    def get_default_memory_pool(self):
        return self._on.pool


DEVICE = CupyDevice()


class StrictCupyBackend(CupyBackend):
    """The CuPy backend with this CuPy. Uploads and downloads follow the rules of strict arrays."""

    def __init__(self):
        super().__init__(StrictCupy(DEVICE))

    def to_device(self, array):
        return array if isinstance(array, StrictArray) else DEVICE.upload(array)

    def to_host(self, array):
        if not isinstance(array, StrictArray):
            raise TypeError(f"to_host was given a {type(array).__name__}: expected a device array")
        return DEVICE.download(array.array)


__all__ = ["DEVICE", "CUDARuntimeError", "KernelError", "StrictCupyBackend"]
