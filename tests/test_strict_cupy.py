"""The CuPy for tests: the errors that it detects, and replays of graphs with new array contents."""

import contextlib
import gc

import numpy as np
import pytest

from conftest import make_llama, make_ops
from cuda_simulator import KernelError, compiler
from npllama.backend import CupyBackend
from strict_array import StrictArray
from strict_cupy import DEVICE, CUDARuntimeError, StrictCupyBackend

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no g++ 12 on this machine")

SCALE = """
#include <cuda_pipeline.h>
template <typename T> __global__ void scale(const T* x, T* y, int n, float by) {
  extern __shared__ float copied[];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  copied[threadIdx.x] = i < n ? (float)x[i] : 0;
  cuda_sim::wait_for_previous_kernel();
  if (i < n) y[i] = (T)(copied[threadIdx.x] * by);
}
"""


@pytest.fixture
def backend():
    return StrictCupyBackend()


@pytest.fixture
def xp(backend):
    return backend.xp


@pytest.fixture
def move(backend):
    def move(array):
        moved = backend.to_device(array)
        backend.xp.cuda.get_current_stream().synchronize()
        return moved

    return move


@pytest.fixture
def scale(xp):
    """A function launch(x, y, by)."""
    module = xp.RawModule(code=SCALE, options=("--std=c++17",), name_expressions=("scale<float>",))
    kernel = module.get_function("scale<float>")

    def launch(x, y, by, *, n=None, shared=128):
        n = np.int32(x.size if n is None else n)
        kernel((-(-x.size // 32),), (32,), (x, y, n, by), shared_mem=shared)

    launch.kernel = kernel
    return launch


@pytest.fixture
def x(move):
    return move(np.ones((3, 3), "float32"))


@pytest.fixture
def capturing(xp, x):
    """A current stream that captures, with a private pool. x was allocated before."""
    stream, pool = xp.cuda.Stream(non_blocking=True), xp.cuda.MemoryPool()
    with stream, xp.cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        yield stream
        if stream.is_capturing():
            with contextlib.suppress(CUDARuntimeError):
                stream.end_capture()


def test_it_is_the_cupy_backend(backend, xp):
    assert isinstance(backend, CupyBackend) and backend.name == "cupy"
    assert xp.cuda.Device().attributes["MultiProcessorCount"] == DEVICE.n_sms
    assert backend.device_name() and backend.free_bytes() > 0
    array = backend.to_device(np.zeros(1000, "float32"))
    used = xp.get_default_memory_pool().used_bytes()
    assert backend.to_device(array) is array and array.data.ptr == array.array.ctypes.data
    del array
    assert xp.get_default_memory_pool().used_bytes() == used - 4000


def test_fresh_memory_holds_anything(xp):
    assert np.isnan(xp.empty(3, "float32").array).all()
    assert (xp.empty_like(xp.zeros(3, "int32")).array == -1).all()


# -- kernels


@needs_compiler
def test_a_launch_is_recorded(scale, move, xp, backend):
    x, y = move(np.arange(40, dtype="float32")), xp.empty(40, "float32")
    for order in ("forward", "backward", "random"):
        with DEVICE.recording() as launches, DEVICE.thread_order(order):
            scale(x, y, np.float32(2))
        assert np.array_equal(backend.to_host(y), 2 * x.array)
        (launch,) = launches
        assert (launch.name, launch.grid, launch.block) == ("scale<float>", (2, 1, 1), (32, 1, 1))
        assert launch.read[:2] == (160, 0) and launch.written[:2] == (0, 160)
    scale(x, y, np.float32(2))
    assert len(launches) == 1


@needs_compiler
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda xp, a: {"by": 2.0}, KernelError, "argument 3: float64, expected float32"),
        (lambda xp, a: {"x": a.array}, TypeError, "is a ndarray: expected a device array"),
        (lambda xp, a: {"x": xp.zeros(80, "float32")[::2]}, KernelError, "is not contiguous"),
        (lambda xp, a: {"x": xp.zeros(40, "float16")}, KernelError, "array of float16, expected"),
        (lambda xp, a: {"x": xp.zeros(40)}, KernelError, "array of float64, expected float32"),
        (lambda xp, a: {"x": a[:39], "n": 40}, KernelError, "out of bounds"),
        (lambda xp, a: {"shared": 124}, KernelError, "beyond the 124 bytes"),
        (lambda xp, a: {"shared": 49_156}, CUDARuntimeError, "max_dynamic_shared_size_bytes"),
    ],
)
def test_what_a_launch_refuses(scale, xp, move, change, error, message):
    x, y = move(np.zeros(40, "float32")), xp.empty(40, "float32")
    given = {"x": x, "y": y, "by": np.float32(2)}
    scale(**given)
    with pytest.raises(error, match=message):
        scale(**{**given, **change(xp, x)})


