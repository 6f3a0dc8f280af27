// Kernels that test the shim itself: what it promises to do, and what it promises to catch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "cuda/launch.h"
#include "selftest_clusters.h"

namespace dimo::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

// --- what works ---------------------------------------------------------------------------------------------------

enum Shuffle { kFromLane, kUp, kDown, kXor };

template <class T>
__global__ void shuffle_kernel(const T* in, T* out, Shuffle shuffle, int argument, int width) {
  const T value = in[threadIdx.x];
  T& result = out[threadIdx.x];
  if (shuffle == kFromLane) result = __shfl_sync(kAllLanes, value, argument, width);
  if (shuffle == kUp) result = __shfl_up_sync(kAllLanes, value, argument, width);
  if (shuffle == kDown) result = __shfl_down_sync(kAllLanes, value, argument, width);
  if (shuffle == kXor) result = __shfl_xor_sync(kAllLanes, value, argument, width);
}

// Lanes below `split` vote apart from the others.
__global__ void vote_kernel(const int* in, unsigned* out, int split) {
  const unsigned lane = threadIdx.x % warpSize, low = (1u << split) - 1;
  const unsigned mask = lane < static_cast<unsigned>(split) ? low : ~low;
  unsigned* result = out + 3 * threadIdx.x;
  result[0] = __ballot_sync(mask, in[threadIdx.x]);
  result[1] = __any_sync(mask, in[threadIdx.x]);
  result[2] = __all_sync(mask, in[threadIdx.x]);
}

__global__ void atomic_kernel(const int* in, int* out, float* sum, unsigned long long* bits) {
  const int value = in[blockIdx.x * blockDim.x + threadIdx.x];
  atomicAdd(&out[0], value);
  atomicMax(&out[1], value);
  atomicMin(&out[2], value);
  int old = 0, assumed;
  do {
    assumed = old;
    old = atomicCAS(&out[3], assumed, assumed + value);
  } while (old != assumed);
  atomicAdd(sum, 0.5f);
  atomicOr(bits, 1ull << (value & 63));
}

template <bool kBarrier>
__global__ void reverse_kernel(const float* in, float* out) {
  float* row = shared_memory<float>();
  row[threadIdx.x] = in[threadIdx.x];
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = row[kThreads - 1 - threadIdx.x];
}

__global__ void convert_kernel(const float* in, uint16_t* half, uint16_t* bfloat, float* from_half,
                               float* from_bfloat) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  half[i] = __half_as_ushort(__float2half_rn(in[i]));
  bfloat[i] = __bfloat16_as_ushort(__float2bfloat16_rn(in[i]));
  from_half[i] = __half2float(__ushort_as_half(static_cast<uint16_t>(i)));
  from_bfloat[i] = __bfloat162float(__ushort_as_bfloat16(static_cast<uint16_t>(i)));
}

// --- what is caught -----------------------------------------------------------------------------------------------

__global__ void static_overrun(const float* in, float* out) {
  __shared__ float row[kThreads];
  float* next = row + 1;
  next[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x];
}

__global__ void dynamic_overrun(const float* in, float*) { shared_memory<float>()[threadIdx.x + 1] = in[threadIdx.x]; }

__global__ void tail_overrun(const float* in, float* out) {
  for (unsigned i = threadIdx.x; i <= kThreads; i += blockDim.x) out[i] = in[i];
}

__global__ void misaligned_access(const float* in, float* out) {
  *reinterpret_cast<float4*>(out) = *reinterpret_cast<const float4*>(in + 1);
}

__global__ void misaligned_load(const float* in, float* out) {
  out[threadIdx.x] = __ldg(reinterpret_cast<const float4*>(in + 1)).x;
}

__global__ void unguarded_count(const float*, float* out) { *out += 1.0f; }

__global__ void divergent_barrier(const float*, float*) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void barrier_after_exit(const float*, float*) {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

__global__ void absent_lanes(const float* in, float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_down_sync(kAllLanes, in[threadIdx.x], 1);
}

__global__ void lane_outside_mask(const float* in, float* out) {
  out[threadIdx.x] = __shfl_xor_sync(0xffffu, in[threadIdx.x], 1);
}

__global__ void source_outside_mask(const float* in, float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffu, in[threadIdx.x], 16);
}

__global__ void endless_loop(const float* in, float*) {
  while (in[0] == 0.0f) __syncthreads();
}

