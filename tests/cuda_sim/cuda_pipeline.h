// Asynchronous copies from global to shared memory. A copy is executed as late as CUDA allows: when
// its thread waits for it. Until then no thread may access the shared memory that the copy fills.
#pragma once
#include "cuda_sim.h"

inline void __pipeline_memcpy_async(void* shared, const void* global, size_t size,
                                    size_t zeros = 0, CUDA_SIM_HERE) {
  cuda_sim::copy_later(shared, global, size, zeros, CUDA_SIM_SITE);
}
inline void __pipeline_commit() { cuda_sim::commit_copies(); }
inline void __pipeline_wait_prior(size_t n) { cuda_sim::wait_for_copies(n); }
