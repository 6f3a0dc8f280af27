// What newer GPUs add and C++ has no word for, in thin wrappers: asynchronous copies, clusters of blocks, the hardware's
// exponential. On the host, where tests run the kernels, and on older GPUs plain code stands in.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace dimo::cuda {

// 2^x by the special-function unit: relative error below 2^-21, results below 2^-126 become 0.
__device__ inline float exp2_fast(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}

// Has the compiler forget what it computed from x, so that results of one sweep do not occupy registers until the next.
__device__ inline void forget(float& x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+f"(x));
#endif
}
__device__ inline void forget(int& x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(x));
#endif
}

// Copies 16 aligned bytes from global to shared memory; the copying thread sees them after wait_for_copies().
__device__ inline void copy_async(uint4* to, const void* from) {
#if defined(__CUDA_ARCH__)
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
#else
  *to = *static_cast<const uint4*>(from);
#endif
}

__device__ inline void wait_for_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// The blocks of a cluster run together and reach each other's shared memory. A launch without clusters has clusters of 1.
__device__ inline unsigned cluster_size() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
  return size;
#else
  return 1;
#endif
}

__device__ inline unsigned cluster_rank() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

// Waits for all threads of the cluster; what they wrote to shared memory before is seen after.
__device__ inline void cluster_sync() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// *to = value in the shared memory of the cluster's block `rank`, where `to` is this block's own address.
__device__ inline void store_in_cluster(float* to, unsigned rank, float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
#else
  *to = value;
#endif
}

}  // namespace dimo::cuda
