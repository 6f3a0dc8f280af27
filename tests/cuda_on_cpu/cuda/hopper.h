// What csrc/cuda/hopper.h says in PTX, on the CPU. Copies and messages arrive late: until somebody waits for them, or
// at some moment while other threads run. Meanwhile NaN lies where they go.
#pragma once

#include <cuda_runtime_api.h>

namespace dimo::cuda {

inline float exp2_fast(float x) { return exp2f(x); }

inline float add_down(float a, float b) {
  const double exact = static_cast<double>(a) + static_cast<double>(b);  // of numbers no further apart than 2^29
  const float nearest = static_cast<float>(exact);
  return static_cast<double>(nearest) > exact ? nextafterf(nearest, -INFINITY) : nearest;
}

inline void forget(float&) {}
inline void forget(int&) {}

inline unsigned load_32_bits(const void* from) { return *static_cast<const unsigned*>(from); }
inline unsigned long long load_64_bits(const void* from) { return *static_cast<const unsigned long long*>(from); }
inline unsigned load_16_bits(const void* from) { return *static_cast<const unsigned short*>(from); }
inline unsigned load_8_bits(const void* from) { return *static_cast<const unsigned char*>(from); }

inline void copy_async(uint4* to, const void* from, CUDA_ON_CPU_SITE) {
  const auto* cell = static_cast<const uint4*>(from);
  cuda_on_cpu::check_aligned("copy_async", to, site);
  cuda_on_cpu::check_aligned("copy_async", cell, site);
  cuda_on_cpu::copy_until_waited_for(cuda_on_cpu::depart(to, cell, 1));
}
inline void wait_for_copies() { cuda_on_cpu::wait_for_copies(); }
inline void end_group_of_copies() { cuda_on_cpu::end_group_of_copies(); }
template <int kPending>
void wait_for_groups() {
  cuda_on_cpu::wait_for_groups(kPending);
}

inline unsigned cluster_size() { return cuda_on_cpu::cluster_size(); }
inline unsigned cluster_rank() { return cuda_on_cpu::cluster_rank(); }
inline void cluster_sync(CUDA_ON_CPU_SITE) { cuda_on_cpu::meet_cluster("cluster_sync", site); }

inline bool has_mailboxes() { return cuda_on_cpu::is_hopper(); }

class Mailbox {
 public:
  void open() { cuda_on_cpu::open(barrier_); }
  void expect(int bytes, CUDA_ON_CPU_SITE) { cuda_on_cpu::expect("Mailbox::expect", barrier_, bytes, site); }

  void send(float* to, unsigned rank, float value, CUDA_ON_CPU_SITE) {
    auto* const there = static_cast<float*>(cuda_on_cpu::in_block(rank, to, sizeof value, "Mailbox::send", site));
    post("Mailbox::send", there, &value, 1, rank, site);
  }

  void copy(void* to, const void* from, int bytes, CUDA_ON_CPU_SITE) {
    if (bytes <= 0 || bytes % 16 != 0) cuda_on_cpu::fail("Mailbox::copy", site, "no multiple of 16 bytes");
    const auto size = static_cast<size_t>(bytes);
    auto* const there = static_cast<uint4*>(cuda_on_cpu::in_block(cluster_rank(), to, size, "Mailbox::copy", site));
    const auto* const cells = static_cast<const uint4*>(from);
    cuda_on_cpu::check_aligned("Mailbox::copy", there, site);
    cuda_on_cpu::check_aligned("Mailbox::copy", cells, site);
    post("Mailbox::copy", there, cells, size / 16, cluster_rank(), site);
  }

  void wait(int phase, CUDA_ON_CPU_SITE) { cuda_on_cpu::wait("Mailbox::wait", barrier_, phase, site); }

 private:
  template <class T>
  void post(const char* operation, T* to, const T* from, size_t count, unsigned rank, cuda_on_cpu::Site site) {
    void* const there = cuda_on_cpu::in_block(rank, &barrier_, sizeof barrier_, operation, site);
    auto& barrier = *static_cast<cuda_on_cpu::Barrier*>(there);
    cuda_on_cpu::check_open(operation, barrier, site);
    cuda_on_cpu::post(operation, cuda_on_cpu::depart(to, from, count), barrier, rank, site);
  }

  cuda_on_cpu::Barrier barrier_;
};

}  // namespace dimo::cuda