@needs_compiler
def test_more_shared_memory_is_asked_for(scale, xp, move):
    x, y = move(np.zeros(40, "float32")), xp.empty(40, "float32")
    scale.kernel.max_dynamic_shared_size_bytes = 200 << 10
    scale(x, y, np.float32(1), shared=200 << 10)
    scale.kernel.max_dynamic_shared_size_bytes = 228 << 10
    with pytest.raises(CUDARuntimeError, match="of at most 232448"):
        scale(x, y, np.float32(1))
    with pytest.raises(TypeError, match="tuples"):
        scale.kernel([1], (32,), ())


@needs_compiler
def test_a_kernel_knows_what_was_written_before_it(scale, xp, move):
    x, y, z = (move(np.zeros(40, "float32")) for _ in range(3))
    one = np.float32(1)
    for n_between in range(2):  # also after a kernel in between
        scale(x, y, one)
        xp.empty(40, "float32")  # needs no work on the device
        for _ in range(n_between):
            scale(x, z, one)
        with pytest.raises(KernelError, match="read of what a kernel before wrote"):
            scale(y, z, one)
    y += 1  # waits for all earlier work, but the kernel below does not wait for it
    scale(x, z, one)
    with pytest.raises(KernelError, match="read of what the work before wrote"):
        scale(y[1:], z, one)


def test_another_name_is_no_kernel(xp):
    with pytest.raises(CUDARuntimeError, match="named symbol not found: other"):
        xp.RawModule(code='extern "C" __global__ void f() {}').get_function("other")


# -- capture


@needs_compiler
def test_a_captured_sequence_replays_with_new_contents(scale, xp, move, backend):
    stream, pool = xp.cuda.Stream(non_blocking=True), xp.cuda.MemoryPool()
    x, table = move(np.arange(6, dtype="float32")), move(np.arange(12.0).reshape(4, 3))
    state = move(np.zeros(6))
    with stream, xp.cuda.using_allocator(pool.malloc):
        captures = DEVICE.n_captures
        stream.begin_capture()
        picked = xp.take(table, xp.argmax(x) - 2, axis=0)
        y = xp.empty(6, "float32")
        scale(x, y, np.float32(3))
        z = xp.where(y > 4, y - 1, -1.0)[1:].reshape(5, 1)
        state[1:] += z[:, 0]
        rising = xp.sort(xp.concatenate([z[:, 0], picked]))
        rows = table[(xp.asarray(x[:2]) % 4).astype("int32"), 1]
        assert np.isnan(z.array).all() and (state.array == 0).all()  # nothing was executed
        graph = stream.end_capture()
        assert DEVICE.n_captures == captures + 1
        del y  # its memory returns to the pool
        gc.collect()
        total = np.zeros(6)
        for values in (np.arange(6), np.arange(6)[::-1], np.array([1, 0, 3, 5, 2, 2])):
            x[...] = backend.to_device(values.astype("float32"))
            with DEVICE.recording() as launches:
                graph.launch()
            assert [launch.name for launch in launches] == ["scale<float>"]
            want = np.where(3 * values > 4, 3 * values - 1, -1)[1:]
            total[1:] += want
            assert np.array_equal(backend.to_host(z)[:, 0], want)
            assert np.array_equal(backend.to_host(state), total)
            row = table.array[np.argmax(values) - 2]
            assert np.array_equal(backend.to_host(rising), np.sort([*want, *row]))
            assert np.array_equal(backend.to_host(rows), table.array[values[:2] % 4, 1])


