"""Each kind of kernel error is reported in one line with file, line, block and thread."""

import re

import ml_dtypes
import numpy as np
import pytest

from cuda_simulator import ORDERS, CompilationError, KernelError, Module, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="no g++ 12 on this machine")

# "//!" marks the line of the error
MISTAKES = {
    "read_beyond_the_end": (
        "y[i] = x[i + 1];  //!",
        r"read of 4 bytes out of bounds: it ends after the end of argument 0 \(256 bytes\) by 4",
    ),
    "read_before_the_begin": (
        "y[i] = x[i - 1];  //!",
        r"it begins before the begin of argument 0 \(256 bytes\) by 4",
    ),
    "write_beyond_the_end": (
        "y[2 * i] = x[i];  //!",
        "write of 4 bytes out of bounds: it ends after the end of argument 1",
    ),
    "write_to_constants": ("((float*)x)[i] = 1;  //!", "write to a const array"),
    "null_pointer": ("y[i] = *(const float*)(threadIdx.x * 0ull);  //!", "null pointer"),
    "index_of_a_local_array": (
        "float a[4]; a[0] = 1;\n  for (int k = 1; k <= 4; k++) a[k] = x[k];  //!\n  y[i] = a[3];",
        r"index 4 out of bounds of 'float \[4\]'",
    ),
    "race_of_two_threads": (
        "__shared__ float s[2]; s[0] = x[i];  //!\n  y[i] = s[0];",
        "race: a write after a write by thread",
    ),
    "missing_barrier": (
        "__shared__ float s[32]; s[threadIdx.x] = x[i];\n  y[i] = s[threadIdx.x ^ 1];  //!",
        "race: a read after a write by thread|that no thread of the block has written",
    ),
    "missing_barrier_before_a_write": (
        "__shared__ float s[32]; s[threadIdx.x] = x[i];\n  __syncthreads();\n"
        "  y[i] = s[threadIdx.x ^ 1];  //!\n  s[threadIdx.x] = 1;  //!",
        "race: a (write after a read|read after a write) by thread",
    ),
    "shuffles_are_no_barrier": (
        "__shared__ float s[32]; s[threadIdx.x] = x[i];\n"
        "  float v = __shfl_xor_sync(~0u, x[i], 1);\n  y[i] = v + s[threadIdx.x ^ 1];  //!",
        "race: a read after a write",
    ),
    "narrow_and_wide_accesses": (
        "__shared__ __align__(4) unsigned char s[128];\n"
        "  for (int k = 0; k < 128; k += 32) s[k + threadIdx.x] = 1;\n"
        "  y[i] = ((float*)s)[threadIdx.x];  //!",
        "race: a read after a write|that no thread of the block has written",
    ),
    "race_of_two_blocks": (
        "y[threadIdx.x] = x[i];  //!",
        r"race: a write after a write by thread \(\d+,0,0\) of block \(\d,0,0\)",
    ),
    "read_of_another_block": (
        "y[i] = x[i];  //!\n  if (blockIdx.x == 1) y[i] = y[threadIdx.x];  //!\n"
        "  if (blockIdx.x == 0) y[i] = y[32 + threadIdx.x];  //!",
        r"race: a (read after a write|write after a read) by thread .* of block \(\d,0,0\)",
    ),
    "uninitialized_static": (
        "__shared__ float s[32]; if (threadIdx.x) s[threadIdx.x] = 0;\n  __syncthreads();\n"
        "  y[i] = s[threadIdx.x];  //!",
        "read of shared memory that no thread of the block has written",
    ),
    "uninitialized_dynamic": (
        "extern __shared__ float dynamic[]; if (threadIdx.x) dynamic[threadIdx.x] = 0;\n"
        "  __syncthreads();\n  y[i] = dynamic[threadIdx.x];  //!",
        "read of shared memory that no thread of the block has written",
    ),
    "too_little_dynamic": (
        "extern __shared__ float dynamic[]; dynamic[threadIdx.x + 1] = 0;  //!",
        "write of 4 bytes beyond the 128 bytes of dynamic shared memory",
    ),
    "uninitialized_in_an_atomic": (
        "__shared__ int s; atomicAdd(&s, 1);  //!",
        "read of shared memory that no thread of the block has written",
    ),
    "atomic_and_plain_read": (
        "__shared__ int s; if (threadIdx.x == 0) s = 0;\n  __syncthreads();\n"
        "  atomicAdd(&s, 1);  //!\n  y[i] = s;  //!",
        "race: a (read after a write|write after a read)",
    ),
    "plain_write_and_atomic": (
        "__shared__ int s; if (threadIdx.x == 0) s = 0;  //!\n  atomicMax(&s, 1);  //!",
        "race: a write after a write|that no thread of the block has written",
    ),
    "divergent_shuffle": (
        "if (threadIdx.x < 16) y[i] = __shfl_xor_sync(~0u, x[i], 1);  //!",
        "a warp operation with mask ffffffff, to which not all of these lanes come|"
        "a warp operation's mask names lane",
    ),
    "shuffle_of_a_lane_outside": (
        "if (threadIdx.x < 16) y[i] = __shfl_sync(0xffffu, x[i], 16);  //!",
        "a shuffle reads lane 16, which its mask leaves out",
    ),
    "shuffles_at_two_places": (
        "if (threadIdx.x < 16) y[i] = __shfl_xor_sync(~0u, x[i], 1);  //!\n"
        "  else y[i] = __shfl_xor_sync(~0u, x[i], 1);  //!",
        "lanes of one warp are in different warp operations",
    ),
    "divergent_barrier": (
        "if (threadIdx.x) __syncthreads();  //!\n  else __syncwarp(1);\n"
        "  if (threadIdx.x) __syncwarp(~0u);  //!",
        "different barriers|not all of these lanes come|names lane",
    ),
    "misaligned_vector": (
        "y[i] = ((const float4*)(x + 1))[threadIdx.x / 16].x;  //!",
        "misaligned access of type '.*float4'.*, which needs a multiple of 16 bytes",
    ),
    "misaligned_load": (
        "y[i] = __ldg((const float2*)(x + 1)).x;  //!",
        "misaligned vector access",
    ),
    "integer_overflow": (
        "int n = 65536 + (int)threadIdx.x;\n  y[i] = n * n;  //!",
        "integer overflow in a product",
    ),
    "division_by_zero": ("y[i] = 7 / (int)(threadIdx.x - 3);  //!", "division by zero"),
    "endless": ("while (x[i] == 0) y[i] = 1;  //!", "the kernel does not end"),
    "copy_read_without_a_wait": (
        "__shared__ float s[32]; __pipeline_memcpy_async(s + threadIdx.x, x + i, 4);\n"
        "  __pipeline_commit();\n  y[i] = s[threadIdx.x];  //!\n  __pipeline_wait_prior(0);",
        r"race: a read .* which an asynchronous copy by thread \(\d+,0,0\).* fills",
    ),
    "copy_of_the_next_group": (
        "__shared__ float s[2][32];\n"
        "  for (int k = 0; k < 2; k++) {\n"
        "    __pipeline_memcpy_async(&s[k][threadIdx.x], x + i, 4);\n"
        "    __pipeline_commit();\n  }\n"
        "  __pipeline_wait_prior(1);\n  y[i] = s[0][threadIdx.x];\n"
        "  y[i] += s[1][threadIdx.x];  //!\n  __pipeline_wait_prior(0);",
        "race: a read .* which an asynchronous copy",
    ),
    "copy_that_is_not_committed": (
        "__shared__ float s[32]; __pipeline_memcpy_async(s + threadIdx.x, x + i, 4);\n"
        "  __pipeline_wait_prior(0);\n  y[i] = s[threadIdx.x];  //!",
        "race: a read .* which an asynchronous copy",
    ),
    "copy_read_by_another_thread": (
        "__shared__ float s[32]; __pipeline_memcpy_async(s + threadIdx.x, x + i, 4);\n"
        "  __pipeline_commit();\n  __pipeline_wait_prior(0);\n  y[i] = s[threadIdx.x ^ 1];  //!",
        "race: a read|that no thread of the block has written",
    ),
    "copy_over_what_is_read": (
        "__shared__ float s[32]; s[threadIdx.x] = 0;\n  __syncthreads();\n"
        "  y[i] = s[threadIdx.x ^ 1];  //!\n"
        "  __pipeline_memcpy_async(s + threadIdx.x, x + i, 4);  //!\n"
        "  __pipeline_commit();\n  __pipeline_wait_prior(0);",
        "race: a (write after a read|read after a write)|race: a read .* asynchronous copy",
    ),
    "copy_that_is_never_waited_for": (
        "__shared__ float s[32]; __pipeline_memcpy_async(s + threadIdx.x, x + i, 4);  //!\n"
        "  __pipeline_commit();\n  y[i] = 0;",
        "the thread ends before it waits for an asynchronous copy",
    ),
    "copy_beyond_the_source": (
        "__shared__ float s[32]; __pipeline_memcpy_async(s + threadIdx.x, x + i + 1, 4);  //!\n"
        "  __pipeline_commit();\n  __pipeline_wait_prior(0);",
        "read of 4 bytes out of bounds: it ends after the end of argument 0",
    ),
    "copy_beyond_the_target": (
        "extern __shared__ float dynamic[];\n"
        "  __pipeline_memcpy_async(dynamic + threadIdx.x + 1, x + i, 4);  //!\n"
        "  __pipeline_commit();\n  __pipeline_wait_prior(0);",
        "write of 4 bytes beyond the 128 bytes of dynamic shared memory",
    ),
    "misaligned_copy": (
        "__shared__ uint4 s[8];\n"
        "  if (threadIdx.x < 8) __pipeline_memcpy_async(s + threadIdx.x, x + 1 + i, 16);  //!\n"
        "  __pipeline_commit();\n  __pipeline_wait_prior(0);",
        "misaligned asynchronous copy of 16 bytes",
    ),
    "source_written_while_it_is_copied": (
        "__shared__ float s[32]; y[i] = 1;\n  __syncthreads();\n"
        "  __pipeline_memcpy_async(s + threadIdx.x, y + i, 4);  //!\n  __pipeline_commit();\n"
        "  y[i ^ 1] = 2;  //!\n  __pipeline_wait_prior(0);",
        "race: a (write after a read|read after a write) by thread",
    ),
}

