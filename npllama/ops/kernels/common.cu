// What the kernels share. kernels.py puts this text in front of each file: CuPy's cache of compiled
// kernels does not look into #include.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

constexpr unsigned int ALL_LANES = 0xffffffffu;
#define MINUS_INFINITY __int_as_float(0xff800000)  // NVRTC has no INFINITY

// -- one kernel after another ---------------------------------------------------------------------
//
// On sm_90 a kernel may start while the one before it still runs (programmatic dependent launch).
// It then reads its weights ahead, and waits before it reads what kernels write. The one before it
// may itself be waiting still: several kernels in succession overlap, but no array calls of CuPy.
// So every kernel follows three rules, and needs no others:
//   1. let_next_kernel_start() comes first. Without that call the next kernel starts when this one
//      ends, which does for the kernels between the products of a prompt.
//   2. Before the wait it reads only constants, and what was written before the last array call.
//   3. Every thread calls wait_for_previous_kernel() before it writes to global memory, and before
//      it ends. So whoever has waited comes after all kernels before it.
__device__ inline void wait_for_previous_kernel() {
#if defined(CUDA_SIM)
  cuda_sim::wait_for_previous_kernel();
#elif __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void let_next_kernel_start() {
#if defined(CUDA_SIM)
  cuda_sim::let_next_kernel_start();
#elif __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// -- numbers of a storage type, 16 bytes at a time ------------------------------------------------

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(signed char x) { return (float)x; }

template <typename T> __device__ inline T narrow(float x);
template <> __device__ inline float narrow<float>(float x) { return x; }
template <> __device__ inline __half narrow<__half>(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// 16 bytes -> 16 / sizeof(T) floats
template <typename T> __device__ inline void unpack(uint4 bits, float* to) {
  union { uint4 bits; T numbers[16 / sizeof(T)]; } u = {bits};
#pragma unroll
  for (int i = 0; i < (int)(16 / sizeof(T)); i++) to[i] = widen(u.numbers[i]);
}
// A byte b + 128 in the lowest bits of the float 2^23 makes 2^23 + 128 + b: two instructions a
// number, where a conversion from char is slower.
template <> __device__ inline void unpack<signed char>(uint4 bits, float* to) {
  const unsigned int words[4] = {bits.x ^ 0x80808080u, bits.y ^ 0x80808080u,
                                 bits.z ^ 0x80808080u, bits.w ^ 0x80808080u};
#pragma unroll
  for (int i = 0; i < 16; i++)
    to[i] = __uint_as_float(__byte_perm(words[i / 4], 0x4B000000u, 0x7440u | (i % 4))) - 8388736.0f;
}

// -- sums over a warp -----------------------------------------------------------------------------

__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) v += __shfl_xor_sync(ALL_LANES, v, mask);
  return v;
}

__device__ inline float silu(float x) { return x / (1.0f + __expf(-x)); }
