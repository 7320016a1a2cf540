// The parts of CUDA C++ that the kernel files use, implemented for g++ on the CPU.
//
// Each thread of a block is a fiber (see cuda_sim.cpp), and blocks run one after another. Kernels
// are compiled with -fsanitize=thread but linked without libtsan, so each of their loads and stores
// calls a function in cuda_sim.cpp. There each element of an array has a record of its last
// accesses: the thread, and the number of barriers that the thread had passed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define CUDA_SIM 1
#undef INFINITY  // NVRTC does not define these macros
#undef NAN
#define __global__
#define __device__
#define __host__
#define __constant__ const
// A static variable is enough, because only one block runs at a time. `used` prevents g++ from
// removing stores to variables that are never read. cuda_simulator.py rewrites extern declarations.
#define __shared__ __attribute__((used)) static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
// As default arguments, these builtins evaluate to the file and line of the caller.
#define CUDA_SIM_HERE const char* file = __builtin_FILE(), int line = __builtin_LINE()
#define CUDA_SIM_SITE (cuda_sim::Site{file, line})
#define CUDA_SIM_UNWATCHED __attribute__((no_sanitize("thread")))

// -- vector types, aligned as in CUDA, so that UBSan detects misaligned vector accesses -----------

#define CUDA_SIM_VECTOR(T, name, a1, a2, a4)                                                      \
  struct name##1 { T x; };                                                                        \
  struct alignas(a2) name##2 { T x, y; };                                                         \
  struct name##3 { T x, y, z; };                                                                  \
  struct alignas(a4) name##4 { T x, y, z, w; };                                                   \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                      \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                              \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_SIM_VECTOR(signed char, char, 1, 2, 4)
CUDA_SIM_VECTOR(unsigned char, uchar, 1, 2, 4)
CUDA_SIM_VECTOR(short, short, 2, 4, 8)
CUDA_SIM_VECTOR(unsigned short, ushort, 2, 4, 8)
CUDA_SIM_VECTOR(int, int, 4, 8, 16)
CUDA_SIM_VECTOR(unsigned int, uint, 4, 8, 16)
CUDA_SIM_VECTOR(float, float, 4, 8, 16)
CUDA_SIM_VECTOR(double, double, 8, 16, 16)
CUDA_SIM_VECTOR(long long, longlong, 8, 16, 16)
CUDA_SIM_VECTOR(unsigned long long, ulonglong, 8, 16, 16)
struct dim3 { unsigned int x = 1, y = 1, z = 1; };

// const, because kernels only read them, and because reads of constants are not instrumented
extern "C" const uint3 threadIdx, blockIdx;
extern "C" const dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// -- the runtime: functions that fibers call -----------------------------------------------------

namespace cuda_sim {
struct Site { const char* file; int line; };
enum Kind { SHUFFLE, BALLOT, BARRIER, REDUCE };
enum Reduction { ADD, MIN, MAX, UMIN, UMAX, AND, OR, XOR };
struct Votes { int any, all, count; };

Votes block_barrier(int vote, Site);
uint64_t warp_operation(Kind, unsigned int mask, uint64_t value, int source, Site);
void fence();
void before_atomic(void* address, int size, Site);
void* dynamic_shared();
int lane();
void copy_later(void* shared, const void* global, size_t size, size_t zeros, Site);
void commit_copies();
void wait_for_copies(size_t n);
void wait_for_previous_kernel(const char* file = __builtin_FILE(), int line = __builtin_LINE());
void let_next_kernel_start();
[[noreturn]] void fail(const char* what, Site);

template <class To, class From> inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
template <class T> inline uint64_t pack(T v) {
  static_assert(sizeof(T) <= 8);
  uint64_t u = 0;
  __builtin_memcpy(&u, &v, sizeof v);
  return u;
}
template <class T> inline T unpack(uint64_t u) {
  T v;
  __builtin_memcpy(&v, &u, sizeof v);
  return v;
}
template <class T> inline T shuffle(unsigned int mask, T v, int source, Site s) {
  return unpack<T>(warp_operation(SHUFFLE, mask, pack(v), source, s));
}
inline void check_aligned(const void* p, int n, Site s) {
  if ((uintptr_t)p % n) fail("misaligned vector access", s);
}
template <class T> struct Same { using type = T; };
template <class T> using same = typename Same<T>::type;  // prevents deduction of T
}  // namespace cuda_sim