CORRECT = r"""
// total and greatest of n elements, by blocks of 64 threads; the last block sums up
template <typename T> __global__ void total(const T* x, float* parts, unsigned int* n_done,
                                            int* greatest, float* y, int n) {
  __shared__ float sums[2];
  __shared__ bool last;
  extern __shared__ __align__(16) unsigned char memory[];
  T* copied = (T*)memory;  // (2, 64): two copies in flight
  const int i0 = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
  auto copy = [&](int k) {
    const bool inside = i0 + k * step < n;
    __pipeline_memcpy_async(copied + k % 2 * 64 + threadIdx.x, x + (inside ? i0 + k * step : 0), 4,
                            inside ? 0 : 4);
    __pipeline_commit();
  };
  copy(0);
  copy(1);
  float sum = 0;
  for (int k = 0; i0 - (int)threadIdx.x + k * step < n; k++) {
    __pipeline_wait_prior(1);
    sum += (float)copied[k % 2 * 64 + threadIdx.x];
    atomicMax(greatest, (int)copied[k % 2 * 64 + threadIdx.x]);
    copy(k + 2);
  }
  __pipeline_wait_prior(0);
  for (int mask = 16; mask > 0; mask >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = sums[0] + sums[1];
    __threadfence();
    last = atomicInc(n_done, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    float all = 0;
    for (int b = 0; b < gridDim.x; b++) all += __ldcg(parts + b);
    *y = all;
  }
}
"""


