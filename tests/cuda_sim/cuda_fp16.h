// __half for g++: storage, and the conversions that the kernels use.
#pragma once
#include "cuda_sim.h"

struct __half { unsigned short bits; };
struct alignas(4) __half2 { __half x, y; };
using half = __half;
using half2 = __half2;
template <> struct cuda_sim::TypeName<__half> { static constexpr const char* value = "float16"; };

inline float __half2float(__half h) { return cuda_sim::bits_as<_Float16>(h.bits); }
inline __half __float2half_rn(float f) { return {cuda_sim::bits_as<unsigned short>((_Float16)f)}; }
inline __half __float2half(float f) { return __float2half_rn(f); }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline float __low2float(__half2 h) { return __half2float(h.x); }
inline float __high2float(__half2 h) { return __half2float(h.y); }
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline __half2 __float22half2_rn(float2 f) { return __floats2half2_rn(f.x, f.y); }