// -- mathematics ---------------------------------------------------------------------------------

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline void sincosf(float x, float* s, float* c) { *s = sinf(x), *c = cosf(x); }
inline unsigned int __float_as_uint(float x) { return cuda_sim::bits_as<unsigned int>(x); }
inline int __float_as_int(float x) { return cuda_sim::bits_as<int>(x); }
inline float __uint_as_float(unsigned int x) { return cuda_sim::bits_as<float>(x); }
inline float __int_as_float(int x) { return cuda_sim::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return cuda_sim::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return cuda_sim::bits_as<double>(x); }
inline int __float2int_rn(float x) {  // as in CUDA, saturates, and converts NaN to 0
  if (x != x) return 0;
  return x >= 2147483648.0f ? 0x7fffffff : x <= -2147483648.0f ? (int)0x80000000 : (int)rintf(x);
}
inline int __popc(unsigned int x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned int)x) : 32; }
inline unsigned int __umulhi(unsigned int a, unsigned int b) {
  return (unsigned int)((unsigned long long)a * b >> 32);
}
inline unsigned int __byte_perm(unsigned int a, unsigned int b, unsigned int selector) {
  const unsigned long long bytes = (unsigned long long)b << 32 | a;
  unsigned int result = 0;
  for (int i = 0; i < 4; i++)
    result |= (unsigned int)(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 4; i++)
    sum += (int)(signed char)(a >> 8 * i) * (int)(signed char)(b >> 8 * i);
  return sum;
}
#define CUDA_SIM_MIN_MAX(T)                                                                       \
  inline T min(T a, T b) { return a < b ? a : b; }                                                \
  inline T max(T a, T b) { return a > b ? a : b; }
CUDA_SIM_MIN_MAX(int)
CUDA_SIM_MIN_MAX(unsigned int)
CUDA_SIM_MIN_MAX(long long)
CUDA_SIM_MIN_MAX(unsigned long long)
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

// -- barriers and warp operations ----------------------------------------------------------------

inline void __syncthreads(CUDA_SIM_HERE) { cuda_sim::block_barrier(0, CUDA_SIM_SITE); }
inline int __syncthreads_or(int p, CUDA_SIM_HERE) {
  return cuda_sim::block_barrier(p != 0, CUDA_SIM_SITE).any;
}
inline int __syncthreads_and(int p, CUDA_SIM_HERE) {
  return cuda_sim::block_barrier(p != 0, CUDA_SIM_SITE).all;
}
inline int __syncthreads_count(int p, CUDA_SIM_HERE) {
  return cuda_sim::block_barrier(p != 0, CUDA_SIM_SITE).count;
}
inline void __syncwarp(unsigned int mask = 0xffffffffu, CUDA_SIM_HERE) {
  cuda_sim::warp_operation(cuda_sim::BARRIER, mask, 0, 0, CUDA_SIM_SITE);
}
inline void __threadfence() { cuda_sim::fence(); }
inline void __threadfence_block() {}

template <class T>
T __shfl_xor_sync(unsigned int mask, T v, int lane_mask, int width = 32, CUDA_SIM_HERE) {
  int l = cuda_sim::lane(), source = l ^ lane_mask;
  return cuda_sim::shuffle(mask, v, source / width > l / width ? l : source, CUDA_SIM_SITE);
}
template <class T>
T __shfl_down_sync(unsigned int mask, T v, unsigned int delta, int width = 32, CUDA_SIM_HERE) {
  int l = cuda_sim::lane(), source = l % width + (int)delta < width ? l + (int)delta : l;
  return cuda_sim::shuffle(mask, v, source, CUDA_SIM_SITE);
}
template <class T>
T __shfl_up_sync(unsigned int mask, T v, unsigned int delta, int width = 32, CUDA_SIM_HERE) {
  int l = cuda_sim::lane(), source = l % width >= (int)delta ? l - (int)delta : l;
  return cuda_sim::shuffle(mask, v, source, CUDA_SIM_SITE);
}
template <class T>
T __shfl_sync(unsigned int mask, T v, int source, int width = 32, CUDA_SIM_HERE) {
  int l = cuda_sim::lane();
  return cuda_sim::shuffle(mask, v, l / width * width + (source & (width - 1)), CUDA_SIM_SITE);
}
inline unsigned int __ballot_sync(unsigned int mask, int p, CUDA_SIM_HERE) {
  return cuda_sim::warp_operation(cuda_sim::BALLOT, mask, p != 0, 0, CUDA_SIM_SITE);
}
inline int __any_sync(unsigned int mask, int p, CUDA_SIM_HERE) {
  return __ballot_sync(mask, p, file, line) != 0;
}
inline int __all_sync(unsigned int mask, int p, CUDA_SIM_HERE) {
  return __ballot_sync(mask, !p, file, line) == 0;
}
#define CUDA_SIM_REDUCE(T, name, how)                                                             \
  inline T name(unsigned int mask, T v, CUDA_SIM_HERE) {                                          \
    return (T)cuda_sim::warp_operation(cuda_sim::REDUCE, mask, (unsigned int)v, how,              \
                                       CUDA_SIM_SITE);                                            \
  }