def kernels():
    """A source that contains all incorrect kernels, and the line of each error by kernel."""
    text, lines = "#include <cuda_pipeline.h>\n", {}
    for name, (body, _) in MISTAKES.items():
        first = text.count("\n") + 1
        text += f'extern "C" __global__ void {name}(const float* x, float* y) {{\n'
        text += f"  const int i = blockIdx.x * 32 + threadIdx.x;\n  {body}\n}}\n"
        own = text.split("\n")[first - 1 :]
        lines[name] = [first + k for k, line in enumerate(own) if line.endswith("//!")]
    return text, lines


@pytest.fixture(scope="module")
def mistaken():
    text, lines = kernels()
    return Module(text, filename="mistakes.cu"), lines


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_one_line(mistaken, name):
    module, lines = mistaken
    memory = np.zeros(1024, "float32")
    x, y = memory[256:320], memory[640:704]  # an access beyond one array does not reach the other
    for order in ORDERS:
        with pytest.raises(KernelError, match=MISTAKES[name][1]) as raised:
            module.launch(name, (2,), (32,), (x, y), 128, order=order, max_accesses=10_000)
        message = str(raised.value)
        assert "\n" not in message
        assert re.match(rf"{name}: thread \(\d+,0,0\) of block \([01],0,0\): ", message)
        assert any(f"mistakes.cu:{line}" in message for line in lines[name]), message


