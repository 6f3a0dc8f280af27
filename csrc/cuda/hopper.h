// What newer GPUs add and C++ has no word for, in thin wrappers: asynchronous copies, clusters of blocks, the
// hardware's exponential. On older GPUs plain code stands in. Tests that execute kernels on the host put their own file
// of this name earlier on the include path.
#pragma once

#include <cstdint>

namespace dimo::cuda {

// 2^x by the special-function unit: relative error below 2^-21, results below 2^-126 become 0.
__device__ inline float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// a + b rounded down.
__device__ inline float add_down(float a, float b) { return __fadd_rd(a, b); }

// Has the compiler forget what it computed from x, so that results of one sweep do not occupy registers until the next.
__device__ inline void forget(float& x) { asm volatile("" : "+f"(x)); }
__device__ inline void forget(int& x) { asm volatile("" : "+r"(x)); }

// Loads into a register as it is: nothing waits for the number until it is used.
__device__ inline unsigned load_32_bits(const void* from) {
  unsigned bits;
  asm volatile("ld.global.b32 %0, [%1];" : "=r"(bits) : "l"(from));
  return bits;
}
__device__ inline unsigned long long load_64_bits(const void* from) {
  unsigned long long bits;
  asm volatile("ld.global.b64 %0, [%1];" : "=l"(bits) : "l"(from));
  return bits;
}
__device__ inline unsigned load_16_bits(const void* from) {
  unsigned bits;
  asm volatile("ld.global.u16 %0, [%1];" : "=r"(bits) : "l"(from));
  return bits;
}
__device__ inline unsigned load_8_bits(const void* from) {
  unsigned bits;
  asm volatile("ld.global.u8 %0, [%1];" : "=r"(bits) : "l"(from));
  return bits;
}

// Copies 16 aligned bytes from global to shared memory; the copying thread sees them after wait_for_copies().
__device__ inline void copy_async(uint4* to, const void* from) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}

__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The same in groups: all but the latest kPending groups of a thread's copies are waited for.
__device__ inline void end_group_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ inline void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// The blocks of a cluster run together and reach each other's shared memory. A launch without clusters has clusters
// of 1.
__device__ inline unsigned cluster_size() {
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
  return size;
}

__device__ inline unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Waits for all threads of the cluster.
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ constexpr bool has_mailboxes() { return true; }

// Counts the bytes that arrive in this block's shared memory, phase after phase.
class Mailbox {
 public:
  // By one thread, before a cluster_sync.
  __device__ void open() {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address()) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }

  // By one thread, once a phase: how many bytes complete it.
  __device__ void expect(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
  }

  // *to = value in the shared memory of the cluster's block `rank`, reported to that block's mailbox; `to` and this
  // mailbox are named by this block's own addresses.
  __device__ void send(float* to, unsigned rank, float value) {
    unsigned there = static_cast<unsigned>(__cvta_generic_to_shared(to)), mailbox = address();
    asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(there) : "r"(rank));
    asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(mailbox) : "r"(rank));
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(there), "f"(value),
                 "r"(mailbox)
                 : "memory");
  }

  // By one thread: copies a multiple of 16 bytes, aligned, from global to this block's shared memory. What was read
  // there before must have been read by then.
  __device__ void copy(void* to, const void* from, int bytes) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(to))),
                 "l"(from), "r"(bytes), "r"(address())
                 : "memory");
  }

  // Waits until a phase is complete: 0, 1, 0, ... in turn.
  __device__ void wait(int phase) {
    int done = 0;
    while (done == 0)
      asm volatile(
          "{\n\t.reg .pred p;\n\t"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
          "selp.b32 %0, 1, 0, p;\n\t}"
          : "=r"(done)
          : "r"(address()), "r"(phase)
          : "memory");
  }

 private:
  __device__ unsigned address() { return static_cast<unsigned>(__cvta_generic_to_shared(&state_)); }
  uint64_t state_;
};

#else  // Every block is a cluster of its own, and no one writes to it.

__device__ inline unsigned cluster_size() { return 1; }
__device__ inline unsigned cluster_rank() { return 0; }
__device__ inline void cluster_sync() {}

__device__ constexpr bool has_mailboxes() { return false; }

class Mailbox {
 public:
  __device__ void open() {}
  __device__ void expect(int) {}
  __device__ void send(float*, unsigned, float) {}
  __device__ void copy(void*, const void*, int) {}
  __device__ void wait(int) {}

 private:
  [[maybe_unused]] uint64_t state_;
};

#endif

}  // namespace dimo::cuda