@pytest.mark.parametrize(
    "act",
    [
        lambda xp, x: x @ x.T,
        lambda xp, x: xp.matmul(x, x.T),
        lambda xp, x: xp.dot(x, x.T),
        lambda xp, x: xp.tensordot(x, x),
        lambda xp, x: xp.einsum("ij,ij->i", x, x),
    ],
)
def test_cublas_is_not_captured(xp, x, capturing, act):
    with pytest.raises(NotImplementedError, match="cuBLAS"):
        act(xp, x)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda backend, x: backend.to_host(x), "D2H transfers are disallowed"),
        (lambda backend, x: x.get(), "D2H transfers are disallowed"),
        (lambda backend, x: x.get(out=pinned(backend), blocking=False), "D2H transfers"),
        (lambda backend, x: backend.to_device(np.zeros(3)), "H2D transfers are disallowed"),
        (lambda backend, x: backend.xp.asarray([1, 2]), "asarray uploads from the host"),
        (lambda backend, x: backend.xp.array(1.0), "array uploads from the host"),
        (lambda backend, x: x[[0, 1]], "uploads a list"),
        (lambda backend, x: x.__setitem__([0, 1], 0), "uploads a list"),
        (lambda backend, x: x[x > 0], "counts on the host"),
        (lambda backend, x: x.__setitem__(x > 0, x[0]), "counts on the host"),
        (lambda backend, x: x.nonzero(), "nonzero is not known to be captured"),
        (lambda backend, x: backend.xp.unique(x), "unique is not known to be captured"),
        (lambda backend, x: stream_of(backend).begin_capture(), "already capturing"),
    ],
)
def test_what_a_capture_refuses(backend, x, capturing, act, message):
    with pytest.raises(RuntimeError, match=message):
        act(backend, x)


@pytest.mark.parametrize(
    "act",
    [
        lambda stream, xp: stream.synchronize(),
        lambda stream, xp: xp.cuda.Device().synchronize(),
        lambda stream, xp: stream.record().synchronize(),
        lambda stream, xp: stream.wait_event(xp.cuda.Stream.null.record()),
        lambda stream, xp: stream.done,
    ],
)
def test_waiting_ends_a_capture(xp, capturing, act):
    try:
        act(capturing, xp)
    except CUDARuntimeError as error:
        assert "cudaErrorStreamCaptureUnsupported" in str(error)
    with pytest.raises(CUDARuntimeError, match="cudaErrorStreamCaptureInvalidated"):
        capturing.end_capture()


def test_a_capture_is_not_on_the_null_stream(xp):
    with pytest.raises(RuntimeError, match="default"):
        xp.cuda.get_current_stream().begin_capture()
    with pytest.raises(CUDARuntimeError, match="not capturing"):
        xp.cuda.Stream(non_blocking=True).end_capture()


@pytest.mark.parametrize("act", [lambda xp, x: x + 1, lambda xp, x: xp.empty(3)])
def test_a_capture_allocates_from_a_private_pool(xp, x, act):
    stream = xp.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        with pytest.raises(CUDARuntimeError, match="allocates from the default pool"):
            act(xp, x)
        with (
            xp.cuda.using_allocator(xp.get_default_memory_pool().malloc),
            pytest.raises(CUDARuntimeError, match="allocates from the default pool"),
        ):
            act(xp, x)
        x += 1
        x[0] = x[1]
        assert x.T[0].shape == (3,)
        stream.end_capture().launch()
    assert (x.array == 2).all()
    with pytest.raises(TypeError, match="malloc of a MemoryPool"), xp.cuda.using_allocator(len):
        pass


def test_an_error_is_raised_where_it_is_captured(x, capturing):
    with pytest.raises(ValueError, match="broadcast"):
        x[...] = x[:2, :2]
    with pytest.raises(TypeError, match="Cannot cast"):
        x += x.astype("complex64")


@pytest.mark.parametrize("lost", ["x", "pool"])
def test_a_graph_does_not_keep_its_memory(xp, move, lost):
    stream = xp.cuda.Stream(non_blocking=True)
    held = {"x": move(np.ones((3, 3), "float32")), "pool": xp.cuda.MemoryPool()}
    with stream:
        stream.begin_capture()
        with xp.cuda.using_allocator(held["pool"].malloc):
            z = (held["x"] + 1) * 2  # the memory of the sum stays in the pool
        graph = stream.end_capture()
        graph.launch()
        assert (z.array == 4).all()
        del held[lost]
        gc.collect()
        with pytest.raises(CUDARuntimeError, match=r"shape \(3, 3\), that was freed"):
            graph.launch()