@pytest.fixture(scope="module")
def correct():
    return Module("#include <cuda_pipeline.h>\n" + CORRECT, ("total<float>", "total<int>"))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_a_correct_kernel(correct, dtype, order):
    n = 700
    x = np.random.default_rng(0).integers(0, 1000, n).astype(dtype)
    parts, y = np.full(3, np.nan, "float32"), np.full(1, np.nan, "float32")
    n_done, greatest = np.zeros(1, "uint32"), np.zeros(1, "int32")
    c_type = {"float32": "float", "int32": "int"}[dtype]
    args = (x, parts, n_done, greatest, y, np.int32(n))
    launch = correct.launch(f"total<{c_type}>", (3,), (64,), args, 2 * 64 * 4, order=order)
    assert y[0] == x.sum() and greatest[0] == x.max() and n_done[0] == 0
    assert launch.read[0] == x.nbytes and launch.written[0] == 0
    assert (launch.read[1], launch.written[1]) == (12, 12)
    assert (launch.read[4], launch.written[4]) == (0, 4)
    assert (launch.grid, launch.block) == ((3, 1, 1), (64, 1, 1))


def test_the_last_block_needs_its_fence():
    module = Module(
        "#include <cuda_pipeline.h>\n" + CORRECT.replace("__threadfence();", ""), ("total<int>",)
    )
    args = (
        *(np.ones(99, "int32"), np.zeros(3, "float32"), np.zeros(1, "uint32")),
        *(np.zeros(1, "int32"), np.zeros(1, "float32"), np.int32(99)),
    )
    with pytest.raises(KernelError, match=r"race: a read after a write by .* of block"):
        module.launch("total<int>", (3,), (64,), args, 512)


ARGUMENTS = (np.zeros(64, "float32"), np.zeros(64, "float32"), np.int32(64), np.float32(1))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, np.zeros(64), "argument 0: an array of float64, expected float32"),
        (0, np.zeros(64, "float16"), "argument 0: an array of float16, expected float32"),
        (0, np.zeros((8, 64), "float32")[:, ::2], "argument 0: the array is not contiguous"),
        (0, np.float32(1), "argument 0: a float32, expected an array or None"),
        (1, ARGUMENTS[0], "argument 0 overlaps argument 1"),
        (2, 64, "argument 2: a int, expected numpy.int32"),
        (2, np.int64(64), "argument 2: int64, expected int32"),
        (3, 1.0, "argument 3: a float, expected numpy.float32"),
        (3, np.float64(1), "argument 3: float64, expected float32"),
    ],
)
def test_wrong_arguments(place, value, message):
    module = Module(
        'extern "C" __global__ void scale(const float* x, float* y, int n, float by) {\n'
        "  for (int i = threadIdx.x; i < n; i += 32) y[i] = x[i] * by;\n}"
    )
    module.launch("scale", (1,), (32,), ARGUMENTS)
    with pytest.raises(KernelError, match=message):
        module.launch("scale", (1,), (32,), (*ARGUMENTS[:place], value, *ARGUMENTS[place + 1 :]))
    with pytest.raises(KernelError, match="takes 4 arguments, not 3"):
        module.launch("scale", (1,), (32,), ARGUMENTS[:3])
    for grid, block in (((0,), (32,)), ((1,), (1056,)), ((1, 65536), (32,))):
        with pytest.raises(KernelError, match="cannot be launched"):
            module.launch("scale", grid, block, ARGUMENTS)


