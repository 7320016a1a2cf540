// Functions that all kernels share. kernels.py puts this text before each file, because CuPy's
// cache of compiled kernels does not notice changes in #include files.
//
// A line "registers: at most N" before a kernel limits its registers per thread; a test compiles
// the kernel and checks the limit. More registers per thread mean fewer threads per multiprocessor.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

constexpr unsigned int ALL_LANES = 0xffffffffu;
#define MINUS_INFINITY __int_as_float(0xff800000)  // NVRTC has no INFINITY

// -- overlapping kernels --------------------------------------------------------------------------
//
// On GPUs from sm_90 on, a kernel may start while the previous kernel is still running
// (programmatic dependent launch). It can then already read its weights, but must wait before it
// reads the results of other kernels. The previous kernel may also be waiting, so more than two of
// our kernels can overlap. They never overlap with CuPy's array operations. Every kernel follows
// three rules:
//   1. If a kernel calls let_next_kernel_start(), it does so first. Without this call, the next
//      kernel starts when this one ends. That is early enough for the kernels between the products
//      of a prompt.
//   2. Before the wait, a kernel reads only constants, and data that was written before the last
//      array operation of CuPy.
//   3. Every thread calls wait_for_previous_kernel() before it writes to global memory and before
//      it ends. After this call, all earlier kernels have finished.
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

// -- conversions between storage types and float --------------------------------------------------

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

// 16 bytes of T -> 16 / sizeof(T) floats
template <typename T> __device__ inline void unpack(uint4 bits, float* to) {
  union { uint4 bits; T numbers[16 / sizeof(T)]; } u = {bits};
#pragma unroll
  for (int i = 0; i < (int)(16 / sizeof(T)); i++) to[i] = widen(u.numbers[i]);
}
// The same for int8, without the slower conversion from char to float. The lowest bit of the float
// 2^23 is worth 1, so with the byte b + 128 as its lowest 8 bits the float is 2^23 + 128 + b.
// Subtracting 2^23 + 128 leaves b.
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
