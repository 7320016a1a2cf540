// __nv_bfloat16 for g++: storage, and the conversions that the kernels use.
#pragma once
#include "cuda_sim.h"

struct __nv_bfloat16 { unsigned short bits; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;
template <> struct cuda_sim::TypeName<__nv_bfloat16> {
  static constexpr const char* value = "bfloat16";
};

inline float __bfloat162float(__nv_bfloat16 b) {
  return cuda_sim::bits_as<float>((unsigned int)b.bits << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  if (f != f) return {0x7fff};
  unsigned int u = cuda_sim::bits_as<unsigned int>(f);
  return {(unsigned short)((u + 0x7fff + ((u >> 16) & 1)) >> 16)};  // to nearest, ties to even
}
inline __nv_bfloat16 __float2bfloat16(float f) { return __float2bfloat16_rn(f); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) { return b.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
inline float __low2float(__nv_bfloat162 b) { return __bfloat162float(b.x); }
inline float __high2float(__nv_bfloat162 b) { return __bfloat162float(b.y); }
inline float2 __bfloat1622float2(__nv_bfloat162 b) {
  return {__bfloat162float(b.x), __bfloat162float(b.y)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