# -- consecutive kernels

OVERLAPPED = r"""
#include <cuda_pipeline.h>
#define WAIT cuda_sim::wait_for_previous_kernel()
#define START cuda_sim::let_next_kernel_start()
extern "C" __global__ void ok(const float* w, const float* x, float* y) {
  START;
  float v = w[threadIdx.x];
  WAIT;
  y[threadIdx.x] = v + x[threadIdx.x];
}
extern "C" __global__ void reads_early(const float* w, const float* x, float* y) {
  float v = x[threadIdx.x];  //!reads_early
  WAIT;
  y[threadIdx.x] = v;
}
extern "C" __global__ void copies_early(const float* w, const float* x, float* y) {
  __shared__ float s[32];
  __pipeline_memcpy_async(s + threadIdx.x, x + threadIdx.x, 4);  //!copies_early
  __pipeline_commit();
  WAIT;
  __pipeline_wait_prior(0);
  y[threadIdx.x] = s[threadIdx.x];
}
extern "C" __global__ void writes_early(const float* w, const float* x, float* y) {
  y[threadIdx.x] = w[threadIdx.x];  //!writes_early
  WAIT;
}
extern "C" __global__ void waits_in_part(const float* w, const float* x, float* y) {
  if (threadIdx.x == 3) return;
  WAIT;
}
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reads_early", "read of what a kernel before wrote, before wait_for_previous_kernel"),
        ("copies_early", "read of what a kernel before wrote, before wait_for_previous_kernel"),
        ("writes_early", "write to global memory before wait_for_previous_kernel"),
        ("waits_in_part", r"thread \(3,0,0\) .*: the thread ends without wait_for_previous_kernel"),
    ],
)
def test_what_an_overlapped_kernel_may_not_do(name, message):
    module = Module(OVERLAPPED, filename="overlapped.cu")
    w, x, y = (np.zeros(32, "float32") for _ in range(3))
    first = module.launch("ok", (1,), (32,), (w, w, x))  # writes x
    module.launch("ok", (1,), (32,), (w, w, y), first_running=first.number)
    if name in ("reads_early", "copies_early"):  # the results of completed kernels may be read
        z = np.zeros(32, "float32")
        module.launch(name, (1,), (32,), (w, x, z))
    with pytest.raises(KernelError, match=message) as raised:  # also after another kernel
        module.launch(name, (1,), (32,), (w, x, y), first_running=first.number)
    lines = [k + 1 for k, s in enumerate(OVERLAPPED.split("\n")) if s.endswith(f"//!{name}")]
    for line in lines:
        assert str(raised.value).endswith(f"overlapped.cu:{line}")


def test_what_a_copy_brings_is_late():
    """A copy reads its source when the thread waits. Its last bytes may be filled with zeros."""
    module = Module(
        "#include <cuda_pipeline.h>\n"
        'extern "C" __global__ void late(float* x, float4* y) {\n'
        "  __shared__ float4 s[32];\n"
        "  __pipeline_memcpy_async(s + threadIdx.x, x + 4 * threadIdx.x, 16, 8);\n"
        "  __pipeline_commit();\n"
        "  x[4 * threadIdx.x] = 7;\n"
        "  __pipeline_wait_prior(0);\n"
        "  y[threadIdx.x] = s[threadIdx.x];\n"
        "}\n"
    )
    x, y = np.arange(128, dtype="float32"), np.full((32, 4), np.nan, "float32")
    module.launch("late", (1,), (32,), (x.copy(), y))
    assert np.array_equal(y, np.stack([np.full(32, 7), x[1::4], 0 * y[:, 2], 0 * y[:, 3]], axis=1))


def test_intrinsics():
    module = Module(
        "#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n"
        'extern "C" __global__ void all(const float* x, int* n, double* d, __half* h,'
        " __nv_bfloat16* b, unsigned long long* q) {\n"
        "  const int i = threadIdx.x;\n"
        "  n[i] = __float2int_rn(x[i]);\n"
        "  n[32 + i] = __dp4a(0x01ff7f80, 0x02fe7f80, i);\n"
        "  n[64 + i] = (int)__byte_perm(0x33221100u, 0x77665544u, 0x7051u + i);\n"
        "  n[96 + i] = __reduce_add_sync(~0u, i - 8);\n"
        "  n[128 + i] = __reduce_max_sync(~0u, i - 40);\n"
        "  n[160 + i] = __syncthreads_count(i < 5) + 100 * __syncthreads_or(i == 31)"
        " + 1000 * __syncthreads_and(i < 31);\n"
        "  n[192 + i] = __shfl_down_sync(~0u, i, 3, 8) + 100 * __shfl_up_sync(~0u, i, 1);\n"
        "  n[224 + i] = __any_sync(~0u, i == 3) + 2 * __all_sync(~0u, i < 31) + 4 * __popc(i);\n"
        "  d[i] = exp(fma((double)x[i], 0.5, 1.0));\n"
        "  h[i] = __float2half_rn(x[i]), b[i] = __float2bfloat16_rn(x[i]);\n"
        "  atomicAdd(q, 1ull << 33), atomicMax(q + 1, (unsigned long long)i);\n"
        "  atomicCAS((unsigned int*)(q + 2), 7u, 100u + i), atomicExch(q + 3, 5ull);\n"
        "  atomicMin((int*)(q + 4), 3 - i);\n"
        "}\n"
    )
    x = np.array([0.5, 1.5, -0.5, -2.5, 3e9, -3e9, np.nan, *np.linspace(-9, 9, 25)], "float32")
    n, d, q = np.zeros(256, "int32"), np.zeros(32), np.array([0, 0, 7, 0, 0], "uint64")
    h, b = np.zeros(32, "float16"), np.zeros(32, ml_dtypes.bfloat16)
    module.launch("all", (1,), (32,), (x, n, d, h, b, q))
    i = np.arange(32)
    n = n.reshape(8, 32)
    assert list(n[0, :7]) == [0, 2, 0, -2, 2**31 - 1, -(2**31), 0]
    assert np.array_equal(n[1], 128 * 128 + 127 * 127 + 1 * 2 + 1 * 2 + i)
    assert n[2, 0] == 0x77005511 and n[2, 1] == 0x77005522
    assert (n[3] == 31 * 16 - 8 * 32).all() and (n[4] == -9).all() and (n[5] == 105).all()
    assert np.array_equal(n[6], np.where(i % 8 < 5, i + 3, i) + 100 * np.maximum(i - 1, 0))
    assert np.array_equal(n[7], 1 + 4 * np.array([bin(k).count("1") for k in i]))
    with np.errstate(over="ignore"):
        assert np.array_equal(h, x.astype("float16"), equal_nan=True)
        assert np.allclose(d, np.exp(x.astype("float64") * 0.5 + 1), equal_nan=True)
    assert np.array_equal(b.astype("float32"), x.astype(b.dtype).astype("float32"), equal_nan=True)
    assert list(q[:2]) == [32 << 33, 31] and q[2] == 100 and q[3] == 5
    assert q[4:].view("int32")[0] == 3 - 31


def test_an_array_of_more_than_2_to_the_31_elements():
    module = Module(
        'extern "C" __global__ void last(signed char* x, long long n, int wide) {\n'
        "  if (wide) x[n - 1] = 1;\n"
        "  else x[(int)(n / 4) * 4 - 1] = 1;\n"
        "}\n"
    )
    x = np.zeros(2**31 + 4, "int8")  # uses memory only where accessed
    module.launch("last", (1,), (1,), (x, np.int64(len(x)), np.int32(1)))
    assert x[-1] == 1
    with pytest.raises(KernelError, match="integer overflow in a product"):
        module.launch("last", (1,), (1,), (x, np.int64(len(x)), np.int32(0)))


def test_a_source_that_does_not_compile():
    with pytest.raises(CompilationError, match=r"oops.*not declared"):
        Module('extern "C" __global__ void f() { oops; }')