def test_a_pool_hands_memory_out_again(xp):
    pool = xp.cuda.MemoryPool()
    with xp.cuda.using_allocator(pool.malloc):
        a = xp.zeros((2, 3), "float32")
        view, address = a[1], a.data.ptr
        assert address % 512 == 0 and pool.used_bytes() == 512
        del a
        assert (view.array == 0).all() and pool.used_bytes() == 512
        del view
        gc.collect()
        assert pool.used_bytes() == 0 and pool.total_bytes() == pool.free_bytes() == 512
        assert xp.ones(5).data.ptr == address
        gc.collect()
        pool.free_all_blocks()
        assert pool.total_bytes() == 0


# -- streams and the host


def test_streams_that_do_not_wait_for_each_other(xp, backend):
    x = backend.to_device(np.ones(3))
    stream = xp.cuda.Stream(non_blocking=True)
    with stream:
        with pytest.raises(CUDARuntimeError, match="the null stream is used on stream"):
            x += 1
        stream.wait_event(xp.cuda.Stream.null.record())
        x += 1
    with pytest.raises(CUDARuntimeError, match="is used on the null stream without"):
        backend.to_host(x)
    stream.synchronize()
    assert (backend.to_host(x) == 2).all()
    with xp.cuda.Stream():  # waits for the null stream, and vice versa
        x += 1
    assert (backend.to_host(x) == 3).all()


def pinned(backend, shape=(3, 3), dtype="float32"):
    n = int(np.prod(shape))
    memory = backend.xp.cuda.alloc_pinned_memory(n * np.dtype(dtype).itemsize)
    return np.frombuffer(memory, dtype, n).reshape(shape)


def stream_of(backend):
    return backend.xp.cuda.get_current_stream()


@pytest.mark.parametrize("wait", ["event", "stream", "later event"])
def test_a_copy_to_pinned_memory_is_there_when_it_was_waited_for(backend, xp, x, wait):
    host, event = pinned(backend), xp.cuda.Event()
    assert x.get(out=host, blocking=False) is host
    event.record()
    x += 1  # later work does not change the copy
    assert np.isnan(host).all()
    if wait == "later event":
        event = stream_of(backend).record()
    (stream_of(backend) if wait == "stream" else event).synchronize()
    assert (host == 1).all()


def test_an_event_before_the_copy_does_not_bring_it(backend, xp, x):
    host, event = pinned(backend), stream_of(backend).record()
    x.get(out=host, blocking=False)
    event.synchronize()
    assert np.isnan(host).all()
    assert (x.get() == 1).all() and (host == 1).all()


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (lambda backend: np.zeros((3, 3), "float32"), CUDARuntimeError, "needs pinned memory"),
        (lambda backend: pinned(backend, (9,)), ValueError, r"expected .* float32 \(3, 3\)"),
        (lambda backend: pinned(backend, dtype="float64"), ValueError, "out is float64"),
        (lambda backend: pinned(backend).T, ValueError, "expected contiguous"),
    ],
)
def test_where_a_copy_does_not_go(backend, x, out, error, message):
    with pytest.raises(error, match=message):
        x.get(out=out(backend), blocking=False)


# -- use in place of CuPy


def test_without_a_compiler_array_calls_are_made():
    ops = make_ops("strict-cupy")
    assert ops.backend.name == "strict" and not hasattr(ops.xp, "RawModule")
    completion = make_llama(ops).generate([1, 5], max_new_tokens=6, ignore_eos=True)
    assert len(completion.ids) == 6


def test_arrays_are_strict_ones(backend, x):
    assert isinstance(x, StrictArray) and isinstance(x + 1, type(x))
    with pytest.raises(TypeError, match="NumPy array among device arrays"):
        x + np.ones(3)
    with pytest.raises(TypeError, match="expected a device array"):
        backend.to_host(np.ones(3))