struct Fault {
  const char* name;
  void (*kernel)(const float*, float*);
  unsigned cluster;
};

#define FAULT(kernel) {#kernel, kernel, 1}
#define CLUSTER_FAULT(kernel) {#kernel, kernel, 2}

const Fault kFaults[] = {
    {"dropped_barrier", reverse_kernel<false>, 1},
    {"dropped_wait", copy_kernel<false, false>, 1},
    {"dropped_mailbox_wait", copy_kernel<true, false>, 1},
    FAULT(static_overrun),
    FAULT(dynamic_overrun),
    FAULT(tail_overrun),
    FAULT(misaligned_access),
    FAULT(misaligned_load),
    FAULT(unguarded_count),
    FAULT(divergent_barrier),
    FAULT(barrier_after_exit),
    FAULT(absent_lanes),
    FAULT(lane_outside_mask),
    FAULT(source_outside_mask),
    FAULT(endless_loop),
    FAULT(misaligned_copy),
    CLUSTER_FAULT(wrong_rank),
    CLUSTER_FAULT(absent_rank),
    CLUSTER_FAULT(too_many_bytes),
    CLUSTER_FAULT(too_few_bytes),
    CLUSTER_FAULT(foreign_address),
    CLUSTER_FAULT(dropped_cluster_sync),
    CLUSTER_FAULT(lonely_cluster_sync),
    CLUSTER_FAULT(closed_mailbox),
    CLUSTER_FAULT(hasty_message),
};

}  // namespace
}  // namespace dimo::cuda

using namespace dimo::cuda;

extern "C" {

int shuffle32(const float* in, float* out, int64_t kind, int64_t argument, int64_t width) {
  return launch(shuffle_kernel<float>, 1, kThreads, 0, nullptr, in, out, static_cast<Shuffle>(kind),
                static_cast<int>(argument), static_cast<int>(width));
}

int shuffle64(const double* in, double* out, int64_t kind, int64_t argument, int64_t width) {
  return launch(shuffle_kernel<double>, 1, kThreads, 0, nullptr, in, out, static_cast<Shuffle>(kind),
                static_cast<int>(argument), static_cast<int>(width));
}

int vote(const int* in, unsigned* out, int64_t split) {
  return launch(vote_kernel, 1, kThreads, 0, nullptr, in, out, static_cast<int>(split));
}

int atomics(const int* in, int* out, float* sum, unsigned long long* bits, int64_t blocks) {
  return launch(atomic_kernel, static_cast<unsigned>(blocks), kThreads, 0, nullptr, in, out, sum, bits);
}

int reverse(const float* in, float* out) {
  return launch(reverse_kernel<true>, 1, kThreads, kThreads * sizeof(float), nullptr, in, out);
}

// 2^16 numbers
int convert(const float* in, uint16_t* half, uint16_t* bfloat, float* from_half, float* from_bfloat) {
  return launch(convert_kernel, 256, 256, 0, nullptr, in, half, bfloat, from_half, from_bfloat);
}

// A number a block; each block says what the blocks of its cluster have, or what it has itself.
int exchange_in_clusters(const float* in, float* out, int64_t cluster, int64_t clusters, int64_t keep) {
  return launch_clusters(keep != 0 ? keep_kernel : exchange_kernel, static_cast<unsigned>(cluster),
                         static_cast<unsigned>(cluster * clusters), kThreads, sizeof(Inbox), in, out);
}

int copy(const float* in, float* out, int64_t mailbox) {
  return launch(mailbox != 0 ? copy_kernel<true, true> : copy_kernel<false, true>, 1, kThreads, sizeof(Parcel), nullptr,
                in, out);
}

int refused(int64_t threads, int64_t shared_bytes, int64_t cluster) {
  return launch_clusters(reverse_kernel<true>, static_cast<unsigned>(cluster), 32, static_cast<unsigned>(threads),
                         static_cast<size_t>(shared_bytes), nullptr, nullptr);
}

// in and out hold 64 numbers, and the launch finds clusters. -1: there is no such fault.
int fault(const char* name, const float* in, float* out) {
  for (const Fault& fault : kFaults)
    if (std::strcmp(fault.name, name) == 0)
      return launch_clusters(fault.kernel, fault.cluster, fault.cluster, kThreads, kThreads * sizeof(float), in, out);
  return -1;
}

}  // extern "C"