CUDA_SIM_REDUCE(int, __reduce_add_sync, cuda_sim::ADD)
CUDA_SIM_REDUCE(int, __reduce_min_sync, cuda_sim::MIN)
CUDA_SIM_REDUCE(int, __reduce_max_sync, cuda_sim::MAX)
CUDA_SIM_REDUCE(unsigned int, __reduce_add_sync, cuda_sim::ADD)
CUDA_SIM_REDUCE(unsigned int, __reduce_min_sync, cuda_sim::UMIN)
CUDA_SIM_REDUCE(unsigned int, __reduce_max_sync, cuda_sim::UMAX)
CUDA_SIM_REDUCE(unsigned int, __reduce_and_sync, cuda_sim::AND)
CUDA_SIM_REDUCE(unsigned int, __reduce_or_sync, cuda_sim::OR)
CUDA_SIM_REDUCE(unsigned int, __reduce_xor_sync, cuda_sim::XOR)

// -- loads and stores with a cache hint, which check the alignment of their type -----------------

#define CUDA_SIM_LOAD(name)                                                                       \
  template <class T> inline T name(const T* p, CUDA_SIM_HERE) {                                   \
    cuda_sim::check_aligned(p, alignof(T), CUDA_SIM_SITE);                                        \
    return *p;                                                                                    \
  }
CUDA_SIM_LOAD(__ldg)
CUDA_SIM_LOAD(__ldcs)
CUDA_SIM_LOAD(__ldcg)
CUDA_SIM_LOAD(__ldca)
CUDA_SIM_LOAD(__ldlu)
#define CUDA_SIM_STORE(name)                                                                      \
  template <class T> inline void name(T* p, cuda_sim::same<T> v, CUDA_SIM_HERE) {                 \
    cuda_sim::check_aligned(p, alignof(T), CUDA_SIM_SITE);                                        \
    *p = v;                                                                                       \
  }
CUDA_SIM_STORE(__stcs)
CUDA_SIM_STORE(__stcg)

// -- atomics, only for the types that CUDA supports ----------------------------------------------

namespace cuda_sim {
template <class T> constexpr bool is_integer() {
  return std::is_same_v<T, int> || std::is_same_v<T, unsigned int> ||
         std::is_same_v<T, unsigned long long>;
}
template <class T> constexpr bool is_ordered() {
  return is_integer<T>() || std::is_same_v<T, long long>;
}
template <class T, class F> CUDA_SIM_UNWATCHED T exchange(T* p, Site site, F changed) {
  before_atomic(p, sizeof(T), site);
  T old = *p;
  *p = changed(old);
  return old;
}
}  // namespace cuda_sim

