// What newer GPUs add and C++ has no word for, in thin wrappers: asynchronous copies, clusters of blocks, the
// hardware's exponential. On the host, where tests run the kernels, and on older GPUs plain code stands in.
#pragma once

#include <cmath>
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

// a + b rounded down.
__device__ inline float add_down(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rd(a, b);
#else
  const double exact = static_cast<double>(a) + static_cast<double>(b);  // of numbers no further apart than 2^29
  const float nearest = static_cast<float>(exact);
  return static_cast<double>(nearest) > exact ? nextafterf(nearest, -INFINITY) : nearest;
#endif
}

// Has the compiler forget what it computed from x, so that results of one sweep do not occupy registers until the next.
__device__ inline void forget([[maybe_unused]] float& x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+f"(x));
#endif
}
__device__ inline void forget([[maybe_unused]] int& x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(x));
#endif
}

// Loads into a register as it is: nothing waits for the number until it is used.
__device__ inline unsigned load_32_bits(const void* from) {
#if defined(__CUDA_ARCH__)
  unsigned bits;
  asm volatile("ld.global.b32 %0, [%1];" : "=r"(bits) : "l"(from));
  return bits;
#else
  return *static_cast<const unsigned*>(from);
#endif
}
__device__ inline unsigned long long load_64_bits(const void* from) {
#if defined(__CUDA_ARCH__)
  unsigned long long bits;
  asm volatile("ld.global.b64 %0, [%1];" : "=l"(bits) : "l"(from));
  return bits;
#else
  return *static_cast<const unsigned long long*>(from);
#endif
}
__device__ inline unsigned load_16_bits(const void* from) {
#if defined(__CUDA_ARCH__)
  unsigned bits;
  asm volatile("ld.global.u16 %0, [%1];" : "=r"(bits) : "l"(from));
  return bits;
#else
  return *static_cast<const unsigned short*>(from);
#endif
}
__device__ inline unsigned load_8_bits(const void* from) {
#if defined(__CUDA_ARCH__)
  unsigned bits;
  asm volatile("ld.global.u8 %0, [%1];" : "=r"(bits) : "l"(from));
  return bits;
#else
  return *static_cast<const unsigned char*>(from);
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

// The same of what lies before `stop`, behind which there may be no memory: numbers of 2 or 4 bytes.
__device__ inline void copy_cell(void* to, const char* from, const char* stop) {
  if (stop - from >= 16) return copy_async(static_cast<uint4*>(to), from);
  for (int i = 0; i < stop - from; i += 2)
    static_cast<unsigned short*>(to)[i / 2] = *reinterpret_cast<const unsigned short*>(from + i);
}

__device__ inline void wait_for_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// The same in groups: all but the latest kPending groups of a thread's copies are waited for.
__device__ inline void end_group_of_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int kPending>
__device__ inline void wait_for_groups() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// The blocks of a cluster run together and reach each other's shared memory. A launch without clusters has clusters
// of 1.
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

// Waits for all threads of the cluster.
__device__ inline void cluster_sync() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kHasMailbox = true;
#else
constexpr bool kHasMailbox = false;
#endif

// Counts the bytes that arrive in this block's shared memory, phase after phase.
class Mailbox {
 public:
  // By one thread, before a cluster_sync.
  __device__ void open() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address()) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }

  // By one thread, once a phase: how many bytes complete it.
  __device__ void expect([[maybe_unused]] int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
#endif
  }

  // *to = value in the shared memory of the cluster's block `rank`, reported to that block's mailbox; `to` and this
  // mailbox are named by this block's own addresses.
  __device__ void send(float* to, [[maybe_unused]] unsigned rank, float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    unsigned there = static_cast<unsigned>(__cvta_generic_to_shared(to)), mailbox = address();
    asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(there) : "r"(rank));
    asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(mailbox) : "r"(rank));
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(there), "f"(value),
                 "r"(mailbox)
                 : "memory");
#else
    *to = value;
#endif
  }

  // By one thread: copies a multiple of 16 bytes, aligned, from global to this block's shared memory. What was read
  // there before must have been read by then.
  __device__ void copy([[maybe_unused]] void* to, [[maybe_unused]] const void* from, [[maybe_unused]] int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(to))),
                 "l"(from), "r"(bytes), "r"(address())
                 : "memory");
#endif
  }

  // Waits until a phase is complete: 0, 1, 0, ... in turn.
  __device__ void wait([[maybe_unused]] int phase) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    int done = 0;
    while (done == 0)
      asm volatile(
          "{\n\t.reg .pred p;\n\t"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
          "selp.b32 %0, 1, 0, p;\n\t}"
          : "=r"(done)
          : "r"(address()), "r"(phase)
          : "memory");
#endif
  }

 private:
#if defined(__CUDA_ARCH__)
  __device__ unsigned address() { return static_cast<unsigned>(__cvta_generic_to_shared(&state_)); }
#endif
  [[maybe_unused]] uint64_t state_;
};

}  // namespace dimo::cuda
