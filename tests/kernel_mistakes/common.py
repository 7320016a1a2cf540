"""Mistakes in common.cu. A small kernel that uses all functions of the file detects them."""

import ml_dtypes
import numpy as np

SOURCE = """
// 16 bytes of T for each lane; element i of them counts i + 1 times in the sum over the warp
template <typename T> __device__ float weighted_sum(const uint4* copied) {
  float numbers[16 / sizeof(T)], sum = 0;
  unpack<T>(copied[threadIdx.x], numbers);
  for (int i = 0; i < (int)(16 / sizeof(T)); i++) sum += (i + 1) * numbers[i];
  return warp_sum(sum);
}
// sums: of x and of q; activated = silu(x), in bfloat16, of the first 32 elements of x
extern "C" __global__ void all(const float* x, const signed char* q, float* sums,
                               __nv_bfloat16* activated) {
  __shared__ uint4 copied[2][32];
  const int lane = threadIdx.x;
  let_next_kernel_start();
  __pipeline_memcpy_async(&copied[0][lane], (const uint4*)x + lane, 16);
  __pipeline_memcpy_async(&copied[1][lane], (const uint4*)q + lane, 16);
  __pipeline_commit();
  wait_for_previous_kernel();
  __pipeline_wait_prior(0);
  const float a = weighted_sum<float>(copied[0]), b = weighted_sum<signed char>(copied[1]);
  if (lane == 0) sums[0] = a, sums[1] = b;
  const float v = silu(x[lane]);
  activated[lane] = narrow<__nv_bfloat16>(v > MINUS_INFINITY ? v : 1.0f);
}
"""

EACH_NUMBER = "for (int i = 0; i < (int)(16 / sizeof(T)); i++) to[i]"

MISTAKES = [
    ("no wait", "  cuda_sim::wait_for_previous_kernel();", ""),
    (
        "the next kernel starts where the wait should be",
        "  cuda_sim::wait_for_previous_kernel();",
        "  cuda_sim::let_next_kernel_start();",
    ),
    ("half of the numbers", EACH_NUMBER, EACH_NUMBER.replace("16", "8")),
    ("one number too many", EACH_NUMBER, EACH_NUMBER.replace("i <", "i <=")),
    ("bytes are not made unsigned", "bits.x ^ 0x80808080u", "bits.x"),
    ("another offset", "- 8388736.0f", "- 8388608.0f"),
    ("bytes in another order", "0x7440u | (i % 4)", "0x7440u | (3 - i % 4)"),
    ("every byte of the first word", "words[i / 4], 0x4B000000u", "words[0], 0x4B000000u"),
    ("half of a warp is summed up", "int mask = 16; mask > 0", "int mask = 8; mask > 0"),
    ("the own number is not added", "v += __shfl_xor_sync", "v = __shfl_xor_sync"),
    ("neighbours are not added", "mask > 0; mask >>= 1", "mask > 1; mask >>= 1"),
    ("a sigmoid of -x", "__expf(-x)", "__expf(x)"),
    ("infinity without its sign", "0xff800000", "0x7f800000"),
    (
        "bfloat16 is cut off",
        "return __float2bfloat16_rn(x);",
        "return {(unsigned short)(__float_as_uint(x) >> 16)};",
    ),
]


def run(launcher):
    rng = np.random.default_rng(0)
    x = rng.integers(-8, 8, (32, 4)).astype("float32")
    q = rng.integers(-128, 128, (32, 16)).astype("int8")
    sums, activated = launcher.xp.empty(2, "float32"), launcher.xp.empty(32, ml_dtypes.bfloat16)
    x_device, q_device = launcher.to_device(x), launcher.to_device(q)
    launcher.launch("common", "all", (1,), (32,), (x_device, q_device, sums, activated))
    truth = [(values * np.arange(1.0, values.shape[1] + 1)).sum() for values in (x, q)]
    assert np.array_equal(launcher.to_host(sums), truth)
    silu = x.flat[:32] / (1 + np.exp(-x.flat[:32].astype("float64")))
    got = launcher.to_host(activated)
    assert np.array_equal(got, silu.astype("float32").astype(ml_dtypes.bfloat16))
