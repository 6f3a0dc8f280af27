// The k smallest of a row's keys on the device: the search of common/select.h by a block.
#pragma once

#include <cstdint>

#include "common/select.h"

namespace dimo::cuda {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Sum over the block.
__device__ inline uint32_t block_sum(uint32_t value) {
  __shared__ uint32_t total;
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_down_sync(kAllLanes, value, step);
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  if (threadIdx.x % kWarp == 0) atomicAdd(&total, value);
  __syncthreads();
  return total;
}

// The first warp finds the digit under which the key of this rank lies: a prefix sum over lanes shows the one lane that
// holds it, and that lane searches its share.
__device__ inline void choose_digit(const uint32_t* histogram, uint32_t rank, DigitChoice* choice) {
  constexpr uint32_t kShare = kDigits / kWarp;
  const uint32_t lane = threadIdx.x;
  uint32_t sum = 0;
  for (uint32_t i = 0; i < kShare; ++i) sum += histogram[lane * kShare + i];
  uint32_t through = sum;
  for (uint32_t step = 1; step < kWarp; step *= 2) {
    const uint32_t lower = __shfl_up_sync(kAllLanes, through, step);
    if (lane >= step) through += lower;
  }
  uint32_t before = through - sum;
  if (rank <= before || rank > through) return;
  uint32_t digit = lane * kShare;
  for (; before + histogram[digit] < rank; ++digit) before += histogram[digit];
  *choice = {digit, before, histogram[digit]};
}

// Finds the k smallest of the block's keys, k > 0: each_key(visit) calls visit(key) for those that the thread has.
template <class EachKey>
__device__ KeySearch find_smallest(uint32_t k, const EachKey& each_key) {
  __shared__ uint32_t histogram[kDigits];
  __shared__ DigitChoice choice;
  KeySearch search(k);
  while (!search.done) {
    for (uint32_t i = threadIdx.x; i < kDigits; i += blockDim.x) histogram[i] = 0;
    __syncthreads();
    each_key([&](uint64_t key) {
      if (search.candidate(key)) atomicAdd(&histogram[search.digit(key)], 1u);
    });
    __syncthreads();
    if (threadIdx.x < kWarp) choose_digit(histogram, search.rank, &choice);
    __syncthreads();
    search.descend(choice);
  }
  return search;
}

// Threads of a block for the tokens of a sample: each owns blocks of four, the words of one Philox call.
constexpr int kMaxThreads = 1024;

inline unsigned threads_for(int64_t length) {
  const int64_t warps = (length + 4 * kWarp - 1) / (4 * kWarp);
  return static_cast<unsigned>(warps * kWarp < kMaxThreads ? warps * kWarp : kMaxThreads);
}

}  // namespace
}  // namespace dimo::cuda
