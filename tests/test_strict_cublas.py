"""The cuBLAS for tests: it computes what npllama.ops.cuda.cublas requests, and detects errors."""

import numpy as np
import pytest

from cuda_simulator import compiler
from npllama.ops.cuda.cublas import product
from strict_cublas import CUBLASError
from strict_cupy import DEVICE, StrictCupyBackend

pytestmark = pytest.mark.skipif(compiler() is None, reason="no g++ 12 on this machine")


@pytest.fixture
def cupy():
    return StrictCupyBackend().xp


def arrays(*shapes, dtype="float16"):
    rng = np.random.default_rng(0)
    return [DEVICE.upload(rng.standard_normal(shape).astype(dtype)) for shape in shapes]


def host(a):
    return a.array.astype("float64")


def test_rows_times_rows(cupy):
    x, w = arrays((5, 32), (24, 32))
    out = cupy.empty((5, 24), dtype="float32")
    product(cupy, x, w, out)
    assert np.allclose(host(out), host(x) @ host(w).T, atol=1e-5)
    before = host(out)
    product(cupy, x, w, out, alpha=0.5, beta=1.0)
    assert np.allclose(host(out), before * 1.5, atol=1e-5)


def test_a_stack_of_views_of_either_layout(cupy):
    cache, q = arrays((3, 40, 16), (3, 6, 16))
    k = cache[:2, :21]  # (2, 21, 16) with a stride of 40 rows
    scores = cupy.empty((2, 6, 24), dtype="float32")
    product(cupy, q[:2], k, scores[:, :, :21], 0.25)
    truth = 0.25 * host(q[:2]) @ host(k).swapaxes(1, 2)
    assert np.allclose(host(scores)[:, :, :21], truth, atol=1e-5)
    assert np.isnan(host(scores)[:, :, 21:]).all()  # unchanged
    (p,) = arrays((2, 6, 24))
    out = cupy.empty((6, 2, 16), dtype="float16")  # every second row of each matrix
    product(cupy, p[:, :, :21], k.swapaxes(1, 2), out.swapaxes(0, 1))
    truth = host(p)[:, :, :21] @ host(k)
    assert np.abs(host(out).swapaxes(0, 1) - truth).max() < 1e-2


def test_bfloat16_and_a_part_of_the_columns(cupy):
    x, w = arrays((5, 32), (24, 32), dtype="bfloat16")
    out = cupy.zeros((5, 48), dtype="float32")
    product(cupy, x, w, out[:, 8:32])
    assert np.allclose(host(out)[:, 8:32], host(x) @ host(w).T, atol=1e-5)
    assert not host(out)[:, :8].any() and not host(out)[:, 32:].any()


REFUSED = {
    "types that do not go together": lambda x, w, out: (x.astype("bfloat16"), w, out),
    "not by float32": lambda x, w, out: (x.astype("float32"), w.astype("float32"), out),
    "ends outside": lambda x, w, out: (x, w, out[:3]),
    "leading dimension below": lambda x, w, out: (x, w, out.reshape(10, 12)),
    "do not begin at 16 bytes": lambda x, w, out: (x[:, 4:], w[:, 4:], out),
    "in the memory of an operand": lambda x, w, out: (x[:4], w[:8], x[1:, :8]),
    "nothing to multiply": lambda x, w, out: (x[:0], w, out),
}


@pytest.mark.parametrize("message", REFUSED)
def test_mistakes_are_refused(cupy, message):
    x, w = arrays((5, 32), (24, 32))
    out = cupy.empty((5, 24), dtype="float32")
    operands = REFUSED[message](x, w, out)
    with pytest.raises(CUBLASError, match=message):
        product(cupy, *operands)


def test_an_array_that_is_gone_is_refused(cupy):
    x, w = arrays((5, 32), (24, 32))
    out = cupy.empty((5, 24), dtype="float32")
    address = w.data.ptr
    del w
    cublas, handle = cupy.cuda.cublas, cupy.cuda.Device().cublas_handle
    with pytest.raises(CUBLASError, match="A: no live array"):
        call = (handle, 1, 0, 24, 5, 32, 0, address, 2, 32, x.data.ptr, 2, 32, 0, out.data.ptr)
        cublas.gemmEx(*call, 0, 24, 68, -1)


def test_no_product_while_capturing(cupy):
    x, w = arrays((5, 32), (24, 32))
    out = cupy.empty((5, 24), dtype="float32")
    cupy.cuda.get_current_stream().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        with pytest.raises(NotImplementedError, match="capturing"):
            product(cupy, x, w, out)
        stream.end_capture()