template <class T> T atomicAdd(T* p, cuda_sim::same<T> v, CUDA_SIM_HERE) {
  static_assert(cuda_sim::is_integer<T>() || std::is_floating_point_v<T>);
  return cuda_sim::exchange(p, CUDA_SIM_SITE, [=](T old) {
    if constexpr (std::is_same_v<T, int>) return (int)((unsigned int)old + (unsigned int)v);
    else return old + v;
  });
}
template <class T> T atomicMax(T* p, cuda_sim::same<T> v, CUDA_SIM_HERE) {
  static_assert(cuda_sim::is_ordered<T>());
  return cuda_sim::exchange(p, CUDA_SIM_SITE, [=](T old) { return old > v ? old : v; });
}
template <class T> T atomicMin(T* p, cuda_sim::same<T> v, CUDA_SIM_HERE) {
  static_assert(cuda_sim::is_ordered<T>());
  return cuda_sim::exchange(p, CUDA_SIM_SITE, [=](T old) { return old < v ? old : v; });
}
template <class T> T atomicExch(T* p, cuda_sim::same<T> v, CUDA_SIM_HERE) {
  static_assert(cuda_sim::is_integer<T>() || std::is_same_v<T, float>);
  return cuda_sim::exchange(p, CUDA_SIM_SITE, [=](T) { return v; });
}
template <class T> T atomicOr(T* p, cuda_sim::same<T> v, CUDA_SIM_HERE) {
  static_assert(cuda_sim::is_integer<T>());
  return cuda_sim::exchange(p, CUDA_SIM_SITE, [=](T old) { return old | v; });
}
template <class T>
T atomicCAS(T* p, cuda_sim::same<T> expected, cuda_sim::same<T> v, CUDA_SIM_HERE) {
  static_assert(cuda_sim::is_integer<T>());
  return cuda_sim::exchange(p, CUDA_SIM_SITE, [=](T old) { return old == expected ? v : old; });
}
inline unsigned int atomicInc(unsigned int* p, unsigned int limit, CUDA_SIM_HERE) {
  return cuda_sim::exchange(p, CUDA_SIM_SITE,
                            [=](unsigned int old) { return old >= limit ? 0 : old + 1; });
}

// -- descriptions of kernels, with which a launch checks its arguments ---------------------------

namespace cuda_sim {
template <class T> struct TypeName {  // in NumPy; cuda_fp16.h and cuda_bf16.h add types
  static constexpr const char* named() {
    constexpr bool is_signed = std::is_signed_v<T>;
    if constexpr (std::is_same_v<T, float>) return "float32";
    else if constexpr (std::is_same_v<T, double>) return "float64";
    else if constexpr (std::is_same_v<T, bool>) return "bool";
    else if constexpr (!std::is_integral_v<T>) return "";
    else if constexpr (sizeof(T) == 1) return is_signed ? "int8" : "uint8";
    else if constexpr (sizeof(T) == 2) return is_signed ? "int16" : "uint16";
    else if constexpr (sizeof(T) == 4) return is_signed ? "int32" : "uint32";
    else return is_signed ? "int64" : "uint64";
  }
  static constexpr const char* value = named();
};
struct Parameter {
  const char* type;  // NumPy's name of the type, or of the type pointed to; "" for others
  int is_pointer, is_const, size;
};
template <class T> constexpr Parameter describe() {
  if constexpr (std::is_pointer_v<T>) {
    using P = std::remove_pointer_t<T>;
    return {TypeName<std::remove_cv_t<P>>::value, 1, std::is_const_v<P>, sizeof(T)};
  } else {
    return {TypeName<T>::value, 0, 1, sizeof(T)};
  }
}
struct Kernel {
  const char* name;
  const Parameter* parameters;
  int n_parameters;
  void (*call)(void** arguments);
};
void add(const Kernel&);

template <auto F> struct Call;
template <class... A, void (*F)(A...)> struct Call<F> {
  static constexpr Parameter parameters[sizeof...(A) + 1] = {describe<A>()..., {"", 0, 0, 0}};
  template <size_t... I>
  static CUDA_SIM_UNWATCHED void unpacked(void** a, std::index_sequence<I...>) {
    F(*reinterpret_cast<std::remove_const_t<A>*>(a[I])...);
  }
  static CUDA_SIM_UNWATCHED void call(void** a) { unpacked(a, std::index_sequence_for<A...>{}); }
  static Kernel kernel(const char* name) { return {name, parameters, sizeof...(A), call}; }
};
struct Adder {
  Adder(const Kernel& k) { add(k); }
};
}  // namespace cuda_sim
#define CUDA_SIM_KERNEL(id, ...)                                                                  \
  static cuda_sim::Adder cuda_sim_adder_##id(cuda_sim::Call<&__VA_ARGS__>::kernel(#__VA_ARGS__));
